"""Up, down and status against a host that is played here."""

from __future__ import annotations

import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from hostupdate.errors import HypervisorError, LabError
from hostupdate.lab import fleet
from hostupdate.lab.accelerator import Acceleration
from hostupdate.lab.image import GuestImage

IMAGE = GuestImage(kernel=Path("/k"), initramfs=Path("/i"), kernel_version="6.1", digest="d")
TCG = Acceleration(kind="tcg", reason="no /dev/kvm", emulator=Path("/q"))
READY = "READY pages=1 seed=0123456789abcdef rate_ms=200\n"
TICK = "TICK seq=4 mono=5 real=6 passes=0 bad=0 gap=0\n"
MIB = 1 << 20


class Clock:
    def __init__(self) -> None:
        self.now_ns = 0

    def monotonic_ns(self) -> int:
        return self.now_ns

    def real_ns(self) -> int:
        return 1_700_000_000 * 10**9

    def sleep_ns(self, duration_ns: int) -> None:
        self.now_ns += duration_ns


class FakeHost:
    """libvirt, with guests that are ready at once. ``fail`` names calls that raise, once each."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.guests: dict[str, bool] = {}
        self.fail: set[tuple[str, str]] = set()
        self.says = READY + TICK
        self.dies = False
        self.mute: set[str] = set()
        self.calls: list[tuple[str, ...]] = []

    def _enter(self, call: str, name: str) -> None:
        self.calls.append((call, name))
        if (call, name) in self.fail:
            self.fail.remove((call, name))
            raise HypervisorError(f"{call} {name} failed")

    def names(self) -> list[fleet.Known]:
        return [fleet.Known(name=name, active=active) for name, active in self.guests.items()]

    def define(self, xml: str) -> None:
        name = ET.fromstring(xml).findtext("name") or ""
        self._enter("define", name)
        self.guests[name] = False

    def start(self, name: str) -> None:
        self._enter("start", name)
        self.guests[name] = not self.dies
        fleet.console_path(self.root, name).write_text(self.says)

    def destroy(self, name: str) -> None:
        assert self.guests[name], "destroy of a guest that does not run"
        self._enter("destroy", name)
        self.guests[name] = False

    def undefine(self, name: str) -> None:
        assert not self.guests[name], "undefine of a guest that runs"
        self._enter("undefine", name)
        del self.guests[name]

    def agent(self, name: str, command: Mapping[str, Any], timeout_ns: int) -> Mapping[str, Any]:
        self._enter(command["execute"], name)
        if name in self.mute:
            raise HypervisorError("guest agent is not connected")
        return {"return": {}}


@pytest.fixture
def root() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hu-", dir="/tmp") as directory:
        fleet.prepare_root(Path(directory))
        yield Path(directory)


@pytest.fixture
def host(root: Path) -> FakeHost:
    return FakeHost(root)


def up(host: FakeHost, count: int, **more: Any) -> tuple[fleet.GuestStatus, ...]:
    arguments: dict[str, Any] = {"image": IMAGE, "acceleration": TCG, "clock": Clock()}
    return fleet.up(host, host.root, count, 192 * MIB, **(arguments | more))


def files(root: Path) -> set[str]:
    kept = [*(root / "guests").iterdir(), *(root / "console").iterdir()]
    return {path.name for path in kept}


def test_prepare_root_is_repeatable_and_keeps_libvirt_inside(root: Path) -> None:
    conf = root / "etc/qemu.conf"
    before = conf.stat().st_ino
    fleet.prepare_root(root)
    assert conf.stat().st_ino == before
    assert 'stdio_handler = "file"' in conf.read_text().splitlines()


@pytest.mark.parametrize("root", [Path("relative"), Path("/tmp/" + "x" * 40)])
def test_prepare_root_refuses_paths_that_cannot_work(root: Path) -> None:
    with pytest.raises(LabError) as caught:
        fleet.prepare_root(root)
    assert caught.value.remedy
    assert not root.exists()


def test_up_makes_guests_ready_and_gives_them_the_time(host: FakeHost) -> None:
    made = up(host, 2)
    assert [(guest.name, guest.active, guest.ready) for guest in made] == [
        ("hu-lab-1", True, True),
        ("hu-lab-2", True, True),
    ]
    assert made[0].tick is not None and made[0].tick.seq == 4
    for name in ("hu-lab-1", "hu-lab-2"):
        calls = [call for call, guest in host.calls if guest == name]
        assert calls == ["define", "start", "guest-ping", "guest-set-time"]


def test_up_again_keeps_what_runs_and_adds_the_rest(host: FakeHost) -> None:
    up(host, 2)
    host.calls.clear()
    assert len(up(host, 3)) == 3
    assert host.calls == [
        ("guest-ping", "hu-lab-1"),
        ("guest-ping", "hu-lab-2"),
        ("define", "hu-lab-3"),
        ("start", "hu-lab-3"),
        ("guest-ping", "hu-lab-3"),
        ("guest-set-time", "hu-lab-3"),
    ]
    assert len(up(host, 1)) == 3


def test_up_replaces_a_guest_of_ours_that_ended(host: FakeHost) -> None:
    up(host, 1)
    host.guests["hu-lab-1"] = False
    host.calls.clear()
    assert up(host, 1)[0].active
    assert [call for call, _ in host.calls][:3] == ["undefine", "define", "start"]


def test_up_refuses_a_name_that_somebody_else_uses(host: FakeHost) -> None:
    host.guests["hu-lab-2"] = True
    with pytest.raises(LabError, match="hu-lab-2 exists"):
        up(host, 2)
    assert host.calls == []
    assert files(host.root) == set()


def test_up_refuses_too_little_memory(host: FakeHost) -> None:
    with pytest.raises(LabError, match="at least"):
        fleet.up(host, host.root, 1, 64 * MIB, image=IMAGE, acceleration=TCG)


@pytest.mark.parametrize("call", ["define", "start"])
def test_a_failed_start_removes_what_this_call_made(host: FakeHost, call: str) -> None:
    up(host, 1)
    host.fail = {(call, "hu-lab-3")}
    with pytest.raises(HypervisorError, match="hu-lab-3"):
        up(host, 3)
    assert host.guests == {"hu-lab-1": True}
    assert files(host.root) == {"hu-lab-1.xml", "hu-lab-1.log"}


def test_a_guest_that_ends_while_booting_is_reported_with_its_last_words(host: FakeHost) -> None:
    host.says, host.dies = "Kernel panic - not syncing: VFS\n", True
    clock = Clock()
    with pytest.raises(LabError, match=r"QEMU process has ended(?s:.*)Kernel panic"):
        up(host, 1, clock=clock)
    assert clock.now_ns == 0, "it did not wait for the deadline"
    assert host.guests == {}


@pytest.mark.parametrize("silent", ["console", "agent"])
def test_the_deadline_is_kept(host: FakeHost, silent: str) -> None:
    if silent == "console":
        host.says = "[    0.5] still booting\n"
    else:
        host.mute = {"hu-lab-2"}
    clock = Clock()
    with pytest.raises(LabError, match=r"did not come up(?s:.*)last:") as caught:
        up(host, 2, clock=clock, timeout_ns=10**9)
    assert 10**9 <= clock.now_ns < 1.1 * 10**9
    assert ("agent" in str(caught.value)) is (silent == "agent")
    assert host.guests == {}
    assert files(host.root) == set()


def test_an_agent_that_answers_late_is_waited_for(host: FakeHost) -> None:
    host.fail = {("guest-ping", "hu-lab-1")}
    assert up(host, 1)[0].ready


def test_a_guest_whose_clock_cannot_be_set_is_not_kept(host: FakeHost) -> None:
    host.fail = {("guest-set-time", "hu-lab-1")}
    with pytest.raises(HypervisorError, match="guest-set-time"):
        up(host, 2)
    assert host.guests == {}


def test_a_guest_that_libvirt_finds_dead_only_later_is_made_again(host: FakeHost) -> None:
    up(host, 1)
    fleet.console_path(host.root, "hu-lab-1").unlink()  # it was killed before it could say a word

    class Finding(Clock):
        def sleep_ns(self, duration_ns: int) -> None:
            super().sleep_ns(duration_ns)
            host.guests["hu-lab-1"] = False

    host.calls.clear()
    assert up(host, 1, clock=Finding())[0].ready
    assert [call for call, _ in host.calls][:3] == ["undefine", "define", "start"]


def test_metadata_goes_to_its_guest(host: FakeHost) -> None:
    up(host, 2, metadata={"hu-lab-2": {"update-domain": "1"}})
    records = [(host.root / f"guests/hu-lab-{n}.xml").read_text() for n in (1, 2)]
    assert ["urn:hostupdate:guest:1" in record for record in records] == [False, True]


def test_down_removes_everything_and_may_be_repeated(host: FakeHost) -> None:
    up(host, 2)
    host.guests["database"] = True
    assert fleet.down(host, host.root) == ("hu-lab-1", "hu-lab-2")
    assert host.guests == {"database": True}
    assert files(host.root) == set()
    assert fleet.down(host, host.root) == ()


def test_down_of_one_with_its_log_kept(host: FakeHost) -> None:
    up(host, 2)
    assert fleet.down(host, host.root, names=["hu-lab-2"], keep_logs=True) == ("hu-lab-2",)
    assert files(host.root) == {"hu-lab-1.xml", "hu-lab-1.log", "hu-lab-2.log"}


@pytest.mark.parametrize("name", ["database", "hu-lab-9", "hu-lab-01", "hu-lab-1\n", "../x"])
def test_down_refuses_guests_that_are_not_its_own(host: FakeHost, name: str) -> None:
    up(host, 1)
    host.guests[name] = True
    host.calls.clear()
    with pytest.raises(LabError, match="not a lab guest"):
        fleet.down(host, host.root, names=["hu-lab-1", name])
    assert host.calls == []


def test_down_goes_on_after_a_crash_of_up(host: FakeHost) -> None:
    (host.root / "guests/hu-lab-1.xml").write_text("<domain/>")  # killed before define
    assert fleet.down(host, host.root) == ("hu-lab-1",)
    assert files(host.root) == set()


def test_a_destroy_that_libvirt_disputes_counts_when_the_guest_is_gone(host: FakeHost) -> None:
    up(host, 1)

    def destroy(name: str) -> None:
        host.guests[name] = False
        raise HypervisorError("domain is not running")

    host.destroy = destroy  # type: ignore[method-assign]
    assert fleet.down(host, host.root) == ("hu-lab-1",)


def test_a_failed_destroy_keeps_the_record_for_the_next_call(host: FakeHost) -> None:
    up(host, 1)
    host.fail = {("destroy", "hu-lab-1")}
    with pytest.raises(HypervisorError):
        fleet.down(host, host.root)
    assert fleet.down(host, host.root) == ("hu-lab-1",)


def test_status_lists_by_number(host: FakeHost) -> None:
    up(host, 10)
    host.guests["hu-lab-2"] = False
    found = fleet.status(host, host.root)
    assert [guest.name for guest in found] == [f"hu-lab-{n}" for n in range(1, 11)]
    assert [guest.name for guest in found if not guest.active] == ["hu-lab-2"]
    assert not found[1].ready
