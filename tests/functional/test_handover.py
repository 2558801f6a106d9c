"""Guests come under another QEMU by ``hostupdate apply``, under a libvirtd of the test's own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hostupdate.handover import builds
from hostupdate.handover.builds import Build
from hostupdate.lab import console
from tests.functional.aptroot import AptRoot
from tests.functional.cli import Ended, Lab, Program, keepers
from tests.functional.conftest import make_cache
from tests.functional.daemon import DaemonLab
from tests.requirements import need

SYSTEM = Path("/usr/bin/qemu-system-x86_64")
Apply = Callable[..., Ended]


@pytest.fixture(scope="module")
def made() -> Iterator[DaemonLab]:
    need("root", "qemu", "libvirt", "lab", "cgroup2")
    base = Path(tempfile.mkdtemp(prefix="hu-h-", dir="/var/tmp"))
    base.chmod(0o755)
    ram = base / "ram"
    ram.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "none", str(ram)], check=True)
    (base / "state").mkdir(mode=0o700)
    lab = DaemonLab(base, make_cache(base / "state"), guests=2, ram=ram)
    (base / "hostupdate.toml").write_text(
        f'[paths]\nlibvirt-hooks = "{base}/etc/hooks"\nlibvirt-saves = "{base}/lib/qemu/save"\n'
        f'builds = "{base}/builds"\n[clock]\ntrust-host = true\n'
    )
    yield lab
    lab.remove()
    subprocess.run(["umount", str(ram)], check=True)
    shutil.rmtree(base)


@pytest.fixture
def lab(made: DaemonLab) -> Iterator[Lab]:
    made.daemon.ensure()
    config = made.daemon.base / "hostupdate.toml"
    program = Program(made.lab.run.state).with_options(
        "--connect", made.daemon.uri, "--config", str(config)
    )
    found = Lab(program, made.lab.names)
    yield found
    status = program("status", "--json").data
    assert status["interrupted"] is None
    found.assert_healthy()
    assert_nothing_left(made.daemon.base)


def assert_nothing_left(base: Path) -> None:
    """No record, image, link, build or mark of a handover."""
    assert not list((base / "state/parked").glob("*"))
    assert not list((base / "lib/qemu/save").glob("*.save"))
    assert not [path for path in (base / "state/hook").rglob("*") if path.is_file()]
    parked = [p for p in (base / "ram").rglob("*") if p.is_file() and p.stat().st_nlink > 1]
    assert not parked


@pytest.fixture
def apply(lab: Lab, tmp_path: Path) -> Apply:
    """Guests come under a QEMU, with steps of the update."""

    def run(program: Path | str, *steps: str, options: tuple[str, ...] = ()) -> Ended:
        path = tmp_path / "update.toml"
        path.write_text(
            f'[update]\nname = "qemu"\n[qemu]\nprogram = "{program}"\n' + "\n".join(steps)
        )
        return lab.apply(path, *options)

    return run


def versions(lab: Lab) -> set[str]:
    """What the guests run under."""
    return {version_of(guest["pid"]) for guest in lab.run("guests", "--json").data["guests"]}


def version_of(pid: int) -> str:
    """What a process runs; one that brings its own glibc was started by that one's loader."""
    program = Path(f"/proc/{pid}/exe")
    wrappers = (parent / "qemu" for parent in program.readlink().parents)
    return builds.version(next((path for path in wrappers if path.is_file()), program))


def seqs(lab: Lab) -> dict[str, int]:
    return {name: console.last_tick(lab.console(name)).seq for name in lab.names}  # type: ignore[union-attr]


def assert_no_tick_is_missing(lab: Lab, before: dict[str, int]) -> None:
    for name, first in before.items():
        console.wait_ticks(lab.console(name), 3, time.monotonic_ns() + 30_000_000_000)
        numbers = [tick.seq for tick in console.ticks(lab.console(name), after_seq=first)]
        assert numbers == list(range(first + 1, first + 1 + len(numbers)))


@pytest.mark.parametrize("build", ["newer_qemu", "foreign_qemu"])
def test_guests_come_under_a_newer_qemu_and_back(
    lab: Lab,
    apply: Apply,
    build: str,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    newer: Build = request.getfixturevalue(build)
    before = seqs(lab)
    old = versions(lab)
    took = []
    for target in (newer.wrapper, SYSTEM):
        ended = apply(target)
        assert ended.code == 0, ended.data["reasons"]
        report = ended.data
        assert report["impact"]["actual"] == "handover"
        assert versions(lab) == {builds.version(target)}
        for guest in report["guests"]:
            assert guest["state_after"] == "running"
            assert 0 < guest["blackout_ns"] <= report["budget_ns"]
            assert guest["residency"]["digest_equal"] is True
            assert guest["clock"]["problem"] == ""
            assert any("rehearsed" in note for note in guest["notes"])
            took.append(round(guest["blackout_ns"] / 1e6))
    assert versions(lab) == old
    assert_no_tick_is_missing(lab, before)
    with capsys.disabled():
        print(f"\n[handovers by apply, {builds.version(newer.wrapper)}: blackouts {took} ms]")


def test_a_qemu_that_does_not_take_the_guests_is_found_out_before_any_is_parked(
    lab: Lab, apply: Apply, tmp_path: Path
) -> None:
    """Its machine types are those of nobody."""
    bad = lab.run.state.parent / "bad-qemu"
    bad.write_text(
        "#!/bin/sh\ncase \" $* \" in *' -incoming defer'*) exec "
        f'{SYSTEM} -machine nonesuch ;; esac\nexec {SYSTEM} "$@"\n'
    )
    bad.chmod(0o755)
    pids = {guest["name"]: guest["pid"] for guest in lab.run("guests", "--json").data["guests"]}
    ended = apply(bad)
    assert ended.code == 40, ended.data["reasons"]
    assert any("does not take it" in reason for reason in ended.data["reasons"])
    after = {guest["name"]: guest["pid"] for guest in lab.run("guests", "--json").data["guests"]}
    assert after == pids
    bad.unlink()


def test_a_step_that_fails_while_all_are_parked_brings_them_back(
    lab: Lab, apply: Apply, tmp_path: Path
) -> None:
    """As when a module cannot be loaded."""
    seen = tmp_path / "seen"
    step = (
        '[[step]]\nname = "modules"\nphase = "blackout"\ntimeout = "2s"\n'
        f'run = ["sh", "-c", "pgrep -f guest=hu-lab > {seen}; exit 1"]\n'
    )
    before = seqs(lab)
    ended = apply("", step)
    assert ended.code == 40, ended.data["reasons"]
    assert {guest["state_after"] for guest in ended.data["guests"]} == {"running"}
    assert_no_tick_is_missing(lab, before)


MODULES = """\
[[step]]
name = "modules"
phase = "blackout"
timeout = "2s"
run = ["true"]
undo = ["{script}"]
[[step]]
name = "more"
phase = "blackout"
timeout = "2s"
run = ["{more}"]
"""


@pytest.mark.parametrize("ends", ["fails", "killed"])
def test_what_was_done_while_all_were_parked_is_undone_before_they_come_back(
    lab: Lab, apply: Apply, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    """Their old QEMU may need the module that was taken away."""
    undone = tmp_path / "undone"
    guests = lab.run("guests", "--json").data["guests"]
    gone = "".join(f"! pgrep -f -- '-uuid {guest['uuid']}' || exit 1\n" for guest in guests)
    script = tmp_path / "undo"
    script.write_text(f"#!/bin/sh\n{gone}touch {undone}\n")
    script.chmod(0o755)
    before = seqs(lab)
    if ends == "fails":
        ended = apply("", MODULES.format(script=script, more="false"))
        assert ended.code == 40, ended.data["reasons"]
        assert {guest["state_after"] for guest in ended.data["guests"]} == {"running"}
    else:
        with monkeypatch.context() as fault:
            fault.setenv("HOSTUPDATE_FAULT", "step:more.end=stop")
            manifest = tmp_path / "killed.toml"
            text = '[update]\nname = "qemu"\n[qemu]\n'
            manifest.write_text(text + MODULES.format(script=script, more="true"))
            process = lab.run.start("apply", str(manifest), "--json", "--yes")
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        for pid in [*keepers(lab), process.pid]:
            os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=60)
        resumed = lab.run("resume", "--json")
        assert resumed.code == 0, resumed.out
    assert undone.exists()
    assert_no_tick_is_missing(lab, before)


def test_steps_that_need_every_qemu_gone(lab: Lab, apply: Apply, tmp_path: Path) -> None:
    """All guests are parked at once."""
    uuids = [guest["uuid"] for guest in lab.run("guests", "--json").data["guests"]]
    script = tmp_path / "gone"
    script.write_text(
        "#!/bin/sh\n" + "".join(f"! pgrep -f -- '-uuid {uuid}' || exit 1\n" for uuid in uuids)
    )
    script.chmod(0o755)
    step = f'[[step]]\nname = "modules"\nphase = "blackout"\ntimeout = "2s"\nrun = ["{script}"]\n'
    ended = apply("", step)
    assert ended.code == 0, ended.data["reasons"]
    assert ended.data["steps"][0]["exit"] == 0


def test_what_is_not_eligible_is_refused_with_a_remedy(lab: Lab, apply: Apply) -> None:
    """By the RAM of a guest in a directory that is written to a disk it would be, too; here the
    budget is too small."""
    ended = apply("", options=("--budget", "100ms"))
    assert ended.code == 20
    assert any("the budget is 100 ms" in reason for reason in ended.data["reasons"])


def report_of(lab: Lab) -> dict[str, Any]:
    return dict(lab.run("report", "--json").data)


def test_packages_of_the_guests_qemu_are_a_handover(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Judged by the file that is mapped, installed before the rehearsal, taken back where that or
    anything else fails before a guest has moved."""
    apt = AptRoot(tmp_path)
    for version in ("7", "10"):
        apt.build("hu-emulator", version, {str(SYSTEM)[1:]: version})
        if version == "7":
            apt.install("hu-emulator")
    for name, value in apt.environment.items():
        monkeypatch.setenv(name, value)
    manifest = tmp_path / "packages.toml"
    text = '[update]\nname = "qemu"\n[packages]\nupgrade = ["hu-emulator"]\n'

    manifest.write_text(
        f'{text}[[step]]\nname = "later"\nphase = "blackout"\nrun = ["false"]\ntimeout = "2s"\n'
    )
    failed = lab.apply(manifest)
    assert failed.code == 40, failed.data["reasons"]
    assert apt.installed() == {"hu-emulator": "7"}

    manifest.write_text(text)
    plan = lab.run("apply", str(manifest), "--dry-run", "--json").data
    (verdict,) = plan["packages"]
    assert verdict["impact"] == plan["actual"] == "handover"
    assert verdict["evidence"] == [f"{SYSTEM}, in use by {', '.join(lab.names)}"]
    kinds = [f"{action['kind']} {action['step']}".strip() for action in plan["actions"]]
    assert kinds.index("keep-qemu") < kinds.index("step [packages] install")
    assert kinds.index("step [packages] install") < kinds.index("warm") < kinds.index("park")

    before = seqs(lab)
    pids = {guest["pid"] for guest in lab.run("guests", "--json").data["guests"]}
    ended = lab.apply(manifest)
    assert ended.code == 0, ended.data["reasons"]
    assert ended.data["impact"]["actual"] == "handover"
    assert apt.installed() == {"hu-emulator": "10"}
    assert all(guest["residency"]["digest_equal"] for guest in ended.data["guests"])
    now = {guest["pid"] for guest in lab.run("guests", "--json").data["guests"]}
    assert len(now) == len(lab.names) and not now & pids
    assert_no_tick_is_missing(lab, before)
