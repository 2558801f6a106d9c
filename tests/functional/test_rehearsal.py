"""Rehearsals of QEMUs that are as libvirt starts them, without libvirt."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest

from hostupdate.errors import DeadlineError, HypervisorError, RefusedError
from hostupdate.handover import builds, inquiry, plugged, rehearsal
from hostupdate.handover.builds import Build
from hostupdate.handover.rehearsal import Rehearsed
from hostupdate.handover.throwaway import Throwaway
from tests.functional.bare import RAM_BYTES, BareGuest, devices, machine, same_pages
from tests.requirements import need


@pytest.fixture
def ram(tmp_path: Path) -> Iterator[Path]:
    need("root", "qemu")
    with TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory) / "pc.ram"


@pytest.fixture
def old_qemu(tmp_path: Path) -> Build:
    return builds.keep(Path(shutil.which("qemu-system-x86_64") or ""), tmp_path / "old")


class Marks(list[bool]):
    """Every mark, in order."""

    __call__ = list.append


def rehearse(
    guest: BareGuest, build: Build, scratch: Path, words: list[str] | None = None
) -> Rehearsed:
    """A rehearsal that leaves guest and host as they were, however it ends."""
    marks = Marks()
    before = set(scratch.iterdir())
    try:
        return rehearsal.rehearse(
            guest, words or guest.command_line, build.wrapper, scratch, mark=marks
        )
    finally:
        assert not guest.ignores_shared
        assert marks in ([], [True, False])
        assert set(scratch.iterdir()) == before
        children = psutil.Process().children(recursive=True)
        assert not [c for c in children if "rehearsal" in c.cmdline()]


def without(words: list[str], text: str) -> list[str]:
    (at,) = (n for n, word in enumerate(words) if text in word)
    return words[: at - 1] + words[at + 1 :]


def test_a_guest_with_much_in_it_is_taken_by_newer_qemus(
    ram: Path, tmp_path: Path, old_qemu: Build, newer_qemu: Build, foreign_qemu: Build
) -> None:
    system = Path(shutil.which("qemu-system-x86_64") or "")
    with BareGuest(system, [*machine(ram), *devices(tmp_path)]) as guest:
        for build in (old_qemu, newer_qemu, foreign_qemu):
            told = rehearse(guest, build, tmp_path)
            assert told.ok, told.reason
            assert told.reason == "" and told.paused_ns is not None and told.paused_ns > 0
            assert told.new_version == builds.version(build.wrapper)
            assert guest.running


#: Root ports for devices that are plugged in later.
_PLACES = [
    word
    for n in range(8)
    for word in (
        "-device",
        f'{{"driver":"pcie-root-port","id":"hot.{n}","chassis":{20 + n},"bus":"pcie.0",'
        f'"addr":"0x5.{n:#x}","multifunction":true}}',
    )
]


def plug_much(guest: BareGuest, ram: Path) -> str:
    """As libvirt does. A definition that knows of it."""
    places = iter(range(8))
    aliases = []

    def add(driver: str, name: str, /, **fields: object) -> None:
        guest("device_add", {"driver": driver, "id": name, **fields})
        aliases.append(f"<a><alias name='{name}'/></a>")

    def add_pci(driver: str, name: str, /, **fields: object) -> None:
        add(driver, name, bus=f"hot.{next(places)}", addr="0x0", **fields)

    for node in ("libvirt-1-format", "libvirt-7-format", "libvirt-8-format"):
        guest("blockdev-add", {"driver": "null-co", "node-name": node, "size": 16 << 20})
    guest("object-add", {"qom-type": "iothread", "id": "iothread7"})
    disk = {"drive": "libvirt-1-format", "num-queues": 3, "serial": "a,b", "iothread": "iothread7"}
    add_pci("virtio-blk-pci", "virtio-disk7", **disk)
    script = {"ifname": "guest7", "script": "no", "downscript": "no"}
    guest("netdev_add", {"type": "tap", "id": "hostnet7", "queues": 2, **script})
    add_pci("virtio-net-pci", "net7", netdev="hostnet7", mq=True, vectors=6)
    guest("netdev_add", {"type": "user", "id": "hostnet8"})
    add_pci("e1000e", "net8", netdev="hostnet8")
    add_pci("virtio-scsi-pci", "z-scsi7", num_queues=2)
    add("scsi-hd", "scsi7-0-0-0", bus="z-scsi7.0", drive="libvirt-7-format", device_id="d", lun=1)
    add("scsi-cd", "scsi7-0-0-2", bus="z-scsi7.0", lun=2)
    add("usb-storage", "usb-disk7", bus="usb.0", port="3", drive="libvirt-8-format")
    add("usb-tablet", "input7", bus="usb.0", port="4")
    guest("chardev-add", {"id": "charchannel7", "backend": {"type": "null", "data": {}}})
    port = {"bus": "virtio-serial0.0", "nr": 7, "chardev": "charchannel7", "name": "org.x.7"}
    add("virtserialport", "channel7", **port)
    guest("object-add", {"qom-type": "rng-random", "id": "objrng7", "filename": "/dev/urandom"})
    add_pci("virtio-rng-pci", "rng7", rng="objrng7")
    add_pci("virtio-serial-pci", "virtio-serial7")
    add_pci("qemu-xhci", "usb7")
    cpu = {"socket-id": 1, "core-id": 0, "thread-id": 0}
    guest("device_add", {"driver": "qemu64-x86_64-cpu", "id": "vcpu1", **cpu})
    memory = {"qom-type": "memory-backend-file", "id": "memdimm0", "size": 128 << 20}
    guest("object-add", {**memory, "share": True, "mem-path": f"{ram}.dimm"})
    add("pc-dimm", "dimm0", memdev="memdimm0", slot=0)
    return f"<domain><devices>{''.join(aliases)}</devices></domain>"


def test_devices_that_were_plugged_in_are_taken(
    ram: Path, tmp_path: Path, old_qemu: Build, newer_qemu: Build, foreign_qemu: Build
) -> None:
    start = [*machine(ram), *_PLACES, *devices(tmp_path)]
    start[start.index("-smp") + 1] = "1,maxcpus=2,sockets=2,cores=1,threads=1"
    start[start.index("-m") + 1] = f"size={RAM_BYTES >> 10}k,slots=4,maxmem=1048576k"
    system = Path(shutil.which("qemu-system-x86_64") or "")
    with BareGuest(system, start) as guest:
        assert plugged.with_plugged(guest, guest.command_line, "<x/>") == guest.command_line
        xml = plug_much(guest, ram)
        assert not rehearse(guest, old_qemu, tmp_path).ok
        words = plugged.with_plugged(guest, guest.command_line, xml)
        assert plugged.with_plugged(guest, words, xml) == words
        for build in (old_qemu, newer_qemu, foreign_qemu):
            told = rehearse(guest, build, tmp_path, words)
            assert told.ok, told.reason


def test_devices_that_were_unplugged_are_not_loaded(
    ram: Path, tmp_path: Path, old_qemu: Build
) -> None:
    with BareGuest(old_qemu.wrapper, [*machine(ram), *devices(tmp_path)]) as guest:
        for name in ("channel0", "input0", "scsi0-0-0-0"):
            guest("device_del", {"id": name})
        told = rehearse(guest, old_qemu, tmp_path)
        assert not told.ok and "virtio-console" in told.reason
        words = plugged.with_plugged(guest, guest.command_line, "<x/>")
        assert len(words) == len(guest.command_line) - 8  # and a character device
        told = rehearse(guest, old_qemu, tmp_path, words)
        assert told.ok, told.reason
        there = {"driver": "usb-kbd", "id": "input0", "bus": "usb.0", "port": "1"}
        guest("device_add", there)
        xml = "<d><devices><input><alias name='input0'/></input></devices></d>"
        words = plugged.with_plugged(guest, guest.command_line, xml)
        told = rehearse(guest, old_qemu, tmp_path, words)
        assert told.ok, told.reason


def test_a_guest_that_is_busy_with_its_disk_is_taken(
    ram: Path, tmp_path: Path, old_qemu: Build, newer_qemu: Build
) -> None:
    """Its virtqueue moves on all the time: state and RAM must be of one moment."""
    with BareGuest(old_qemu.wrapper, [*machine(ram), *devices(tmp_path)]) as guest:
        guest.wait_for_reads(100)
        for build in (old_qemu, newer_qemu) * 3:
            told = rehearse(guest, build, tmp_path)
            assert told.ok, told.reason
            guest.wait_for_reads(20)


def test_ram_is_the_same_before_and_after(
    ram: Path, tmp_path: Path, old_qemu: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a QEMU that opens it for writing: the copy is private all the same."""
    pages = []
    load = Throwaway.load

    def looked_at(self: Throwaway, state: bytes, deadline_ns: int) -> None:
        pages.append(same_pages(ram))
        load(self, state, deadline_ns)
        pages.append(same_pages(ram))

    monkeypatch.setattr(Throwaway, "load", looked_at)
    with BareGuest(old_qemu.wrapper, [*machine(ram), *devices(tmp_path)]) as guest:
        guest.wait_for_reads(100)
        assert rehearse(guest, old_qemu, tmp_path).ok
        before, after = pages
        assert before == after and len(before.strip(b"\0")) > 4096
        assert ram.stat().st_size == RAM_BYTES


@pytest.mark.parametrize("tap", [True, False])
def test_of_root_it_has_what_its_files_take(
    ram: Path,
    tmp_path: Path,
    old_qemu: Build,
    newer_qemu: Build,
    monkeypatch: pytest.MonkeyPatch,
    tap: bool,
) -> None:
    """Its RAM is another user's, as a libvirt guest's is."""
    found = []
    load = Throwaway.load

    def looked_at(self: Throwaway, state: bytes, deadline_ns: int) -> None:
        (qemu,) = (c for c in psutil.Process().children(True) if "rehearsal" in c.cmdline())
        status = Path(f"/proc/{qemu.pid}/status").read_text()
        found.append(
            {int(text, 16) for text in re.findall(r"^Cap(?:Prm|Eff|Bnd):\s+(\S+)", status, re.M)}
        )
        assert not any(int(x, 16) for x in re.findall(r"^Cap(?:Inh|Amb):\s+(\S+)", status, re.M))
        assert "NoNewPrivs:\t1" in status
        load(self, state, deadline_ns)

    monkeypatch.setattr(Throwaway, "load", looked_at)
    more = devices(tmp_path) if tap else []
    with BareGuest(old_qemu.wrapper, [*machine(ram), *more]) as guest:
        os.chown(ram, 65534, 65534)
        ram.chmod(0o600)
        for build in (old_qemu, newer_qemu):
            told = rehearse(guest, build, tmp_path)
            assert told.ok, told.reason
    read, override, net_admin = 1 << 2, 1 << 1, tap << 12
    assert found == [{read | override | net_admin}, {read | net_admin}]


def test_an_older_qemu_does_not_know_the_machine(
    ram: Path, tmp_path: Path, old_qemu: Build, newer_qemu: Build
) -> None:
    """Found out before the guest is paused."""
    with BareGuest(newer_qemu.wrapper, machine(ram, "pc-q35-10.0")) as guest:
        told = rehearse(guest, old_qemu, tmp_path)
        assert (told.ok, told.paused_ns) == (False, None)
        assert "unsupported machine type" in told.reason
        assert rehearse(guest, newer_qemu, tmp_path).ok


@pytest.mark.parametrize(
    ("change", "reason", "paused"),
    [
        ("tablet", r"Unknown savevm section .*usb-ptr", True),
        ("stream", r"virtio-net: saved image requires vnet_hdr=on", True),
        ("cpu", r"unable to find CPU model 'none'", False),
    ],
)
def test_what_a_qemu_does_not_take_is_told_in_its_words(
    ram: Path, tmp_path: Path, old_qemu: Build, change: str, reason: str, paused: bool
) -> None:
    with BareGuest(old_qemu.wrapper, [*machine(ram), *devices(tmp_path)]) as guest:
        words = {
            "tablet": without(guest.command_line, "usb-tablet"),
            "stream": [
                '{"type":"stream","id":"hostnet1"}' if '"tap"' in word else word
                for word in guest.command_line
            ],
            "cpu": ["none" if word == "qemu64" else word for word in guest.command_line],
        }[change]
        told = rehearse(guest, old_qemu, tmp_path, words)
        assert not told.ok and re.search(reason, told.reason)
        assert "qemu-system" not in told.reason
        assert (told.paused_ns is not None) == paused
        assert guest.running


def test_a_state_that_we_could_not_rewrite_is_found(
    ram: Path, tmp_path: Path, old_qemu: Build
) -> None:
    """QEMU takes it; a stream whose end cannot be told from a truncated one is not handed over."""
    words = [w + ",suppress-vmdesc=on" if w.startswith("pc-q35") else w for w in machine(ram)]
    assert words != machine(ram)
    with BareGuest(old_qemu.wrapper, words) as guest:
        told = rehearse(guest, old_qemu, tmp_path)
        assert not told.ok and "suppress-vmdesc" in told.reason
        assert told.paused_ns is not None and guest.running


def test_what_cannot_be_made_harmless_is_refused_before_the_guest_is_paused(
    ram: Path, tmp_path: Path, old_qemu: Build
) -> None:
    with BareGuest(old_qemu.wrapper, machine(ram)) as guest:
        words = [*guest.command_line, "-device", "vfio-pci,host=00:01.0,id=h", "-tpmdev", "x"]
        with pytest.raises(RefusedError, match=r"vfio-pci h; .*-tpmdev x"):
            rehearse(guest, old_qemu, tmp_path, words)
        assert guest.running


def test_a_paused_guest_stays_as_its_owner_wants_it(
    ram: Path, tmp_path: Path, old_qemu: Build
) -> None:
    with BareGuest(old_qemu.wrapper, machine(ram)) as guest:
        guest("stop", {})
        with pytest.raises(RefusedError, match="does not run"):
            rehearse(guest, old_qemu, tmp_path)
        assert guest("query-status", {})["status"] == "paused"


def test_private_ram_is_refused(ram: Path, tmp_path: Path, old_qemu: Build) -> None:
    words = [
        word.replace('"share":true', '"share":false').replace(',"prealloc":true', "")
        for word in machine(ram)
    ]
    with (
        BareGuest(old_qemu.wrapper, words) as guest,
        pytest.raises(RefusedError, match="not in shared files"),
    ):
        rehearse(guest, old_qemu, tmp_path)


@pytest.mark.parametrize("fails", ["getfd", "stop", "migrate", "query-migrate", "cont"])
def test_a_monitor_that_fails_once_leaves_the_guest_running(
    ram: Path, tmp_path: Path, old_qemu: Build, fails: str
) -> None:
    class Failing(BareGuest):
        left = 1

        def __call__(self, name: str, arguments: object, *, fd: int | None = None) -> object:
            if name == fails and self.left and self.armed:
                self.left -= 1
                raise HypervisorError(f"{name} failed")
            return super().__call__(name, arguments, fd=fd)  # type: ignore[arg-type]

        armed = False

    with Failing(old_qemu.wrapper, machine(ram)) as guest:
        guest.armed = True
        try:
            told = rehearse(guest, old_qemu, tmp_path)
        except HypervisorError as error:
            assert fails in str(error)
        else:
            assert fails == "cont" and told.ok  # it is said again
        assert guest.left == 0 and guest.running
        assert rehearse(guest, old_qemu, tmp_path).ok


def test_a_state_that_takes_too_long_is_given_up(
    ram: Path, tmp_path: Path, old_qemu: Build
) -> None:
    with BareGuest(old_qemu.wrapper, [*machine(ram), *devices(tmp_path)]) as guest:
        guest("migrate-set-parameters", {"max-bandwidth": 4096})  # slower than the state
        with pytest.raises(DeadlineError):
            rehearsal.rehearse(
                guest,
                guest.command_line,
                old_qemu.wrapper,
                tmp_path,
                mark=Marks(),
                pause_ns=50_000_000,
            )
        assert guest.running and not guest.ignores_shared
        guest("migrate-set-parameters", {"max-bandwidth": 1 << 30})
        assert rehearse(guest, old_qemu, tmp_path).ok


def test_a_qemu_that_hangs_is_given_up_and_gone(ram: Path, tmp_path: Path, old_qemu: Build) -> None:
    hanging = Build(tmp_path / "hanging")
    hanging.directory.mkdir()
    hanging.wrapper.write_text(
        f'#!/bin/sh\ncase "$*" in *defer*) exec sleep 1000;; esac\nexec {old_qemu.wrapper} "$@"\n'
    )
    hanging.wrapper.chmod(0o755)
    with BareGuest(old_qemu.wrapper, machine(ram)) as guest:
        told = rehearsal.rehearse(
            guest,
            guest.command_line,
            hanging.wrapper,
            tmp_path,
            mark=Marks(),
            load_ns=500_000_000,
        )
        assert not told.ok and "no answer within" in told.reason and told.paused_ns is None
        names = [child.name() for child in psutil.Process().children(recursive=True)]
        assert "sleep" not in names and guest.running


def test_a_load_that_hangs_holds_the_guest_no_longer_than_it_may(
    ram: Path, tmp_path: Path, old_qemu: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Throwaway, "_feed", lambda self, state: None)
    with BareGuest(old_qemu.wrapper, machine(ram)) as guest:
        told = rehearse(guest, old_qemu, tmp_path)
        assert not told.ok and "no answer within" in told.reason
        assert told.paused_ns is not None and told.paused_ns >= rehearsal.PAUSE_NS
        assert guest.running


def test_disks_are_told_by_device_and_by_node(ram: Path, tmp_path: Path, old_qemu: Build) -> None:
    with BareGuest(old_qemu.wrapper, [*machine(ram), *devices(tmp_path)]) as guest:
        found = inquiry.disks(guest)
        assert found["virtio-disk0"] == found["libvirt-2-format"]
        assert (found["virtio-disk0"].size_bytes, found["virtio-disk0"].read_only) == (
            32 << 20,
            False,
        )
        assert found["scsi0-0-0-0"].read_only and "sata0-0-1" not in found
