"""What test_guard.py runs under a systemd of its own: the guard against units that act.

Writes what it saw to /out/seen.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, "/checkout")

from hostupdate.host.guard import Guard

EVENTS = Path("/out/events")
UNITS = {
    "libvirt-guests.service": "[Service]\nType=oneshot\nRemainAfterExit=yes\n"
    "ExecStart=sh -c 'echo start >>/out/events'\nExecStop=sh -c 'echo stop >>/out/events'\n",
    "apt-daily.service": "[Service]\nType=oneshot\nExecStart=sh -c 'echo daily >>/out/events'\n",
    "apt-daily.timer": "[Timer]\nOnCalendar=*:*:*\nAccuracySec=1ms\n",
}


def systemctl(*arguments: str) -> str:
    done = subprocess.run(["systemctl", *arguments], capture_output=True, text=True, timeout=60)
    return (done.stdout + done.stderr).strip()


def state(unit: str) -> str:
    return systemctl("show", "--property=LoadState,ActiveState,SubState,Result,DropInPaths", unit)


def new_events() -> list[str]:
    text = EVENTS.read_text()
    os.truncate(EVENTS, 0)
    return text.split()


def wait_until(met: Callable[[], bool]) -> bool:
    give_up_s = time.monotonic() + 60
    while not met() and time.monotonic() < give_up_s:
        time.sleep(0.05)
    return met()


def skips() -> int:
    """How often the timer's unit was not started for its condition."""
    told = subprocess.run(
        ["journalctl", "--unit=apt-daily.service", "--grep=unmet condition", "--output=cat"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    return len(told.stdout.splitlines())


def main() -> dict[str, object]:
    seen: dict[str, object] = {}
    EVENTS.touch()
    for name, text in UNITS.items():
        Path("/usr/lib/systemd/system", name).write_text(text)
    systemctl("daemon-reload")
    systemctl("start", "libvirt-guests.service", "apt-daily.timer")
    seen["daily_before"] = wait_until(lambda: "daily" in EVENTS.read_text())
    before = state("libvirt-guests.service")

    guard = Guard()
    rivals = guard.survey("qemu:///system")
    seen["units"], seen["inhibit"] = rivals.units, rivals.inhibit
    seen["notes"] = guard.hold(rivals)
    wait_until(lambda: "SubState=dead" in state("apt-daily.service"))
    new_events()
    seen["skipped"] = wait_until(lambda: skips() >= 2)
    for verb in ("restart", "stop", "start"):
        seen[verb] = systemctl(verb, "libvirt-guests.service")
    seen["inhibitors"] = subprocess.run(
        ["systemd-inhibit", "--list"], capture_output=True, text=True, timeout=60
    ).stdout
    seen["events_held"] = new_events()

    guard.close()
    guard.restore(rivals.held)
    seen["timer"] = systemctl("is-active", "apt-daily.timer")
    seen["guests_as_before"] = state("libvirt-guests.service") == before
    seen["daily_after"] = wait_until(lambda: "daily" in EVENTS.read_text())
    systemctl("stop", "apt-daily.timer")
    systemctl("stop", "libvirt-guests.service")
    seen["events_after"] = sorted(set(new_events()))
    return seen


if __name__ == "__main__":
    Path("/out/seen.json").write_text(json.dumps(main(), indent=2))
