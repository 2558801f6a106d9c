"""One run: a plan's actions in their order, and on failure guests first, then undo in reverse."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable

from hostupdate.config import Config
from hostupdate.engine.clocks import GuestClocks
from hostupdate.engine.outcome import Outcomes, new_report
from hostupdate.engine.pause import Pause
from hostupdate.engine.ports import Hands
from hostupdate.engine.residency import Residency
from hostupdate.engine.telling import Telling
from hostupdate.errors import GuestError, HostUpdateError, Interrupted, StepError
from hostupdate.model import (
    Action,
    ArmedGuest,
    ArmedRecord,
    GuestState,
    Phase,
    PhaseReport,
    Plan,
    Protection,
    Report,
    StepReport,
)

#: For steps of stage and finish that name no time-out of their own.
_BROWNOUT_STEP_NS = 600_000_000_000
_UNDO_NS = 60_000_000_000


class Run:
    """Executes one plan once. ``uri`` is the hypervisor's, for whoever has to recover."""

    def __init__(self, run_id: str, plan: Plan, config: Config, hands: Hands, uri: str) -> None:
        self._run_id = run_id
        self._plan = plan
        self._config = config
        self._hands = hands
        self._uri = uri
        self._report = new_report(run_id, plan, time.time_ns())
        guests = {guest.uuid: guest for guest in self._report.guests}
        self._pause = Pause(plan, config, hands, guests)
        self._residency = Residency(plan, hands, guests)
        self._clocks = GuestClocks([g.uuid for g in plan.paused], config, hands, guests)
        self._report.host_clock = self._clocks.host
        self._outcomes = Outcomes(plan, hands, self._pause, self._report)
        self._undo: list[tuple[Action, Callable[[], None]]] = []
        self._memory_min: dict[str, tuple[str, str]] = {}
        self._telling = Telling(hands.progress)
        self._committed = False
        self._doing: dict[str, Callable[[Action], None]] = {
            "step": self._step,
            "clocks-before": lambda _: self._clocks.measure(),
            "record": self._record,
            "measure": lambda _: self._residency.measure(),
            "isolate": self._isolate,
            "protect": self._protect,
            "keeper": self._keep,
            "links-down": self._disconnect,
            "arm": self._arm,
            "stop": self._pause.stop,
            "freeze": self._pause.freeze,
            "digest": lambda _: self._residency.digest(),
            "compare": self._compare,
            "recheck": self._recheck,
            "thaw": self._pause.thaw,
            "resume": self._pause.resume,
            "clocks": self._correct,
            "links-up": lambda _: self._clocks.connect(),
            "disarm": self._pause.disarm,
            "release": self._release,
            "verify": self._verify,
        }

    def execute(self) -> Report:
        """Runs to the end, whatever happens, and returns the report, which is on disk then (or
        says why it is not).

        Raises nothing that went wrong in the run: the report's outcome, exit code and reasons say
        it. Every guest that was paused runs when this returns, or is named in the reasons.
        """
        self._attempt("versions", self._versions_before)
        try:
            for action in self._plan.actions:
                self._enter(action.phase)
                self._perform(action)
            self._committed = True
        except BaseException as error:  # a bug of ours included: guests run before all else
            if self._committed:
                self._outcomes.degrade(_words(error))
            else:
                self._fail(error)
        self._end_phase()
        self._telling.release()
        self._attempt("ending steps", self._hands.steps.reap)
        self._attempt("host clock", self._conclude_host)
        self._attempt("versions", self._versions_after)
        self._attempt("output of steps", self._outcomes.collect_steps)
        self._outcomes.conclude(self._committed)
        try:
            self._hands.journal.save_report(self._report)
        except (OSError, HostUpdateError) as error:  # the caller has it all the same
            self._outcomes.degrade(f"the report is not kept: {_words(error)}")
            self._outcomes.judge(self._committed)
        return self._report

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
        paused = phase is Phase.BLACKOUT and self._plan.method is not None
        self._telling.release()
        self._telling.phase(phase, paused=paused)
        phases.append(PhaseReport(name=phase, start_ns=time.monotonic_ns()))
        if paused:
            self._residency.count_faults()
            self._telling.hold()
            gc.collect()
            gc.freeze()
            gc.disable()
        else:
            gc.enable()
        if phase is Phase.FINISH and self._plan.method is None:
            self._committed = True

    def _end_phase(self) -> None:
        if self._report.phases and self._report.phases[-1].end_ns is None:
            self._report.phases[-1].end_ns = time.monotonic_ns()

    def _perform(self, action: Action) -> None:
        self._check_interrupted()
        self._telling.started(action)
        self._report.actions.append(action.title)
        start_ns = time.monotonic_ns()
        problem = ""
        try:
            self._doing[action.kind](action)
        except BaseException as error:
            problem = _words(error)
            raise
        finally:
            self._telling.ended(action, time.monotonic_ns() - start_ns, problem)

    def _check_interrupted(self) -> None:
        signal = self._hands.interrupts.pending()
        if signal is not None and not self._committed:
            raise Interrupted(f"stopped by {signal}")

    # ---- the actions that are not the pause's or the residency's own

    def _step(self, action: Action) -> None:
        now_ns = time.monotonic_ns()
        paused = action.phase is Phase.BLACKOUT and self._plan.method is not None
        if paused:
            deadline_ns = self._pause.steps_end_ns
            if action.timeout_ns is not None:
                deadline_ns = min(deadline_ns, now_ns + action.timeout_ns)
        else:
            deadline_ns = now_ns + (action.timeout_ns or _BROWNOUT_STEP_NS)
        wake_fds = [self._hands.interrupts.fileno()]
        if paused:
            wake_fds += self._pause.wake_fds
        report = StepReport(name=action.step, phase=action.phase)
        self._report.steps.append(report)
        self._undo.append((action, lambda: self._undo_step(action, report)))
        result = self._hands.steps.run(action.step, deadline_ns, wake_fds)
        report.exit, report.duration_ns, report.problem = (
            result.exit, result.duration_ns, result.problem,
        )  # fmt: skip
        if result.problem:
            self._check_interrupted()
            if signal := self._hands.interrupts.pending():
                report.problem += f" by {signal}"
            if paused and self._pause.alarmed():
                report.problem += ": the budget is over, the keeper has let the guests run"
            raise StepError(action.step, report.problem)

    def _undo_step(self, action: Action, report: StepReport) -> None:
        self._hands.steps.reap()
        if action.undo:
            report.undone = False
            report.undone = self._hands.steps.undo(action.step, _UNDO_NS)
            self._report.undone.append(action.step)

    def _record(self, action: Action) -> None:
        places = self._hands.places
        cgroups = self._hands.cgroups
        armed = []
        wanted = []
        for guest in self._plan.paused:
            place = places[guest.uuid]
            home = place.cgroup
            own = cgroups.own(guest.uuid) if cgroups is not None and guest.isolate else None
            if guest.protection is Protection.MEMORY_MIN and cgroups is not None and home:
                wanted.append((home, cgroups.memory_current(home)))
            armed.append(
                ArmedGuest(
                    name=guest.name,
                    uuid=guest.uuid,
                    pid=place.pid,
                    started=place.started,
                    cgroup=own or home,
                    home_cgroup=home if own else None,
                    links=self._clocks.links(guest.uuid),
                    skew_ns=self._clocks.skew_ns(guest.uuid),
                )
            )
        if cgroups is not None and wanted:
            self._memory_min = cgroups.memory_min_changes(wanted)
        assert self._plan.method is not None
        self._undo.append((action, self._drop_record))
        self._hands.journal.arm(
            ArmedRecord(
                run_id=self._run_id,
                boot_id=self._hands.boot_id,
                uri=self._uri,
                pid=os.getpid(),
                method=self._plan.method,
                libvirt_timeout_ns=self._config.deadlines.recovery_libvirt_ns,
                cgroup2=str(cgroups.mount) if cgroups is not None else None,
                memory_min={cgroup: old for cgroup, (old, _) in self._memory_min.items()},
                host_offset_ns=self._clocks.host.before_ns,
                guests=tuple(armed),
            )
        )

    def _isolate(self, action: Action) -> None:
        cgroups = self._hands.cgroups
        assert cgroups is not None
        self._undo.append((action, self._bring_home))
        for guest in self._plan.paused:
            place = self._hands.places[guest.uuid]
            if guest.isolate and place.cgroup is not None:
                try:
                    cgroups.isolate(place.pid, place.cgroup, guest.uuid)
                except GuestError as error:  # it knows the guest by its uuid
                    raise GuestError(guest.name, error.problem, remedy=error.remedy) from error

    def _bring_home(self) -> None:
        cgroups = self._hands.cgroups
        for guest in self._plan.paused:
            place = self._hands.places[guest.uuid]
            if guest.isolate and place.cgroup is not None and cgroups is not None:
                alive = self._hands.is_alive(place.pid, place.started)
                cgroups.restore(place.pid if alive else None, cgroups.own(guest.uuid), place.cgroup)

    def _protect(self, action: Action) -> None:
        assert self._hands.cgroups is not None
        self._undo.append((action, self._unprotect))
        self._hands.cgroups.set_memory_min({c: new for c, (_, new) in self._memory_min.items()})

    def _unprotect(self) -> None:
        if self._hands.cgroups is not None:
            old = {cgroup: old for cgroup, (old, _) in self._memory_min.items()}
            self._hands.cgroups.set_memory_min(old)

    def _keep(self, action: Action) -> None:
        self._undo.append((action, self._pause.release))
        fds = self._residency.open_lockable()
        try:
            self._pause.keep(action, fds)
        finally:
            for fd in fds:
                os.close(fd)
        if fds:
            self._report.locked_bytes = self._pause.locked_bytes
        if self._pause.lock_errno:
            why = os.strerror(self._pause.lock_errno)
            self._outcomes.degrade(f"not all of the guests' RAM could be locked: {why}")

    def _recheck(self, _action: Action) -> None:
        """Guests may have come, gone or been paused by their owners since the plan was made."""
        planned = {guest.uuid: guest for guest in self._plan.guests}
        now = {located.guest.uuid: located for located in self._hands.inventory()}
        for uuid, located in now.items():
            running = located.guest.state in (GuestState.RUNNING, GuestState.UNKNOWN)
            if running and (uuid not in planned or planned[uuid].state is not GuestState.RUNNING):
                raise GuestError(located.guest.name, "it was started since the plan was made")
        for guest in self._plan.paused:
            found = now.get(guest.uuid)
            if found is None or found.guest.state is not GuestState.RUNNING:
                state = GuestState.GONE if found is None else found.guest.state
                raise GuestError(guest.name, f"it is {state}; it ran when the plan was made")
            old, new = self._hands.places[guest.uuid], found.place
            if new is None or (new.pid, new.started) != (old.pid, old.started):
                raise GuestError(guest.name, "it was restarted since the plan was made")

    def _compare(self, _action: Action) -> None:
        self._residency.compare()
        if self._pause.alarmed():
            self._residency.disown("the keeper had let the guests run before the second digest")

    def _disconnect(self, action: Action) -> None:
        self._undo.append((action, self._clocks.connect))
        self._clocks.disconnect()

    def _correct(self, _action: Action) -> None:
        # With links held, the keeper is armed until they are up again.
        held = self._config.clock.hold_network
        self._correct_clocks(self._pause.deadline_ns if held else None)

    def _correct_clocks(self, limit_ns: int | None = None) -> None:
        for text, wrong in self._clocks.correct(limit_ns, skip=self._pause.problems()):
            if wrong or self._config.clock.require:
                self._outcomes.degrade(text)
            else:
                self._report.reasons.append(text)

    def _arm(self, action: Action) -> None:
        self._undo.append((action, self._pause.disarm))
        self._pause.arm(action)

    def _release(self, action: Action) -> None:
        # The guests run on the updated host: what fails here must not undo that.
        self._attempt("ending the keeper", lambda: self._pause.release(action))
        self._attempt("putting cgroups back", self._bring_home)
        self._attempt("putting memory.min back", self._unprotect)
        self._attempt("removing the armed record", self._drop_record)

    def _drop_record(self) -> None:
        """The record stays as long as `hostupdate resume` has something to do."""
        if not self._pause.unresumed():
            self._hands.journal.disarm()

    def _verify(self, _action: Action) -> None:
        self._outcomes.verify()
        if self._pause.keeper_problem:
            self._outcomes.degrade(self._pause.keeper_problem)
        for finding in self._residency.conclude():
            self._outcomes.degrade(finding)
        self._committed = True

    # ---- failure

    def _fail(self, error: BaseException) -> None:
        self._report.reasons.append(_words(error))
        self._attempt("letting guests run", self._pause.let_run)
        if self._pause.began:
            self._attempt("setting clocks", self._correct_clocks)
        self._end_phase()
        gc.enable()
        self._telling.release()
        for action, undo in reversed(self._undo):
            problem = ""
            try:
                undo()
            except Exception as undo_error:  # the other undos run whatever this one does
                problem = _words(undo_error)
                self._report.reasons.append(f"undo of {action.title!r}: {problem}")
            if action.undo:
                self._telling.undone(action, problem)
        self._undo.clear()
        if self._pause.unresumed():
            self._attempt("resuming guests once more", self._pause.retry)
            self._attempt("removing the armed record", self._drop_record)
        if self._pause.unresumed():
            names = ", ".join(self._pause.unresumed())
            self._report.reasons.append(
                f"not known to run: {names}; run `hostupdate resume` once libvirt answers"
            )
        if self._pause.began:
            self._report.reasons += self._residency.conclude()
        if self._pause.keeper_problem:
            self._report.reasons.append(self._pause.keeper_problem)

    # ---- versions, and the host's clock

    def _versions_before(self) -> None:
        self._report.versions.before = self._hands.versions()

    def _versions_after(self) -> None:
        self._report.versions.after = self._hands.versions()

    def _conclude_host(self) -> None:
        if stepped := self._clocks.conclude_host():
            self._outcomes.degrade(stepped)


def _words(error: BaseException) -> str:
    if isinstance(error, HostUpdateError | OSError):
        return str(error)
    return f"internal error: {type(error).__name__}: {error}"
