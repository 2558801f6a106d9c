"""Are the lab's guests unharmed? Looks at what they say of themselves after an update.

    unharmed.py BEFORE COMMAND...

BEFORE holds what COMMAND (``hostupdate lab status --json``) printed before the update. Each guest
ticks and checks the stamps in its memory all the time. It is unharmed when its ticks have gone on
since BEFORE, a check that began after the update has ended, and no page was ever found changed.
Exits 0 when that is so for all guests within a minute, else 1.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

TIMEOUT_S = 60.0
POLL_S = 0.5

Ticks = Mapping[str, Mapping[str, Any] | None]


def ticks_of(document: str) -> Ticks:
    """The newest tick of each guest by name; None where it is off or has not begun."""
    guests = json.loads(document)["guests"]
    return {guest["name"]: guest["tick"] if guest["ready"] else None for guest in guests}


def judge(name: str, before: Ticks, first: Ticks, now: Ticks) -> str | None:
    """Empty: unharmed. None: not known yet. Else what is wrong with the guest.

    ``first`` is the first look after the update: the check under way at that moment began before,
    so that the one after it counts.
    """
    old, begun, new = before[name], first.get(name), now.get(name)
    if old is None:
        return "was not running before the update"
    if begun is None or new is None:
        return "does not run any more"
    if new["bad"]:
        return f"found {new['bad']} damaged pages"
    if not old["seq"] <= begun["seq"] <= new["seq"]:
        return "has started anew"
    if new["seq"] > begun["seq"] and new["passes"] >= begun["passes"] + 2:
        return ""
    return None


def describe(tick: Mapping[str, Any]) -> str:
    """One tick in words."""
    return (
        f"ticked {tick['seq']} times, checked its memory {tick['passes']} times, "
        f"{tick['bad']} pages bad"
    )


def watch(before: Ticks, look: Callable[[], Ticks], deadline: float) -> dict[str, str]:
    """What is wrong with each guest (empty: nothing), at the latest at ``deadline`` (monotonic)."""
    first = now = look()
    while True:
        verdicts = {name: judge(name, before, first, now) for name in before}
        if None not in verdicts.values():
            break
        if time.monotonic() >= deadline:
            break
        time.sleep(POLL_S)
        now = look()
    for name, verdict in verdicts.items():
        if verdict == "":
            print(f"{name}: {describe(now[name] or {})}")
    return {name: "is stuck" if verdict is None else verdict for name, verdict in verdicts.items()}


def main(arguments: Sequence[str]) -> int:
    """The program."""
    path, *command = arguments
    with open(path, encoding="utf-8") as file:
        before = ticks_of(file.read())

    def look() -> Ticks:
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=TIMEOUT_S)
        return ticks_of(done.stdout.decode())

    verdicts = watch(before, look, time.monotonic() + TIMEOUT_S)
    for name, problem in verdicts.items():
        if problem:
            print(f"{name}: {problem}", file=sys.stderr)
    if not verdicts:
        print("there were no guests", file=sys.stderr)
    return 0 if verdicts and not any(verdicts.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
