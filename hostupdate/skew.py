"""How far a guest's clock is from the host's, and what to do about it.

The skew of a guest is its real time minus the host's. The host's real time is read once, as its
distance from CLOCK_MONOTONIC, and carried on by that clock: nobody can step it under a measurement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from hostupdate.durations import MILLISECOND

#: A measurement has at least so many samples, and at most so many where the agent is slow.
FEWEST, MOST = 4, 16
#: How often one way of setting a clock is tried. A busy guest takes each set with another delay:
#: it is set until one hits. The RTC counts seconds, once must do.
ATTEMPTS = 32
#: A change of the host's CLOCK_REALTIME minus CLOCK_MONOTONIC above this is a step. Slewing moves
#: both alike; what is allowed here is for rounding.
STEP_NS = 10_000


class Way(StrEnum):
    """How a guest's clock was set, in the order of preference."""

    NONE = "none"  #: it was right
    SET_TIME = "guest-set-time"
    EXEC = "guest-exec"
    RTC = "rtc-sync"  #: from the guest's RTC, by libvirt


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A guest's real time, read somewhere between two instants of the host's real time."""

    sent_ns: int
    received_ns: int
    guest_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Skew:
    """``skew_ns`` above zero: the guest is ahead. The truth is within ``uncertainty_ns``."""

    skew_ns: int
    uncertainty_ns: int


def enough(samples: Sequence[Sample], tolerance_ns: int) -> bool:
    """Whether more samples would make no difference that matters, or may not be taken."""
    if len(samples) < FEWEST:
        return False
    return len(samples) >= MOST or measured(samples).uncertainty_ns <= tolerance_ns


def measured(samples: Sequence[Sample]) -> Skew:
    """The skew by the sample with the shortest round trip."""
    best = min(samples, key=lambda sample: sample.received_ns - sample.sent_ns)
    trip_ns = best.received_ns - best.sent_ns
    return Skew(
        skew_ns=best.guest_ns - best.sent_ns - trip_ns // 2,
        uncertainty_ns=(trip_ns + 1) // 2,
    )


def stepped_ns(before_ns: int, after_ns: int, uncertainty_ns: int) -> int:
    """How far the host's clock was stepped between two readings of its distance from
    CLOCK_MONOTONIC; 0 where the difference proves no step."""
    moved_ns = after_ns - before_ns
    return moved_ns if abs(moved_ns) > uncertainty_ns + STEP_NS else 0


def target_ns(correct: str, trusted: bool, before: Skew | None) -> int | None:
    """The skew that a guest is to have; None: its clock is left alone.

    ``correct`` is all, ours or off. To a host clock that is not trusted no guest is set: it gets
    back the skew that it had, if that is known.
    """
    if correct == "off":
        return None
    if correct == "all" and trusted:
        return 0
    return before.skew_ns if before is not None else None


def is_right(now: Skew, target_ns: int, tolerance_ns: int) -> bool:
    """Whether the skew is the wanted one, as far as can be seen."""
    return abs(now.skew_ns - target_ns) <= max(tolerance_ns, now.uncertainty_ns)


def next_way(
    ways: Sequence[Way], tried: Sequence[Way], refused: frozenset[Way] | set[Way], worked: Way
) -> Way | None:
    """The way by which to set the clock next; None where no way is left. One that has ``worked``
    is not left for a coarser one."""
    for way in ways if worked is Way.NONE else [worked]:
        attempts = 1 if way is Way.RTC else ATTEMPTS
        if way not in refused and tried.count(way) < attempts:
            return way
    return None


def helped(before: Skew, after: Skew, target_ns: int) -> bool:
    """Whether a set that reported an error has set the clock all the same, or nearly."""
    return abs(after.skew_ns - target_ns) < abs(before.skew_ns - target_ns) // 2


def delay_ns(observed_ns: Sequence[int]) -> int:
    """How long the next set will be under way, from what was expected first and then seen.

    The lower median of the last three: one late call does not count, three show what is usual.
    """
    last = sorted(observed_ns[-3:])
    return max(0, last[(len(last) - 1) // 2])


@dataclass(frozen=True, slots=True, kw_only=True)
class Watchdog:
    """What a guest says of its soft-lockup watchdog: it barks ``threshold_ns`` after a vCPU was
    last seen alive, unless a ``pvclock`` tells the guest that it was stopped."""

    threshold_ns: int
    pvclock: bool


def watchdog(thresh: str, clock_sources: str) -> Watchdog | None:
    """From Linux's ``kernel.watchdog_thresh`` (s; 0: off) and its available clock sources.

    It barks after twice the threshold (kernel/watchdog.c, get_softlockup_thresh). The pvclock need
    not be the source in use: kvm_check_and_clear_guest_paused looks whether it is there.
    """
    if not thresh.strip().isdigit() or int(thresh) == 0:
        return None
    return Watchdog(
        threshold_ns=int(thresh) * 2000 * MILLISECOND,
        pvclock="kvm-clock" in clock_sources.split(),
    )


def lockups(log: str) -> tuple[str, ...]:
    """The lines of a guest's kernel log that tell of a stall."""
    words = ("soft lockup", "hard LOCKUP", "rcu: INFO", "clocksource: timekeeping watchdog")
    return tuple(line.strip() for line in log.splitlines() if any(word in line for word in words))


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What is wanted of one guest's clock. ``answered``: its agent did before the pause;
    ``target_ns`` None: it is only measured."""

    uuid: str
    target_ns: int | None
    answered: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Corrected:
    """What became of one guest's clock: the skew that was found, the skew at the end, how it was
    set. ``problem``: why it is not right, or not known to be; empty where it is right."""

    found: Skew | None = None
    now: Skew | None = None
    way: Way | None = None
    problem: str = ""
    remedy: str = ""
    notes: tuple[str, ...] = ()
