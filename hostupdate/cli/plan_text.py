"""A plan for people: what ``apply --dry-run`` prints."""

from __future__ import annotations

import shlex

from rich.markup import escape

from hostupdate.cli.terminal import duration, out, table
from hostupdate.model import Plan


def print_plan(plan: Plan) -> None:
    """The plan on stdout: impact, guests, then every action in its order."""
    console = out()
    console.print(f"[bold]{escape(plan.update)}[/]: impact {plan.actual}")
    if plan.method is not None:
        console.print(
            f"blackout: predicted {duration(plan.predicted_blackout_ns)}, budget "
            f"{duration(plan.budget_ns)}; method {plan.method} ({escape(plan.method_reason)})"
        )
    elif plan.predicted_blackout_ns is not None:
        console.print(
            f"blackout of each guest: predicted {duration(plan.predicted_blackout_ns)} at most, "
            f"budget {duration(plan.budget_ns)}"
        )
    for warning in plan.warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}")
    for verdict in plan.packages:
        versions = f"{verdict.old or 'new'} -> {verdict.new}"
        console.print(
            f"package {escape(verdict.name)} ({escape(versions)}): {verdict.impact}, "
            f"{escape(verdict.reason)}"
        )
        for line in verdict.evidence:
            console.print(f"     {escape(line)}")
    guests = table("guest", "state", "impact", "pages kept by", "RAM digest", "note")
    for guest in plan.guests:
        guests.add_row(
            escape(guest.name),
            guest.state,
            str(plan.actual) if guest.pause else "none",
            str(guest.protection) if guest.pause else "",
            ("no" if guest.digest_reason else "yes") if guest.pause else "",
            escape(guest.reason or guest.digest_reason),
        )
    if plan.guests:
        console.print(guests)
    phase = None
    for number, action in enumerate(plan.actions, start=1):
        if action.phase is not phase:
            phase = action.phase
            console.print(f"[bold]{phase}[/]")
        console.print(f"{number:3}. {escape(action.title)}")
        if action.argv:
            limit = f"  (at most {duration(action.timeout_ns)})" if action.timeout_ns else ""
            console.print(f"     $ {escape(shlex.join(action.argv))}{limit}")
        if action.undo:
            console.print(f"     undo: {escape(action.undo)}")
