"""What surrounds a pause: the record that recovery needs, guests' cgroups, their protected RAM."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from hostupdate.config import Config
from hostupdate.engine.clocks import GuestClocks
from hostupdate.engine.ports import Hands
from hostupdate.errors import GuestError
from hostupdate.model import (
    Action,
    ArmedGuest,
    GuestState,
    Plan,
    Protection,
)


class Shelter:
    """Each method that changes something has its undo after it; undos may be repeated."""

    def __init__(self, plan: Plan, config: Config, hands: Hands, clocks: GuestClocks) -> None:
        self._plan = plan
        self._config = config
        self._hands = hands
        self._clocks = clocks
        self._memory_min: dict[str, tuple[str, str]] = {}

    def hold(self) -> tuple[str, ...]:
        """Keeps others from acting, after writing down what that changes; returns what an operator
        should know."""
        rivals = self._plan.rivals
        assert rivals is not None
        journal = self._hands.journal
        journal.pend(msgspec.structs.replace(journal.pending, held=rivals.held))
        return self._hands.guard.hold(rivals)

    def let_go(self, _action: Action | None = None) -> None:
        """Lets them act again."""
        journal = self._hands.journal
        if journal.pending.held is not None:
            self._hands.guard.restore(journal.pending.held)
            journal.pend(msgspec.structs.replace(journal.pending, held=None))

    def record(self, _action: Action) -> None:
        """Writes down which guests may be paused from now on."""
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
        journal = self._hands.journal
        journal.pend(
            msgspec.structs.replace(
                journal.pending,
                method=self._plan.method,
                cgroup2=str(cgroups.mount) if cgroups is not None else None,
                memory_min={cgroup: old for cgroup, (old, _) in self._memory_min.items()},
                host_offset_ns=self._clocks.host.before_ns,
                guests=tuple(armed),
            )
        )

    def forget(self, left: Sequence[str] = ()) -> None:
        """Recovery need not know of guests that run: their owners may pause them from now on. Those
        of ``left`` (names) do not run yet."""
        journal = self._hands.journal
        if journal.pending.guests:
            guests = tuple(guest for guest in journal.pending.guests if guest.name in left)
            memory_min = journal.pending.memory_min if left else {}
            journal.pend(
                msgspec.structs.replace(journal.pending, guests=guests, memory_min=memory_min)
            )

    def isolate(self, _action: Action) -> None:
        """Gives guests a cgroup of their own. GuestError names the first that got none."""
        cgroups = self._hands.cgroups
        assert cgroups is not None
        for guest in self._plan.paused:
            place = self._hands.places[guest.uuid]
            if guest.isolate and place.cgroup is not None:
                try:
                    cgroups.isolate(place.pid, place.cgroup, guest.uuid)
                except GuestError as error:  # it knows the guest by its uuid
                    raise GuestError(guest.name, error.problem, remedy=error.remedy) from error

    def bring_home(self) -> None:
        """Puts them back."""
        cgroups = self._hands.cgroups
        for guest in self._plan.paused:
            place = self._hands.places[guest.uuid]
            if guest.isolate and place.cgroup is not None and cgroups is not None:
                alive = self._hands.is_alive(place.pid, place.started)
                cgroups.restore(place.pid if alive else None, cgroups.own(guest.uuid), place.cgroup)

    def protect(self, _action: Action) -> None:
        """Raises memory.min."""
        assert self._hands.cgroups is not None
        self._hands.cgroups.set_memory_min({c: new for c, (_, new) in self._memory_min.items()})

    def unprotect(self) -> None:
        """Puts it back."""
        if self._hands.cgroups is not None:
            old = {cgroup: old for cgroup, (old, _) in self._memory_min.items()}
            self._hands.cgroups.set_memory_min(old)

    def recheck(self, _action: Action) -> None:
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
