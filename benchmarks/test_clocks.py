"""How far a guest's clock is off after a pause by libvirt's suspend, and after it was set.

Three ways, one after another after the same pause: ours; ``virsh domtime --sync``; one
``guest-set-time``. Ours and the last take turns in being the first after the resume, which is the
hardest; the other one follows on a clock that was put back by the pause. The sync comes between,
while the RTC is as a guest-set-time leaves it. All residuals are measured by the same instrument.
Two idle guests and two whose vCPU is kept busy, on a machine that has more to do then
than it has cores. Nothing is asserted about size, but that ours is no worse than it says.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import conftest
from benchmarks.contenders import Guests
from hostupdate.cli.lab import LabGuests
from hostupdate.clocks import Clocks
from hostupdate.config import Clock
from hostupdate.core import clock
from hostupdate.durations import SECOND, format_duration
from hostupdate.guests.agent import Agents
from hostupdate.lab import accelerator, console, fleet, image
from hostupdate.lab.domain import Witness
from hostupdate.skew import Corrected, Skew, Wish

TITLE = "guests' clocks after a pause: what is left, of the same run (median, worst)"
HEAD = (
    "pause", "guests", "ours", "worst", "uncertainty", "domtime --sync", "one guest-set-time",
    "sync/ours", "one/ours",
)  # fmt: skip
LOADED = 2
LIMIT_NS = 10 * SECOND


class Bench:
    """Four guests, and the three ways to set their clocks after a pause."""

    def __init__(self, guests: Guests, loaded: dict[str, str]) -> None:
        self._hypervisor = guests.hypervisor
        self._agents = Agents(guests.hypervisor)
        self._hand = Clocks(self._agents, Clock())
        idle = {uuid: "idle" for uuid, _place in guests.places[:LOADED]}
        self.kinds = idle | loaded
        self.uuids = list(self.kinds)
        self.offset_ns = clock.bracket(time.CLOCK_MONOTONIC, time.CLOCK_REALTIME).offset_ns
        self._hand.measure(self.uuids, self.offset_ns)

    def each(self, act: Callable[[str], object]) -> None:
        """Does something to all guests at once."""
        with ThreadPoolExecutor(len(self.uuids)) as threads:
            list(threads.map(act, self.uuids))

    def pause(self, seconds: float) -> None:
        """As `virsh suspend` and `virsh resume` do."""
        for verb in ("suspend", "resume"):
            self.each(
                lambda uuid, verb=verb: self._hypervisor.call(  # type: ignore[misc]
                    verb, lambda c: getattr(c.lookupByUUIDString(uuid), verb)(), LIMIT_NS
                )
            )
            if verb == "suspend":
                time.sleep(seconds)

    def tell(self, uuid: str, ahead_ns: int = 0) -> None:
        """One guest-set-time with the time as it is when it is sent."""

        def command(now_ns: int) -> dict[str, object]:
            time_ns = now_ns + self.offset_ns + ahead_ns
            return {"execute": "guest-set-time", "arguments": {"time": time_ns}}

        self._agents.ask(uuid, command, LIMIT_NS)

    def ours(self) -> dict[str, Corrected]:
        """All guests."""
        wishes = [Wish(uuid=uuid, target_ns=0, answered=True) for uuid in self.uuids]
        return self._hand.correct(wishes, self.offset_ns, time.monotonic_ns() + LIMIT_NS)

    def residuals(self) -> dict[str, Skew]:
        """What is left, by guest."""
        found = self._hand.measure(self.uuids, self.offset_ns)
        assert all(isinstance(skew, Skew) for skew in found.values()), found
        return {uuid: skew for uuid, skew in found.items() if isinstance(skew, Skew)}

    def sync(self, uuid: str) -> None:
        """As `virsh domtime --sync` does."""
        self._agents.sync_rtc(uuid, LIMIT_NS)


@pytest.fixture(scope="module")
def bench(guests: Guests, state: Path) -> Iterator[Bench]:
    host, root = LabGuests(guests.hypervisor), state / "lab"
    built = image.build(state / "cache")
    made = fleet.up(
        host, root, conftest.MOST + LOADED, 192 << 20, image=built,
        acceleration=accelerator.probe(built, state / "cache"), witness=Witness(load=True),
    )[-LOADED:]  # fmt: skip
    names = [guest.name for guest in made]
    for name in names:
        console.wait_ticks(root / "console" / f"{name}.log", 2, time.monotonic_ns() + LIMIT_NS)
    uuids = {g.uuid: "loaded" for g in guests.hypervisor.guests() if g.name in names}
    yield Bench(guests, uuids)
    fleet.down(host, root, names=names)


@pytest.mark.parametrize("seconds", [1, 5, 12])
def test_clocks(benchmark: BenchmarkFixture, bench: Bench, seconds: int) -> None:
    cycles = max(1, min(10, conftest.rounds() // 5))
    left: dict[str, dict[str, list[int]]] = {}
    unsure: dict[str, list[int]] = {}

    def note(way: str, skews: dict[str, Skew]) -> None:
        for uuid, skew in skews.items():
            left.setdefault(way, {}).setdefault(uuid, []).append(abs(skew.skew_ns))

    def ours() -> None:
        found = bench.ours()
        skews = {uuid: result.now for uuid, result in found.items() if result.now is not None}
        assert len(skews) == len(found), found
        note("ours", skews)
        for uuid, skew in skews.items():
            unsure.setdefault(uuid, []).append(skew.uncertainty_ns)
            assert abs(skew.skew_ns) <= skew.uncertainty_ns + Clock().tolerance_ns, found[uuid]

    def sync() -> None:
        bench.each(bench.sync)
        note("sync", bench.residuals())

    def once() -> None:
        bench.each(bench.tell)
        note("once", bench.residuals())

    def cycle(number: int) -> None:
        first, last = (ours, once) if number % 2 == 0 else (once, ours)
        bench.pause(seconds)
        first()
        sync()
        bench.each(lambda uuid: bench.tell(uuid, -seconds * SECOND))
        last()
        bench.ours()

    numbers = iter(range(cycles))
    bench.ours()
    benchmark.pedantic(lambda: cycle(next(numbers)), rounds=cycles)

    benchmark.extra_info |= {"seconds": seconds, "kinds": bench.kinds, "left_ns": left}
    for kind in ("idle", "loaded"):
        chosen = [uuid for uuid, of in bench.kinds.items() if of == kind]
        ours_ns, sync_ns, once_ns = (
            [ns for uuid in chosen for ns in left[way][uuid]] for way in ("ours", "sync", "once")
        )
        least = max(median(ours_ns), 1)
        conftest.TABLES.setdefault(TITLE, [HEAD]).append(
            (
                f"{seconds} s",
                f"{len(chosen)} {kind}",
                format_duration(round(median(ours_ns))),
                format_duration(max(ours_ns)),
                format_duration(round(median(ns for uuid in chosen for ns in unsure[uuid]))),
                format_duration(round(median(sync_ns))),
                format_duration(round(median(once_ns))),
                f"{median(sync_ns) / least:.0f}x",
                f"{median(once_ns) / least:.1f}x",
            )
        )
