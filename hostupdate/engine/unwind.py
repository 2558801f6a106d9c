"""What an interrupted run did to the host is undone, or, once it was in place, finished."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from hostupdate import faults
from hostupdate.engine.stepping import BROWNOUT_STEP_NS, undo_ns
from hostupdate.errors import JournalError
from hostupdate.model import HARD_CAP_NS, Action, Impact, Phase, Plan, StepReport
from hostupdate.unwinding import Kind, Record, Remaining, remaining


class SurvivorsPort(Protocol):
    """Processes that outlived the run, and a way to run what is left."""

    def find(self, step: str, argv: Sequence[str]) -> int | None: ...
    def end(self, pid: int, deadline_ns: int) -> bool: ...
    def run(self, step: str, argv: Sequence[str], timeout_ns: int) -> str: ...


class NotesPort(Protocol):
    """The journal of the run."""

    def note(self, kind: Kind, action: int | None = None, problem: str = "") -> None: ...


class Unwind:
    """One interrupted run. ``problems`` holds what was not undone or finished, ``steps`` the
    reports of its steps. Safe to interrupt and to repeat: what is recorded as done is not done
    again."""

    def __init__(
        self,
        plan: Plan,
        records: Sequence[Record],
        survivors: SurvivorsPort,
        journal: NotesPort,
        tell: Callable[[str], None],
        *,
        same_boot: bool,
    ) -> None:
        self._plan = plan
        self._survivors = survivors
        self._journal = journal
        self._tell = tell
        self._same_boot = same_boot
        self._left: Remaining = remaining(plan, records, same_boot=same_boot)
        self._tried: set[int] = set()
        self.problems: list[str] = []
        self.steps = _reports(plan, records)

    @property
    def committed(self) -> bool:
        """The update was in place when the run was interrupted, and stays."""
        return self._left.committed

    def before_guests(self) -> None:
        """What is undone before guests that are parked come back: what ran while they were, of
        which their QEMUs may need the undo. :meth:`execute` does not do it again."""
        dark = [n for n in self._left.undo if self._plan.actions[n].phase is Phase.BLACKOUT]
        if self._same_boot:
            self._wait(Phase.BLACKOUT)
        self._undo(dark)

    def execute(self) -> None:
        """Waits for what still runs, undoes or finishes. Raises nothing for one step's sake."""
        if self._same_boot:
            self._wait()
        self._undo(self._left.undo)
        self._finish()

    def _undo(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            if number in self._tried:
                continue
            self._tried.add(number)
            action = self._plan.actions[number]
            self._tell(f"undoing step {action.step!r}")
            problem = self._run(
                Kind.UNDOING,
                Kind.UNDONE,
                Kind.UNDO_FAILED,
                number,
                action.undo_argv,
                undo_ns(action),
            )
            self.steps[number].undone = not problem
            if problem:
                self.problems.append(f"undo of step {action.step!r}: it {problem}")

    def _finish(self) -> None:
        for number in self._left.unknown:
            step = self._plan.actions[number].step
            self.problems.append(f"step {step!r} of the finish was interrupted: look at it")
        for number in self._left.finish:
            action = self._plan.actions[number]
            self._tell(f"running step {action.step!r}")
            timeout_ns = action.timeout_ns or BROWNOUT_STEP_NS
            problem = self._run(
                Kind.INTENT, Kind.DONE, Kind.FAILED, number, action.argv, timeout_ns
            )
            report = self.steps.setdefault(number, StepReport(name=action.step, phase=action.phase))
            report.exit, report.problem = (None, problem) if problem else (0, "")
            if problem:
                self.problems.append(f"step {action.step!r}: it {problem}")
                break  # the run itself would have ended here

    def _wait(self, phase: Phase | None = None) -> None:
        """No undo beside the step that it undoes, nor beside itself."""
        for number, action in enumerate(self._plan.actions):
            if action.kind != "step" or phase not in (None, action.phase):
                continue
            began_ns = self._left.running.get(number, 0)
            for argv, deadline_ns in (
                (action.argv, began_ns + self._timeout_ns(action)),
                (action.undo_argv, time.monotonic_ns() + undo_ns(action)),
            ):
                pid = self._survivors.find(action.step, argv)
                if pid is not None:
                    self._tell(f"waiting for step {action.step!r}, pid {pid}, to end")
                    if not self._survivors.end(pid, deadline_ns) and number in self.steps:
                        self.steps[number].problem = "it outlived its run and was ended"

    def _timeout_ns(self, action: Action) -> int:
        dark = action.phase is Phase.BLACKOUT and self._plan.actual is not Impact.NONE
        return action.timeout_ns or (HARD_CAP_NS if dark else BROWNOUT_STEP_NS)

    def _run(
        self,
        before: Kind,
        after: Kind,
        failed: Kind,
        number: int,
        argv: Sequence[str],
        timeout_ns: int,
    ) -> str:
        self._note(before, number)
        faults.point("resume.step")
        problem = self._survivors.run(self._plan.actions[number].step, argv, timeout_ns)
        self._note(failed if problem else after, number, problem)
        return problem

    def _note(self, kind: Kind, number: int, problem: str = "") -> None:
        try:
            self._journal.note(kind, number, problem)
        except JournalError as error:
            if str(error) not in self.problems:
                self.problems.append(str(error))


def _reports(plan: Plan, records: Sequence[Record]) -> dict[int, StepReport]:
    """What the records tell of each step that began, by its number."""
    found: dict[int, StepReport] = {}
    for record in records:
        action = dict(enumerate(plan.actions)).get(-1 if record.action is None else record.action)
        if action is None or action.kind != "step" or record.action is None:
            continue
        report = found.setdefault(
            record.action,
            StepReport(name=action.step, phase=action.phase, problem="its end was not seen"),
        )
        match record.kind:
            case Kind.DONE:
                report.exit, report.problem = 0, ""
            case Kind.FAILED:
                report.problem = record.problem
            case Kind.UNDONE | Kind.UNDO_FAILED:
                report.undone = record.kind is Kind.UNDONE
    return found
