"""``hostupdate status``."""

from __future__ import annotations

import click
from rich.markup import escape

from hostupdate.cli.settings import Settings, global_options, pass_settings
from hostupdate.cli.terminal import duration, out, print_error, print_json
from hostupdate.errors import InputError
from hostupdate.handover.records import ParkedRecords
from hostupdate.host import processes
from hostupdate.journal import Journal
from hostupdate.model import PendingRecord
from hostupdate.parked import ParkedState

SCHEMA = "hostupdate-status-v1"


@click.command("status")
@global_options
@pass_settings
def command(settings: Settings) -> None:
    """Show whether a run holds the host, and how the last one ended."""
    journal = Journal(settings.state)
    holder = journal.holder()
    pending = journal.pending()
    interrupted = None
    if pending is not None and not _alive(pending):
        interrupted = pending.run_id
    last = None
    try:
        runs = journal.runs()
        last = journal.report(runs[-1]) if runs else None
    except InputError as error:  # what goes on now matters more
        print_error(error)
    if settings.json:
        print_json({"schema": SCHEMA, "holder": holder, "interrupted": interrupted, "last": last})
        return
    console = out()
    console.print(f"the host is held by {escape(holder)}" if holder else "no run holds the host")
    if pending is not None:
        names = ", ".join(guest.name for guest in pending.guests)
        paused = f"it may have paused {escape(names)}" if names else "it has paused no guest"
        parked = _parked(settings)
        paused = f"{escape(', '.join(parked))} is parked" if parked else paused
        if interrupted:
            console.print(
                f"[bold red]run {pending.run_id} was interrupted[/]; {paused}; "
                "run `hostupdate resume`"
            )
        else:
            console.print(f"run {pending.run_id} goes on; {paused}")
    if last is None:
        console.print("no run has ended here yet")
    else:
        console.print(
            f"last run {last.run_id}: {escape(last.update)}: {last.outcome} "
            f"(exit {int(last.exit_code)}), blackout {duration(last.blackout_ns)}"
        )


def _parked(settings: Settings) -> list[str]:
    """Guests that have no QEMU, or one that has not been let run; a record that cannot be read is
    of one."""
    records = ParkedRecords(settings.state)
    found = []
    for uuid in records.uuids():
        try:
            record = records.read(uuid)
        except InputError:
            found.append(uuid)
            continue
        if record is not None and record.state is not ParkedState.LINKED:
            found.append(record.name)
    return found


def _alive(pending: PendingRecord) -> bool:
    """Whether the run's process goes on."""
    same_boot = pending.boot_id == processes.boot_id()
    return same_boot and processes.is_same(pending.pid, pending.started)
