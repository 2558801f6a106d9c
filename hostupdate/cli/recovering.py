"""Recovers one interrupted run: guests, clocks, steps, others; each whatever the rest became."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

import msgspec
from rich.markup import escape

from hostupdate import faults
from hostupdate.cli.late_clocks import LateClocks
from hostupdate.cli.recovery_hands import Libvirt, recovery_hands
from hostupdate.cli.settings import Settings
from hostupdate.cli.terminal import err, out
from hostupdate.config import Config
from hostupdate.core.keeper import read_record
from hostupdate.engine.aftermath import conclude, late_report
from hostupdate.engine.handover import PATIENCE_NS
from hostupdate.engine.recovery import Recovered, recover
from hostupdate.engine.unwind import Unwind
from hostupdate.errors import HostUpdateError, InputError
from hostupdate.handover.records import ParkedRecords
from hostupdate.host import processes
from hostupdate.host.guard import Guard
from hostupdate.host.survivors import Survivors
from hostupdate.journal import Journal, RunJournal
from hostupdate.model import ExitCode, Impact, PendingRecord, Report
from hostupdate.unwinding import Kind, Record

_ALL_PARKED = "(all that are parked)"
_COMMITTED = Record(kind=Kind.COMMITTED, action=None, problem="", monotonic_ns=0)


class Recovery:
    """One interrupted run: guests, clocks, steps, others; each whatever became of the others."""

    def __init__(self, settings: Settings, journal: Journal, record: PendingRecord) -> None:
        self._settings = settings
        self._journal = journal
        self._record = record
        self._libvirt = Libvirt(record.uri, record.libvirt_timeout_ns)
        self._same_boot = record.boot_id == processes.boot_id()
        self._result = Recovered(problems={})
        self._unwind: Unwind | None = None
        self._warnings: list[str] = []
        self._told: list[str] = []  #: those that were parked, or being handed over, and run
        self._ended: list[str] = []  #: those that had ended before they were parked
        self._unnoted: dict[str, str] = {}  #: those that run and keep their record, and why
        self._notes: list[str] = []  #: nothing that is left to do
        self._parked = False  #: some guest is, still
        self._rehearsing = record.rehearsing  #: until that guest is as it was
        self._stopped: set[str] = set()  #: its name, where it may still be stopped
        self._moved = False  #: some guest is under its new QEMU: the update stays
        self._noted = False  #: the journal says so, or nobody will ask it
        self._failure: HostUpdateError | None = None  #: why there is no journal
        self._clocks = LateClocks(record, self._libvirt, self._config)
        self.report: Report | None = None

    @property
    def exit_code(self) -> ExitCode:
        if self._result.problems:
            return ExitCode.GUEST_LOST
        return ExitCode.DEGRADED if self._warnings or self._unnoted else ExitCode.OK

    def execute(self) -> None:
        record = self._record
        if record.guests:
            hands = recovery_hands(record, self._libvirt)
            self._result = recover(record, hands, record.libvirt_timeout_ns)
        self._warnings += self._result.warnings
        run: RunJournal | None = None
        try:
            run = self._journal.reopen(record)
        except HostUpdateError as error:
            self._failure = error
        self._unpark(run)
        faults.point("resume.guests-run")
        if run is None:
            assert self._failure is not None
            self._without_journal(self._failure)
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
        from hostupdate.cli.bringing_back import Back, bring_back, some_let_run, some_moved_on

        moved = some_moved_on(self._settings.state)
        with suppress(HostUpdateError):  # if libvirt is away, nothing tells of it
            moved = moved or some_let_run(
                self._settings, self._config(), self._libvirt(), self._record.run_id
            )
        if moved:
            with suppress(HostUpdateError):  # it is told of with that guest
                self._commit(run)
        committed = run is None or self._moved
        if run is not None and not committed:
            with suppress(HostUpdateError):
                committed = self._before_guests(run)
        back = Back()
        stopped = self._end_rehearsal(run)
        if records.uuids():
            try:
                back = bring_back(
                    self._settings,
                    self._config(),
                    self._libvirt.wait(PATIENCE_NS),
                    self._record.run_id,
                    committed=committed,
                    moved_on=lambda: self._commit(run),
                )
            except HostUpdateError as error:
                back.problems[_ALL_PARKED] = str(error)
        self._told += [name for name in back.running if name not in self._told]
        self._ended += back.ended
        self._unnoted = back.unnoted
        over = {_ALL_PARKED, *back.running, *back.ended, *self._stopped}
        before = {n: text for n, text in self._result.problems.items() if n not in over}
        self._stopped = set(stopped)
        self._result = Recovered(
            problems=before | stopped | back.problems,
            unfinished=self._result.unfinished,
            warnings=self._result.warnings,
        )
        self._parked = bool(records.uuids())

    def _end_rehearsal(self, run: RunJournal | None) -> dict[str, str]:
        """The guest whose rehearsal was interrupted runs; else what is wrong, by its name."""
        if not self._rehearsing:
            return {}
        from hostupdate.cli.handing_over import end_rehearsal

        try:
            end_rehearsal(self._libvirt.wait(PATIENCE_NS), self._rehearsing)
        except HostUpdateError as error:
            return {
                self._name(run, self._rehearsing): f"its rehearsal may have stopped it: {error}"
            }
        self._rehearsing = ""
        return {}

    def _name(self, run: RunJournal | None, uuid: str) -> str:
        """A guest's name by the run's plan; its uuid where that cannot be read."""
        with suppress(HostUpdateError):
            plan = run.plan() if run is not None else None
            for guest in plan.guests if plan is not None else ():
                if guest.uuid == uuid:
                    return guest.name
        return uuid

    def _commit(self, run: RunJournal | None) -> None:
        """Has the journal say, once, that the update stays. HostUpdateError: it does not, and a
        later recovery would undo it: what else tells of that has to stay.

        Not once the update has been undone: a guest that comes back after that changes nothing.
        """
        if self._noted or (self._unwind is not None and not self._unwind.committed):
            return
        self._moved = True
        if run is None:
            assert self._failure is not None
            if not _is_damage(self._failure):
                raise self._failure
        else:
            try:
                if run.plan() is not None and not _is_committed(run.records()):
                    run.note(Kind.COMMITTED)
            except InputError:
                pass  # it is moved away: nobody will undo anything by it
        self._noted = True

    def _before_guests(self, run: RunJournal) -> bool:
        """Undoes what was done while guests were parked; whether the update is in place instead."""
        plan, records = run.plan(), run.records()
        if plan is None or _is_committed(records):
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
            self._attempt("journal", lambda: self._commit(run))
        records = run.records()
        if self._moved and not _is_committed(records):  # it cannot be said
            records = (*records, _COMMITTED)
        self.report = run.report()
        if plan is not None and (not records or records[-1].kind is not Kind.RECOVERING):
            self._attempt("journal", lambda: run.note(Kind.RECOVERING))
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
                self._correct_clocks()
            self._clocks.conclude(self.report)
            conclude(self.report, self._result, self._unwind)
        elif self.report is not None and (record.guests or self._told or self._result.problems):
            self._correct_clocks()
            self._clocks.conclude(self.report)
            ran = self._running()
            if ran:
                self.report.reasons.append(f"`hostupdate resume` let run: {', '.join(ran)}")
            told = [f"guest {name}: {text}" for name, text in self._result.problems.items()]
            self.report.reasons += [text for text in told if text not in self.report.reasons]
        unclear = False
        if plan is not None and plan.actual is Impact.HANDOVER and not self._parked:
            unclear = not self._attempt("clearing up", self._clear_up)
        faults.point("resume.unwound")
        held = self._let_go()
        if self.report is not None:
            report = self.report
            report.reasons += [*self._notes, *self._remarks()]
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
        if not _is_damage(error):
            return  # once there is room again, or whatever it lacks, the rest can be done
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
        """The guests run; now their clocks. What cannot be done is in the report."""
        if self.report is not None:
            self._clocks.correct(self.report, self._told)

    def _running(self) -> list[str]:
        """Names of the guests that run again."""
        names = [guest.name for guest in self._record.guests] + self._told
        return [name for name in dict.fromkeys(names) if name not in self._result.problems]

    def _remarks(self) -> list[str]:
        """What is to be said of guests that are no problem."""
        return [
            *(f"guest {name}: it had ended before it was parked" for name in self._ended),
            *(f"guest {name}: it runs, and is not cleared up: {why}; run `hostupdate resume`"
              for name, why in self._unnoted.items()),
        ]  # fmt: skip

    def show(self) -> None:
        """For people."""
        console = out()
        run_id, result, unwind = self._record.run_id, self._result, self._unwind
        for name, problem in result.problems.items():
            console.print(f"[bold red]guest {escape(name)}:[/] {escape(problem)}")
        for warning in self._warnings:
            console.print(f"[yellow]warning:[/] {escape(warning)}")
        for remark in self._remarks():
            console.print(escape(remark))
        running = self._running()
        if running:
            console.print(f"run {run_id}: these guests run again: {escape(', '.join(running))}")
        if unwind is not None:
            undone = [step.name for step in unwind.steps.values() if step.undone]
            end = "it was undone, but for the above" if unwind.problems else "it was undone"
            if unwind.committed:
                end = "its update was in place and stays"
            names = f": {escape(', '.join(undone))}" if undone else ""
            console.print(f"run {run_id} was interrupted; {end}{names}")
        elif not (running or result.problems or self._warnings or self._remarks()):
            console.print(f"run {run_id} had nothing left to be resumed or undone")


def _is_committed(records: Sequence[Record]) -> bool:
    return any(record.kind is Kind.COMMITTED for record in records)


def _is_damage(error: HostUpdateError) -> bool:
    """Of a journal: it will not be read any more. What a newer version wrote is not damaged."""
    return isinstance(error, InputError) and error.field != "user_version"


def _tell(text: str) -> None:
    err().print(escape(text))
