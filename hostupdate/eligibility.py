"""Can a guest be handed over with its RAM left in place, and if not, what would make it so.

Judged from the live domain XML, from what QEMU says of its RAM and of its own blockers, and from
facts about the host. Two sources stand behind the rules: libvirt's checks before it saves a guest
(qemuMigrationSrcIsAllowed), and what keeps RAM a file with a name: QEMU leaves out of the stream
only shared RAM that a memory-backend-file holds (migrate_ram_is_ignored), and takes it up again
by that name.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import msgspec

from hostupdate.errors import InputError

#: Names that mean another machine in each QEMU; microvm makes no promise from one to the next.
_UNVERSIONED = {"pc", "q35", "virt", "pseries", "s390-ccw-virtio", "microvm"}
#: Their files are RAM.
RAM_FILE_SYSTEMS = {"tmpfs", "hugetlbfs"}
_SECURITY_DRIVERS = {"apparmor", "selinux"}

_NAMED_FILE = "give it RAM in a shared file: <source type='file'/> and <access mode='shared'/>"


class RamBackend(msgspec.Struct, frozen=True, kw_only=True):
    """One of QEMU's memory backends.

    ``kind`` is the QOM type without ``memory-backend-`` (file, memfd, ram, epc). ``path`` is as
    QEMU has it; ``named`` tells that a regular file bears this name now (huge pages without a
    source file have none). ``file_system`` is the type of the mount that holds it; ``dax`` and
    ``noswap`` are options of that.
    """

    id: str
    kind: str
    size_bytes: int
    shared: bool
    discard: bool = False
    path: str = ""
    named: bool = False
    file_system: str = ""
    dax: bool = False
    noswap: bool = False


class HandoverFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one running guest and its host.

    ``domain_xml`` is the live XML, ``command_line`` that of its QEMU. ``qemu_blockers`` are the
    ``blocked-reasons`` of query-migrate, ``block_jobs`` the ids of query-block-jobs.
    ``security_drivers`` are those that the host will have after the update.
    """

    domain_xml: str
    backends: tuple[RamBackend, ...]
    embedded: bool
    swap_bytes: int
    security_drivers: frozenset[str]
    command_line: tuple[str, ...] = ()
    qemu_blockers: tuple[str, ...] = ()
    block_jobs: tuple[str, ...] = ()


class Blocker(msgspec.Struct, frozen=True, kw_only=True):
    """Why not, and what to do. ``by_restart``: the changes of ``remedy_changes`` mend it at the
    guest's next start."""

    reason: str
    remedy: str
    by_restart: bool = False


class Eligibility(msgspec.Struct, frozen=True, kw_only=True):
    """A guest with blockers is not handed over. Warnings tell what it or its users will see."""

    blockers: tuple[Blocker, ...]
    warnings: tuple[Blocker, ...]


def judge(facts: HandoverFacts) -> Eligibility:
    """Every blocker and warning. InputError where the XML cannot be read."""
    domain = _parse(facts.domain_xml)
    blockers = [
        *_host_blockers(facts),
        *(found for backend in facts.backends for found in _ram_blockers(backend)),
        *_domain_blockers(domain),
        *_device_blockers(domain, facts),
        *_security_blockers(domain, facts),
    ]
    if not facts.backends:
        blockers.append(_ram("its RAM is private to its QEMU", _NAMED_FILE))
    for reason in facts.qemu_blockers:
        blockers.append(Blocker(reason=f"QEMU: {reason}", remedy="remove what QEMU names"))
    for job in facts.block_jobs:
        blockers.append(
            Blocker(reason=f"block job {job} is active", remedy="wait for it, or virsh blockjob")
        )
    return Eligibility(
        blockers=tuple(dict.fromkeys(blockers)), warnings=tuple(_warnings(domain, facts))
    )


def drivers_under(kernel_command_line: str, drivers: frozenset[str]) -> frozenset[str]:
    """Which of the security ``drivers`` a kernel with this command line will have: ``lsm=`` goes
    before ``security=`` (Documentation/admin-guide/kernel-parameters.txt)."""
    words = dict(word.partition("=")[::2] for word in kernel_command_line.split())
    if "lsm" in words:
        drivers &= frozenset(words["lsm"].split(","))
    elif "security" in words:
        drivers &= {words["security"]}
    return frozenset(driver for driver in drivers if words.get(driver) != "0")


def _parse(domain_xml: str) -> Element:
    try:
        return ElementTree.fromstring(domain_xml)
    except (ElementTree.ParseError, ValueError) as error:
        raise InputError("domain XML", "", f"not XML: {error}", remedy="virsh dumpxml") from error


def _ram(reason: str, remedy: str) -> Blocker:
    return Blocker(reason=reason, remedy=f"{remedy}, then restart it", by_restart=True)


def _host_blockers(facts: HandoverFacts) -> Iterator[Blocker]:
    if facts.embedded:
        yield Blocker(
            reason="libvirt's embedded driver runs no hooks",
            remedy="define the guest under qemu:///system",
        )


def _ram_blockers(backend: RamBackend) -> Iterator[Blocker]:
    """One reason each: the first is what must change first."""
    what = f"RAM {backend.id}"
    if backend.kind == "memfd":
        yield _ram(f"{what} is a memfd: it ends with its QEMU", _NAMED_FILE)
    elif backend.kind == "ram":
        yield _ram(f"{what} is private to its QEMU", _NAMED_FILE)
    elif backend.kind != "file":
        yield Blocker(
            reason=f"{what} is of the kind {backend.kind}", remedy="remove that memory device"
        )
    elif not backend.shared:
        yield _ram(f"{what} is a private copy of a file", _NAMED_FILE)
    elif not backend.named:
        yield _ram(
            f"{what} has lost its name (huge pages without a source file)",
            "replace <hugepages/> by <source type='file'/>, memory_backing_dir on hugetlbfs",
        )
    elif backend.file_system not in RAM_FILE_SYSTEMS and not backend.dax:
        yield _ram(
            f"{what} lies on {backend.file_system}, which writes it to a disk",
            "set memory_backing_dir to a directory on tmpfs or hugetlbfs, restart libvirtd",
        )
    elif backend.discard:
        yield _ram(
            f"{what} is discarded when its QEMU ends", "remove <discard/> from <memoryBacking>"
        )


def _domain_blockers(domain: Element) -> Iterator[Blocker]:
    machine = domain.find("os/type")
    name = machine.get("machine", "") if machine is not None else ""
    if name in _UNVERSIONED:
        yield Blocker(
            reason=f"machine type {name} is another one in each QEMU",
            remedy="name a versioned machine type (qemu -machine help), then restart it",
        )
    security = domain.find("launchSecurity")
    if security is not None:
        yield Blocker(
            reason=f"its RAM is encrypted for its process ({security.get('type')})",
            remedy="shut it down for the update",
        )
    features = domain.findall("cpu/feature")
    invtsc = any(f.get("name") == "invtsc" and f.get("policy") != "disable" for f in features)
    timers = domain.findall("clock/timer")
    if invtsc and not any(t.get("name") == "tsc" and t.get("frequency") for t in timers):
        yield Blocker(
            reason="CPU feature invtsc without a TSC frequency",
            remedy="add <timer name='tsc' frequency='HZ'/> to <clock>, then restart it",
        )


def _device_blockers(domain: Element, facts: HandoverFacts) -> Iterator[Blocker]:
    devices = domain.find("devices")
    for device in devices if devices is not None else ():
        what = _obstacle(device)
        if what is not None:
            yield Blocker(
                reason=f"{what[0]} cannot be handed over",
                remedy=f"{what[1]} for the update, or shut the guest down",
            )
    # What libvirt shows as a user network is slirp-helper's where QEMU has only a socket of it.
    words = facts.command_line
    for option, word in pairwise(words):
        if option == "-netdev" and _netdev_type(word) == "socket":
            yield Blocker(
                reason="a slirp-helper cannot be handed over",
                remedy="use <backend type='passt'/> or a bridge, then restart it",
            )


def _obstacle(device: Element) -> tuple[str, str] | None:
    """What a device is that cannot be kept, and what is to be done with it."""
    kind = device.get("type", "")
    match device.tag:
        case "hostdev" if kind != "usb":
            return f"host device ({kind or device.get('mode')})", "detach it"
        case "interface" if kind in ("hostdev", "vdpa", "vhostuser"):
            return f"interface of type {kind}", "detach it"
        case "disk" if kind in ("vhostuser", "vhostvdpa"):
            return f"disk of type {kind}", "detach it"
        case "disk" if device.find("transient") is not None:
            return f"transient disk {_target(device)}", "detach it"
        case "disk" if device.find("mirror") is not None:
            return f"disk {_target(device)} with a block job", "end the job"
        case "filesystem" if _is_virtiofs(device):
            return "virtiofs file system", "unmount and detach it"
        case "shmem" if device.get("role") != "master":
            return f"shared memory {device.get('name')} of another's", "detach it"
        # QEMU writes virtio-mem before all RAM; the file of a DIMM has another name than its block.
        case "memory":
            return f"{device.get('model')} device", "detach it"
        case "tpm":
            return "TPM, whose state another process holds,", "remove it"
    return None


def _is_virtiofs(device: Element) -> bool:
    driver = device.find("driver")
    return driver is not None and driver.get("type") == "virtiofs"


def _security_blockers(domain: Element, facts: HandoverFacts) -> Iterator[Blocker]:
    for label in domain.findall("seclabel"):
        model = label.get("model", "")
        if model in _SECURITY_DRIVERS and model not in facts.security_drivers:
            yield Blocker(
                reason=f"it is labelled by {model}, which the host will not have after the update",
                remedy=f"keep {model} on (lsm=, {model}= of the kernel; security_driver)",
            )


def _warnings(domain: Element, facts: HandoverFacts) -> Iterator[Blocker]:
    swappable = [b.id for b in facts.backends if b.file_system == "tmpfs" and not b.noswap]
    if facts.swap_bytes and swappable:
        yield Blocker(
            reason=f"RAM {', '.join(swappable)} may be swapped out while it is parked",
            remedy="mount memory_backing_dir's tmpfs with noswap (Linux 6.4), or swapoff",
        )
    if any(label.get("model") == "selinux" for label in domain.findall("seclabel")):
        yield Blocker(
            reason="its RAM file must be relabelled for its new QEMU",
            remedy="try it on a guest that may be lost",
        )
    for graphics in domain.findall("devices/graphics"):
        yield Blocker(
            reason=f"viewers of its screen ({graphics.get('type')}) are disconnected",
            remedy="none needed: they connect again",
        )
    for device in domain.findall("devices/hostdev"):
        if device.get("type") == "usb":
            yield Blocker(
                reason="it sees its USB host device unplugged and plugged again",
                remedy="none needed where its software expects that",
            )
    if domain.find("genid") is not None:
        yield Blocker(
            reason="its generation id changes: it may believe that it was cloned",
            remedy="remove <genid/> where that matters",
        )


def _target(device: Element) -> str:
    target = device.find("target")
    return target.get("dev", "") if target is not None else ""


def _netdev_type(word: str) -> str:
    """Type of a -netdev, which is JSON or ``type,key=value``."""
    if word.startswith("{"):
        return str(msgspec.json.decode(word).get("type"))
    return word.partition(",")[0]
