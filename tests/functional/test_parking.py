"""A guest's QEMU is taken away and replaced, its RAM left in place, under a libvirtd of our own."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from libvirt_qemu import qemuMonitorEventRegister

from hostupdate.errors import GuestError, HypervisorError
from hostupdate.guests import Hypervisor
from hostupdate.guests.parking import Parking
from hostupdate.handover import builds, image, parked_image, ram_store
from hostupdate.handover.builds import Build
from hostupdate.handover.domain import NAMESPACE
from hostupdate.handover.recovery import Recovered, discard, recover
from hostupdate.handover.ways import WAYS
from hostupdate.lab import console
from hostupdate.lab.root import record_path
from hostupdate.model import GuestState
from hostupdate.parked import ParkedState
from tests.functional.daemon import DaemonLab
from tests.functional.handover import CALL_NS, host_of, pid_of
from tests.functional.parked_guest import Parked, wait
from tests.functional.parked_guest import guest as guest
from tests.functional.parked_guest import made as made

FOREIGN_HOOK = '#!/bin/sh\necho "$1 $2 $3" >>{log}\n'


def test_a_daemon_that_had_no_hook_calls_it_once_it_has_reloaded(made: DaemonLab) -> None:
    host = host_of(made.daemon.base, made.daemon.uri)
    hypervisor = Hypervisor(made.daemon.uri, timeout_ns=CALL_NS)
    uuid = hypervisor.guests()[0].uuid
    host.hook.uninstall()
    made.daemon.end()
    made.daemon.ensure()
    host.hook.install()
    assert not host.domains.hook_is_called(uuid)
    pid = made.daemon.pid
    assert pid is not None
    os.kill(pid, signal.SIGHUP)
    wait(lambda: host.domains.hook_is_called(uuid))
    made.lab.assert_healthy()


def test_a_guest_goes_on_where_it_was(guest: Parked, capsys: pytest.CaptureFixture[str]) -> None:
    log = guest.lab.console(guest.name)
    before = console.last_tick(log)
    pid = pid_of(guest.uuid)
    record = guest.park()
    assert record.state is ParkedState.SAVED
    assert guest.state() is GuestState.SHUTOFF
    assert pid_of(guest.uuid) is None
    assert guest.guard.exists()
    blackout_ns = guest.bring_back(record)
    assert pid_of(guest.uuid) not in (pid, None)
    assert before is not None
    console.wait_ticks(log, 3, time.monotonic_ns() + 30_000_000_000)
    numbers = [tick.seq for tick in console.ticks(log, after_seq=before.seq)]
    assert numbers == list(range(before.seq + 1, before.seq + 1 + len(numbers)))
    assert blackout_ns is not None and blackout_ns > 0
    with capsys.disabled():
        print(f"\n[park and unpark: blackout {blackout_ns / 1e6:.0f} ms]")


def test_five_in_a_row_leave_nothing(guest: Parked, capsys: pytest.CaptureFixture[str]) -> None:
    blackouts = []
    for _ in range(5):
        record = guest.way.switch(guest.way.prepare(guest.uuid), None)
        record = guest.way.commit(record)
        blackouts.append(guest.way.blackout_ns(record))
        guest.way.finish(record)
        guest.assert_as_if_nothing_had_been()
    homes = sorted((guest.base / "ram/libvirt/qemu").iterdir())
    assert len(homes) == len(guest.lab.names)
    with capsys.disabled():
        print(f"\n[five handovers: blackouts {[round((b or 0) / 1e6) for b in blackouts]} ms]")


def test_a_paused_guest_stays_paused(guest: Parked) -> None:
    guest.owner().suspend(guest.name)
    guest.bring_back(guest.park())
    assert guest.state() is GuestState.PAUSED
    assert guest.files() == []
    guest.owner().resume(guest.name)


def other_emulator(guest: Parked) -> Path:
    path = guest.base / "other-qemu"
    path.write_text('#!/bin/sh\nexec /usr/bin/qemu-system-x86_64 "$@"\n')
    path.chmod(0o755)
    return path


def test_another_emulator(guest: Parked) -> None:
    """Under which somebody lets it run before we do."""
    other = other_emulator(guest)
    record = guest.way.switch(guest.way.prepare(guest.uuid), str(other))
    facts = guest.domains.facts(guest.uuid)
    assert facts is not None and facts.emulator == str(other)
    assert facts.state is GuestState.PAUSED
    guest.owner().resume(guest.name)
    with pytest.raises(GuestError, match="somebody has let it run"):
        guest.way.rollback(record)
    guest.way.finish(guest.way.commit(record))


def test_the_old_emulator_again(guest: Parked) -> None:
    """Before the guest is let run."""
    record = guest.way.switch(guest.way.prepare(guest.uuid), str(other_emulator(guest)))
    record = guest.way.rollback(record)
    facts = guest.domains.facts(guest.uuid)
    assert facts is not None and facts.emulator == record.old_emulator
    record = guest.way.commit(record)
    with pytest.raises(GuestError, match="no way back"):
        guest.way.rollback(record)
    guest.way.finish(record)


@pytest.mark.parametrize("spoil", ["images", "ram"])
def test_a_guest_that_could_not_come_back_is_left_where_it_is(guest: Parked, spoil: str) -> None:
    """Its new QEMU is all that it has."""
    record = guest.way.unpark(guest.park(), None)
    paths = [Path(record.image), Path(record.guard)] if spoil == "images" else []
    paths += [Path(record.ram[0].link)] if spoil == "ram" else []
    for path in paths:
        path.rename(f"{path}.aside")
    pid = guest.host.find_pid(guest.uuid)
    with pytest.raises(GuestError):
        guest.way.rollback(record)
    assert guest.host.find_pid(guest.uuid) == pid is not None
    for path in paths:
        Path(f"{path}.aside").rename(path)
    guest.way.finish(guest.way.commit(guest.way.rollback(record)))
    guest.lab.assert_healthy()


@pytest.mark.parametrize("way", WAYS)
def test_a_newer_qemu(
    guest: Parked, newer_qemu: Build, capsys: pytest.CaptureFixture[str], way: str
) -> None:
    """And the old one again, in a handover of its own: the guest has moved on."""
    hands = WAYS[way](guest.host)
    log = guest.lab.console(guest.name)
    before = console.last_tick(log)
    assert before is not None
    blackouts = []
    for emulator in (str(newer_qemu.wrapper), "/usr/bin/qemu-system-x86_64"):
        record = hands.commit(hands.switch(hands.prepare(guest.uuid), emulator))
        blackouts.append(hands.blackout_ns(record))
        hands.finish(record)
        guest.assert_as_if_nothing_had_been()
        pid = pid_of(guest.uuid)
        assert pid is not None
        versions = builds.version(Path(f"/proc/{pid}/exe")), builds.version(Path(emulator))
        assert versions[0] == versions[1]
    numbers = [tick.seq for tick in console.ticks(log, after_seq=before.seq)]
    assert numbers == list(range(before.seq + 1, before.seq + 1 + len(numbers)))
    with capsys.disabled():
        milliseconds = [round((blackout or 0) / 1e6) for blackout in blackouts]
        print(f"\n[{way}, to a newer QEMU and back: blackouts {milliseconds} ms]")


def test_what_libvirt_can_start(guest: Parked) -> None:
    """Also while a guest is parked."""
    record = guest.park()
    for emulator in (Path(record.old_emulator), other_emulator(guest)):
        guest.domains.try_emulator(uuid_of(guest, guest.lab.names[1]), emulator)
    assert "probe" not in guest.virsh("list", "--all").stdout
    guest.bring_back(record)


@pytest.mark.parametrize("how", ["no qemu", "fails", "fails to start", "closed", "gone"])
def test_what_libvirt_cannot_start(guest: Parked, how: str) -> None:
    emulator = guest.base / "cannot-start"
    emulator.write_text(
        "#!/bin/sh\necho it is closed to me >&2; exit 1\n"
        if how == "fails"
        # As under a security driver, which lets the daemon run it, and no guest.
        else '#!/bin/sh\ncase "$*" in *probe*) echo closed to me >&2; exit 126 ;; esac\n'
        'exec /usr/bin/qemu-system-x86_64 "$@"\n'
    )
    emulator.chmod(0o644 if how == "closed" else 0o755)
    if how == "gone":
        emulator.unlink()
    tried = Path("/bin/false") if how == "no qemu" else emulator
    with pytest.raises(HypervisorError, match=f"start {tried}") as caught:
        guest.domains.try_emulator(guest.uuid, tried)
    assert str(tried) in caught.value.remedy
    if how.startswith("fails"):
        assert "closed to me" in str(caught.value)
    assert "probe" not in guest.virsh("list", "--all").stdout
    emulator.unlink(missing_ok=True)


def test_an_emulator_that_does_not_take_it(guest: Parked) -> None:
    """The guest stays parked, its image and its RAM as they were."""
    broken = guest.base / "broken-qemu"
    # It answers libvirt's questions, and ends where it is to load a guest.
    broken.write_text(
        '#!/bin/sh\ncase "$*" in *-incoming*) echo no >&2; exit 1 ;; esac\n'
        'exec /usr/bin/qemu-system-x86_64 "$@"\n'
    )
    broken.chmod(0o755)
    record = guest.park()
    image = Path(record.image).read_bytes()
    with pytest.raises(GuestError, match="stays parked"):
        guest.way.unpark(record, str(broken))
    assert guest.state() is GuestState.SHUTOFF
    assert Path(record.image).read_bytes() == image
    record = guest.way.rollback(guest.record)
    guest.way.finish(guest.way.commit(record))


@pytest.mark.parametrize("how", ["start", "start --paused", "start --force-boot", "removed"])
def test_nobody_else_starts_a_parked_guest(guest: Parked, how: str) -> None:
    record = guest.park()
    image = Path(record.image).read_bytes()
    if how == "removed":
        assert guest.virsh("managedsave-remove", guest.name).returncode == 0
        tried = guest.virsh("start", guest.name)
    else:
        verb, *options = how.split()
        tried = guest.virsh(verb, guest.name, *options)
    assert tried.returncode != 0
    assert "hostupdate resume" in tried.stderr
    assert guest.state() is GuestState.SHUTOFF
    assert Path(record.image).read_bytes() == image
    guest.bring_back(record)


@pytest.mark.parametrize("how", ["start", "start --force-boot"])
def test_nobody_else_starts_it_while_we_do(
    guest: Parked, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """The hook gives the RAM to what has our ticket only: else it would be booted on it."""
    record = guest.park()
    restore = Parking.restore

    def late(self: Parking, path: Path) -> None:
        verb, *options = how.split()
        tried = guest.virsh(verb, guest.name, *options)
        assert tried.returncode != 0 and "hostupdate resume" in tried.stderr
        restore(self, path)

    monkeypatch.setattr(Parking, "restore", late)
    record = guest.way.unpark(record, None)
    assert NAMESPACE in guest.virsh("dumpxml", guest.name).stdout
    assert NAMESPACE not in guest.virsh("dumpxml", "--inactive", guest.name).stdout
    guest.way.finish(guest.way.commit(record))


@pytest.mark.parametrize("way", WAYS)
def test_a_guest_that_was_started_anew_is_not_parked(guest: Parked, way: str) -> None:
    """What is saved of it would meet the RAM of the time before."""
    hands = WAYS[way](guest.host)
    record = hands.prepare(guest.uuid)
    guest.owner().destroy(guest.name)
    guest.owner().start(guest.name)
    pid = pid_of(guest.uuid)
    with pytest.raises(GuestError, match="started anew"):
        hands.park(record)
    assert pid_of(guest.uuid) == pid
    guest.assert_as_if_nothing_had_been()


def test_a_guest_whose_ram_changed_is_let_run_by_its_owner_only(guest: Parked) -> None:
    record = guest.way.unpark(guest.park(), None)
    spoilt = msgspec.structs.replace(record, problem="its RAM changed while it was parked")
    guest.host.records.write(spoilt)
    for _ in range(2):
        with pytest.raises(GuestError, match="its RAM changed") as caught:
            recover(guest.host, guest.record)
        assert "virsh resume" in caught.value.remedy
        assert guest.state() is GuestState.PAUSED
    assert guest.virsh("resume", guest.name).returncode == 0
    assert recover(guest.host, guest.record) is Recovered.COMMITTED


@pytest.mark.parametrize("stops", ["suspend", "qemu-monitor-command --hmp"])
def test_who_was_let_run_is_never_taken_back(guest: Parked, stops: str) -> None:
    """Whatever has stopped it since: its disks and its RAM have moved on."""
    record = guest.way.unpark(guest.park(), None)
    assert guest.virsh("resume", guest.name).returncode == 0
    verb, *options = stops.split()
    assert guest.virsh(verb, guest.name, *options, *(["stop"] if options else [])).returncode == 0
    wait(lambda: guest.state() is GuestState.PAUSED)
    pid = pid_of(guest.uuid)
    with pytest.raises(GuestError, match="no way back"):
        guest.way.rollback(record)
    assert recover(guest.host, record, record.old_emulator, stay=False) is Recovered.COMMITTED
    assert pid_of(guest.uuid) == pid
    assert guest.virsh("resume", guest.name).returncode == 0


def test_another_guest_of_its_name(guest: Parked) -> None:
    record = guest.park()
    xml = (
        f"<domain type='qemu'><name>{guest.name}</name><memory>1024</memory>"
        "<os><type>hvm</type></os></domain>"
    )
    path = guest.base / "same-name.xml"
    path.write_text(xml)
    assert guest.virsh("undefine", "--managed-save", guest.name).returncode == 0
    tried = guest.virsh("create", str(path))
    assert "name" in tried.stderr and tried.returncode != 0
    guest.bring_back(record)  # without a definition
    guest.owner().define(record_path(guest.lab.root, guest.name).read_text())


def test_other_guests_and_hooks_are_left_alone(guest: Parked) -> None:
    """The other guest of the lab is started and ended while one is parked; another's hook is
    called beside ours and is there afterwards."""
    log = guest.base / "foreign.log"
    foreign = guest.host.hook.path.with_name("another")
    foreign.write_text(FOREIGN_HOOK.format(log=log))
    foreign.chmod(0o755)
    other = guest.lab.names[1]
    record = guest.park()
    assert guest.virsh("managedsave", other).returncode == 0
    assert guest.virsh("start", other).returncode == 0
    guest.bring_back(record)
    guest.host.hook.uninstall()
    assert not guest.host.hook.path.exists()
    assert f"{other} start begin" in log.read_text()
    assert f"{guest.name} start begin" in log.read_text()
    foreign.unlink()


@pytest.mark.parametrize("spoil", ["missing", "truncated", "replaced"])
def test_ram_that_is_not_as_it_was(guest: Parked, spoil: str) -> None:
    """Nothing is started; put back, the guest goes on."""
    record = guest.park()
    ram = Path(record.ram[0].link)
    aside = ram.with_name("aside")
    if spoil == "truncated":
        with ram.open("rb+") as file:
            file.seek(-4096, os.SEEK_END)
            page = file.read()
        os.truncate(ram, record.ram[0].size_bytes - 4096)
    else:
        ram.rename(aside)
    if spoil == "replaced":
        ram.write_bytes(b"")
        os.truncate(ram, record.ram[0].size_bytes)
    with pytest.raises(GuestError, match="stays parked"):
        guest.way.unpark(record, None)
    # Nor would the hook have let it pass.
    guest.host.hook.allow(record, "0")
    loadable = guest.base / "loadable"
    loadable.write_bytes(parked_image.loadable(parked_image.intact(record), None, "0"))
    refused = guest.virsh("restore", str(loadable), "--paused")
    assert refused.returncode != 0 and "its RAM file" in refused.stderr
    guest.host.hook.guard(record)
    assert guest.state() is GuestState.SHUTOFF
    if spoil == "truncated":
        with ram.open("ab") as file:
            file.write(page)
    else:
        aside.rename(ram)
    guest.bring_back(record)


@pytest.mark.parametrize("spoil", ["missing", "truncated", "part", "of another guest"])
@pytest.mark.parametrize("which", ["ours", "libvirt's"])
def test_an_image_that_is_not_as_it_was(guest: Parked, spoil: str, which: str) -> None:
    """One of the two is enough; with neither the guest stays parked."""
    record = guest.park()
    ours, guard = Path(record.image), Path(record.guard)
    image = ours.read_bytes()
    spoilt = ours if which == "ours" else guard
    if spoil == "missing":
        spoilt.unlink()
    else:
        spoilt.write_bytes(
            {
                "truncated": image[:-100],
                "part": image.replace(b"LibvirtQemudSave", b"LibvirtQemudPart", 1),
                "of another guest": image.replace(b"hu-lab-1", b"hu-lab-2"),
            }[spoil]
        )
    if spoil == "part":
        both = (ours, guard)
        kept = [path.read_bytes() for path in both]
        for path in both:
            path.write_bytes(b"")
        with pytest.raises(GuestError, match="no image of it is intact"):
            guest.way.unpark(record, None)
        for path, data in zip(both, kept, strict=True):
            path.write_bytes(data)
    guest.bring_back(record)


def test_a_hook_that_is_gone(guest: Parked) -> None:
    """It is put back. Where the daemon had none at its start it does not call it: the guest has no
    RAM then, is not let run, and goes on once the daemon has looked again."""
    record = guest.park()
    guest.host.hook.path.unlink()
    guest.daemon.end()
    guest.daemon.ensure()
    with pytest.raises(GuestError, match="stays parked") as caught:
        guest.way.unpark(record, None)
    assert "reload" in caught.value.remedy
    assert guest.state() is GuestState.SHUTOFF
    pid = guest.daemon.pid
    assert pid is not None
    os.kill(pid, signal.SIGHUP)
    wait(lambda: guest.domains.hook_is_called(guest.uuid))
    guest.bring_back(record)


def test_a_full_ram_directory(guest: Parked) -> None:
    full = guest.base / "ram/full"
    room = os.statvfs(guest.base / "ram")
    with full.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, room.f_bavail * room.f_frsize)
    try:
        guest.bring_back(guest.park())
    finally:
        full.unlink()


def test_the_daemon_ends_and_starts_while_guests_are_parked(guest: Parked) -> None:
    """Its start does not bring back a guest that is to be started at boot."""
    assert guest.virsh("autostart", guest.name).returncode == 0
    record = guest.park()
    guest.daemon.end()
    guest.daemon.ensure()
    time.sleep(1)
    assert guest.state() is GuestState.SHUTOFF
    guest.bring_back(record)
    assert guest.virsh("autostart", "--disable", guest.name).returncode == 0


def test_what_its_owner_saved_since_is_not_ours_to_remove(guest: Parked) -> None:
    record = guest.way.commit(guest.way.switch(guest.way.prepare(guest.uuid), None))
    guest.guard.unlink()
    assert guest.virsh("managedsave", guest.name).returncode == 0
    guest.way.finish(record)
    assert guest.guard.stat().st_size > 20 << 20
    assert guest.virsh("start", guest.name).returncode == 0
    guest.domains.drop_metadata(guest.uuid, NAMESPACE)  # its old ticket, which opens nothing


def test_an_abort_leaves_a_guest_that_can_be_saved(guest: Parked) -> None:
    """A save after it holds the guest's RAM."""
    record = guest.way.prepare(guest.uuid)
    guest.domains.set_ignore_shared(guest.uuid, True)
    guest.way.abort(record)
    guest.assert_as_if_nothing_had_been()
    assert guest.virsh("managedsave", guest.name).returncode == 0
    assert guest.guard.stat().st_size > 20 << 20
    assert guest.virsh("start", guest.name).returncode == 0


def test_a_save_that_fails(guest: Parked) -> None:
    """The guest runs as before, and the next save holds its RAM."""
    record = guest.way.prepare(guest.uuid)
    shutil.rmtree(guest.host.save_directory)
    guest.host.save_directory.write_text("in the way")
    with pytest.raises(GuestError, match="was not saved, and runs"):
        guest.way.park(record)
    guest.host.save_directory.unlink()
    guest.host.save_directory.mkdir()
    guest.assert_as_if_nothing_had_been()


@pytest.mark.parametrize(
    "point",
    [
        "after records write 1",
        "after hook guard 1",
        "after domains set_ignore_shared 1",
        "after domains managed_save 1",
        "before records write 2",
        "after records write 2",
        "after records write 3",
        "after hook allow 1",
        "after domains restore 1",
        "after records write 4",
        "after domains resume 1",
        "after domains forget_save 1",
        "after hook release 1",
        "before records remove 1",
    ],
)
def test_our_death(guest: Parked, point: str) -> None:
    """Whenever it comes, the guest runs or is parked, nobody else can start it, and recovery
    brings it back; twice, it does no harm."""
    guest.die_at(point)
    state = guest.way.settle(guest.record).state
    if state is GuestState.SHUTOFF:
        assert guest.virsh("start", guest.name).returncode != 0
    elif state is GuestState.RUNNING:
        guest.lab.assert_healthy()
    recover(guest.host, guest.record)
    guest.assert_as_if_nothing_had_been()


@pytest.mark.parametrize("delay_ms", [0, 10, 20, 40, 60])
def test_the_daemon_dies_while_it_saves(guest: Parked, delay_ms: int) -> None:
    """So long after it has stopped the guest."""
    record = guest.way.prepare(guest.uuid)
    killers: list[threading.Timer] = []

    def stopped(*_: object) -> None:
        pid = guest.daemon.pid
        assert pid is not None
        killers.append(threading.Timer(delay_ms / 1000, os.kill, (pid, signal.SIGKILL)))
        killers[-1].start()

    with closing(Hypervisor(guest.daemon.uri, timeout_ns=CALL_NS)) as watcher:
        watcher.call(
            "watch", lambda conn: qemuMonitorEventRegister(conn, None, "STOP", stopped, None)
        )
        with pytest.raises(HypervisorError):
            guest.way.park(record)
    killers[0].join()
    wait(lambda: guest.daemon.pid is None)
    assert guest.record.state is ParkedState.LINKED
    guest.daemon.ensure()
    recover(guest.host, guest.record)
    guest.assert_as_if_nothing_had_been()


@pytest.mark.parametrize("operation", ["stopped", "release"])
def test_the_daemon_dies_while_it_ends_the_old_qemu(guest: Parked, operation: str) -> None:
    """The image is complete then."""
    record = guest.way.prepare(guest.uuid)
    fatal = guest.host.hook.path.with_name("fatal")
    fatal.write_text(f'#!/bin/sh\n[ "$2" != {operation} ] || exec kill -KILL $PPID\n')
    fatal.chmod(0o755)
    with pytest.raises(HypervisorError):
        guest.way.park(record)
    fatal.unlink()
    wait(lambda: guest.daemon.pid is None)
    assert guest.record.state is ParkedState.LINKED
    guest.daemon.ensure()
    assert recover(guest.host, guest.record) is Recovered.UNPARKED


def test_a_guest_without_a_definition(guest: Parked) -> None:
    guest.owner().undefine(guest.name)
    record = guest.park()
    assert not record.persistent and not guest.guard.exists()
    assert guest.domains.facts(guest.uuid) is None
    guest.bring_back(record)
    guest.owner().define(record_path(guest.lab.root, guest.name).read_text())


@pytest.mark.parametrize("packer", ["bzip2", "xz"])
def test_a_daemon_that_packs_what_it_saves(guest: Parked, packer: str) -> None:
    if shutil.which(packer) is None:
        pytest.skip(f"no {packer}: libvirt would not pack")
    conf = guest.base / "etc/qemu.conf"
    text = conf.read_text()
    conf.write_text(f'{text}save_image_format = "{packer}"\n')
    guest.daemon.end()
    guest.daemon.ensure()
    try:
        record = guest.park()
        assert image.read_image(Path(record.image)).format > image.GZIP
        guest.bring_back(record)
    finally:
        conf.write_text(text)
        guest.daemon.end()
        guest.daemon.ensure()


def test_a_daemon_that_calls_no_hook_parks_nothing(guest: Parked) -> None:
    guest.host.hook.uninstall()
    guest.daemon.end()
    guest.daemon.ensure()
    with pytest.raises(GuestError, match="does not call our hook") as caught:
        guest.way.prepare(guest.uuid)
    assert "reload" in caught.value.remedy
    guest.assert_as_if_nothing_had_been()


@pytest.mark.parametrize("state", [ParkedState.STRIPPED, ParkedState.RUNNING])
def test_the_daemon_dies_under_a_guest_that_is_paused_under_its_new_qemu(
    guest: Parked, state: ParkedState
) -> None:
    record = guest.way.switch(guest.way.prepare(guest.uuid), None)
    guest.host.records.write(msgspec.structs.replace(record, state=state))
    guest.daemon.end()
    guest.daemon.ensure()
    recover(guest.host, guest.record)
    assert guest.state() is GuestState.RUNNING


@pytest.mark.parametrize("name", ["a-fatal", "z-fatal"])
def test_our_death_while_libvirt_starts_the_new_qemu(guest: Parked, name: str) -> None:
    """Before our hook was asked the guest stays parked, after it libvirt goes on by itself."""
    fatal = guest.host.hook.path.with_name(name)
    knows = guest.host.hook.state / guest.uuid
    fatal.write_text(
        "#!/bin/sh\n[ $2 = start ] || exit 0\n"
        f"pid=$(sed -n 's/^unpark \\([0-9]*\\).*/\\1/p' {knows})\n"
        "kill -KILL $pid\n"
        "while [ -e /proc/$pid ] && ! grep -q ') Z' /proc/$pid/stat; do sleep 0.01; done\n"
        "exit 0\n"
    )
    fatal.chmod(0o755)
    guest.die_at("after domains resume 2")
    fatal.unlink()
    state = guest.way.settle(guest.record).state
    assert state is (GuestState.SHUTOFF if name == "a-fatal" else GuestState.PAUSED)
    assert recover(guest.host, guest.record) is Recovered.UNPARKED


def test_all_guests_at_once(guest: Parked) -> None:
    """Both are parked while their daemon is replaced."""
    uuids = {name: uuid_of(guest, name) for name in guest.lab.names}

    def each(act: Callable[[Any], Any], *given: Any) -> list[Any]:
        with ThreadPoolExecutor() as pool:
            return list(pool.map(act, *given))

    records = each(guest.way.park, each(guest.way.prepare, uuids.values()))
    assert len(guest.host.records.uuids()) == len(uuids)
    guest.daemon.end()
    guest.daemon.ensure()
    records = each(lambda record: guest.way.unpark(record, None), records)
    each(guest.way.finish, each(guest.way.commit, records))


def uuid_of(guest: Parked, name: str) -> str:
    return guest.virsh("domuuid", name).stdout.strip()


def boot(guest: Parked) -> None:
    """Starts the guest anew."""
    guest.lab.console(guest.name).unlink()
    assert guest.virsh("start", guest.name).returncode == 0
    console.wait_ready(guest.lab.console(guest.name), time.monotonic_ns() + 60_000_000_000)


def test_what_was_parked_can_be_given_up(guest: Parked) -> None:
    """Its owner's last resort."""
    record = guest.park()
    discard(guest.host, record)
    assert guest.files() == []
    boot(guest)


def test_a_guest_that_was_booted_behind_our_back_is_left_alone(guest: Parked) -> None:
    record = guest.park()
    guest.host.hook.release(record)
    assert guest.virsh("managedsave-remove", guest.name).returncode == 0
    boot(guest)
    pid = pid_of(guest.uuid)
    for paused in (False, True):
        if paused:
            guest.owner().suspend(guest.name)
        with pytest.raises(GuestError, match="somebody has booted it"):
            recover(guest.host, guest.record)
    guest.owner().resume(guest.name)
    assert pid_of(guest.uuid) == pid
    discard(guest.host, record)


@pytest.mark.parametrize("paused", [[], ["--paused"]])
def test_a_guest_that_is_booted_while_we_unpark_it(
    guest: Parked, monkeypatch: pytest.MonkeyPatch, paused: list[str]
) -> None:
    """Where libvirt calls no hook any more: it is not taken for the one restored."""
    record = guest.park()
    xml = guest.base / "booted.xml"
    xml.write_text(guest.virsh("dumpxml", guest.name).stdout)

    def booted(self: Parking, path: Path) -> None:
        guest.host.hook.path.unlink()
        done = guest.virsh("create", str(xml), *paused)
        assert done.returncode == 0, done.stderr
        raise HypervisorError("the domain is there already")

    monkeypatch.setattr(Parking, "restore", booted)
    with pytest.raises(GuestError, match="somebody has booted it"):
        guest.way.unpark(record, None)
    pid = pid_of(guest.uuid)
    assert pid is not None and not ram_store.is_mapped(record, pid)
    monkeypatch.undo()
    guest.owner().destroy(guest.name)
    guest.bring_back(guest.record)


def test_a_guest_that_ended_after_it_was_let_run(guest: Parked) -> None:
    """Its image is history: it is not loaded again."""
    guest.way.commit(guest.way.switch(guest.way.prepare(guest.uuid), None))
    guest.owner().destroy(guest.name)
    with pytest.raises(GuestError, match="ended since"):
        recover(guest.host, guest.record)
    discard(guest.host, guest.record)
    boot(guest)


def test_a_guest_that_its_owner_ends_before_it_is_parked(guest: Parked) -> None:
    record = guest.way.prepare(guest.uuid)
    guest.owner().destroy(guest.name)
    with pytest.raises(GuestError, match="shutoff"):
        guest.way.park(record)
    assert guest.files() == []
    boot(guest)


def test_a_guest_that_its_owner_pauses_before_it_is_parked(guest: Parked) -> None:
    record = guest.way.prepare(guest.uuid)
    guest.owner().suspend(guest.name)
    guest.way.park(record)
    recover(guest.host, guest.record)
    assert guest.state() is GuestState.PAUSED
    guest.owner().resume(guest.name)
