"""The systemd units, as systemd itself reads them."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from hostupdate.cli.settings import DEFAULT_STATE
from hostupdate.model import ExitCode
from tests.requirements import need

ROOT = Path(__file__).parents[2]
UNITS = sorted((ROOT / "systemd").iterdir())
SERVICES = [unit for unit in UNITS if unit.suffix == ".service"]
TIMERS = [unit for unit in UNITS if unit.suffix == ".timer"]
RESUME = ROOT / "systemd" / "hostupdate-resume.service"


def verify(unit: Path, text: str) -> subprocess.CompletedProcess[str]:
    """systemd's opinion of ``text``, which may call a program that is not installed here, among
    the other units."""
    for other in SERVICES:
        (unit.parent / other.name).write_text(_callable(other.read_text()))
    unit.write_text(_callable(text))
    argv = ["systemd-analyze", "verify", "--recursive-errors=no", "--man=no", str(unit)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60)


def _callable(text: str) -> str:
    return text.replace("=hostupdate ", "=/bin/true ")


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_finds_nothing_wrong_with_the_unit(unit: Path, tmp_path: Path) -> None:
    need("systemd-analyze")

    done = verify(tmp_path / unit.name, unit.read_text())

    assert (done.returncode, done.stderr) == (0, "")


def test_systemd_would_find_a_wrong_word(tmp_path: Path) -> None:
    need("systemd-analyze")

    done = verify(tmp_path / "x.service", RESUME.read_text() + "Nonsense=yes\n")

    assert "Nonsense" in done.stderr


def test_resume_is_run_where_a_run_was_interrupted_and_only_there() -> None:
    text = RESUME.read_text()

    assert f"ConditionPathExists={DEFAULT_STATE}/pending.json\n" in text
    fine = re.search(r"^SuccessExitStatus=(.*)", text, re.M)
    assert fine and fine[1].split() == [str(int(ExitCode.DEGRADED)), str(int(ExitCode.BUSY))]


@pytest.mark.parametrize("unit", TIMERS, ids=lambda unit: unit.name)
def test_a_timer_starts_the_service_of_its_name_again_and_again(unit: Path) -> None:
    text = unit.read_text()

    assert unit.with_suffix(".service") in SERVICES and "Unit=" not in text
    assert re.findall(r"^On(\w+)=(.*)", text, re.M) == [
        ("BootSec", "1min"),
        ("UnitInactiveSec", "1min"),  # also after a try that failed, or had nothing to do
    ]
    assert "WantedBy=timers.target\n" in text


def test_a_resume_that_is_tried_each_minute_has_a_timer() -> None:
    assert RESUME.with_suffix(".timer") in TIMERS


def test_systemd_does_not_end_a_resume_that_runs_an_undo() -> None:
    assert re.findall(r"^(?:Timeout|RuntimeMax)\w*=.*", RESUME.read_text(), re.M) == [
        "TimeoutStartSec=infinity"  # the run's steps decide how long theirs take
    ]


def test_every_unit_is_installed_and_calls_a_program_that_is() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    installed = project["tool"]["setuptools"]["data-files"]["lib/systemd/system"]

    assert installed == [f"systemd/{unit.name}" for unit in UNITS]
    for unit in SERVICES:
        program = re.search(r"^ExecStart=(\S+)", unit.read_text(), re.M)
        assert program and program[1] in project["project"]["scripts"]
