"""The scripts in tools/, as far as that goes without installing anything."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from hostupdate.config import Config
from hostupdate.manifest import decode_manifest
from hostupdate.model import PauseMethod, Phase
from hostupdate.prediction import RESERVE_NS

TOOLS = Path(__file__).parents[2] / "tools"


def bash(
    script: str, path: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """``script`` as one that sources tools/lib.sh would run; programs in ``path`` come first."""
    programs = f"{path}:{os.environ['PATH']}" if path else os.environ["PATH"]
    return subprocess.run(
        ["bash", "-c", f"set -euo pipefail; . {TOOLS}/lib.sh; {script}"],
        env={**os.environ, **environment, "PATH": programs},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
    )


def fake(directory: Path, name: str, script: str) -> None:
    program = directory / name
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


# ---- the demo's manifest


@pytest.mark.parametrize("package", ["numactl", "hello", "bridge-utils"])
def test_the_demos_manifest_is_one_for_every_package(package: str) -> None:
    text = (TOOLS / "demo.toml").read_text().replace("numactl", package)

    manifest = decode_manifest(text.encode(), "demo.toml")

    assert manifest.update.name == package
    (install,) = manifest.steps_in(Phase.BLACKOUT)
    assert install.undo == ("dpkg", "--purge", package)
    assert install.verify is not None and install.verify[-1] == package


def test_the_demos_blackout_fits_its_budget_and_a_freeze() -> None:
    manifest = decode_manifest((TOOLS / "demo.toml").read_bytes(), "demo.toml")

    ceiling_ns = RESERVE_NS[PauseMethod.FREEZE] + sum(
        step.timeout_ns or 0 for step in manifest.steps_in(Phase.BLACKOUT)
    )

    assert all(step.timeout_ns for step in manifest.steps_in(Phase.BLACKOUT))
    assert ceiling_ns <= (manifest.update.budget_ns or 0)
    assert ceiling_ns <= Config().pause.freeze_limit_ns


# ---- command lines


@pytest.mark.parametrize("tool", ["demo", "test"])
def test_help_says_how_to_use_it(tool: str) -> None:
    done = subprocess.run([TOOLS / tool, "--help"], capture_output=True, text=True, timeout=30)

    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: sudo tools/{tool}")


@pytest.mark.parametrize(
    ("argv", "status"),
    [(["demo", "--nonsense"], 2), (["test", "--only"], 2), (["test", "--only", "nonsense"], 1)],
)
def test_a_wrong_command_line_is_refused_before_anything_is_done(
    argv: list[str], status: int
) -> None:
    done = subprocess.run([TOOLS / argv[0], *argv[1:]], capture_output=True, text=True, timeout=30)

    assert done.returncode == status
    assert done.stderr
    assert "==>" not in done.stdout


# ---- tools/lib.sh


def test_cleaning_up_runs_backwards_once_and_keeps_the_status() -> None:
    done = bash("a() { echo a; }; b() { echo b; }; clean_up_at_exit; at_exit a; at_exit b; exit 7")

    assert (done.returncode, done.stdout.split()) == (7, ["b", "a"])


def test_a_cleanup_that_fails_stops_no_other_and_is_a_failure() -> None:
    done = bash("a() { echo a; }; b() { false; }; clean_up_at_exit; at_exit a; at_exit b; exit 0")

    assert (done.returncode, done.stdout.split()) == (1, ["a"])
    assert "cleaning up failed: b" in done.stderr


@pytest.mark.parametrize(("signal", "status"), [("INT", 130), ("TERM", 143), ("HUP", 129)])
def test_a_signal_cleans_up(signal: str, status: int) -> None:
    done = bash(f"a() {{ echo a; }}; clean_up_at_exit; at_exit a; kill -{signal} $$; echo no")

    assert (done.returncode, done.stdout.split()) == (status, ["a"])


def test_a_failed_step_is_named() -> None:
    done = bash('clean_up_at_exit; begin "one"; begin "two"; false')

    assert done.returncode == 1
    assert "==> one" in done.stdout and "done in" in done.stdout
    assert "FAILED (exit 1): two" in done.stderr


def test_output_of_a_quiet_command_is_shown_only_if_it_fails() -> None:
    assert bash("quietly echo hello").stdout == ""

    done = bash("quietly sh -c 'echo hello; exit 3'")
    assert done.returncode == 1
    assert "hello" in done.stderr and "exit status 3" in done.stderr


def test_missing_packages_are_named_by_their_first_name(tmp_path: Path) -> None:
    fake(
        tmp_path,
        "dpkg-query",
        'for last; do :; done\ncase $last in have*) printf "installed ";; '
        'gone) printf "config-files ";; *) exit 1;; esac',
    )

    done = bash("missing_packages have-it 'lack|have-other' 'no|none' gone", tmp_path)

    assert done.stdout.split() == ["no", "gone"]


@pytest.mark.skipif(not shutil.which("apt-get"), reason="apt-get is not installed")
def test_nothing_is_installed_where_nothing_is_missing(tmp_path: Path) -> None:
    fake(tmp_path, "dpkg-query", 'printf "installed "')
    fake(tmp_path, "apt-get", "echo no >&2; exit 1")

    done = bash("need_packages one two", tmp_path)

    assert done.returncode == 0, done.stderr
    assert "all 2 are installed" in done.stdout


def test_this_python_fits_and_none_and_an_old_one_do_not(tmp_path: Path) -> None:
    fake(tmp_path, "old", "exit 1")

    assert bash(f"python_fits {sys.executable}").returncode == 0
    assert bash(f"python_fits {tmp_path}/old").returncode != 0
    assert bash(f"python_fits {tmp_path}/none").returncode != 0


def test_a_directory_that_is_no_virtual_environment_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").touch()

    done = bash("make_venv", HOSTUPDATE_VENV=str(tmp_path))

    assert done.returncode == 1
    assert "no virtual environment" in done.stderr
    assert (tmp_path / "precious").exists()


# ---- tools/unharmed.py


@pytest.fixture(scope="module")
def unharmed() -> ModuleType:
    spec = importlib.util.spec_from_file_location("unharmed", TOOLS / "unharmed.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tick(seq: int, passes: int, bad: int = 0) -> dict[str, int]:
    return {"seq": seq, "passes": passes, "bad": bad}


@pytest.mark.parametrize(
    ("first", "now", "verdict"),
    [
        (tick(20, 3), tick(30, 5), ""),
        (tick(20, 3), tick(30, 4), None),  # that check began before the update
        (tick(20, 3), tick(20, 3), None),
        (tick(20, 3), tick(30, 5, bad=2), "found 2 damaged pages"),
        (tick(5, 0), tick(30, 5), "has started anew"),
        (tick(20, 3), tick(5, 0), "has started anew"),
        (tick(20, 3), None, "does not run any more"),
        (None, None, "does not run any more"),
    ],
)
def test_verdicts(
    unharmed: ModuleType,
    first: dict[str, int] | None,
    now: dict[str, int] | None,
    verdict: str | None,
) -> None:
    assert unharmed.judge("g", {"g": tick(10, 2)}, {"g": first}, {"g": now}) == verdict


def test_guests_are_looked_at_until_they_are_known_to_be_unharmed(
    unharmed: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def status(*ticks: dict[str, int]) -> str:
        guests = [{"name": f"g{n}", "ready": True, "tick": t} for n, t in enumerate(ticks)]
        return json.dumps({"guests": guests})

    before = tmp_path / "before.json"
    before.write_text(status(tick(1, 0), tick(1, 0)))
    shown = tmp_path / "now.json"
    shown.write_text(status(tick(9, 1), tick(9, 1)))
    later = tmp_path / "later.json"
    later.write_text(status(tick(20, 3), tick(20, 3)))

    code = unharmed.main([str(before), "sh", "-c", f"cat {shown}; cp {later} {shown}"])

    assert code == 0
    assert capsys.readouterr().out.count("0 pages bad") == 2


def test_no_guests_prove_nothing(unharmed: ModuleType, tmp_path: Path) -> None:
    before = tmp_path / "before.json"
    before.write_text('{"guests": []}')

    assert unharmed.main([str(before), "cat", str(before)]) == 1
