"""What a run leaves on disk: the host's lock, the armed record, the reports.

Under the state directory::

    lock              flock'ed by the run that holds the host; its text names the holder
    armed.json        what recovery must know; there from before the first pause to after the last
    runs/ID/plan.json, report.json, keeper.log, recovery.log, steps/NN.log

The keeper writes its record to a disk that may hang: never before the guests run, and the recovery
command that comes after it needs the disk itself.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import time
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import msgspec

from hostupdate.errors import BusyError, InputError, PrerequisiteError
from hostupdate.model import ARMED_SCHEMA, REPORT_SCHEMA, ArmedRecord, Plan, Report

T = TypeVar("T", bound=msgspec.Struct)

#: How long a lock may be held by somebody who only looks whether it is (:meth:`Journal.holder`).
PROBE_NS = 200_000_000


class Journal:
    """The state directory. Created on first use, readable by root alone."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self._armed = state / "armed.json"

    def lock(self, run_id: str, wait_ns: int = PROBE_NS) -> HostLock:
        """Takes the host for a run. BusyError names the run that still has it after ``wait_ns``."""
        self._make(self.state)
        return HostLock(self.state / "lock", run_id, wait_ns)

    def holder(self) -> str | None:
        """Who holds the host now, in words; None where nobody does."""
        self._look()
        try:
            fd = os.open(self.state / "lock", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return os.read(fd, 4096).decode(errors="replace").strip()
        else:
            return None
        finally:
            os.close(fd)

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

    def runs(self) -> list[str]:
        """Ids of all runs that have a report, oldest first."""
        self._look()
        found = (self.state / "runs").glob("*/report.json")
        return sorted(path.parent.name for path in found)

    def save_plan(self, run_id: str, plan: Plan) -> None:
        """Keeps the plan beside the run's report."""
        _write(self.directory(run_id) / "plan.json", plan)

    def save_report(self, report: Report) -> None:
        """Writes the run's report, replacing an earlier one as a whole."""
        _write(self.directory(report.run_id) / "report.json", report)

    def report(self, run_id: str) -> Report:
        """A run's report. InputError where there is none or it cannot be read."""
        return _read(self.directory(run_id) / "report.json", Report, REPORT_SCHEMA)

    def arm(self, record: ArmedRecord) -> None:
        """Writes the armed record and flushes it to disk."""
        _write(self._armed, record)

    def armed(self) -> ArmedRecord | None:
        """The armed record of a run that has not ended; InputError where it cannot be read."""
        self._look()
        if not self._armed.exists():
            return None
        return _read(self._armed, ArmedRecord, ARMED_SCHEMA)

    def disarm(self) -> None:
        """Removes the armed record: every guest runs. Safe to repeat."""
        with suppress(FileNotFoundError):
            self._armed.unlink()
            _sync_directory(self.state)

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
            status = self.state.stat()
            if status.st_uid != os.geteuid() or status.st_mode & 0o022:
                raise PrerequisiteError(
                    f"state directory {self.state} can be written by others, who could have "
                    "anything run as root",
                    remedy=f"chown root {self.state}; chmod go-w {self.state}; or choose another",
                )
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise PrerequisiteError(
                f"state directory {self.state} cannot be used: {error.strerror}",
                remedy="run as root, make room, or choose another with --state",
            ) from error


class HostLock:
    """Held from construction to :meth:`release`; the kernel drops it when its process dies."""

    def __init__(self, path: Path, run_id: str, wait_ns: int) -> None:
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise PrerequisiteError(
                f"{path} cannot be opened: {error.strerror}",
                remedy="run as root, or choose another state directory with --state",
            ) from error
        try:
            self._take(wait_ns)
            started = time.strftime("%Y-%m-%d %H:%M:%S %Z")
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"run {run_id}, pid {os.getpid()}, since {started}\n".encode(), 0)
        except OSError as error:
            os.close(self._fd)
            raise _cannot_write(path, error) from error
        except BusyError:
            os.close(self._fd)
            raise

    def _take(self, wait_ns: int) -> None:
        deadline_ns = time.monotonic_ns() + wait_ns
        while True:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError as error:
                if time.monotonic_ns() >= deadline_ns:
                    holder = os.pread(self._fd, 4096, 0).decode(errors="replace").strip()
                    raise BusyError(holder or "another process") from error
            time.sleep(0.01)

    def release(self) -> None:
        """Lets the next run in."""
        os.close(self._fd)


class _Header(msgspec.Struct):
    schema: str = ""


def _write(path: Path, value: msgspec.Struct) -> None:
    """Whole or not at all, and on disk when it returns."""
    temporary = path.with_suffix(".new")
    data = msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            while data:
                data = data[os.write(fd, data) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        temporary.rename(path)
        _sync_directory(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> PrerequisiteError:
    return PrerequisiteError(
        f"{path} cannot be written: {error.strerror}",
        remedy="make room, or choose another state directory with --state",
    )


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _read(path: Path, kind: type[T], schema: str) -> T:
    try:
        data = path.read_bytes()
        found = msgspec.json.decode(data, type=_Header).schema
        if found in ("", schema):
            return msgspec.json.decode(data, type=kind)
    except OSError as error:
        raise InputError(
            str(path), "", error.strerror or "cannot be read",
            remedy="`hostupdate report --list` shows the runs there are",
        ) from error  # fmt: skip
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(
            str(path), "", f"damaged: {error}",
            remedy="check the guests by hand, then move the file away",
        ) from error  # fmt: skip
    raise InputError(
        str(path), "schema", f"{found!r} is not {schema!r}",
        remedy="read it with the version of hostupdate that wrote it",
    )  # fmt: skip
