"""What a lab guest says on its serial console, read from the log file outside.

The witness (``guest.c``) prints ``READY`` once and then ``TICK`` lines for ever. The file is
written by QEMU while it is read here: the last line may be cut off, and anything may stand
between two lines.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from hostupdate.errors import LabError

#: How often a waiter looks again, ns.
POLL_NS = 20_000_000
_BLOCK = 64 * 1024
_TICK = re.compile(rb"TICK seq=(\d+) mono=(\d+) real=(\d+) passes=(\d+) bad=(\d+) gap=(\d+)\r?\n")
_READY = re.compile(rb"READY pages=(\d+) seed=([0-9a-f]{16}) rate_ms=(\d+)\r?\n")
_OVERLAP = 256


class Clock(Protocol):
    """The host's clocks, and a way to let time pass."""

    def monotonic_ns(self) -> int:
        """Now on CLOCK_MONOTONIC, ns."""

    def real_ns(self) -> int:
        """Now on CLOCK_REALTIME, ns."""

    def sleep_ns(self, duration_ns: int) -> None:
        """Return after ``duration_ns``."""


class SystemClock:
    """The real one."""

    def monotonic_ns(self) -> int:
        """Now on CLOCK_MONOTONIC, ns."""
        return time.monotonic_ns()

    def real_ns(self) -> int:
        """Now on CLOCK_REALTIME, ns."""
        return time.time_ns()

    def sleep_ns(self, duration_ns: int) -> None:
        """Return after ``duration_ns``."""
        time.sleep(duration_ns / 1e9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """One sign of life. Clocks are the guest's CLOCK_MONOTONIC and CLOCK_REALTIME in ns.

    ``passes`` counts complete verifications of the stamped RAM, ``bad`` pages found wrong so far,
    ``gap_ns`` is the longest distance between two ticks so far on the guest's CLOCK_MONOTONIC.
    """

    seq: int
    monotonic_ns: int
    real_ns: int
    passes: int
    bad: int
    gap_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The witness has stamped ``pages`` pages of 4 KiB and ticks every ``rate_ms`` ms."""

    pages: int
    seed: str
    rate_ms: int


def ticks(path: Path, *, after_seq: int = -1) -> list[Tick]:
    """All complete ticks with a sequence number above ``after_seq``, in the file's order.

    A file that is not there yet holds none. Reads backwards from the end and stops at the first
    tick that is not wanted, so that a long log costs nothing. Raises ``OSError``.
    """
    found: list[Tick] = []
    for tick in _backwards(path):
        if tick.seq <= after_seq:
            break
        found.append(tick)
    return found[::-1]


def last_tick(path: Path) -> Tick | None:
    """The newest complete tick, or None. Raises ``OSError``."""
    return next(_backwards(path), None)


def ready(path: Path) -> Ready | None:
    """What the witness said when it was ready, or None. Raises ``OSError``."""
    try:
        with path.open("rb") as file:
            head = file.read(16 * _BLOCK)
    except FileNotFoundError:
        return None
    match = _READY.search(head)
    if match is None:
        return None
    return Ready(pages=int(match[1]), seed=match[2].decode(), rate_ms=int(match[3]))


def tail(path: Path, lines: int = 5) -> str:
    """The last lines for a human, unprintable bytes replaced; empty when there is no log."""
    with suppress(OSError), path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _BLOCK))
        shown = file.read().decode("ascii", "replace").splitlines()[-lines:]
        return "\n".join(_printable(line) for line in shown)
    return ""


def wait_ready(path: Path, deadline_ns: int, *, clock: Clock | None = None) -> Ready:
    """Wait until the witness is ready; ``deadline_ns`` is an instant of ``clock``.

    Raises ``LabError`` with the console's last lines at the deadline; nothing is changed.
    """
    clock = clock or SystemClock()
    while (found := ready(path)) is None:
        _pause(clock, deadline_ns, f"{path.stem} is not ready", path)
    return found


def wait_ticks(
    path: Path, count: int, deadline_ns: int, *, clock: Clock | None = None
) -> list[Tick]:
    """Wait for ``count`` ticks newer than the newest one there is now, and return them.

    ``deadline_ns`` is an instant of ``clock``. Raises ``LabError`` with the console's last lines
    at the deadline; nothing is changed.
    """
    clock = clock or SystemClock()
    newest = last_tick(path)
    after = newest.seq if newest else -1
    while len(found := ticks(path, after_seq=after)) < count:
        _pause(clock, deadline_ns, f"{path.stem}: {len(found)} of {count} ticks came", path)
    return found


def _printable(line: str) -> str:
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in line)


def _pause(clock: Clock, deadline_ns: int, problem: str, path: Path) -> None:
    if clock.monotonic_ns() >= deadline_ns:
        said = tail(path) or "(nothing)"
        raise LabError(
            f"{problem} in time; its console says last:\n{said}",
            remedy="an idle machine boots a lab guest in seconds: look at its load, then try again",
        )
    clock.sleep_ns(POLL_NS)


def _backwards(path: Path) -> Iterator[Tick]:
    """Complete ticks from the newest to the oldest."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        end = file.seek(0, 2)
        keep = b""
        while end > 0:
            start = max(0, end - _BLOCK)
            file.seek(start)
            block = file.read(end - start) + keep
            matches = list(_TICK.finditer(block))
            # A line that begins in the block before ends in the head of this one.
            cut = matches[0].start() if matches else min(len(block), _OVERLAP)
            keep, end = block[: min(cut, _OVERLAP)], start
            for match in reversed(matches):
                yield _tick(match)


def _tick(match: re.Match[bytes]) -> Tick:
    seq, mono, real, passes, bad, gap = map(int, match.groups())
    return Tick(seq=seq, monotonic_ns=mono, real_ns=real, passes=passes, bad=bad, gap_ns=gap)
