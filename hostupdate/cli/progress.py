"""What a person sees of a run while it goes on. On stderr; live only on a terminal."""

from __future__ import annotations

from rich.markup import escape
from rich.status import Status

from hostupdate.cli.terminal import duration, err
from hostupdate.model import Action, Phase


class Lines:
    """One line for each action as it ends, and on a terminal a moving one for the action under
    way. A blackout's lines come after it."""

    def __init__(self) -> None:
        self._console = err()
        self._status: Status | None = None

    def phase(self, phase: Phase) -> None:
        """A new phase begins."""
        self._stop()
        note = " (guests are paused)" if phase is Phase.BLACKOUT else ""
        self._console.print(f"[bold]{phase}[/]{note}")

    def started(self, action: Action) -> None:
        """An action begins."""
        if self._console.is_terminal:
            self._stop()
            self._status = self._console.status(escape(action.title))
            self._status.start()

    def ended(self, action: Action, duration_ns: int, problem: str) -> None:
        """An action has ended."""
        self._stop()
        mark = "[red]failed[/]" if problem else "[green]done[/]"
        self._console.print(f"  {mark} {escape(action.title)} ({duration(duration_ns)})")
        if problem:
            self._console.print(f"         {escape(problem)}")

    def undone(self, action: Action, problem: str) -> None:
        """An undo has run."""
        self._stop()
        mark = "[red]undo failed[/]" if problem else "[yellow]undone[/]"
        self._console.print(f"  {mark} {escape(action.title)}: {escape(problem or action.undo)}")

    def _stop(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None


class Silent:
    """For --quiet."""

    def phase(self, phase: Phase) -> None:
        """Says nothing."""

    def started(self, action: Action) -> None:
        """Says nothing."""

    def ended(self, action: Action, duration_ns: int, problem: str) -> None:
        """Says nothing."""

    def undone(self, action: Action, problem: str) -> None:
        """Says nothing."""
