"""``hostupdate status``."""

from __future__ import annotations

import click
from rich.markup import escape

from hostupdate.cli.settings import Settings, global_options, pass_settings
from hostupdate.cli.terminal import duration, out, print_error, print_json
from hostupdate.errors import InputError
from hostupdate.journal import Journal

SCHEMA = "hostupdate-status-v1"


@click.command("status")
@global_options
@pass_settings
def command(settings: Settings) -> None:
    """Show whether a run holds the host, and how the last one ended."""
    journal = Journal(settings.state)
    holder = journal.holder()
    armed = journal.armed()
    interrupted = armed.run_id if armed is not None and holder is None else None
    runs = journal.runs()
    last = None
    try:
        last = journal.report(runs[-1]) if runs else None
    except InputError as error:  # what goes on now matters more
        print_error(error)
    if settings.json:
        print_json({"schema": SCHEMA, "holder": holder, "interrupted": interrupted, "last": last})
        return
    console = out()
    console.print(f"the host is held by {escape(holder)}" if holder else "no run holds the host")
    if armed is not None:
        names = ", ".join(guest.name for guest in armed.guests)
        if interrupted:
            console.print(
                f"[bold red]run {armed.run_id} was interrupted[/]; its guests: {escape(names)}; "
                "run `hostupdate resume`"
            )
        else:
            console.print(f"run {armed.run_id} may have paused: {escape(names)}")
    if last is None:
        console.print("no run has ended here yet")
    else:
        console.print(
            f"last run {last.run_id}: {escape(last.update)}: {last.outcome} "
            f"(exit {int(last.exit_code)}), blackout {duration(last.blackout_ns)}"
        )
