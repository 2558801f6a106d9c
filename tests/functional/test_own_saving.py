"""Parking by a save of our own (way B): what differs from libvirt's."""

from __future__ import annotations

import os
import shutil
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from hostupdate.errors import GuestError, HypervisorError
from hostupdate.guests.parking import Parking
from hostupdate.handover import image, records, saving
from hostupdate.handover.own_saving import OwnSaving
from hostupdate.handover.recovery import recover
from hostupdate.handover.saving import Saving
from hostupdate.lab import console
from hostupdate.model import GuestState
from tests.functional.handover import pid_of
from tests.functional.parked_guest import Parked, wait
from tests.functional.parked_guest import guest as guest
from tests.functional.parked_guest import made as made


@pytest.fixture(autouse=True)
def own(guest: Parked) -> None:
    guest.way = OwnSaving(guest.host)


def test_a_guest_goes_on_where_it_was(guest: Parked, capsys: pytest.CaptureFixture[str]) -> None:
    log = guest.lab.console(guest.name)
    before = console.last_tick(log)
    pid = pid_of(guest.uuid)
    record = guest.park()
    assert guest.state() is not GuestState.RUNNING and pid_of(guest.uuid) is None
    blackout_ns = guest.bring_back(record)
    assert pid_of(guest.uuid) not in (pid, None)
    assert before is not None and blackout_ns is not None
    console.wait_ticks(log, 3, time.monotonic_ns() + 30_000_000_000)
    numbers = [tick.seq for tick in console.ticks(log, after_seq=before.seq)]
    assert numbers == list(range(before.seq + 1, before.seq + 1 + len(numbers)))
    with capsys.disabled():
        print(f"\n[own save: blackout {blackout_ns / 1e6:.0f} ms]")


def test_five_in_a_row_leave_nothing(guest: Parked, capsys: pytest.CaptureFixture[str]) -> None:
    blackouts = []
    for _ in range(5):
        record = guest.way.commit(guest.way.switch(guest.way.prepare(guest.uuid), None))
        blackouts.append(guest.way.blackout_ns(record))
        guest.way.finish(record)
        guest.assert_as_if_nothing_had_been()
    descriptors = os.listdir("/proc/self/fd")
    guest.bring_back(guest.park())
    assert len(os.listdir("/proc/self/fd")) == len(descriptors)
    with capsys.disabled():
        print(f"\n[five own saves: blackouts {[round((b or 0) / 1e6) for b in blackouts]} ms]")


@pytest.mark.parametrize("outlive", [True, False])
def test_whether_an_address_space_outlives_its_process(
    guest: Parked, monkeypatch: pytest.MonkeyPatch, outlive: bool
) -> None:
    held = []
    real = saving.held
    monkeypatch.setattr(saving, "held", lambda pid: (held.append(pid), real(pid))[1])
    pid = pid_of(guest.uuid)
    guest.way = OwnSaving(guest.host, outlive=outlive)
    guest.bring_back(guest.park())
    assert held == ([pid] if outlive else [])


def test_the_image_is_what_libvirt_would_have_written(guest: Parked) -> None:
    """As far as libvirt reads it: it defines the same guest, with the same CPU."""
    xml, cookie = guest.domains.description(guest.uuid)
    record = Saving(guest.host).park(Saving(guest.host).prepare(guest.uuid))
    theirs = image.read_image(Path(record.image))
    guest.bring_back(record)
    assert canonical(cookie) == canonical(theirs.cookie)
    ours = ET.fromstring(xml)
    for instance_only in ("seclabel", "resource"):
        for found in ours.findall(instance_only):
            ours.remove(found)
    assert defines(guest, ET.tostring(ours, encoding="unicode")) == defines(guest, theirs.xml)


def canonical(xml: str) -> str:
    return ET.canonicalize(xml, strip_text=True)


def defines(guest: Parked, xml: str) -> str:
    """The QEMU command line of a domain."""
    path = guest.base / "compare.xml"
    path.write_text(xml)
    tried = guest.virsh("domxml-to-native", "qemu-argv", str(path))
    assert tried.returncode == 0, tried.stderr
    return tried.stdout


def test_nobody_else_starts_a_parked_guest(guest: Parked) -> None:
    """Without the hook, too: the image that lies where libvirt looks does not load."""
    record = guest.park()
    refused = guest.virsh("start", guest.name)
    assert refused.returncode != 0 and "hostupdate resume" in refused.stderr
    guest.host.hook.release(record)
    assert guest.virsh("start", guest.name).returncode != 0
    assert guest.state() is not GuestState.RUNNING and guest.guard.exists()
    guest.host.hook.guard(record)
    guest.bring_back(record)


@pytest.mark.parametrize(
    "point",
    [
        "before domains stream 1",
        "after domains stream 1",
        "after domains stream_state 1",
        "before records write 2",
        "after domains restore 1",
    ],
)
def test_our_death(guest: Parked, point: str) -> None:
    guest.die_at(point)
    recover(guest.host, guest.record)
    guest.assert_as_if_nothing_had_been()


@pytest.mark.parametrize("method", ["stream", "stream_state", "description"])
def test_the_daemon_dies(guest: Parked, method: str) -> None:
    """Before any of it the guest runs or is stopped by us; recovery lets it run."""
    record = guest.way.prepare(guest.uuid)
    real = getattr(guest.domains, method)

    def fatal(*arguments: object) -> object:
        result = real(*arguments)
        guest.daemon.end()
        return result

    setattr(guest.domains, method, fatal)
    with pytest.raises(HypervisorError):
        guest.way.park(record)
    setattr(guest.domains, method, real)
    wait(lambda: guest.daemon.pid is None)
    guest.daemon.ensure()
    recover(guest.host, guest.record)
    guest.assert_as_if_nothing_had_been()


def test_a_save_that_fails(guest: Parked) -> None:
    """The image cannot be placed: the guest runs as before."""
    record = guest.way.prepare(guest.uuid)
    shutil.rmtree(guest.host.save_directory)
    guest.host.save_directory.write_text("in the way")
    with pytest.raises(GuestError, match="was not saved, and runs"):
        guest.way.park(record)
    guest.host.save_directory.unlink()
    guest.host.save_directory.mkdir()
    guest.assert_as_if_nothing_had_been()


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["desc", "{}", "--live", "another one"], "definition changed"),
        (["resume", "{}"], "somebody has resumed it"),
    ],
)
def test_what_somebody_does_to_it_meanwhile(
    guest: Parked, monkeypatch: pytest.MonkeyPatch, words: list[str], problem: str
) -> None:
    record = guest.way.prepare(guest.uuid)
    store = records.store

    def meddled(path: Path, content: bytes, **options: Any) -> None:
        store(path, content, **options)
        if path != guest.guard:
            return
        done = guest.virsh(*(word.format(guest.name) for word in words))
        assert done.returncode == 0, done.stderr

    monkeypatch.setattr(records, "store", meddled)
    pid = pid_of(guest.uuid)
    with pytest.raises(GuestError, match=problem):
        guest.way.park(record)
    assert pid_of(guest.uuid) == pid
    guest.assert_as_if_nothing_had_been()


def test_no_image_lies_about_when_the_guest_goes_on(
    guest: Parked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is whole and would load, but its RAM has moved on."""
    guest.die_at("before domains status 2")
    assert image.read_image(guest.guard)
    there = []
    resume = Parking.resume

    def watched(self: Parking, uuid: str) -> None:
        there.append([p for p in guest.files() if p.endswith((".save", ".image"))])
        resume(self, uuid)

    monkeypatch.setattr(Parking, "resume", watched)
    recover(guest.host, guest.record)
    assert there == [[]]
    guest.assert_as_if_nothing_had_been()


def test_an_image_that_cannot_be_removed(guest: Parked) -> None:
    """The guest stays as it is: stopped, and with a record."""
    record = guest.way.prepare(guest.uuid)
    guest.host.hook.guard(record)
    guest.domains.set_ignore_shared(guest.uuid, True)
    guest.virsh("qemu-monitor-command", guest.name, "--hmp", "stop")
    guest.guard.mkdir()
    with pytest.raises(GuestError, match="must not go on"):
        guest.way.abort(record)
    assert guest.state() is GuestState.PAUSED and guest.record == record
    guest.guard.rmdir()
    guest.way.abort(record)
    guest.assert_as_if_nothing_had_been()


def test_a_qemu_that_does_not_write(guest: Parked, monkeypatch: pytest.MonkeyPatch) -> None:
    record = guest.way.prepare(guest.uuid)
    monkeypatch.setattr(Parking, "stream", lambda *_: None)
    with pytest.raises(GuestError, match="was not saved, and runs"):
        guest.way.park(record)
    guest.assert_as_if_nothing_had_been()
