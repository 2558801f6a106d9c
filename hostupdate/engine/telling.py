"""Telling whoever watches a run, without ever depending on it."""

from __future__ import annotations

from collections.abc import Callable

from hostupdate.engine.ports import ProgressPort
from hostupdate.model import Action, Phase


class Telling:
    """Passes events on to a watcher while guests run, and after they run again.

    A watcher may block (a terminal that was stopped), raise, or even ask the process to exit (a
    library that meets a closed pipe): while guests are paused it is told nothing, and one that
    raises is told nothing more.
    """

    def __init__(self, watcher: ProgressPort) -> None:
        self._watcher = watcher
        self._held: list[Callable[[], None]] | None = None
        self._gone = False

    def hold(self) -> None:
        """From now on events are kept."""
        self._held = []

    def release(self) -> None:
        """Passes on what was kept, and from now on everything at once. Safe to repeat."""
        held, self._held = self._held or [], None
        for event in held:
            self._pass(event)

    def phase(self, phase: Phase, *, paused: bool) -> None:
        """A phase begins."""
        self._pass(lambda: self._watcher.phase(phase, paused=paused))

    def started(self, action: Action) -> None:
        """An action begins."""
        self._pass(lambda: self._watcher.started(action))

    def ended(self, action: Action, duration_ns: int, problem: str) -> None:
        """An action has ended."""
        self._pass(lambda: self._watcher.ended(action, duration_ns, problem))

    def undone(self, action: Action, problem: str) -> None:
        """An undo has run."""
        self._pass(lambda: self._watcher.undone(action, problem))

    def _pass(self, event: Callable[[], None]) -> None:
        if self._held is not None:
            self._held.append(event)
            return
        if self._gone:
            return
        try:
            event()
        except BaseException:  # SystemExit too: it is not for a watcher to end a run
            self._gone = True
