"""A guest on a libvirtd of its own: made eligible, judged, rehearsed, and found again where the
rehearsal was killed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import UUID, uuid4

import psutil
import pytest

from hostupdate.core import ram as core_ram
from hostupdate.eligibility import HandoverFacts, judge
from hostupdate.errors import HypervisorError
from hostupdate.guests import Hypervisor, capabilities
from hostupdate.guests.command import GuestCommand
from hostupdate.handover import builds, inquiry, rehearsal
from hostupdate.handover.builds import Build
from hostupdate.host import ram_backing
from hostupdate.host.processes import find_qemus
from hostupdate.lab import accelerator, console, domain, image
from hostupdate.lab.image import GuestImage
from hostupdate.remedy import remedy_changes
from tests.functional.conftest import make_cache
from tests.functional.daemon import Daemon
from tests.requirements import need

_CALL_NS = 20_000_000_000
_READY_NS = 120_000_000_000
_MEMORY = 192 << 20


@dataclass
class Filed:
    """A libvirtd, and one guest at a time on it, whose RAM lies in files below ``room``."""

    base: Path
    room: Path
    daemon: Daemon
    image: GuestImage
    acceleration: accelerator.Acceleration
    uuid: UUID = field(default_factory=uuid4)
    hypervisor: Hypervisor = field(init=False)

    @property
    def log(self) -> Path:
        return self.base / "console.log"

    @property
    def command(self) -> GuestCommand:
        return GuestCommand(self.hypervisor, str(self.uuid), _CALL_NS)

    @property
    def pid(self) -> int:
        return find_qemus([str(self.uuid)])[str(self.uuid)].pid

    @property
    def command_line(self) -> list[str]:
        return psutil.Process(self.pid).cmdline()

    def xml(self, emulator: Path | None = None) -> str:
        """As a lab guest is: RAM in a memfd."""
        text = domain.domain_xml(
            name="filed",
            uuid=self.uuid,
            memory_bytes=_MEMORY,
            image=self.image,
            acceleration=self.acceleration,
            console=self.log,
            witness=domain.Witness(rate_ms=50),
        )
        old = f"<emulator>{self.acceleration.emulator}</emulator>"
        assert old in text
        return text.replace(old, f"<emulator>{emulator}</emulator>") if emulator else text

    def start(self, xml: str) -> None:
        self.log.unlink(missing_ok=True)
        self.hypervisor.call("define", lambda c: c.defineXML(xml).create(), _READY_NS)
        console.wait_ready(self.log, time.monotonic_ns() + _READY_NS)

    def end(self) -> None:
        def destroy(connection: object) -> None:
            for found in connection.listAllDomains():  # type: ignore[attr-defined]
                if found.isActive():
                    found.destroy()
                found.undefine()

        self.hypervisor.call("destroy", destroy)

    def live_xml(self) -> str:
        return str(
            self.hypervisor.call("dump", lambda c: c.lookupByUUIDString(str(self.uuid)).XMLDesc())
        )

    def facts(self) -> HandoverFacts:
        backends = inquiry.backends(self.command)
        return HandoverFacts(
            domain_xml=self.live_xml(),
            backends=ram_backing.complete(backends, Path(f"/proc/{self.pid}")),
            embedded=False,
            swap_bytes=0,
            security_drivers=frozenset(),
            command_line=tuple(self.command_line),
            qemu_blockers=inquiry.blockers(self.command),
            block_jobs=inquiry.block_jobs(self.command),
        )

    def assert_well(self, passes: int = 0) -> None:
        """It ticks, its memory is whole, x-ignore-shared is off, and libvirt knows that it runs.
        ``passes``: its memory was looked through from end to end so many times since."""
        deadline_ns = time.monotonic_ns() + _READY_NS
        wanted = console.wait_ticks(self.log, 1, deadline_ns)[-1].passes + passes
        while (tick := console.wait_ticks(self.log, 1, deadline_ns)[-1]).passes < wanted:
            assert tick.bad == 0
        assert tick.bad == 0
        assert not self.ignores_shared
        assert self.hypervisor.state(str(self.uuid)) == "running"

    @property
    def ignores_shared(self) -> bool:
        found = self.command("query-migrate-capabilities", {})
        return any(c["state"] for c in found if c["capability"] == "x-ignore-shared")


@pytest.fixture(scope="module")
def filed() -> Iterator[Filed]:
    need("root", "qemu", "libvirt", "lab")
    with (
        TemporaryDirectory(prefix="hu-", dir="/var/tmp") as base,
        TemporaryDirectory(prefix="hu-", dir="/dev/shm") as room,
    ):
        yield from _filed(Path(base), Path(room))


def _filed(base: Path, room: Path) -> Iterator[Filed]:
    (base / "state").mkdir()
    cache = make_cache(base / "state")
    built = image.build(cache)
    acceleration = accelerator.probe(built, cache)
    daemon = Daemon(base, hide_kvm=acceleration.kind != "kvm")
    made = Filed(base, room, daemon, built, acceleration)
    conf = base / "etc/qemu.conf"
    conf.write_text(remedy_changes(made.xml(), conf.read_text(), str(room))[1])
    daemon.ensure()
    try:
        made.hypervisor = Hypervisor(daemon.uri, timeout_ns=_CALL_NS)
        yield made
        if find_qemus([str(made.uuid)]):
            made.assert_well(passes=2)  # a whole one lies after all that was done to it
        made.end()
        made.hypervisor.close()
    finally:
        daemon.end()


@pytest.fixture
def guest(filed: Filed) -> Iterator[Filed]:
    """Running under the installed QEMU with its RAM in a file; well afterwards."""
    if not find_qemus([str(filed.uuid)]):
        filed.start(remedy_changes(filed.xml(), "", str(filed.room))[0])
    yield filed
    filed.assert_well()


def test_the_remedy_makes_a_guest_eligible_at_its_next_start(filed: Filed) -> None:
    filed.start(filed.xml())
    found = judge(filed.facts())
    assert [b.by_restart for b in found.blockers] == [True] and "memfd" in found.blockers[0].reason
    changed, _ = remedy_changes(filed.live_xml(), "", str(filed.room))
    filed.end()
    filed.start(changed)
    assert judge(filed.facts()).blockers == ()
    (backend,) = filed.facts().backends
    assert backend.named and backend.file_system == "tmpfs" and backend.size_bytes == _MEMORY
    filed.end()


def test_libvirt_runs_guests_by_a_wrapper(filed: Filed, newer_qemu: Build, tmp_path: Path) -> None:
    """And the way back to the installed QEMU is found closed before anybody goes it."""
    kvm = filed.acceleration.kind == "kvm"
    capabilities.warm(filed.hypervisor, newer_qemu.wrapper, _READY_NS, kvm=kvm)
    with pytest.raises(HypervisorError):
        capabilities.warm(filed.hypervisor, Path("/bin/true"), _READY_NS, kvm=kvm)
    newer = remedy_changes(filed.xml(newer_qemu.wrapper), "", str(filed.room))[0]
    filed.start(newer)
    try:
        assert str(newer_qemu.directory) in filed.command_line[0]
        old = builds.keep(filed.acceleration.emulator, tmp_path / "old")
        told = rehearsal.rehearse(
            filed.command, filed.command_line, old.wrapper, tmp_path, mark=lambda _: None
        )
        assert not told.ok and "unsupported machine type" in told.reason
        assert told.paused_ns is None
        filed.assert_well()
    finally:
        filed.end()


def test_a_newer_qemu_takes_the_guest(guest: Filed, newer_qemu: Build, tmp_path: Path) -> None:
    pid = guest.pid
    before = console.wait_ticks(guest.log, 1, time.monotonic_ns() + _READY_NS)[-1]
    marks: list[bool] = []
    told = rehearsal.rehearse(
        guest.command, guest.command_line, newer_qemu.wrapper, tmp_path, mark=marks.append
    )
    assert told.ok, told.reason
    assert marks == [True, False] and told.paused_ns
    after = console.wait_ticks(guest.log, 1, time.monotonic_ns() + _READY_NS)[-1]
    assert after.seq > before.seq and guest.pid == pid
    (main,) = (m for m in core_ram.mappings(pid) if m.length_bytes == _MEMORY)
    assert main.shared


#: Dies by its own hand when a monitor command has been answered.
_DYING = """\
import os, signal, sys
from pathlib import Path
from hostupdate.guests import Hypervisor
from hostupdate.guests.command import GuestCommand
from hostupdate.handover import rehearsal, throwaway

uri, uuid, program, scratch, last = sys.argv[1:6]

class Dying(GuestCommand):
    def __call__(self, name, arguments, *, fd=None):
        answer = super().__call__(name, arguments, fd=fd)
        if name == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer

if last == "load":
    execute = throwaway.Throwaway._execute
    def dying(self, name, **arguments):
        answer = execute(self, name, **arguments)
        if name == "migrate-incoming":
            os.kill(os.getpid(), signal.SIGKILL)
        return answer
    throwaway.Throwaway._execute = dying
command = Dying(Hypervisor(uri, timeout_ns=20_000_000_000), uuid, 20_000_000_000)
mark = lambda on: print("mark", on, flush=True)
rehearsal.rehearse(command, sys.argv[6:], Path(program), Path(scratch), mark=mark)
"""


@pytest.mark.parametrize(
    ("last", "runs"),
    [
        ("migrate-set-capabilities", True),
        ("getfd", True),
        ("stop", False),
        ("migrate", False),
        ("cont", True),
        ("load", False),
    ],
)
def test_a_rehearsal_that_is_killed_is_recovered(
    guest: Filed, newer_qemu: Build, tmp_path: Path, last: str, runs: bool
) -> None:
    argv = [sys.executable, "-c", _DYING, guest.daemon.uri, str(guest.uuid)]
    argv += [str(newer_qemu.wrapper), str(tmp_path), last, *guest.command_line]
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert ended.stdout == "mark True\n"
    _wait_for(lambda: guest.command("query-status", {})["running"] is runs)
    _wait_for(lambda: not _rehearsing(tmp_path))
    assert guest.ignores_shared
    for _ in range(2):  # safe to repeat
        rehearsal.recover(guest.command)
    assert guest.command("query-status", {})["running"]
    guest.assert_well()
    told = rehearsal.rehearse(
        guest.command, guest.command_line, newer_qemu.wrapper, tmp_path, mark=lambda _: None
    )
    assert told.ok, told.reason


def _rehearsing(scratch: Path) -> list[int]:
    found = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        words = process.info["cmdline"] or ()
        if "rehearsal" in words and str(process.info["cwd"]).startswith(str(scratch)):
            found.append(process.pid)
    return found


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline_ns = time.monotonic_ns() + 20_000_000_000
    while not condition():
        assert time.monotonic_ns() < deadline_ns, "it did not come to pass"
        time.sleep(0.05)
