"""The report of a run whose orchestrator died before it could write one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hostupdate.engine.outcome import new_report
from hostupdate.engine.recovery import Recovered
from hostupdate.engine.unwind import Unwind
from hostupdate.model import ExitCode, Outcome, PauseMethod, PendingRecord, Plan, Report

if TYPE_CHECKING:
    from hostupdate.core.keeper import KeeperRecord


def late_report(
    plan: Plan, record: PendingRecord, began_realtime_ns: int, keeper: KeeperRecord | None
) -> Report:
    """What is known of the run: its plan, and what its keeper saw."""
    report = new_report(record.run_id, plan, began_realtime_ns)
    report.reasons.append(f"the run was interrupted: its process, pid {record.pid}, died")
    if record.method is PauseMethod.FREEZE:  # thawed, stopped guests do not run yet
        _add_blackouts(report, record, keeper)
    return report


def conclude(report: Report, recovered: Recovered, unwind: Unwind | None) -> None:
    """Adds how the run ended in the end."""
    report.reasons += [f"guest {name}: {text}" for name, text in recovered.problems.items()]
    report.reasons += recovered.warnings
    if unwind is not None:
        report.steps = list(unwind.steps.values())
        report.undone = [step.name for step in reversed(report.steps) if step.undone]
        report.reasons += unwind.problems
    committed = unwind is not None and unwind.committed
    if recovered.problems:
        report.outcome, report.exit_code = Outcome.FAILED, ExitCode.GUEST_LOST
    elif committed:
        report.outcome, report.exit_code = Outcome.DEGRADED, ExitCode.DEGRADED
    else:
        report.outcome, report.exit_code = Outcome.FAILED, ExitCode.FAILED


def _add_blackouts(report: Report, record: PendingRecord, keeper: KeeperRecord | None) -> None:
    if keeper is None or not keeper.armed:
        return
    armed_ns = keeper.armed[-1].monotonic_ns
    by_uuid = {guest.uuid: guest for guest in report.guests}
    for thaw in keeper.thaws:
        if thaw.guest >= len(record.guests):
            continue
        guest = by_uuid[record.guests[thaw.guest].uuid]
        if guest.resumed_monotonic_ns is None and thaw.monotonic_ns is not None:
            guest.paused_monotonic_ns = armed_ns
            guest.resumed_monotonic_ns = thaw.monotonic_ns
            guest.blackout_ns = thaw.monotonic_ns - armed_ns
            guest.notes.append("the keeper let it run; its blackout is an upper bound")
    blackouts = [guest.blackout_ns for guest in report.guests if guest.blackout_ns is not None]
    report.blackout_ns = max(blackouts, default=None)
