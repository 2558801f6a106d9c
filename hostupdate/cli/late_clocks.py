"""Clocks of the guests of an interrupted run, once they run again."""

from __future__ import annotations

from collections.abc import Callable, Collection

from hostupdate.cli.recovery_hands import Libvirt, clock_hands
from hostupdate.config import Config
from hostupdate.engine.clocks import GuestClocks
from hostupdate.errors import DeadlineError, HypervisorError
from hostupdate.host import processes
from hostupdate.model import PendingRecord, Report


class LateClocks:
    """Sets each guest's clock once, however often guests are let run.

    Not after a boot: the guests that were paused ended before it, and the distance of the host's
    clocks that was written down would set whoever runs now to a time long past.
    """

    def __init__(
        self, record: PendingRecord, libvirt: Libvirt, config: Callable[[], Config]
    ) -> None:
        self._record = record
        self._libvirt = libvirt
        self._config = config
        self._same_boot = record.boot_id == processes.boot_id()
        self._clocks: GuestClocks | None = None
        self._seen_to: set[str] = set()

    def correct(self, report: Report, told: Collection[str]) -> None:
        """The clocks of the record's guests, and of those ``told`` (names) to run; what cannot be
        done is in the report."""
        if not self._same_boot:
            return
        uuids = {guest.uuid for guest in self._record.guests}
        uuids |= {guest.uuid for guest in report.guests if guest.name in told}
        uuids -= self._seen_to
        if not uuids:
            return
        try:
            clocks = self._clocks = self._clocks or self._open(report)
        except (HypervisorError, DeadlineError) as error:
            text = f"guests' clocks are not verified: {error}"
            report.reasons += [] if text in report.reasons else [text]
            return
        others = {guest.uuid for guest in report.guests} - uuids
        report.reasons += [text for text, _wrong in clocks.correct(skip=others)]
        self._seen_to |= uuids

    def conclude(self, report: Report) -> None:
        """The host's own clock, at the end."""
        if self._clocks is None:
            return
        stepped = self._clocks.conclude_host()
        report.reasons += [stepped] if stepped else []
        report.host_clock = self._clocks.host

    def _open(self, report: Report) -> GuestClocks:
        config = self._config()
        guests = {guest.uuid: guest for guest in report.guests}
        clocks = GuestClocks([*guests], config, clock_hands(self._libvirt(), config), guests)
        clocks.recall(self._record)
        return clocks
