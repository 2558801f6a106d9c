"""The host's service manager, asked through systemctl."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

from hostupdate.errors import DeadlineError, HostUpdateError, PrerequisiteError

_PROPERTIES = ("Id", "LoadState", "ActiveState", "DropInPaths")


class Systemd:
    """``root`` and ``path`` as for the Guard. Each call to systemctl raises HostUpdateError where
    it fails, DeadlineError after ``timeout_ns`` (systemd may still do it then), PrerequisiteError
    where there is no systemctl."""

    def __init__(self, root: Path, path: str | None, timeout_ns: int) -> None:
        self._root = root
        self._path = path
        self._timeout_ns = timeout_ns

    def runs(self) -> bool:
        """Whether the host was booted with it (sd_booted(3))."""
        return (self._root / "run/systemd/system").is_dir()

    def show(self, units: Iterable[str]) -> dict[str, dict[str, str]]:
        """LoadState (not-found: no such unit), ActiveState and DropInPaths of each unit."""
        names = list(units)
        said = self._call("show", f"--property={','.join(_PROPERTIES)}", *names)
        lines = [[x.partition("=") for x in b.splitlines()] for b in said.split("\n\n")]
        blocks = [{key: value for key, _, value in block} for block in lines]
        if len(blocks) != len(names) or any(set(block) != set(_PROPERTIES) for block in blocks):
            raise HostUpdateError(f"systemctl show: not understood: {said[:200]!r}")
        return dict(zip(names, blocks, strict=True))  # in this order; Id may be an alias's

    def reload(self) -> None:
        """Has it read all units anew."""
        self._call("daemon-reload")

    def shutdown_in_ns(self) -> int | None:
        """Time left before the shutdown that shutdown(8) scheduled; None where there is none."""
        try:
            text = (self._root / "run/systemd/shutdown/scheduled").read_text()
        except FileNotFoundError:
            return None
        at_us = re.search(r"^USEC=(\d+)$", text, re.MULTILINE)
        return max(0, int(at_us[1]) * 1000 - time.time_ns()) if at_us else 0

    def _call(self, *arguments: str) -> str:
        what = f"systemctl {arguments[0]}"
        program = shutil.which("systemctl", path=self._path)
        if program is None:
            raise PrerequisiteError("systemctl is not installed", remedy="install systemd")
        with subprocess.Popen(
            (program, "--no-ask-password", "--no-pager", *arguments),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "LC_ALL": "C.UTF-8", "SYSTEMD_COLORS": "0"},
            start_new_session=True,
        ) as process:
            try:
                said, complained = process.communicate(timeout=self._timeout_ns / 1e9)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # not reaped yet: the group is its own
                raise DeadlineError(what, self._timeout_ns) from None
        if process.returncode:
            told = complained.decode(errors="replace").strip().partition("\n")[0]
            raise HostUpdateError(f"{what}: {told or f'exit status {process.returncode}'}")
        return said.decode(errors="replace").strip()
