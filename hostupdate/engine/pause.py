"""Pausing a host's guests together, and letting them run again whatever happens.

Happy path: :meth:`Pause.keep` -> :meth:`arm` -> (:meth:`stop` ->) :meth:`freeze` -> ... ->
:meth:`thaw` (-> :meth:`resume`) -> :meth:`disarm` -> :meth:`release`.

Unhappy paths:

1. Freezing fails: the C core has told every guest to run; :meth:`let_run` resumes stopped ones.
2. Anything fails while guests are paused: :meth:`let_run`, from any state, as often as wanted.
3. The keeper fires: guests are thawed already; stopped ones are resumed by :meth:`let_run`.
4. This process dies: the keeper thaws, and its recovery command does the rest.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from hostupdate.config import Config
from hostupdate.engine.ports import Hands, PausedSet
from hostupdate.engine.watch import Watch
from hostupdate.errors import CoreError, GuestError, HostUpdateError, StopError
from hostupdate.model import Action, FreezeBy, GuestReport, PauseMethod, Plan
from hostupdate.prediction import RESERVE_NS

#: How long a thaw may take until a guest is called stuck: 20,000 times what it takes.
_THAW_NS = 2_000_000_000


class Pause:
    """The paused guests of one run. ``reports`` holds what is measured, by uuid."""

    def __init__(
        self, plan: Plan, config: Config, hands: Hands, reports: dict[str, GuestReport]
    ) -> None:
        self._plan = plan
        self._config = config
        self._hands = hands
        self._reports = reports
        self._guests = plan.paused
        self._names = [(guest.uuid, guest.name) for guest in self._guests]
        self._set: PausedSet | None = None
        self.watch = Watch(hands.core, "the budget was over: the keeper let the guests run")
        self._frozen = False
        self._stopped: list[tuple[str, str]] = []  #: uuid and name of those libvirt must resume
        self.began = False  #: some guest may have been paused in this run
        self._problems: dict[str, str] = {}
        self._unresumed: set[str] = set()
        self._start_ns = 0
        self.spread_ns: int | None = None
        self.stop_all_ns: int | None = None
        self.start_all_ns: int | None = None

    @property
    def steps_end_ns(self) -> int:
        """When the last blackout step must have ended so that guests run within the budget."""
        assert self._plan.method is not None
        return self.watch.deadline_ns - RESERVE_NS[self._plan.method]

    def keep(self, _action: Action, ram_fds: Sequence[int]) -> None:
        """Opens everything that pausing needs and starts the keeper, not armed."""
        places = self._hands.places
        cgroups = self._hands.cgroups
        members = []
        for guest in self._guests:
            place = places[guest.uuid]
            cgroup = place.cgroup if guest.freeze_by is FreezeBy.CGROUP else None
            if guest.isolate and cgroups is not None:
                cgroup = cgroups.own(guest.uuid)
            members.append((guest.name, place.pid, cgroup))
        if self._plan.method is PauseMethod.STOP:
            self._hands.hypervisor.prepare([uuid for uuid, _ in self._names])
        self._set = self._hands.core.open_guests(members)
        self.watch.start(self._set, ram_fds)

    def arm(self, _action: Action) -> None:
        """Starts the budget's clock."""
        self.watch.arm(self._plan.budget_ns)

    def stop(self, _action: Action) -> None:
        """Stops the guests through libvirt. StopError: none of them is stopped, but one that did
        not answer may stop later, so that :meth:`resume` has to see it run."""
        self.began = True
        self._stopped = self._names
        try:
            asked = self._hands.hypervisor.stop(self._names, self._config.pause.stop_timeout_ns)
        except StopError as error:
            self._stopped = [name for name in self._names if name[0] in error.late]
            raise
        for uuid, asked_ns in asked.items():
            self._reports[uuid].paused_monotonic_ns = asked_ns

    def freeze(self, _action: Action) -> None:
        """Freezes them all. CoreError: none of them is frozen."""
        assert self._set is not None
        self.began = self._frozen = True
        now_ns = time.monotonic_ns()
        reports = [self._reports[guest.uuid] for guest in self._guests]
        frozen_only = [report for report in reports if report.paused_monotonic_ns is None]
        for report in frozen_only:  # a freeze that fails has paused some of them for a while
            report.paused_monotonic_ns = now_ns
        limit_ns = now_ns + self._config.pause.stop_timeout_ns
        stamps = self._set.freeze(min(limit_ns, self.steps_end_ns))
        for report, stamp in zip(reports, stamps, strict=True):
            if report in frozen_only:
                report.paused_monotonic_ns = stamp.requested_monotonic_ns
        settled = [stamp.settled_monotonic_ns or 0 for stamp in stamps]
        self.spread_ns = max(settled) - min(settled)
        asked = [report.paused_monotonic_ns or now_ns for report in reports]
        self.stop_all_ns = max(settled) - min(asked)

    def thaw(self, _action: Action | None = None) -> None:
        """Thaws them all. One that is gone, or was not seen running, is in :meth:`problems`."""
        if not self._frozen:
            return
        assert self._set is not None
        try:
            stamps = self._set.thaw(time.monotonic_ns() + _THAW_NS)
        except CoreError as error:
            stamps = self._set.stamps()
            stuck = f"it was told to run, and not seen to: {error}"
        else:
            stuck = "its process or its cgroup is gone"
        self._frozen = False
        settled = [stamp.settled_monotonic_ns for stamp in stamps]
        requested = [stamp.requested_monotonic_ns for stamp in stamps]
        self._start_ns = min(requested)
        self.start_all_ns = max([ns for ns in settled if ns] or requested) - self._start_ns
        for guest, settled_ns in zip(self._guests, settled, strict=True):
            if settled_ns is None:
                self._problems[guest.uuid] = stuck
                self._unresumed.add(guest.uuid)
            else:
                self._reports[guest.uuid].resumed_monotonic_ns = settled_ns

    def resume(self, _action: Action | None = None) -> None:
        """Resumes stopped guests: through libvirt, and where that fails through the guest's own
        monitor socket. What resumes neither way is tried again by :meth:`retry`."""
        if not self._stopped:
            return
        names, self._stopped = self._stopped, []
        self._resume([name for name in names if self._lives(name[0])])

    def retry(self) -> None:
        """Once more for guests that did not resume: an undo may have brought libvirt back."""
        if self._plan.method is not PauseMethod.STOP:
            return
        again = [name for name in self._names if name[0] in self._unresumed]
        for uuid, _ in again:
            self._problems.pop(uuid)
        self._unresumed.clear()
        if again:
            self._resume(again)

    def _lives(self, uuid: str) -> bool:
        place = self._hands.places[uuid]
        return self._hands.is_alive(place.pid, place.started)

    def _resume(self, names: list[tuple[str, str]]) -> None:
        timeout_ns = self._config.deadlines.recovery_libvirt_ns
        failed: list[tuple[str, int | Exception]] = []
        for uuid, outcome in self._hands.hypervisor.resume(names, timeout_ns).items():
            if isinstance(outcome, int):
                self._reports[uuid].resumed_monotonic_ns = outcome
            else:
                failed.append((uuid, outcome))
        resumed = [self._reports[uuid].resumed_monotonic_ns or 0 for uuid, _ in names]
        self.start_all_ns = max(resumed, default=self._start_ns) - self._start_ns
        if not failed:
            return
        # Its answer outstanding, the keeper would kill us before the guests' monitors had theirs.
        # From now on it only acts on our death.
        self.disarm()

        def by_monitor(uuid: str) -> int | HostUpdateError:
            try:
                self._hands.resume_by_monitor(self._hands.places[uuid].pid, timeout_ns)
            except HostUpdateError as error:
                return error
            return time.monotonic_ns()

        with ThreadPoolExecutor(max_workers=len(failed)) as pool:
            seconds = list(pool.map(by_monitor, [uuid for uuid, _ in failed]))
        for (uuid, first), second in zip(failed, seconds, strict=True):
            report = self._reports[uuid]
            if isinstance(second, int):
                report.resumed_monotonic_ns = second
                report.notes.append(f"resumed through its monitor socket: {first}")
            else:
                report.resumed_monotonic_ns = None
                self._problems[uuid] = f"{first}; by its monitor: {second}"
                self._unresumed.add(uuid)

    def let_run(self) -> None:
        """From any state: every guest that we paused runs again, or is in :meth:`problems`.

        The keeper is disarmed as soon as the guests' threads run: libvirt may take its time to
        resume them, and the keeper would take that for a hang and end us in the middle of it.
        """
        self.thaw()
        self.disarm()
        self.resume()

    def problems(self) -> dict[str, str]:
        """uuid -> why the guest is not known to run again."""
        return dict(self._problems)

    def unresumed(self) -> list[str]:
        """Names of guests that live, are paused, and that nobody could be reached to resume."""
        return [name for uuid, name in self._names if uuid in self._unresumed and self._lives(uuid)]

    def disarm(self, _action: Action | None = None) -> None:
        """The guests run."""
        self.watch.disarm()

    def release(self, _action: Action | None = None) -> None:
        """Ends the keeper and closes the guests' files. Safe to repeat."""
        self.watch.disarm()
        self.watch.end()
        self._hands.core.close()

    def failed_guest(self) -> GuestError | None:
        """The first guest that is not known to run again, as an error."""
        for guest in self._guests:
            if guest.uuid in self._problems:
                return GuestError(guest.name, self._problems[guest.uuid])
        return None
