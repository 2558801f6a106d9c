"""Signals that ask a run to stop, as something to poll and never as an exception.

An exception out of nowhere, between two lines of the blackout, would be one more way to lose track
of a guest. A run looks at :meth:`Interrupts.pending` where stopping is safe.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """While entered, SIGINT, SIGTERM and SIGHUP are remembered. Main thread only."""

    def __init__(self) -> None:
        self._read_fd, self._write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._before: dict[int, Any] = {}
        self._name: str | None = None

    def __enter__(self) -> Self:
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._read_fd)
        os.close(self._write_fd)

    def fileno(self) -> int:
        """Readable once a signal has come, and from then on."""
        return self._read_fd

    def pending(self) -> str | None:
        """The signal that came, by name."""
        return self._name

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._name = signal.Signals(number).name
        with suppress(BlockingIOError):
            os.write(self._write_fd, b"!")
