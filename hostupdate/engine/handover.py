"""Guests of one run come under another QEMU, each with its RAM left in place.

Happy path, for each guest: rehearse -> prepare -> park -> unpark -> commit -> clear.

Unhappy paths:

1. A rehearsal fails, or anything before the first park: nothing was at stake. A guest that it
   stopped is let run, by the keeper's recovery if need be.
2. A guest cannot be parked: it runs on under its old QEMU; :meth:`let_run` aborts.
3. A new QEMU does not take a guest: it comes back under the QEMU that was kept. While no guest has
   been let run under the new one the run fails and is undone; after that it goes on with those that
   remain where they are, and is degraded.
4. Neither QEMU takes it, or libvirt does not answer: it stays parked, with a record that
   ``hostupdate resume`` finishes, and needs a human.
5. This process dies: the keeper has the recovery command run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import msgspec

from hostupdate import faults
from hostupdate.engine.ports import HandoverPort, Hands
from hostupdate.engine.watch import Watch
from hostupdate.errors import (
    DeadlineError,
    GuestError,
    HostUpdateError,
    HypervisorError,
)
from hostupdate.handing import handover_ns
from hostupdate.model import Action, GuestReport, Impact, Plan
from hostupdate.parked import ParkedRecord, ParkedState

#: For a daemon that has died to be started again, by systemd, while a guest is parked.
PATIENCE_NS = 10_000_000_000
_POLL_S = 0.1
_RESUME = "run `hostupdate resume`"
_PARKED = (ParkedState.SAVED, ParkedState.STRIPPED)
_KNOWN = {
    ParkedState.LINKED: "whether it runs is not known",
    ParkedState.SAVED: "it stays parked",
    ParkedState.STRIPPED: "it stays parked",
    ParkedState.RUNNING: "it may stand still under its QEMU",
}


class Handover:
    """The guests that are handed over in one run, into ``reports``. ``degrade`` takes what is not
    as promised; ``workers``: how many guests are parked or unparked at a time."""

    def __init__(
        self,
        plan: Plan,
        hands: Hands,
        reports: dict[str, GuestReport],
        degrade: Callable[[str], None],
        workers: int,
    ) -> None:
        self._plan = plan
        self._hands = hands
        self._reports = reports
        self._degrade = degrade
        self._workers = workers
        self._all_at_once = any(not a.guest for a in plan.actions if a.kind == "park")
        handed = plan.actual is Impact.HANDOVER
        self._names = {guest.uuid: guest.name for guest in plan.paused} if handed else {}
        self._checked = {g.uuid for g in plan.paused if handed and not g.digest_reason}
        self._records: dict[str, ParkedRecord] = {}
        self._digests: dict[str, str] = {}
        self._problems: dict[str, str] = {}
        self._gone_on: set[str] = set()
        self._came_back: set[str] = set()  #: under their old QEMU
        self._patience_end_ns: int | None = None
        self.watch = Watch(hands.core, "the budget was over before a guest ran again")
        self.began = False  #: some guest may have been parked
        self.committed = False  #: some guest was let run under its new QEMU
        self.touched: set[str] = set()  #: guests that were stopped, for a rehearsal or in earnest
        self._given_up = False  #: no other guest is touched
        self._probing = False  #: a QEMU that was tried may run still

    @property
    def _port(self) -> HandoverPort:
        assert self._hands.handover is not None
        return self._hands.handover

    # ---- brownout

    def keep_qemu(self, _action: Action) -> None:
        """Keeps the QEMUs that guests run under now."""
        self._port.keep([*self._names])

    def drop_kept(self) -> None:
        """The undo of it, and its end. What a parked guest may need stays.

        HypervisorError, DeadlineError: a QEMU that was tried may run still.
        """
        parked = any(record.state in _PARKED for record in self._records.values())
        if not self._names or parked or self._problems:
            return
        while True:
            try:
                self._port.drop_kept()
                self._patience_end_ns = None
                self._probing = False
                return
            except (HypervisorError, DeadlineError) as error:
                self._probing = True
                if not self._patient():
                    error.remedy = _RESUME
                    raise

    def warm(self, _action: Action) -> None:
        """libvirt learns what the new QEMU can; it would do so in the blackout else."""
        self._port.warm([*self._names])

    def rehearse(self, action: Action) -> None:
        """GuestError: the new QEMU does not take it, in its own words."""
        journal = self._hands.journal
        uuid = action.guest
        name = self._names[uuid]

        def mark(on: bool) -> None:
            if not on:
                self.disarm()
            journal.pend(msgspec.structs.replace(journal.pending, rehearsing=uuid if on else ""))
            if on:
                self.touched.add(uuid)
                self.watch.arm(self._plan.budget_ns)

        try:
            problem, paused_ns, version = self._port.rehearse(uuid, mark)
        except HostUpdateError:
            self._end_rehearsal()
            raise
        took = f", stopped for {paused_ns / 1e6:.1f} ms" if paused_ns is not None else ""
        if problem:
            raise GuestError(name, f"QEMU {version} does not take it: {problem}")
        self._reports[uuid].notes.append(f"rehearsed under QEMU {version}{took}")

    def _end_rehearsal(self) -> None:
        """The guest of a rehearsal that was cut short runs as before, or is in :meth:`problems`."""
        journal = self._hands.journal
        uuid = journal.pending.rehearsing
        if not uuid:
            return
        while True:
            try:
                self._port.end_rehearsal(uuid)
                break
            except HostUpdateError as error:
                self._problems[uuid] = f"its rehearsal has stopped it: {error}; {_RESUME}"
                if not self._patient():
                    self.disarm()
                    return
        self._problems.pop(uuid, None)
        self.disarm()
        journal.pend(msgspec.structs.replace(journal.pending, rehearsing=""))

    def prepare(self, _action: Action) -> None:
        """RAM files get their second name, and recovery gets its records."""
        for uuid in self._names:
            self._records[uuid] = self._port.prepare(uuid)

    def begin_watch(self, _action: Action) -> None:
        """Starts the keeper: it has nothing to thaw, but a recovery to run."""
        self.watch.start(self._hands.core.open_guests([]), [])

    # ---- blackout

    def park(self, action: Action) -> None:
        """One guest, or all. GuestError: it runs, under its old QEMU."""
        if self._given_up:
            return
        self.began = True
        self.watch.arm(self._plan.budget_ns)
        self._each(action, self._park)
        if not action.guest and (busy := self._port.modules_in_use()):
            for uuid in self._names:
                self._reports[uuid].notes.append(f"while all were parked {busy}")

    def _park(self, uuid: str) -> None:
        self.touched.add(uuid)
        self._reports[uuid].paused_monotonic_ns = time.monotonic_ns()
        with _GivingUp(self, uuid):
            self._records[uuid] = self._port.park(self._records[uuid])
            faults.point("park.parked")
            if uuid in self._checked:
                self._digests[uuid] = self._port.digest(self._records[uuid])

    def unpark(self, action: Action) -> None:
        """One guest, or all. GuestError: it is under its old QEMU again, or in
        :meth:`problems`."""
        self._each(action, self._unpark)

    def _unpark(self, uuid: str) -> None:
        if not self._is(uuid, ParkedState.SAVED):
            return
        with _GivingUp(self, uuid):
            self._records[uuid] = self._port.unpark(self._records[uuid])
            self._compare(uuid)

    def commit(self, action: Action) -> None:
        """Lets it run under its new QEMU: from here on there is no way back for it."""
        uuid = action.guest
        if not self._is(uuid, ParkedState.STRIPPED) or uuid in self._problems:
            return
        with _GivingUp(self, uuid):
            self._let_go(uuid)
            self.committed = True
        self.disarm()

    def _is(self, uuid: str, state: ParkedState) -> bool:
        """A guest whose handover was aborted has no record."""
        record = self._records.get(uuid)
        return record is not None and record.state is state

    def _each(self, action: Action, act: Callable[[str], None]) -> None:
        """For the action's guest, or for all, some at a time."""
        if action.guest:
            act(action.guest)
        else:
            self._together([*self._names], act)

    def _together(self, uuids: Sequence[str], act: Callable[[str], None]) -> None:
        """The first error is raised once all are through."""
        with ThreadPoolExecutor(max_workers=self._workers) as pool:
            calls = [pool.submit(act, uuid) for uuid in uuids]
        for call in calls:
            call.result()

    def _compare(self, uuid: str) -> None:
        if uuid not in self._digests:
            return
        again = self._port.digest(self._records[uuid])
        residency = self._reports[uuid].residency
        residency.digest = self._digests[uuid]
        residency.digest_equal = again == self._digests[uuid]
        if not residency.digest_equal:
            problem = "its RAM changed while it was parked"
            self._records[uuid] = self._port.condemn(self._records[uuid], problem)
            raise GuestError(self._names[uuid], problem)

    def _let_go(self, uuid: str) -> None:
        self._records[uuid] = self._port.commit(self._records[uuid])
        self._gone_on.add(uuid)
        report = self._reports[uuid]
        measured_ns = self._port.blackout_ns(self._records[uuid])
        stopped_ns = self._records[uuid].stopped_monotonic_ns
        if measured_ns is not None and stopped_ns is not None:
            report.paused_monotonic_ns = stopped_ns
            report.resumed_monotonic_ns = stopped_ns + measured_ns
        else:
            report.resumed_monotonic_ns = time.monotonic_ns()
            report.notes.append("libvirt told of no stop or no run: its blackout is an upper bound")

    def gave_up(self, uuid: str, error: HostUpdateError) -> bool:
        """Brings the guest back. Whether the run goes on: some guest has moved on."""
        if self._all_at_once and not self.some_moved_on():
            return False  # what steps did while all were parked is undone before
        self._bring_back(uuid)
        if not self.committed:
            return False
        if uuid in self._gone_on and self._records[uuid].moved_on:
            self._reports[uuid].notes.append(f"it runs under its new QEMU, after {error}")
            return True
        self._given_up = True
        where = "it has ended"
        if uuid in self._problems:
            where = _KNOWN[self._records[uuid].state]
        elif uuid in self._came_back:
            where = "it is under its old QEMU again"
        self._degrade(
            f"{error}; guest {self._names[uuid]}: {where}, and no other guest is parked; those "
            "that have been let run under the new one have moved on"
        )
        self.disarm()
        return True

    def some_moved_on(self) -> bool:
        """Whether a guest has been let run under its new QEMU, or may have been: what was written
        down counts, whatever error came of it."""
        for record in [*self._records.values()]:
            with suppress(HostUpdateError):
                latest = self._port.latest(record)
                self.committed = self.committed or (latest is not None and latest.moved_on)
        return self.committed

    # ---- the end, good or bad

    def clear(self, _action: Action | None = None) -> None:
        """Removes what the handover needed; also the undo of :meth:`prepare`. Never raises for a
        guest's sake."""
        for uuid, record in list(self._records.items()):
            try:
                if record.state is ParkedState.RUNNING and uuid not in self._problems:
                    self._port.finish(record)
                elif record.state is not ParkedState.LINKED:
                    continue
                elif (saved := self._port.abort(record)) is not None:
                    self._records[uuid] = saved
                    self._problems[uuid] = f"{_KNOWN[saved.state]}; {_RESUME}"
                    continue
                del self._records[uuid]
                self._problems.pop(uuid, None)
            except HostUpdateError as error:
                self._degrade(
                    f"guest {self._names[uuid]}: not cleared up: {error}; run `hostupdate resume`"
                )
        try:
            self.drop_kept()
        except (OSError, HostUpdateError) as error:
            self._degrade(f"what the handover needed is not all cleared up: {error}; {_RESUME}")
        self.end_watch()

    def let_run(self) -> None:
        """From any state: every guest runs, or is in :meth:`problems`. May be repeated."""
        self._end_rehearsal()
        self._together([*self._records], self._bring_back)
        if not self.at_stake:  # they run, and are only not cleared up
            self._problems.clear()
        self.disarm()

    def _bring_back(self, uuid: str) -> None:
        """As often as libvirt's daemon, which may be about to start anew, needs to answer. Where
        the budget ends before that, the keeper has recovery wait for it."""
        while self._back(uuid) and self._patient():
            pass
        if uuid not in self._problems:
            self._patience_end_ns = None

    def _patient(self) -> bool:
        """Waits a little; false where that was done for long enough."""
        now_ns = time.monotonic_ns()
        self._patience_end_ns = self._patience_end_ns or now_ns + PATIENCE_NS
        if now_ns >= self._patience_end_ns:
            return False
        time.sleep(_POLL_S)
        return True

    def _back(self, uuid: str) -> bool:
        """Whether it may help to try again."""
        problem = ""
        again = False
        try:
            record = self._port.latest(self._records[uuid])  # an error may have come after a write
            if record is None and uuid in self._port.processes([uuid]):
                self._came_back.add(uuid)  # its park was aborted by itself
            if record is None or uuid in self._gone_on:
                return False
            if record.state is ParkedState.LINKED:
                saved = self._port.abort(record)
                if saved is None:
                    del self._records[uuid]
                    self._ran_by_now(uuid)
                    self._came_back.add(uuid)
                    self._problems.pop(uuid, None)
                    return False
                record = saved
            self._records[uuid] = record
            if record.state is ParkedState.RUNNING:  # it may run: its image is history
                self.committed = self.committed or record.moved_on
                self._let_go(uuid)
            elif record.state in _PARKED:
                self._records[uuid] = self._port.rollback(record)
                self._compare(uuid)
                self._let_go(uuid)
                self._reports[uuid].notes.append("it is under its old QEMU again")
                self._came_back.add(uuid)
            self._problems.pop(uuid, None)
            return False
        except HostUpdateError as error:
            problem = f"{error}; {error.remedy}" if error.remedy else str(error)
            again = isinstance(error, HypervisorError | DeadlineError)
        except Exception as error:  # a bug of ours: the others come back all the same
            problem = f"internal error: {type(error).__name__}: {error}"
        known = _KNOWN[self._records[uuid].state]
        self._problems[uuid] = f"{known}: {problem}; {_RESUME}"
        return again

    def _ran_by_now(self, uuid: str) -> None:
        report = self._reports[uuid]
        if report.paused_monotonic_ns is not None:
            report.resumed_monotonic_ns = time.monotonic_ns()
            report.notes.append("it was not parked: its blackout is an upper bound")

    @property
    def at_stake(self) -> bool:
        """Some guest may stand still."""
        return self.began or bool(self._hands.journal.pending.rehearsing)

    @property
    def unfinished(self) -> bool:
        """Recovery is to see to it: some guest has a record still, or a QEMU that was tried may
        run."""
        return bool(self._records) or self._probing

    def problems(self) -> dict[str, str]:
        """uuid -> why the guest does not run."""
        return dict(self._problems)

    @property
    def steps_end_ns(self) -> int:
        """By when steps must have ended, so that guests run again before the keeper is woken."""
        return self.watch.deadline_ns - handover_ns(len(self._names), self._workers)

    def disarm(self) -> None:
        """No guest is parked, or none that could be helped by the keeper."""
        if not self.dark:
            self.watch.disarm()

    @property
    def dark(self) -> bool:
        """Some guest is parked, or paused under its new QEMU; those that stay so do not count."""
        return any(r.state in _PARKED for u, r in self._records.items() if u not in self._problems)

    def end_watch(self, _action: Action | None = None) -> None:
        """Ends the keeper. Safe to repeat."""
        self.disarm()
        self.watch.end()
        if self._names:
            self._hands.core.close()


class _GivingUp:
    """What fails in the block brings its guest back; the run goes on where others moved on."""

    def __init__(self, handover: Handover, uuid: str) -> None:
        self._handover = handover
        self._uuid = uuid

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> bool:
        if not isinstance(error, HostUpdateError):
            return False
        return self._handover.gave_up(self._uuid, error)
