"""Recovers one interrupted run: guests, clocks, steps, others; each whatever the rest became."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec
from rich.markup import escape

from hostupdate import faults
from hostupdate.cli.compose import (
    HostClock,
    resume_guest_by_monitor,
)
from hostupdate.cli.settings import Settings
from hostupdate.cli.terminal import err, out
from hostupdate.clocks import Clocks
from hostupdate.config import Config
from hostupdate.core.keeper import read_record
from hostupdate.engine.aftermath import conclude, late_report
from hostupdate.engine.clocks import GuestClocks
from hostupdate.engine.handover import PATIENCE_NS
from hostupdate.engine.recovery import (
    Recovered,
    RecoveryHands,
    RecoveryHypervisor,
    recover,
)
from hostupdate.engine.unwind import Unwind
from hostupdate.errors import (
    DeadlineError,
    HostUpdateError,
    HypervisorError,
    InputError,
)
from hostupdate.guests import Hypervisor
from hostupdate.guests.agent import Agents
from hostupdate.guests.links import Links
from hostupdate.handover.records import ParkedRecords
from hostupdate.host import processes
from hostupdate.host.cgroups import Cgroups
from hostupdate.host.guard import Guard
from hostupdate.host.survivors import Survivors
from hostupdate.journal import Journal, RunJournal
from hostupdate.model import ArmedGuest, ExitCode, Impact, PendingRecord, Report
from hostupdate.unwinding import Kind

#: How long a guest that was told to run may go on being frozen.
_THAW_NS = 1_000_000_000
_POLL_S = 0.1
_ALL_PARKED = "(all that are parked)"


class Recovery:
    """One interrupted run: guests, clocks, steps, others; each whatever became of the others."""

    def __init__(self, settings: Settings, journal: Journal, record: PendingRecord) -> None:
        self._settings = settings
        self._journal = journal
        self._record = record
        self._libvirt = _Libvirt(record.uri, record.libvirt_timeout_ns)
        self._same_boot = record.boot_id == processes.boot_id()
        self._result = Recovered(problems={})
        self._unwind: Unwind | None = None
        self._warnings: list[str] = []
        self._told: list[str] = []
        self._notes: list[str] = []  #: nothing that is left to do
        self._parked = False  #: some guest is, still
        self._rehearsing = record.rehearsing  #: until that guest is as it was
        self._moved = False  #: some guest had been let run under its new QEMU
        self.report: Report | None = None

    @property
    def exit_code(self) -> ExitCode:
        if self._result.problems:
            return ExitCode.GUEST_LOST
        return ExitCode.DEGRADED if self._warnings else ExitCode.OK

    def execute(self) -> None:
        record = self._record
        if record.guests:
            self._result = recover(record, _hands(record, self._libvirt), record.libvirt_timeout_ns)
        self._warnings += self._result.warnings
        run: RunJournal | None = None
        failure: HostUpdateError | None = None
        try:
            run = self._journal.reopen(record)
        except HostUpdateError as error:
            failure = error
        self._unpark(run)
        faults.point("resume.guests-run")
        if run is None:
            assert failure is not None
            self._without_journal(failure)
            return
        try:
            self._finish(run)
        except HostUpdateError as error:
            run.close()
            self._without_journal(error)
        finally:
            run.close()

    def _unpark(self, run: RunJournal | None) -> None:
        """Guests that are parked, or were being handed over, run again. Without its journal the
        run's steps cannot be undone: its update stays."""
        records = ParkedRecords(self._settings.state)
        if not (records.uuids() or self._rehearsing):
            return
        from hostupdate.cli.bringing_back import bring_back, some_moved_on
        from hostupdate.cli.handing_over import end_rehearsal

        committed = run is None or some_moved_on(self._settings.state)
        if run is not None and not committed:
            with suppress(HostUpdateError):
                committed = self._before_guests(run)
        problems: dict[str, str] = {}
        told: list[str] = []
        moved = False
        try:
            hypervisor = self._libvirt.wait(PATIENCE_NS)
            if self._rehearsing:
                end_rehearsal(hypervisor, self._rehearsing)
                self._rehearsing = ""
            config = self._config()
            problems, told, moved = bring_back(
                self._settings, config, hypervisor, self._record.run_id, committed=committed
            )
        except HostUpdateError as error:
            problems = {_ALL_PARKED: str(error)}
        self._told += [name for name in told if name not in self._told]
        self._moved = self._moved or moved
        before = {
            name: problem
            for name, problem in self._result.problems.items()
            if name != _ALL_PARKED and name not in told
        }
        self._result = Recovered(
            problems=before | problems,
            unfinished=self._result.unfinished,
            warnings=self._result.warnings,
        )
        self._parked = bool(records.uuids())

    def _before_guests(self, run: RunJournal) -> bool:
        """Undoes what was done while guests were parked; whether the update is in place instead."""
        plan, records = run.plan(), run.records()
        if plan is None or any(record.kind is Kind.COMMITTED for record in records):
            return True
        if run.report() is not None:  # the run has undone all that it did itself
            return False
        directory = self._journal.directory(self._record.run_id)
        survivors = Survivors(self._record.run_id, directory)
        early = Unwind(plan, records, survivors, run, _tell, same_boot=self._same_boot)
        early.before_guests()
        self._warnings += early.problems
        return False

    def _clear_up(self) -> None:
        from hostupdate.cli.bringing_back import clear_up

        clear_up(self._settings.state, self._config(), lambda: self._libvirt.wait(PATIENCE_NS))

    def _config(self) -> Config:
        """The update may have broken it."""
        try:
            return self._settings.load_config()
        except InputError as error:
            text = f"the default configuration is used: {error}"
            self._notes += [] if text in self._notes else [text]
            return Config()

    def _finish(self, run: RunJournal) -> None:
        record = self._record
        plan = run.plan()
        if self._moved:  # the run died before it could say so
            self._attempt("journal", lambda: run.note(Kind.COMMITTED))
        records = run.records()
        self.report = run.report()
        self._attempt("journal", lambda: run.note(Kind.RECOVERING) if plan else None)
        if plan is not None and self.report is None:
            directory = self._journal.directory(record.run_id)
            keeper = None
            with suppress(OSError):  # it tells of a blackout's length, no more
                keeper = read_record(directory / "keeper.log")
            self.report = late_report(plan, record, run.began_realtime_ns(), keeper)
            self._correct_clocks()
            survivors = Survivors(record.run_id, directory)
            self._unwind = Unwind(plan, records, survivors, run, _tell, same_boot=self._same_boot)
            self._unwind.execute()
            self._warnings += self._unwind.problems
            if self._parked:  # what kept them from running may be undone now
                self._unpark(run)
            conclude(self.report, self._result, self._unwind)
        elif self.report is not None and (record.guests or self._told):
            self._correct_clocks()
            ran = [g.name for g in record.guests if g.name not in self._result.problems]
            if ran:
                self.report.reasons.append(f"`hostupdate resume` let run: {', '.join(ran)}")
            self.report.reasons += [f"guest {n}: {p}" for n, p in self._result.problems.items()]
        unclear = False
        if plan is not None and plan.actual is Impact.HANDOVER and not self._parked:
            unclear = not self._attempt("clearing up", self._clear_up)
        faults.point("resume.unwound")
        held = self._let_go()
        if self.report is not None:
            report = self.report
            report.reasons += self._notes
            self._attempt("the report is not kept", lambda: run.save_report(report))
        # The others run: their owners may pause them again.
        if self._result.unfinished or held or self._parked or self._rehearsing or unclear:
            left = msgspec.structs.replace(
                record, guests=self._result.unfinished, rehearsing=self._rehearsing
            )
            self._attempt("pending record", lambda: run.pend(left))
        else:
            self._attempt("journal", run.end)

    def _without_journal(self, error: HostUpdateError) -> None:
        """The guests come first, and need no journal; the steps cannot be known without it."""
        self._warnings.append(f"{error}; the steps that had run are not undone")
        held = self._let_go()
        if not isinstance(error, InputError) or error.field == "user_version":
            # Once there is room again, or whatever it lacks, the rest can be done: what a newer
            # version wrote is not damaged.
            return
        self._warnings.append(f"moved away as {self._journal.set_aside()}")
        if not (self._result.unfinished or held or self._parked or self._rehearsing):
            self._journal.drop_pending()

    def _let_go(self) -> bool:
        """Lets others act again; whether that is still to be done."""
        held = self._record.held
        if held is None:
            return False
        return not self._attempt("letting others act", lambda: Guard().restore(held))

    def _attempt(self, what: str, act: Callable[[], object]) -> bool:
        try:
            act()
        except (OSError, HostUpdateError) as error:
            self._warnings.append(f"{what}: {error}")
            return False
        return True

    def _correct_clocks(self) -> None:
        """The guests run; now their clocks. What cannot be done is in the report.

        Not after a boot: the guests that were paused ended before it, and the distance of the
        host's clocks that was written down would set whoever runs now to a time long past.
        """
        report = self.report
        if not self._same_boot:
            return
        paused = [guest.uuid for guest in self._record.guests]
        paused += (
            [guest.uuid for guest in report.guests if guest.name in self._told] if report else []
        )
        if report is None or not paused:
            return
        config = self._config()
        try:
            hypervisor = self._libvirt()
        except (HypervisorError, DeadlineError) as error:
            report.reasons.append(f"guests' clocks are not verified: {error}")
            return
        hands = _ClockHands(
            HostClock(), Clocks(Agents(hypervisor), config.clock), Links(hypervisor)
        )
        guests = {guest.uuid: guest for guest in report.guests}
        clocks = GuestClocks(paused, config, hands, guests)
        clocks.recall(self._record)
        report.reasons += [text for text, _wrong in clocks.correct()]
        stepped = clocks.conclude_host()
        report.reasons += [stepped] if stepped else []
        report.host_clock = clocks.host

    def show(self) -> None:
        """For people."""
        console = out()
        run_id, result, unwind = self._record.run_id, self._result, self._unwind
        for name, problem in result.problems.items():
            console.print(f"[bold red]guest {escape(name)}:[/] {escape(problem)}")
        for warning in self._warnings:
            console.print(f"[yellow]warning:[/] {escape(warning)}")
        running = [g.name for g in self._record.guests if g.name not in result.problems]
        running += [name for name in self._told if name not in result.problems]
        if running:
            console.print(f"run {run_id}: these guests run again: {escape(', '.join(running))}")
        if unwind is not None:
            undone = [step.name for step in unwind.steps.values() if step.undone]
            end = "it was undone, but for the above" if unwind.problems else "it was undone"
            if unwind.committed:
                end = "its update was in place and stays"
            names = f": {escape(', '.join(undone))}" if undone else ""
            console.print(f"run {run_id} was interrupted; {end}{names}")
        elif not (running or result.problems or self._warnings):
            console.print(f"run {run_id} had nothing left to be resumed or undone")


def _tell(text: str) -> None:
    err().print(escape(text))


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

    def wait(self, patience_ns: int) -> Hypervisor:
        """The same, from a daemon that may be about to start anew."""
        end_ns = time.monotonic_ns() + patience_ns
        while True:
            try:
                return self()
            except (HypervisorError, DeadlineError):
                if time.monotonic_ns() >= end_ns:
                    raise
                time.sleep(_POLL_S)


@dataclass(frozen=True, slots=True)
class _ClockHands:
    core: HostClock
    clocks: Clocks
    links: Links


def _hands(record: PendingRecord, libvirt: _Libvirt) -> RecoveryHands:
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
