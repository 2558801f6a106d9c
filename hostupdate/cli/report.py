"""``hostupdate report``."""

from __future__ import annotations

import click
from rich.markup import escape

from hostupdate.cli.report_text import print_report
from hostupdate.cli.settings import Settings, global_options, pass_settings
from hostupdate.cli.terminal import duration, err, out, print_json, table
from hostupdate.errors import InputError
from hostupdate.journal import Journal


@click.command("report")
@click.argument("run_id", metavar="[RUN]", required=False)
@click.option("--list", "list_", is_flag=True, help="List the runs there are.")
@global_options
@pass_settings
def command(settings: Settings, run_id: str | None, list_: bool) -> None:
    """Show what a run did: RUN, or the last one."""
    journal = Journal(settings.state)
    runs = journal.runs()
    if list_:
        _list(journal, runs, settings.json)
        return
    if not runs:
        raise InputError(
            str(settings.state), "", "no run has ended here yet",
            remedy="`hostupdate apply MANIFEST` makes one; --state chooses the directory",
        )  # fmt: skip
    matching = [run for run in runs if run.startswith(run_id or runs[-1])]
    if len(matching) != 1:
        raise InputError(
            "command line", "RUN", f"{run_id!r} names {len(matching)} runs",
            remedy="`hostupdate report --list` shows them",
        )  # fmt: skip
    report = journal.report(matching[0])
    print_json(report) if settings.json else print_report(report)


def _list(journal: Journal, runs: list[str], as_json: bool) -> None:
    reports = [journal.report(run) for run in runs]
    if as_json:
        print_json({"schema": "hostupdate-reports-v1", "runs": reports})
        return
    if not reports:
        err().print("no run has ended here yet")
        return
    shown = table("run", "update", "outcome", ">exit", ">blackout", ">guests")
    for report in reports:
        shown.add_row(
            report.run_id,
            escape(report.update),
            str(report.outcome),
            str(int(report.exit_code)),
            duration(report.blackout_ns),
            str(len([guest for guest in report.guests if guest.blackout_ns is not None])),
        )
    out().print(shown)
