"""Small processes with several threads that stand for guests, each in a cgroup of its own."""

from __future__ import annotations

import mmap
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hostupdate.core.freezer import GuestHandle, open_cgroup, open_process

THREADS = 3


def second(after: float = 0.0) -> int:
    """CLOCK_MONOTONIC so many seconds from now."""
    return time.monotonic_ns() + int(after * 1e9)


class Guest:
    """A process whose threads count; ``cgroup`` is where it lives, None: where we do."""

    def __init__(self, name: str, cgroup: Path | None) -> None:
        self.name = name
        self.cgroup = cgroup
        self._ticks = mmap.mmap(-1, THREADS)
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self._live()
            finally:
                os._exit(1)
        if cgroup is not None:
            cgroup.mkdir()
            (cgroup / "cgroup.procs").write_text(str(self.pid))
        assert self.runs()

    def _live(self) -> None:
        if self.cgroup is not None:
            signal.alarm(120)  # whatever becomes of the test
        for index in range(1, THREADS):
            threading.Thread(target=self._tick, args=(index,), daemon=True).start()
        self._tick(0)

    def _tick(self, index: int) -> None:
        while True:
            self._ticks[index] = (self._ticks[index] + 1) % 256
            time.sleep(0.0005)

    def open(self) -> GuestHandle:
        if self.cgroup is None:
            return open_process(self.pid, label=self.name)
        return open_cgroup(self.cgroup, label=self.name)

    def runs(self) -> bool:
        """Whether all its threads go on."""
        before = self._ticks[:]
        for _ in range(2000):
            if all(old != new for old, new in zip(before, self._ticks[:], strict=True)):
                return True
            time.sleep(0.001)
        return False

    def still(self) -> bool:
        """Whether none of its threads moves."""
        before = self._ticks[:]
        time.sleep(0.02)
        return before == self._ticks[:]

    def kill(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0

    def remove(self) -> None:
        self.kill()
        for _ in range(100):  # a moment after the last process
            with suppress(OSError):
                if self.cgroup is not None and self.cgroup.exists():
                    self.cgroup.rmdir()
                return
            time.sleep(0.001)


@contextmanager
def guests(count: int, *, cgroups: bool) -> Iterator[list[Guest]]:
    """That many; gone afterwards, and their cgroups with them."""
    mounts = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))
    top = next((mount for mount in mounts if (mount / "cgroup.controllers").exists()), None)
    root = None
    made: list[Guest] = []
    if cgroups:
        assert top is not None
        root = top / f"hostupdate-unit-{os.getpid()}"
        root.mkdir()
    try:
        for index in range(count):
            made.append(Guest(f"guest{index}", root / f"guest{index}" if root else None))
        yield made
    finally:
        for guest in made:
            guest.remove()
        if root is not None:
            root.rmdir()
