"""One run a host: the second is told who has it, and a dead holder is in nobody's way."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.functional.cli import Lab, await_word, kill
from tests.functional.test_deadman import wait_keepers

#: Says that the guests are paused, and waits until it is told to go on.
WAIT = """[[step]]
name = "wait"
phase = "blackout"
run = ["sh", "-c", "echo paused > {dir}/paused; read line < {dir}/go"]
timeout = "20s"
"""
QUICK = '[[step]]\nname = "x"\nphase = "blackout"\nrun = ["true"]\ntimeout = "1s"\n'


@pytest.fixture
def holder(
    lab: Lab, tmp_path: Path, write_manifest: Callable[..., Path]
) -> Iterator[subprocess.Popen[str]]:
    """A run in the middle of its blackout. Writing to ``go`` lets it end."""
    for name in ("paused", "go"):
        os.mkfifo(tmp_path / name)
    manifest = write_manifest(WAIT.format(dir=tmp_path)).rename(tmp_path / "holder.toml")
    process = lab.run.start("apply", str(manifest), "--json", "--pause-method", "freeze")
    await_word(tmp_path / "paused", "paused", process)
    yield process
    process.kill()
    process.communicate(timeout=60)
    with suppress(OSError):  # the step outlives a run that was killed
        os.close(os.open(tmp_path / "go", os.O_WRONLY | os.O_NONBLOCK))


def test_a_second_run_is_told_who_holds_the_host(
    lab: Lab,
    holder: subprocess.Popen[str],
    tmp_path: Path,
    write_manifest: Callable[..., Path],
) -> None:
    manifest = write_manifest(QUICK)
    runs = sorted(os.listdir(lab.run.state / "runs"))
    start_ns = time.monotonic_ns()
    second = lab.apply(manifest)
    assert (second.code, second.data["exit_code"]) == (75, 75), second.err
    assert time.monotonic_ns() - start_ns < 10_000_000_000
    assert "Traceback" not in second.err
    ended = {report["run_id"] for report in lab.run("report", "--list", "--json").data["runs"]}
    (run_id,) = set(runs) - ended
    for words in (f"run {run_id}", f"pid {holder.pid}", "since 20", "hostupdate status"):
        assert words in second.err
        assert words in second.data["error"] + second.data["remedy"]
    assert sorted(os.listdir(lab.run.state / "runs")) == runs, "the refused run left something"
    status = lab.run("status", "--json").data
    assert f"pid {holder.pid}" in status["holder"]
    assert status["interrupted"] is None

    (tmp_path / "go").write_text("go\n")
    out, err = holder.communicate(timeout=60)
    assert holder.returncode == 0, err
    assert run_id in out
    assert lab.run("status", "--json").data["holder"] is None
    assert lab.apply(manifest).code == 0


def test_a_dry_run_needs_no_lock(
    lab: Lab, holder: subprocess.Popen[str], tmp_path: Path, write_manifest: Callable[..., Path]
) -> None:
    # The lab's driver serves one process at a time; so this one gets as far as opening it.
    dry = lab.run("apply", str(write_manifest(QUICK)), "--dry-run")
    assert dry.code != 75
    (tmp_path / "go").write_text("go\n")
    holder.communicate(timeout=60)


def test_a_killed_holder_blocks_nobody(
    lab: Lab, holder: subprocess.Popen[str], write_manifest: Callable[..., Path]
) -> None:
    kill(holder)
    holder.wait(timeout=30)
    wait_keepers(lab)
    assert lab.run("status", "--json").data["holder"] is None
    again = lab.apply(write_manifest(QUICK))
    assert again.code == 0, again.err
