"""Bracketed readings."""

from __future__ import annotations

import errno
import time

import pytest

from hostupdate.core.clock import Reading, bracket
from hostupdate.errors import CoreError


def test_bracket_of_a_clock_with_itself() -> None:
    reading = bracket(time.CLOCK_MONOTONIC, time.CLOCK_MONOTONIC)
    assert abs(reading.offset_ns) <= reading.uncertainty_ns < 1_000_000


def test_bracket_finds_the_wall_clock() -> None:
    reading = bracket(time.CLOCK_MONOTONIC, time.CLOCK_REALTIME)
    offset = time.time_ns() - time.monotonic_ns()
    assert abs(reading.offset_ns - offset) < 1_000_000_000


@pytest.mark.parametrize(
    ("reference", "clock", "tries"),
    [
        (time.CLOCK_MONOTONIC, time.CLOCK_REALTIME, 0),
        (4711, time.CLOCK_REALTIME, 1),
        (time.CLOCK_MONOTONIC, 4711, 1),
    ],
)
def test_nonsense_is_refused(reference: int, clock: int, tries: int) -> None:
    with pytest.raises(CoreError, match="hu_clock_bracket") as raised:
        bracket(reference, clock, tries=tries)
    assert raised.value.errno == errno.EINVAL


def test_numbers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(OverflowError):
        bracket(1 << 40, time.CLOCK_REALTIME)


def test_offset() -> None:
    assert Reading(reference_ns=10, reading_ns=7, uncertainty_ns=1).offset_ns == -3
