"""Which QEMU a guest comes back under when its handover was interrupted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from hostupdate.cli import bringing_back
from hostupdate.cli.handing_over import mark_of
from hostupdate.cli.settings import Settings
from hostupdate.config import Config, Paths
from hostupdate.errors import DeadlineError, GuestError, HypervisorError, JournalError
from hostupdate.guests import Hypervisor
from hostupdate.handover.records import ParkedRecords
from hostupdate.handover.recovery import Recovered
from hostupdate.parked import ParkedRecord, ParkedState
from tests.unit.test_parked import RECORD

NEW = "/opt/qemu-11/qemu"


class Bench:
    """A guest's QEMU at ``old``, kept as ``kept``. ``tried``: what it was to come back under, and
    whether it was to stay where it was paused; ``takes``: those that take it."""

    def __init__(self, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.old = base / "bin/qemu-system-x86_64"
        self.old.parent.mkdir()
        self.old.write_text("old")
        build = base / f"builds/{self.old.name}-{mark_of(str(self.old))}"
        build.mkdir(parents=True)
        (build / "origin").write_text(str(self.old))
        self.kept = build / "qemu"
        self.kept.touch()
        self.config = Config(paths=Paths(builds=str(build.parent)))
        self.tried: list[tuple[str | None, bool]] = []
        self.takes: set[str | None] = set()
        self.found = Recovered.UNPARKED
        self.came: ParkedRecord | None = None
        monkeypatch.setattr(bringing_back, "_recover", self._recover)

    def _recover(
        self,
        _host: Any,
        record: ParkedRecord,
        emulator: str | None,
        *,
        stay: bool,
        ran: Callable[[ParkedRecord], None],
    ) -> Any:
        self.tried.append((emulator, stay))
        if emulator not in self.takes:
            raise GuestError(record.name, f"not under {emulator}")
        self.came = record
        if self.found is Recovered.UNPARKED:
            changes = {"state": ParkedState.RUNNING, "new_emulator": emulator}
            record = msgspec.structs.replace(record, **changes)
        if self.found in (Recovered.UNPARKED, Recovered.COMMITTED):
            ran(record)
        return self.found

    def recovered(self, *, committed: bool = False, **changes: Any) -> bool:
        """Whether it was told that the guest has moved on."""
        record = msgspec.structs.replace(
            RECORD,
            **{"state": ParkedState.STRIPPED, "old_emulator": str(self.old), "new_emulator": None}
            | changes,
        )
        host: Any = SimpleNamespace(records=SimpleNamespace(read=lambda _uuid: record))
        told: list[bool] = []
        found = bringing_back._recovered(
            host, self.config, record, committed, lambda: told.append(True)
        )
        assert found is self.found
        return told == [True]

    def replace(self) -> None:
        """As a package does it."""
        self.old.unlink()
        self.old.write_text("a new one")


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


def test_where_nothing_has_changed_it_stays(bench: Bench) -> None:
    bench.takes = {str(bench.old)}
    assert bench.recovered() is False
    assert bench.tried == [(str(bench.old), True)]


@pytest.mark.parametrize("gone", [False, True])
def test_a_replaced_qemu_is_not_the_one_that_it_ran_under(bench: Bench, gone: bool) -> None:
    bench.replace()
    if gone:
        bench.old.unlink()
    bench.takes = {str(bench.kept), None}
    assert bench.recovered() is False
    assert bench.tried == [(str(bench.kept), False)]
    assert bench.came is not None and bench.came.old_emulator == str(bench.kept)


def test_what_only_the_new_one_takes_has_moved_on(bench: Bench) -> None:
    bench.replace()
    bench.takes = {None}
    assert bench.recovered() is True
    assert bench.tried == [(str(bench.kept), False), (None, True)]


def test_where_the_update_is_in_place_the_new_one_comes_first(bench: Bench) -> None:
    bench.replace()
    bench.takes = {None, str(bench.kept)}
    assert bench.recovered(committed=True) is True
    assert bench.tried == [(None, True)]


def test_another_program_is_the_last_resort(bench: Bench) -> None:
    with pytest.raises(GuestError, match="not under"):
        bench.recovered(new_emulator=NEW)
    assert bench.tried == [(str(bench.old), False), (str(bench.kept), False), (NEW, True)]


@pytest.mark.parametrize("state", [ParkedState.RUNNING, ParkedState.SAVED])
def test_a_guest_that_runs_under_the_new_one_has_moved_on(bench: Bench, state: ParkedState) -> None:
    bench.found = Recovered.COMMITTED
    bench.takes = {str(bench.old)}
    assert bench.recovered(state=state, new_emulator=NEW) is True
    bench.tried.clear()
    assert bench.recovered(state=state, new_emulator=str(bench.old)) is False


@pytest.mark.parametrize("found", [Recovered.UNTOUCHED, Recovered.ENDED])
def test_a_guest_that_was_not_parked_has_not_moved_on(bench: Bench, found: Recovered) -> None:
    bench.found = found
    bench.takes = {str(bench.old)}
    assert bench.recovered(state=ParkedState.LINKED, new_emulator=NEW) is False


# ---- all of them


class All:
    """Parked guests ``g0``, ``g1``, .... ``fails``: what recovering one raises, each time the first
    of the list; ``ways``: what it finds else. ``tried``: who was, in this order."""

    def __init__(self, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.records = ParkedRecords(base)
        self.fails: dict[str, list[Exception]] = {}
        self.found: dict[str, Recovered] = {}
        self.tried: list[str] = []
        self.committed: list[bool] = []
        self.moved_on = lambda: None
        self._base = base
        host = SimpleNamespace(records=self.records)
        monkeypatch.setattr(bringing_back, "parking_host", lambda *_: host)
        monkeypatch.setattr(bringing_back, "_recovered", self._recovered)
        monkeypatch.setattr(bringing_back, "_POLL_S", 0.001)

    def park(self, *names: str) -> None:
        for name in names:
            self.records.write(msgspec.structs.replace(RECORD, name=name, uuid=f"uuid-{name}"))

    def _recovered(
        self,
        _host: Any,
        _config: Config,
        record: ParkedRecord,
        committed: bool,
        moved_on: Callable[[], None],
    ) -> Recovered:
        self.tried.append(record.name)
        self.committed.append(committed)
        if self.fails.get(record.name):
            raise self.fails[record.name].pop(0)
        found = self.found.get(record.name, Recovered.UNPARKED)
        if found is Recovered.COMMITTED:
            moved_on()
        self.records.remove(record.uuid)
        return found

    def bring_back(self) -> bringing_back.Back:
        settings, hypervisor = Settings(state=self._base), cast(Hypervisor, None)
        return bringing_back.bring_back(
            settings, Config(), hypervisor, "r1", committed=False, moved_on=lambda: self.moved_on()
        )


@pytest.fixture
def every(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> All:
    return All(tmp_path, monkeypatch)


@pytest.mark.parametrize("error", [HypervisorError("broken pipe"), DeadlineError("state", 1)])
def test_a_libvirtd_that_restarts_keeps_no_guest_parked(every: All, error: Exception) -> None:
    every.park("g0", "g1")
    every.fails = {"g0": [error, error], "g1": [error]}

    back = every.bring_back()

    assert (back.problems, back.running) == ({}, ["g1", "g0"])
    assert every.tried == ["g0", "g1", "g0", "g1", "g0"]


def test_patience_with_libvirt_has_an_end_and_every_guest_is_tried(
    every: All, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bringing_back, "PATIENCE_NS", 0)
    every.park("g0", "g1", "g2")
    away = HypervisorError("away", remedy="start it")
    every.fails = {"g0": [away] * 99, "g1": [away] * 99}

    back = every.bring_back()

    assert back.running == ["g2"] and every.tried.count("g2") == 1
    assert back.problems == dict.fromkeys(("g0", "g1"), "away; start it")
    assert 1 <= every.tried.count("g0") <= 2


def test_a_guest_that_came_back_shows_that_libvirt_answers(
    every: All, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long that one took."""
    monkeypatch.setattr(bringing_back, "PATIENCE_NS", 0)
    every.park("g0", "g1")
    every.fails = {"g0": [HypervisorError("away")]}
    assert every.bring_back().running == ["g1", "g0"]


def test_what_is_the_guests_own_problem_is_not_tried_again(every: All) -> None:
    every.park("g0", "g1")
    every.fails = {"g0": [GuestError("g0", "its RAM is gone")], "g1": [ZeroDivisionError("x")]}

    back = every.bring_back()

    assert every.tried == ["g0", "g1"] and not back.running
    assert back.problems == {
        "g0": "guest g0: its RAM is gone",
        "g1": "internal error: ZeroDivisionError: x",
    }


def test_a_guest_that_had_ended_does_not_run_again(every: All) -> None:
    every.park("g0", "g1")
    every.found = {"g0": Recovered.ENDED}
    back = every.bring_back()
    assert (back.ended, back.running, back.problems) == (["g0"], ["g1"], {})


def test_once_one_has_moved_on_the_others_follow_it_and_the_update_stays(every: All) -> None:
    every.park("g0", "g1")
    every.found = {"g0": Recovered.COMMITTED}
    assert every.bring_back().running == ["g0", "g1"]
    assert every.committed == [False, True]


def test_a_guest_whose_move_cannot_be_noted_runs_and_keeps_its_record(every: All) -> None:
    def fails() -> None:
        raise JournalError("journal.db", "disk full")

    every.park("g0", "g1")
    every.found = {"g0": Recovered.COMMITTED}
    every.moved_on = fails

    back = every.bring_back()

    assert (back.running, back.problems) == (["g0", "g1"], {})
    assert list(back.unnoted) == ["g0"] and "disk full" in back.unnoted["g0"]
    assert every.records.uuids() == ["uuid-g0"]
    assert every.committed == [False, True]


def test_after_libvirts_hook_was_called_anew_its_silence_is_no_problem_of_the_guests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is tried again then."""
    raised: list[Exception] = [GuestError("g1", "parked"), HypervisorError("away")]

    def recover(*_args: Any, **_kwargs: Any) -> Recovered:
        raise raised.pop(0)

    monkeypatch.setattr(bringing_back, "recover", recover)
    monkeypatch.setattr(bringing_back, "have_hook_called", lambda *_: True)
    host: Any = SimpleNamespace(records=SimpleNamespace(read=lambda _uuid: RECORD))
    with pytest.raises(HypervisorError):
        bringing_back._recover(host, RECORD, None, stay=True, ran=lambda _: None)
