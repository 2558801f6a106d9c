"""Real guests for all functional tests: made once, checked after each test, removed at the end."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hostupdate.host.cgroups import find_cgroup2
from tests.functional.cli import Lab, Program, end_steps, keepers, pids_naming
from tests.functional.owner import act
from tests.functional.qemus import foreign_qemu as foreign_qemu
from tests.functional.qemus import newer_qemu as newer_qemu
from tests.functional.qemus import qemu_cache as qemu_cache
from tests.requirements import need

GUESTS = 2


@pytest.fixture(scope="session")
def state() -> Iterator[Path]:
    """A state directory with a short path: libvirt's sockets lie below it."""
    need("root")
    path = Path(tempfile.mkdtemp(prefix="hu-", dir="/var/tmp"))
    make_cache(path)
    yield path
    for pid in pids_naming(str(path)):
        os.kill(pid, signal.SIGKILL)
    shutil.rmtree(path)


def make_cache(state: Path) -> Path:
    """The state directory's cache of lab images: a common one where the environment names it."""
    cache = os.environ.get("HOSTUPDATE_TEST_CACHE")
    if cache:
        Path(cache).mkdir(parents=True, exist_ok=True)
        (state / "cache").symlink_to(cache)
    return state / "cache"


@pytest.fixture(scope="session")
def running_lab(state: Path) -> Iterator[Lab]:
    need("root", "qemu", "lab", "cgroup2")
    program = Program(state)
    ended = program("lab", "up", "--guests", str(GUESTS), "--memory", "192M", "--json")
    assert ended.code == 0, ended.err
    names = tuple(guest["name"] for guest in ended.data["guests"])
    yield Lab(program.with_options("--connect", "lab"), names)
    down = program("lab", "down")
    assert down.code == 0, down.err


@pytest.fixture
def lab(running_lab: Lab) -> Iterator[Lab]:
    """The guests, healthy before and after, with nothing of ours left behind."""
    yield running_lab
    end_steps(running_lab)
    status = running_lab.run("status", "--json").data
    assert status["interrupted"] is None
    assert status["holder"] is None
    assert_nothing_left(running_lab)
    running_lab.assert_healthy()


def assert_nothing_left(lab: Lab) -> None:
    """No cgroup, keeper or runtime file of this lab's runs."""
    mount = find_cgroup2()
    assert mount is not None
    for guest in lab.run("guests", "--json").data["guests"]:
        assert not (mount / "hostupdate" / guest["uuid"]).exists()
    assert not keepers(lab)


@pytest.fixture
def write_manifest(tmp_path: Path) -> Callable[..., Path]:
    """Writes a manifest of [[step]] tables and returns its path."""

    def write(*steps: str, update: str = "", name: str = "test") -> Path:
        path = tmp_path / "update.toml"
        path.write_text(f'[update]\nname = "{name}"\n{update}\n' + "\n".join(steps))
        return path

    return write


@pytest.fixture
def suspended(running_lab: Lab) -> Iterator[str]:
    """The last guest, paused by its owner for the time of a test."""
    name = running_lab.names[-1]
    act(running_lab.run.state, "suspend", name)
    yield name
    act(running_lab.run.state, "resume", name)
