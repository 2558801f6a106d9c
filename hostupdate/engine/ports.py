"""What the engine needs of the world, as it needs it. The hands fit these; tests bring fakes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from hostupdate.errors import HypervisorError
from hostupdate.model import (
    Action,
    GuestPlace,
    GuestState,
    LocatedGuest,
    PendingRecord,
    Phase,
    Report,
)
from hostupdate.parked import ParkedRecord
from hostupdate.rivals import Held, Rivals
from hostupdate.skew import Corrected, Skew, Wish
from hostupdate.unwinding import Kind
from hostupdate.vitals import Vitals


class StampView(Protocol):
    """When a guest was asked to stop or run, and when it was seen to (CLOCK_MONOTONIC)."""

    @property
    def requested_monotonic_ns(self) -> int: ...
    @property
    def settled_monotonic_ns(self) -> int | None: ...


class PausedSet(Protocol):
    """The guests of a run, prepared for one call each way (core.freezer.GuestSet)."""

    def freeze(self, deadline_monotonic_ns: int) -> Sequence[StampView]: ...
    def thaw(self, deadline_monotonic_ns: int) -> Sequence[StampView]: ...
    def stamps(self) -> Sequence[StampView]: ...


class KeeperPort(Protocol):
    """The dead-man process. ``fileno`` is readable once it has fired or died."""

    @property
    def locked_bytes(self) -> int: ...
    @property
    def lock_errno(self) -> int: ...
    def fileno(self) -> int: ...
    def alarmed(self) -> bool: ...
    def arm(self, deadline_monotonic_ns: int) -> None: ...
    def disarm(self) -> bool: ...
    def stop(self) -> None: ...


class HostClockPort(Protocol):
    """The host's own clocks."""

    def host_clock(self) -> tuple[int, int]:
        """CLOCK_REALTIME minus CLOCK_MONOTONIC, and its uncertainty, in ns."""

    def host_clock_synchronised(self) -> bool:
        """Whether something keeps CLOCK_REALTIME right, by the kernel's account."""


class CorePort(HostClockPort, Protocol):
    """The C core."""

    def open_guests(self, guests: Sequence[tuple[str, int, str | None]]) -> PausedSet:
        """Of each guest (label, pid, cgroup or None for signals)."""

    def start_keeper(self, guests: PausedSet, ram_fds: Sequence[int]) -> KeeperPort: ...
    def close(self) -> None: ...


class RamView(Protocol):
    """Sizes of one guest's RAM, in bytes."""

    @property
    def ram_bytes(self) -> int: ...
    @property
    def resident_bytes(self) -> int: ...
    @property
    def swapped_bytes(self) -> int: ...


class RamPort(Protocol):
    """A guest's memory."""

    def measure(self, pid: int) -> RamView: ...
    def open_shared(self, pid: int) -> list[int]: ...
    def prepare_digest(self, pid: int) -> Callable[[], tuple[str, int]]:
        """A call that digests the guest's RAM: (hex, pages read)."""

    def major_faults(self, pid: int) -> int: ...


class HypervisorPort(Protocol):
    """Guests through libvirt."""

    def prepare(self, uuids: Sequence[str]) -> None: ...
    def stop(self, guests: Sequence[tuple[str, str]], timeout_ns: int) -> dict[str, int]: ...
    def resume(
        self, guests: Sequence[tuple[str, str]], timeout_ns: int
    ) -> Mapping[str, int | Exception]: ...
    def state(self, uuid: str, timeout_ns: int | None = None) -> GuestState: ...


class ClocksPort(Protocol):
    """Guests' clocks. ``offset_ns`` is the host's CLOCK_REALTIME minus CLOCK_MONOTONIC."""

    def measure(
        self, uuids: Sequence[str], offset_ns: int
    ) -> Mapping[str, Skew | HypervisorError]: ...
    def correct(
        self, wishes: Sequence[Wish], offset_ns: int, deadline_ns: int
    ) -> Mapping[str, Corrected]: ...


class LinksPort(Protocol):
    """Guests' network links, by MAC address."""

    def up(self, uuid: str) -> tuple[str, ...]: ...
    def set(self, uuid: str, macs: Sequence[str], state: str) -> None: ...


class CgroupsPort(Protocol):
    """The cgroup v2 tree."""

    @property
    def mount(self) -> Path: ...
    def own(self, uuid: str) -> str: ...
    def isolate(self, pid: int, home: str, uuid: str) -> str: ...
    def restore(self, pid: int | None, own: str, home: str) -> None: ...
    def memory_min_changes(
        self, wanted: Iterable[tuple[str, int]]
    ) -> dict[str, tuple[str, str]]: ...
    def set_memory_min(self, values: dict[str, str]) -> None: ...
    def memory_current(self, cgroup: str) -> int: ...


class StepResultView(Protocol):
    @property
    def exit(self) -> int | None: ...
    @property
    def duration_ns(self) -> int: ...
    @property
    def problem(self) -> str: ...


class StepsPort(Protocol):
    """The manifest's steps, prepared."""

    def run(self, name: str, deadline_ns: int, wake_fds: Sequence[int]) -> StepResultView: ...
    def undo(self, name: str, timeout_ns: int) -> bool: ...
    def output(self, name: str) -> tuple[str, int, Path]: ...
    def reap(self) -> None: ...


class GuardPort(Protocol):
    """Keeps others from acting on guests and packages."""

    def hold(self, rivals: Rivals) -> tuple[str, ...]: ...
    def restore(self, held: Held) -> None: ...


class HandoverPort(Protocol):
    """Guests under another QEMU. ``park`` and ``unpark`` as in handover.ports.Way; records come
    back as they were written last; after an error ``latest`` reads them."""

    def keep(self, uuids: Sequence[str]) -> None:
        """Keeps the QEMUs of these guests, whatever happens to the host's packages."""

    def drop_kept(self) -> None:
        """Removes what no guest runs under, and ends what was started to be tried. Safe to repeat.
        HypervisorError, DeadlineError: the latter may run still."""

    def warm(self, uuids: Sequence[str]) -> None: ...
    def rehearse(self, uuid: str, mark: Callable[[bool], None]) -> tuple[str, int | None, str]:
        """Why the new QEMU does not take the guest, or empty; for how long it was stopped; the new
        QEMU's version."""

    def end_rehearsal(self, uuid: str) -> None:
        """The guest of a rehearsal that was cut short runs as before. Safe to repeat."""

    def prepare(self, uuid: str) -> ParkedRecord: ...
    def latest(self, record: ParkedRecord) -> ParkedRecord | None:
        """None: it has been removed."""

    def park(self, record: ParkedRecord) -> ParkedRecord: ...
    def digest(self, record: ParkedRecord) -> str: ...
    def unpark(self, record: ParkedRecord) -> ParkedRecord: ...
    def rollback(self, record: ParkedRecord) -> ParkedRecord: ...
    def commit(self, record: ParkedRecord) -> ParkedRecord: ...
    def finish(self, record: ParkedRecord) -> None: ...
    def abort(self, record: ParkedRecord) -> ParkedRecord | None:
        """None: the guest is under its old QEMU as if nothing had been. A record: it is parked."""

    def condemn(self, record: ParkedRecord, problem: str) -> ParkedRecord:
        """Recovery does not let the guest run, for that reason, until somebody else has."""

    def modules_in_use(self) -> str:
        """What still uses KVM's modules, now that no guest has a QEMU; empty: nothing does."""

    def blackout_ns(self, record: ParkedRecord) -> int | None: ...
    def processes(self, uuids: Sequence[str]) -> Mapping[str, tuple[int, int]]:
        """Of each guest that has a QEMU: its pid and when it started, ticks since boot."""


class JournalPort(Protocol):
    """The journal of one run, which has begun there. ``pending`` is the record on disk."""

    pending: PendingRecord

    def pend(self, record: PendingRecord) -> None: ...
    def note(self, kind: Kind, action: int | None = None, problem: str = "") -> None: ...
    def blackout(self, *, on: bool) -> None: ...
    def save_report(self, report: Report) -> None: ...
    def end(self) -> None: ...


class ProgressPort(Protocol):
    """Whoever watches. Called only while guests run; a blackout's events come after it."""

    def phase(self, phase: Phase, *, paused: bool) -> None: ...
    def started(self, action: Action) -> None: ...
    def ended(self, action: Action, duration_ns: int, problem: str) -> None: ...
    def undone(self, action: Action, problem: str) -> None: ...


class InterruptsPort(Protocol):
    """Signals that ask the run to stop. ``fileno`` is readable once one has come."""

    def fileno(self) -> int: ...
    def pending(self) -> str | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Hands:
    """Everything the engine may touch the world with.

    ``resume_by_monitor(pid, timeout_ns)`` resumes a guest without libvirt; ``is_alive(pid,
    started)`` tells whether that process still lives; ``versions`` names what is installed now;
    ``inventory`` looks at all guests anew; ``look`` at the vital signs of guests, given as (uuid,
    pid), ``vitals`` are those found before the run, by uuid; ``places`` maps a guest's uuid to its
    place. ``handover`` is None where the plan has none.
    """

    hypervisor: HypervisorPort
    clocks: ClocksPort
    links: LinksPort
    handover: HandoverPort | None
    cgroups: CgroupsPort | None
    core: CorePort
    ram: RamPort
    steps: StepsPort
    journal: JournalPort
    guard: GuardPort
    progress: ProgressPort
    interrupts: InterruptsPort
    resume_by_monitor: Callable[[int, int], None]
    is_alive: Callable[[int, int], bool]
    versions: Callable[[], dict[str, str]]
    inventory: Callable[[], Sequence[LocatedGuest]]
    look: Callable[[Sequence[tuple[str, int]]], Mapping[str, Vitals]]
    vitals: Mapping[str, Vitals]
    places: dict[str, GuestPlace]
