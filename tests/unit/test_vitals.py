"""What is judged of a guest's vital signs, and what of its XML they are taken from."""

from __future__ import annotations

import msgspec
import pytest

from hostupdate.guests.vitals import disk_paths
from hostupdate.vitals import Change, Vitals, blockers, changes, warnings

MAC = "52:54:00:00:00:01"
WELL = Vitals(agent=True, ticking=True, disks={"vda": "", "vdb": ""}, links={MAC: "up"})


def but(**fields: object) -> Vitals:
    return msgspec.structs.replace(WELL, **fields)


def test_a_well_guest() -> None:
    assert blockers(WELL) == warnings(WELL) == changes(WELL, WELL) == []


@pytest.mark.parametrize(
    ("vitals", "words"),
    [
        (but(stuck="worker (7, in nfs_wait)"), "its QEMU cannot be paused cleanly: worker (7"),
        (but(monitor="no answer"), "`virsh domcontrol`: no answer"),
        (but(job="backup"), "libvirt's job 'backup' is under way"),
        (but(disks={"vda": "", "vdb": "/b: no answer"}), "its disk vdb is not well"),
    ],
)
def test_what_a_run_is_refused_for(vitals: Vitals, words: str) -> None:
    (reason,) = blockers(vitals)
    assert words in reason


def test_every_reason_is_given() -> None:
    bad = {"vda": "/a: no answer", "vdb": "/b: Input/output error"}
    assert len(blockers(Vitals(stuck="x", monitor="x", job="x", disks=bad))) == 5


@pytest.mark.parametrize(
    ("vitals", "said"),
    [
        (but(agent=False, ticking=None), 1),
        (but(ticking=False), 1),
        (but(agent=None, ticking=None), 0),
        (but(ticking=None), 0),
        (but(links={MAC: "down"}), 0),
    ],
)
def test_what_is_no_reason_to_refuse(vitals: Vitals, said: int) -> None:
    assert blockers(vitals) == []
    assert len(warnings(vitals)) == said


@pytest.mark.parametrize(
    ("after", "change"),
    [
        (but(stuck="worker"), "its QEMU is stuck: worker"),
        (but(monitor="gone"), "its QEMU does not answer any more: gone"),
        (but(agent=False, ticking=None), "its agent does not answer any more"),
        (but(ticking=False), "its clock stands still"),
        (but(disks={"vda": "", "vdb": "/b: EIO"}), "its disk vdb: /b: EIO"),
        (but(disks={"vda": ""}), "its disk vdb: it is gone"),
        (but(links={MAC: "down"}), f"its network link {MAC} was up and is down"),
        (but(links={}), f"its network link {MAC} was up and is gone"),
    ],
)
def test_what_got_worse(after: Vitals, change: str) -> None:
    assert changes(WELL, after) == [Change(change, "agent" not in change and "clock" not in change)]
    assert changes(after, after) == [], "it was so before"
    assert changes(after, WELL) == [], "it got better"


def test_of_a_guest_that_cannot_be_asked_nothing_is_made_up() -> None:
    assert changes(WELL, Vitals(monitor="gone")) == [
        Change("its QEMU does not answer any more: gone", grave=True)
    ]


def test_a_job_that_has_begun_and_an_agent_that_is_not_asked_are_no_damage() -> None:
    assert changes(WELL, but(job="backup", agent=None, ticking=None)) == []


def test_the_paths_that_disks_lie_on() -> None:
    xml = """<domain><devices>
      <disk type='file' device='disk'><source file='/top'/><backingStore type='block'>
        <source dev='/dev/base'/><backingStore/></backingStore><target dev='vda'/></disk>
      <disk type='network' device='disk'><source protocol='rbd' name='pool/x'/>
        <target dev='vdb'/></disk>
      <disk type='block' device='cdrom'><source dev='/dev/sr0'/><target dev='sda'/></disk>
      <disk type='file' device='cdrom'><source file='/x.iso'/><target dev='sdb'/></disk>
      <disk type='file' device='cdrom'><target dev='sdc'/></disk>
      <disk type='file' device='disk'><source file='/old'/><mirror type='file'>
        <source file='/copy'/></mirror><target dev='vdc'/></disk>
      <disk type='block' device='lun'><source dev='/dev/lun'/><target dev='sdd'/></disk>
    </devices></domain>"""
    assert dict(disk_paths(xml)) == {
        "vda": ["/top", "/dev/base"],
        "vdb": [],
        "sda": [],
        "sdb": ["/x.iso"],
        "sdc": [],
        "vdc": ["/old", "/copy"],
        "sdd": ["/dev/lun"],
    }
