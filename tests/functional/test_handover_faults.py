"""Every action of a handover, and everything that can happen at it: each guest runs exactly once,
on its own RAM, or stays parked until ``hostupdate resume``.

The table at the end of the test run is as that of :mod:`tests.functional.test_fault_matrix`.
``HOSTUPDATE_TEST_LONG=1`` runs all of it, else every eleventh case is run.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hostupdate.handover import builds
from hostupdate.handover.builds import Build
from hostupdate.handover.records import ParkedRecords
from hostupdate.lab import console
from hostupdate.parked import ParkedRecord, ParkedState
from tests.functional import faults
from tests.functional.cli import Ended, keepers
from tests.functional.conftest import TABLE, make_cache
from tests.functional.daemon import DaemonLab
from tests.functional.faults import Bench
from tests.requirements import need

SYSTEM = "/usr/bin/qemu-system-x86_64"
LONG = bool(os.environ.get("HOSTUPDATE_TEST_LONG"))
MANIFEST = """\
[update]
name = "fault"
budget = "{budget}"
[qemu]
[[step]]
name = "fetch"
phase = "stage"
run = ["touch", "{marks}/fetch"]
undo = ["rm", "-f", "{marks}/fetch"]
[[step]]
name = "tidy"
phase = "finish"
run = ["touch", "{marks}/tidy"]
"""
SWAP = """\
[[step]]
name = "swap"
phase = "blackout"
run = ["touch", "{marks}/swap"]
undo = ["rm", "-f", "{marks}/swap"]
timeout = "500ms"
"""
CONFIG = """\
[paths]
libvirt-hooks = "{base}/etc/hooks"
libvirt-saves = "{base}/lib/qemu/save"
builds = "{base}/builds"
[clock]
trust-host = true
hold-network = true
timeout = "3s"
tolerance = "2s"
[deadlines]
libvirt = "5s"
keeper-grace = "500ms"
"""
#: Places in a run that hands one guest over after the other, in their order; those of the second
#: guest, when the first has been let run under its new QEMU already, have a number.
PLACES = (
    "probe.started",
    "keep-qemu.end",
    "step:fetch.end",
    "warm.end",
    "watch.end",
    "rehearse.stopped",
    "rehearse.end",
    "clocks-before.end",
    "prepare.end",
    "recheck.end",
    "park.begin",
    "park.end",
    "unpark.end",
    "commit.end",
    "park.end@2",
    "unpark.end@2",
    "commit.end@2",
    "clocks.end",
    "clear.end",
    "verify.end",
    "step:tidy.end",
)
#: What a run does differently where a step needs every QEMU gone.
TOGETHER = ("park.parked", "park.end", "step:swap.end", "unpark.end", "commit.end")
FAULTS = (
    "error",
    "hang",
    "kill run",
    "kill keeper",
    "kill both",
    "kill libvirtd",
    "restart libvirtd",
    "kill QEMU",
    "disk full",
    "clock step",
)
#: Where a guest is parked, or stopped: the keeper waits for it.
DARK = {"rehearse.stopped", "park.end", "unpark.end", "park.end@2", "unpark.end@2"}
ALL = [
    *(
        ("handover", place, fault)
        for place in PLACES
        for fault in FAULTS
        if fault != "hang" or place in DARK
    ),
    *(
        ("handover, all parked", place, fault)
        for place in TOGETHER
        for fault in FAULTS
        if fault != "hang" or place != "commit.end"
    ),
]
CASES = ALL if LONG else ALL[::11]  # each fault comes by, at another place each time


@pytest.fixture(scope="module")
def made() -> Iterator[Bench]:
    need("root", "qemu", "libvirt", "lab", "cgroup2")
    base = Path(tempfile.mkdtemp(prefix="hu-f-", dir="/var/tmp"))
    base.chmod(0o755)
    (base / "state").mkdir(mode=0o700)
    ram = base / "ram"
    ram.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512m,mode=755", "none", ram], check=True)
    lab = DaemonLab(base, make_cache(base / "state"), guests=2, ram=ram)
    bench = Bench(lab, base, size="256m", settings=CONFIG.format(base=base), handed=True)
    lab.daemon.end()  # the next one sees that disk
    yield bench
    lab.remove()
    bench.remove()
    subprocess.run(["umount", "--lazy", ram], check=True)
    shutil.rmtree(base)


@pytest.fixture
def bench(made: Bench) -> Iterator[Bench]:
    """Both guests run, nothing is pending, no mark is there."""
    made.made.daemon.ensure()
    for name in set(made.lab.names) - made.pids().keys():  # as a failed case may have left it
        for path in (made.state / "parked").glob("*"):
            path.unlink()
        shutil.rmtree(made.state / "hook", ignore_errors=True)
        virsh(made, "managedsave-remove", name)
    if len(made.pids()) < len(made.lab.names):
        made.made.replenish()
        made.learn_uuids()
    made.clear_marks()
    choose(made, "handover")
    yield made
    if made.interrupted:  # for the next case's sake; this one has failed
        made.lab.run("resume")
        (made.state / "pending.json").unlink(missing_ok=True)


def choose(bench: Bench, method: str) -> set[str]:
    """Writes the update; the marks that it leaves."""
    together = method != "handover"
    text = MANIFEST + SWAP * together
    bench.manifest.write_text(text.format(marks=bench.marks, budget="9s" if together else "5s"))
    return {"fetch", "tidy"} | ({"swap"} if together else set())


def test_the_matrix_has_every_action_of_a_run(bench: Bench) -> None:
    plan = bench.lab.run("apply", str(bench.manifest), "--dry-run", "--json").data
    assert "actions" in plan, plan
    kinds = [f"step:{a['step']}" if a["kind"] == "step" else a["kind"] for a in plan["actions"]]
    places = {place.partition(".")[0] for place in PLACES}
    assert places == (set(kinds) | {"probe"}) - {"guard", "unguard"}


@pytest.mark.parametrize(("method", "place", "fault"), CASES)
def test_each_guest_runs_exactly_once(bench: Bench, method: str, place: str, fault: str) -> None:
    in_place = choose(bench, method)
    before = bench.pids()
    lost = bench.lab.names[-1] if fault == "kill QEMU" else ""
    process = bench.apply(method, f"{place}={'fail' if fault == 'error' else 'stop'}")
    if fault == "error":
        ended = bench.end(process)
        assert ended.code in (30, 40), (ended.out, ended.err)
    else:
        assert bench.stands_still(process), process.communicate()
        happening = fault
        if fault == "kill keeper" and not keepers(bench.lab):
            happening = ""
        # Some guest, one that is paused under its new QEMU included; or there is none to kill.
        victims = bench.pids() if lost else {}
        lost = lost if lost in victims else ""
        happening = "" if fault == "kill QEMU" and not lost else happening
        ended = faults.happen(bench, process, happening, victims)
    bench.made.daemon.ensure()
    resumed = bench.resume()
    TABLE[method, place, fault] = f"{ended.code}" if ended.code >= 0 else "killed"
    if resumed is not None:
        TABLE[method, place, fault] += f" -> {resumed.code}"
    assert "Traceback" not in ended.err, ended.err
    bench.assert_each_runs_once(before, lost if lost not in bench.pids() else "")
    assert_told(bench, ended, resumed, in_place, lost, fault)


def assert_told(
    bench: Bench, ended: Ended, resumed: Ended | None, in_place: set[str], lost: str, fault: str
) -> None:
    """The update is there or it is not, and the exit codes say which, and who was lost."""
    codes = {ended.code} | ({resumed.code} if resumed is not None else set())
    said = ended.out + (resumed.out if resumed is not None else "")
    if lost and lost not in bench.pids():
        assert 50 in codes, said
    elif fault == "kill libvirtd":  # it stayed away for longer than the run waits
        assert 50 not in codes or (resumed is not None and resumed.code == 0), said
    else:
        assert 50 not in codes, said
    marks = bench.marks_left()
    if ended.code == 0:
        assert marks == in_place, said
    elif ended.code == 30:
        assert marks >= in_place - {"tidy"}, said
    elif ended.code == 40:
        assert marks == set(), said
    elif ended.code == 50:
        assert marks in (set(), in_place, in_place - {"tidy"}), said
    else:
        assert marks in (set(), in_place), said


# ---- what befalls a guest while it is parked


@contextmanager
def standing(bench: Bench, place: str) -> Iterator[Standing]:
    """A run that stands still there; it goes on at the end of the block."""
    process = bench.apply("handover", f"{place}=stop")
    assert bench.stands_still(process), process.communicate()
    run = Standing(bench)
    yield run
    os.kill(process.pid, signal.SIGCONT)
    run.ended = bench.end(process)
    assert "Traceback" not in run.ended.err


class Standing:
    """``ended``: after the block."""

    ended: Ended

    def __init__(self, bench: Bench) -> None:
        self._bench = bench

    @property
    def record(self) -> ParkedRecord:
        """Of the guest that is parked."""
        records = ParkedRecords(self._bench.state)
        found = [records.read(uuid) for uuid in records.uuids()]
        return next(r for r in found if r is not None and r.state is ParkedState.SAVED)


def virsh(bench: Bench, *words: str) -> subprocess.CompletedProcess[str]:
    argv = ["virsh", "-c", bench.made.daemon.uri, *words]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)


def reasons(ended: Ended) -> str:
    return "\n".join(ended.data["reasons"])


def assert_stays_parked(bench: Bench, run: Standing, record: ParkedRecord, why: str) -> None:
    """The run needs a human and says why; so does a resume, and there is no QEMU."""
    assert run.ended.code == 50 and why in reasons(run.ended), run.ended.out
    assert record.name not in bench.pids()
    again = bench.lab.run("resume")
    assert again.code == 50 and why in again.out, (again.out, again.err)
    assert record.name not in bench.pids() and bench.interrupted
    assert f"{record.name} is parked" in bench.lab.run("status").out


@pytest.mark.parametrize("spoil", ["missing", "truncated", "replaced"])
def test_ram_that_is_not_as_it_was(bench: Bench, spoil: str) -> None:
    """No guest is started without it; put back, it goes on."""
    before = bench.pids()
    with standing(bench, "park.end") as run:
        record = run.record
        ram = Path(record.ram[0].link)
        aside = ram.with_name("aside")
        if spoil == "truncated":
            with ram.open("rb") as file:
                file.seek(-4096, os.SEEK_END)
                page = file.read()
            os.truncate(ram, record.ram[0].size_bytes - 4096)
        else:
            ram.rename(aside)
        if spoil == "replaced":
            ram.touch()
            os.truncate(ram, record.ram[0].size_bytes)
    assert_stays_parked(bench, run, record, "its RAM file")
    if spoil == "truncated":
        with ram.open("ab") as file:
            file.write(page)
    else:
        aside.rename(ram)
    resumed = bench.resume()
    assert resumed is not None and resumed.code == 0, resumed.out
    bench.assert_each_runs_once(before)


@pytest.mark.parametrize("spoil", ["truncated", "of another guest"])
def test_images_that_are_not_as_they_were(bench: Bench, spoil: str) -> None:
    before = bench.pids()
    with standing(bench, "park.end") as run:
        record = run.record
        paths = (Path(record.image), Path(record.guard))
        image = paths[0].read_bytes()
        other = next(name for name in bench.lab.names if name != record.name)
        spoilt = image[:-100] if spoil == "truncated" else image.replace(
            record.name.encode(), other.encode()
        )  # fmt: skip
        for path in paths:
            path.write_bytes(spoilt)
    assert_stays_parked(bench, run, record, "no image of it is intact")
    paths[0].write_bytes(image)  # one is enough
    resumed = bench.resume()
    assert resumed is not None and resumed.code == 0, resumed.out
    bench.assert_each_runs_once(before)


def test_what_is_parked_can_be_given_up(bench: Bench) -> None:
    """Where neither its image nor its copy is left; its owner can start it then."""
    with standing(bench, "park.end") as run:
        record = run.record
        for path in (Path(record.image), Path(record.guard)):
            path.write_bytes(b"")
    assert_stays_parked(bench, run, record, "no image of it is intact")
    wrong = bench.lab.run("resume", "--discard", "nobody")
    assert wrong.code == 1 and "'nobody' is parked" in wrong.err
    discarded = bench.lab.run("resume", "--discard", record.name)
    assert discarded.code == 0, (discarded.out, discarded.err)
    assert not bench.interrupted and record.name not in bench.pids()
    bench.made.lab.console(record.name).unlink()
    assert virsh(bench, "start", record.name).returncode == 0
    log = bench.made.lab.console(record.name)
    console.wait_ready(log, time.monotonic_ns() + 60_000_000_000)
    bench.assert_each_runs_once(bench.pids())


def test_a_full_ram_directory(bench: Bench) -> None:
    before = bench.pids()
    ram = bench.base / "ram"
    for path in ram.glob("libvirt/qemu/*/*"):  # what a guest has never touched would have no room
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    with standing(bench, "park.end") as run:
        room = os.statvfs(ram)
        with (ram / "full").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, room.f_bavail * room.f_frsize)
    (ram / "full").unlink()
    assert run.ended.code == 0, run.ended.out
    bench.assert_each_runs_once(before)


@pytest.mark.parametrize("daemon", ["goes on", "is restarted"])
def test_a_hook_that_is_gone(bench: Bench, daemon: str) -> None:
    """It is put back; a daemon that was started without one is told to look again."""
    before = bench.pids()
    with standing(bench, "park.end") as run:
        (bench.base / "etc/hooks/qemu.d/hostupdate").unlink()
        if daemon == "is restarted":
            bench.made.daemon.end()
            bench.made.daemon.ensure()
    resumed = bench.resume()  # on a slow machine the budget may be over
    assert run.ended.code != 50 and (resumed is None or resumed.code == 0), run.ended.out
    bench.assert_each_runs_once(before)


def test_what_others_do_to_a_parked_guest(bench: Bench) -> None:
    """None of it starts the guest, nor keeps it from coming back."""
    before = bench.pids()
    name = ""
    with standing(bench, "park.end") as run:
        name = run.record.name
        for verb in ("start", "start --force-boot", "managedsave-remove", "start"):
            tried = virsh(bench, *verb.split(), name)
            assert verb == "managedsave-remove" or "hostupdate resume" in tried.stderr, tried
        assert virsh(bench, "autostart", name).returncode == 0
        bench.made.daemon.end()
        bench.made.daemon.ensure()
        time.sleep(1)
        assert name not in bench.pids()
    assert virsh(bench, "autostart", "--disable", name).returncode == 0
    assert run.ended.code in (0, 30), run.ended.out
    bench.assert_each_runs_once(before)


def test_a_pending_record_that_is_gone(bench: Bench) -> None:
    """The parked records are enough."""
    before = bench.pids()
    process = bench.apply("handover", "prepare.end=stop")
    assert bench.stands_still(process), process.communicate()
    for pid in [*keepers(bench.lab), process.pid]:
        faults.kill_pid(pid)
    bench.end(process)
    (bench.state / "pending.json").unlink()
    resumed = bench.lab.run("resume")
    assert resumed.code == 0, (resumed.out, resumed.err)
    bench.assert_each_runs_once(before)


# ---- other QEMUs, other ways


def qemu_that_does_not_take(bench: Bench, name: str) -> Path:
    """It takes a rehearsal, and ends where it is to load the guest of that name."""
    path = bench.base / "bad-qemu"
    path.write_text(
        f'#!/bin/sh\ncase "$*" in *guest={name},*-incoming*) echo no >&2; exit 1 ;; esac\n'
        'exec /usr/bin/qemu-system-x86_64 "$@"\n'
    )
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(("number", "code"), [(0, 40), (1, 30)])
def test_a_new_qemu_that_does_not_load(bench: Bench, number: int, code: int) -> None:
    """The first guest's failure undoes the run; after that those who have moved on stay."""
    before = bench.pids()
    names = bench.lab.names
    bad = qemu_that_does_not_take(bench, names[number])
    under(bench, str(bad))
    ended = bench.end(bench.apply("handover"))
    assert ended.code == code, ended.out
    bench.assert_each_runs_once(before)
    notes = {guest["name"]: " ".join(guest["notes"]) for guest in ended.data["guests"]}
    assert "it is under its old QEMU again" in notes[names[number]]
    emulators = {name: emulator(bench, name) for name in names}
    assert emulators[names[number]] == SYSTEM
    if number:
        assert emulators[names[0]] == str(bad)
        assert "have moved on" in reasons(ended)
        under(bench, SYSTEM)  # the others' emulator is as it was
        ended = bench.end(bench.apply("handover"))
        assert ended.code == 0, ended.out
    assert bench.marks_left() == ({"fetch", "tidy"} if number else set())
    bench.assert_each_runs_once(before)


def test_a_new_qemu_that_ends_before_the_guest_is_let_run(bench: Bench) -> None:
    """It comes back under the old one."""
    before = bench.pids()
    with standing(bench, "unpark.end") as run:
        pids = bench.pids()
        name = next(name for name in pids if pids[name] != before[name])
        faults.kill_pid(pids[name])
    assert run.ended.code == 40, run.ended.out
    bench.assert_each_runs_once(before)


@pytest.mark.parametrize("way", ["save", "own-save"])
def test_ways(bench: Bench, way: str) -> None:
    text = bench.config.read_text()
    bench.config.write_text(f'{text}[handover]\nway = "{way}"\n')
    before = bench.pids()
    try:
        ended = bench.end(bench.apply("handover"))
        assert ended.code == 0, ended.out
        assert all(guest["clock"]["after_ns"] is not None for guest in ended.data["guests"])
        bench.assert_each_runs_once(before)
        process = bench.apply("handover", "park.end=stop")
        assert bench.stands_still(process), process.communicate()
        faults.kill_pid(process.pid)
        bench.end(process)
        resumed = bench.resume()
        assert resumed is None or resumed.code in (0, 30), resumed.out
        bench.assert_each_runs_once(before)
    finally:
        bench.config.write_text(text)


def test_many_in_a_row(bench: Bench, newer_qemu: Build, capsys: pytest.CaptureFixture[str]) -> None:
    before = bench.pids()
    blackouts = []
    targets = (str(newer_qemu.wrapper), SYSTEM)
    for number in range(20 if LONG else 6):
        under(bench, targets[number % 2])
        ended = bench.end(bench.apply("handover"))
        assert ended.code == 0, ended.out
        blackouts.append(round(ended.data["blackout_ns"] / 1e6))
        bench.assert_each_runs_once(before)
        versions = {builds.version(Path(f"/proc/{pid}/exe")) for pid in bench.pids().values()}
        assert versions == {builds.version(Path(targets[number % 2]))}
    with capsys.disabled():
        print(f"\n[{len(blackouts)} handovers in a row: blackouts {blackouts} ms]")


def under(bench: Bench, program: str) -> None:
    """The update puts guests under this QEMU."""
    choose(bench, "handover")
    text = bench.manifest.read_text()
    bench.manifest.write_text(text.replace("[qemu]\n", f'[qemu]\nprogram = "{program}"\n'))


def emulator(bench: Bench, name: str) -> str:
    xml = virsh(bench, "dumpxml", name).stdout
    return ET.fromstring(xml).findtext("devices/emulator", "")


# ---- at any moment


KILLS = 60 if LONG else 4


@pytest.mark.parametrize("number", range(KILLS))
def test_killed_at_a_random_moment(bench: Bench, number: int) -> None:
    seed = int(os.environ.get("HOSTUPDATE_TEST_SEED", time.time_ns())) + number
    print(f"HOSTUPDATE_TEST_SEED={seed - number}")
    chance = random.Random(seed)
    in_place = choose(bench, chance.choice(("handover", "handover, all parked")))
    before = bench.pids()
    process = bench.apply("handover")
    time.sleep(chance.uniform(0.3, 6.0))
    victims = chance.choice(("run", "run", "keeper", "both", "libvirtd", "all"))
    if victims in ("keeper", "both", "all"):
        for pid in keepers(bench.lab):
            faults.kill_pid(pid)
    if victims in ("run", "both", "all"):
        process.kill()
    if victims in ("libvirtd", "all"):
        bench.made.daemon.end()
        bench.made.daemon.ensure()
    ended = bench.end(process)
    while bench.interrupted and chance.random() < 0.5:
        recovery = bench.lab.run.start("resume")
        time.sleep(chance.uniform(0.1, 2.0))
        recovery.kill()
        recovery.communicate()
    resumed = bench.resume()
    bench.assert_each_runs_once(before)
    assert "Traceback" not in ended.err, ended.err
    codes = [ended.code] + ([resumed.code] if resumed is not None else [])
    assert 50 not in codes or (resumed is not None and resumed.code != 50), codes
    assert bench.marks_left() in (set(), in_place, in_place - {"tidy"}), (victims, codes)
    key = ("handover, random", victims, " -> ".join(map(str, codes)))
    TABLE[key] = str(int(TABLE.get(key, "0")) + 1)
