"""``hostupdate resume`` over real records and a real journal; guests and libvirt are not there."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hostupdate.cli import recovering
from hostupdate.cli.compose import CCore
from hostupdate.cli.recovering import Recovery
from hostupdate.cli.settings import Settings
from hostupdate.config import Config
from hostupdate.errors import HypervisorError, PrerequisiteError
from hostupdate.host import processes
from hostupdate.journal import Journal, RunJournal
from hostupdate.model import Action, ExitCode, PendingRecord, Phase
from hostupdate.rivals import Held
from hostupdate.unwinding import Kind
from tests.unit.test_journal import plan, record, report

STEP = Action(
    phase=Phase.STAGE, kind="step", title="fetch", step="fetch", argv=("true",),
    undo_argv=("true",),
)  # fmt: skip


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    made = Journal(tmp_path / "state", tmp_path / "run")
    made.check()
    return made


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The URIs at which libvirt was asked for; it is away."""
    uris: list[str] = []

    class Away:
        def __init__(self, uri: str, _timeout_ns: int) -> None:
            self._uri = uri

        def __call__(self) -> Any:
            uris.append(self._uri)
            raise HypervisorError("away")

        def wait(self, _patience_ns: int) -> Any:
            return self()

    monkeypatch.setattr(recovering, "Libvirt", Away)
    return uris


def interrupted(
    journal: Journal, undo_argv: tuple[str, ...] = ("true",), **changes: Any
) -> PendingRecord:
    """A run that was killed after the step had begun. Its guest's QEMU is gone."""
    pending = msgspec.structs.replace(
        record(journal.new_run()), **({"cgroup2": None, "held": None, "memory_min": {}} | changes)
    )
    run: RunJournal = journal.begin(
        plan(msgspec.structs.replace(STEP, undo_argv=undo_argv)), pending
    )
    run.note(Kind.INTENT, 0)
    run.close()
    return pending


def recovered(journal: Journal, pending: PendingRecord) -> Recovery:
    recovery = Recovery(Settings(state=journal.state), journal, pending)
    recovery.execute()
    return recovery


def undone(recovery: Recovery) -> Sequence[str]:
    assert recovery.report is not None
    return recovery.report.undone


def test_after_a_boot_no_clock_is_set_by_the_one_before(journal: Journal, asked: list[str]) -> None:
    pending = interrupted(journal, host_offset_ns=1)

    recovery = recovered(journal, pending)

    assert undone(recovery) == ["fetch"] and recovery.exit_code == ExitCode.GUEST_LOST
    assert recovery.report is not None and recovery.report.host_clock is None
    assert not asked, "its guests ended with that boot: whoever has their names now is another"
    assert journal.pending() is None


def test_in_the_same_boot_clocks_are_seen_to(journal: Journal, asked: list[str]) -> None:
    recovery = recovered(journal, interrupted(journal, boot_id=processes.boot_id()))

    assert asked and recovery.report is not None
    assert any("clocks are not verified" in reason for reason in recovery.report.reasons)


def test_a_step_whose_log_cannot_be_opened_keeps_nothing_else_from_being_done(
    journal: Journal, asked: list[str]
) -> None:
    pending = interrupted(journal)
    shutil.rmtree(journal.directory(pending.run_id))

    recovery = recovered(journal, pending)

    assert undone(recovery) == [] and "undo.log" in str(recovery.report)
    assert journal.pending() is None


def test_a_journal_that_cannot_be_read_for_now_is_left_for_another_try(
    journal: Journal, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    let_go: list[Held] = []
    monkeypatch.setattr(
        "hostupdate.cli.recovering.Guard.restore", lambda _guard, held: let_go.append(held)
    )
    pending = interrupted(journal, held=Held(units=("x.service",)))

    def fails(_run: RunJournal) -> None:
        raise PrerequisiteError("disk I/O error", remedy="look at the disk")

    with monkeypatch.context() as broken:
        broken.setattr(RunJournal, "records", fails)
        recovery = recovered(journal, pending)

    assert recovery.exit_code == ExitCode.GUEST_LOST and let_go == [pending.held]
    assert journal.pending() == pending, "its steps are still to be undone"
    assert undone(recovered(journal, pending)) == ["fetch"]


def test_a_newer_versions_journal_is_left_to_that_version(
    journal: Journal, asked: list[str]
) -> None:
    pending = interrupted(journal)
    written = sqlite3.connect(journal.state / "journal.db")
    written.execute("PRAGMA user_version=99")
    written.close()

    recovery = recovered(journal, pending)

    assert any("newer" in warning for warning in recovery._warnings)
    assert journal.pending() == pending, "its steps are still to be undone"
    assert [path.name for path in journal.state.glob("*damaged*")] == []


def test_what_is_resumed_is_told_and_what_is_not_is_not(
    journal: Journal, asked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    pending = interrupted(journal)
    run = journal.reopen(pending)
    run.save_report(report(pending.run_id))
    run.close()

    recovery = recovered(journal, pending)

    assert recovery.report is not None
    assert recovery.report.reasons == ["guest web: its QEMU ended with the host's last boot"]
    nothing = msgspec.structs.replace(pending, guests=())
    recovered(journal, nothing).show()
    assert "nothing left" in capsys.readouterr().out


def test_an_undo_that_failed_is_not_told_as_done(
    journal: Journal, asked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    pending = interrupted(journal, undo_argv=("false",))

    recovered(journal, pending).show()

    told = " ".join(capsys.readouterr().out.split())
    assert "undo of step 'fetch': it ended with status 1" in told
    assert "it was undone, but for the above" in told


def test_the_keepers_recovery_reads_the_runs_configuration(tmp_path: Path) -> None:
    named = Settings(state=tmp_path, config=tmp_path / "own.toml")
    argv = CCore(tmp_path, named, Config(), None)._recovery
    assert argv[argv.index("--config") + 1] == str(named.config) and argv[-1] == "resume"
    assert "--config" not in CCore(tmp_path, Settings(state=tmp_path), Config(), None)._recovery
