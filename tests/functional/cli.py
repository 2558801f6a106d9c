"""The program as a user runs it, and the lab's guests as seen from outside."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from hostupdate.lab import console

_TIMEOUT_S = 240


@dataclass(frozen=True)
class Ended:
    """A finished call. ``data`` is its JSON, where it printed some."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        assert self.out, self.err
        return json.loads(self.out)


class Program:
    """``hostupdate`` with a state directory of the test's own."""

    def __init__(self, state: Path, *options: str) -> None:
        self.state = state
        self._argv = [sys.executable, "-m", "hostupdate", "--state", str(state), *options]

    def with_options(self, *options: str) -> Program:
        made = Program(self.state)
        made._argv = [*self._argv, *options]
        return made

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self._argv, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *arguments: str) -> Ended:
        with self.start(*arguments) as process:
            try:
                out, err = process.communicate(timeout=_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        return Ended(process.returncode, out, err)


@dataclass(frozen=True)
class Lab:
    """Running lab guests. ``run`` reaches them."""

    run: Program
    names: tuple[str, ...]

    @property
    def root(self) -> Path:
        return self.run.state / "lab"

    def console(self, name: str) -> Path:
        return self.root / "console" / f"{name}.log"

    def assert_healthy(self, ticks: int = 2) -> None:
        """Every guest's ticks go on and its memory checker has found nothing."""
        deadline_ns = time.monotonic_ns() + 30_000_000_000
        for name in self.names:
            fresh = console.wait_ticks(self.console(name), ticks, deadline_ns)
            assert fresh[-1].bad == 0, f"{name}: damaged memory"

    def apply(self, manifest: Path, *options: str) -> Ended:
        return self.run("apply", str(manifest), "--json", "--yes", *options)


def kill(process: subprocess.Popen[str], number: signal.Signals = signal.SIGKILL) -> int:
    """Sends a signal; CLOCK_MONOTONIC ns just before it."""
    now_ns = time.monotonic_ns()
    os.kill(process.pid, number)
    return now_ns


def await_word(fifo: Path, word: str, process: subprocess.Popen[str]) -> None:
    """Until a step of the process's run has written a word to the fifo."""
    fd = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        while not (found := os.read(fd, 100).decode()):
            if process.poll() is not None:
                raise AssertionError(f"the run has ended before: {process.communicate()}")
            time.sleep(0.005)
    finally:
        os.close(fd)
    assert found == f"{word}\n"


def pids_naming(text: str, program: str = "qemu-system") -> list[int]:
    """Processes of a program whose command line holds a text."""
    return [
        process.pid
        for process in psutil.process_iter(["name", "cmdline"])
        if process.info["name"].startswith(program)
        and any(text in word for word in process.info["cmdline"] or ())
    ]


def end_steps(lab: Lab) -> None:
    """Ends steps of killed runs: they outlive those, since half of a package installation would be
    worse."""
    runs = {path.name for path in (lab.run.state / "runs").glob("*")}
    for process in psutil.process_iter(["environ"]):
        if (process.info["environ"] or {}).get("HOSTUPDATE_RUN") in runs:
            process.kill()


def keepers(lab: Lab) -> list[int]:
    """Keepers of this lab's runs: a keeper has its orchestrator's command line."""
    return pids_naming(str(lab.run.state), "hu-keeper")
