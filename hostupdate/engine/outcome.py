"""How a run ended: guests' end states compared with their start, and what the exit code says."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping

from hostupdate.durations import format_duration
from hostupdate.engine.pause import Pause
from hostupdate.engine.ports import Hands
from hostupdate.errors import GuestError, HypervisorError
from hostupdate.model import (
    ExitCode,
    GuestReport,
    GuestState,
    Impact,
    ImpactReport,
    Outcome,
    Plan,
    Report,
)
from hostupdate.vitals import changes

#: How long libvirt may still call a guest paused that was resumed.
_SETTLE_NS = 2_000_000_000


def new_report(run_id: str, plan: Plan, started_realtime_ns: int) -> Report:
    """A report with what is known before the run."""
    return Report(
        run_id=run_id,
        update=plan.update,
        started_realtime_ns=started_realtime_ns,
        impact=ImpactReport(requested=plan.requested, judged=plan.judged, actual=plan.actual),
        method=plan.method,
        budget_ns=plan.budget_ns,
        predicted_blackout_ns=plan.predicted_blackout_ns,
        reasons=list(plan.warnings),
        guests=[
            GuestReport(
                name=guest.name,
                uuid=guest.uuid,
                impact=plan.actual if guest.pause else Impact.NONE,
                state_before=guest.state,
                frozen_by=guest.freeze_by,
                predicted_blackout_ns=plan.predicted_blackout_ns if guest.pause else None,
                notes=[guest.reason] if guest.reason else [],
            )
            for guest in plan.guests
        ],
    )


class Outcomes:
    """Judges one run's end, into its report."""

    def __init__(self, plan: Plan, hands: Hands, pause: Pause, report: Report) -> None:
        self._plan = plan
        self._hands = hands
        self._pause = pause
        self._report = report
        self._degraded = False
        self._lost: dict[str, str] = {}
        self._silent = False  #: libvirt did not answer: not asked again for each other guest

    def degrade(self, reason: str) -> None:
        """The update was applied, but something promised was missed."""
        self._degraded = True
        self._report.reasons.append(reason)

    def verify(self) -> None:
        """Every paused guest runs, in the same process, libvirt says so, and what it had before it
        has still: disks and links that work, an agent.

        GuestError for the first that does not; HypervisorError where libvirt does not answer.
        """
        failed = self._pause.failed_guest()
        if failed is not None:
            raise failed
        for guest in self._paused_reports():
            problem = self._observe(guest)
            if problem:
                raise GuestError(guest.name, problem)
        silent = [g.name for g in self._paused_reports() if g.state_after is GuestState.UNKNOWN]
        if silent:
            raise HypervisorError(
                f"libvirt does not answer after the update; {', '.join(silent)} run"
            )
        self._compare_vitals()
        for guest in self._paused_reports():  # that look takes its time
            if not self._lives(guest):
                raise GuestError(guest.name, self._observe(guest))

    def _compare_vitals(self) -> None:
        guests = self._paused_reports()
        places = self._hands.places
        now = self._hands.look([(guest.uuid, places[guest.uuid].pid) for guest in guests])
        for guest in guests:
            before = self._hands.vitals.get(guest.uuid)
            if before is None:
                continue
            for change in changes(before, now[guest.uuid]):
                if change.grave:
                    raise GuestError(guest.name, f"after the update {change.text}")
                self.degrade(f"guest {guest.name}: after the update {change.text}")

    def conclude(
        self, committed: bool, parked: Mapping[str, str], handed: Collection[str] = ()
    ) -> None:
        """Fills in the outcome, the exit code and the totals. ``parked``: guests, by uuid, that
        could not be brought back; ``handed``: those whose handover had begun."""
        report = self._report
        report.spread_ns = self._pause.spread_ns
        report.stop_all_ns = self._pause.stop_all_ns
        report.start_all_ns = self._pause.start_all_ns
        for guest in self._paused_reports():
            if guest.paused_monotonic_ns is not None and guest.resumed_monotonic_ns is not None:
                guest.blackout_ns = guest.resumed_monotonic_ns - guest.paused_monotonic_ns
        blackouts = [guest.blackout_ns for guest in report.guests if guest.blackout_ns is not None]
        report.blackout_ns = max(blackouts, default=None)
        if committed and (report.blackout_ns or 0) > self._plan.budget_ns:
            self.degrade(
                f"the blackout was {format_duration(report.blackout_ns or 0)}, "
                f"the budget {format_duration(self._plan.budget_ns)}"
            )
        # Once the first guest of a handover has moved on the update stays, whatever others meet.
        looks = not committed or self._plan.actual is Impact.HANDOVER
        self._lost = self._lost_guests(handed) if looks else self._dead_guests()
        self._lost |= {g.name: parked[g.uuid] for g in self._paused_reports() if g.uuid in parked}
        lost = [f"guest {name}: {problem}" for name, problem in self._lost.items()]
        report.reasons += [text for text in lost if text not in report.reasons]
        self.judge(committed)

    def judge(self, committed: bool) -> None:
        """Sets outcome and exit code by what has been found so far."""
        report = self._report
        if self._lost:
            report.outcome, report.exit_code = Outcome.FAILED, ExitCode.GUEST_LOST
        elif not committed:
            report.outcome, report.exit_code = Outcome.FAILED, ExitCode.FAILED
        elif self._degraded:
            report.outcome, report.exit_code = Outcome.DEGRADED, ExitCode.DEGRADED
        else:
            report.outcome, report.exit_code = Outcome.OK, ExitCode.OK

    def _paused_reports(self) -> list[GuestReport]:
        paused = {guest.uuid for guest in self._plan.paused}
        return [guest for guest in self._report.guests if guest.uuid in paused]

    def _observe(self, guest: GuestReport) -> str:
        """Looks at the guest now; returns what is wrong with it, or nothing."""
        place = self._hands.places[guest.uuid]
        guest.state_after = GuestState.UNKNOWN
        if not self._silent:
            guest.state_after = self._settled_state(guest.uuid)
            self._silent = guest.state_after is GuestState.UNKNOWN
        if not self._lives(guest):
            if guest.state_after in (GuestState.RUNNING, GuestState.PAUSED):
                guest.state_after = GuestState.GONE  # libvirt has not learnt of it yet
            return f"its QEMU, pid {place.pid}, is gone"
        if guest.state_after not in (GuestState.RUNNING, GuestState.UNKNOWN):
            return f"it is {guest.state_after}, it was {guest.state_before}"
        return ""

    def _lives(self, guest: GuestReport) -> bool:
        place = self._hands.places[guest.uuid]
        return self._hands.is_alive(place.pid, place.started)

    def _settled_state(self, uuid: str) -> GuestState:
        """A daemon that has just been started tells what it remembers, until QEMU tells it more."""
        deadline_ns = time.monotonic_ns() + _SETTLE_NS
        while True:
            state = self._hands.hypervisor.state(uuid)
            if state is not GuestState.PAUSED or time.monotonic_ns() >= deadline_ns:
                return state
            time.sleep(0.02)

    def _dead_guests(self) -> dict[str, str]:
        """Of an update that is in place: who died after it was verified."""
        return {
            guest.name: f"its QEMU, pid {self._hands.places[guest.uuid].pid}, is gone"
            for guest in self._paused_reports()
            if not self._lives(guest)
        }

    def _lost_guests(self, handed: Collection[str]) -> dict[str, str]:
        problems = self._pause.problems()
        lost = {}
        self._silent = False
        for guest in self._paused_reports():
            problem = self._observe(guest) or problems.get(guest.uuid, "")
            touched = self._pause.began or guest.uuid in handed
            if not touched and self._lives(guest):
                continue  # whatever its state is now, it is its owner's doing
            if problem:
                lost[guest.name] = problem
        return lost

    def collect_steps(self) -> None:
        """What the steps printed, into the report."""
        for step in self._report.steps:
            step.output, step.output_bytes, log = self._hands.steps.output(step.name)
            step.log = str(log)
