"""The manifest's steps in a run: bounded by the blackout, undone when the run fails."""

from __future__ import annotations

import time

from hostupdate.engine.handover import Handover
from hostupdate.engine.pause import Pause
from hostupdate.engine.ports import Hands
from hostupdate.errors import Interrupted, StepError
from hostupdate.handing import HANDOVER_NS
from hostupdate.model import Action, Impact, Phase, Plan, Report, StepReport

#: For steps of stage and finish that name no time-out of their own.
BROWNOUT_STEP_NS = 600_000_000_000
UNDO_NS = 60_000_000_000
#: An undo that guests wait for, which are parked, has this much, whatever is left of the budget.
DARK_UNDO_NS = 1_000_000_000


def undo_ns(action: Action) -> int:
    """How long the undo of a step may take: as long as the step, where that is long."""
    return max(UNDO_NS, action.timeout_ns or 0)


class Stepping:
    """Runs and undoes steps, into the report."""

    def __init__(
        self, plan: Plan, hands: Hands, pause: Pause, handover: Handover, report: Report
    ) -> None:
        self._plan = plan
        self._hands = hands
        self._pause = pause
        self._handover = handover
        self._report = report
        self._reports: dict[str, StepReport] = {}

    def check_interrupted(self) -> None:
        """Interrupted, where a signal asked for it."""
        signal = self._hands.interrupts.pending()
        if signal is not None:
            raise Interrupted(f"stopped by {signal}")

    def run(self, action: Action) -> None:
        """Runs a step. StepError: it failed, was late, or the blackout had to end."""
        report = StepReport(name=action.step, phase=action.phase)
        self._report.steps.append(report)
        self._reports[action.step] = report
        now_ns = time.monotonic_ns()
        paused = action.phase is Phase.BLACKOUT and self._plan.method is not None
        wake_fds = [self._hands.interrupts.fileno()]
        if paused:
            wake_fds += self._pause.watch.wake_fds
            deadline_ns = self._pause.steps_end_ns
            if action.timeout_ns is not None:
                deadline_ns = min(deadline_ns, now_ns + action.timeout_ns)
        elif action.phase is Phase.BLACKOUT and self._plan.actual is Impact.HANDOVER:
            wake_fds += self._handover.watch.wake_fds
            deadline_ns = now_ns + (action.timeout_ns or HANDOVER_NS)
            deadline_ns = min(deadline_ns, self._handover.steps_end_ns)
        else:
            deadline_ns = now_ns + (action.timeout_ns or BROWNOUT_STEP_NS)
        result = self._hands.steps.run(action.step, deadline_ns, wake_fds)
        report.exit, report.duration_ns, report.problem = (
            result.exit, result.duration_ns, result.problem,
        )  # fmt: skip
        if result.problem:
            self.check_interrupted()
            if paused and self._pause.watch.alarmed():
                report.problem += ": the budget is over, the keeper has let the guests run"
            raise StepError(action.step, report.problem)

    def undo(self, action: Action) -> None:
        """Undoes a step that has begun, whether or not it ended. StepError: the undo failed."""
        self._hands.steps.reap()
        report = self._reports.get(action.step)
        if action.undo_argv and report is not None:
            report.undone = False
            timeout_ns = undo_ns(action)
            if self._handover.dark:  # guests wait for it
                left_ns = self._handover.steps_end_ns - time.monotonic_ns()
                timeout_ns = min(timeout_ns, max(left_ns, DARK_UNDO_NS))
            report.undone = self._hands.steps.undo(action.step, timeout_ns)
            self._report.undone.append(action.step)
