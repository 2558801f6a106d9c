"""A guest with disks, a network card and a screen comes under other QEMUs, on a libvirtd with its
own security settings; to its owner and its applications it is the guest that it was."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from uuid import UUID

import pytest

from hostupdate.guests import Hypervisor
from hostupdate.handover import builds
from hostupdate.handover.builds import Build
from hostupdate.lab import accelerator, console, domain, image
from tests.functional.cli import Lab, Program
from tests.functional.conftest import make_cache
from tests.functional.daemon import Daemon
from tests.functional.owner import Owner
from tests.functional.parked_guest import wait
from tests.functional.test_handover import version_of
from tests.requirements import lack, need

SYSTEM = Path("/usr/bin/qemu-system-x86_64")
NAME = "furnished"
UUID_ = UUID("5d3bd7a4-5c0e-4fa4-a1c2-60a0f2d6c101")
_SECOND_NS = 1_000_000_000
_MEMORY = 192 << 20
_MAC = "52:54:00:77:00:03"
_HOST, _GUEST = "169.254.213.1", "169.254.213.2"  # of this link alone (RFC 3927)
_HOST_2, _GUEST_2 = "169.254.213.5", "169.254.213.6"
#: As Debian's libvirt has them: QEMU is another user's, in a sandbox. But for what the daemon of
#: these tests cannot give: cgroups' controllers, virtlogd, and a /dev that is the host's.
_CONF = """\
stdio_handler = "file"
namespaces = []
cgroup_controllers = []
memory_backing_dir = "{base}/ram"
"""
_DEVICES = """\
<disk type='file' device='disk'><driver name='qemu' type='qcow2' discard='unmap'/>
<source file='{base}/disks/a.qcow2'/><target dev='vda' bus='virtio'/></disk>
<interface type='bridge'><source bridge='{bridge}'/><mac address='{mac}'/>
<model type='virtio'/></interface>
<graphics type='vnc' autoport='yes'/><video><model type='vga' vram='16384'/></video>
<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
<input type='tablet' bus='virtio'/>
<sound model='ich6'/><watchdog model='i6300esb' action='none'/>
"""
_SECOND = (
    """\
<disk type='file' device='disk'><driver name='qemu' type='raw'/>
<source file='{base}/disks/b.raw'/><target dev='vdb' bus='virtio'/></disk>
""",
    """\
<interface type='bridge'><source bridge='{bridge}'/><mac address='52:54:00:77:00:04'/>
<model type='virtio'/><driver queues='2'/></interface>
""",
)
#: The second disk and the second network card work.
_USE_SECOND = """\
busybox ip link set eth1 up
busybox ip addr show eth1 | busybox grep -q {address} || busybox ip addr add {address}/30 dev eth1
busybox dd if=/dev/urandom of=/run/block bs=4096 count=1
busybox dd if=/run/block of=/dev/vdb bs=4096 seek=7 oflag=direct
busybox dd if=/dev/vdb of=/run/block.read bs=4096 count=1 skip=7 iflag=direct
busybox cmp /run/block /run/block.read && echo same
busybox ping -c 3 -i 0.2 -W 5 {host}
"""
#: Writes a block, reads it back past every cache; /run/io tells how often, and how often in vain.
_IO = """\
echo 1 > /proc/sys/net/ipv4/conf/all/arp_ignore  # both its cards are on one link
busybox ip link set eth0 up; busybox ip addr add {address}/30 dev eth0
i=0; bad=0
while :; do
  i=$((i + 1)); at=$((i % 256))
  printf 'block %d' $i | busybox dd of=/dev/vda bs=4096 conv=sync seek=$at oflag=direct ||
    bad=$((bad + 1))
  got=$(busybox dd if=/dev/vda bs=4096 count=1 skip=$at iflag=direct | busybox tr -d '\\0')
  [ "$got" = "block $i" ] || bad=$((bad + 1))
  echo $i $bad > /run/io.new; busybox mv /run/io.new /run/io
done
"""
_SHUTDOWN = "printf '#!/bin/sh\\nbusybox poweroff -f\\n' > /sbin/shutdown; chmod 755 /sbin/shutdown"


class Furnished:
    """The guest and all around it."""

    def __init__(self, base: Path, daemon: Daemon, hypervisor: Hypervisor, bridge: str) -> None:
        self.base, self.daemon, self.hypervisor = base, daemon, hypervisor
        self.bridge = bridge
        config = base / "hostupdate.toml"
        config.write_text(
            f'[paths]\nlibvirt-hooks = "{base}/etc/hooks"\nlibvirt-saves = "{base}/lib/qemu/save"\n'
            f'builds = "{base}/builds"\n[clock]\ntrust-host = true\n'
        )
        program = Program(base / "state")
        options = ("--connect", daemon.uri, "--config", str(config))
        self.lab = Lab(program.with_options(*options), (NAME,))
        self.owner = Owner(hypervisor)

    def start(self) -> None:
        """Until its disk is written to and its network answers."""
        log = self.lab.console(NAME)
        log.parent.mkdir(parents=True, exist_ok=True)
        self.owner.start(NAME)
        console.wait_ready(log, time.monotonic_ns() + 90 * _SECOND_NS)
        self.owner.ping(NAME)
        self.owner.shell(NAME, _IO.format(address=_GUEST))
        wait(lambda: self.in_guest("cat /run/io || echo").strip())

    def remove(self) -> None:
        self.daemon.ensure()
        if self.owner.known()[NAME]:
            self.owner.destroy(NAME)
        self.owner.undefine(NAME)

    def virsh(self, *words: str) -> str:
        argv = ["virsh", "-c", self.daemon.uri, *words]
        ended = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
        assert ended.returncode == 0, (words, ended.stderr)
        return ended.stdout.strip()

    def stats(self, verb: str, device: str) -> dict[str, int]:
        rows = (line.split() for line in self.virsh(verb, NAME, device).splitlines())
        return {row[-2]: int(row[-1]) for row in rows if len(row) >= 2}

    def in_guest(self, script: str) -> str:
        """Its output."""
        arguments = {"path": "/bin/sh", "arg": ["-c", script], "capture-output": True}
        act = {"execute": "guest-exec", "arguments": arguments}
        pid = self.owner.agent(NAME, act, 10 * _SECOND_NS)["return"]["pid"]
        deadline = time.monotonic() + 20
        while True:
            ask = {"execute": "guest-exec-status", "arguments": {"pid": pid}}
            told = self.owner.agent(NAME, ask, 10 * _SECOND_NS)["return"]
            if told["exited"]:
                return subprocess.run(
                    ["base64", "-d"], input=told.get("out-data", "").encode(),
                    capture_output=True, check=True,
                ).stdout.decode()  # fmt: skip
            assert time.monotonic() < deadline, script
            time.sleep(0.05)

    def io(self) -> tuple[int, int]:
        count, bad = self.in_guest("cat /run/io").split()
        return int(count), int(bad)

    def assert_as_it_was(self) -> None:
        """What its owner and its applications do with it goes on."""
        before, bad = self.io()
        assert bad == 0
        wait(lambda: self.io()[0] >= before + 5, 30)
        assert self.io()[1] == 0
        self.lab.assert_healthy()
        assert "3 packets received" in self.in_guest(f"busybox ping -c 3 -i 0.2 -W 5 {_HOST}")
        writes = self.stats("domblkstat", "vda")["wr_req"]
        wait(lambda: self.stats("domblkstat", "vda")["wr_req"] > writes)
        cards = self.virsh("domiflist", NAME).splitlines()
        (tap,) = (line.split()[0] for line in cards if _MAC in line)
        assert self.stats("domifstat", tap)["rx_packets"] > 0
        self.virsh("suspend", NAME)
        assert self.virsh("domstate", NAME) == "paused"
        self.virsh("resume", NAME)
        self.lab.assert_healthy()
        assert self.virsh("vncdisplay", NAME).startswith("127.0.0.1:")
        shot = self.base / "screen.ppm"
        self.virsh("screenshot", NAME, str(shot))
        assert shot.stat().st_size > 1000

    def plug(self, verb: str) -> None:
        """A second disk and a second network card, in or out; the guest has noticed."""
        path = self.base / "second.xml"
        for device in _SECOND:
            path.write_text(device.format(base=self.base, bridge=self.bridge))
            self.virsh(verb, NAME, str(path), "--live")
        more = verb == "attach-device"
        wait(lambda: ("vdb" in self.listed("/sys/block")) is more)
        wait(lambda: ("eth1" in self.listed("/sys/class/net")) is more)

    def assert_second_works(self) -> None:
        told = self.in_guest(_USE_SECOND.format(address=_GUEST_2, host=_HOST_2))
        assert "same" in told and "3 packets received" in told

    def listed(self, directory: str) -> list[str]:
        return self.in_guest(f"ls {directory}").split()


@pytest.fixture(scope="module")
def bridge() -> Iterator[str]:
    need("root")
    name = f"hu{os.getpid()}"
    made = subprocess.run(["ip", "link", "add", name, "type", "bridge"], check=False)
    if made.returncode:
        lack("bridge", "no network bridge can be made")
    try:
        for address in (_HOST, _HOST_2):
            subprocess.run(["ip", "addr", "add", f"{address}/30", "dev", name], check=True)
        subprocess.run(["ip", "link", "set", name, "up"], check=True)
        yield name
    finally:
        subprocess.run(["ip", "link", "del", name], check=True)


@pytest.fixture(scope="module")
def guest(bridge: str) -> Iterator[Furnished]:
    need("root", "qemu", "libvirt", "lab", "cgroup2")
    base = Path(tempfile.mkdtemp(prefix="hu-d-", dir="/var/tmp"))
    with ExitStack() as ends:
        ends.callback(shutil.rmtree, base)
        base.chmod(0o755)
        (base / "state").mkdir(mode=0o755)  # QEMU finds its kernel in the cache below
        for name in ("ram", "disks"):
            (base / name).mkdir()
        ram = str(base / "ram")
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "none", ram], check=True)
        ends.callback(subprocess.run, ["umount", "--lazy", ram], check=True)
        disks = base / "disks"
        argv = ["qemu-img", "create", "-q", "-f", "qcow2", str(disks / "a.qcow2"), "64M"]
        subprocess.run(argv, check=True)
        (disks / "b.raw").touch()
        os.truncate(disks / "b.raw", 8 << 20)
        cache = make_cache(base / "state")
        built = image.build(cache)
        acceleration = accelerator.probe(built, cache)
        daemon = Daemon(base, hide_kvm=acceleration.kind != "kvm")
        (base / "etc/qemu.conf").write_text(_CONF.format(base=base))
        daemon.ensure()
        ends.callback(daemon.end)
        hypervisor = Hypervisor(daemon.uri, timeout_ns=20 * _SECOND_NS)
        ends.callback(hypervisor.close)
        made = Furnished(base, daemon, hypervisor, bridge)
        xml = domain.domain_xml(
            name=NAME,
            uuid=UUID_,
            memory_bytes=_MEMORY,
            image=built,
            acceleration=acceleration,
            console=made.lab.console(NAME),
            ram_in_files=True,
        )
        devices = _DEVICES.format(base=base, bridge=bridge, mac=_MAC)
        made.owner.define(xml.replace("</devices>", f"{devices}</devices>"))
        ends.callback(made.remove)
        made.start()
        yield made


def apply(guest: Furnished, program: Path) -> int:
    """The blackout of a handover to that QEMU."""
    manifest = guest.base / "update.toml"
    manifest.write_text(f'[update]\nname = "qemu"\n[qemu]\nprogram = "{program}"\n')
    ended = guest.lab.apply(manifest)
    assert ended.code == 0, ended.data["reasons"]
    (report,) = ended.data["guests"]
    assert report["residency"]["digest_equal"] is True
    assert report["clock"]["problem"] == ""
    (found,) = guest.lab.run("guests", "--json").data["guests"]
    assert version_of(found["pid"]) == builds.version(program)
    return int(report["blackout_ns"])


def test_a_guest_with_devices_goes_there_and_back(
    guest: Furnished, newer_qemu: Build, capsys: pytest.CaptureFixture[str]
) -> None:
    """With some that were plugged in since its QEMU was started, and without some that it was
    started with."""
    guest.assert_as_it_was()
    took = []
    for program, verb in ((newer_qemu.wrapper, "attach-device"), (SYSTEM, "detach-device")):
        guest.plug(verb)
        took.append(round(apply(guest, program) / 1e6))
        guest.assert_as_it_was()
        if verb == "attach-device":
            guest.assert_second_works()
    for verb in ("attach-device", "detach-device"):
        guest.plug(verb)
    with capsys.disabled():
        print(f"\n[handovers of a guest with devices: blackouts {took} ms]")


def test_it_ends_as_its_owner_wants(guest: Furnished) -> None:
    """After a handover libvirt hears of its end as of any other."""
    apply(guest, SYSTEM)
    guest.in_guest(_SHUTDOWN)
    guest.virsh("shutdown", NAME, "--mode", "agent")
    wait(lambda: guest.virsh("domstate", NAME) == "shut off")
    assert not list((guest.base / "ram").rglob("pc.ram"))
    guest.virsh("start", NAME)
    log = guest.lab.console(NAME)
    log.write_text("")
    console.wait_ready(log, time.monotonic_ns() + 90 * _SECOND_NS)
    guest.virsh("destroy", NAME)
