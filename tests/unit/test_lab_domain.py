"""The domain XML: what libvirt must find in it, and that nothing breaks out of its place."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from hostupdate.lab.accelerator import Acceleration
from hostupdate.lab.domain import Witness, domain_xml
from hostupdate.lab.image import GuestImage

IMAGE = GuestImage(
    kernel=Path("/c/vmlinuz"), initramfs=Path("/c/initramfs"), kernel_version="6.1", digest="d"
)
TCG = Acceleration(kind="tcg", reason="no /dev/kvm", emulator=Path("/usr/bin/qemu"))
KVM = Acceleration(kind="kvm", reason="a guest booted", emulator=Path("/usr/bin/qemu"))
NAMESPACE = "urn:hostupdate:guest:1"


def parsed(**changes: Any) -> ET.Element:
    arguments: dict[str, Any] = {
        "name": "hu-lab-3",
        "uuid": UUID(int=7),
        "memory_bytes": 192 << 20,
        "image": IMAGE,
        "acceleration": TCG,
        "console": Path("/r/console/hu-lab-3.log"),
    }
    return ET.fromstring(domain_xml(**(arguments | changes)))


def attribute(domain: ET.Element, path: str, name: str) -> str | None:
    element = domain.find(path)
    assert element is not None, path
    return element.get(name)


def test_what_a_guest_needs_to_live() -> None:
    domain = parsed()
    assert domain.get("type") == "qemu"
    assert domain.findtext("name") == "hu-lab-3"
    assert domain.findtext("uuid") == str(UUID(int=7))
    assert (domain.findtext("memory"), attribute(domain, "memory", "unit")) == ("196608", "KiB")
    assert domain.findtext("os/kernel") == "/c/vmlinuz"
    assert domain.findtext("os/initrd") == "/c/initramfs"
    assert domain.find("features/acpi") is not None and domain.find("features/apic") is not None
    assert attribute(domain, "memoryBacking/source", "type") == "memfd"
    assert attribute(domain, "memoryBacking/access", "mode") == "shared"
    assert attribute(domain, "clock", "offset") == "utc"
    assert domain.findtext("devices/emulator") == "/usr/bin/qemu"
    assert attribute(domain, "devices/serial/source", "path") == "/r/console/hu-lab-3.log"
    assert attribute(domain, "devices/serial/source", "append") == "on"
    assert attribute(domain, "devices/channel/target", "name") == "org.qemu.guest_agent.0"
    assert attribute(domain, "devices/memballoon", "model") == "none"
    assert {domain.findtext(f"on_{e}") for e in ("poweroff", "reboot", "crash")} == {"destroy"}


def test_nothing_that_a_scratch_guest_does_not_need() -> None:
    domain = parsed()
    for device in ("disk", "interface", "video", "graphics", "sound", "input"):
        assert domain.find(f"devices/{device}") is None
    assert attribute(domain, "devices/controller[@type='usb']", "model") == "none"
    assert domain.find("cpu") is None


def test_kvm_gets_the_host_cpu() -> None:
    domain = parsed(acceleration=KVM)
    assert domain.get("type") == "kvm"
    assert attribute(domain, "cpu", "mode") == "host-passthrough"


def test_the_witness_is_told_by_the_command_line() -> None:
    words = (parsed().findtext("os/cmdline") or "").split()
    assert {"console=ttyS0", "hu.fill=50%", "hu.rate=200", "hu.load=0", "panic=-1"} <= set(words)
    witness = Witness(fill="64M", rate_ms=50, load=True)
    words = (parsed(witness=witness).findtext("os/cmdline") or "").split()
    assert {"hu.fill=64M", "hu.rate=50", "hu.load=1"} <= set(words)


def test_metadata_only_if_asked() -> None:
    assert parsed().find("metadata") is None
    domain = parsed(metadata={"update-domain": "2", "availability-set": "a<b"})
    guest = domain.find(f"metadata/{{{NAMESPACE}}}guest")
    assert guest is not None
    values = {child.tag: child.text for child in guest}
    assert values == {
        f"{{{NAMESPACE}}}update-domain": "2",
        f"{{{NAMESPACE}}}availability-set": "a<b",
    }


@pytest.mark.parametrize("nasty", ["/r/a'b\"c", "/r/<x>&amp;", "/r/ä"])
def test_paths_are_escaped(nasty: str) -> None:
    assert attribute(parsed(console=Path(nasty)), "devices/serial/source", "path") == nasty
