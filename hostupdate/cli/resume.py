"""``hostupdate resume``: also what the keeper runs when a run's orchestrator has died."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import click
import msgspec
from rich.markup import escape

from hostupdate.cli.compose import (
    HostClock,
    require_root,
    resume_guest_by_monitor,
)
from hostupdate.cli.settings import Settings, global_options, pass_settings
from hostupdate.cli.terminal import out, print_json
from hostupdate.clocks import Clocks
from hostupdate.config import Config
from hostupdate.core.keeper import KeeperRecord, read_record
from hostupdate.engine.clocks import GuestClocks
from hostupdate.engine.outcome import new_report
from hostupdate.engine.recovery import (
    Recovered,
    RecoveryHands,
    RecoveryHypervisor,
    recover,
)
from hostupdate.errors import DeadlineError, HypervisorError, InputError
from hostupdate.guests import Hypervisor
from hostupdate.guests.agent import Agents
from hostupdate.guests.links import Links
from hostupdate.host import processes
from hostupdate.host.cgroups import Cgroups
from hostupdate.journal import Journal
from hostupdate.model import (
    ArmedGuest,
    ArmedRecord,
    ExitCode,
    Outcome,
    PauseMethod,
    Plan,
    Report,
)

SCHEMA = "hostupdate-resume-v1"
#: A run that is just being refused holds the lock for as long as libvirt may take to answer it.
_LOCK_NS = 10_000_000_000
#: How long a guest that was told to run may go on being frozen.
_THAW_NS = 1_000_000_000


@click.command("resume")
@global_options
@pass_settings
def command(settings: Settings) -> None:
    """Finish an interrupted run: every guest that it paused runs again.

    Does nothing where no run was interrupted. Their clocks are set then. Steps of the
    update that had run stay as they are.
    """
    require_root()
    journal = Journal(settings.state)
    lock = journal.lock("resume", wait_ns=_LOCK_NS)
    try:
        record = journal.armed()
        if record is None:
            if settings.json:
                print_json({"schema": SCHEMA, "run_id": None, "report": None})
            else:
                out().print("nothing to resume: no run was interrupted")
            return
        libvirt = _Libvirt(record.uri, record.libvirt_timeout_ns)
        result = recover(record, _hands(record, libvirt), record.libvirt_timeout_ns)
        report = _report(journal, record, result)
        if report is not None:
            journal.save_report(report)
        if result.unfinished:  # the others run: their owners may pause them again
            journal.arm(msgspec.structs.replace(record, guests=result.unfinished))
        else:
            journal.disarm()
        if report is not None:
            _correct_clocks(record, report, _config(settings, report), libvirt)
            journal.save_report(report)
    finally:
        lock.release()
    if settings.json:
        print_json({"schema": SCHEMA, "run_id": record.run_id, "report": report})
    else:
        _print(record, result)
    if result.problems:
        sys.exit(ExitCode.GUEST_LOST)
    sys.exit(ExitCode.DEGRADED if result.warnings else ExitCode.OK)


def _print(record: ArmedRecord, result: Recovered) -> None:
    for name, problem in result.problems.items():
        out().print(f"[bold red]guest {escape(name)}:[/] {escape(problem)}")
    for warning in result.warnings:
        out().print(f"[yellow]warning:[/] {escape(warning)}")
    running = [guest.name for guest in record.guests if guest.name not in result.problems]
    if running:
        out().print(f"run {record.run_id}: these guests run again: {escape(', '.join(running))}")


def _config(settings: Settings, report: Report) -> Config:
    """The update may have broken the configuration: that must not keep clocks from being set."""
    try:
        return settings.load_config()
    except InputError as error:
        report.reasons.append(f"clocks are set by the default configuration: {error}")
        return Config()


class _Libvirt:
    """The connection, opened when it is first needed."""

    def __init__(self, uri: str, timeout_ns: int) -> None:
        self._uri = uri
        self._timeout_ns = timeout_ns
        self._hypervisor: Hypervisor | None = None

    def __call__(self) -> Hypervisor:
        if self._hypervisor is None:
            self._hypervisor = Hypervisor(self._uri, timeout_ns=self._timeout_ns)
        return self._hypervisor


@dataclass(frozen=True, slots=True)
class _ClockHands:
    core: HostClock
    clocks: Clocks
    links: Links


def _correct_clocks(record: ArmedRecord, report: Report, config: Config, libvirt: _Libvirt) -> None:
    """The guests run; now their clocks. What cannot be done is in the report."""
    try:
        hypervisor = libvirt()
    except (HypervisorError, DeadlineError) as error:
        report.reasons.append(f"guests' clocks are not verified: {error}")
        return
    hands = _ClockHands(HostClock(), Clocks(Agents(hypervisor), config.clock), Links(hypervisor))
    guests = {guest.uuid: guest for guest in report.guests}
    clocks = GuestClocks([guest.uuid for guest in record.guests], config, hands, guests)
    clocks.recall(record)
    report.reasons += [text for text, _wrong in clocks.correct()]
    stepped = clocks.conclude_host()
    report.reasons += [stepped] if stepped else []
    report.host_clock = clocks.host


def _hands(record: ArmedRecord, libvirt: _Libvirt) -> RecoveryHands:
    cgroups = Cgroups(Path(record.cgroup2)) if record.cgroup2 is not None else None

    def thaw(guest: ArmedGuest) -> None:
        alive = processes.is_same(guest.pid, guest.started)
        if cgroups is None or guest.cgroup is None:
            processes.continue_process(guest.pid, guest.started)
        elif guest.home_cgroup is not None:
            cgroups.restore(guest.pid if alive else None, guest.cgroup, guest.home_cgroup)
        else:
            cgroups.thaw(guest.cgroup)

    def is_frozen(guest: ArmedGuest) -> bool:
        if cgroups is None:
            return processes.is_stopped(guest.pid)
        return cgroups.stays_frozen(guest.home_cgroup or guest.cgroup or "/", _THAW_NS)

    def connect(hypervisor: RecoveryHypervisor, guest: ArmedGuest) -> None:
        assert isinstance(hypervisor, Hypervisor)
        Links(hypervisor).set(guest.uuid, guest.links, "up")

    return RecoveryHands(
        thaw=thaw,
        is_frozen=is_frozen,
        boot_id=processes.boot_id(),
        restore_memory_min=cgroups.set_memory_min if cgroups is not None else lambda _: None,
        hypervisor=libvirt,
        connect=connect,
        is_alive=processes.is_same,
        resume_by_monitor=resume_guest_by_monitor,
    )


def _report(journal: Journal, record: ArmedRecord, result: Recovered) -> Report | None:
    """The run's report: its own where it lived to write one, else what its keeper measured."""
    told = [f"guest {name}: {problem}" for name, problem in result.problems.items()]
    told += result.warnings
    directory = journal.directory(record.run_id)
    if (directory / "report.json").exists():
        report = journal.report(record.run_id)
        report.reasons += told or ["`hostupdate resume` let its guests run"]
        return report
    try:
        plan = msgspec.json.decode((directory / "plan.json").read_bytes(), type=Plan)
        started_ns = (directory / "plan.json").stat().st_mtime_ns
    except (OSError, msgspec.DecodeError):
        return None
    report = new_report(record.run_id, plan, started_ns)
    report.outcome = Outcome.FAILED
    report.exit_code = ExitCode.GUEST_LOST if result.problems else ExitCode.FAILED
    report.reasons.append(
        f"the run was interrupted: its process, pid {record.pid}, died; "
        "which steps had run is not known, none was undone"
    )
    report.reasons += told
    if record.method is PauseMethod.FREEZE:
        _add_blackouts(report, record, read_record(directory / "keeper.log"))
    return report


def _add_blackouts(report: Report, record: ArmedRecord, keeper: KeeperRecord | None) -> None:
    """From the keeper's record. Not for stopped guests: thawed, they do not run yet."""
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
