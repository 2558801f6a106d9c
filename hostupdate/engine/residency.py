"""The proof that guests' RAM stayed where it was: sizes, counters, digests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hostupdate.engine.ports import Hands, RamView
from hostupdate.errors import CoreError, GuestError
from hostupdate.model import GuestReport, Plan, PlannedGuest, Protection


@contextmanager
def _named(guest: PlannedGuest) -> Iterator[None]:
    """What the kernel says of a pid, said of the guest."""
    try:
        yield
    except (OSError, CoreError) as error:
        raise GuestError(guest.name, f"its RAM cannot be looked at: {error}") from error


class Residency:
    """Measures each paused guest before, during and after its pause, into ``reports``."""

    def __init__(self, plan: Plan, hands: Hands, reports: dict[str, GuestReport]) -> None:
        self._guests = plan.paused
        self._hands = hands
        self._reports = reports
        self._before: dict[str, RamView] = {}
        self._faults: dict[str, int] = {}
        self._digests: dict[str, Callable[[], tuple[str, int]]] = {}

    def measure(self) -> None:
        """Sizes before the pause, and everything that the digests need."""
        for guest in self._guests:
            pid = self._hands.places[guest.uuid].pid
            residency = self._reports[guest.uuid].residency
            with _named(guest):
                self._before[guest.uuid] = view = self._hands.ram.measure(pid)
            residency.protection = guest.protection
            residency.ram_bytes = view.ram_bytes
            residency.resident_bytes = view.resident_bytes
            residency.digest_reason = guest.digest_reason
            if not guest.digest_reason:
                with _named(guest):
                    self._digests[guest.uuid] = self._hands.ram.prepare_digest(pid)

    def open_lockable(self) -> list[int]:
        """Descriptors of the RAM that the keeper is to lock; the caller closes them."""
        fds: list[int] = []
        for guest in self._guests:
            if guest.protection is Protection.LOCKED:
                with _named(guest):
                    fds += self._hands.ram.open_shared(self._hands.places[guest.uuid].pid)
        return fds

    def count_faults(self) -> None:
        """The counters just before the pause."""
        for guest in self._guests:
            pid = self._hands.places[guest.uuid].pid
            with _named(guest):
                self._faults[guest.uuid] = self._hands.ram.major_faults(pid)

    def digest(self) -> None:
        """Digests every guest that can be; the guests are frozen."""
        for uuid, digest in self._digests.items():
            residency = self._reports[uuid].residency
            residency.digest, residency.digest_pages = digest()

    def compare(self) -> None:
        """Digests again and compares; the guests are still frozen."""
        for uuid, digest in self._digests.items():
            residency = self._reports[uuid].residency
            try:
                again, _pages = digest()
            except CoreError as error:
                residency.digest_reason = f"its RAM cannot be read any more: {error}"
            else:
                residency.digest_equal = again == residency.digest

    def disown(self, reason: str) -> None:
        """The digests do not compare: say why, and claim nothing."""
        for uuid in self._digests:
            residency = self._reports[uuid].residency
            residency.digest_equal, residency.digest_reason = None, reason

    def conclude(self) -> list[str]:
        """Counters and sizes after the resume. Returns what was not as promised, in words."""
        findings = []
        for guest in self._guests:
            pid = self._hands.places[guest.uuid].pid
            residency = self._reports[guest.uuid].residency
            try:
                faults = self._hands.ram.major_faults(pid) - self._faults[guest.uuid]
                after = self._hands.ram.measure(pid)
            except (OSError, CoreError, KeyError):
                findings.append(f"guest {guest.name}: where its RAM was cannot be told")
                continue
            moved = after.swapped_bytes - self._before[guest.uuid].swapped_bytes
            residency.major_faults = faults
            residency.swapped_in_bytes = max(0, -moved)
            residency.swapped_out_bytes = max(0, moved)
            if residency.digest_equal is False:
                findings.append(f"guest {guest.name}: its RAM changed while it was frozen")
            if faults or moved:
                findings.append(
                    f"guest {guest.name}: its RAM did not stay in place: {faults} major faults, "
                    f"{abs(moved)} bytes swapped {'out' if moved > 0 else 'in'}"
                )
        return findings
