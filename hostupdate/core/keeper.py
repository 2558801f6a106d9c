"""The dead-man process: lets all guests run when the orchestrator dies or the deadline passes.

It is forked by the C core and runs no Python. What it did and when is in its record, a text file
that :func:`read_record` reads. Keep that file where no update can make it hang (a tmpfs): the
keeper writes to it only while it is not armed, or after the guests run, but before the recovery.
"""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Self

from hostupdate.core._boundary import check, ffi, lib
from hostupdate.core.freezer import GuestSet

__all__ = (
    "Armed",
    "Fired",
    "Keeper",
    "KeeperRecord",
    "Reason",
    "RecoveryRun",
    "Thawed",
    "read_record",
)

_SECOND_NS = 1_000_000_000
_FILE_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC


class Keeper:
    """A running keeper. Made by :meth:`start`; ended by :meth:`stop`.

    As a context manager it stops the keeper at the end of the block, unless it is still armed or
    has fired unanswered: then guests may be frozen and nobody else knows, so it is left to do its
    duty.
    """

    __slots__ = ("_armed", "_keeper", "lock_errno", "locked_bytes", "pid")

    def __init__(self) -> None:
        self._armed = False
        self._keeper = ffi.new("struct hu_keeper *")
        self.pid = 0
        #: Guest RAM that the keeper has locked in memory.
        self.locked_bytes = 0
        #: 0, or why the first range that could not be locked was not.
        self.lock_errno = 0

    @classmethod
    def start(
        cls,
        guests: GuestSet,
        *,
        record: Path,
        recovery_log: Path,
        recovery_argv: Sequence[str | os.PathLike[str]] = (),
        recovery_env: Mapping[str, str] | None = None,
        ram_fds: Sequence[int] = (),
        cgroup_procs: Path | None = None,
        grace_ns: int = 2 * _SECOND_NS,
        settle_ns: int = _SECOND_NS // 2,
        recovery_ns: int = 120 * _SECOND_NS,
        timeout_ns: int = 10 * _SECOND_NS,
    ) -> Self:
        """Forks the keeper, not armed, and waits until it has locked guest RAM and is ready.

        ``recovery_argv`` (absolute program first; empty: none) runs with ``recovery_env`` (None:
        today's) after the keeper has let the guests run and the orchestrator is dead; the keeper
        waits ``recovery_ns`` for it, then leaves it running. ``grace_ns`` is how long this process
        may take to :meth:`disarm` after a firing before it is killed, ``settle_ns`` how long the
        keeper waits to see guests running. Raises OSError where a file cannot be opened, CoreError
        otherwise: ETIMEDOUT (not ready in time), EPIPE (it died), or what a system call said.
        Nothing is left of it then.
        """
        self = cls()
        argv = [ffi.new("char[]", os.fsencode(word)) for word in recovery_argv]
        env = [
            ffi.new("char[]", os.fsencode(f"{name}={value}"))
            for name, value in (os.environ if recovery_env is None else recovery_env).items()
        ]
        config = ffi.new("struct hu_keeper_config *")
        # ffi.new owns its memory: everything that the struct points to lives until start returns.
        ram = ffi.new("int32_t[]", list(ram_fds))
        argv_array = ffi.new("char *[]", [*argv, ffi.NULL])
        env_array = ffi.new("char *[]", [*env, ffi.NULL])
        config.guests = guests._guests
        config.guest_count = len(guests)
        config.ram_fds = ram
        config.ram_count = len(ram_fds)
        config.grace_ns = grace_ns
        config.settle_ns = settle_ns
        config.recovery_ns = recovery_ns
        config.recovery_argv = argv_array if argv else ffi.NULL
        config.recovery_envp = env_array
        descriptors: list[int] = []

        def opened(path: Path, flags: int) -> int:
            descriptors.append(os.open(path, flags, 0o600))
            return descriptors[-1]

        try:
            config.record_fd = opened(record, _FILE_FLAGS)
            config.recovery_log_fd = opened(recovery_log, _FILE_FLAGS)
            config.cgroup_procs_fd = (
                -1 if cgroup_procs is None else opened(cgroup_procs, os.O_WRONLY | os.O_CLOEXEC)
            )
            check("hu_keeper_start", lib.hu_keeper_start(config, timeout_ns, self._keeper))
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        self.pid = self._keeper.pid
        self.locked_bytes = self._keeper.locked_bytes
        self.lock_errno = -self._keeper.lock_error
        return self

    @property
    def armed(self) -> bool:
        """Whether it was armed and not disarmed since. A keeper that fired is still armed here."""
        return self._armed

    def fileno(self) -> int:
        """Becomes readable when the keeper has fired or died."""
        return int(self._keeper.control_fd)

    def alarmed(self) -> bool:
        """Whether the keeper has fired or died, without waiting."""
        poll = select.poll()
        poll.register(self.fileno(), select.POLLIN)
        return bool(poll.poll(0))

    def arm(self, deadline_monotonic_ns: int, *, timeout_ns: int = _SECOND_NS) -> None:
        """From now on all guests are let run when the deadline passes or this process dies.

        Raises CoreError; the keeper is not armed then, pause nothing: EPIPE (it is dead), ETIMEDOUT
        (it did not answer), EALREADY (it is armed already, as before, or has fired).
        """
        check(
            "hu_keeper_arm",
            lib.hu_keeper_arm(self._keeper.control_fd, deadline_monotonic_ns, timeout_ns),
        )
        self._armed = True

    def disarm(self, *, timeout_ns: int = _SECOND_NS) -> bool:
        """Disarms; whether it had fired. If so all guests were let run, and recovery is now ours.

        Raises CoreError: EPIPE (it is dead), ETIMEDOUT (it did not answer and may be armed).
        """
        fired = check("hu_keeper_disarm", lib.hu_keeper_disarm(self._keeper.control_fd, timeout_ns))
        self._armed = False
        return fired == 1

    def stop(self, *, timeout_ns: int = _SECOND_NS) -> None:
        """Ends the keeper, reaps it and closes what belongs to it. Nothing to do: no error.

        Raises CoreError: EBUSY (it is armed or has fired unanswered; it goes on), ETIMEDOUT (it did
        not end; it goes on), EPIPE (it was dead before; it is reaped and closed).
        """
        if self._keeper.pid == 0:
            return
        result = lib.hu_keeper_stop(self._keeper, timeout_ns)
        if result in (0, -errno.EPIPE):
            os.close(self._keeper.control_fd)
            os.close(self._keeper.pidfd)
            self._keeper.pid = 0
            self._keeper.control_fd = self._keeper.pidfd = -1
            self._armed = False
        check("hu_keeper_stop", result)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._armed:
            self.stop()


class Reason(Enum):
    """Why a keeper fired."""

    DEADLINE = "deadline"
    ORCHESTRATOR_GONE = "orchestrator-gone"


@dataclass(frozen=True, slots=True, kw_only=True)
class Armed:
    """The keeper was armed."""

    monotonic_ns: int
    deadline_monotonic_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fired:
    """The keeper decided to let the guests run."""

    monotonic_ns: int
    reason: Reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Thawed:
    """A guest was told to run (``requested``) and seen running, or not (None).

    ``error`` is an errno: 0, ETIMEDOUT where it was not seen running in time, or why it could not
    be told. A guest that is gone has None and 0.
    """

    guest: int
    requested_monotonic_ns: int
    monotonic_ns: int | None
    error: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryRun:
    """The recovery command, as far as the record goes.

    ``status`` is its exit status, minus the signal that ended it, or None: it was still running.
    ``left_monotonic_ns`` tells when the keeper gave up waiting for it.
    """

    pid: int
    started_monotonic_ns: int
    ended_monotonic_ns: int | None = None
    status: int | None = None
    left_monotonic_ns: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class KeeperRecord:
    """What a keeper did and when (CLOCK_MONOTONIC of the boot that it ran in).

    ``thaws`` holds one entry for each guest and firing, and one more for each where guests were
    found stopped again after the orchestrator's end. None or empty: it did not come to it.
    """

    pid: int
    ready_monotonic_ns: int
    locked_bytes: int
    lock_errno: int
    armed: tuple[Armed, ...] = ()
    disarmed_monotonic_ns: tuple[int, ...] = ()
    fired: tuple[Fired, ...] = ()
    thaws: tuple[Thawed, ...] = ()
    orchestrator_killed_monotonic_ns: int | None = None
    recovery: RecoveryRun | None = None
    quit_monotonic_ns: int | None = None

    @property
    def answered(self) -> bool:
        """Whether the last firing, if any, is over: the orchestrator took over, or recovery ran
        and succeeded.
        """
        if not self.fired:
            return True
        if self.recovery is not None and self.recovery.status == 0:
            return True
        disarmed = self.disarmed_monotonic_ns
        return bool(disarmed) and disarmed[-1] > self.fired[-1].monotonic_ns


def read_record(path: Path) -> KeeperRecord | None:
    """Reads the last keeper's record in the file; None where there is none or the file is absent.

    A last line that is cut short (power was lost) is left out, and so is any line that is not
    understood. Raises OSError where the file cannot be read.
    """
    try:
        text = path.read_text("ascii", errors="replace")
    except FileNotFoundError:
        return None
    record: KeeperRecord | None = None
    for line in text[: text.rfind("\n") + 1].splitlines():
        try:
            event, time, *pairs = line.split()
            fields = dict(pair.split("=", 1) for pair in pairs)
            record = _add(record, event, int(time), fields)
        except (ValueError, KeyError):
            continue
    return record


def _add(
    record: KeeperRecord | None, event: str, time: int, fields: Mapping[str, str]
) -> KeeperRecord | None:
    if event == "ready":
        return KeeperRecord(
            pid=int(fields["pid"]),
            ready_monotonic_ns=time,
            locked_bytes=int(fields["locked_bytes"]),
            lock_errno=-int(fields["lock_error"]),
        )
    if record is None:
        return None
    match event:
        case "armed":
            armed = Armed(monotonic_ns=time, deadline_monotonic_ns=int(fields["deadline"]))
            return replace(record, armed=(*record.armed, armed))
        case "disarmed":
            return replace(record, disarmed_monotonic_ns=(*record.disarmed_monotonic_ns, time))
        case "fired":
            fired = Fired(monotonic_ns=time, reason=Reason(fields["reason"]))
            return replace(record, fired=(*record.fired, fired))
        case "thawed":
            thawed = Thawed(
                guest=int(fields["guest"]),
                requested_monotonic_ns=int(fields["requested"]),
                monotonic_ns=time or None,
                error=-int(fields["error"]),
            )
            return replace(record, thaws=(*record.thaws, thawed))
        case "orchestrator-killed":
            return replace(record, orchestrator_killed_monotonic_ns=time)
        case "recovery-started":
            run = RecoveryRun(pid=int(fields["pid"]), started_monotonic_ns=time)
            return replace(record, recovery=run)
        case "recovery-ended" if record.recovery is not None:
            run = replace(record.recovery, ended_monotonic_ns=time, status=int(fields["status"]))
            return replace(record, recovery=run)
        case "recovery-left" if record.recovery is not None:
            return replace(record, recovery=replace(record.recovery, left_monotonic_ns=time))
        case "quit":
            return replace(record, quit_monotonic_ns=time)
    return record
