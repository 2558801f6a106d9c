"""Many pauses: no guest loses a tick or a page."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hostupdate.core.freezer import GuestSet, open_cgroup
from hostupdate.host.cgroups import Cgroups, find_cgroup2
from hostupdate.lab import console
from tests.functional.cli import Lab

CYCLES = 100
RUNS = 10
#: A cycle's pause and the run after it: shorter than a tick, so that many fall into one.
HOLD_S = 0.01
SECOND_NS = 1_000_000_000

CHANGE = '[[step]]\nname = "x"\nphase = "blackout"\nrun = ["true"]\ntimeout = "1s"\n'


@pytest.fixture
def pausable(lab: Lab) -> Iterator[GuestSet]:
    """The lab's guests, each in a cgroup of its own."""
    mount = find_cgroup2()
    assert mount is not None
    cgroups = Cgroups(mount)
    rows = lab.run("guests", "--json").data["guests"]
    handles = []
    try:
        for row in rows:
            own = cgroups.isolate(row["pid"], row["cgroup"], row["uuid"])
            handles.append(open_cgroup(cgroups.directory(own), label=row["name"]))
        yield GuestSet(handles)
    finally:
        for handle in handles:
            handle.close()
        for row in rows:
            cgroups.restore(row["pid"], cgroups.own(row["uuid"]), row["cgroup"])


def assert_unbroken(lab: Lab, first: dict[str, console.Tick]) -> None:
    """Since its first tick each guest has ticked on without a gap in the numbers, and what it
    verified in that time was as it had been."""
    deadline_ns = time.monotonic_ns() + 120 * SECOND_NS
    for name in lab.names:
        log = lab.console(name)
        passes = first[name].passes
        # The pass under way began before the last pause: two more, and all was looked at after it.
        while (newest := console.wait_ticks(log, 1, deadline_ns)[-1]).passes < passes + 2:
            pass
        seen = console.ticks(log, after_seq=first[name].seq)
        assert [tick.seq for tick in seen] == list(range(first[name].seq + 1, newest.seq + 1))
        assert {tick.bad for tick in seen} == {0}, f"{name}: damaged memory"


def newest(lab: Lab) -> dict[str, console.Tick]:
    found = {name: console.last_tick(lab.console(name)) for name in lab.names}
    return {name: tick for name, tick in found.items() if tick is not None}


def test_a_hundred_pauses_leave_memory_and_ticks_whole(lab: Lab, pausable: GuestSet) -> None:
    first = newest(lab)
    for _ in range(CYCLES):
        stamps = pausable.freeze(time.monotonic_ns() + 5 * SECOND_NS)
        assert all(handle.frozen() for handle in pausable.handles)
        time.sleep(HOLD_S)  # the pause itself
        ran = pausable.thaw(time.monotonic_ns() + 5 * SECOND_NS)
        time.sleep(HOLD_S)  # the guests' turn
        for stopped, running in zip(stamps, ran, strict=True):
            assert stopped.settled_monotonic_ns is not None
            assert running.settled_monotonic_ns is not None
            assert stopped.settled_monotonic_ns < running.requested_monotonic_ns
    assert_unbroken(lab, first)


def test_ten_updates_with_alternating_methods_leave_memory_and_ticks_whole(
    lab: Lab, write_manifest: Callable[..., Path]
) -> None:
    manifest = write_manifest(CHANGE)
    first = newest(lab)
    pids = [row["pid"] for row in lab.run("guests", "--json").data["guests"]]
    for number in range(RUNS):
        method = ("freeze", "stop")[number % 2]
        ended = lab.apply(manifest, "--pause-method", method)
        assert ended.code == 0, ended.err
        assert ended.data["method"] == method
        assert all(guest["residency"]["digest_equal"] for guest in ended.data["guests"])
    assert [row["pid"] for row in lab.run("guests", "--json").data["guests"]] == pids
    assert_unbroken(lab, first)
