"""``hostupdate resume``: also what the keeper runs when a run's orchestrator has died."""

from __future__ import annotations

import sys
from contextlib import closing

import click

from hostupdate.cli.compose import require_root
from hostupdate.cli.recovering import Recovery
from hostupdate.cli.settings import Settings, global_options, pass_settings
from hostupdate.cli.terminal import out, print_json
from hostupdate.errors import BusyError, InputError
from hostupdate.guests import Hypervisor
from hostupdate.handover.records import ParkedRecords
from hostupdate.host import processes
from hostupdate.journal import Journal
from hostupdate.model import PendingRecord
from hostupdate.parked import ParkedRecord

SCHEMA = "hostupdate-resume-v1"
#: A run that is just being refused holds the lock for as long as libvirt may take to answer it.
_LOCK_NS = 10_000_000_000


@click.command("resume")
@click.option(
    "--discard",
    metavar="GUEST",
    help="Give up what is parked of a guest, as after a power failure; its owner can start it.",
)
@global_options
@pass_settings
def command(settings: Settings, discard: str | None) -> None:
    """Finish or undo an interrupted run: every guest that it paused runs again.

    Guests first, then their clocks; then the steps of the update that had run are undone, or,
    where the update was in place already, its last steps are run. Does nothing where no run was
    interrupted, and may be repeated.
    """
    require_root()
    journal = Journal(settings.state)
    lock = journal.lock("resume", wait_ns=_LOCK_NS)
    try:
        record, unreadable = None, None
        try:
            record = journal.pending() or _of_parked(settings)
        except InputError as error:
            unreadable = error
        if discard is not None:
            _discard(settings, discard)
        if unreadable is not None:
            raise unreadable
        if record is None:
            if settings.json:
                print_json({"schema": SCHEMA, "run_id": None, "report": None})
            else:
                out().print("nothing to resume: no run was interrupted")
            return
        if processes.is_same(record.pid, record.started) and record.boot_id == processes.boot_id():
            raise BusyError(f"run {record.run_id}, pid {record.pid}, which lives")
        recovery = Recovery(settings, journal, record)
        recovery.execute()
    finally:
        lock.release()
    if settings.json:
        print_json({"schema": SCHEMA, "run_id": record.run_id, "report": recovery.report})
    else:
        recovery.show()
    sys.exit(recovery.exit_code)


def _discard(settings: Settings, name: str) -> None:
    """InputError: no guest of that name is parked, or it cannot be known which are."""
    records = ParkedRecords(settings.state)
    readable, unreadable = _read(records)
    for parked in readable:
        if name in (parked.uuid, parked.name):
            from hostupdate.cli.bringing_back import give_up

            config = settings.load_config()
            timeout_ns = config.deadlines.libvirt_ns
            with closing(Hypervisor(parked.uri, timeout_ns=timeout_ns)) as hypervisor:
                give_up(settings, config, hypervisor, parked)
            return
    if name in unreadable:
        error = unreadable[name]
        raise InputError(
            error.source, error.field, error.problem,
            remedy=f"see with `virsh list --all` whether the guest runs; what is parked of it is "
            f"given up by hand: rm {records.path(name)} {records.image(name)}",
        )  # fmt: skip
    for error in unreadable.values():
        raise error
    raise InputError(
        "command line", "--discard", f"no guest {name!r} is parked",
        remedy="`hostupdate status` names those that are",
    )  # fmt: skip


def _of_parked(settings: Settings) -> PendingRecord | None:
    """What stands for a pending record that has been lost, where a guest has a parked one.
    InputError: none of those can be read."""
    readable, unreadable = _read(ParkedRecords(settings.state))
    for parked in readable:
        return PendingRecord(
            run_id=parked.run_id,
            boot_id=parked.boot_id,
            uri=parked.uri,
            pid=0,
            started=0,
            libvirt_timeout_ns=settings.load_config().deadlines.recovery_libvirt_ns,
        )
    for error in unreadable.values():
        raise error
    return None


def _read(records: ParkedRecords) -> tuple[list[ParkedRecord], dict[str, InputError]]:
    """All of them, and by uuid why one cannot be read."""
    readable, unreadable = [], {}
    for uuid in records.uuids():
        try:
            record = records.read(uuid)
        except InputError as error:
            unreadable[uuid] = error
            continue
        if record is not None:
            readable.append(record)
    return readable, unreadable
