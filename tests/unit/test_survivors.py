"""Steps that outlived their run, as real processes: which they are, whatever became of them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostupdate.host.steps import RUN, Steps
from hostupdate.host.survivors import Survivors
from hostupdate.manifest import Step
from hostupdate.model import Phase

SECOND = 1_000_000_000


@pytest.fixture
def steps(tmp_path: Path) -> Iterator[Steps]:
    (tmp_path / "steps").mkdir()
    made = Steps({"PATH": os.environ["PATH"], RUN: "r1"})
    yield made
    made.close()


@pytest.fixture
def survivors(tmp_path: Path) -> Survivors:
    return Survivors("r1", tmp_path)


@pytest.mark.parametrize("wrapper", [(), ("nice",), ("env", "A=b"), ("sh", "-c", 'exec "$0" "$@"')])
def test_a_step_is_found_whatever_program_it_has_become(
    steps: Steps, survivors: Survivors, tmp_path: Path, wrapper: tuple[str, ...]
) -> None:
    there = tmp_path / "there"
    argv = (*wrapper, "sh", "-c", f"echo $$ >{there}; mv {there} {there}2; sleep 60; :")
    steps.prepare(Step(name="s", phase=Phase.STAGE, run=argv), tmp_path / "steps" / "01.log")
    ran = threading.Thread(target=steps.run, args=("s", time.monotonic_ns() + 50 * SECOND, ()))
    ran.start()
    while not Path(f"{there}2").exists():
        time.sleep(0.01)

    pid = survivors.find("s", argv)

    assert pid == int(Path(f"{there}2").read_text())
    assert survivors.find("s", ("sh",)) is None and survivors.find("other", argv) is None
    assert not survivors.end(pid, 0), "it did not end by itself"
    ran.join()
    assert survivors.find("s", argv) is None


def test_an_undo_that_outlives_its_recovery_is_found_by_the_next(
    survivors: Survivors, tmp_path: Path
) -> None:
    (tmp_path / "steps").mkdir()
    argv = ("nice", "sleep", "60")
    found: list[str] = []
    ran = threading.Thread(target=lambda: found.append(survivors.run("s", argv, 50 * SECOND)))
    ran.start()
    while (pid := Survivors("r1", tmp_path).find("s", argv)) is None:
        time.sleep(0.01)

    survivors.end(pid, 0)

    ran.join()
    assert found == ["was ended by signal 15"]


def test_a_daemon_that_a_step_has_started_is_not_the_step(
    steps: Steps, survivors: Survivors, tmp_path: Path
) -> None:
    told = tmp_path / "pid"
    daemon = f"setsid sh -c 'echo $$ >{told}; exec sleep 60' &"
    argv = ("sh", "-c", f"{daemon} while [ ! -s {told} ]; do sleep 0.01; done")
    steps.prepare(Step(name="s", phase=Phase.STAGE, run=argv), tmp_path / "steps" / "01.log")
    steps.run("s", time.monotonic_ns() + 50 * SECOND, ())
    pid = int(told.read_text())

    assert survivors.find("s", argv) is None

    os.kill(pid, 9)
