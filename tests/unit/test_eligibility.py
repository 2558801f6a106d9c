"""Which guests can be handed over, and why the others cannot."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from hostupdate.eligibility import HandoverFacts, RamBackend, drivers_under, judge
from hostupdate.errors import InputError

RAM = RamBackend(
    id="pc.ram",
    kind="file",
    size_bytes=1 << 30,
    shared=True,
    path="/dev/shm/hu/libvirt/qemu/1-g1/pc.ram",
    named=True,
    file_system="tmpfs",
    noswap=True,
)
MACHINE = "<os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type></os>"


def facts(xml: str = "", *, machine: str = MACHINE, **changes: Any) -> HandoverFacts:
    good = HandoverFacts(
        domain_xml=f"<domain type='kvm' id='1'><name>g1</name>{machine}{xml}</domain>",
        backends=(RAM,),
        embedded=False,
        swap_bytes=0,
        security_drivers=frozenset({"apparmor"}),
    )
    return msgspec.structs.replace(good, **changes)


def ram(**changes: Any) -> HandoverFacts:
    return facts(backends=(msgspec.structs.replace(RAM, **changes),))


def devices(xml: str) -> HandoverFacts:
    return facts(f"<devices>{xml}</devices>")


def only_reason(given: HandoverFacts) -> str:
    found = judge(given)
    assert len(found.blockers) == 1, found
    assert found.blockers[0].remedy
    return found.blockers[0].reason


def test_a_plain_guest_on_a_named_shared_file_is_eligible() -> None:
    given = devices(
        "<disk type='file' device='disk'><target dev='vda' bus='virtio'/></disk>"
        "<interface type='bridge'/><interface type='user'/><shmem name='s' role='master'/>"
        "<filesystem type='mount'><driver type='path'/></filesystem>"
    )
    assert judge(given) == judge(facts()) and judge(given).blockers == judge(given).warnings == ()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kind": "memfd", "path": "", "named": False}, "memfd"),
        ({"kind": "ram", "shared": False, "path": ""}, "private to its QEMU"),
        ({"shared": False}, "private copy"),
        ({"named": False, "file_system": "hugetlbfs"}, "lost its name"),
        ({"file_system": "ext4"}, "lies on ext4"),
        ({"discard": True}, "discarded"),
    ],
)
def test_ram_that_a_restart_can_mend(changes: dict[str, Any], reason: str) -> None:
    assert reason in only_reason(ram(**changes))
    blocker = judge(ram(**changes)).blockers[0]
    assert blocker.by_restart and blocker.remedy.endswith("then restart it")


def test_ram_of_an_unknown_kind_is_refused() -> None:
    given = ram(kind="epc")
    assert "epc" in only_reason(given) and not judge(given).blockers[0].by_restart


@pytest.mark.parametrize("file_system", ["tmpfs", "hugetlbfs"])
def test_ram_file_systems(file_system: str) -> None:
    assert not judge(ram(file_system=file_system)).blockers
    assert not judge(ram(file_system="ext4", dax=True)).blockers


def test_a_qemu_without_a_backend_has_private_ram() -> None:
    assert "private" in only_reason(facts(backends=()))


def test_every_backend_is_judged() -> None:
    second = msgspec.structs.replace(RAM, id="ram-node1", kind="memfd")
    assert "ram-node1" in only_reason(facts(backends=(RAM, second)))


PCI = "<hostdev mode='subsystem' type='pci'>{}</hostdev>"


@pytest.mark.parametrize(
    ("xml", "reason"),
    [
        (PCI.format(""), "host device (pci)"),
        (PCI.format("<teaming type='transient'/>"), "host device (pci)"),
        ("<hostdev mode='subsystem' type='mdev'/>", "host device (mdev)"),
        ("<hostdev mode='subsystem' type='scsi'/>", "host device (scsi)"),
        ("<hostdev mode='capabilities' type='misc'/>", "host device (misc)"),
        ("<hostdev mode='capabilities'/>", "host device (capabilities)"),
        ("<interface type='hostdev'/>", "interface of type hostdev"),
        ("<interface type='vdpa'/>", "interface of type vdpa"),
        ("<interface type='vhostuser'/>", "interface of type vhostuser"),
        ("<disk type='vhostuser'/>", "disk of type vhostuser"),
        ("<disk type='file'><target dev='vdb'/><transient/></disk>", "transient disk vdb"),
        ("<disk type='file'><target dev='vdb'/><mirror job='copy'/></disk>", "disk vdb with"),
        ("<filesystem><driver type='virtiofs'/></filesystem>", "virtiofs"),
        ("<shmem name='s' role='peer'/>", "shared memory s"),
        ("<shmem name='s'/>", "shared memory s"),
        ("<memory model='virtio-mem'><target/></memory>", "virtio-mem device"),
        ("<memory model='dimm'><target/></memory>", "dimm device"),
        ("<tpm model='tpm-crb'><backend type='emulator'/></tpm>", "TPM"),
    ],
)
def test_devices_that_cannot_be_kept(xml: str, reason: str) -> None:
    assert reason in only_reason(devices(xml))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (facts(embedded=True), "embedded driver"),
        (facts(qemu_blockers=("VFIO is not migratable",)), "QEMU: VFIO is not migratable"),
        (facts(block_jobs=("commit-1",)), "block job commit-1"),
        (facts("<launchSecurity type='sev'/>"), "sev"),
        (facts("<launchSecurity type='tdx'/>"), "tdx"),
        (facts("<cpu><feature policy='require' name='invtsc'/></cpu>"), "invtsc"),
        (facts("<seclabel type='dynamic' model='selinux' relabel='yes'/>"), "selinux"),
        (facts(machine="<os><type machine='q35'>hvm</type></os>"), "machine type q35"),
        (facts(machine="<os><type machine='pc'>hvm</type></os>"), "machine type pc"),
        (facts(command_line=("q", "-netdev", '{"type":"socket","id":"n"}')), "slirp-helper"),
        (facts(command_line=("q", "-netdev", "socket,fd=4,id=n")), "slirp-helper"),
    ],
)
def test_what_else_keeps_a_guest_from_a_handover(given: HandoverFacts, reason: str) -> None:
    assert reason in only_reason(given)


@pytest.mark.parametrize(
    "given",
    [
        facts("<cpu><feature policy='disable' name='invtsc'/></cpu>"),
        facts(
            "<cpu><feature policy='require' name='invtsc'/></cpu>"
            "<clock><timer name='tsc' frequency='2400000000'/></clock>"
        ),
        facts("<seclabel type='dynamic' model='apparmor'/><seclabel model='dac'/>"),
        facts(machine="<os><type machine='pc-i440fx-rhel7.6.0'>hvm</type></os>"),
        facts(command_line=("q", "-netdev", '{"type":"user","id":"n"}', "-netdev", "tap,id=m")),
    ],
)
def test_what_looks_like_a_blocker_and_is_none(given: HandoverFacts) -> None:
    assert judge(given).blockers == ()


@pytest.mark.parametrize(
    ("given", "warning"),
    [
        (devices("<graphics type='vnc'/>"), "vnc"),
        (devices("<hostdev mode='subsystem' type='usb'/>"), "USB"),
        (facts("<genid>x</genid>"), "generation id"),
        (
            facts("<seclabel model='selinux'/>", security_drivers=frozenset({"selinux"})),
            "relabelled",
        ),
        (
            facts(swap_bytes=1, backends=(msgspec.structs.replace(RAM, noswap=False),)),
            "swapped out",
        ),
    ],
)
def test_what_users_will_see_is_told(given: HandoverFacts, warning: str) -> None:
    found = judge(given)
    assert found.blockers == () and len(found.warnings) == 1
    assert warning in found.warnings[0].reason and found.warnings[0].remedy


@pytest.mark.parametrize(
    "given",
    [
        facts(swap_bytes=1),
        facts(backends=(msgspec.structs.replace(RAM, noswap=False),)),
        facts(swap_bytes=1, backends=(msgspec.structs.replace(RAM, file_system="hugetlbfs"),)),
    ],
)
def test_ram_that_cannot_be_swapped_is_no_warning(given: HandoverFacts) -> None:
    assert judge(given).warnings == ()


def test_all_reasons_are_told_at_once() -> None:
    given = devices("<interface type='vdpa'/><interface type='vdpa'/><tpm/>")
    given = msgspec.structs.replace(given, embedded=True, backends=())
    assert len(judge(given).blockers) == 4


def test_what_is_no_xml_is_refused() -> None:
    with pytest.raises(InputError, match="domain XML"):
        judge(facts(machine="<os>"))


@pytest.mark.parametrize(
    ("command_line", "left"),
    [
        ("quiet ro", {"apparmor", "selinux"}),
        ("apparmor=0", {"selinux"}),
        ("apparmor=1 selinux=0", {"apparmor"}),
        ("lsm=lockdown,yama,apparmor security=selinux", {"apparmor"}),
        ("security=selinux", {"selinux"}),
        ("lsm=yama", set()),
        ("lsm=apparmor apparmor=0", set()),
    ],
)
def test_security_drivers_of_the_next_kernel(command_line: str, left: set[str]) -> None:
    now = frozenset({"apparmor", "selinux"})
    assert drivers_under(command_line, now) == left
    assert drivers_under(command_line, frozenset()) == frozenset()
