"""A libvirtd of the test's own, beside whatever the machine has: in a mount namespace where
libvirt's directories are the test's. Everything that it keeps is visible below ``base``."""

from __future__ import annotations

import dataclasses
import os
import select
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from hostupdate.cli.lab import LabGuests
from hostupdate.guests import Hypervisor
from hostupdate.lab import accelerator, fleet, image
from hostupdate.lab.domain import Witness
from tests.functional.cli import Lab, Program

_START_S = 60
_LISTEN_NS = 5_000_000_000
_CALL_NS = 20_000_000_000
_MEMORY = 192 << 20
_BOOT_NS = 90_000_000_000
_STAMP_NS_PER_BYTE = 30

#: Each start makes the namespace anew; the directories are the same, so that a libvirtd finds the
#: guests of the one before. The script ends when libvirtd answers.
_START = """\
#!/bin/sh
exec >>{base}/log/start.log 2>&1
exec unshare --mount --propagation private sh -eux -c '
mount -t tmpfs -o mode=755 none /run
mkdir -p /run/libvirt /var/lib/libvirt /var/cache/libvirt /var/log/libvirt /etc/libvirt
mount --bind {base}/run /run/libvirt
mount --bind {base}/lib /var/lib/libvirt
mount --bind {base}/cache /var/cache/libvirt
mount --bind {base}/log /var/log/libvirt
mount --bind {base}/etc /etc/libvirt
{hide_kvm}
exec libvirtd --daemon --config /etc/libvirt/libvirtd.conf --pid-file /run/libvirt/libvirtd.pid
'
"""
_HIDE_KVM = """\
[ ! -e /dev/kvm ] || mount --bind {base}/no-kvm /dev/kvm
[ ! -e /dev/kvm ] || mount -o remount,bind,ro /dev/kvm
"""
_KILL = """\
#!/bin/sh
exec kill -{signal} "$(cat {base}/run/libvirtd.pid)"
"""
_LIBVIRTD_CONF = """\
auth_unix_ro = "none"
auth_unix_rw = "none"
"""
_QEMU_CONF = """\
stdio_handler = "file"
security_driver = "none"
user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
namespaces = []
cgroup_controllers = []
"""


class Daemon:
    """Scripts that steps of an update may run: ``start``, ``kill`` (SIGKILL), ``hang`` (SIGSTOP)
    and ``wake`` (SIGCONT)."""

    def __init__(self, base: Path, hide_kvm: bool, ram: Path | None = None) -> None:
        self.base = base
        for name in ("run", "lib", "cache", "log", "etc"):
            (base / name).mkdir()
        (base / "etc/libvirtd.conf").write_text(_LIBVIRTD_CONF)
        backing = f'memory_backing_dir = "{ram}"\n' if ram else ""
        (base / "etc/qemu.conf").write_text(_QEMU_CONF + backing)
        # A /dev/kvm that can be written but does not work costs probes at each start of a guest
        # (virQEMUCapsIsValid); a file that is read-only cannot be.
        (base / "no-kvm").touch()
        hide = _HIDE_KVM.format(base=base) if hide_kvm else ""
        self.start = self._script("start", _START.format(base=base, hide_kvm=hide))
        self.kill = self._script("kill", _KILL.format(base=base, signal="KILL"))
        self.hang = self._script("hang", _KILL.format(base=base, signal="STOP"))
        self.wake = self._script("wake", _KILL.format(base=base, signal="CONT"))

    @property
    def uri(self) -> str:
        return f"qemu:///system?socket={self.base}/run/libvirt-sock"

    @property
    def pid(self) -> int | None:
        """The living daemon."""
        with suppress(OSError, ValueError):
            pid = int((self.base / "run/libvirtd.pid").read_text())
            name, _, rest = Path(f"/proc/{pid}/stat").read_text().partition("(")[2].rpartition(")")
            return pid if name == "libvirtd" and rest.split()[0] not in "ZX" else None
        return None

    def ensure(self) -> None:
        """Starts it where it does not run, lets it run where it hangs."""
        pid = self.pid
        if pid is None:
            ended = subprocess.run([self.start], timeout=_START_S, check=False)
            said = (self.base / "log/start.log").read_text()
            assert ended.returncode == 0, f"libvirtd does not start:\n{said}"
        else:
            os.kill(pid, signal.SIGCONT)
            if not self._answers():
                self.end()
                self.ensure()

    def _answers(self) -> bool:
        """It listens; one that is about to start or to end does not for a moment."""
        deadline_ns = time.monotonic_ns() + _LISTEN_NS
        while time.monotonic_ns() < deadline_ns:
            with socket.socket(socket.AF_UNIX) as client, suppress(OSError):
                client.connect(str(self.base / "run/libvirt-sock"))
                return True
            time.sleep(0.05)
        return False

    def end(self) -> None:
        """Kills it and waits until it is gone."""
        pid = self.pid
        if pid is None:
            return
        pidfd = os.pidfd_open(pid)
        os.kill(pid, signal.SIGKILL)
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        assert poll.poll(_START_S * 1000), "libvirtd does not die"
        os.close(pidfd)

    def _script(self, name: str, text: str) -> Path:
        path = self.base / name
        path.write_text(text)
        path.chmod(0o755)
        return path


class DaemonLab:
    """Lab guests on a libvirtd of their own; ``ram`` is the directory of their RAM's files."""

    def __init__(
        self,
        base: Path,
        cache: Path,
        guests: int,
        ram: Path | None = None,
        *,
        memory_bytes: int = _MEMORY,
        witness: Witness | None = None,
        emulator: Path | None = None,
    ) -> None:
        built = image.build(cache)
        acceleration = accelerator.probe(built, cache)
        if emulator:
            acceleration = dataclasses.replace(acceleration, emulator=emulator)
        self.daemon = Daemon(base, hide_kvm=acceleration.kind != "kvm", ram=ram)
        self._guests, self._image, self._acceleration = guests, built, acceleration
        self._ram_in_files = ram is not None
        self._memory_bytes, self._witness = memory_bytes, witness
        self._state = base / "state"
        self._root = self._state / "lab"
        self._root.mkdir(parents=True)
        self.daemon.ensure()
        try:
            fleet.prepare_root(self._root)
            made = self.replenish()
        except BaseException:
            self.daemon.end()
            raise
        program = Program(self._state).with_options("--connect", self.daemon.uri)
        self.lab = Lab(program, tuple(guest.name for guest in made))

    def replenish(self) -> tuple[fleet.GuestStatus, ...]:
        """Makes the guests that are not there."""
        hypervisor = Hypervisor(self.daemon.uri, timeout_ns=_CALL_NS)
        try:
            return fleet.up(
                LabGuests(hypervisor),
                self._root,
                self._guests,
                self._memory_bytes,
                image=self._image,
                acceleration=self._acceleration,
                witness=self._witness,
                ram_in_files=self._ram_in_files,
                timeout_ns=_BOOT_NS + _STAMP_NS_PER_BYTE * self._memory_bytes,
            )
        finally:
            hypervisor.close()

    def remove(self) -> None:
        """The guests and the daemon."""
        self.daemon.ensure()
        hypervisor = Hypervisor(self.daemon.uri, timeout_ns=_CALL_NS)
        try:
            fleet.down(LabGuests(hypervisor), self._root)
        finally:
            hypervisor.close()
            self.daemon.end()
