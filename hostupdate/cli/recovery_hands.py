"""What a recovery has of the world: libvirt, guests' clocks, cgroups and monitors."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from hostupdate.cli.compose import HostClock, resume_guest_by_monitor
from hostupdate.clocks import Clocks
from hostupdate.config import Config
from hostupdate.engine.recovery import RecoveryHands, RecoveryHypervisor
from hostupdate.errors import DeadlineError, HypervisorError
from hostupdate.guests import Hypervisor
from hostupdate.guests.agent import Agents
from hostupdate.guests.links import Links
from hostupdate.host import processes
from hostupdate.host.cgroups import Cgroups
from hostupdate.model import ArmedGuest, PendingRecord

#: How long a guest that was told to run may go on being frozen.
_THAW_NS = 1_000_000_000
_POLL_S = 0.1


class Libvirt:
    """The connection, opened when it is first needed. HypervisorError, DeadlineError: libvirt does
    not answer."""

    def __init__(self, uri: str, timeout_ns: int) -> None:
        self._uri = uri
        self._timeout_ns = timeout_ns
        self._hypervisor: Hypervisor | None = None

    def __call__(self) -> Hypervisor:
        if self._hypervisor is None:
            self._hypervisor = Hypervisor(self._uri, timeout_ns=self._timeout_ns)
        return self._hypervisor

    def wait(self, patience_ns: int) -> Hypervisor:
        """The same, from a daemon that may be about to start anew."""
        end_ns = time.monotonic_ns() + patience_ns
        while True:
            try:
                hypervisor = self()
                hypervisor.revive()
                return hypervisor
            except (HypervisorError, DeadlineError):
                if time.monotonic_ns() >= end_ns:
                    raise
                time.sleep(_POLL_S)


@dataclass(frozen=True, slots=True)
class ClockHands:
    """Fits the engine's ClockHands."""

    core: HostClock
    clocks: Clocks
    links: Links


def clock_hands(hypervisor: Hypervisor, config: Config) -> ClockHands:
    """What guests' clocks are set with."""
    return ClockHands(HostClock(), Clocks(Agents(hypervisor), config.clock), Links(hypervisor))


def recovery_hands(record: PendingRecord, libvirt: Libvirt) -> RecoveryHands:
    """What lets the guests of a pending record run."""
    cgroups = Cgroups(Path(record.cgroup2)) if record.cgroup2 is not None else None

    def thaw(guest: ArmedGuest) -> None:
        alive = processes.is_same(guest.pid, guest.started)
        if cgroups is None or guest.cgroup is None:
            processes.continue_process(guest.pid, guest.started)
        elif guest.home_cgroup is not None:
            cgroups.restore(guest.pid if alive else None, guest.cgroup, guest.home_cgroup)
        else:
            cgroups.thaw(guest.cgroup)

    def is_frozen(guest: ArmedGuest) -> bool:
        if cgroups is None:
            return processes.is_stopped(guest.pid)
        return cgroups.stays_frozen(guest.home_cgroup or guest.cgroup or "/", _THAW_NS)

    def connect(hypervisor: RecoveryHypervisor, guest: ArmedGuest) -> None:
        assert isinstance(hypervisor, Hypervisor)
        Links(hypervisor).set(guest.uuid, guest.links, "up")

    return RecoveryHands(
        thaw=thaw,
        is_frozen=is_frozen,
        boot_id=processes.boot_id(),
        restore_memory_min=cgroups.set_memory_min if cgroups is not None else lambda _: None,
        hypervisor=libvirt,
        connect=connect,
        is_alive=processes.is_same,
        resume_by_monitor=resume_guest_by_monitor,
    )
