"""How long it takes to stop, and to start, all guests of a host: the C core against libvirt.

Every round measures all contenders one after another, so that they share the machine's mood. Ours
is timed from the first request to the moment the last guest was seen stopped (or running); libvirt
from the first call to the return of the last. Nothing is asserted about speed.
"""

from __future__ import annotations

import platform
from statistics import median

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import conftest
from benchmarks.contenders import Guests, Libvirt, freeze, thaw
from hostupdate.core.freezer import Stamp
from hostupdate.durations import format_duration

TITLE = "pausing all guests of a host, medians of the same run"
HEAD = (
    "what", "guests", "hostupdate", "spread", "virsh-like serial", "parallel",
    "serial/ours", "parallel/ours",
)  # fmt: skip


def _span_ns(stamps: list[Stamp]) -> int:
    settled = [stamp.settled_monotonic_ns or 0 for stamp in stamps]
    return max(settled) - min(stamp.requested_monotonic_ns for stamp in stamps)


def _spread_ns(stamps: list[Stamp]) -> int:
    settled = [stamp.settled_monotonic_ns or 0 for stamp in stamps]
    return max(settled) - min(settled)


@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize("what", ["stop", "start"])
def test_all_guests(benchmark: BenchmarkFixture, guests: Guests, what: str, count: int) -> None:
    libvirt = Libvirt(guests.domains[:count])
    serial: list[int] = []
    parallel: list[int] = []
    stamps: list[list[Stamp]] = []
    verb, back = ("suspend", "resume") if what == "stop" else ("resume", "suspend")

    with guests.isolated(count) as paused:

        def others() -> None:
            for measured, way in ((serial, libvirt.serial), (parallel, libvirt.parallel)):
                if what == "start":
                    libvirt.parallel(back)
                measured.append(way(verb))
                if what == "stop":
                    libvirt.parallel(back)
            if what == "start":
                freeze(paused)

        def ours() -> None:
            stamps.append(freeze(paused) if what == "stop" else thaw(paused))

        def put_back() -> None:
            if what == "stop":
                thaw(paused)

        benchmark.pedantic(
            ours, setup=others, teardown=put_back, rounds=conftest.rounds(), warmup_rounds=2
        )
    libvirt.close()

    spans = [_span_ns(each) for each in stamps]
    spreads = [_spread_ns(each) for each in stamps]
    ours_ns, serial_ns, parallel_ns = median(spans), median(serial), median(parallel)
    benchmark.extra_info |= {
        "what": what,
        "guests": count,
        "guest_memory_bytes": 192 << 20,
        "kernel": platform.release(),
        "libvirt": guests.hypervisor.version(),
        "span_ns": spans,
        "spread_ns": spreads,
        "libvirt_serial_ns": serial,
        "libvirt_parallel_ns": parallel,
        "ratio_serial": serial_ns / ours_ns,
        "ratio_parallel": parallel_ns / ours_ns,
    }
    conftest.TABLES.setdefault(TITLE, [HEAD]).append(
        (
            what,
            str(count),
            format_duration(round(ours_ns)),
            format_duration(round(median(spreads))),
            format_duration(round(serial_ns)),
            format_duration(round(parallel_ns)),
            f"{serial_ns / ours_ns:.0f}x",
            f"{parallel_ns / ours_ns:.0f}x",
        )
    )
