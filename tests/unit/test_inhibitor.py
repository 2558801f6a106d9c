"""The inhibitor's process: held while we live, however we end."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hostupdate.host.inhibitor import Inhibitor

NS = 1_000_000_000
#: As systemd-inhibit does: starts the command, waits for it. Tells where both are.
HOLDS = """\
#!/bin/sh
while [ "${1#--}" != "$1" ]; do echo "$1" >>"$0.options"; shift; done
exec 3<&0
"$@" <&3 &
echo $$ $! >"$0.pids"
exec 3<&-
wait
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    return script(tmp_path / "inhibit", HOLDS)


def script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def watch(program: Path) -> list[int]:
    """pidfds of the processes of an inhibitor that holds."""
    pids = Path(f"{program}.pids").read_text().split()
    return [os.pidfd_open(int(pid)) for pid in pids]


def all_end(pidfds: list[int]) -> bool:
    ended = [bool(select.select([fd], [], [], 20)[0]) for fd in pidfds]
    for fd in pidfds:
        os.close(fd)
    return all(ended)


def test_it_holds_until_it_is_closed(program: Path) -> None:
    inhibitor = Inhibitor(str(program), "an update", 20 * NS)
    processes = watch(program)

    assert inhibitor.problem == ""
    assert select.select(processes, [], [], 0)[0] == []
    options = Path(f"{program}.options").read_text()
    assert "--what=shutdown:sleep\n--mode=block\n" in options and "--why=an update\n" in options

    inhibitor.close()
    inhibitor.close()

    assert all_end(processes)


def test_it_ends_with_us_even_if_we_are_killed(program: Path) -> None:
    code = (
        "import sys, time; from hostupdate.host.inhibitor import Inhibitor\n"
        "print(Inhibitor(sys.argv[1], 'x', 20 * 10**9).problem or 'holds', flush=True)\n"
        "time.sleep(1000)"
    )
    owner = subprocess.Popen([sys.executable, "-c", code, str(program)], stdout=subprocess.PIPE)
    assert owner.stdout is not None
    with owner.stdout as told:
        assert told.readline() == b"holds\n"
    processes = watch(program)

    owner.kill()

    assert owner.wait(20) == -signal.SIGKILL
    assert all_end(processes)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("echo 'Failed to inhibit: no bus' >&2; exit 1", "Failed to inhibit: no bus"),
        ("exit 0", "it ended"),
        ("exec sleep 1000", "no answer in time"),
        ("trap '' TERM; sleep 1000 & wait", "no answer in time"),
    ],
)
def test_one_that_does_not_hold_says_why_and_is_gone(
    tmp_path: Path, text: str, problem: str
) -> None:
    program = script(tmp_path / "inhibit", f'#!/bin/sh\necho $$ >"$0.pids"\n{text}\n')

    inhibitor = Inhibitor(str(program), "x", NS // 2)

    assert inhibitor.problem == problem
    with pytest.raises(ProcessLookupError):
        os.kill(int(Path(f"{program}.pids").read_text()), 0)


def test_a_warning_before_it_holds_is_no_problem(tmp_path: Path, program: Path) -> None:
    chatty = script(tmp_path / "chatty", f'#!/bin/sh\necho hm >&2; exec {program} "$@"\n')

    inhibitor = Inhibitor(str(chatty), "x", 20 * NS)

    assert inhibitor.problem == ""
    inhibitor.close()


def test_a_program_that_is_missing_is_a_problem_like_others(tmp_path: Path) -> None:
    assert "cannot be run" in Inhibitor(str(tmp_path / "none"), "x", NS).problem
