"""Which QEMU a guest comes back under when its handover was interrupted."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from hostupdate.cli import bringing_back
from hostupdate.cli.handing_over import mark_of
from hostupdate.config import Config, Paths
from hostupdate.errors import GuestError
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
        self, _host: Any, record: ParkedRecord, emulator: str | None, *, stay: bool
    ) -> Any:
        self.tried.append((emulator, stay))
        if emulator not in self.takes:
            raise GuestError(record.name, f"not under {emulator}")
        self.came = record
        return self.found

    def recovered(self, *, committed: bool = False, **changes: Any) -> bool:
        record = msgspec.structs.replace(
            RECORD,
            **{"state": ParkedState.STRIPPED, "old_emulator": str(self.old), "new_emulator": None}
            | changes,
        )
        host: Any = SimpleNamespace(records=SimpleNamespace(read=lambda _uuid: record))
        return bringing_back._recovered(host, self.config, record, committed)

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
