"""Kept QEMUs are removed once no guest runs under them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from hostupdate.cli.handing_over import remove_idle
from hostupdate.guests.probing import PROBES

GUEST = ("-uuid", "4dea22b3-1d52-d8f3-2516-782e98ab3fa0", "-name")


@contextmanager
def running(build: Path, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process of that build, with these words."""
    build.joinpath("bin").mkdir(parents=True)
    program = shutil.copy("/bin/sh", build / "bin")
    with subprocess.Popen([program, "-c", "read x", *words], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


@pytest.fixture
def build(tmp_path: Path) -> Path:
    return tmp_path / "qemu-0123456789ab"


def test_a_guest_keeps_its_build(build: Path) -> None:
    with running(build, *GUEST, "guest=g1,debug-threads=on") as process:
        remove_idle(build.parent)
        assert build.exists() and process.poll() is None
    remove_idle(build.parent)
    assert not build.exists()


def test_what_libvirt_left_of_a_look_at_it_is_ended(build: Path) -> None:
    with running(build, "-S", "-machine", "none") as process:
        remove_idle(build.parent)
        assert not build.exists() and process.wait(20) < 0


def test_a_probe_is_left_to_libvirt(build: Path) -> None:
    with running(build, *GUEST, f"guest={min(PROBES)},debug-threads=on") as process:
        remove_idle(build.parent)
        assert not build.exists() and process.poll() is None


def test_others_are_left_alone(tmp_path: Path) -> None:
    others = [tmp_path / "qemu-10.0", tmp_path / "x-0123456789abc", tmp_path / "qemu"]
    with ExitStack() as stack:
        processes = [stack.enter_context(running(other, "-S")) for other in others]
        remove_idle(tmp_path)
        assert all(other.exists() for other in others)
        assert not [process for process in processes if process.poll() is not None]
