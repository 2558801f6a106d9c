"""The race guard under a real systemd, in a container of this machine's own files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from tests.requirements import BOOTED, need

ROOT = Path(__file__).parents[2]
SERVICE = """\
[Unit]
Wants=dbus.service systemd-logind.service
After=dbus.service systemd-logind.service
[Service]
Type=oneshot
ExecStart=/venv/bin/python3 /out/guarded.py
StandardOutput=file:/out/log
StandardError=inherit
TimeoutStartSec=4min
ExecStopPost=systemctl poweroff --force --force
"""


def test_units_that_act_are_held_still_and_act_again_afterwards(tmp_path: Path) -> None:
    need("root", "container")
    shutil.copy(Path(__file__).with_name("guarded.py"), tmp_path)
    (tmp_path / "test.service").write_text(SERVICE)

    done = subprocess.run(
        [*BOOTED, str(tmp_path), str(ROOT), sys.prefix, "boot"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
    )

    log = tmp_path / "log"
    told = log.read_text() if log.exists() else done.stdout + done.stderr
    assert (tmp_path / "seen.json").exists(), told
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert {"libvirt-guests.service", "apt-daily.service"} <= set(seen["units"])
    assert (seen["inhibit"], seen["notes"]) == (True, [])
    assert "hostupdate" in seen["inhibitors"]
    assert seen["daily_before"] and seen["skipped"] and seen["events_held"] == []
    assert (seen["restart"], seen["stop"], seen["start"]) == ("", "", "")
    assert seen["guests_as_before"] and seen["timer"] == "active"
    assert seen["daily_after"] and seen["events_after"] == ["daily", "stop"]
