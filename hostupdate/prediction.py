"""How long a blackout may become, said before it begins.

The prediction is a ceiling, not an estimate: what the manifest allows its steps, plus what is kept
for letting guests run again. An update is refused on it, so it must never be too small.
"""

from __future__ import annotations

from collections.abc import Iterable

from hostupdate.model import PauseMethod

#: Kept free at the end of a budget, so that the engine resumes guests before the keeper must.
#: Freeze: a thaw of 8 guests takes under 1 ms; the rest is for a busy host's scheduler.
#: Stop: libvirt resumes guests by one monitor command each.
RESERVE_NS = {PauseMethod.FREEZE: 200_000_000, PauseMethod.STOP: 1_000_000_000}


def blackout_ceiling_ns(timeouts_ns: Iterable[int | None], method: PauseMethod) -> int | None:
    """Longest blackout, in ns, that blackout steps with these timeouts can cause.

    ``None`` where a step has no timeout of its own: then it may take what the budget leaves.
    """
    total_ns = RESERVE_NS[method]
    for timeout_ns in timeouts_ns:
        if timeout_ns is None:
            return None
        total_ns += timeout_ns
    return total_ns


#: A full digest reads RAM at this rate at least: half of what one core of a slow host was measured
#: to do.
_DIGEST_BYTES_PER_S = 2_000_000_000


def full_digests_ns(ram_bytes: int) -> int:
    """How long two digests of all RAM may take: one after the stop, one before the start."""
    return 2 * ram_bytes * 1_000_000_000 // _DIGEST_BYTES_PER_S
