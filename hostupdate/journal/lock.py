"""The host's lock: one run at a time, whatever its state directory."""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path

import msgspec

from hostupdate.errors import BusyError, PrerequisiteError, RefusedError
from hostupdate.journal.pending import PENDING

#: On a file system that ends with the boot, as the kernel's lock does.
RUNTIME = Path("/run/hostupdate")
#: How long a lock may be held by somebody who only looks whether it is (:func:`holder`).
PROBE_NS = 200_000_000


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """Who holds the host. ``since``: local time, for people."""

    run_id: str
    pid: int
    since: str
    state: str

    def __str__(self) -> str:
        return f"run {self.run_id}, pid {self.pid}, since {self.since}, state {self.state}"


class HostLock:
    """Held from construction to :meth:`release`; the kernel drops it when its process dies.

    BusyError names the run that still holds the host after ``wait_ns``; RefusedError one that died
    and was not recovered, where its state directory is another than ``state``.
    """

    def __init__(self, runtime: Path, run_id: str, state: Path, wait_ns: int = PROBE_NS) -> None:
        path = runtime / "lock"
        own = Holder(
            run_id=run_id,
            pid=os.getpid(),
            since=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
            state=str(state),
        )
        try:
            runtime.mkdir(mode=0o700, parents=True, exist_ok=True)
            refuse_writable_by_others(runtime)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._fd = os.open(path, flags, 0o600)
        except OSError as error:
            raise _unusable(path, error) from error
        try:
            self._take(wait_ns)
            self._refuse_interrupted(state)
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, msgspec.json.encode(own), 0)
        except OSError as error:
            os.close(self._fd)
            raise _unusable(path, error) from error
        except (BusyError, RefusedError):
            os.close(self._fd)
            raise

    def _refuse_interrupted(self, state: Path) -> None:
        """The one before may have died with guests paused: whoever looks into another directory
        would not know, and take them for paused by their owners."""
        before = _read(self._fd)
        if before is None or before.state == str(state):
            return
        if (Path(before.state) / PENDING).exists():
            raise RefusedError(
                [f"{before}, was interrupted: guests may be paused"],
                remedy=f"run `hostupdate --state {before.state} resume` first",
            )

    def _take(self, wait_ns: int) -> None:
        deadline_ns = time.monotonic_ns() + wait_ns
        while True:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError as error:
                if time.monotonic_ns() >= deadline_ns:
                    raise BusyError(str(_read(self._fd) or "another process")) from error
            time.sleep(0.01)

    def release(self) -> None:
        """Lets the next run in."""
        os.close(self._fd)


def holder(runtime: Path) -> str | None:
    """Who holds the host now, in words; None where nobody does."""
    path = runtime / "lock"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unusable(path, error) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return str(_read(fd) or "another process")
    else:
        return None
    finally:
        os.close(fd)


def refuse_writable_by_others(directory: Path) -> None:
    """PrerequisiteError for a directory in which others could put what root then acts on."""
    status = directory.stat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise PrerequisiteError(
            f"directory {directory} can be written by others, who could have anything run as root",
            remedy=f"chown root {directory}; chmod go-w {directory}; or choose another",
        )


def _read(fd: int) -> Holder | None:
    with suppress(msgspec.DecodeError):
        return msgspec.json.decode(os.pread(fd, 4096, 0), type=Holder)
    return None


def _unusable(path: Path, error: OSError) -> PrerequisiteError:
    return PrerequisiteError(
        f"{path} cannot be used: {error.strerror}", remedy="run as root, on a writable /run"
    )
