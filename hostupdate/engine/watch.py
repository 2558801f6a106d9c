"""The keeper of one run, as the engine holds it: armed while a guest stands still."""

from __future__ import annotations

import time
from collections.abc import Sequence

from hostupdate.engine.ports import CorePort, KeeperPort, PausedSet
from hostupdate.errors import CoreError


class Watch:
    """``problem`` says what the keeper had to do, or that it is gone; ``fired`` are the words for
    the former. Everything may be called whether or not there is a keeper, and repeated."""

    def __init__(self, core: CorePort, fired: str) -> None:
        self._core = core
        self._fired = fired
        self._keeper: KeeperPort | None = None
        self.armed = False
        self.deadline_ns = 0  #: CLOCK_MONOTONIC; 0 until armed
        self.problem = ""

    @property
    def wake_fds(self) -> list[int]:
        """Readable when the keeper has fired or died."""
        return [self._keeper.fileno()] if self._keeper is not None else []

    @property
    def locked_bytes(self) -> int:
        """Guest RAM that the keeper has locked."""
        return self._keeper.locked_bytes if self._keeper is not None else 0

    @property
    def lock_errno(self) -> int:
        """0, or why some of the guests' RAM is not locked."""
        return self._keeper.lock_errno if self._keeper is not None else 0

    def start(self, guests: PausedSet, ram_fds: Sequence[int]) -> None:
        """Starts the keeper of these guests, not armed. CoreError: there is none."""
        self._keeper = self._core.start_keeper(guests, ram_fds)

    def arm(self, budget_ns: int) -> None:
        """Starts the budget's clock. CoreError: it is not armed, pause nothing."""
        if self._keeper is None or self.armed:
            return
        self.deadline_ns = time.monotonic_ns() + budget_ns
        self._keeper.arm(self.deadline_ns)
        self.armed = True

    def alarmed(self) -> bool:
        """The keeper has fired or is gone."""
        return self._keeper is not None and self._keeper.alarmed()

    def disarm(self) -> None:
        """Tells the keeper that the guests run, which they do."""
        if self._keeper is None or not self.armed:
            return
        self.armed = False
        try:
            if self._keeper.disarm():
                self.problem = self._fired
        except CoreError as error:
            self.problem = f"the keeper did not answer at the end of a blackout: {error}"

    def end(self) -> None:
        """Ends the keeper."""
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            try:
                keeper.stop()
            except CoreError as error:
                self.problem = self.problem or f"the keeper is gone: {error}"
