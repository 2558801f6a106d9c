"""A lab guest whose RAM lies in files, and the hands that park it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from hostupdate.guests import Hypervisor
from hostupdate.guests.parking import Parking
from hostupdate.guests.scratch import ScratchGuests
from hostupdate.handover.domain import NAMESPACE
from hostupdate.handover.ports import Host
from hostupdate.handover.recovery import recover
from hostupdate.handover.saving import Saving
from hostupdate.model import GuestState
from hostupdate.parked import ParkedRecord
from tests.functional.cli import Lab
from tests.functional.conftest import make_cache
from tests.functional.daemon import Daemon, DaemonLab
from tests.functional.handover import CALL_NS, host_of
from tests.requirements import need


@dataclass
class Parked:
    """One guest, and the hands that park it."""

    base: Path
    daemon: Daemon
    lab: Lab
    host: Host
    uuid: str
    way: Saving

    @property
    def name(self) -> str:
        return self.lab.names[0]

    @property
    def domains(self) -> Parking:
        assert isinstance(self.host.domains, Parking)
        return self.host.domains

    @property
    def guard(self) -> Path:
        return self.host.save_directory / f"{self.name}.save"

    @property
    def record(self) -> ParkedRecord:
        record = self.host.records.read(self.uuid)
        assert record is not None
        return record

    def park(self) -> ParkedRecord:
        return self.way.park(self.way.prepare(self.uuid))

    def bring_back(self, record: ParkedRecord) -> int | None:
        """Unparks and lets run; the blackout."""
        record = self.way.commit(self.way.unpark(record, None))
        blackout_ns = self.way.blackout_ns(record)
        self.way.finish(record)
        return blackout_ns

    def die_at(self, point: str) -> None:
        """A process that hands the guest over, killed there (:mod:`tests.functional.handover`)."""
        argv = [sys.executable, "-m", "tests.functional.handover", str(self.base)]
        ended = subprocess.run(
            [*argv, self.daemon.uri, self.uuid, self.way.name, point],
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert ended.returncode == -signal.SIGKILL, ended.stderr

    def owner(self) -> ScratchGuests:
        return ScratchGuests(Hypervisor(self.daemon.uri, timeout_ns=CALL_NS))

    def state(self) -> GuestState:
        facts = self.domains.facts(self.uuid)
        assert facts is not None
        return facts.state

    def virsh(self, *words: str) -> subprocess.CompletedProcess[str]:
        argv = ["virsh", "-c", self.daemon.uri, *words]
        return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)

    def files(self) -> list[str]:
        """All that a handover leaves while it is under way."""
        places = (
            self.base / "ram/hostupdate-parked",
            self.base / "state/parked",
            self.base / "state/hook",
            self.host.save_directory,
        )
        return sorted(str(path) for place in places for path in place.rglob("*") if path.is_file())

    def assert_as_if_nothing_had_been(self) -> None:
        assert self.files() == []
        assert self.state() is GuestState.RUNNING
        assert not self.domains.ignores_shared(self.uuid)
        assert NAMESPACE not in self.virsh("dumpxml", self.name).stdout
        self.lab.assert_healthy()


@pytest.fixture(scope="module")
def made() -> Iterator[DaemonLab]:
    need("root", "qemu", "libvirt", "lab")
    base = Path(tempfile.mkdtemp(prefix="hu-p-", dir="/var/tmp"))
    (base / "state").mkdir(mode=0o700)
    ram = base / "ram"
    ram.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512M,mode=755", "hu", ram], check=True)
    hooks = base / "etc/hooks/qemu.d"
    try:
        lab = DaemonLab(base, make_cache(base / "state"), guests=2, ram=ram)
        hooks.mkdir(parents=True)
        yield lab
        lab.remove()
    finally:
        subprocess.run(["umount", "--lazy", ram], check=True)
        shutil.rmtree(base)


@pytest.fixture
def guest(made: DaemonLab) -> Iterator[Parked]:
    """A guest that runs before and after each test, its handover's traces gone."""
    made.daemon.ensure()
    host = host_of(made.daemon.base, made.daemon.uri)
    names = made.lab.names
    hypervisor = Hypervisor(made.daemon.uri, timeout_ns=CALL_NS)
    uuids = {each.name: each.uuid for each in hypervisor.guests()}
    guest = Parked(made.daemon.base, made.daemon, made.lab, host, uuids[names[0]], Saving(host))
    host.hook.install()
    if not guest.domains.hook_is_called(guest.uuid):
        pid = made.daemon.pid
        assert pid is not None
        os.kill(pid, signal.SIGHUP)
        wait(lambda: guest.domains.hook_is_called(guest.uuid))
    yield guest
    made.daemon.ensure()
    if host.records.read(guest.uuid) is not None:  # for the next test's sake
        recover(host, guest.record)
    guest.assert_as_if_nothing_had_been()


def wait(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
