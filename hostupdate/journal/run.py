"""One run's part of the journal: what it was about to do, and what it has done."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import msgspec

from hostupdate.errors import InputError, JournalError
from hostupdate.journal.database import Database
from hostupdate.journal.pending import remove_pending, write_pending
from hostupdate.model import GuestState, PendingRecord, Plan, Report
from hostupdate.unwinding import Kind, Record

T = TypeVar("T", bound=msgspec.Struct)


class RunJournal:
    """Open for the time of a run or of its recovery. ``pending`` is the record as it is on disk.

    Every method raises JournalError where the disk does not take what is written, and nothing of
    that call counts then.
    """

    def __init__(self, database: Database, pending_path: Path, pending: PendingRecord) -> None:
        self._database = database
        self._path = pending_path
        self._run_id = pending.run_id
        self.pending = pending

    def close(self) -> None:
        """Closes the database."""
        self._database.close()

    def begin(self, plan: Plan) -> None:
        """The run exists from here on, and may not end unnoticed."""
        self._database.reserve()
        write_pending(self._path, self.pending)
        with self._database.transaction():
            self._database.write(
                "INSERT INTO run (id, update_name, boot_id, began_realtime_ns, plan) "
                "VALUES (?, ?, ?, ?, ?)",
                self._run_id, plan.update, self.pending.boot_id, time.time_ns(),
                msgspec.json.encode(plan),
            )  # fmt: skip
            for guest in plan.guests:
                self._database.write(
                    "INSERT INTO guest (run_id, uuid, name, state_before) VALUES (?, ?, ?, ?)",
                    self._run_id, guest.uuid, guest.name, str(guest.state),
                )  # fmt: skip

    def pend(self, record: PendingRecord) -> None:
        """Replaces what recovery must know. PrerequisiteError: it is what it was."""
        write_pending(self._path, record)
        self.pending = record

    def note(self, kind: Kind, action: int | None = None, problem: str = "") -> None:
        """Adds a record; on disk when this returns, but for the time of :meth:`blackout`."""
        self._database.write(
            "INSERT INTO record (run_id, kind, action, problem, monotonic_ns, realtime_ns) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            self._run_id, str(kind), action, problem, time.monotonic_ns(), time.time_ns(),
        )  # fmt: skip

    def blackout(self, *, on: bool) -> None:
        """While guests are paused nothing waits for the disk: records go to the kernel, which
        keeps them if this process dies. Power that fails may take them, but not the one that is
        written here: that a blackout began."""
        if on:
            self.note(Kind.BLACKOUT)
        self._database.flush(each=not on)

    def event(self, kind: str, detail: Mapping[str, object]) -> None:
        """Adds to the host's history."""
        self._database.write(
            "INSERT INTO event (run_id, kind, detail, realtime_ns) VALUES (?, ?, ?, ?)",
            self._run_id, kind, msgspec.json.encode(detail).decode(), time.time_ns(),
        )  # fmt: skip

    def save_report(self, report: Report) -> None:
        """The run's result, in place of an earlier one; read back, by one who knows nothing of it:
        a file that was damaged while it was open does not show that to those who have it open."""
        with self._database.transaction():
            self._database.write(
                "UPDATE run SET report = ? WHERE id = ?", msgspec.json.encode(report), self._run_id
            )
            for guest in report.guests:
                self._database.write(
                    "UPDATE guest SET state_after = ? WHERE run_id = ? AND uuid = ?",
                    str(guest.state_after or GuestState.UNKNOWN), self._run_id, guest.uuid,
                )  # fmt: skip
        stranger = Database(self._database.path, write=False)
        try:
            kept = stranger.rows("SELECT report FROM run WHERE id = ?", self._run_id)
        finally:
            stranger.close()
        if kept != [(msgspec.json.encode(report),)]:
            raise JournalError(str(self._database.path), "it does not hold what was written")

    def end(self) -> None:
        """Nothing is left to do for anybody: the run has ended. Safe to repeat.

        The record is removed even where the database cannot be written any more.
        """
        try:
            self._database.write(
                "UPDATE run SET ended_realtime_ns = coalesce(ended_realtime_ns, ?) WHERE id = ?",
                time.time_ns(), self._run_id,
            )  # fmt: skip
        finally:
            with suppress(OSError):
                remove_pending(self._path)

    def plan(self) -> Plan | None:
        """The run's plan; None where it never began. InputError where it cannot be read."""
        return self._decode("plan", Plan)

    def report(self) -> Report | None:
        """The run's report; None where it has none. InputError where it cannot be read."""
        return self._decode("report", Report)

    def began_realtime_ns(self) -> int:
        """When it began; now where it never did."""
        rows = self._database.rows("SELECT began_realtime_ns FROM run WHERE id = ?", self._run_id)
        return int(str(rows[0][0])) if rows else time.time_ns()

    def records(self) -> tuple[Record, ...]:
        """All records of the run, in their order."""
        rows = self._database.rows(
            "SELECT kind, action, problem, monotonic_ns FROM record WHERE run_id = ? "
            "ORDER BY number",
            self._run_id,
        )
        try:
            return msgspec.convert(
                [dict(zip(Record.__struct_fields__, row, strict=True)) for row in rows],
                tuple[Record, ...],
            )
        except msgspec.ValidationError as error:
            raise self._damaged("record", error) from error

    def _decode(self, column: str, kind: type[T]) -> T | None:
        rows = self._database.rows(f"SELECT {column} FROM run WHERE id = ?", self._run_id)
        if not rows or rows[0][0] is None:
            return None
        return decode(self._database.path, f"run.{column}", rows[0][0], kind)

    def _damaged(self, field: str, error: Exception) -> InputError:
        return damaged(self._database.path, field, error)


def decode(path: Path, field: str, value: object, kind: type[T]) -> T:
    """A document of the database. InputError where it is not one."""
    try:
        if not isinstance(value, bytes):
            raise TypeError(f"{type(value).__name__} is not a document")
        return msgspec.json.decode(value, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, TypeError) as error:
        raise damaged(path, field, error) from error


def damaged(path: Path, field: str, error: Exception) -> InputError:
    """A part of the database that cannot be read."""
    return InputError(
        str(path), field, f"damaged: {error}",
        remedy=f"check the guests with virsh list, then move it away: mv {path} {path}.damaged",
    )  # fmt: skip
