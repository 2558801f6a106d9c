"""What a run leaves on disk: the host's lock, the pending record, the database, the logs.

::

    /run/hostupdate/lock   flock'ed by the run that holds the host; its text names the holder
    STATE/pending.json     what recovery must know; there from a run's begin to its end
    STATE/journal.db       runs, their records, guests and reports (SQLite)
    STATE/runs/ID/         keeper.log, recovery.log, steps/NN.log

The keeper writes its record to a disk that may hang: never before the guests run, and the recovery
command that comes after it needs the disk itself.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hostupdate.errors import InputError, PrerequisiteError
from hostupdate.journal.database import Database
from hostupdate.journal.lock import PROBE_NS, RUNTIME, HostLock, holder, refuse_writable_by_others
from hostupdate.journal.pending import PENDING, read_pending, remove_pending
from hostupdate.journal.run import RunJournal, decode
from hostupdate.model import REPORT_SCHEMA, PendingRecord, Plan, Report

__all__ = ("HostLock", "Journal", "RunJournal")


class Journal:
    """The state directory. Created on first use, readable by root alone."""

    def __init__(self, state: Path, runtime: Path = RUNTIME) -> None:
        self.state = state
        self._runtime = runtime
        self._database = state / "journal.db"
        self._pending = state / PENDING

    def lock(self, run_id: str, wait_ns: int = PROBE_NS) -> HostLock:
        """Takes the host for a run. BusyError names the run that still has it after ``wait_ns``,
        RefusedError one in another state directory that was interrupted."""
        return HostLock(self._runtime, run_id, self.state, wait_ns)

    def holder(self) -> str | None:
        """Who holds the host now, in words; None where nobody does."""
        self._look()
        return holder(self._runtime)

    def new_run(self) -> str:
        """Makes a run's directory and returns its id: the time it began and some chance."""
        run_id = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{secrets.token_hex(3)}"
        self._make(self.directory(run_id) / "steps")
        return run_id

    def directory(self, run_id: str) -> Path:
        """The run's directory."""
        return self.state / "runs" / run_id

    def drop_if_empty(self, run_id: str) -> None:
        """Removes the directory of a run that never began."""
        directory = self.directory(run_id)
        with suppress(OSError):
            (directory / "steps").rmdir()
            directory.rmdir()

    def check(self) -> None:
        """Refuses a journal that cannot be written, before anything depends on it."""
        self._make(self.state)
        Database(self._database, write=True).close()

    def begin(self, plan: Plan, pending: PendingRecord) -> RunJournal:
        """Opens the journal for a run that begins now. JournalError, PrerequisiteError: it has not
        begun."""
        journal = RunJournal(Database(self._database, write=True), self._pending, pending)
        try:
            journal.begin(plan)
        except BaseException:
            remove_pending(self._pending)
            journal.close()
            raise
        return journal

    def reopen(self, pending: PendingRecord) -> RunJournal:
        """Opens the journal for the recovery of an interrupted run."""
        return RunJournal(Database(self._database, write=True), self._pending, pending)

    def pending(self) -> PendingRecord | None:
        """The record of a run that has not ended; InputError where it cannot be read."""
        self._look()
        return read_pending(self._pending)

    def drop_pending(self) -> None:
        """Removes that record. For a run whose database cannot be read."""
        remove_pending(self._pending)

    def set_aside(self) -> Path:
        """Moves a damaged database away, so that the next run can have a new one."""
        away = self._database.with_name(f"journal.db.damaged-{time.strftime('%Y%m%dT%H%M%S')}")
        for suffix in ("", "-wal", "-shm"):
            with suppress(FileNotFoundError):
                Path(f"{self._database}{suffix}").rename(f"{away}{suffix}")
        return away

    def runs(self) -> list[str]:
        """Ids of all runs that have a report, oldest first."""
        with self._reading() as database:
            if database is None:
                return []
            rows = database.rows("SELECT id FROM run WHERE report IS NOT NULL ORDER BY rowid")
            return [str(row[0]) for row in rows]

    def report(self, run_id: str) -> Report:
        """A run's report. InputError where there is none or it cannot be read."""
        with self._reading() as database:
            rows = []
            if database is not None:
                rows = database.rows("SELECT report FROM run WHERE id = ?", run_id)
            if not rows or rows[0][0] is None:
                raise InputError(
                    str(self._database), "run.report", f"run {run_id} has none",
                    remedy="`hostupdate report --list` shows the runs there are",
                )  # fmt: skip
            report = decode(self._database, "run.report", rows[0][0], Report)
            if report.schema != REPORT_SCHEMA:
                raise InputError(
                    str(self._database), "schema", f"{report.schema!r} is not {REPORT_SCHEMA!r}",
                    remedy="read it with the version of hostupdate that wrote it",
                )  # fmt: skip
            return report

    @contextmanager
    def _reading(self) -> Iterator[Database | None]:
        self._look()
        if not self._database.exists():
            yield None
            return
        database = Database(self._database, write=False)
        try:
            yield database
        finally:
            database.close()

    def _look(self) -> None:
        """PrerequisiteError where there is a state directory that is not ours to read."""
        try:
            os.scandir(self.state).close()
        except FileNotFoundError:
            pass
        except OSError as error:
            raise PrerequisiteError(
                f"state directory {self.state} cannot be read: {error.strerror}",
                remedy="run as root, or choose another with --state",
            ) from error

    def _make(self, directory: Path) -> None:
        try:
            self.state.mkdir(mode=0o700, parents=True, exist_ok=True)
            refuse_writable_by_others(self.state)
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise PrerequisiteError(
                f"state directory {self.state} cannot be used: {error.strerror}",
                remedy="run as root, make room, or choose another with --state",
            ) from error
