"""What a run does when the handover of a guest goes wrong in its middle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from hostupdate.engine import handover as engine
from hostupdate.engine.handover import Handover
from hostupdate.engine.outcome import new_report
from hostupdate.errors import DeadlineError, GuestError, HostUpdateError, HypervisorError
from hostupdate.model import Action, GuestState, Impact, Phase, PlannedGuest
from hostupdate.parked import ParkedRecord, ParkedState
from tests.unit.fakes import FakeHands, World, hands_of, located
from tests.unit.test_parked import RECORD

SILENT = HypervisorError("libvirt: resume a guest: end of file")


class Port:
    """Guests whose records are on disk in ``records``. ``fails``: method -> what its calls raise,
    one after the other; a method that fails has done what it is for, unless it is named in
    ``before``."""

    def __init__(self) -> None:
        self.records: dict[str, ParkedRecord] = {}
        self.running: dict[str, str] = {}
        self.fails: dict[str, list[Exception]] = {}
        self.before: set[str] = set()
        self.finished: list[str] = []
        self.dropped = False

    def _fail(self, method: str, *, done: bool) -> None:
        if self.fails.get(method) and done != (method in self.before):
            raise self.fails[method].pop(0)

    def _write(self, record: ParkedRecord, method: str, **changes: Any) -> ParkedRecord:
        self._fail(method, done=False)
        record = msgspec.structs.replace(record, **changes)
        self.records[record.uuid] = record
        self._fail(method, done=True)
        return record

    def prepare(self, uuid: str) -> ParkedRecord:
        record = msgspec.structs.replace(RECORD, uuid=uuid, name=uuid, new_emulator=None)
        self.running[uuid] = "old"
        return self._write(record, "prepare", state=ParkedState.LINKED)

    def latest(self, record: ParkedRecord) -> ParkedRecord | None:
        return self.records.get(record.uuid)

    def park(self, record: ParkedRecord) -> ParkedRecord:
        del self.running[record.uuid]
        return self._write(record, "park", state=ParkedState.SAVED)

    def digest(self, _record: ParkedRecord) -> str:
        return "same"

    def unpark(self, record: ParkedRecord) -> ParkedRecord:
        return self._write(record, "unpark", state=ParkedState.STRIPPED, new_emulator="new")

    def rollback(self, record: ParkedRecord) -> ParkedRecord:
        assert self.records[record.uuid].state is not ParkedState.RUNNING, "its RAM has moved on"
        return self._write(
            record, "rollback", state=ParkedState.STRIPPED, new_emulator=record.old_emulator
        )

    def commit(self, record: ParkedRecord) -> ParkedRecord:
        self._fail("commit", done=False)
        record = msgspec.structs.replace(record, state=ParkedState.RUNNING)
        self.records[record.uuid] = record
        self.running[record.uuid] = "new" if record.moved_on else "old"
        self._fail("commit", done=True)
        return record

    def finish(self, record: ParkedRecord) -> None:
        self._fail("finish", done=False)
        self.finished.append(record.uuid)
        del self.records[record.uuid]

    def abort(self, record: ParkedRecord) -> ParkedRecord | None:
        self._fail("abort", done=False)
        if record.uuid not in self.running:
            return self._write(record, "saved", state=ParkedState.SAVED)
        del self.records[record.uuid]
        return None

    def condemn(self, record: ParkedRecord, problem: str) -> ParkedRecord:
        return self._write(record, "condemn", problem=problem)

    def processes(self, uuids: Sequence[str]) -> dict[str, tuple[int, int]]:
        return {uuid: (1, 1) for uuid in uuids if uuid in self.running}

    def modules_in_use(self) -> str:
        return "kvm_amd was in use by 1"

    def blackout_ns(self, _record: ParkedRecord) -> int | None:
        return 1

    def drop_kept(self) -> None:
        self._fail("drop_kept", done=True)
        self.dropped = True

    def rehearse(self, uuid: str, mark: Callable[[bool], None]) -> tuple[str, int | None, str]:
        mark(True)
        del self.running[uuid]
        self._fail("rehearse", done=True)
        self.running[uuid] = "old"
        mark(False)
        return "", 1, "10"

    def end_rehearsal(self, uuid: str) -> None:
        self._fail("end_rehearsal", done=False)
        self.running[uuid] = "old"


class Bench:
    """Two guests, prepared. ``together``: they are parked at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, together: bool = False) -> None:
        monkeypatch.setattr(engine, "_POLL_S", 0)
        monkeypatch.setattr(engine, "PATIENCE_NS", 20_000_000)
        guests = tuple(
            PlannedGuest(name=name, uuid=name, state=GuestState.RUNNING, pause=True)
            for name in ("a", "b")
        )
        actions = (act("park"),) if together else ()
        plan = msgspec.structs.replace(_plan(), guests=guests, actions=actions)
        report = new_report("run", plan, 0)
        self.port = Port()
        self.degraded: list[str] = []
        self.world = World()
        self.hands = hands_of(FakeHands(self.world), [located("a"), located("b")])
        hands = self.hands
        self.reports = {guest.uuid: guest for guest in report.guests}
        self.handover = Handover(
            plan,
            replace(hands, handover=self.port),  # type: ignore[arg-type]
            self.reports,
            self.degraded.append,
            2,
        )
        self.handover.prepare(act("prepare"))

    def take(self, *kinds: str, guest: str = "a") -> None:
        for kind in kinds:
            getattr(self.handover, kind)(act(kind, guest))


def _plan() -> Any:
    from hostupdate.model import Plan

    return Plan(
        update="u",
        requested="auto",
        judged=Impact.HANDOVER,
        actual=Impact.HANDOVER,
        method=None,
        method_reason="",
        budget_ns=5_000_000_000,
        predicted_blackout_ns=1,
        guests=(),
        actions=(),
    )


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(monkeypatch, together=True)


def act(kind: str, guest: str = "") -> Action:
    return Action(phase=Phase.BLACKOUT, kind=kind, title=kind, guest=guest)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(monkeypatch)


@pytest.mark.parametrize("error", [SILENT, DeadlineError("resume a guest", 1)])
def test_a_guest_whose_resume_got_no_answer_is_not_rolled_back(
    bench: Bench, error: HostUpdateError
) -> None:
    """It may run, and its RAM move on."""
    bench.port.fails["commit"] = [error]
    bench.take("park", "unpark", "commit")
    assert bench.port.running["a"] == "new"
    assert bench.handover.committed and not bench.handover.problems()
    bench.take("park", "unpark", "commit", guest="b")  # one lost answer ends nothing
    assert bench.port.running == {"a": "new", "b": "new"}
    bench.handover.clear()
    assert bench.port.finished == ["a", "b"] and not bench.handover.unfinished


def test_a_guest_that_cannot_be_let_run_is_left_to_recovery(bench: Bench) -> None:
    """The run stays, other guests are not touched, and what recovery needs is not cleared up."""
    bench.port.fails["commit"] = [SILENT] * 100_000
    bench.take("park", "unpark", "commit")
    assert bench.handover.committed
    assert "may stand still" in bench.handover.problems()["a"]
    bench.take("park", "unpark", "commit", guest="b")
    assert bench.port.running["b"] == "old"
    bench.handover.clear()
    assert bench.port.records["a"].state is ParkedState.RUNNING
    assert bench.handover.unfinished


def test_what_fails_before_the_record_says_so_is_rolled_back(bench: Bench) -> None:
    bench.port.before.add("commit")
    bench.port.fails["commit"] = [SILENT]
    with pytest.raises(HypervisorError):
        bench.take("park", "unpark", "commit")
    assert bench.port.running["a"] == "old"
    assert not bench.handover.committed and not bench.handover.problems()


def test_a_resume_under_the_old_qemu_commits_nothing(bench: Bench) -> None:
    bench.port.before.add("unpark")
    bench.port.fails["unpark"] = [GuestError("a", "no")]
    bench.port.fails["commit"] = [SILENT]
    with pytest.raises(GuestError):
        bench.take("park", "unpark")
    assert bench.port.running["a"] == "old" and not bench.handover.committed


def test_a_daemon_that_comes_back_in_time_is_waited_for(bench: Bench) -> None:
    bench.port.before.update(("unpark", "rollback"))
    bench.port.fails["unpark"] = [SILENT]
    bench.port.fails["rollback"] = [SILENT] * 3
    with pytest.raises(HypervisorError):
        bench.take("park", "unpark")
    assert bench.port.running["a"] == "old" and not bench.handover.problems()


def test_one_that_stays_away_leaves_the_guest_parked(bench: Bench) -> None:
    bench.port.before.update(("unpark", "rollback"))
    bench.port.fails["unpark"] = [SILENT]
    bench.port.fails["rollback"] = [SILENT] * 100_000
    with pytest.raises(HypervisorError):
        bench.take("park", "unpark")
    assert "it stays parked" in bench.handover.problems()["a"]
    bench.handover.clear()
    assert bench.port.records["a"].state is ParkedState.SAVED


def test_what_could_not_be_cleared_up_is_not_forgotten(bench: Bench) -> None:
    bench.take("park", "unpark", "commit")
    bench.port.before.add("finish")
    bench.port.fails["finish"] = [SILENT]
    bench.handover.clear()
    assert bench.handover.unfinished and "not cleared up" in bench.degraded[0]


def test_a_guest_that_was_not_parked_is_passed_over(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one before it has moved on, so the run goes on."""
    bench.take("park", "unpark", "commit")

    def away(_record: ParkedRecord) -> ParkedRecord:
        raise SILENT

    monkeypatch.setattr(bench.port, "park", away)
    bench.take("park", "unpark", "commit", guest="b")
    assert bench.port.running["a"] == "new" and "b" not in bench.port.records
    assert "guest b: it is under its old QEMU again" in bench.degraded[0]


def test_a_guest_whose_park_nobody_noted_comes_back(bench: Bench) -> None:
    """libvirt died when its QEMU was gone already."""
    bench.port.before.add("park")
    bench.port.fails["park"] = [SILENT]
    with pytest.raises(HypervisorError):
        bench.take("park")
    assert bench.port.running["a"] == "old" and not bench.handover.problems()


def test_guests_that_are_parked_together_wait_for_what_is_undone_first(together: Bench) -> None:
    """A step may have taken away what their old QEMU needs."""
    together.port.before.add("unpark")
    together.port.fails["unpark"] = [GuestError("a", "no")]
    together.take("park", guest="")
    with pytest.raises(GuestError):
        together.take("unpark", guest="")
    assert not together.port.running and together.handover.dark
    together.handover.let_run()
    assert together.port.running == {"a": "old", "b": "old"}
    assert not together.handover.problems()


def test_a_bug_that_meets_one_guest_keeps_no_other_from_running(together: Bench) -> None:
    together.take("park", guest="")
    together.port.before.add("rollback")
    together.port.fails["rollback"] = [KeyError("bug")]
    together.handover.let_run()
    assert len(together.port.running) == 1 and len(together.handover.problems()) == 1
    together.handover.drop_kept()
    assert not together.port.dropped, "the guest that is parked needs it"
    together.handover.let_run()
    assert together.port.running == {"a": "old", "b": "old"}
    together.handover.drop_kept()
    assert together.port.dropped


def test_ram_that_has_changed_is_not_let_run(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither under the new QEMU nor under the old one."""
    digests = iter(["before", "after", "after", "after"])
    monkeypatch.setattr(bench.port, "digest", lambda _record: next(digests))
    bench.take("park")
    with pytest.raises(GuestError, match="its RAM changed"):
        bench.take("unpark")
    assert "a" not in bench.port.running
    assert "its RAM changed" in bench.handover.problems()["a"]


def cut_short(bench: Bench, silent: int) -> None:
    """A rehearsal, with libvirt away for so many calls after it."""
    bench.handover.begin_watch(act("watch"))
    bench.port.fails["rehearse"] = [SILENT]
    bench.port.before.add("end_rehearsal")
    bench.port.fails["end_rehearsal"] = [SILENT] * silent
    with pytest.raises(HypervisorError):
        bench.take("rehearse")


def test_a_rehearsal_that_is_cut_short_leaves_no_guest_stopped(bench: Bench) -> None:
    """The keeper watches while the guest is stopped; libvirt may be away for a while."""
    cut_short(bench, 3)
    assert bench.port.running["a"] == "old" and not bench.handover.problems()
    assert bench.hands.journal.pending.rehearsing == ""
    assert [event for event in bench.world.log if event in ("arm", "disarm")] == [
        "arm",
        "disarm",
    ]


def test_one_that_cannot_be_reached_is_told_of(bench: Bench) -> None:
    cut_short(bench, 100_000)
    assert "its rehearsal has stopped it" in bench.handover.problems()["a"]
    assert bench.hands.journal.pending.rehearsing == "a"
    bench.port.fails["end_rehearsal"].clear()
    bench.handover.let_run()
    assert bench.port.running["a"] == "old" and not bench.handover.problems()


def test_a_qemu_that_was_tried_is_ended_once_libvirt_is_there_again(bench: Bench) -> None:
    bench.take("park", "unpark", "commit")
    bench.take("park", "unpark", "commit", guest="b")
    bench.port.fails["drop_kept"] = [HypervisorError("away"), DeadlineError("ending", 1)]
    bench.handover.clear()
    assert bench.port.dropped and not bench.handover.unfinished and not bench.degraded


def test_a_qemu_that_was_tried_and_cannot_be_ended_is_left_to_recovery(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "PATIENCE_NS", 0)
    bench.take("park", "unpark", "commit")
    bench.take("park", "unpark", "commit", guest="b")
    bench.port.fails["drop_kept"] = [HypervisorError("away")]
    bench.handover.clear()
    assert bench.handover.unfinished
    assert "not all cleared up: away; run `hostupdate resume`" in bench.degraded[0]


def test_parked_together_one_that_may_run_keeps_the_others_from_being_rolled_back(
    together: Bench,
) -> None:
    """Whether it was let run is not known: its RAM may have moved on, so the update stays."""
    together.take("park", guest="")
    together.take("unpark", guest="")
    together.port.fails["commit"] = [SILENT]
    together.take("commit")
    assert together.handover.committed
    together.take("commit", guest="b")
    assert together.port.running == {"a": "new", "b": "new"}
    assert not together.handover.problems()


def test_a_guest_that_may_have_been_let_run_counts_whatever_ended_the_run(bench: Bench) -> None:
    bench.take("park", "unpark")
    bench.port.fails["commit"] = [KeyboardInterrupt()]  # type: ignore[list-item]
    with pytest.raises(KeyboardInterrupt):
        bench.take("commit")
    assert not bench.handover.committed
    assert bench.handover.some_moved_on() and bench.handover.committed


def test_what_still_uses_kvm_is_told_of_guests_that_are_parked_together(together: Bench) -> None:
    together.take("park", guest="")
    assert "while all were parked kvm_amd was in use by 1" in together.reports["a"].notes


def test_changed_ram_is_noted_for_recovery(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = iter(["before", "after", "after", "after"])
    monkeypatch.setattr(bench.port, "digest", lambda _record: next(digests))
    bench.take("park")
    with pytest.raises(GuestError, match="its RAM changed"):
        bench.take("unpark")
    assert bench.port.records["a"].problem == "its RAM changed while it was parked"


def test_a_guest_that_has_ended_is_not_called_under_its_old_qemu(bench: Bench) -> None:
    bench.take("park", "unpark", "commit")

    def gone(record: ParkedRecord) -> ParkedRecord:
        del bench.port.records[record.uuid], bench.port.running[record.uuid]
        raise GuestError("b", "it ended before it was saved")

    bench.port.park = gone  # type: ignore[method-assign]
    bench.take("park", guest="b")
    assert "guest b: it has ended" in bench.degraded[0]


def test_a_guest_whose_park_was_aborted_by_itself_is_under_its_old_qemu(bench: Bench) -> None:
    bench.take("park", "unpark", "commit")

    def aborted(record: ParkedRecord) -> ParkedRecord:
        del bench.port.records[record.uuid]
        raise GuestError("b", "it was started anew since its handover was prepared")

    bench.port.park = aborted  # type: ignore[method-assign]
    bench.take("park", guest="b")
    assert "guest b: it is under its old QEMU again" in bench.degraded[0]


def test_changed_ram_of_a_later_guest_is_not_let_run_either(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.take("park", "unpark", "commit")
    digests = iter(["before", "after", "after"])
    monkeypatch.setattr(bench.port, "digest", lambda _record: next(digests))
    bench.take("park", "unpark", "commit", guest="b")
    assert "b" not in bench.port.running
    assert "its RAM changed" in bench.handover.problems()["b"]
