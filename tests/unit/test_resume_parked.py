"""``hostupdate resume`` of a handover: real records and a real journal; of guests and libvirt there
is what a test says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from hostupdate.cli import bringing_back, handing_over, late_clocks, recovering, resume
from hostupdate.cli.recovering import Recovery
from hostupdate.cli.recovery_hands import Libvirt
from hostupdate.cli.settings import Settings
from hostupdate.errors import (
    GuestError,
    HypervisorError,
    InputError,
    JournalError,
    PrerequisiteError,
)
from hostupdate.handover.records import ParkedRecords
from hostupdate.handover.recovery import Recovered
from hostupdate.host import processes
from hostupdate.journal import Journal, RunJournal
from hostupdate.model import ExitCode, PendingRecord
from hostupdate.parked import ParkedRecord, ParkedState
from hostupdate.unwinding import Kind
from tests.unit.test_journal import report
from tests.unit.test_parked import RECORD
from tests.unit.test_resume import interrupted, journal, undone

__all__ = ("journal",)
NEW = "/opt/qemu-11/qemu"


class Killed(BaseException):
    """The recovery ended where it was."""


class World:
    """``found`` says of a guest what recovering it finds, or raises; UNPARKED where it does not.
    ``away``: libvirt does not answer."""

    def __init__(self, journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
        self.journal = journal
        self.patch = monkeypatch
        self.records = ParkedRecords(journal.state)
        self.found: dict[str, Recovered | Exception] = {}
        self.away = False
        self.rehearsed: list[str] = []
        self.rehearsal_fails: Exception | None = None
        self.let_run: set[str] = set()  #: uuids
        facts = SimpleNamespace(facts=lambda uuid: SimpleNamespace(let_run=uuid in self.let_run))
        host = SimpleNamespace(records=self.records, domains=facts)
        monkeypatch.setattr(bringing_back, "parking_host", lambda *_: host)
        monkeypatch.setattr(bringing_back, "recover", self._recover)
        monkeypatch.setattr(bringing_back, "have_hook_called", lambda *_: False)
        monkeypatch.setattr(handing_over, "end_rehearsal", self._end_rehearsal)
        monkeypatch.setattr(recovering, "Libvirt", lambda *_: self)

    def __call__(self) -> Any:
        if self.away:
            raise HypervisorError("away")

    def wait(self, _patience_ns: int) -> Any:
        return self()

    def park(self, name: str, state: ParkedState = ParkedState.STRIPPED, **changes: Any) -> None:
        uuid = changes.pop("uuid", f"uuid-{name}")
        self.records.write(
            msgspec.structs.replace(RECORD, name=name, uuid=uuid, state=state, **changes)
        )

    def _recover(
        self,
        _host: Any,
        record: ParkedRecord,
        emulator: str | None,
        *,
        stay: bool,
        ran: Callable[[ParkedRecord], None],
    ) -> Recovered:
        found = self.found.get(record.name, Recovered.UNPARKED)
        if isinstance(found, Exception):
            raise found
        if found is Recovered.UNPARKED:
            record = msgspec.structs.replace(
                record, state=ParkedState.RUNNING, new_emulator=emulator
            )
            self.records.write(record)
        if found in (Recovered.UNPARKED, Recovered.COMMITTED):
            ran(record)
        self.records.remove(record.uuid)
        return found

    def _end_rehearsal(self, _hypervisor: Any, uuid: str) -> None:
        if self.rehearsal_fails is not None:
            raise self.rehearsal_fails
        self.rehearsed.append(uuid)

    def resume(self) -> Recovery:
        """As ``hostupdate resume`` would."""
        pending = self.journal.pending()
        assert pending is not None
        recovery = Recovery(Settings(state=self.journal.state), self.journal, pending)
        recovery.execute()
        return recovery

    def kinds(self, pending: PendingRecord) -> list[Kind]:
        run = self.journal.reopen(pending)
        kinds = [record.kind for record in run.records()]
        run.close()
        return kinds

    def refuse(self, kind: Kind) -> pytest.MonkeyPatch:
        """The journal does not take that; the patch to be undone."""
        note = RunJournal.note
        patch = pytest.MonkeyPatch()

        def fails(run: RunJournal, noted: Kind, *args: Any) -> None:
            if noted is kind:
                raise JournalError("journal.db", "disk full")
            note(run, noted, *args)

        patch.setattr(RunJournal, "note", fails)
        return patch

    def kill_at(self, place: str) -> pytest.MonkeyPatch:
        def point(reached: str) -> None:
            if reached == place:
                raise Killed

        patch = pytest.MonkeyPatch()
        patch.setattr(recovering.faults, "point", point)
        return patch


@pytest.fixture
def world(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(journal, monkeypatch)


# ---- what has moved on is not undone


@pytest.mark.parametrize("state", [ParkedState.RUNNING, ParkedState.STRIPPED])
def test_a_recovery_that_is_killed_once_the_guest_was_cleared_up_undoes_nothing(
    world: World, state: ParkedState
) -> None:
    pending = interrupted(world.journal, guests=())
    world.park("g1", state, new_emulator=NEW)
    world.found["g1"] = Recovered.COMMITTED
    killed = world.kill_at("resume.guests-run")
    with pytest.raises(Killed):
        world.resume()
    killed.undo()
    assert world.records.uuids() == [] and world.kinds(pending).count(Kind.COMMITTED) == 1

    recovery = world.resume()

    assert undone(recovery) == [] and recovery.exit_code == ExitCode.OK
    assert world.journal.pending() is None


@pytest.mark.parametrize("new", [NEW, RECORD.old_emulator])
def test_what_somebody_has_let_run_under_its_new_qemu_is_not_undone_beneath_it(
    world: World, new: str
) -> None:
    interrupted(world.journal, guests=())
    world.park("g1", ParkedState.STRIPPED, new_emulator=new)
    world.let_run.add("uuid-g1")
    world.found["g1"] = GuestError("g1", "it cannot be looked at")

    recovery = world.resume()

    assert bool(undone(recovery)) is (new != NEW)


def test_a_run_that_died_before_it_could_say_that_a_guest_moved_on_is_not_undone(
    world: World,
) -> None:
    pending = interrupted(world.journal, guests=())
    world.park("g1", ParkedState.RUNNING, new_emulator=NEW)
    world.away = True

    recovery = world.resume()

    assert undone(recovery) == [] and recovery.exit_code == ExitCode.GUEST_LOST
    assert Kind.COMMITTED in world.kinds(pending)
    assert world.records.uuids() == ["uuid-g1"] and world.journal.pending() is not None


@pytest.mark.parametrize("away", [False, True])
def test_what_the_journal_does_not_take_is_said_at_the_next_try_and_not_undone_before(
    world: World, away: bool
) -> None:
    pending = interrupted(world.journal, guests=())
    world.park("g1", ParkedState.RUNNING, new_emulator=NEW)
    world.found["g1"] = Recovered.COMMITTED
    world.away = away
    full = world.refuse(Kind.COMMITTED)

    recovery = world.resume()

    assert undone(recovery) == []
    assert recovery.exit_code == (ExitCode.GUEST_LOST if away else ExitCode.DEGRADED)
    assert world.records.uuids() == ["uuid-g1"], "it alone says that the update stays"
    full.undo()
    world.away = False

    assert world.resume().exit_code == ExitCode.OK
    assert Kind.COMMITTED in world.kinds(pending) and world.records.uuids() == []
    assert world.journal.pending() is None


def test_without_its_journal_a_guest_that_moved_on_keeps_its_record(world: World) -> None:
    pending = interrupted(world.journal, guests=())
    world.park("g1", ParkedState.RUNNING, new_emulator=NEW)
    world.found["g1"] = Recovered.COMMITTED

    def fails(_pending: PendingRecord) -> RunJournal:
        raise PrerequisiteError("disk I/O error", remedy="look at the disk")

    with world.patch.context() as broken:
        broken.setattr(world.journal, "reopen", fails)
        assert world.resume().exit_code == ExitCode.DEGRADED
    assert world.records.uuids() == ["uuid-g1"] and world.journal.pending() == pending

    assert undone(world.resume()) == []
    assert world.records.uuids() == []


def test_a_journal_that_is_damaged_for_good_keeps_no_record(world: World) -> None:
    interrupted(world.journal, guests=())
    world.park("g1", ParkedState.RUNNING, new_emulator=NEW)
    world.found["g1"] = Recovered.COMMITTED
    (world.journal.state / "journal.db").write_bytes(b"x" * 8192)

    recovery = world.resume()

    assert recovery.exit_code == ExitCode.DEGRADED and world.records.uuids() == []
    assert world.journal.pending() is None


def test_a_run_that_the_journal_does_not_know_has_nothing_to_be_undone(world: World) -> None:
    world.park("g1", ParkedState.RUNNING, new_emulator=NEW)
    world.found["g1"] = Recovered.COMMITTED
    pending = resume._of_parked(Settings(state=world.journal.state))
    assert pending is not None

    recovery = Recovery(Settings(state=world.journal.state), world.journal, pending)
    recovery.execute()

    assert recovery.exit_code == ExitCode.OK and world.records.uuids() == []


def test_guests_that_are_back_under_their_old_qemu_have_the_update_undone(world: World) -> None:
    pending = interrupted(world.journal, guests=())
    world.park("g1", new_emulator=NEW)
    recovery = world.resume()
    assert undone(recovery) == ["fetch"] and Kind.COMMITTED not in world.kinds(pending)


def test_what_comes_back_after_the_undo_does_not_make_the_update_stay(world: World) -> None:
    pending = interrupted(world.journal, guests=())
    world.park("g1", new_emulator=NEW)
    found: list[Recovered | Exception] = [*[GuestError("g1", "not yet")] * 2, Recovered.COMMITTED]

    def recover(*args: Any, **kwargs: Any) -> Recovered:
        world.found["g1"] = found.pop(0)
        return world._recover(*args, **kwargs)

    world.patch.setattr(bringing_back, "recover", recover)

    recovery = world.resume()

    assert undone(recovery) == ["fetch"] and recovery.exit_code == ExitCode.OK
    assert Kind.COMMITTED not in world.kinds(pending)


def test_a_guest_that_may_have_been_let_run_and_does_not_answer_has_moved_on(world: World) -> None:
    """Its record says so since this recovery."""
    interrupted(world.journal, guests=())
    world.park("g1", new_emulator=NEW)
    world.park("g2", new_emulator=NEW)
    world.patch.setattr(bringing_back, "PATIENCE_NS", 0)
    came: dict[str, str | None] = {}

    def recover(host: Any, record: ParkedRecord, emulator: str | None, **kwargs: Any) -> Recovered:
        if record.name == "g2":
            came["g2"] = emulator
            return world._recover(host, record, emulator, **kwargs)
        if emulator == record.old_emulator:
            raise GuestError("g1", "not under the old one")
        world.park("g1", ParkedState.RUNNING, new_emulator=emulator)
        raise HypervisorError("gone while it was let run")

    world.patch.setattr(bringing_back, "recover", recover)

    recovery = world.resume()

    assert undone(recovery) == [] and list(recovery._result.problems) == ["g1"]
    assert came == {"g2": NEW}
    assert world.records.uuids() == ["uuid-g1"] and world.journal.pending() is not None


# ---- what is told


def test_a_guest_that_had_ended_is_not_told_as_running_again(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted(world.journal, guests=())
    world.park("g1", ParkedState.LINKED)
    world.park("g2", new_emulator=None)
    world.found["g1"] = Recovered.ENDED

    recovery = world.resume()
    recovery.show()

    told = capsys.readouterr().out
    assert "these guests run again: g2\n" in told and "guest g1: it had ended before" in told
    assert recovery.exit_code == ExitCode.OK
    assert recovery.report is not None
    assert "guest g1: it had ended before it was parked" in recovery.report.reasons


def test_a_stored_report_names_the_guests_that_were_parked_too(world: World) -> None:
    pending = interrupted(world.journal, guests=())
    run = world.journal.reopen(pending)
    run.save_report(report(pending.run_id))
    run.close()
    world.park("g1", new_emulator=None)

    recovery = world.resume()

    assert recovery.report is not None
    assert recovery.report.reasons == ["`hostupdate resume` let run: g1"]


def test_a_rehearsal_that_cannot_be_ended_is_told_of_its_guest_alone(world: World) -> None:
    interrupted(world.journal, guests=(), rehearsing="u")  # as the plan has "web"
    world.park("g1", new_emulator=None)
    world.rehearsal_fails = HypervisorError("no monitor")

    recovery = world.resume()

    assert recovery._result.problems == {"web": "its rehearsal may have stopped it: no monitor"}
    assert recovery._told == ["g1"] and world.records.uuids() == []
    left = world.journal.pending()
    assert left is not None and left.rehearsing == "u"
    world.rehearsal_fails = None

    again = world.resume()

    assert again.exit_code == ExitCode.OK and world.rehearsed == ["u"]
    assert world.journal.pending() is None


def test_a_rehearsed_guest_that_no_plan_names_is_told_by_its_uuid(world: World) -> None:
    interrupted(world.journal, guests=(), rehearsing="another")
    world.away = True
    problems = world.resume()._result.problems
    assert problems == {"another": "its rehearsal may have stopped it: away"}


# ---- clocks


class Clocks:
    """Fits GuestClocks. ``asked``: those whose clocks were to be set, each time."""

    def __init__(self, uuids: list[str], *_: object) -> None:
        self.uuids = uuids
        self.asked: list[list[str]] = []
        self.concluded = 0
        self.host = None

    def recall(self, _record: PendingRecord) -> None:
        pass

    def correct(self, limit_ns: int | None = None, skip: Any = ()) -> list[tuple[str, bool]]:
        self.asked.append([uuid for uuid in self.uuids if uuid not in skip])
        return []

    def conclude_host(self) -> str:
        self.concluded += 1
        return ""


def test_a_guest_that_comes_back_after_the_undo_has_its_clock_set_too(world: World) -> None:
    made: list[Clocks] = []
    world.patch.setattr(
        late_clocks, "GuestClocks", lambda *args: made.append(Clocks(*args)) or made[-1]
    )
    world.patch.setattr(late_clocks, "clock_hands", lambda *_: None)
    interrupted(world.journal, guests=(), boot_id=processes.boot_id())
    world.park("web", uuid="u", new_emulator=None)
    world.park("other", new_emulator=None)  # which the plan does not have
    world.found["web"] = GuestError("web", "not yet")
    found: list[Recovered | Exception] = [GuestError("web", "not yet"), Recovered.UNPARKED]

    def recover(host: Any, record: ParkedRecord, *args: Any, **kwargs: Any) -> Recovered:
        if record.name == "web":
            world.found["web"] = found.pop(0)
        return world._recover(host, record, *args, **kwargs)

    world.patch.setattr(bringing_back, "recover", recover)

    recovery = world.resume()

    assert recovery._told == ["other", "web"]
    (clocks,) = made
    assert (clocks.asked, clocks.concluded) == ([["u"]], 1)


def test_each_clock_is_set_once_and_only_of_guests_that_run(world: World) -> None:
    made: list[Clocks] = []
    world.patch.setattr(
        late_clocks, "GuestClocks", lambda *args: made.append(Clocks(*args)) or made[-1]
    )
    world.patch.setattr(late_clocks, "clock_hands", lambda *_: None)
    pending = interrupted(world.journal, guests=(), boot_id=processes.boot_id())
    told = report(pending.run_id)
    told.guests = [
        msgspec.structs.replace(told.guests[0], name=name, uuid=f"uuid-{name}") for name in "abc"
    ]
    late = late_clocks.LateClocks(pending, Libvirt("x", 1), lambda: Settings().load_config())
    world.patch.setattr(late, "_libvirt", world)
    world.away = True
    late.correct(told, ["a"])
    late.correct(told, ["a"])
    assert told.reasons == ["guests' clocks are not verified: away"] and not made
    world.away = False
    for names in ([], ["a"], ["a"], ["a", "c"]):
        late.correct(told, names)
    assert made[0].asked == [["uuid-a"], ["uuid-c"]]


# ---- records that cannot be read


def damage(world: World, uuid: str) -> Path:
    path = world.records.path(uuid)
    path.parent.mkdir(exist_ok=True)
    path.write_text("{")
    return path


def test_a_lost_pending_record_is_made_up_from_any_parked_one(world: World) -> None:
    settings = Settings(state=world.journal.state)
    assert resume._of_parked(settings) is None
    damage(world, "a-broken")
    with pytest.raises(InputError, match="a-broken"):
        resume._of_parked(settings)
    world.park("g1")
    found = resume._of_parked(settings)
    assert found is not None and found.run_id == RECORD.run_id


def test_what_cannot_be_read_keeps_nobody_from_giving_up_another(world: World) -> None:
    given_up: list[str] = []
    world.patch.setattr(
        bringing_back, "give_up", lambda _s, _c, _h, record: given_up.append(record.name)
    )
    world.patch.setattr(resume, "Hypervisor", lambda *_, **__: SimpleNamespace(close=lambda: 0))
    settings = Settings(state=world.journal.state)
    broken = damage(world, "a-broken")
    world.park("g1")

    resume._discard(settings, "g1")

    assert given_up == ["g1"]
    with pytest.raises(InputError, match="a-broken") as caught:
        resume._discard(settings, "g2")
    assert str(world.records.image("a-broken")) not in caught.value.remedy
    with pytest.raises(InputError, match="damaged") as caught:
        resume._discard(settings, "a-broken")
    assert f"rm {broken} {world.records.image('a-broken')}" in caught.value.remedy
    broken.unlink()
    with pytest.raises(InputError, match="no guest 'g2' is parked"):
        resume._discard(settings, "g2")


def test_to_give_up_a_guest_comes_before_what_else_cannot_be_read(world: World) -> None:
    given_up: list[str] = []
    world.patch.setattr(resume, "_discard", lambda _settings, name: given_up.append(name))
    world.patch.setattr(resume, "require_root", lambda: None)
    lock = SimpleNamespace(release=lambda: None)
    world.patch.setattr(Journal, "lock", lambda *_, **__: lock)
    (world.journal.state / "pending.json").write_text("{")
    argv = ["--state", str(world.journal.state)]
    for words, done in ((argv, []), ([*argv, "--discard", "g1"], ["g1"])):
        with pytest.raises(InputError, match=r"pending\.json"):
            resume.command.main(words, standalone_mode=False)
        assert given_up == done


def test_a_connection_whose_daemon_has_gone_is_waited_for(world: World) -> None:
    left = [HypervisorError("gone"), HypervisorError("still away")]

    def revive() -> None:
        if left:
            raise left.pop()

    libvirt = Libvirt("x", 1)
    world.patch.setattr(libvirt, "_hypervisor", SimpleNamespace(revive=revive))
    with pytest.raises(HypervisorError, match="still away"):
        libvirt.wait(0)
    assert libvirt.wait(10_000_000_000) and not left
