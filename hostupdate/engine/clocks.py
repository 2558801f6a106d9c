"""Guests' clocks in a run: measured before the pause, right again first thing after it.

Also the host's own clock, which guests are set by: where nothing synchronises it, or it was
stepped during the run, guests only get back the time that the pause took.
"""

from __future__ import annotations

import time
from collections.abc import Container, Mapping, Sequence
from typing import Protocol

from hostupdate.config import Config
from hostupdate.durations import format_duration
from hostupdate.engine.ports import ClocksPort, HostClockPort, LinksPort
from hostupdate.errors import DeadlineError, GuestError, HypervisorError
from hostupdate.model import GuestReport, HostClockReport, PendingRecord
from hostupdate.skew import Corrected, Skew, Wish, is_right, stepped_ns, target_ns

#: Links come up again this long before the keeper would have to see to it.
_LINKS_NS = 200_000_000


class ClockHands(Protocol):
    """What of the engine's hands is needed for clocks."""

    @property
    def core(self) -> HostClockPort: ...
    @property
    def clocks(self) -> ClocksPort: ...
    @property
    def links(self) -> LinksPort: ...


class GuestClocks:
    """The clocks and the network links of one run's paused guests, into ``reports``."""

    def __init__(
        self,
        uuids: Sequence[str],
        config: Config,
        hands: ClockHands,
        reports: Mapping[str, GuestReport],
    ) -> None:
        self._config = config.clock
        self._hands = hands
        self._reports = reports
        self._uuids = uuids
        self._before: dict[str, Skew] = {}
        self._links: dict[str, tuple[str, ...]] = {}
        self._measured = False
        self._corrected: set[str] = set()
        offset_ns, uncertainty_ns = hands.core.host_clock()
        self.host = HostClockReport(
            before_ns=offset_ns,
            uncertainty_ns=uncertainty_ns,
            synchronised=hands.core.host_clock_synchronised(),
        )

    def measure(self) -> None:
        """Skews before the pause, and which links are up. HypervisorError: of the links."""
        self._measured = True
        for uuid, skew in self._hands.clocks.measure(self._uuids, self.host.before_ns).items():
            if isinstance(skew, Skew):
                self._before[uuid] = skew
                self._reports[uuid].clock.before_ns = skew.skew_ns
        if self._config.hold_network:
            for uuid in self._uuids:
                self._links[uuid] = self._hands.links.up(uuid)

    def recall(self, record: PendingRecord) -> None:
        """What an interrupted run had measured, instead of :meth:`measure`."""
        self._measured = True
        if record.host_offset_ns is not None:
            self.host.before_ns = record.host_offset_ns
            for guest in record.guests:
                if guest.skew_ns is not None:
                    self._before[guest.uuid] = Skew(skew_ns=guest.skew_ns, uncertainty_ns=0)
                    self._reports[guest.uuid].clock.before_ns = guest.skew_ns

    def skew_ns(self, uuid: str) -> int | None:
        """The guest's skew before the pause."""
        return self._before[uuid].skew_ns if uuid in self._before else None

    def links(self, uuid: str) -> tuple[str, ...]:
        """The guest's links that are held down in this run, for whoever has to recover."""
        return self._links.get(uuid, ())

    def disconnect(self) -> None:
        """Takes the links down."""
        for uuid, links in self._links.items():
            self._hands.links.set(uuid, links, "down")

    def connect(self) -> None:
        """Brings up again what :meth:`disconnect` took down, all of it whatever happens to one;
        then GuestError for the first that failed. Repeatable."""
        failed: GuestError | None = None
        for uuid, links in list(self._links.items()):
            try:
                self._hands.links.set(uuid, links, "up")
                del self._links[uuid]
            except (HypervisorError, DeadlineError) as error:
                name = self._reports[uuid].name
                failed = failed or GuestError(
                    name, f"its network link stays down: {error}",
                    remedy=f"virsh domif-setlink {name} {' '.join(links)} up",
                )  # fmt: skip
        if failed is not None:
            raise failed

    def correct(
        self, limit_ns: int | None = None, skip: Container[str] = ()
    ) -> list[tuple[str, bool]]:
        """Measures and sets the clocks, each once a run. Returns what is not as promised, in words,
        and whether a clock is known to be wrong, not just not known to be right.

        ``limit_ns`` (CLOCK_MONOTONIC) is an end before the configured one; ``skip`` are guests
        that do not run: their agents would be waited for. They can come in a later call.
        """
        uuids = [uuid for uuid in self._uuids if uuid not in skip and uuid not in self._corrected]
        if not (uuids and self._measured):
            return []
        self._corrected.update(uuids)
        deadline_ns = time.monotonic_ns() + self._config.timeout_ns
        if limit_ns is not None:
            deadline_ns = min(deadline_ns, limit_ns - _LINKS_NS)
        trusted = (self.host.synchronised or self._config.trust_host) and not self._stepped_ns()
        wishes = [
            Wish(
                uuid=uuid,
                target_ns=target_ns(self._config.correct, bool(trusted), self._before.get(uuid)),
                answered=uuid in self._before,
            )
            for uuid in uuids
        ]
        found = self._hands.clocks.correct(wishes, self.host.before_ns, deadline_ns)
        texts = {wish.uuid: self._conclude(wish, found[wish.uuid]) for wish in wishes}
        return [
            (text, found[uuid].now is not None and bool(found[uuid].problem))
            for uuid, text in texts.items()
            if text
        ]

    def conclude_host(self) -> str:
        """Reads the host's clock at the end; says what is wrong with it, or nothing."""
        offset_ns, uncertainty_ns = self._hands.core.host_clock()
        stepped = self._stepped_ns()
        self.host.after_ns = offset_ns
        self.host.uncertainty_ns += uncertainty_ns
        if not stepped:
            return ""
        return (
            f"the host's clock was stepped by {format_duration(stepped)} during the run; "
            "no guest was set by its new time"
        )

    def _stepped_ns(self) -> int:
        now_ns, uncertainty_ns = self._hands.core.host_clock()
        return stepped_ns(self.host.before_ns, now_ns, self.host.uncertainty_ns + uncertainty_ns)

    def _conclude(self, wish: Wish, found: Corrected) -> str:
        report = self._reports[wish.uuid]
        clock = report.clock
        if found.found is not None:
            clock.resumed_ns = found.found.skew_ns
        if found.now is not None:
            clock.after_ns = found.now.skew_ns
            clock.uncertainty_ns = found.now.uncertainty_ns
        clock.method = str(found.way) if found.way is not None else None
        report.notes += found.notes
        before = self._before.get(wish.uuid)
        tolerance_ns = self._config.tolerance_ns
        if before is not None and wish.target_ns == 0 and not is_right(before, 0, tolerance_ns):
            report.notes.append(
                f"its clock was {format_duration(before.skew_ns)} off before the pause; "
                "it was set to the host's time"
            )
        clock.problem = found.problem
        if not found.problem and wish.target_ns is None and self._config.correct != "off":
            clock.problem = "it was not measured before the pause, and the host's time is not sure"
        if not clock.problem:
            return ""
        verb = "is wrong" if found.now is not None and found.problem else "is not verified"
        text = f"guest {report.name}: its clock {verb}: {clock.problem}"
        return f"{text}; {found.remedy}" if found.remedy else text
