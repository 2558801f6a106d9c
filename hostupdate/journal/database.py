"""The journal's SQLite file: opened, checked, brought up to date.

WAL with synchronous=FULL: what was written is on disk when the call returns, and a reader never
waits for a run. A file that is damaged, foreign, or newer than this program is refused by name;
nothing is ever repaired behind the operator's back.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from hostupdate.errors import InputError, JournalError, PrerequisiteError

#: In the file's header (sqlite.org/fileformat2.html, 1.3.9), so that no other database is taken
#: for a journal: "hupd".
APPLICATION_ID = 0x68757064
#: What a run may write before it has to ask the disk for more.
ROOM_BYTES = 1 << 20
_BUSY_S = 5.0

#: Entry N brings version N to N + 1. Released entries are never changed.
MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE run (
        id TEXT PRIMARY KEY,
        update_name TEXT NOT NULL,
        boot_id TEXT NOT NULL,
        began_realtime_ns INTEGER NOT NULL,
        ended_realtime_ns INTEGER,
        plan BLOB NOT NULL,
        report BLOB
    ) STRICT;
    CREATE TABLE record (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        run_id TEXT NOT NULL REFERENCES run (id),
        kind TEXT NOT NULL,
        action INTEGER,
        problem TEXT NOT NULL DEFAULT '',
        monotonic_ns INTEGER NOT NULL,
        realtime_ns INTEGER NOT NULL
    ) STRICT;
    CREATE INDEX record_run ON record (run_id);
    CREATE TABLE guest (
        run_id TEXT NOT NULL REFERENCES run (id),
        uuid TEXT NOT NULL,
        name TEXT NOT NULL,
        state_before TEXT NOT NULL,
        state_after TEXT,
        PRIMARY KEY (run_id, uuid)
    ) STRICT;
    CREATE TABLE event (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        run_id TEXT REFERENCES run (id),
        kind TEXT NOT NULL,
        detail TEXT NOT NULL,
        realtime_ns INTEGER NOT NULL
    ) STRICT;
    """,
)


class Database:
    """One connection. ``write`` False: only looks; the file must exist then."""

    def __init__(self, path: Path, *, write: bool, migrations: Sequence[str] = MIGRATIONS) -> None:
        self.path = path
        mode = "rw" if write else "ro"
        with self._refusals():
            if write:  # its log and its index get the same mode
                os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            self._connection = sqlite3.connect(
                f"{path.absolute().as_uri()}?mode={mode}", uri=True, timeout=_BUSY_S,
                isolation_level=None,
            )  # fmt: skip
        try:
            with self._refusals():
                self._check(migrations, write=write)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes the file. Never raises."""
        with suppress(sqlite3.Error):
            self._connection.close()

    def rows(self, query: str, *values: object) -> list[tuple[object, ...]]:
        """What a query finds. InputError where the file is damaged."""
        with self._refusals():
            return self._connection.execute(query, values).fetchall()

    def write(self, statement: str, *values: object) -> None:
        """One statement, one transaction. JournalError where it cannot be kept."""
        with self._failures():
            self._connection.execute(statement, values)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Several :meth:`write`, all or none of them."""
        self.write("BEGIN IMMEDIATE")
        try:
            yield
            self.write("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                self._connection.execute("ROLLBACK")
            raise

    def flush(self, *, each: bool) -> None:
        """``each`` True: every write is flushed to disk. False: it is handed to the kernel, which
        keeps it whatever becomes of this process, until the next one that is flushed.

        Nothing moves the log into the file in between: that, too, would wait for the disk.
        """
        with self._failures():
            self._connection.execute(f"PRAGMA synchronous={'FULL' if each else 'NORMAL'}")
            self._connection.execute(f"PRAGMA wal_autocheckpoint={1000 if each else 0}")

    def reserve(self) -> None:
        """Has the disk give the room that a run needs, in the file and in its log, and keeps it.

        JournalError where it does not.
        """
        with self._failures():
            execute = self._connection.execute
            execute("CREATE TABLE IF NOT EXISTS room (bytes BLOB)")
            execute("INSERT INTO room VALUES (zeroblob(?))", (ROOM_BYTES,))
            execute("DELETE FROM room")  # its pages stay in the file, for others
            execute("PRAGMA wal_checkpoint(PASSIVE)")  # the log begins anew, in its old length

    def _check(self, migrations: Sequence[str], *, write: bool) -> None:
        execute = self._connection.execute
        application_id = self._number("application_id")
        version = self._number("user_version")
        fresh = not execute("SELECT 1 FROM sqlite_schema LIMIT 1").fetchall()
        if not fresh and application_id != APPLICATION_ID:
            raise self._input("application_id", f"{application_id:#x}: not a journal of hostupdate")
        if version > len(migrations):
            raise InputError(
                str(self.path), "user_version",
                f"version {version} is newer than this program knows ({len(migrations)})",
                remedy="use the version of hostupdate that wrote it",
            )  # fmt: skip
        if fresh and not write:
            raise self._input("", "empty")
        found = execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise self._input("", f"damaged: {found}")
        if not write:
            return
        execute("PRAGMA foreign_keys=ON")
        if execute("PRAGMA journal_mode=WAL").fetchone()[0] != "wal":
            raise self._input("journal_mode", "the file system does not support WAL")
        self.flush(each=True)
        for number in range(version, len(migrations)):
            self._connection.executescript(
                f"BEGIN IMMEDIATE; {migrations[number]}; PRAGMA user_version={number + 1};"
                f"PRAGMA application_id={APPLICATION_ID}; COMMIT;"
            )

    def _number(self, pragma: str) -> int:
        return int(self._connection.execute(f"PRAGMA {pragma}").fetchone()[0])

    def _input(self, field: str, problem: str) -> InputError:
        return InputError(str(self.path), field, problem, remedy=_AWAY.format(self.path))

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """While nothing depends on the journal yet."""
        try:
            yield
        except (OSError, sqlite3.OperationalError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise PrerequisiteError(
                f"journal {self.path} cannot be used: {why}",
                remedy="run as root, make room, make the file system writable, or choose another "
                "directory with --state",
            ) from error
        except sqlite3.DatabaseError as error:
            raise self._input("", f"damaged: {error}") from error

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise JournalError(str(self.path), str(error)) from error


_AWAY = "check the guests with virsh list, then move the file away: mv {0} {0}.damaged"
