"""How long a guest stands still while it gets another QEMU: its RAM left in place, or saved.

Three ways, round by round in the same run and each in turn the first: libvirt's save without the
RAM (``save``), our own (``own-save``), and what a user would run otherwise, ``virsh managedsave``
and ``virsh start``; called through the library, without virsh's start-up, on the file system below
``/var/tmp`` and with its page cache: libvirt at its best. A blackout is from the guest's STOP to
its RESUME, both as QEMU said. The guest's RAM is full of stamped pages, verified all the time, and
each QEMU has all of it mapped before it ends: what has been mapped must be unmapped.

Then ``hostupdate apply`` as it is, with its rehearsals and digests of RAM, for several guests one
after the other.

``HOSTUPDATE_BENCH_GIB`` are the guests' sizes (``0.5,2,4,8``), ``HOSTUPDATE_BENCH_PAGES`` is
``4K,2M`` for RAM on a tmpfs and on a hugetlbfs; for the latter the kernel is asked for huge pages,
which it gets back at the end. ``HOSTUPDATE_BENCH_GUESTS`` are the numbers of guests for ``apply``
(``1,2,4``). Nothing is asserted about speed.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import linear_regression, median

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import conftest
from hostupdate.durations import SECOND, format_duration
from hostupdate.guests import Hypervisor
from hostupdate.guests.parking import Parking
from hostupdate.handover import ram_store
from hostupdate.handover.own_saving import OwnSaving
from hostupdate.handover.saving import Saving
from hostupdate.lab import console
from hostupdate.lab.domain import Witness
from tests.functional.cli import Lab
from tests.functional.conftest import make_cache
from tests.functional.daemon import DaemonLab
from tests.functional.handover import host_of, pid_of
from tests.functional.parked_guest import Parked, wait
from tests.requirements import need

SIZES = [float(gib) for gib in os.environ.get("HOSTUPDATE_BENCH_GIB", "0.5").split(",")]
COUNTS = [int(count) for count in os.environ.get("HOSTUPDATE_BENCH_GUESTS", "1").split(",")]
PAGES = os.environ.get("HOSTUPDATE_BENCH_PAGES", "4K").split(",")
#: How RAM files are kept, and what one page of them is.
_MOUNTS = {"4K": ("tmpfs", "size=100%,mode=755"), "2M": ("hugetlbfs", "pagesize=2M,mode=755")}
_HUGE = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
_HUGE_SPARE = 16
_LIFE_NS = 600 * SECOND
_CHUNK = 1 << 20

TITLE = "a guest's blackout while it gets another QEMU, of the same run: median (min - max)"
HEAD = (
    "pages", "guest", "stamped", "rounds", "save", "own-save", "managedsave + start", "image",
    "managedsave/save", "managedsave/own-save", "load",
)  # fmt: skip
APPLY = "a guest's blackout in hostupdate apply, guests of 0.5 GiB one after the other"
APPLY_HEAD = ("guests", "runs", "a guest's blackout", "each in turn, medians", "a run", "load")
SLOPES = "a guest's blackout, for each GiB more: slope of the medians"
WAYS = ("save", "own-save", "managedsave")
#: (pages, way) -> (GiB, median in ns) of each size.
MEDIANS: dict[tuple[str, str], list[tuple[float, float]]] = {}


class Bench:
    """One guest, and the three ways."""

    def __init__(self, guest: Parked, hypervisor: Hypervisor) -> None:
        self._guest = guest
        self._hypervisor = hypervisor
        self.image_bytes = 0
        self.ways: dict[str, Callable[[], int]] = {
            "save": lambda: self._handover(Saving(guest.host)),
            "own-save": lambda: self._handover(OwnSaving(guest.host)),
            "managedsave": self._managedsave,
        }

    @property
    def log(self) -> Path:
        return self._guest.lab.console(self._guest.name)

    @property
    def images(self) -> Path:
        """Where libvirt keeps its own."""
        return self._guest.host.save_directory

    def blackout_ns(self, way: str) -> int:
        """Of one turn; the guest is as before, and on its own RAM."""
        map_all(self._guest.name, self._guest.uuid)
        os.sync()
        found = self.ways[way]()
        self._guest.assert_as_if_nothing_had_been()
        return found

    def verify(self) -> None:
        """The guest looks at every page once more."""
        tick = console.last_tick(self.log)
        assert tick is not None
        passes = tick.passes

        def passed() -> bool:
            tick = console.last_tick(self.log)
            return tick is not None and tick.passes >= passes + 2

        wait(passed, 120)
        self._guest.lab.assert_healthy()

    def _handover(self, way: Saving) -> int:
        record = way.commit(way.switch(way.prepare(self._guest.uuid), None))
        found = way.blackout_ns(record)
        way.finish(record)
        assert found is not None
        return found

    def _managedsave(self) -> int:
        uuid, domains = self._guest.uuid, self._guest.domains
        domains.managed_save(uuid)
        self.image_bytes = self._guest.guard.stat().st_size
        self._hypervisor.call("start", lambda c: c.lookupByUUIDString(uuid).create(), _LIFE_NS)
        stopped = domains.stopped(uuid)
        assert stopped is not None

        def resumed() -> int:
            stamp = domains.resumed(uuid)
            return stamp.monotonic_ns - stopped.monotonic_ns if stamp else 0

        wait(lambda: resumed() > 0)
        return resumed()


def map_all(name: str, uuid: str) -> None:
    """As with a guest that has used its RAM since its QEMU began."""
    pid = pid_of(uuid)
    assert pid is not None
    ram = ram_store.find(name, uuid, pid)
    inodes = {file.inode for file in ram.files}
    mapped = 0
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for line in maps:
            span, _modes, _offset, _device, inode, *_ = line.split(maxsplit=5)
            if int(inode) in inodes:
                first, end = (int(part, 16) for part in span.split("-"))
                memory.seek(first)
                while memory.tell() < end:
                    mapped += len(memory.read(min(_CHUNK, end - memory.tell())))
    assert mapped >= ram.size_bytes


@pytest.fixture(params=SIZES, ids=lambda gib: f"{gib:g}G")
def gib(request: pytest.FixtureRequest) -> float:
    return float(request.param)


@pytest.fixture(params=PAGES)
def pages(request: pytest.FixtureRequest, gib: float) -> Iterator[str]:
    """The kernel has so many huge pages more, where they are wanted."""
    kind = str(request.param)
    if kind != "2M":
        yield kind
        return
    before = int(_HUGE.read_text())
    wanted = before + int(gib * 512) + _HUGE_SPARE
    try:
        _HUGE.write_text(str(wanted))
        if int(_HUGE.read_text()) < wanted:
            pytest.skip(f"the kernel has no {wanted} huge pages")
        yield kind
    finally:
        _HUGE.write_text(str(before))


@contextmanager
def _guests(pages: str, gib: float, count: int) -> Iterator[DaemonLab]:
    need("root", "qemu", "libvirt", "lab")
    base = Path(tempfile.mkdtemp(prefix="hu-b-", dir="/var/tmp"))
    base.chmod(0o755)
    (base / "state").mkdir(mode=0o700)
    ram = base / "ram"
    ram.mkdir()
    kind, options = _MOUNTS[pages]
    subprocess.run(["mount", "-t", kind, "-o", options, "hu", ram], check=True)
    try:
        made = DaemonLab(
            base, make_cache(base / "state"), guests=count, ram=ram,
            memory_bytes=int(gib * (1 << 30)), witness=Witness(fill="90%"),
        )  # fmt: skip
        try:
            yield made
        finally:
            made.remove()
    finally:
        subprocess.run(["umount", "--lazy", ram], check=True)
        shutil.rmtree(base)


@pytest.fixture
def bench(pages: str, gib: float) -> Iterator[Bench]:
    with _guests(pages, gib, 1) as made:
        hypervisor = Hypervisor(made.daemon.uri, timeout_ns=20 * SECOND)
        yield Bench(_parked(made, hypervisor), hypervisor)
        hypervisor.close()


def _parked(made: DaemonLab, hypervisor: Hypervisor) -> Parked:
    """The guest; libvirt calls the hook."""
    daemon = made.daemon
    host = dataclasses.replace(
        host_of(daemon.base, daemon.uri), domains=Parking(hypervisor, life_ns=_LIFE_NS)
    )
    (found,) = hypervisor.guests()
    guest = Parked(daemon.base, daemon, made.lab, host, found.uuid, Saving(host))
    (daemon.base / "etc/hooks/qemu.d").mkdir(parents=True)
    host.hook.install()
    assert daemon.pid is not None
    os.kill(daemon.pid, signal.SIGHUP)
    wait(lambda: guest.domains.hook_is_called(found.uuid))
    return guest


@pytest.mark.timeout(3600)
def test_handover(benchmark: BenchmarkFixture, bench: Bench, pages: str, gib: float) -> None:
    rounds = max(3, min(5 if gib <= 2 else 3, conftest.rounds() // 10))
    ready = console.wait_ready(bench.log, time.monotonic_ns() + 30 * SECOND)
    took: dict[str, list[int]] = {way: [] for way in WAYS}
    loads: list[float] = []

    def turn(number: int) -> None:
        first = number % len(WAYS)
        for way in WAYS[first:] + WAYS[:first]:
            loads.append(os.getloadavg()[0])
            took[way].append(bench.blackout_ns(way))

    numbers = iter(range(rounds))
    benchmark.pedantic(lambda: turn(next(numbers)), rounds=rounds)
    bench.verify()

    medians = {way: median(each) for way, each in took.items()}
    stored = ram_store.filesystem(bench.images)
    benchmark.extra_info |= {
        "pages": pages,
        "guest_memory_bytes": int(gib * (1 << 30)),
        "stamped_bytes": ready.pages * 4096,
        "blackout_ns": took,
        "managedsave_image_bytes": bench.image_bytes,
        "managedsave_file_system": stored,
        "load": loads,
    }
    conftest.TABLES.setdefault(TITLE, [HEAD]).append(
        (
            pages,
            f"{gib:g} GiB",
            f"{ready.pages * 4096 / (1 << 30):.2f} GiB",
            str(rounds),
            *(_cell(took[way]) for way in WAYS),
            f"{bench.image_bytes / (1 << 30):.2f} GiB, {stored}",
            *(f"{medians['managedsave'] / medians[way]:.1f}x" for way in WAYS[:2]),
            f"{min(loads):.1f} - {max(loads):.1f}",
        )
    )
    for way in WAYS:
        MEDIANS.setdefault((pages, way), []).append((gib, medians[way]))
    _note_slopes()


def _cell(took: list[int]) -> str:
    low, high = format_duration(min(took)), format_duration(max(took))
    return f"{format_duration(round(median(took)))} ({low} - {high})"


def _note_slopes() -> None:
    rows = []
    for pages in dict.fromkeys(pages for pages, _way in MEDIANS):
        points = {way: MEDIANS[pages, way] for way in WAYS}
        if len(points["save"]) > 1:
            slopes = (linear_regression(*zip(*points[way], strict=True)).slope for way in WAYS)
            rows.append((pages, *(f"{slope / 1e6:.1f} ms/GiB" for slope in slopes)))
    if rows:
        conftest.TABLES[SLOPES] = [("pages", *WAYS), *rows]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("count", COUNTS)
def test_by_apply(benchmark: BenchmarkFixture, tmp_path: Path, count: int) -> None:
    need("cgroup2")
    runs = max(1, min(5, conftest.rounds() // 10))
    manifest = tmp_path / "update.toml"
    manifest.write_text('[update]\nname = "qemu"\n[qemu]\n')
    took: list[list[int]] = []
    loads: list[float] = []
    with _guests("4K", 0.5, count) as made:
        base = made.daemon.base
        config = base / "hostupdate.toml"
        config.write_text(
            f'[paths]\nlibvirt-hooks = "{base}/etc/hooks"\nlibvirt-saves = "{base}/lib/qemu/save"\n'
            f'builds = "{base}/builds"\n[clock]\ntrust-host = true\n'
        )
        program = made.lab.run.with_options("--config", str(config))
        lab = Lab(program, made.lab.names)

        def ready() -> None:
            lab.assert_healthy()
            for guest in program("guests", "--json").data["guests"]:
                map_all(guest["name"], guest["uuid"])
            os.sync()
            loads.append(os.getloadavg()[0])

        def apply() -> None:
            ended = lab.apply(manifest)
            assert ended.code in (0, 30), ended.data["reasons"]  # busy machines degrade a run
            assert all(guest["residency"]["digest_equal"] for guest in ended.data["guests"])
            took.append([guest["blackout_ns"] for guest in ended.data["guests"]])

        benchmark.pedantic(apply, setup=ready, rounds=runs)
        lab.assert_healthy()

    benchmark.extra_info |= {"guests": count, "blackout_ns": took, "load": loads}
    conftest.TABLES.setdefault(APPLY, [APPLY_HEAD]).append(
        (
            str(count),
            str(runs),
            _cell([each for run in took for each in run]),
            ", ".join(format_duration(round(median(each))) for each in zip(*took, strict=True)),
            format_duration(round(benchmark.stats.stats.median * SECOND)),
            f"{min(loads):.1f} - {max(loads):.1f}",
        )
    )
