"""What libvirt knows of a QEMU binary."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from hostupdate.errors import HypervisorError
from hostupdate.guests.hypervisor import Hypervisor


def warm(hypervisor: Hypervisor, emulator: Path, timeout_ns: int, *, kvm: bool) -> None:
    """Lets libvirt probe ``emulator`` now, so that no guest's start waits for it (0.5 to 4 s).

    libvirt keeps what it finds until the binary, its modules, itself or the kernel change
    (virQEMUCapsIsValid). Raises HypervisorError where it cannot use that QEMU, DeadlineError.
    """
    kind = "kvm" if kvm else "qemu"
    text = hypervisor.call(
        f"probe {emulator}",
        lambda connection: connection.getDomainCapabilities(str(emulator), None, None, kind, 0),
        timeout_ns,
    )
    found = ElementTree.fromstring(text).findtext("path")
    if found != str(emulator):
        raise HypervisorError(f"libvirt probed {found} for {emulator}")
