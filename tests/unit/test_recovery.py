"""After the orchestrator's death: every guest runs again, or is named with what was tried."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import msgspec
import pytest

from hostupdate.config import Config
from hostupdate.engine import Run
from hostupdate.engine.recovery import Recovered, RecoveryHands, recover
from hostupdate.errors import (
    CoreError,
    DeadlineError,
    GuestError,
    HypervisorError,
    JournalError,
)
from hostupdate.model import (
    ArmedGuest,
    ExitCode,
    GuestState,
    PauseMethod,
    PendingRecord,
    Report,
)
from tests.unit.fakes import FakeHands, Result, Sizes, World, hands_of, located
from tests.unit.test_plan import manifest, plan, step

TIMEOUT_NS = 2_000_000_000


def record(method: PauseMethod = PauseMethod.FREEZE, *names: str) -> PendingRecord:
    guests = tuple(
        ArmedGuest(
            name=name,
            uuid=f"uuid-{name}",
            pid=number,
            started=1,
            cgroup=f"/m/{name}",
            home_cgroup=None,
        )
        for number, name in enumerate(names or ("a", "b"), start=100)
    )
    return PendingRecord(
        run_id="r",
        boot_id="boot",
        libvirt_timeout_ns=TIMEOUT_NS,
        uri="qemu:///fake",
        pid=1,
        started=1,
        method=method,
        armed=True,
        cgroup2="/fake",
        memory_min={"/m": "0"},
        guests=guests,
    )


@dataclass
class Host:
    """What happened, in order, in ``log``; what is to go wrong in the other fields."""

    log: list[str] = field(default_factory=list)
    dead: set[int] = field(default_factory=set)
    states: dict[str, GuestState] = field(default_factory=dict)
    paused: bool = True  #: guests not in ``states`` are paused until resumed
    away: Exception | None = None  #: opening libvirt raises it
    unknown: set[str] = field(default_factory=set)  #: libvirt does not know these uuids
    refuses: dict[str, Exception] = field(default_factory=dict)  #: uuid -> why not resumed
    monitors: bool = True
    stuck: set[str] = field(default_factory=set)  #: cannot be thawed
    memory_fails: bool = False
    iced: set[str] = field(default_factory=set)  #: stay frozen although told to run
    result: Recovered = field(default_factory=lambda: Recovered(problems={}))

    # libvirt
    def prepare(self, uuids: list[str]) -> None:
        lost = self.unknown & set(uuids)
        if lost:
            raise HypervisorError(f"libvirt: look up a guest: no {lost.pop()}")
        self.log.append(f"prepare {' '.join(uuids)}".rstrip())

    def state(self, uuid: str, timeout_ns: int | None = None) -> GuestState:
        assert timeout_ns == TIMEOUT_NS
        default = GuestState.PAUSED if self.paused else GuestState.RUNNING
        return self.states.get(uuid, default)

    def resume(
        self, guests: list[tuple[str, str]], timeout_ns: int
    ) -> Mapping[str, int | Exception]:
        assert timeout_ns == TIMEOUT_NS
        outcome: dict[str, int | Exception] = {}
        for uuid, name in guests:
            self.log.append(f"resume {name}")
            outcome[uuid] = self.refuses.get(uuid, 5)
            if uuid not in self.refuses:
                self.states[uuid] = GuestState.RUNNING
        return outcome

    # the rest
    def open(self) -> Host:
        if self.away is not None:
            raise self.away
        return self

    def thaw(self, guest: ArmedGuest) -> None:
        self.log.append(f"thaw {guest.name}")
        if guest.name in self.stuck:
            raise OSError(5, "Input/output error")

    def restore_memory_min(self, values: dict[str, str]) -> None:
        self.log.append(f"memory.min {values}")
        if self.memory_fails:
            raise OSError(30, "Read-only file system")

    def by_monitor(self, pid: int, timeout_ns: int) -> None:
        assert timeout_ns == TIMEOUT_NS
        self.log.append(f"monitor {pid}")
        if not self.monitors:
            raise HypervisorError("taken")

    def recover(self, armed: PendingRecord) -> dict[str, str]:
        self.result = self.recovered(armed)
        return self.result.problems

    def recovered(self, armed: PendingRecord) -> Recovered:
        hands = RecoveryHands(
            thaw=self.thaw,
            is_frozen=lambda guest: guest.name in self.iced,
            boot_id="boot",
            restore_memory_min=self.restore_memory_min,
            hypervisor=self.open,
            connect=lambda hypervisor, guest: self.log.append(f"connect {guest.name}"),
            is_alive=lambda pid, started: pid not in self.dead and started == 1,
            resume_by_monitor=self.by_monitor,
        )
        return recover(armed, hands, TIMEOUT_NS)


@pytest.fixture
def host() -> Host:
    return Host()


STOP = PauseMethod.STOP


def test_frozen_guests_are_thawed_and_libvirt_is_not_even_asked(host: Host) -> None:
    host.away = AssertionError("libvirt was asked")
    assert host.recover(record()) == {}
    assert host.log == ["thaw a", "thaw b", "memory.min {'/m': '0'}"]


def test_stopped_guests_are_thawed_first_then_resumed(host: Host) -> None:
    assert host.recover(record(STOP)) == {}
    assert host.log == [
        "thaw a", "thaw b", "memory.min {'/m': '0'}", "prepare uuid-a uuid-b", "resume a",
        "resume b",
    ]  # fmt: skip


def test_guests_that_the_run_had_not_come_to_stop_are_left_as_their_owners_have_them(
    host: Host,
) -> None:
    assert host.recover(msgspec.structs.replace(record(STOP), armed=False)) == {}
    assert not [entry for entry in host.log if entry.startswith(("resume", "prepare"))]


def test_recovering_twice_resumes_once(host: Host) -> None:
    assert host.recover(record(STOP)) == {}
    host.log.clear()
    assert host.recover(record(STOP)) == {}
    assert not [entry for entry in host.log if entry.startswith(("resume", "monitor"))]


def test_a_guest_that_runs_already_is_not_resumed(host: Host) -> None:
    host.states["uuid-a"] = GuestState.RUNNING
    assert host.recover(record(STOP)) == {}
    assert "resume b" in host.log and "resume a" not in host.log


def test_a_guest_whose_qemu_is_gone_is_named_and_the_others_run(host: Host) -> None:
    host.dead.add(100)
    assert host.recover(record(STOP)) == {"a": "its QEMU, pid 100, is gone"}
    assert "resume b" in host.log and "resume a" not in host.log
    assert host.result.unfinished == (), "nobody can resume it: the record is done with"


def test_a_guest_that_cannot_be_thawed_is_named_and_the_others_run(host: Host) -> None:
    host.stuck.add("a")
    problems = host.recover(record())
    assert list(problems) == ["a"]
    assert "it cannot be thawed" in problems["a"]
    assert [guest.name for guest in host.result.unfinished] == ["a"]
    assert "thaw b" in host.log


@pytest.mark.parametrize(
    "away", [HypervisorError("libvirt: no socket"), DeadlineError("open", TIMEOUT_NS)]
)
def test_libvirt_away_every_guest_is_resumed_by_its_own_monitor(
    host: Host, away: Exception
) -> None:
    host.away = away
    assert host.recover(record(STOP)) == {}
    assert host.log[-2:] == ["monitor 100", "monitor 101"]


def test_libvirt_and_monitor_away_both_reasons_are_given(host: Host) -> None:
    host.away = HypervisorError("libvirt: no socket")
    host.monitors = False
    assert host.recover(record(STOP)) == {
        "a": "libvirt: no socket; by its monitor: taken",
        "b": "libvirt: no socket; by its monitor: taken",
    }


def test_only_the_guest_that_libvirt_cannot_resume_takes_the_other_way(host: Host) -> None:
    host.refuses["uuid-b"] = GuestError("b", "libvirt cannot resume it: lock")
    assert host.recover(record(STOP)) == {}
    assert [entry for entry in host.log if entry.startswith("monitor")] == ["monitor 101"]


def test_a_guest_that_neither_way_resumes_is_named(host: Host) -> None:
    host.refuses["uuid-b"] = GuestError("b", "libvirt cannot resume it: lock")
    host.monitors = False
    assert host.recover(record(STOP)) == {
        "b": "guest b: libvirt cannot resume it: lock; by its monitor: taken"
    }


def test_a_lookup_that_fails_for_one_keeps_no_other_from_running(host: Host) -> None:
    host.unknown.add("uuid-a")
    assert host.recover(record(STOP)) == {}
    assert host.log[-2:] == ["monitor 100", "monitor 101"]


@pytest.mark.parametrize(
    "state", [GuestState.UNKNOWN, GuestState.GONE, GuestState.SHUTOFF, GuestState.CRASHED]
)
def test_a_living_guest_whose_state_libvirt_does_not_tell_rightly_is_not_taken_for_running(
    host: Host, state: GuestState
) -> None:
    host.states["uuid-a"] = state
    assert host.recover(record(STOP)) == {}
    assert [entry for entry in host.log if entry.startswith("monitor")] == ["monitor 100"]
    host.monitors = False
    assert list(host.recover(record(STOP))) == ["a"]


def test_memory_min_that_cannot_be_put_back_keeps_no_guest_from_running(host: Host) -> None:
    host.memory_fails = True
    assert host.recover(record(STOP)) == {}
    assert "memory.min cannot be put back" in host.result.warnings[0]
    assert "resume a" in host.log and "resume b" in host.log


def test_a_stuck_and_a_dead_guest_beside_one_that_is_fine(host: Host) -> None:
    host.dead.add(100)
    host.stuck.add("b")
    problems = host.recover(record(STOP, "a", "b", "c"))
    assert set(problems) == {"a", "b"}
    assert "resume c" in host.log


def test_a_guest_that_stays_frozen_is_not_said_to_run(host: Host) -> None:
    host.iced.add("b")
    assert host.recover(record()) == {"b": "it was told to run and is still frozen"}
    assert [guest.name for guest in host.result.unfinished] == ["b"]


def test_after_a_boot_of_the_host_no_pid_is_touched(host: Host) -> None:
    armed = msgspec.structs.replace(record(STOP), boot_id="another")
    assert set(host.recover(armed)) == {"a", "b"}
    assert host.log == []
    assert host.result.unfinished == ()


# ---- what a run that ends by itself leaves to be recovered

UNDO = {"undo": '["true"]', "timeout": '"1s"'}


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def fake(world: World) -> Iterator[FakeHands]:
    made = FakeHands(world)
    yield made
    made.close_pipes()


def run(fake: FakeHands) -> Report:
    guests = (located("a"), located("b"))
    made = plan(manifest("", step("blackout", "one", **UNDO)), *guests, method="stop")
    return Run("run", made, Config(), hands_of(fake, guests)).execute()


def test_guests_that_nobody_could_resume_are_left_to_hostupdate_resume(
    world: World, fake: FakeHands
) -> None:
    world.on["run one"] = lambda: setattr(world, "silent", True)
    world.monitors = False
    report = run(fake)
    assert report.exit_code == ExitCode.GUEST_LOST
    assert report.undone == ["one"]
    assert world.armed is not None
    assert any("a, b; run `hostupdate resume`" in reason for reason in report.reasons)
    for name in ("a", "b"):
        assert any(reason.startswith(f"guest {name}: ") for reason in report.reasons)


def test_a_guest_that_runs_is_not_left_to_it_with_the_others(world: World, fake: FakeHands) -> None:
    """Its owner may have paused it by the time that somebody resumes them."""
    world.on["run one"] = lambda: setattr(world, "silent", True)
    place = located("b").place
    assert place is not None
    world.fail[f"monitor {place.pid}"] = HypervisorError("taken")
    report = run(fake)
    assert report.exit_code == ExitCode.GUEST_LOST
    assert world.armed is not None
    assert [guest.name for guest in world.armed.guests] == ["b"]


def test_an_undo_that_brings_libvirt_back_is_followed_by_another_try(
    world: World, fake: FakeHands
) -> None:
    world.on["run one"] = lambda: setattr(world, "silent", True)
    world.on["undo one"] = lambda: setattr(world, "silent", False)
    world.monitors = False
    report = run(fake)
    assert report.exit_code == ExitCode.FAILED
    assert world.armed is None
    assert not world.stopped
    assert world.log.count("resume") == 2
    assert {guest.resumed_monotonic_ns for guest in report.guests} == {7000}


def test_guests_that_are_dead_leave_nothing_to_resume(world: World, fake: FakeHands) -> None:
    places = [guest.place for guest in (located("a"), located("b")) if guest.place is not None]

    def everybody_dies() -> None:
        world.silent = True
        world.dead.update(place.pid for place in places)

    world.on["run one"] = everybody_dies
    world.monitors = False
    report = run(fake)
    assert report.exit_code == ExitCode.GUEST_LOST
    assert world.armed is None
    assert not any("hostupdate resume" in reason for reason in report.reasons)


@pytest.mark.parametrize(("failing", "code"), [(False, ExitCode.DEGRADED), (True, ExitCode.FAILED)])
def test_a_report_that_cannot_be_kept_is_still_given_with_the_true_outcome(
    world: World, fake: FakeHands, failing: bool, code: ExitCode
) -> None:
    world.fail["save_report"] = JournalError("journal.db", "database or disk is full")
    if failing:
        world.results["one"] = Result(exit=1, problem="ended with exit status 1")
    report = run(fake)
    assert report.exit_code == code
    assert any("the report is not kept: journal journal.db" in reason for reason in report.reasons)


def test_a_guest_that_is_gone_when_its_ram_is_measured_is_named(
    world: World, fake: FakeHands
) -> None:
    guest = located("b")
    assert guest.place is not None
    gone, measure = guest.place.pid, fake.measure

    def look(pid: int) -> Sizes:
        if pid == gone:
            raise CoreError("hu_ram_mappings", 3, detail=f"pid {pid}")
        return measure(pid)

    fake.measure = look  # type: ignore[method-assign]
    report = run(fake)
    assert report.exit_code == ExitCode.FAILED
    assert any(reason.startswith("guest b: its RAM cannot be") for reason in report.reasons)
    assert "arm" not in world.log
    assert world.armed is None
