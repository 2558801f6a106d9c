"""Threads of a process that cannot run."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import NamedTuple

from hostupdate.durations import format_duration
from hostupdate.host.processes import is_stopped

_POLL_S = 0.02
_NAMED = 3


class _Sleeper(NamedTuple):
    """A thread in an uninterruptible sleep; in the same one while ``switches`` does not change."""

    tid: int
    name: str
    switches: str


def stuck(pid: int, patience_ns: int) -> str:
    """Why threads of a process cannot run; empty where all can, or where it is gone.

    Stopped by a signal, or in one and the same uninterruptible sleep for all of ``patience_ns``:
    that one I/O is under way is usual, that it does not end is not. Where no thread sleeps like
    this the answer comes at once.
    """
    deadline_ns = time.monotonic_ns() + patience_ns
    if is_stopped(pid):
        return f"process {pid} is stopped by a signal; `kill -CONT {pid}` lets it run"
    asleep = _sleepers(pid)
    while asleep and time.monotonic_ns() < deadline_ns:
        time.sleep(_POLL_S)
        asleep &= _sleepers(pid)
    if not asleep:
        return ""
    named = [f"{each.name} ({each.tid}{_where(pid, each.tid)})" for each in sorted(asleep)]
    more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
    what = ", ".join(named[:_NAMED]) + more
    return f"no way to wake for {format_duration(patience_ns)}, as with dead storage: {what}"


def _sleepers(pid: int) -> set[_Sleeper]:
    found = set()
    with suppress(FileNotFoundError, ProcessLookupError):
        for tid in os.listdir(f"/proc/{pid}/task"):
            with suppress(FileNotFoundError, ProcessLookupError):
                status = _status(pid, tid)
                if status["State"].startswith("D"):
                    switches = status["voluntary_ctxt_switches"]
                    found.add(_Sleeper(int(tid), status["Name"], switches))
    return found


def _status(pid: int, tid: str) -> dict[str, str]:
    """The fields of proc_pid_status(5)."""
    with open(f"/proc/{pid}/task/{tid}/status", encoding="utf-8", errors="replace") as status:
        fields = (line.partition(":") for line in status)
        return {name: value.strip() for name, _, value in fields}


def _where(pid: int, tid: int) -> str:
    """The kernel function that it sleeps in, where the kernel tells (proc_pid_wchan(5))."""
    with suppress(OSError), open(f"/proc/{pid}/task/{tid}/wchan", encoding="ascii") as wchan:
        symbol = wchan.read().strip()
        return f", in {symbol}" if symbol.strip("0") else ""
    return ""
