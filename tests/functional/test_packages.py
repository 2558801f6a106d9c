"""Packages are judged, installed and taken back by real apt and dpkg, in a root of their own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.functional.aptroot import AptRoot
from tests.functional.cli import Ended, Lab

UNIT = "usr/lib/systemd/system/{}.service"
OLD, NEW = "1:1.0-1", "1:2.0-1"
LATER = '[[step]]\nname = "later"\nphase = "stage"\nrun = ["{}"]\n'

Apply = Callable[..., Ended]


@pytest.fixture(params=["copy", "file"])
def apt(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lab: Lab
) -> AptRoot:
    """``hu-tool`` is installed; its newer version needs ``hu-library``, which is not."""
    shutil.rmtree(lab.run.state / "packages", ignore_errors=True)
    made = AptRoot(tmp_path, request.param)
    made.build("hu-tool", OLD, {"usr/share/hu-tool/data": "old\n"})
    made.install("hu-tool")
    made.build("hu-library", "3", {"usr/share/hu-library/data": "new\n"})
    made.build("hu-tool", NEW, {"usr/share/hu-tool/data": "new\n"}, depends="hu-library")
    for name, value in made.environment.items():
        monkeypatch.setenv(name, value)
    return made


@pytest.fixture
def apply(lab: Lab, tmp_path: Path) -> Apply:
    def run(names: str, *steps: str, options: tuple[str, ...] = ("--json", "--yes")) -> Ended:
        path = tmp_path / "update.toml"
        wanted = "all = true" if names == "all" else f"upgrade = {names.split()}"
        path.write_text(f'[update]\nname = "u"\n[packages]\n{wanted}\n' + "\n".join(steps))
        return lab.run("apply", str(path), *options)

    return run


def data(apt: AptRoot) -> str:
    return (apt.root / "usr/share/hu-tool/data").read_text()


def kept(lab: Lab) -> list[str]:
    return sorted(path.name for path in (lab.run.state / "packages").rglob("*.deb"))


@pytest.mark.parametrize("names", ["hu-tool", "all"])
def test_packages_that_no_guest_uses_are_installed_while_guests_run(
    apt: AptRoot, apply: Apply, lab: Lab, names: str
) -> None:
    plan = apply(names, options=("--dry-run", "--json")).data
    assert plan["actual"] == "none"
    assert plan["packages"] == [
        {"name": "hu-library", "from": "", "to": "3", "impact": "none",
         "reason": "it is new: nothing uses it yet", "evidence": []},
        {"name": "hu-tool", "from": OLD, "to": NEW, "impact": "none",
         "reason": "no guest's QEMU uses it, and it holds no service", "evidence": []},
    ]  # fmt: skip
    text = apply(names, options=("--dry-run",)).out
    assert f"package hu-tool ({OLD} -> {NEW}): none" in text and f"hu-tool={NEW}" in text
    assert kept(lab) == [] and apt.installed() == {"hu-tool": OLD}

    ended = apply(names)
    assert ended.code == 0, (ended.data["reasons"], ended.data["steps"])
    assert apt.installed() == {"hu-tool": NEW, "hu-library": "3"} and data(apt) == "new\n"
    assert [step["exit"] for step in ended.data["steps"]] == [0] * 5
    assert kept(lab) == []
    assert "hu-library" in apt.run("apt-mark", "showauto")

    again = apply(names)  # nothing is left to be done
    assert again.code == 0 and again.data["steps"] == []
    assert "nothing to upgrade" in apply(names, options=("--dry-run",)).out


def test_what_fails_later_takes_the_packages_back(apt: AptRoot, apply: Apply, lab: Lab) -> None:
    ended = apply("hu-tool", LATER.format("false"))
    assert ended.code == 40
    assert "[packages] install" in ended.data["steps"][3]["name"]
    assert ended.data["steps"][3]["undone"] is True
    assert apt.installed() == {"hu-tool": OLD} and data(apt) == "old\n"


def test_an_installation_that_was_interrupted_is_taken_back(
    apt: AptRoot, apply: Apply, lab: Lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    manifest = tmp_path / "interrupted.toml"
    manifest.write_text('[update]\nname = "u"\n[packages]\nupgrade = ["hu-tool"]\n')
    with monkeypatch.context() as set_for_a_while:
        set_for_a_while.setenv("HOSTUPDATE_FAULT", "step:[packages] install.end=stop")
        process = lab.run.start("apply", str(manifest), "--json", "--yes")
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    assert apt.installed() == {"hu-tool": NEW, "hu-library": "3"}
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert lab.run("status", "--json").data["interrupted"] is not None
    resumed = lab.run("resume", "--json")
    assert resumed.code in (0, 40), resumed.err
    assert apt.installed() == {"hu-tool": OLD} and data(apt) == "old\n"


def test_a_superseded_version_is_taken_from_the_cache_or_its_loss_is_said(
    apt: AptRoot, apply: Apply, lab: Lab
) -> None:
    cache = apt.root / "var/cache/apt/archives"
    archive = next(apt.archive.glob("hu-tool_1+1.0*.deb")).read_bytes()
    apt.withdraw("hu-tool", OLD)
    for path in cache.glob("*.deb"):
        path.unlink()
    plan = apply("hu-tool", options=("--dry-run", "--json")).data
    assert any(f"no archive of hu-tool {OLD}" in text for text in plan["warnings"])
    (install,) = [a for a in plan["actions"] if a["step"] == "[packages] install"]
    assert install["undo"] == ""

    (cache / f"hu-tool_{OLD.replace(':', '%3a')}_all.deb").write_bytes(archive)
    ended = apply("hu-tool", LATER.format("false"))
    assert ended.code == 40
    assert apt.installed() == {"hu-tool": OLD} and data(apt) == "old\n"


def test_a_service_that_the_newer_version_brings_is_found_before_it_is_installed(
    apt: AptRoot, apply: Apply, lab: Lab
) -> None:
    apt.build("hu-tool", "1:3", {UNIT.format("hu"): "[Service]\n"})
    ended = apply("hu-tool")
    assert ended.code == 40
    assert "hu.service" in ended.data["steps"][1]["output"]
    assert apt.installed() == {"hu-tool": OLD}


@pytest.mark.parametrize(
    ("files", "depends", "words"),
    [
        ({UNIT.format("hu-switch"): "[Service]\n"}, "", ("hu-thing", "hu-switch.service", "steps")),
        ({"usr/share/x": "x"}, "hu-kernel", ("hu-kernel", "part of the kernel")),
        ({"usr/bin/qemu-system-x86_64": "#!"}, "", ("no hooks", "{0}", "{1}")),
    ],
)
def test_what_cannot_be_judged_or_done_is_refused(
    apt: AptRoot,
    apply: Apply,
    lab: Lab,
    files: dict[str, str],
    depends: str,
    words: tuple[str, ...],
) -> None:
    """The last is what the guests run under: their libvirt cannot hand them over."""
    apt.build("hu-thing", "1", files)
    apt.install("hu-thing")
    apt.build("hu-kernel", "1", {"usr/share/k": "k"}, section="kernel")
    apt.build("hu-thing", "2", files, depends=depends)
    ended = apply("hu-thing")
    assert ended.code == 20
    reasons = " ".join(ended.data["reasons"])
    for word in words:
        assert word.format(*lab.names) in reasons
    assert apt.installed() == {"hu-tool": OLD, "hu-thing": "1"}


@pytest.mark.parametrize(
    ("names", "code", "word"), [("hu-library", 20, "is not installed"), ("hu-none", 20, "hu-none")]
)
def test_a_package_that_is_not_there_is_named(
    apt: AptRoot, apply: Apply, names: str, code: int, word: str
) -> None:
    ended = apply(names)
    assert ended.code == code and word in " ".join(ended.data["reasons"])


def test_a_package_that_is_held_back_is_an_error_of_apt(apt: AptRoot, apply: Apply) -> None:
    subprocess.run(["apt-mark", "hold", "hu-tool"], check=True, capture_output=True)
    ended = apply("hu-tool", options=("--yes",))
    assert ended.code == 1 and "Held packages" in ended.err
    assert apt.installed() == {"hu-tool": OLD}
