"""Bracketed readings of one clock against another."""

from __future__ import annotations

from dataclasses import dataclass

from hostupdate.core._boundary import check, ffi, lib

__all__ = ("Reading", "bracket", "synchronised")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """``reading_ns`` of a clock at ``reference_ns`` of another, give or take ``uncertainty_ns``."""

    reference_ns: int
    reading_ns: int
    uncertainty_ns: int

    @property
    def offset_ns(self) -> int:
        """How far the clock is ahead of its reference."""
        return self.reading_ns - self.reference_ns


def bracket(reference_clock: int, clock: int, *, tries: int = 16) -> Reading:
    """The tightest of ``tries`` readings of ``clock``, each between two of ``reference_clock``.

    Clocks are ``time.CLOCK_*`` numbers. Raises CoreError: EINVAL for no such clock or no tries,
    EAGAIN where the reference went backwards during every try.
    """
    result = ffi.new("struct hu_clock_reading *")
    check("hu_clock_bracket", lib.hu_clock_bracket(reference_clock, clock, tries, result))
    return Reading(
        reference_ns=result.reference_ns,
        reading_ns=result.reading_ns,
        uncertainty_ns=result.uncertainty_ns,
    )


def synchronised() -> bool:
    """Whether something keeps the host's real time right, by the kernel's account (STA_UNSYNC)."""
    return bool(check("hu_clock_synchronised", lib.hu_clock_synchronised()))
