"""What changing packages does to guests, from what the packages hold and what guests use.

Nothing is inferred from a package's name: a file that a guest's QEMU has open or would load is
evidence, a unit file is evidence. What cannot be judged is refused with the way out, not guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import msgspec

from hostupdate.model import Impact, PackageVerdict

#: libvirt's daemons and what goes with them: guests run on while these are started anew
#: (systemd units with KillMode=process; measured for libvirtd in docs/how-handover-works.md).
_LIBVIRT_UNIT = re.compile(
    r"(libvirt(d|-guests|d-[a-z-]+)?|virt(qemu|network|nodedev|nwfilter|secret|storage|interface"
    r"|proxy|lxc|xen|vbox|ch|log|lock)d(-[a-z-]+)?|virt-guest-shutdown|virt-secret-init-encryption)"
    r"\.(service|socket|target)"
)
#: Helpers of QEMU itself, which it connects to anew (scsi/pr-manager-helper.c).
_HELPER = re.compile(r"qemu-(pr|vmsr)-helper\.(service|socket)")
_UNIT = re.compile(
    r"/systemd/system/(?P<unit>[^/]+\.(service|socket|timer|path|mount|automount|swap|slice|target))"
)
_INIT = re.compile(r"/etc/init\.d/(?P<unit>[^/]+)")
_KERNEL = re.compile(r"(/usr)?(/boot/vmlinu[xz][^/]*|/lib/modules/.+)")
_MICROCODE = re.compile(r"(/usr)?/lib/firmware/(intel-ucode|amd-ucode)/.+")
#: What an archive must not hold that was judged by an older one, or by none: a POSIX extended
#: regular expression for the names in its tar.
UNJUDGED = (
    r"/systemd/system/[^/]+\.(service|socket|timer|path|mount|automount|swap)$"
    r"|^\./etc/init\.d/.|^\./(usr/)?lib/modules/.|^\./boot/vmlinu|/firmware/(intel|amd)-ucode/."
)
_SHOWN = 3


class PackageChange(msgspec.Struct, frozen=True, kw_only=True):
    """One package of a transaction, by apt's name for it. ``old`` empty: it is new; ``new`` empty:
    it is removed. ``architecture``: that of ``new``.

    ``files`` are those of the installed version by the names that the kernel shows: links in their
    directories resolved, no directories.
    ``section`` is the archive's: ``kernel`` or ``main/kernel``.
    """

    name: str
    old: str
    new: str
    architecture: str = ""
    section: str = ""
    files: tuple[str, ...] = ()


class QemuUse(msgspec.Struct, frozen=True, kw_only=True):
    """What the QEMU of one running guest depends on: ``files`` it has mapped or open,
    ``directories`` from which it loads modules and firmware."""

    guest: str
    files: frozenset[str]
    directories: tuple[str, ...] = ()


def dpkg_name(change: PackageChange) -> str:
    """dpkg's name for one package of one architecture: without it, one means all of that name."""
    return f"{change.name.partition(':')[0]}:{change.architecture}"


def judge_packages(
    changes: Iterable[PackageChange], uses: Sequence[QemuUse]
) -> tuple[PackageVerdict, ...]:
    """A verdict for each package, in their order."""
    return tuple(_judge(change, uses) for change in changes)


def units_of(change: PackageChange) -> tuple[str, ...]:
    """The units and init scripts that the installed version holds, but QEMU's own helpers."""
    found = [match["unit"] for file in change.files if (match := _UNIT.search(file))]
    found += [match["unit"] for file in change.files if (match := _INIT.fullmatch(file))]
    return tuple(unit for unit in dict.fromkeys(found) if not _HELPER.fullmatch(unit))


def _judge(change: PackageChange, uses: Sequence[QemuUse]) -> PackageVerdict:
    def verdict(impact: Impact | None, reason: str, evidence: Iterable[str] = ()) -> PackageVerdict:
        found = tuple(evidence)
        more = (f"and {len(found) - _SHOWN} more",) if len(found) > _SHOWN else ()
        return PackageVerdict(
            name=change.name,
            old=change.old,
            new=change.new,
            impact=impact,
            reason=reason,
            evidence=found[:_SHOWN] + more,
        )

    if not change.new:
        return verdict(None, "it would be removed")
    kernel = [file for file in change.files if _KERNEL.fullmatch(file)]
    # A new package has no files yet; of an old one they tell more than its section does.
    if kernel or (not change.old and change.section.rpartition("/")[2] == "kernel"):
        return verdict(Impact.KEXEC, "it is a part of the kernel", kernel)
    if microcode := [file for file in change.files if _MICROCODE.fullmatch(file)]:
        return verdict(Impact.REBOOT, "the processor takes it at boot", microcode)
    units = units_of(change)
    foreign = [unit for unit in units if not _LIBVIRT_UNIT.fullmatch(unit)]
    if foreign:
        return verdict(None, "it holds services, and what starting them anew does to guests is not "
                       "known: install it by steps", foreign)  # fmt: skip
    if used := _used(change, uses):
        return verdict(Impact.HANDOVER, "guests' QEMUs use it", used)
    if units:
        return verdict(Impact.NONE, "guests run on while libvirt is started anew", units)
    if not change.old:
        return verdict(Impact.NONE, "it is new: nothing uses it yet")
    return verdict(Impact.NONE, "no guest's QEMU uses it, and it holds no service")


def _used(change: PackageChange, uses: Sequence[QemuUse]) -> list[str]:
    """Its files that guests use, each with the guests; what is open before what might be."""
    opened: dict[str, list[str]] = {}
    loadable: dict[str, list[str]] = {}
    for use in uses:
        below = tuple(f"{directory.rstrip('/')}/" for directory in use.directories)
        for file in change.files:
            if file in use.files:
                opened.setdefault(file, []).append(use.guest)
            elif below and file.startswith(below):
                loadable.setdefault(file, []).append(use.guest)
    return [
        *(f"{file}, in use by {', '.join(guests)}" for file, guests in opened.items()),
        *(f"{file}, loaded at need by {', '.join(guests)}" for file, guests in loadable.items()),
    ]
