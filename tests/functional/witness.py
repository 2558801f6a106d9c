"""A guest's clock as its console shows it: no agent and nothing of ours in between."""

from __future__ import annotations

import time
from pathlib import Path

from hostupdate.lab import console

_POLL_S = 0.0005


def lag_ns(log: Path, ticks: int = 5) -> int:
    """Host's real time minus the guest's, and the least time that a tick needed to be seen here.

    What a tick needs is the same each time but for the load: two lags compare to some ms.
    """
    newest = console.last_tick(log)
    lags: list[int] = []
    deadline_ns = time.monotonic_ns() + 30_000_000_000
    while len(lags) < ticks:
        assert time.monotonic_ns() < deadline_ns, "the console is silent"
        tick = console.last_tick(log)
        seen_ns = time.time_ns()
        if tick is not None and (newest is None or tick.seq != newest.seq):
            if newest is not None:
                lags.append(seen_ns - tick.real_ns)
            newest = tick
        time.sleep(_POLL_S)
    return min(lags)
