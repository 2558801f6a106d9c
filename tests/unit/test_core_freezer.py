"""Stopping and starting guests: real processes, in cgroups and without."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from hostupdate.core.freezer import GuestHandle, GuestSet, open_cgroup, open_process
from hostupdate.errors import CoreError
from tests.requirements import need
from tests.unit.core_guests import Guest, guests, second


@pytest.fixture(params=["cgroup", "process"])
def three(request: pytest.FixtureRequest) -> Iterator[list[Guest]]:
    """Three guests, by both ways."""
    cgroups = request.param == "cgroup"
    if cgroups:
        need("root", "cgroup2")
    with guests(3, cgroups=cgroups) as made:
        yield made


@pytest.fixture
def handles(three: list[Guest]) -> Iterator[list[GuestHandle]]:
    with ExitStack() as stack:
        yield [stack.enter_context(guest.open()) for guest in three]


def test_stops_and_starts(three: list[Guest], handles: list[GuestHandle]) -> None:
    together = GuestSet(handles)
    assert len(together) == 3
    begin = second()
    stamps = together.freeze(second(5))
    for stamp in stamps:
        assert stamp.settled_monotonic_ns is not None
        assert begin <= stamp.requested_monotonic_ns <= stamp.settled_monotonic_ns <= second()
    assert all(handle.frozen() for handle in handles)
    assert all(guest.still() for guest in three)

    stamps = together.thaw(second(5))
    assert all(stamp.settled_monotonic_ns is not None for stamp in stamps)
    assert stamps == together.stamps()
    assert not any(handle.frozen() for handle in handles)
    assert all(guest.runs() for guest in three)


def test_a_passed_deadline_stops_nobody(three: list[Guest], handles: list[GuestHandle]) -> None:
    with pytest.raises(CoreError) as raised:
        GuestSet(handles).freeze(second(-1))
    assert raised.value.errno == errno.ETIMEDOUT
    assert raised.value.detail == ""
    assert not any(handle.frozen() for handle in handles)


def test_the_guest_that_is_gone_is_named(three: list[Guest], handles: list[GuestHandle]) -> None:
    three[1].kill()
    together = GuestSet(handles)
    with pytest.raises(CoreError) as raised:
        together.freeze(second(5))
    assert raised.value.errno == errno.ESRCH
    assert raised.value.detail == "guest 1, guest1"
    assert three[0].runs() and three[2].runs()
    with pytest.raises(CoreError, match="guest1"):
        handles[1].frozen()

    # It needs no thaw.
    stamps = together.thaw(second(5))
    assert [stamp.settled_monotonic_ns is None for stamp in stamps] == [False, True, False]


def test_no_guests() -> None:
    assert GuestSet([]).freeze(second(1)) == []
    assert GuestSet([]).thaw(second(1)) == []


def test_who_is_late_is_named() -> None:
    need("root", "cgroup2")
    with guests(2, cgroups=True) as made, ExitStack() as stack:
        together = GuestSet([stack.enter_context(guest.open()) for guest in made])
        together.freeze(second(5))
        assert made[0].cgroup is not None
        above = made[0].cgroup.parent / "cgroup.freeze"
        above.write_text("1")
        try:
            with pytest.raises(CoreError) as raised:
                together.thaw(second(0.03))
            assert raised.value.errno == errno.ETIMEDOUT
            assert raised.value.detail == "guest 0, guest0; guest 1, guest1"
            assert [stamp.settled_monotonic_ns for stamp in together.stamps()] == [None, None]
        finally:
            above.write_text("0")
        together.thaw(second(5))


def test_handles_close_once() -> None:
    handle = open_process(os.getpid())
    assert handle.label == f"pid {os.getpid()}"
    handle.close()
    handle.close()
    assert handle.pidfd == -1


def test_half_a_cgroup_is_none(tmp_path: Path) -> None:
    (tmp_path / "cgroup.freeze").write_text("0\n")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FileNotFoundError):
        open_cgroup(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_no_process() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    with pytest.raises(ProcessLookupError):
        open_process(pid)
