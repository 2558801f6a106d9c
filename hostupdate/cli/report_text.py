"""A run's report for people."""

from __future__ import annotations

import time

from rich.console import Console
from rich.markup import escape

from hostupdate.cli.terminal import MISSING, duration, out, size, table
from hostupdate.model import ClockReport, ExitCode, GuestReport, Outcome, Report

_COLOURS = {
    Outcome.OK: "green",
    Outcome.DEGRADED: "yellow",
    Outcome.FAILED: "red",
    Outcome.REFUSED: "yellow",
}


def print_report(report: Report) -> None:
    """The report on stdout."""
    console = out()
    colour = _COLOURS[report.outcome]
    started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(report.started_realtime_ns / 1e9))
    console.print(
        f"[bold]{escape(report.update)}[/]: [bold {colour}]{report.outcome}[/] "
        f"(exit {int(report.exit_code)}), run {report.run_id}, {started}"
    )
    console.print(
        f"impact: requested {report.impact.requested}, judged {report.impact.judged}, "
        f"actual {report.impact.actual}"
    )
    if report.method is not None:
        console.print(
            f"blackout: {duration(report.blackout_ns)} of {duration(report.budget_ns)} "
            f"(predicted {duration(report.predicted_blackout_ns)}), method {report.method}"
        )
        console.print(
            f"stopping all guests took {duration(report.stop_all_ns)} (first to last "
            f"{duration(report.spread_ns)}), starting them {duration(report.start_all_ns)}"
        )
    for reason in report.reasons:
        console.print(f"[{colour}]-[/] {escape(reason)}")
    _print_guests(console, report)
    _print_clocks(console, report)
    _print_steps(console, report)
    for name, before in report.versions.before.items():
        after = report.versions.after.get(name, MISSING)
        change = "" if after == before else f" -> {escape(after)}"
        console.print(f"{escape(name)}: {escape(before)}{change}")
    if report.host_clock is not None and report.host_clock.after_ns is not None:
        drift_ns = report.host_clock.after_ns - report.host_clock.before_ns
        console.print(
            f"host clock: moved by {duration(drift_ns)} against its monotonic clock during the run"
        )


def _print_guests(console: Console, report: Report) -> None:
    if not report.guests:
        return
    console.print()
    rows = table(
        "guest", ">blackout", ">resident", ">swapped in/out", ">major faults", "kept by", "digest"
    )
    for guest in report.guests:
        residency = guest.residency
        swapped = f"{size(residency.swapped_in_bytes)}/{size(residency.swapped_out_bytes)}"
        rows.add_row(
            escape(guest.name),
            duration(guest.blackout_ns),
            size(residency.resident_bytes),
            swapped if residency.swapped_in_bytes is not None else MISSING,
            MISSING if residency.major_faults is None else str(residency.major_faults),
            str(residency.protection) if guest.blackout_ns is not None else MISSING,
            _digest(guest),
        )
    console.print(rows)
    for guest in report.guests:
        if guest.state_after not in (None, guest.state_before):
            console.print(f"{escape(guest.name)}: was {guest.state_before}, is {guest.state_after}")
        reason = guest.residency.digest_reason
        for note in [*guest.notes, *([f"no RAM digest: {reason}"] if reason else [])]:
            console.print(f"{escape(guest.name)}: {escape(note)}")


def _print_clocks(console: Console, report: Report) -> None:
    guests = [guest for guest in report.guests if guest.clock != ClockReport()]
    if not guests:
        return
    console.print()
    rows = table(
        "guest's clock against the host's", ">before", ">after the pause", ">now",
        ">uncertainty", "set by",
    )  # fmt: skip
    for guest in guests:
        clock = guest.clock
        rows.add_row(
            escape(guest.name),
            duration(clock.before_ns),
            duration(clock.resumed_ns),
            duration(clock.after_ns),
            duration(clock.uncertainty_ns),
            clock.method or MISSING,
        )
    console.print(rows)


def _digest(guest: GuestReport) -> str:
    equal = guest.residency.digest_equal
    return MISSING if equal is None else "equal" if equal else "[red]CHANGED[/]"


def _print_steps(console: Console, report: Report) -> None:
    if not report.steps:
        return
    console.print()
    rows = table("step", "phase", ">exit", ">took", "note")
    for step in report.steps:
        note = step.problem
        if step.undone is not None:
            note += "; undone" if step.undone else "; NOT undone"
        rows.add_row(
            escape(step.name),
            str(step.phase),
            MISSING if step.exit is None else str(step.exit),
            duration(step.duration_ns),
            escape(note.lstrip("; ")),
        )
    console.print(rows)
    if report.exit_code != ExitCode.OK:
        for step in report.steps:
            if step.problem and step.output:
                console.print(f"output of {escape(step.name)} (all of it: {escape(step.log)}):")
                console.print(escape(step.output.rstrip()))
