"""Address spaces that outlive their process; tests/c/test_address_space.c tries the C core."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from errno import ESRCH
from pathlib import Path

import pytest

from hostupdate.core.address_space import held, hold
from hostupdate.errors import CoreError
from tests.requirements import need


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    need("root")
    with subprocess.Popen(["sleep", "60"]) as started:
        yield started
        started.kill()


def descriptors() -> list[str]:
    return os.listdir("/proc/self/fd")


def test_a_process_that_is_held_dies_as_any_other(process: subprocess.Popen[bytes]) -> None:
    before = len(descriptors())
    with held(process.pid):
        assert len(descriptors()) > before
        process.kill()
        assert process.wait(10) < 0
        assert not Path(f"/proc/{process.pid}").exists()
    deadline = time.monotonic() + 10
    while len(descriptors()) > before:  # the thread that gives the memory back is in no hurry
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_what_cannot_be_held_is_no_error(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait(10)
    with pytest.raises(CoreError) as raised:
        hold(process.pid)
    assert raised.value.errno == ESRCH
    before = descriptors()
    for pid in (process.pid, None):
        with held(pid):
            assert len(descriptors()) == len(before)
