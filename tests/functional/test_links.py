"""Network links that are held down until a guest's clock is right, and come up whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.functional.cli import Lab, keepers, kill
from tests.functional.owner import act
from tests.functional.test_deadman import fifo, orchestrator, wait_keepers

__all__ = ("fifo", "orchestrator")

Start = Callable[..., subprocess.Popen[str]]

MAC = "52:54:00:77:00:01"
QUICK = '[[step]]\nname = "x"\nphase = "blackout"\nrun = ["sleep", "0.2"]\ntimeout = "1s"\n'


@pytest.fixture
def held(lab: Lab, tmp_path: Path) -> str:
    """A configuration file that asks for it."""
    path = tmp_path / "held.toml"
    path.write_text("[clock]\nhold-network = true\ntrust-host = true\n")
    return str(path)


@pytest.fixture
def card(lab: Lab) -> Iterator[Callable[[], str]]:
    """A network card in the first guest; tells the state of its link."""
    state, name = lab.run.state, lab.names[0]
    act(state, "plug", name, MAC)
    yield lambda: act(state, "links", name)
    act(state, "unplug", name, MAC)


def test_links_are_up_again_after_a_run(
    lab: Lab, held: str, card: Callable[[], str], write_manifest: Callable[..., Path]
) -> None:
    assert card() == "up"
    ended = lab.apply(write_manifest(QUICK), "--pause-method", "stop", "--config", held)
    assert ended.code == 0, ended.err
    titles = ended.data["actions"]
    down, up = (
        next(n for n, title in enumerate(titles) if words in title)
        for words in ("links of", "bring up the links")
    )
    assert down < up < titles.index("disarm the keeper")
    assert card() == "up"


@pytest.mark.parametrize("method", ["freeze", "stop"])
def test_the_keeper_sees_to_the_links_of_a_killed_run(
    lab: Lab, held: str, card: Callable[[], str], orchestrator: Start, method: str
) -> None:
    process = orchestrator("--pause-method", method, "--config", held)
    kill(process)
    process.wait(timeout=30)
    wait_keepers(lab)
    assert card() == "up"


def test_resume_brings_up_what_a_dead_keeper_left_down(
    lab: Lab, held: str, card: Callable[[], str], orchestrator: Start
) -> None:
    process = orchestrator("--pause-method", "stop", "--config", held)
    for pid in keepers(lab):
        os.kill(pid, signal.SIGKILL)
    kill(process)
    process.wait(timeout=30)
    assert card() == "down"
    assert lab.run("resume").code == 0
    assert card() == "up"
