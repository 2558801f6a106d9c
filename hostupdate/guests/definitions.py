"""Guests as they will be at their next start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import libvirt

from hostupdate.errors import InputError, RefusedError
from hostupdate.guests.hypervisor import Hypervisor


@dataclass(frozen=True, slots=True, kw_only=True)
class Definition:
    """``secret`` is ``xml`` with what libvirt shows on demand only, such as passwords: what is
    defined again must have it, what is printed must not."""

    name: str
    uuid: str
    xml: str
    secret: str
    active: bool
    memory_bytes: int


def read(hypervisor: Hypervisor, name: str) -> Definition:
    """The definition of the guest with this name or uuid.

    Raises InputError where there is none, RefusedError where it runs without a definition,
    HypervisorError, DeadlineError.
    """

    def ask(connection: Any) -> Definition | None:
        for look_up in (connection.lookupByName, connection.lookupByUUIDString):
            try:
                domain = look_up(name)
                break
            except libvirt.libvirtError as error:
                code = error.get_error_code()
                if code not in (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_INVALID_ARG):
                    raise
        else:
            return None
        if not domain.isPersistent():
            raise RefusedError(
                [f"guest {domain.name()} has no definition: it ends with its QEMU"],
                remedy="define it (virsh define), or change what creates it",
            )
        inactive = libvirt.VIR_DOMAIN_XML_INACTIVE
        return Definition(
            name=domain.name(),
            uuid=domain.UUIDString(),
            xml=domain.XMLDesc(inactive),
            secret=domain.XMLDesc(inactive | libvirt.VIR_DOMAIN_XML_SECURE),
            active=bool(domain.isActive()),
            memory_bytes=domain.info()[1] * 1024,
        )

    found = hypervisor.call(f"look up guest {name}", ask)
    if found is None:
        raise InputError(
            "command line", "NAME", f"there is no guest {name!r} at {hypervisor.uri}",
            remedy="`hostupdate guests` shows them",
        )  # fmt: skip
    return found


def define(hypervisor: Hypervisor, xml: str) -> None:
    """Replaces the definition of the guest that ``xml`` names; one that runs is as it was until
    its next start. HypervisorError, DeadlineError."""
    hypervisor.call("define a guest", lambda connection: connection.defineXML(xml))
