"""What a person sees of a run while it goes on. On stderr; live only on a terminal."""

from __future__ import annotations

from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from hostupdate.cli.terminal import duration, err
from hostupdate.model import Action, Phase


class Lines:
    """One line for each action as it ends, and on a terminal a moving one for what goes on.

    A blackout's lines come after it. Its moving line is drawn by a thread of its own: a terminal
    that blocks holds up nothing but that thread.
    """

    def __init__(self) -> None:
        self._console = err()
        self._moving: Progress | None = None

    def phase(self, phase: Phase, *, paused: bool) -> None:
        """A new phase begins; ``paused``: guests will not run in it."""
        self._stop()
        self._console.print(f"[bold]{phase}[/]")
        if paused:
            self._move("guests are paused")

    def started(self, action: Action) -> None:
        """An action begins."""
        self._stop()
        self._move(escape(action.title))

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

    def _move(self, text: str) -> None:
        if self._console.is_terminal:
            self._moving = Progress(
                SpinnerColumn(),
                TextColumn(text),
                TimeElapsedColumn(),
                console=self._console,
                transient=True,
            )
            self._moving.add_task("")
            self._moving.start()

    def _stop(self) -> None:
        if self._moving is not None:
            self._moving.stop()
            self._moving = None


class Silent:
    """For --quiet."""

    def phase(self, phase: Phase, *, paused: bool) -> None:
        """Says nothing."""

    def started(self, action: Action) -> None:
        """Says nothing."""

    def ended(self, action: Action, duration_ns: int, problem: str) -> None:
        """Says nothing."""

    def undone(self, action: Action, problem: str) -> None:
        """Says nothing."""
