"""Runs that something happens to: an apply that stands still at a place, and what is true after."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import libvirt
import libvirt_qemu

from hostupdate.cli.lab import LabGuests
from hostupdate.errors import HostUpdateError
from hostupdate.guests import Hypervisor
from hostupdate.host.cgroups import find_cgroup2
from tests.functional.cli import Ended, Lab, keepers, pids_naming
from tests.functional.daemon import DaemonLab
from tests.functional.test_deadman import await_keepers

#: Every step leaves a mark, and its undo takes the mark away: an update is there or it is not.
MANIFEST = """\
[update]
name = "fault"
budget = "{budget}"
[[step]]
name = "fetch"
phase = "stage"
run = ["touch", "{marks}/fetch"]
undo = ["rm", "-f", "{marks}/fetch"]
[[step]]
name = "swap"
phase = "blackout"
run = ["touch", "{marks}/swap"]
undo = ["rm", "-f", "{marks}/swap"]
timeout = "500ms"
[[step]]
name = "tidy"
phase = "finish"
run = ["touch", "{marks}/tidy"]
"""
CONFIG = """\
[clock]
hold-network = true
trust-host = true
timeout = "3s"
[deadlines]
libvirt = "5s"
keeper-grace = "500ms"
[pause]
stop-timeout = "4s"
"""
_END_S = 90
_CALL_NS = 20_000_000_000


@dataclass
class Bench:
    """Guests under a daemon, and a state directory for runs on a disk of their own.

    ``size``: of that disk, small enough to be filled at once, large enough for what a run reserves.
    ``handed``: runs put a new QEMU under the guests.
    """

    made: DaemonLab
    base: Path
    size: str = "24m"
    settings: str = CONFIG
    handed: bool = False
    marks: Path = field(init=False)
    damaged: bool = False

    def __post_init__(self) -> None:
        self.disk = self.base / "disk"
        self.disk.mkdir()
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={self.size},mode=755", "none", str(self.disk)],
            check=True,
        )
        self.state = self.disk / "state"
        self.marks = self.base / "marks"
        self.marks.mkdir()
        self.manifest = self.base / "update.toml"
        self.manifest.write_text(MANIFEST.format(marks=self.marks, budget="5s"))
        self.config = self.base / "hostupdate.toml"
        self.config.write_text(self.settings)
        program = type(self.made.lab.run)(self.state)
        self.lab = Lab(
            program.with_options("--connect", self.made.daemon.uri, "--config", str(self.config)),
            self.made.lab.names,
        )
        self.image = self.base / "last.image"
        self.learn_uuids()
        connection = libvirt.open(self.made.daemon.uri)
        connection.lookupByName(self.lab.names[-1]).save(str(self.image))
        connection.restore(str(self.image))
        connection.close()

    def learn_uuids(self) -> None:
        """Of the guests, by name; one that was made anew has another."""
        connection = libvirt.open(self.made.daemon.uri)
        self.uuids = {name: connection.lookupByName(name).UUIDString() for name in self.lab.names}
        connection.close()

    def replenish(self) -> None:
        """The last guest again, as it was when it was saved: much quicker than a boot."""
        hypervisor = Hypervisor(self.made.daemon.uri, timeout_ns=_CALL_NS)
        name = self.lab.names[-1]

        def restore(connection: Any) -> None:
            domain = connection.lookupByName(name)
            if domain.isActive():  # libvirt may still be finding out that it is dead
                with suppress(libvirt.libvirtError):
                    domain.destroy()
            connection.restore(str(self.image))

        def insist(act: Callable[[], object]) -> None:
            deadline_ns = time.monotonic_ns() + _CALL_NS
            while True:
                try:
                    act()
                    return
                except HostUpdateError:
                    if time.monotonic_ns() > deadline_ns:
                        raise
                    time.sleep(0.2)

        def set_time() -> None:
            now = {"execute": "guest-set-time", "arguments": {"time": time.time_ns()}}
            LabGuests(hypervisor).agent(name, now, 5_000_000_000)

        try:
            insist(lambda: hypervisor.call("restore", restore))
            insist(set_time)
        finally:
            hypervisor.close()

    def remove(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.disk)], check=True)

    # ---- runs

    def apply(self, method: str, fault: str = "") -> subprocess.Popen[str]:
        """Starts a run, with a fault at a place or none."""
        options = () if self.handed else ("--pause-method", method)
        environment = {**os.environ, "HOSTUPDATE_FAULT": fault}
        argv = [*self.lab.run._argv, "apply", str(self.manifest), "--json", "--yes"]
        return subprocess.Popen(
            [*argv, *options],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def stands_still(self, process: subprocess.Popen[str]) -> bool:
        """Waits until the process has stopped at its place; False: it has ended, unhindered."""
        deadline_ns = time.monotonic_ns() + _END_S * 1_000_000_000
        while time.monotonic_ns() < deadline_ns:
            found = os.waitid(
                os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOHANG | os.WNOWAIT
            )
            if found is not None:
                return found.si_code == os.CLD_STOPPED
            time.sleep(0.005)
        raise AssertionError("it neither stopped nor ended")

    def end(self, process: subprocess.Popen[str]) -> Ended:
        """Waits for the end of a run, and of its keeper and recovery."""
        out, err = process.communicate(timeout=_END_S)
        await_keepers(self.lab)
        return Ended(process.returncode, out, err)

    @property
    def interrupted(self) -> bool:
        return (self.state / "pending.json").exists()

    def resume(self) -> Ended | None:
        """What an operator would do, or the next boot: None where there is nothing to do."""
        if not self.interrupted:
            return None
        ended = self.lab.run("resume")
        assert "Traceback" not in ended.err, ended.err
        assert not self.interrupted, (ended.code, ended.out, ended.err)
        return ended

    # ---- what is true after it

    def pids(self) -> dict[str, int]:
        """The one QEMU process of each guest that has one."""
        found = {}
        for name in self.lab.names:
            pids = pids_naming(self.uuids[name])
            assert len(pids) <= 1, f"{name} runs {len(pids)} times"
            if pids:
                found[name] = pids[0]
        return found

    def states(self, names: Iterable[str]) -> dict[str, int]:
        """libvirt's state of guests that are to run."""
        connection = libvirt.open(self.made.daemon.uri)
        try:
            deadline_ns = time.monotonic_ns() + 5_000_000_000
            while True:
                found = {name: connection.lookupByName(name).state()[0] for name in names}
                running = set(found.values()) == {libvirt.VIR_DOMAIN_RUNNING}
                # A daemon that has just been started tells what it remembers at first.
                if running or time.monotonic_ns() > deadline_ns:
                    return found
                time.sleep(0.05)
        finally:
            connection.close()

    def assert_each_runs_once(self, before: dict[str, int], lost: str = "") -> None:
        """The promise: each guest runs exactly once, its memory intact, nothing of ours is left."""
        expected = {name: pid for name, pid in before.items() if name != lost}
        now = self.pids()
        assert now.keys() == expected.keys() if self.handed else now == expected, (now, before)
        running = Lab(self.made.lab.run, tuple(expected))
        running.assert_healthy()
        assert set(self.states(expected).values()) == {libvirt.VIR_DOMAIN_RUNNING}
        assert not keepers(self.lab)
        mount = find_cgroup2()
        assert mount is not None
        for uuid in self.uuids.values():
            assert not (mount / "hostupdate" / uuid).exists(), "a cgroup of ours is left"
        assert not self.interrupted
        if self.handed:
            self.assert_nothing_of_a_handover_is_left(expected)

    def assert_nothing_of_a_handover_is_left(self, names: Iterable[str]) -> None:
        """No record, image, second name of RAM, kept QEMU or rehearsal; and a save of a guest would
        have all of its RAM in it."""
        places = (
            self.state / "parked",
            self.state / "rehearsal",
            self.state / "hook",
            self.base / "lib/qemu/save",
            self.base / "ram/hostupdate-parked",
            self.base / "builds",
        )
        left = [str(p) for place in places for p in place.rglob("*") if not p.is_dir()]
        assert not left, left
        assert not [
            p for p in (self.base / "ram").rglob("*") if p.is_file() and p.stat().st_nlink > 1
        ]
        homes = [p for p in (self.base / "ram/libvirt/qemu").iterdir()]
        assert len(homes) == len(list(names)), "RAM of a QEMU that is gone"
        self.await_no_other_qemu(len(homes))
        assert not (self.base / "etc/hooks/qemu.d/hostupdate").exists(), "our hook"
        for name in names:
            assert not self.ignores_shared(name), f"{name}: x-ignore-shared is on"

    def await_no_other_qemu(self, guests: int) -> None:
        """One that libvirt was starting for a run that has died ends when libvirt comes to it."""
        deadline_ns = time.monotonic_ns() + _CALL_NS
        while len(ours := pids_naming(str(self.base))) != guests:
            lines = [Path(f"/proc/{pid}/cmdline") for pid in ours]
            assert time.monotonic_ns() < deadline_ns, [
                path.read_bytes().replace(b"\0", b" ") for path in lines if path.exists()
            ]
            time.sleep(0.1)

    def ignores_shared(self, name: str) -> bool:
        connection = libvirt.open(self.made.daemon.uri)
        try:
            found = libvirt_qemu.qemuMonitorCommand(
                connection.lookupByName(name), '{"execute":"query-migrate-capabilities"}', 0
            )
        finally:
            connection.close()
        states = {each["capability"]: each["state"] for each in json.loads(found)["return"]}
        return bool(states["x-ignore-shared"])

    def marks_left(self) -> set[str]:
        return {path.name for path in self.marks.iterdir()}

    def clear_marks(self) -> None:
        for path in self.marks.iterdir():
            path.unlink()


# ---- what happens to it


@contextmanager
def full_disk(bench: Bench) -> Iterator[None]:
    """Not a byte is left where the journal lies."""
    path = bench.disk / "ballast"
    with open(path, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 20))
        except OSError:
            pass
    yield
    path.unlink()


def corrupt_journal(bench: Bench) -> None:
    """The database and its log are overwritten in place, as by a broken disk."""
    bench.damaged = True
    for name in ("journal.db", "journal.db-wal"):
        path = bench.state / name
        if path.exists():
            with open(path, "r+b") as file:
                file.write(b"\xa5" * path.stat().st_size)


@contextmanager
def stepped_clock(step_s: int) -> Iterator[None]:
    """The host's real time jumps, and jumps back at the end."""

    def step(seconds: int) -> None:
        now = time.clock_gettime_ns(time.CLOCK_REALTIME)
        time.clock_settime_ns(time.CLOCK_REALTIME, now + seconds * 1_000_000_000)

    step(step_s)
    try:
        yield
    finally:
        step(-step_s)


def kill_pid(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        print(f"pid {pid} is gone already", file=sys.stderr)


def happen(
    bench: Bench,
    process: subprocess.Popen[str],
    fault: str,
    before: dict[str, int],
) -> Ended:
    """Makes it happen to a run that stands still, and waits for the end."""

    def go_on() -> Ended:
        os.kill(process.pid, signal.SIGCONT)
        return bench.end(process)

    def die() -> Ended:
        kill_pid(process.pid)
        return bench.end(process)

    match fault:
        case "":
            return go_on()
        case "hang":
            return bench.end(process)  # the keeper ends it
        case "kill run":
            return die()
        case "kill keeper":
            for pid in keepers(bench.lab):
                kill_pid(pid)
            return go_on()
        case "kill both":
            for pid in [*keepers(bench.lab), process.pid]:
                kill_pid(pid)
            return bench.end(process)
        case "kill libvirtd":
            bench.made.daemon.end()
            ended = go_on()
            bench.made.daemon.ensure()
            return ended
        case "restart libvirtd":  # as systemd does
            bench.made.daemon.end()
            os.kill(process.pid, signal.SIGCONT)
            time.sleep(1)
            bench.made.daemon.ensure()
            return bench.end(process)
        case "kill QEMU":
            kill_pid(before[bench.lab.names[-1]])
            return go_on()
        case "disk full":
            with full_disk(bench):
                return go_on()
        case "corrupt":
            corrupt_journal(bench)
            return go_on()
        case "corrupt+kill":
            corrupt_journal(bench)
            return die()
        case "clock step":
            with stepped_clock(7):
                return go_on()
    raise AssertionError(fault)
