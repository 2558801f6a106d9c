"""What is seen of real guests whose QEMU, storage, agent, link or job is in the way of a run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import libvirt_qemu
import msgspec
import pytest

from hostupdate.cli.compose import vital_signs
from hostupdate.guests import Hypervisor
from hostupdate.guests.vitals import VitalSigns
from hostupdate.host.processes import find_qemus
from hostupdate.host.storage import Storage
from hostupdate.vitals import Vitals, blockers, changes, warnings
from tests import silent_fs
from tests.functional.cli import Lab
from tests.functional.conftest import make_cache
from tests.functional.daemon import DaemonLab
from tests.functional.owner import act
from tests.requirements import need

MAC = "52:54:00:77:00:02"
_SECOND_NS = 1_000_000_000
_DISK_BYTES = 8 << 20

_CARD = f"""\
<interface type='user'><mac address='{MAC}'/><model type='e1000'/><link state='{{}}'/></interface>
"""
_DISK = """\
<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{path}'/>
<target dev='{target}' bus='virtio'/></disk>
"""
_BACKUP = """\
<domainbackup mode='pull'><server transport='unix' socket='{base}/nbd'/><disks>
<disk name='{target}' type='file' backupmode='full'><scratch file='{base}/scratch'/></disk>
</disks></domainbackup>
"""


class Watched:
    """Two guests under a libvirtd of the test's own."""

    def __init__(self, made: DaemonLab, base: Path) -> None:
        self.made = made
        self.base = base
        self.hypervisor = Hypervisor(made.daemon.uri, timeout_ns=20 * _SECOND_NS)
        uuids = {guest.name: guest.uuid for guest in self.hypervisor.guests()}
        self.uuids = [uuids[name] for name in made.lab.names]
        qemus = find_qemus(self.uuids)
        self.pids = [qemus[uuid].pid for uuid in self.uuids]

    def look(
        self, timeout_ns: int = 10 * _SECOND_NS, signs: VitalSigns | None = None
    ) -> list[Vitals]:
        guests = list(zip(self.uuids, self.pids, strict=True))
        found = (signs or vital_signs(self.hypervisor)).look(guests, timeout_ns)
        assert list(found) == self.uuids
        return list(found.values())

    def domain(self, act: Callable[[Any], Any], number: int = 0) -> Any:
        uuid = self.uuids[number]
        return self.hypervisor.call("act", lambda c: act(c.lookupByUUIDString(uuid)))

    def plug(self, target: str, path: Path) -> None:
        xml = _DISK.format(path=path, target=target)
        self.domain(lambda domain: domain.attachDevice(xml))


@pytest.fixture(scope="module")
def watched() -> Iterator[Watched]:
    need("root", "qemu", "libvirt", "lab")
    base = Path(tempfile.mkdtemp(prefix="hu-v-", dir="/var/tmp"))
    (base / "state").mkdir()
    made = DaemonLab(base, make_cache(base / "state"), guests=2)
    watched = Watched(made, base)
    yield watched
    watched.hypervisor.close()
    made.remove()
    shutil.rmtree(base)


@pytest.fixture(autouse=True)
def healthy(watched: Watched) -> Iterator[None]:
    yield
    watched.made.lab.assert_healthy()


def is_well(vitals: Vitals) -> bool:
    return vitals.agent is vitals.ticking is True and not blockers(vitals) + warnings(vitals)


def test_well_guests(watched: Watched) -> None:
    first, second = watched.look(), watched.look()
    for before, after in zip(first, second, strict=True):
        assert is_well(before) and is_well(after)
        assert changes(before, after) == []


def test_a_look_leaves_no_taint_and_no_job(watched: Watched) -> None:
    watched.look()
    assert "custom-monitor" not in (watched.base / "log/qemu/hu-lab-1.log").read_text()
    assert watched.domain(lambda domain: domain.controlInfo())[0] == 0


def test_a_stopped_qemu_is_not_asked(watched: Watched) -> None:
    before = watched.look()
    os.kill(watched.pids[0], signal.SIGSTOP)
    try:
        stopped, other = watched.look()
        assert watched.domain(lambda domain: domain.controlInfo())[0] == 0, "a job is left"
    finally:
        os.kill(watched.pids[0], signal.SIGCONT)
    assert f"kill -CONT {watched.pids[0]}" in stopped.stuck
    assert blockers(stopped) and changes(before[0], stopped)
    assert is_well(other)
    assert all(map(is_well, watched.look()))


def test_a_deaf_monitor_and_the_lock_that_a_call_to_it_holds(watched: Watched) -> None:
    """As with a QEMU that hangs in user space, where nothing can be told by its threads."""
    signs = VitalSigns(watched.hypervisor, storage=Storage().probe, threads=lambda *_: "")
    os.kill(watched.pids[0], signal.SIGSTOP)
    try:
        deaf, other = watched.look(3 * _SECOND_NS, signs)
        held, _ = watched.look(3 * _SECOND_NS, signs)
    finally:
        os.kill(watched.pids[0], signal.SIGCONT)
    assert "QEMU's monitor: no answer within" in deaf.monitor
    assert "another libvirt call has held its job lock for" in held.monitor
    assert blockers(deaf) and blockers(held)
    assert is_well(other)
    assert all(map(is_well, watched.look()))


def test_a_link_that_went_down(watched: Watched) -> None:
    without = watched.look()[0]
    watched.domain(lambda domain: domain.attachDevice(_CARD.format("up")))
    up = watched.look()[0]
    watched.domain(lambda domain: domain.updateDeviceFlags(_CARD.format("down")))
    down = watched.look()[0]
    assert (without.links, up.links, down.links) == ({}, {MAC: "up"}, {MAC: "down"})
    assert blockers(down) == []
    assert [change.text for change in changes(up, down)] == [
        f"its network link {MAC} was up and is down"
    ]
    assert changes(down, up) == []


def test_an_agent_that_hangs(watched: Watched) -> None:
    script = "kill -STOP $PPID; sleep 12; kill -CONT $PPID"
    act = {"execute": "guest-exec", "arguments": {"path": "/bin/sh", "arg": ["-c", script]}}
    before = watched.look()[0]
    command = msgspec.json.encode(act).decode()
    watched.domain(lambda domain: libvirt_qemu.qemuAgentCommand(domain, command, 5, 0))
    silent = before
    while silent.agent:  # its shell has not come to it yet
        silent = watched.look(2 * _SECOND_NS)[0]
    assert (silent.agent, silent.ticking) == (False, None)
    assert blockers(silent) == []
    assert len(warnings(silent)) == 1
    assert [change.text for change in changes(before, silent)] == [
        "its agent does not answer any more"
    ]
    while not is_well(watched.look()[0]):  # pytest-timeout ends it
        pass


def test_a_backup_holds_a_guest(watched: Watched) -> None:
    disk = watched.base / "disk"
    disk.write_bytes(bytes(_DISK_BYTES))
    watched.plug("vdb", disk)
    assert watched.look()[0].disks["vdb"] == ""
    xml = _BACKUP.format(base=watched.base, target="vdb")
    watched.domain(lambda domain: domain.backupBegin(xml, None))
    busy = watched.look()[0]
    watched.domain(lambda domain: domain.abortJob())
    assert (busy.job, busy.monitor) == ("backup", "")
    assert "virsh domjobabort" in blockers(busy)[0]
    assert watched.look()[0].job == ""


def test_a_removed_image_that_qemu_has_open_answers(watched: Watched) -> None:
    disk = watched.base / "removed"
    disk.write_bytes(bytes(_DISK_BYTES))
    watched.plug("vdc", disk)
    disk.unlink()
    assert watched.look()[0].disks["vdc"] == ""


def test_storage_that_does_not_answer(watched: Watched) -> None:
    """The file system is mounted where only libvirtd and QEMU see it."""
    if not os.path.exists("/dev/fuse"):
        pytest.skip("no /dev/fuse")
    directory = watched.base / "silent"
    directory.mkdir()
    pid = watched.made.daemon.pid
    argv = ["nsenter", "--mount", f"--target={pid}", sys.executable, "-I", silent_fs.__file__]
    with subprocess.Popen(
        [*argv, str(directory), str(_DISK_BYTES)], stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None and server.stdout.readline() == "mounted\n"
        try:
            watched.plug("vdd", directory / "disk")
            before = watched.look()
            os.kill(server.pid, signal.SIGSTOP)
            silent, other = watched.look(2 * _SECOND_NS)
            os.kill(server.pid, signal.SIGCONT)
            after = watched.look()
        finally:
            server.kill()
    gone = watched.look()[0]
    assert before[0].disks["vdd"] == after[0].disks["vdd"] == ""
    assert silent.disks["vdd"] == f"{directory}/disk: no answer within 2 s"
    assert silent.monitor == "", "QEMU itself was asked nothing of it"
    assert changes(before[0], silent) and blockers(silent)
    assert is_well(other)
    assert "not connected" in gone.disks["vdd"]


def test_the_embedded_driver(lab: Lab) -> None:
    vitals = msgspec.json.decode(act(lab.run.state, "look", lab.names[0]), type=Vitals)
    assert is_well(vitals)
