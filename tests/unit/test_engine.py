"""The engine on a host in memory: order, undo, outcomes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec
import pytest

from hostupdate.config import decode_config
from hostupdate.durations import SECOND
from hostupdate.engine import Run
from hostupdate.errors import (
    AgentError,
    CoreError,
    GuestError,
    HypervisorError,
    JournalError,
    StopError,
)
from hostupdate.model import ExitCode, GuestState, LocatedGuest, Outcome, Phase, Report
from hostupdate.skew import Corrected, Skew, Way
from hostupdate.unwinding import Kind
from hostupdate.vitals import Vitals
from tests.unit.fakes import FakeHands, Result, World, hands_of, located
from tests.unit.test_plan import manifest, plan, step

UNDO = {"undo": '["true"]'}


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def fake(world: World) -> Iterator[FakeHands]:
    made = FakeHands(world)
    yield made
    made.close_pipes()


THREE = (
    step("stage", "download", **UNDO),
    step("blackout", "one", timeout='"1s"', **UNDO),
    step("blackout", "two", timeout='"1s"', **UNDO),
    step("finish", "tidy"),
)


def run(
    fake: FakeHands,
    *steps: str,
    guests: tuple[LocatedGuest, ...] = (),
    method: str = "freeze",
    config: str = "",
) -> Report:
    guests = guests or (located("a"), located("b"))
    settings = decode_config([("c", config.encode())])
    made = plan(
        manifest("", *(steps or THREE)),
        *guests,
        method=method,
        config=settings,
        synchronised=fake.world.synchronised,
    )
    return Run("run", made, settings, hands_of(fake, guests)).execute()


def actions(world: World) -> list[str]:
    """What was done, without the parts that do not matter to the order."""
    return [entry for entry in world.log if not entry.startswith("home")]


def test_a_run_that_works(world: World, fake: FakeHands) -> None:
    report = run(fake)
    assert (report.outcome, report.exit_code, report.reasons) == (Outcome.OK, ExitCode.OK, [])
    assert world.log == [
        "run download", "clocks-before", "record", "keeper", "arm", "freeze", "run one", "run two",
        "thaw", "disarm", "clocks", "keeper-end", "run tidy",
    ]  # fmt: skip
    assert world.armed is None
    assert world.saved is report
    assert not world.frozen
    assert [guest.blackout_ns for guest in report.guests] == [5000, 5010]
    assert report.blackout_ns == 5010
    assert (report.spread_ns, report.stop_all_ns) == (10, 1010)
    assert [guest.state_after for guest in report.guests] == [GuestState.RUNNING] * 2
    assert report.guests[0].residency.digest_equal is True
    assert [phase.name for phase in report.phases] == ["stage", "blackout", "finish"]


def test_what_is_done_is_what_was_planned(world: World, fake: FakeHands) -> None:
    made = plan(manifest("", *THREE), method="freeze")
    assert run(fake).actions == [action.title for action in made.actions]


def test_the_record_is_there_before_the_first_pause_and_gone_after_the_last(
    world: World, fake: FakeHands
) -> None:
    seen = {}
    for entry in ("freeze", "thaw"):
        world.on[entry] = lambda entry=entry: seen.update({entry: world.armed is not None})  # type: ignore[misc]
    run(fake)
    assert seen == {"freeze": True, "thaw": True}
    assert world.armed is None


def test_stop_and_resume_go_around_freeze_and_thaw(world: World, fake: FakeHands) -> None:
    report = run(fake, method="stop")
    order = [entry for entry in world.log if entry in ("stop", "freeze", "thaw", "resume")]
    assert order == ["stop", "freeze", "thaw", "resume"]
    assert report.exit_code == ExitCode.OK
    assert report.guests[0].paused_monotonic_ns == 500
    assert report.guests[0].resumed_monotonic_ns == 7000


@pytest.mark.parametrize("method", ["freeze", "stop"])
def test_a_failing_step_resumes_guests_first_and_undoes_in_reverse(
    world: World, fake: FakeHands, method: str
) -> None:
    world.results["two"] = Result(exit=3, problem="ended with exit status 3")
    report = run(fake, method=method)
    assert (report.outcome, report.exit_code) == (Outcome.FAILED, ExitCode.FAILED)
    after = world.log[world.log.index("run two") + 1 :]
    back = ["thaw", "disarm", "resume"] if method == "stop" else ["thaw", "disarm"]
    assert after == [*back, "clocks", "undo two", "undo one", "keeper-end", "undo download"]
    assert "step 'two': ended with exit status 3" in report.reasons
    assert [(s.name, s.undone) for s in report.steps] == [
        ("download", True), ("one", True), ("two", True),
    ]  # fmt: skip
    assert report.undone == ["two", "one", "download"]
    assert world.armed is None
    assert not world.frozen and not world.stopped


def test_a_failure_before_the_first_pause_pauses_nobody(world: World, fake: FakeHands) -> None:
    world.results["download"] = Result(exit=100, problem="ended with exit status 100")
    report = run(fake)
    assert world.log == ["run download", "undo download"]
    assert report.exit_code == ExitCode.FAILED
    assert report.blackout_ns is None


@pytest.mark.parametrize("entry", ["record", "keeper", "arm", "freeze", "stop"])
def test_any_action_that_fails_leaves_all_guests_running(
    world: World, fake: FakeHands, entry: str
) -> None:
    world.fail[entry] = CoreError("hu_something", 110)
    report = run(fake, method="stop")
    assert report.exit_code == ExitCode.FAILED
    assert world.armed is None
    assert not world.frozen and not world.stopped
    assert world.log[-1] == "undo download"


def test_a_bug_of_ours_in_the_blackout_is_a_failure_like_any_other(
    world: World, fake: FakeHands
) -> None:
    world.fail["run one"] = ZeroDivisionError("oops")
    report = run(fake)
    assert report.exit_code == ExitCode.FAILED
    assert "internal error: ZeroDivisionError: oops" in report.reasons
    assert not world.frozen


def test_an_undo_that_fails_does_not_stop_the_others(world: World, fake: FakeHands) -> None:
    world.results["two"] = Result(exit=1, problem="ended with exit status 1")
    world.fail["undo two"] = OSError(5, "no luck")
    report = run(fake)
    assert report.undone == ["one", "download"]
    assert any("undo of \"run 'two'\"" in reason for reason in report.reasons)
    assert report.steps[-1].undone is False


def test_a_signal_stops_the_run_between_two_actions(world: World, fake: FakeHands) -> None:
    world.on["freeze"] = lambda: setattr(world, "signal", "SIGTERM")
    report = run(fake)
    assert "run one" not in world.log
    assert "stopped by SIGTERM" in report.reasons
    assert report.exit_code == ExitCode.FAILED
    assert not world.frozen


def test_a_signal_after_the_guests_were_verified_changes_nothing(
    world: World, fake: FakeHands
) -> None:
    world.on["run tidy"] = lambda: setattr(world, "signal", "SIGTERM")
    assert run(fake).exit_code == ExitCode.OK


def test_a_guest_that_dies_in_the_blackout_is_named(world: World, fake: FakeHands) -> None:
    guests = (located("a"), located("b"))
    assert guests[1].place is not None
    pid = guests[1].place.pid
    world.on["run one"] = lambda: world.dead.add(pid)
    report = run(fake, guests=guests)
    assert report.exit_code == ExitCode.GUEST_LOST
    assert any(reason.startswith(f"guest b: its QEMU, pid {pid}") for reason in report.reasons)
    assert report.undone == ["two", "one", "download"]


def test_libvirt_away_after_a_freeze_fails_the_run_with_guests_safe(
    world: World, fake: FakeHands
) -> None:
    world.on["run one"] = lambda: setattr(world, "silent", True)
    report = run(fake)
    assert report.exit_code == ExitCode.FAILED
    assert any("libvirt does not answer" in reason for reason in report.reasons)
    assert report.undone == ["two", "one", "download"]
    assert not world.frozen


def test_libvirt_away_after_a_stop_resumes_by_the_guests_own_monitors(
    world: World, fake: FakeHands
) -> None:
    world.on["run one"] = lambda: setattr(world, "silent", True)
    report = run(fake, method="stop")
    assert len([entry for entry in world.log if entry.startswith("monitor")]) == 2
    assert report.exit_code == ExitCode.FAILED
    assert any("monitor socket" in note for note in report.guests[0].notes)


def test_a_guest_that_neither_way_resumes_needs_a_human(world: World, fake: FakeHands) -> None:
    world.on["run one"] = lambda: setattr(world, "silent", True)
    world.monitors = False
    report = run(fake, method="stop")
    assert report.exit_code == ExitCode.GUEST_LOST
    assert any("by its monitor: taken" in reason for reason in report.reasons)
    assert world.wishes == [], "the agent of a paused guest was waited for"


def test_a_guest_that_does_not_stop_is_named(world: World, fake: FakeHands) -> None:
    world.fail["stop"] = GuestError("b", "it did not stop within 5 s")
    report = run(fake, method="stop")
    assert report.exit_code == ExitCode.FAILED
    assert "guest b: it did not stop within 5 s" in report.reasons
    assert "freeze" not in world.log


def test_ram_that_changed_or_was_swapped_degrades_the_run(world: World, fake: FakeHands) -> None:
    world.digests = ["before", "before", "other", "before"]
    world.faults = 3
    report = run(fake)
    assert report.exit_code == ExitCode.DEGRADED
    assert any("RAM changed" in reason for reason in report.reasons)
    assert any("3 major faults" in reason for reason in report.reasons)
    assert "undo one" not in world.log


def test_a_finish_step_that_fails_degrades_and_undoes_nothing(
    world: World, fake: FakeHands
) -> None:
    world.results["tidy"] = Result(exit=1, problem="ended with exit status 1")
    report = run(fake)
    assert report.exit_code == ExitCode.DEGRADED
    assert not [entry for entry in world.log if entry.startswith("undo")]


def test_a_keeper_that_fired_is_told(world: World, fake: FakeHands) -> None:
    world.on["run two"] = lambda: setattr(world, "keeper_fires", True)
    report = run(fake)
    assert report.exit_code == ExitCode.DEGRADED
    assert any("the keeper let the guests run" in reason for reason in report.reasons)


def test_a_keeper_that_died_is_told(world: World, fake: FakeHands) -> None:
    world.keeper_dies = True
    report = run(fake)
    assert report.exit_code == ExitCode.DEGRADED
    assert any("the keeper did not answer" in reason for reason in report.reasons)


def test_the_keeper_cutting_a_step_short_fails_the_run(world: World, fake: FakeHands) -> None:
    world.results["one"] = Result(exit=None, problem="was cut short")
    world.on["run one"] = lambda: setattr(world, "keeper_fires", True)
    report = run(fake)
    assert report.exit_code == ExitCode.FAILED
    assert any("the budget is over" in reason for reason in report.reasons)


def test_cgroups_and_memory_min_are_put_back(world: World, fake: FakeHands) -> None:
    guests = (located("a", shared_cgroup=True), located("b", memory_controller=True))
    for failing in (False, True):
        world.log.clear()
        if failing:
            world.results["one"] = Result(exit=1, problem="ended with exit status 1")
        run(fake, guests=guests)
        assert "isolate uuid-a" in world.log and "isolate uuid-b" not in world.log
        assert "memory.min /machine/b=4096" in world.log
        back = max(i for i, e in enumerate(world.log) if e == "memory.min /machine/b=0")
        assert back > world.log.index("thaw")
        assert "home /hostupdate/uuid-a" in world.log


def test_an_update_that_pauses_nobody_runs_its_steps(world: World, fake: FakeHands) -> None:
    report = run(fake, step("stage", "x"), step("finish", "y"))
    assert world.log == ["run x", "run y"]
    assert (report.exit_code, report.blackout_ns, report.method) == (ExitCode.OK, None, None)


def test_without_libvirt_before_a_pause_nothing_is_touched(world: World, fake: FakeHands) -> None:
    def away(uuids: object) -> None:
        raise HypervisorError("libvirt: away")

    fake.prepare = away  # type: ignore[method-assign]
    report = run(fake, method="stop")
    assert "keeper" not in world.log and "freeze" not in world.log
    assert report.exit_code == ExitCode.FAILED


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a, b: [a], "guest b: it is gone"),
        (lambda a, b: [a, located("b", state=GuestState.PAUSED)], "guest b: it is paused"),
        (lambda a, b: [a, located("b", started=2)], "guest b: it was restarted"),
        (lambda a, b: [a, b, located("c")], "guest c: it was started"),
        (lambda a, b: [a, b, located("d", state=GuestState.UNKNOWN)], "guest d: it was started"),
    ],
)
def test_guests_that_changed_since_the_plan_end_the_run_before_any_pause(
    world: World, fake: FakeHands, change: Callable[..., list[LocatedGuest]], words: str
) -> None:
    guests = (located("a"), located("b"))
    world.changed = change(*guests)
    report = run(fake, guests=guests)
    assert report.exit_code == ExitCode.FAILED
    assert any(words in reason for reason in report.reasons)
    assert "arm" not in world.log
    assert "undo download" in world.log
    assert world.armed is None


def test_a_guest_that_does_not_answer_is_the_only_one_resumed_later(
    world: World, fake: FakeHands
) -> None:
    resumed: list[str] = []
    world.fail["stop"] = StopError("b", "it did not stop within 5 s", late=("uuid-b",))
    before = fake.resume
    fake.resume = lambda guests, timeout_ns: (  # type: ignore[method-assign]
        resumed.extend(name for _, name in guests) or before(guests, timeout_ns)
    )
    assert run(fake, method="stop").exit_code == ExitCode.FAILED
    assert resumed == ["b"], "a guest that its owner paused must not be resumed"


@pytest.mark.parametrize("error", [SystemExit(1), BrokenPipeError(), KeyboardInterrupt()])
def test_a_watcher_that_fails_does_not_end_a_run(
    world: World, fake: FakeHands, error: BaseException
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error

    fake.phase = fake.started = fake.ended = fake.undone = broken  # type: ignore[method-assign]
    assert run(fake).exit_code == ExitCode.OK
    world.results["two"] = Result(exit=1, problem="ended with exit status 1")
    world.log.clear()
    assert run(fake).exit_code == ExitCode.FAILED
    assert [e for e in world.log if e.startswith("undo")] == [
        "undo two",
        "undo one",
        "undo download",
    ]


def test_the_keeper_is_disarmed_before_anybody_is_told_that_the_blackout_is_over(
    world: World, fake: FakeHands
) -> None:
    told = fake.phase

    def phase(name: Phase, *, paused: bool) -> None:
        if name is Phase.FINISH:
            assert "disarm" in world.log
        told(name, paused=paused)

    fake.phase = phase  # type: ignore[method-assign]
    assert run(fake).exit_code == ExitCode.OK


def test_what_fails_after_the_guests_run_does_not_undo_the_update(
    world: World, fake: FakeHands
) -> None:
    guests = (located("a", shared_cgroup=True), located("b"))
    world.fail["home /hostupdate/uuid-a"] = OSError(16, "Device or resource busy")
    report = run(fake, guests=guests)
    assert report.exit_code == ExitCode.DEGRADED
    assert any("putting cgroups back" in reason for reason in report.reasons)
    assert "undo one" not in world.log


def test_a_digest_taken_after_the_keeper_fired_claims_nothing(
    world: World, fake: FakeHands
) -> None:
    world.on["run two"] = lambda: setattr(world, "keeper_fires", True)
    world.digests = ["before", "before", "other", "before"]
    report = run(fake)
    assert {guest.residency.digest_equal for guest in report.guests} == {None}
    assert "keeper" in report.guests[0].residency.digest_reason


def test_a_living_guest_that_was_not_seen_to_thaw_keeps_the_record(
    world: World, fake: FakeHands
) -> None:
    world.fail["thaw"] = CoreError("hu_guests_thaw", 110)
    report = run(fake)
    assert report.exit_code == ExitCode.GUEST_LOST
    assert world.armed is not None, "`hostupdate resume` has something to do"


def test_clocks_are_measured_before_and_set_first_thing_after(
    world: World, fake: FakeHands
) -> None:
    report = run(fake, method="stop")
    after = world.log.index("resume") + 1
    assert world.log[after : after + 2] == ["disarm", "clocks"]
    assert world.log.index("clocks-before") < world.log.index("stop")
    for guest in report.guests:
        clock = guest.clock
        assert (clock.before_ns, clock.resumed_ns, clock.after_ns) == (200, -5 * SECOND, 500)
        assert (clock.uncertainty_ns, clock.method, clock.problem) == (1000, "guest-set-time", "")
    assert [(w.target_ns, w.answered) for w in world.wishes] == [(0, True)] * 2


def test_a_guest_that_was_wrong_before_is_told_apart(world: World, fake: FakeHands) -> None:
    world.skews["uuid-a"] = Skew(skew_ns=-86_400 * SECOND, uncertainty_ns=1000)
    report = run(fake)
    assert report.exit_code == ExitCode.OK
    assert "24 h off before the pause; it was set to the host's time" in report.guests[0].notes[0]
    run(fake, config='[clock]\ncorrect = "ours"')
    assert [wish.target_ns for wish in world.wishes] == [-86_400 * SECOND, 200]


def test_a_host_clock_that_is_not_synchronised_sets_no_guest(world: World, fake: FakeHands) -> None:
    world.synchronised = False
    report = run(fake)
    assert report.exit_code == ExitCode.OK
    assert any("nothing synchronises" in reason for reason in report.reasons)
    assert [wish.target_ns for wish in world.wishes] == [200, 200]
    run(fake, config="[clock]\ntrust-host = true")
    assert [wish.target_ns for wish in world.wishes] == [0, 0]


def test_a_host_clock_that_is_stepped_in_the_run_sets_no_guest(
    world: World, fake: FakeHands
) -> None:
    world.on["run one"] = lambda: setattr(world, "host_offset_ns", 7 + SECOND)
    report = run(fake)
    assert report.exit_code == ExitCode.DEGRADED
    assert "the host's clock was stepped by 1 s during the run" in report.reasons[0]
    assert [wish.target_ns for wish in world.wishes] == [200, 200]


@pytest.mark.parametrize("require", [False, True])
def test_a_guest_without_an_agent_is_not_verified(
    world: World, fake: FakeHands, require: bool
) -> None:
    world.skews["uuid-a"] = AgentError("it has no guest agent", missing=True)
    world.corrected["uuid-a"] = Corrected(problem="it has no guest agent", remedy="give it one")
    report = run(fake, config=f"[clock]\nrequire = {str(require).lower()}")
    assert report.exit_code == (ExitCode.DEGRADED if require else ExitCode.OK)
    text = "guest a: its clock is not verified: it has no guest agent; give it one"
    assert report.reasons == [text]
    assert set(msgspec.structs.astuple(report.guests[0].clock)) == {None, "it has no guest agent"}
    assert world.wishes[0].answered is False


def test_a_clock_that_stays_wrong_degrades_the_run(world: World, fake: FakeHands) -> None:
    wrong = Skew(skew_ns=SECOND, uncertainty_ns=1000)
    world.corrected["uuid-b"] = Corrected(found=wrong, now=wrong, way=Way.NONE, problem="1 s off")
    report = run(fake)
    assert report.exit_code == ExitCode.DEGRADED
    assert report.reasons == ["guest b: its clock is wrong: 1 s off"]
    assert report.guests[1].clock.after_ns == SECOND


HELD = "[clock]\nhold-network = true"


def test_links_are_down_until_the_clock_is_right(world: World, fake: FakeHands) -> None:
    report = run(fake, method="stop", config=HELD)
    order = [e for e in world.log if e.startswith("link") or e in ("arm", "clocks", "disarm")]
    assert order == [
        "link uuid-a down", "link uuid-b down", "arm",
        "clocks", "link uuid-a up", "link uuid-b up", "disarm",
    ]  # fmt: skip
    assert report.exit_code == ExitCode.OK
    assert not world.unplugged


def test_recovery_knows_the_links_before_they_go_down(world: World, fake: FakeHands) -> None:
    seen = []
    world.on["link uuid-a down"] = lambda: seen.append(world.armed)
    run(fake, config=HELD)
    assert [guest.links for guest in seen[0].guests] == [("52:54:00:00:00:01",)] * 2


@pytest.mark.parametrize("entry", ["link uuid-b down", "arm", "freeze", "run one", "clocks"])
def test_links_come_up_whatever_fails(world: World, fake: FakeHands, entry: str) -> None:
    world.fail[entry] = CoreError("hu_something", 110)
    report = run(fake, config=HELD)
    assert report.exit_code == ExitCode.FAILED
    assert not world.unplugged


def test_a_link_that_stays_down_fails_the_run_and_names_the_command(
    world: World, fake: FakeHands
) -> None:
    world.fail["link uuid-a up"] = HypervisorError("no")
    report = run(fake, config=HELD)
    assert report.exit_code == ExitCode.FAILED
    assert any("guest a: its network link stays down: no" in text for text in report.reasons)
    assert "link uuid-b up" in world.log


# ---- vital signs


def test_a_disk_that_does_not_answer_after_the_update_fails_and_undoes_it(
    world: World, fake: FakeHands
) -> None:
    world.vitals["uuid-a"] = Vitals(agent=True, disks={"vda": "it does not answer"})
    report = run(fake)
    assert report.exit_code == ExitCode.FAILED
    assert "undo one" in world.log
    assert any("guest a: after the update its disk vda" in reason for reason in report.reasons)


def test_an_agent_that_does_not_answer_after_the_update_degrades_it(
    world: World, fake: FakeHands
) -> None:
    world.vitals["uuid-a"] = Vitals(agent=False, disks={"vda": ""})
    report = run(fake)
    assert report.exit_code == ExitCode.DEGRADED
    assert "undo one" not in world.log


def test_a_guest_that_dies_while_it_is_looked_at_is_not_called_well(
    world: World, fake: FakeHands
) -> None:
    place = located("a").place
    assert place is not None

    class Deadly(dict[str, Vitals]):
        def get(self, _uuid: str, well: Vitals) -> Vitals:  # type: ignore[override]
            world.dead.add(place.pid)
            return well

    world.vitals = Deadly()
    report = run(fake)
    assert report.exit_code == ExitCode.GUEST_LOST
    # libvirt, which says that it runs, has not learnt of it yet.
    assert report.guests[0].state_after is GuestState.GONE
    assert any(f"guest a: its QEMU, pid {place.pid}, is gone" in text for text in report.reasons)


# ---- the journal


@pytest.mark.parametrize("kind", ["intent", "done", "blackout", "committed"])
def test_a_run_that_cannot_write_down_what_it_does_is_undone(
    world: World, fake: FakeHands, kind: str
) -> None:
    world.fail[f"journal {kind}"] = JournalError("journal.db", "database or disk is full")
    report = run(fake)
    assert report.exit_code == ExitCode.FAILED
    assert not world.frozen and not world.stopped
    assert report.reasons[0].startswith("journal journal.db cannot be written")


@pytest.mark.parametrize("kind", ["failed", "undoing", "undone"])
def test_a_journal_that_fails_keeps_nothing_from_being_undone(
    world: World, fake: FakeHands, kind: str
) -> None:
    world.results["one"] = Result(exit=1, problem="ended with exit status 1")
    world.fail[f"journal {kind}"] = JournalError("journal.db", "database or disk is full")
    report = run(fake)
    assert report.exit_code == ExitCode.FAILED
    assert "undo one" in world.log
    said = [r for r in report.reasons if r.startswith("journal journal.db cannot be written")]
    assert len(said) == 1


def test_every_action_is_written_down_before_it_begins_and_after_it_ended(
    world: World, fake: FakeHands
) -> None:
    run(fake)
    numbers = [number for kind, number in world.records if kind is Kind.INTENT]
    assert numbers == list(range(len(numbers)))
    assert [number for kind, number in world.records if kind is Kind.DONE] == numbers
    kinds = [kind for kind, _ in world.records]
    assert kinds.index(Kind.BLACKOUT) < kinds.index(Kind.COMMITTED)
    assert world.ended


def test_a_guest_that_dies_after_the_update_was_verified_is_named(
    world: World, fake: FakeHands
) -> None:
    guests = (located("a"), located("b"))
    assert guests[1].place is not None
    pid = guests[1].place.pid
    world.on["run tidy"] = lambda: world.dead.add(pid)
    report = run(fake, guests=guests)
    assert report.exit_code == ExitCode.GUEST_LOST
    assert f"guest b: its QEMU, pid {pid}, is gone" in report.reasons


def test_that_guests_may_be_paused_is_written_down_before_any_is(
    world: World, fake: FakeHands
) -> None:
    seen = []
    world.on["arm"] = lambda: seen.append(world.armed is not None and world.armed.armed)
    world.on["keeper"] = lambda: seen.append(world.armed is not None and world.armed.armed)
    run(fake)
    assert seen == [False, True]
