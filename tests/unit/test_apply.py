"""``hostupdate apply`` between the journal's begin and the run's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hostupdate.cli import apply
from hostupdate.cli.settings import Settings
from hostupdate.config import Config
from hostupdate.errors import PrerequisiteError
from hostupdate.journal import Journal
from tests.unit.test_journal import plan


def test_a_run_that_gets_no_hands_leaves_nothing_to_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path / "state", tmp_path / "run")
    journal.check()

    def handless(**_arguments: Any) -> None:
        assert journal.pending() is not None, "the run had begun"
        raise PrerequisiteError("no room for a step's log", remedy="make room")

    monkeypatch.setattr(apply, "make_hands", handless)
    absent: Any = None
    with pytest.raises(PrerequisiteError, match="no room"):
        apply._execute(
            journal.new_run(), plan(), Settings(state=journal.state), Config(), absent, journal,
            absent, absent, absent, [], "off", absent, absent, {}, None,
        )  # fmt: skip

    assert journal.pending() is None and journal.runs() == []
