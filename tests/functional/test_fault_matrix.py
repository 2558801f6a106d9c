"""Every action of a run, and everything that can happen at it: each guest runs exactly once.

The table at the end of the test run shows, for each case, how ``apply`` ended, and after an arrow
how ``resume`` did where something was left for it (``docs/faults.md``).
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.functional import faults
from tests.functional.cli import keepers
from tests.functional.conftest import TABLE, make_cache
from tests.functional.daemon import DaemonLab
from tests.functional.faults import Bench
from tests.requirements import need

#: Places in a run that stops its guests, in their order. ``.end``: done, but not yet recorded.
PLACES = (
    "step:fetch.end",
    "clocks-before.end",
    "record.end",
    "measure.end",
    "isolate.end",
    "keeper.end",
    "recheck.end",
    "links-down.end",
    "arm.end",
    "stop.end",
    "freeze.end",
    "digest.end",
    "step:swap.end",
    "compare.end",
    "thaw.end",
    "resume.end",
    "clocks.end",
    "links-up.end",
    "disarm.end",
    "release.end",
    "verify.end",
    "step:tidy.end",
)
#: What a freeze does differently.
FROZEN = ("freeze.begin", "freeze.end", "step:swap.end", "thaw.end")
#: Where the C core stands still or fails, in the middle of its work.
IN_C = ("core.freeze", "core.thaw")
FAULTS = (
    "error",
    "hang",
    "kill run",
    "kill keeper",
    "kill both",
    "kill libvirtd",
    "kill QEMU",
    "disk full",
    "corrupt",
    "corrupt+kill",
    "clock step",
)
PAUSED = PLACES[PLACES.index("arm.end") : PLACES.index("disarm.end")]

CASES = [
    # While guests run nobody waits for a run that hangs: its operator kills it.
    *(
        ("stop", place, fault)
        for place in PLACES
        for fault in FAULTS
        if fault != "hang" or place in PAUSED
    ),
    *(("freeze", place, fault) for place in FROZEN for fault in FAULTS),
    *(("freeze", place, fault) for place in IN_C for fault in ("error", "hang", "kill run")),
]


@pytest.fixture(scope="module")
def made() -> Iterator[Bench]:
    need("root", "qemu", "libvirt", "lab", "cgroup2")
    base = Path(tempfile.mkdtemp(prefix="hu-m-", dir="/var/tmp"))
    (base / "state").mkdir()
    bench = Bench(DaemonLab(base, make_cache(base / "state"), guests=2), base)
    yield bench
    bench.made.remove()
    bench.remove()
    shutil.rmtree(base)


@pytest.fixture
def bench(made: Bench) -> Iterator[Bench]:
    """Both guests run, nothing is pending, no mark is there."""
    made.made.daemon.ensure()
    if len(made.pids()) < len(made.lab.names):
        made.made.replenish()
        made.learn_uuids()
    made.clear_marks()
    yield made
    for path in made.state.glob("journal.db*"):  # what a test damaged, as the error says
        if made.damaged:
            path.unlink()
    made.damaged = False
    if made.interrupted:  # for the next case's sake; this one has failed
        made.lab.run("resume")
        (made.state / "pending.json").unlink(missing_ok=True)


def test_the_matrix_has_every_action_of_a_run(bench: Bench) -> None:
    """Its places are those of the plan that runs."""
    plan = bench.lab.run("apply", str(bench.manifest), "--dry-run", "--json", "--pause-method",
                         "stop").data  # fmt: skip
    kinds = [f"step:{a['step']}" if a["kind"] == "step" else a["kind"] for a in plan["actions"]]
    # Those of which this machine has no use: nothing to keep still, no memory controller.
    optional = {"guard", "unguard", "protect"}
    assert [place.removesuffix(".end") for place in PLACES] == [
        kind for kind in kinds if kind not in optional
    ]


@pytest.mark.parametrize(("method", "place", "fault"), CASES)
def test_each_guest_runs_exactly_once(bench: Bench, method: str, place: str, fault: str) -> None:
    if place.startswith("core."):
        need("faults")
    before = bench.pids()
    lost = bench.lab.names[-1] if fault == "kill QEMU" else ""
    process = bench.apply(method, f"{place}={'fail' if fault == 'error' else 'stop'}")
    if fault == "error":
        ended = bench.end(process)
        # A thaw that tells of an error has thawed all the same, and the run sees that it has.
        assert ended.code in ((0,) if place == "core.thaw" else (30, 40)), ended.err
    else:
        assert bench.stands_still(process), process.communicate()
        happening = fault
        if fault == "kill keeper" and not keepers(bench.lab):
            happening = ""  # it is not there yet, or not any more: the run just goes on
        ended = faults.happen(bench, process, happening, before)
    resumed = bench.resume()
    bench.made.daemon.ensure()
    TABLE[method, place, fault] = f"{ended.code}" if ended.code >= 0 else "killed"
    if resumed is not None:
        TABLE[method, place, fault] += f" -> {resumed.code}"
    assert "Traceback" not in ended.err, ended.err
    bench.assert_each_runs_once(before, lost)
    assert_told(bench, ended, resumed, fault, place, lost)


def assert_told(
    bench: Bench,
    ended: faults.Ended,
    resumed: faults.Ended | None,
    fault: str,
    place: str,
    lost: str,
) -> None:
    """The update is there or it is not, and the exit codes say which, and who was lost."""
    codes = {ended.code} | ({resumed.code} if resumed is not None else set())
    if lost:
        assert 50 in codes or (place in ("verify.end", "step:tidy.end") and codes <= {0, 30})
    else:
        assert 50 not in codes, (ended.err, ended.out)
    marks = bench.marks_left()
    if fault == "corrupt+kill" and bench.lab.run("report", "--list", "--json").data["runs"] == []:
        return  # which steps had run was in the journal only; it said so
    in_place = {"fetch", "swap", "tidy"}
    if (place, fault) == ("verify.end", "error"):
        assert marks == {"fetch", "swap"}, "what fails in place ends the run, and stays"
    elif ended.code in (0, 30):
        assert marks == in_place, ended.out
    elif ended.code == 40 or (ended.code < 0 and resumed is None):
        assert marks == set() or (ended.code < 0 and marks == in_place), (ended.out, marks)
    elif ended.code < 0:
        assert marks in (set(), in_place), marks


# ---- at any moment


KILLS = 200 if os.environ.get("HOSTUPDATE_TEST_LONG") else 30


@pytest.mark.parametrize("number", range(KILLS))
def test_killed_at_a_random_moment(bench: Bench, number: int) -> None:
    seed = int(os.environ.get("HOSTUPDATE_TEST_SEED", time.time_ns())) + number
    print(f"HOSTUPDATE_TEST_SEED={seed - number}")
    chance = random.Random(seed)
    before = bench.pids()
    process = bench.apply(chance.choice(("freeze", "stop")))
    time.sleep(chance.uniform(0.2, 3.0))
    victims = chance.choice(("run", "run", "keeper", "both", "libvirtd", "all"))
    if victims in ("libvirtd", "all"):
        bench.made.daemon.end()
    if victims in ("keeper", "both", "all"):
        for pid in keepers(bench.lab):
            faults.kill_pid(pid)
    if victims in ("run", "both", "all"):
        process.kill()
    ended = bench.end(process)
    bench.made.daemon.ensure()
    while bench.interrupted and chance.random() < 0.5:
        recovery = bench.lab.run.start("resume")
        time.sleep(chance.uniform(0.1, 1.0))
        recovery.kill()
        recovery.communicate()
    resumed = bench.resume()
    bench.assert_each_runs_once(before)
    assert "Traceback" not in ended.err, ended.err
    codes = [ended.code] + ([resumed.code] if resumed is not None else [])
    assert 50 not in codes or (resumed is not None and resumed.code != 50), codes
    assert bench.marks_left() in (set(), {"fetch", "swap", "tidy"}), (victims, codes)
    key = ("random", victims, " -> ".join(map(str, codes)))
    TABLE[key] = str(int(TABLE.get(key, "0")) + 1)
