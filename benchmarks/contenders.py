"""The ways to stop and start guests that are measured against each other."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hostupdate.cli.lab import LabGuests
from hostupdate.core.freezer import GuestSet, Stamp, open_cgroup
from hostupdate.guests import Hypervisor, default_lab_uri
from hostupdate.host.cgroups import Cgroups, find_cgroup2
from hostupdate.host.places import locate
from hostupdate.lab import fleet

_SECOND_NS = 1_000_000_000


class Guests:
    """The lab's guests through libvirt, and their processes for the C core."""

    def __init__(self, state: Path) -> None:
        self._root = state / "lab"
        self.hypervisor = Hypervisor(default_lab_uri(state), timeout_ns=10 * _SECOND_NS)
        mount = find_cgroup2()
        assert mount is not None
        self.cgroups = Cgroups(mount)
        self.places = []
        self.domains: list[Any] = []
        for located in locate(self.hypervisor.guests(), self.cgroups):
            assert located.place is not None, located.problem
            self.places.append((located.guest.uuid, located.place))
            self.domains.append(
                self.hypervisor.call(
                    "look up", lambda c, uuid=located.guest.uuid: c.lookupByUUIDString(uuid)
                )
            )

    @contextmanager
    def isolated(self, count: int) -> Iterator[GuestSet]:
        """The first ``count`` guests in cgroups of their own, prepared for the C core."""
        handles = []
        moved = []
        try:
            for uuid, place in self.places[:count]:
                cgroup = place.cgroup or "/"
                if place.shared_cgroup:
                    moved.append((place.pid, cgroup, uuid))
                    cgroup = self.cgroups.isolate(place.pid, cgroup, uuid)
                handles.append(open_cgroup(self.cgroups.directory(cgroup), label=uuid))
            yield GuestSet(handles)
        finally:
            for handle in handles:
                handle.close()
            for pid, home, uuid in moved:
                self.cgroups.restore(pid, self.cgroups.own(uuid), home)

    def directory(self, uuid: str) -> Path:
        """The cgroup directory of a guest that is isolated now."""
        own = self.cgroups.directory(self.cgroups.own(uuid))
        return own if own.exists() else self.cgroups.directory(dict(self.places)[uuid].cgroup or "")

    def remove(self) -> None:
        """Removes the guests, from here: a process lets go of the embedded driver only at its
        end."""
        self.domains.clear()
        fleet.down(LabGuests(self.hypervisor), self._root)
        self.hypervisor.close()


def freeze(guests: GuestSet) -> list[Stamp]:
    """Ours, one way."""
    return guests.freeze(time.monotonic_ns() + 5 * _SECOND_NS)


def thaw(guests: GuestSet) -> list[Stamp]:
    """Ours, the other way."""
    return guests.thaw(time.monotonic_ns() + 5 * _SECOND_NS)


class Libvirt:
    """What a user would run otherwise: suspend and resume, one after the other or all at once.

    Without virsh's own start-up, and with threads that wait: libvirt at its best.
    """

    def __init__(self, domains: list[Any]) -> None:
        self._domains = domains
        self._pool = ThreadPoolExecutor(max_workers=len(domains))
        list(self._pool.map(lambda domain: domain.isActive(), domains))

    def serial(self, verb: str) -> int:
        """Duration in ns."""
        start_ns = time.monotonic_ns()
        for domain in self._domains:
            getattr(domain, verb)()
        return time.monotonic_ns() - start_ns

    def parallel(self, verb: str) -> int:
        """Duration in ns."""
        start_ns = time.monotonic_ns()
        list(self._pool.map(lambda domain: getattr(domain, verb)(), self._domains))
        return time.monotonic_ns() - start_ns

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown()
