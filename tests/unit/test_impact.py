"""What packages do to guests is judged by files, not by names."""

from __future__ import annotations

import re

import msgspec
import pytest

from hostupdate.impact import UNJUDGED, PackageChange, QemuUse, judge_packages, units_of
from hostupdate.model import Impact

QEMU = "/usr/bin/qemu-system-x86_64"
MODULES = "/usr/lib/x86_64-linux-gnu/qemu"
USES = (
    QemuUse(
        guest="web",
        files=frozenset({QEMU, "/usr/lib/x86_64-linux-gnu/libaio.so.1.0.1", "/var/lib/disk.img"}),
        directories=(MODULES, "/usr/share/qemu"),
    ),
    QemuUse(guest="db", files=frozenset({QEMU})),
)


def change(*files: str, **more: str) -> PackageChange:
    values = {"name": "p", "old": "1", "new": "2", "architecture": "amd64", **more}
    return PackageChange(files=files, **values)


@pytest.mark.parametrize(
    ("what", "impact", "reason", "evidence"),
    [
        # what QEMUs use
        (change(QEMU), Impact.HANDOVER, "QEMUs use it", f"{QEMU}, in use by web, db"),
        (
            change("/usr/lib/x86_64-linux-gnu/libaio.so.1.0.1", "/usr/share/doc/x"),
            Impact.HANDOVER,
            "QEMUs use it",
            "libaio.so.1.0.1, in use by web",
        ),
        (change(f"{MODULES}/block-rbd.so"), Impact.HANDOVER, "", "loaded at need by web"),
        (change("/usr/share/qemu/bios.bin"), Impact.HANDOVER, "", "loaded at need by web"),
        (change(f"{MODULES}-other/x.so"), Impact.NONE, "no guest's QEMU uses it", ""),
        (change(QEMU, name="oddly-named"), Impact.HANDOVER, "", QEMU),
        # what nobody depends on
        (change("/usr/bin/less"), Impact.NONE, "holds no service", ""),
        (change(), Impact.NONE, "holds no service", ""),
        (change(old=""), Impact.NONE, "it is new", ""),
        (change("/usr/bin/qemu-img", name="qemu-utils"), Impact.NONE, "no guest's QEMU", ""),
        # libvirt, by its units
        (
            change("/usr/lib/systemd/system/libvirtd.service", "/usr/sbin/libvirtd"),
            Impact.NONE,
            "libvirt is started anew",
            "libvirtd.service",
        ),
        (change("/usr/lib/systemd/system/virtqemud-admin.socket"), Impact.NONE, "anew", "virtq"),
        (change("/usr/lib/systemd/system/virtlogd.service"), Impact.NONE, "anew", "virtlogd"),
        # services that are not judged: refused
        (change("/usr/lib/systemd/system/ovs-vswitchd.service"), None, "by steps", "ovs-vswitchd"),
        (change("/etc/init.d/openvswitch-switch"), None, "holds services", "openvswitch-switch"),
        (change("/usr/lib/systemd/system/apt-daily.timer"), None, "holds services", "apt-daily"),
        (
            change("/usr/lib/systemd/system/libvirtd.service", "/etc/init.d/other"),
            None,
            "holds services",
            "other",
        ),
        (
            change(QEMU, "/usr/lib/systemd/system/qemu-vmsr-helper.service"),
            Impact.HANDOVER,
            "QEMUs use it",
            QEMU,
        ),
        (change("/usr/lib/systemd/system/virtual-thing.service"), None, "holds services", ""),
        (change(QEMU, "/usr/lib/systemd/system/x.service"), None, "holds services", "x.service"),
        # the kernel and what boots
        (change("/boot/vmlinuz-6.1.0-1-amd64"), Impact.KEXEC, "part of the kernel", "vmlinuz"),
        (change("/usr/lib/modules/6.1/kvm.ko"), Impact.KEXEC, "part of the kernel", "kvm.ko"),
        (change(old="", section="kernel"), Impact.KEXEC, "part of the kernel", ""),
        (change("/usr/bin/perf", section="kernel"), Impact.NONE, "", ""),
        (change(old="", section="contrib/kernel"), Impact.KEXEC, "part of the kernel", ""),
        (change(section="admin"), Impact.NONE, "", ""),
        (change("/usr/lib/modules-load.d/x.conf"), Impact.NONE, "", ""),
        (change("/usr/lib/firmware/intel-ucode/06-01"), Impact.REBOOT, "at boot", "intel-ucode"),
        # gone
        (change(QEMU, new=""), None, "would be removed", ""),
    ],
)
def test_a_package_is_judged_by_what_it_holds(
    what: PackageChange, impact: Impact | None, reason: str, evidence: str
) -> None:
    (verdict,) = judge_packages([what], USES)
    assert (verdict.impact, verdict.name, verdict.old, verdict.new) == (
        impact, what.name, what.old, what.new,
    )  # fmt: skip
    assert reason in verdict.reason
    assert not evidence or evidence in verdict.evidence[0]


def test_without_guests_a_qemu_is_a_package_like_any_other() -> None:
    (verdict,) = judge_packages([change(QEMU)], [])
    assert verdict.impact is Impact.NONE


def test_evidence_is_short_and_counts_the_rest() -> None:
    files = [f"{MODULES}/{number}.so" for number in range(9)]
    (verdict,) = judge_packages([change(*files, QEMU)], USES)
    assert len(verdict.evidence) == 4 and verdict.evidence[0].startswith(QEMU)
    assert verdict.evidence[-1] == "and 7 more"


def test_a_verdict_reads_from_and_to() -> None:
    (verdict,) = judge_packages([change("/usr/bin/less", name="less")], USES)
    assert msgspec.to_builtins(verdict) == {
        "name": "less",
        "from": "1",
        "to": "2",
        "impact": "none",
        "reason": "no guest's QEMU uses it, and it holds no service",
        "evidence": (),
    }


@pytest.mark.parametrize(
    ("name", "unjudged"),
    [
        ("./usr/lib/systemd/system/x.service", True),
        ("./lib/systemd/system/x.socket", True),
        ("./usr/lib/systemd/system/x.service.d/", False),
        ("./etc/init.d/x", True),
        ("./etc/init.d/", False),
        ("./lib/modules/6.1/x.ko", True),
        ("./usr/lib/modules/6.1/x.ko", True),
        ("./boot/vmlinuz-1", True),
        ("./lib/firmware/amd-ucode/x", True),
        ("./usr/bin/x", False),
        ("./usr/share/doc/etc/init.d/x", False),
    ],
)
def test_what_an_archive_must_not_hold(name: str, unjudged: bool) -> None:
    """The expression means the same to Python as to grep -E."""
    assert bool(re.search(UNJUDGED, name)) is unjudged
    if unjudged and "systemd/system" in name:
        assert units_of(change(name[1:]))
