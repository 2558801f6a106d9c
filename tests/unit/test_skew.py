"""What is decided about a guest's clock."""

from __future__ import annotations

import pytest

from hostupdate.durations import MILLISECOND, SECOND
from hostupdate.skew import (
    ATTEMPTS,
    FEWEST,
    MOST,
    Sample,
    Skew,
    Watchdog,
    Way,
    delay_ns,
    enough,
    helped,
    is_right,
    lockups,
    measured,
    next_way,
    stepped_ns,
    target_ns,
    watchdog,
)

WAYS = [Way.SET_TIME, Way.EXEC, Way.RTC]


def sample(trip_ns: int, guest_ns: int = 0) -> Sample:
    return Sample(sent_ns=1000, received_ns=1000 + trip_ns, guest_ns=guest_ns)


def skew(skew_ns: int, uncertainty_ns: int = 0) -> Skew:
    return Skew(skew_ns=skew_ns, uncertainty_ns=uncertainty_ns)


def test_the_shortest_round_trip_counts_and_the_truth_lies_within_it() -> None:
    found = measured([sample(500, 1250), sample(101, 1040), sample(300, 9999)])
    assert found == skew(-10, 51)
    for truth in (1000, 1050, 1101):  # the guest read its clock at any of these
        assert abs(1040 - truth - found.skew_ns) <= found.uncertainty_ns


def test_slow_agents_are_sampled_more_but_not_for_ever() -> None:
    quick, slow = sample(2 * MILLISECOND), sample(3 * MILLISECOND)
    assert not enough([quick] * (FEWEST - 1), MILLISECOND)
    assert enough([quick] * FEWEST, MILLISECOND)
    assert not enough([slow] * (MOST - 1), MILLISECOND)
    assert enough([slow] * (MOST - 1) + [quick], MILLISECOND)
    assert enough([slow] * MOST, MILLISECOND)


@pytest.mark.parametrize(
    ("correct", "trusted", "before", "target"),
    [
        ("all", True, skew(7), 0),
        ("all", True, None, 0),
        ("all", False, skew(7), 7),
        ("all", False, None, None),
        ("ours", True, skew(7), 7),
        ("ours", True, None, None),
        ("ours", False, skew(7), 7),
        ("off", True, skew(7), None),
        ("off", False, None, None),
    ],
)
def test_what_a_guest_is_set_to(
    correct: str, trusted: bool, before: Skew | None, target: int | None
) -> None:
    assert target_ns(correct, trusted, before) == target


def test_right_is_within_the_tolerance_or_what_can_be_seen() -> None:
    assert is_right(skew(5), 0, 5) and not is_right(skew(6), 0, 5)
    assert is_right(skew(6, 6), 0, 5) and not is_right(skew(7, 6), 0, 5)
    assert is_right(skew(-95), -100, 5)


def test_ways_are_taken_in_order_until_refused_or_tried_enough() -> None:
    none = Way.NONE
    assert next_way(WAYS, [], set(), none) is Way.SET_TIME
    assert next_way(WAYS, [Way.SET_TIME] * (ATTEMPTS - 1), set(), none) is Way.SET_TIME
    assert next_way(WAYS, [Way.SET_TIME] * ATTEMPTS, set(), none) is Way.EXEC
    assert next_way(WAYS, [Way.SET_TIME], {Way.SET_TIME}, none) is Way.EXEC
    assert next_way(WAYS, [], {Way.SET_TIME, Way.EXEC}, none) is Way.RTC
    assert next_way(WAYS, [Way.RTC], {Way.SET_TIME, Way.EXEC}, none) is None
    assert next_way([], [], set(), none) is None


def test_a_way_that_works_is_not_left_for_a_coarser_one() -> None:
    assert next_way(WAYS, [Way.SET_TIME], set(), Way.SET_TIME) is Way.SET_TIME
    assert next_way(WAYS, [Way.SET_TIME] * ATTEMPTS, set(), Way.SET_TIME) is None


def test_a_set_that_failed_may_have_helped() -> None:
    assert helped(skew(-5 * SECOND), skew(-20 * MILLISECOND), 0)
    assert not helped(skew(-5 * SECOND), skew(-5 * SECOND - 1), 0)


def test_the_delay_is_what_is_usual_not_what_was_once() -> None:
    assert delay_ns([600]) == 600
    assert delay_ns([600, 16_000]) == 600  # one late call
    assert delay_ns([600, 16_000, 800]) == 800
    assert delay_ns([600, 1500, 1500]) == 1500  # the expectation was wrong
    assert delay_ns([600, -900, -900]) == 0


def test_only_a_step_is_a_step() -> None:
    assert stepped_ns(1000, 1000 + 10_050, 50) == 0
    assert stepped_ns(1000, 1000 + 10_051, 50) == 10_051
    assert stepped_ns(0, -SECOND, 50) == -SECOND


def test_what_linux_says_of_its_watchdog() -> None:
    kvm = watchdog("10\n", "kvm-clock tsc hpet acpi_pm \n")
    assert kvm == Watchdog(threshold_ns=20 * SECOND, pvclock=True)
    assert watchdog("5\n", "tsc\n") == Watchdog(threshold_ns=10 * SECOND, pvclock=False)
    for thresh in ("0\n", "", "nonsense"):
        assert watchdog(thresh, "tsc") is None


def test_lockups_are_found_among_other_lines() -> None:
    log = (
        "[    1.0] Linux version 6.1\n"
        "[   30.1] watchdog: BUG: soft lockup - CPU#0 stuck for 26s! [x:1]\n"
        "[   31.0] rcu: INFO: rcu_preempt self-detected stall on CPU\n"
        "[   32.0] rcu: Hierarchical SRCU implementation.\n"
    )
    assert [line.split("]")[0] for line in lockups(log)] == ["[   30.1", "[   31.0"]
