"""Calls that may hang, kept from hanging us.

libvirt's C calls cannot be cancelled. Each runs on a daemon thread that is given up when its
deadline passes; the thread's later outcome goes to ``on_late`` (for example: a suspend that
succeeds after we gave up is taken back) and nowhere else.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from hostupdate.errors import DeadlineError

T = TypeVar("T")


@dataclass(slots=True)
class Call(Generic[T]):
    """One call under way. ``ended_ns`` is CLOCK_MONOTONIC at its end."""

    what: str
    run: Callable[[], T]
    on_late: Callable[[T], None] | None = None
    done: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    abandoned: bool = False
    started_ns: int = 0
    ended_ns: int = 0
    value: T | None = None
    error: BaseException | None = None

    def execute(self) -> None:
        self.started_ns = time.monotonic_ns()
        try:
            self.value = self.run()
        except BaseException as error:  # handed to the waiter, whatever it is
            self.error = error
        self.ended_ns = time.monotonic_ns()
        with self.lock:
            late = self.abandoned
            self.done.set()
        if late and self.error is None and self.on_late is not None:
            self.on_late(self.value)  # type: ignore[arg-type]

    def result(self, deadline_ns: int, timeout_ns: int) -> T:
        """The call's value, or its error raised; DeadlineError at ``deadline_ns`` (monotonic)."""
        self.done.wait(max(0.0, (deadline_ns - time.monotonic_ns()) / 1e9))
        with self.lock:
            if not self.done.is_set():
                self.abandoned = True
                raise DeadlineError(self.what, timeout_ns)
        if self.error is not None:
            raise self.error
        return self.value  # type: ignore[return-value]


class Worker:
    """A daemon thread that runs calls one after another. One that hangs holds up only itself."""

    def __init__(self, name: str) -> None:
        self._calls: SimpleQueue[Call[Any] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)
        self._thread.start()

    def submit(
        self, what: str, run: Callable[[], T], on_late: Callable[[T], None] | None = None
    ) -> Call[T]:
        call = Call(what=what, run=run, on_late=on_late)
        self._calls.put(call)
        return call

    def close(self) -> None:
        """Lets the thread end after what is queued; does not wait for it."""
        self._calls.put(None)

    def _loop(self) -> None:
        while (call := self._calls.get()) is not None:
            call.execute()


def call_within(
    what: str,
    timeout_ns: int,
    run: Callable[[], T],
    on_late: Callable[[T], None] | None = None,
) -> T:
    """Runs ``run`` on a thread of its own for at most ``timeout_ns``; DeadlineError after that."""
    worker = Worker(what)
    call = worker.submit(what, run, on_late)
    worker.close()
    return call.result(time.monotonic_ns() + timeout_ns, timeout_ns)
