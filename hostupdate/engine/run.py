"""One run: a plan's actions in their order, and on failure guests first, then undo in reverse."""

from __future__ import annotations

import dataclasses
import gc
import os
import time
from collections.abc import Callable

import msgspec

from hostupdate import faults
from hostupdate.config import Config
from hostupdate.engine.clocks import GuestClocks
from hostupdate.engine.handover import Handover
from hostupdate.engine.outcome import Outcomes, new_report
from hostupdate.engine.pause import Pause
from hostupdate.engine.ports import Hands
from hostupdate.engine.residency import Residency
from hostupdate.engine.shelter import Shelter
from hostupdate.engine.stepping import Stepping
from hostupdate.engine.telling import Telling
from hostupdate.errors import HostUpdateError, JournalError
from hostupdate.model import Action, Impact, Phase, PhaseReport, Plan, Report
from hostupdate.unwinding import Kind


class Run:
    """Executes one plan once. The journal has begun the run already."""

    def __init__(self, run_id: str, plan: Plan, config: Config, hands: Hands) -> None:
        self._plan = plan
        self._config = config
        self._hands = hands
        self._report = new_report(run_id, plan, time.time_ns())
        guests = {guest.uuid: guest for guest in self._report.guests}
        self._pause = Pause(plan, config, hands, guests)
        self._residency = Residency(plan, hands, guests)
        self._clocks = GuestClocks([g.uuid for g in plan.paused], config, hands, guests)
        self._report.host_clock = self._clocks.host
        self._shelter = Shelter(plan, config, hands, self._clocks)
        self._outcomes = Outcomes(plan, hands, self._pause, self._report)
        self._handover = Handover(
            plan, hands, guests, self._outcomes.degrade, config.handover.workers or 1
        )
        self._stepping = Stepping(plan, hands, self._pause, self._handover, self._report)
        self._undo: list[tuple[int, Action, Callable[[], None]]] = []
        self._telling = Telling(hands.progress)
        self._committed = False
        #: Guests are not running in the blackout, whatever stops them.
        self._dark = plan.method is not None or plan.actual is Impact.HANDOVER
        self._mute = False  #: the journal has failed: said once
        handover = self._handover
        pause, shelter, clocks, stepping = self._pause, self._shelter, self._clocks, self._stepping
        #: kind of action -> what it does, and what takes it back
        self._doing: dict[str, tuple[Callable[[Action], None], Callable[[Action], None] | None]] = {
            "guard": (self._guard, shelter.let_go),
            "step": (stepping.run, stepping.undo),
            "clocks-before": (lambda _: clocks.measure(), None),
            "record": (shelter.record, lambda _: self._forget()),
            "measure": (lambda _: self._residency.measure(), None),
            "isolate": (shelter.isolate, lambda _: shelter.bring_home()),
            "protect": (shelter.protect, lambda _: shelter.unprotect()),
            "keeper": (self._keep, pause.release),
            "recheck": (shelter.recheck, None),
            "links-down": (lambda _: clocks.disconnect(), lambda _: clocks.connect()),
            "arm": (pause.arm, pause.disarm),
            "stop": (pause.stop, None),
            "freeze": (pause.freeze, None),
            "digest": (lambda _: self._residency.digest(), None),
            "compare": (self._compare, None),
            "thaw": (pause.thaw, None),
            "resume": (pause.resume, None),
            "clocks": (self._correct, None),
            "links-up": (lambda _: clocks.connect(), None),
            "disarm": (pause.disarm, None),
            "release": (self._release, None),
            "verify": (self._verify, None),
            "unguard": (self._unguard, None),
            "keep-qemu": (handover.keep_qemu, lambda _: handover.drop_kept()),
            "warm": (handover.warm, None),
            "rehearse": (handover.rehearse, None),
            "prepare": (handover.prepare, handover.clear),
            "watch": (handover.begin_watch, handover.end_watch),
            "park": (handover.park, None),
            "unpark": (handover.unpark, None),
            "commit": (self._commit_guest, None),
            "clear": (handover.clear, None),
        }

    def execute(self) -> Report:
        """Runs to the end, whatever happens, and returns the report, which is in the journal then
        (or says why it is not).

        Raises nothing that went wrong in the run: the report's outcome, exit code and reasons say
        it. Every guest that was paused runs when this returns, or is named in the reasons.
        """
        self._attempt("versions", self._versions_before)
        try:
            for number, action in enumerate(self._plan.actions):
                self._enter(action.phase)
                self._perform(number, action)
            if not self._committed:
                self._commit()
        except BaseException as error:  # a bug of ours included: guests run before all else
            if self._committed or self._handover.some_moved_on():
                if not self._committed:
                    self._commit()
                self._outcomes.degrade(_words(error))
                self._attempt("letting guests run", self._handover.let_run)
                if self._handover.began:
                    self._attempt("setting clocks", self._correct_clocks)
                self._attempt("clearing up", self._handover.clear)
                self._tell_steps_left()
                self._tell_keeper_problem()
                self._attempt("letting others act", self._shelter.let_go)
            else:
                self._fail(error)
        self._end_phase()
        self._telling.release()
        self._attempt("ending steps", self._hands.steps.reap)
        self._attempt("host clock", self._conclude_host)
        self._attempt("versions", self._versions_after)
        self._attempt("output of steps", self._outcomes.collect_steps)
        self._attempt("looking at guests", self._learn_places)
        self._outcomes.conclude(self._committed, self._handover.problems(), self._handover.touched)
        self._end()
        return self._report

    def _end(self) -> None:
        """The report into the journal; the run has ended there, unless recovery is needed."""
        journal = self._hands.journal
        problem = ""
        writes: list[Callable[[], None]] = [lambda: journal.save_report(self._report)]
        left = self._pause.unresumed() or self._handover.unfinished
        if not (left or journal.pending.held or journal.pending.rehearsing):
            writes.append(journal.end)
        for write in writes:
            try:
                write()
            except (OSError, HostUpdateError) as error:  # the caller has the report all the same
                problem = problem or f"the report is not kept: {_words(error)}"
        if problem:
            self._outcomes.degrade(problem)
            self._outcomes.judge(self._committed)

    def _attempt(self, what: str, act: Callable[[], object]) -> bool:
        """What must not keep the rest of the run from happening. A failure degrades the run."""
        try:
            act()
        except Exception as error:
            self._outcomes.degrade(f"{what}: {_words(error)}")
            return False
        return True

    def _enter(self, phase: Phase) -> None:
        phases = self._report.phases
        if phases and phases[-1].name is phase:
            return
        self._end_phase()
        paused = phase is Phase.BLACKOUT and self._dark
        self._telling.release()
        self._telling.phase(phase, paused=paused)
        if paused:
            journal = self._hands.journal
            journal.pend(msgspec.structs.replace(journal.pending, armed=True))
            journal.blackout(on=True)
        phases.append(PhaseReport(name=phase, start_ns=time.monotonic_ns()))
        if paused:
            if self._plan.method is not None:
                self._residency.count_faults()
            self._telling.hold()
            gc.collect()
            gc.freeze()
            gc.disable()
        if phase is Phase.FINISH and not self._dark:
            self._commit()

    def _end_phase(self) -> None:
        if self._report.phases and self._report.phases[-1].end_ns is None:
            self._report.phases[-1].end_ns = time.monotonic_ns()
            gc.enable()
            if self._report.phases[-1].name is Phase.BLACKOUT and self._dark:
                self._attempt("journal", lambda: self._hands.journal.blackout(on=False))

    def _perform(self, number: int, action: Action) -> None:
        if not self._committed:
            self._stepping.check_interrupted()
        self._telling.started(action)
        self._report.actions.append(action.title)
        start_ns = time.monotonic_ns()
        problem = ""
        do, undo = self._doing[action.kind]
        place = f"{action.kind}:{action.step}" if action.step else action.kind
        try:
            self._note(Kind.INTENT, number)
            if undo is not None:
                self._undo.append((number, action, lambda: undo(action)))
            faults.point(f"{place}.begin")
            do(action)
            faults.point(f"{place}.end")
            self._note(Kind.DONE, number)
        except BaseException as error:
            problem = _words(error)
            self._note(Kind.FAILED, number, problem, must=False)
            raise
        finally:
            self._telling.ended(action, time.monotonic_ns() - start_ns, problem)

    def _note(self, kind: Kind, number: int | None, problem: str = "", must: bool = True) -> None:
        """``must``: a run that cannot write down what it does is over, while it can be undone."""
        try:
            self._hands.journal.note(kind, number, problem)
        except JournalError as error:
            if must and not self._committed:
                raise
            if not self._mute:
                self._outcomes.degrade(str(error))
            self._mute = True

    def _commit(self) -> None:
        """The update stays."""
        self._note(Kind.COMMITTED, None, must=not self._handover.committed)
        self._committed = True

    # ---- the actions that are not one hand's own

    def _keep(self, action: Action) -> None:
        fds = self._residency.open_lockable()
        try:
            self._pause.keep(action, fds)
        finally:
            for fd in fds:
                os.close(fd)
        if fds:
            self._report.locked_bytes = self._pause.watch.locked_bytes
        if self._pause.watch.lock_errno:
            why = os.strerror(self._pause.watch.lock_errno)
            self._outcomes.degrade(f"not all of the guests' RAM could be locked: {why}")

    def _compare(self, _action: Action) -> None:
        self._residency.compare()
        if self._pause.watch.alarmed():
            self._residency.disown("the keeper had let the guests run before the second digest")

    def _correct(self, _action: Action) -> None:
        # With links held, the keeper is armed until they are up again.
        held = self._config.clock.hold_network and self._plan.method is not None
        self._correct_clocks(self._pause.watch.deadline_ns if held else None)

    def _correct_clocks(self, limit_ns: int | None = None) -> None:
        skip = {**self._pause.problems(), **self._handover.problems()}
        for text, wrong in self._clocks.correct(limit_ns, skip=skip):
            if wrong or self._config.clock.require:
                self._outcomes.degrade(text)
            else:
                self._report.reasons.append(text)

    def _commit_guest(self, action: Action) -> None:
        self._handover.commit(action)
        if self._handover.committed and not self._committed:
            self._commit()
        if not self._handover.dark:
            self._telling.release()
            self._telling.hold()

    def _learn_places(self) -> None:
        """Guests have come under other processes, also where libvirt is away."""
        port = self._hands.handover
        if port is None or not self._handover.began:
            return
        places = self._hands.places
        for uuid, (pid, started) in port.processes([*places]).items():
            places[uuid] = dataclasses.replace(places[uuid], pid=pid, started=started)

    def _release(self, action: Action) -> None:
        # The guests run on the updated host: what fails here must not undo that.
        self._attempt("ending the keeper", lambda: self._pause.release(action))
        self._attempt("putting cgroups back", self._shelter.bring_home)
        self._attempt("putting memory.min back", self._shelter.unprotect)
        self._attempt("shortening the record", self._forget)

    def _forget(self) -> None:
        """Recovery must know the guests that `hostupdate resume` has something to do for."""
        self._shelter.forget(self._pause.unresumed())

    def _guard(self, _action: Action) -> None:
        self._report.reasons += self._shelter.hold()

    def _unguard(self, _action: Action) -> None:
        self._attempt("letting others act", self._shelter.let_go)

    def _verify(self, _action: Action) -> None:
        self._attempt("looking at guests", self._learn_places)
        self._outcomes.verify()
        if self._pause.watch.problem:
            self._outcomes.degrade(self._pause.watch.problem)
        if self._plan.method is not None:
            for finding in self._residency.conclude():
                self._outcomes.degrade(finding)
        self._tell_keeper_problem()
        if not self._committed:
            self._commit()

    def _tell_steps_left(self) -> None:
        """The update stays, and what should have come after it has not."""
        begun = {step.name for step in self._report.steps}
        left = [a.step for a in self._plan.actions if a.step and a.step not in begun]
        if left:
            self._outcomes.degrade(f"steps that were not run any more: {', '.join(left)}")

    def _tell_keeper_problem(self) -> None:
        if self._handover.watch.problem:
            self._outcomes.degrade(self._handover.watch.problem)
            self._handover.watch.problem = ""

    # ---- failure

    def _fail(self, error: BaseException) -> None:
        self._report.reasons.append(_words(error))
        self._attempt("letting guests run", self._pause.let_run)
        if self._handover.at_stake or self._handover.unfinished:
            # The old QEMU may need what a step has taken away, a module.
            self._take_back(Phase.BLACKOUT)
            self._attempt("letting guests run", self._handover.let_run)
        if self._pause.began or self._handover.began:
            self._attempt("setting clocks", self._correct_clocks)
        self._end_phase()
        self._telling.release()
        self._take_back()
        if self._handover.problems():  # what kept them from running may be undone now
            self._attempt("letting guests run once more", self._handover.let_run)
            self._attempt("setting clocks", self._correct_clocks)
            self._attempt("clearing up", self._handover.clear)
        self._tell_keeper_problem()
        if self._pause.unresumed():
            self._attempt("resuming guests once more", self._pause.retry)
            self._attempt("shortening the record", self._forget)
        if self._pause.unresumed():
            names = ", ".join(self._pause.unresumed())
            self._report.reasons.append(
                f"not known to run: {names}; run `hostupdate resume` once libvirt answers"
            )
        if self._pause.began:
            self._report.reasons += self._residency.conclude()
        if self._pause.watch.problem:
            self._report.reasons.append(self._pause.watch.problem)

    def _take_back(self, phase: Phase | None = None) -> None:
        """Undoes the actions of that phase, or all that are left, the last one first."""
        wanted = [entry for entry in self._undo if phase in (None, entry[1].phase)]
        self._undo = [entry for entry in self._undo if entry not in wanted]
        for number, action, undo in reversed(wanted):
            problem = ""
            self._note(Kind.UNDOING, number, must=False)
            try:
                undo()
            except Exception as undo_error:  # the other undos run whatever this one does
                problem = _words(undo_error)
                self._report.reasons.append(f"undo of {action.title!r}: {problem}")
            done = Kind.UNDO_FAILED if problem else Kind.UNDONE
            self._note(done, number, problem, must=False)
            if action.undo:
                self._telling.undone(action, problem)

    # ---- versions, and the host's clock

    def _versions_before(self) -> None:
        self._report.versions.before = self._hands.versions()

    def _versions_after(self) -> None:
        self._report.versions.after = self._hands.versions()

    def _conclude_host(self) -> None:
        if stepped := self._clocks.conclude_host():
            self._outcomes.degrade(stepped)


def _words(error: BaseException) -> str:
    if isinstance(error, HostUpdateError) and error.remedy:
        return f"{error}; {error.remedy}"
    if isinstance(error, HostUpdateError | OSError):
        return str(error)
    return f"internal error: {type(error).__name__}: {error}"
