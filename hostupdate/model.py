"""The words that every layer shares: facts about guests, a plan's actions, a run's report.

Nothing here touches the world. Sizes are bytes, times int nanoseconds with the clock named where
it matters. A value that was not measured is ``None``, never zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum

import msgspec

from hostupdate.guestpolicy import GuestPolicy
from hostupdate.rivals import Held, Rivals

REPORT_SCHEMA = "hostupdate-report-v1"
PENDING_SCHEMA = "hostupdate-pending-v1"

#: The promise: no blackout is longer than this, whatever a manifest or the configuration says.
HARD_CAP_NS = 30_000_000_000


class ExitCode(IntEnum):
    """What the process returns; scripts depend on it."""

    OK = 0
    ERROR = 1  #: nothing happened
    USAGE = 2
    REFUSED = 20
    DEGRADED = 30  #: applied, but something promised was missed or not verified
    FAILED = 40  #: not applied; guests run on the old stack
    GUEST_LOST = 50  #: a guest needs a human
    BUSY = 75


class Impact(StrEnum):
    """The least disturbing mechanism that makes an update effective, in rising order.

    Compare by :attr:`rank`: as texts they would sort by the alphabet.
    """

    NONE = "none"
    PAUSE = "pause"
    HANDOVER = "handover"
    KEXEC = "kexec"
    REBOOT = "reboot"

    @property
    def rank(self) -> int:
        """Position in the rising order."""
        return list(Impact).index(self)


class PauseMethod(StrEnum):
    """How guests are paused."""

    FREEZE = "freeze"  #: the C core freezes each guest's cgroup
    STOP = "stop"  #: libvirt suspends all guests in parallel, then freeze on top


class Phase(StrEnum):
    """Where in a run something happens. Guests do not run in BLACKOUT."""

    STAGE = "stage"
    BLACKOUT = "blackout"
    FINISH = "finish"


class Outcome(StrEnum):
    """How a run ended."""

    OK = "ok"
    DEGRADED = "degraded"
    FAILED = "failed"
    REFUSED = "refused"


class GuestState(StrEnum):
    """A guest's state as its hypervisor tells it."""

    RUNNING = "running"
    PAUSED = "paused"
    SHUTOFF = "shutoff"
    CRASHED = "crashed"
    GONE = "gone"  #: not known to the hypervisor any more, or its QEMU is dead and libvirt lags
    UNKNOWN = "unknown"  #: the hypervisor did not answer


class FreezeBy(StrEnum):
    """Which kernel mechanism stops a guest's threads."""

    CGROUP = "cgroup"
    SIGNAL = "signal"  #: SIGSTOP through a pidfd, only where the host has no cgroup v2


class Protection(StrEnum):
    """What keeps a guest's pages in RAM while it is paused."""

    MEMORY_MIN = "memory.min"
    LOCKED = "locked"
    NONE = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Guest:
    """What libvirt says of one guest. ``uuid`` in its canonical text form."""

    name: str
    uuid: str
    state: GuestState
    memory_bytes: int
    vcpus: int
    policy: GuestPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestPlace:
    """Where a running guest lives on the host.

    ``cgroup`` is the path, below the cgroup v2 mount, of the guest's whole scope (never of its
    ``emulator`` child); ``None`` on a host without cgroup v2. ``shared_cgroup`` tells that other
    processes live there too, so that it cannot be frozen as it is. ``dma_writers`` names what may
    write to the guest's RAM although its QEMU is frozen.
    """

    pid: int
    started: int  #: the process's start, ticks since boot: with pid it names one process
    cgroup: str | None
    shared_cgroup: bool
    frozen: bool
    memory_controller: bool
    shared_ram: bool
    dma_writers: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LocatedGuest:
    """A guest and its place; ``problem`` says why a running guest has none."""

    guest: Guest
    place: GuestPlace | None
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentAnswer:
    """What a guest's agent returned, and when it was asked and had answered (CLOCK_MONOTONIC)."""

    value: object
    sent_ns: int
    received_ns: int


class Action(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that a run does. ``plan`` prints these and ``apply`` executes just these.

    ``kind`` selects the engine's handler, ``title`` is for people, ``step`` the manifest step's
    name where the action runs one, ``guest`` the uuid where it is about one. ``undo`` says how a
    failed run takes it back; empty where
    there is nothing to take back.
    """

    phase: Phase
    kind: str
    title: str
    step: str = ""
    guest: str = ""
    argv: tuple[str, ...] = ()
    undo: str = ""
    undo_argv: tuple[str, ...] = ()
    timeout_ns: int | None = None


class PlannedGuest(msgspec.Struct, frozen=True, kw_only=True):
    """One guest's part in a plan. ``pause`` is false for a guest that does not run."""

    name: str
    uuid: str
    state: GuestState
    pause: bool
    freeze_by: FreezeBy | None = None
    isolate: bool = False
    protection: Protection = Protection.NONE
    digest_reason: str = ""  #: why no RAM digest is taken; empty where one is
    reason: str = ""  #: why it is left alone; empty where it is paused


class PackageVerdict(
    msgspec.Struct, frozen=True, kw_only=True, rename={"old": "from", "new": "to"}
):
    """What one package's change does to guests. ``impact`` None: it cannot be judged, the update
    is refused. ``old`` (in JSON: from) empty: it is new."""

    name: str
    old: str
    new: str
    impact: Impact | None
    reason: str
    evidence: tuple[str, ...] = ()


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What ``apply`` will do, complete, decided before anything is touched."""

    update: str
    requested: str
    judged: Impact
    actual: Impact
    method: PauseMethod | None
    method_reason: str
    budget_ns: int
    predicted_blackout_ns: int | None
    guests: tuple[PlannedGuest, ...]
    actions: tuple[Action, ...]
    packages: tuple[PackageVerdict, ...] = ()
    warnings: tuple[str, ...] = ()
    rivals: Rivals | None = None

    @property
    def paused(self) -> tuple[PlannedGuest, ...]:
        """The guests that will be paused."""
        return tuple(guest for guest in self.guests if guest.pause)


class ArmedGuest(msgspec.Struct, frozen=True, kw_only=True):
    """What recovery must know of one guest that may be paused when the orchestrator dies."""

    name: str
    uuid: str
    pid: int
    started: int
    cgroup: str | None  #: the one that is frozen, below the cgroup v2 mount
    home_cgroup: str | None  #: where to put the process back; None where it was not moved
    links: tuple[str, ...] = ()  #: MAC addresses of its network links that may be held down
    skew_ns: int | None = None  #: its real time minus the host's, before the pause


class PendingRecord(msgspec.Struct, frozen=True, kw_only=True):
    """On disk from a run's begin to its end: all that lets its guests run again.

    ``boot_id`` names the boot in which its pids mean something. ``guests`` are those that may be
    paused, from before the first pause to after the last; with the fields above them they are
    complete before anything is touched, and need no configuration: the update may have broken it.
    """

    run_id: str
    boot_id: str
    uri: str
    pid: int
    started: int
    libvirt_timeout_ns: int
    method: PauseMethod | None = None
    cgroup2: str | None = None
    memory_min: dict[str, str] = {}  #: cgroup path -> value to restore
    host_offset_ns: int | None = None  #: the host's CLOCK_REALTIME minus CLOCK_MONOTONIC
    guests: tuple[ArmedGuest, ...] = ()
    armed: bool = False  #: some of them may be paused: their owners have no part in it
    rehearsing: str = ""  #: uuid of the guest whose device state is being taken
    held: Held | None = None  #: what keeps others from acting, to be let go


class ImpactReport(msgspec.Struct, kw_only=True):
    """``judged`` and ``actual`` None: refused."""

    requested: str
    judged: Impact | None
    actual: Impact | None


class ClockReport(msgspec.Struct, kw_only=True):
    """A guest's real time minus the host's: before the pause, right after the resume, and at the
    end. ``uncertainty_ns`` belongs to ``after_ns``. ``method`` says how the clock was set; none:
    it needed no setting. ``problem`` says why it is not verified; empty where it is right."""

    before_ns: int | None = None
    resumed_ns: int | None = None
    after_ns: int | None = None
    uncertainty_ns: int | None = None
    method: str | None = None
    problem: str = ""


class ResidencyReport(msgspec.Struct, kw_only=True):
    """Where a guest's RAM was between pause and resume.

    ``swapped_in_bytes`` is how much less of it lay in swap after the resume than before the
    pause; ``swapped_out_bytes`` how much more. ``major_faults`` counts those of its QEMU from just
    before the pause to just after the resume.
    """

    ram_bytes: int | None = None
    resident_bytes: int | None = None
    swapped_in_bytes: int | None = None
    swapped_out_bytes: int | None = None
    major_faults: int | None = None
    protection: Protection = Protection.NONE
    digest: str | None = None
    digest_pages: int | None = None
    digest_equal: bool | None = None
    digest_reason: str = ""


class GuestReport(msgspec.Struct, kw_only=True):
    """One guest in a run. ``blackout_ns`` runs from the request to stop it to the moment it was
    seen running again: an upper bound of what the guest felt."""

    name: str
    uuid: str
    impact: Impact
    state_before: GuestState
    state_after: GuestState | None = None
    frozen_by: FreezeBy | None = None
    paused_monotonic_ns: int | None = None
    resumed_monotonic_ns: int | None = None
    blackout_ns: int | None = None
    predicted_blackout_ns: int | None = None
    clock: ClockReport = msgspec.field(default_factory=ClockReport)
    residency: ResidencyReport = msgspec.field(default_factory=ResidencyReport)
    notes: list[str] = msgspec.field(default_factory=list)


class StepReport(msgspec.Struct, kw_only=True):
    """One manifest step. ``exit`` is its exit status, negative for the signal that ended it, None
    where it did not run to an end. ``output`` is the tail of what it printed; ``log`` the file
    that has all of it."""

    name: str
    phase: Phase
    exit: int | None = None
    duration_ns: int | None = None
    undone: bool | None = None
    problem: str = ""
    output: str = ""
    output_bytes: int = 0
    log: str = ""


class PhaseReport(msgspec.Struct, kw_only=True):
    """Start and end on CLOCK_MONOTONIC."""

    name: Phase
    start_ns: int
    end_ns: int | None = None


class HostClockReport(msgspec.Struct, kw_only=True):
    """CLOCK_REALTIME minus CLOCK_MONOTONIC of the host, before and after: a difference between
    the two is a step of the host's own clock during the run: a slew moves both. ``synchronised``:
    what the kernel said of the clock before the run."""

    before_ns: int
    after_ns: int | None = None
    uncertainty_ns: int
    synchronised: bool | None = None


class VersionsReport(msgspec.Struct, kw_only=True):
    before: dict[str, str] = msgspec.field(default_factory=dict)
    after: dict[str, str] = msgspec.field(default_factory=dict)


class Report(msgspec.Struct, kw_only=True):
    """The result of one run: what ``apply --json`` and ``report --json`` print."""

    schema: str = REPORT_SCHEMA
    run_id: str
    update: str
    started_realtime_ns: int
    impact: ImpactReport
    method: PauseMethod | None
    outcome: Outcome = Outcome.FAILED
    exit_code: int = ExitCode.ERROR
    reasons: list[str] = msgspec.field(default_factory=list)
    budget_ns: int | None
    blackout_ns: int | None = None
    predicted_blackout_ns: int | None = None
    spread_ns: int | None = None
    stop_all_ns: int | None = None
    start_all_ns: int | None = None
    phases: list[PhaseReport] = msgspec.field(default_factory=list)
    guests: list[GuestReport] = msgspec.field(default_factory=list)
    steps: list[StepReport] = msgspec.field(default_factory=list)
    actions: list[str] = msgspec.field(default_factory=list)
    undone: list[str] = msgspec.field(default_factory=list)
    locked_bytes: int | None = None
    host_clock: HostClockReport | None = None
    versions: VersionsReport = msgspec.field(default_factory=VersionsReport)
