"""The steps that install packages, and take them back. Pure: apt was asked before."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

import msgspec

from hostupdate.impact import UNJUDGED, PackageChange, dpkg_name, units_of
from hostupdate.manifest import PACKAGES, Manifest, Qemu, Step
from hostupdate.model import Impact, PackageVerdict, Phase

_FETCH_NS = 1_800_000_000_000
_INSTALL_NS = 1_800_000_000_000
#: needrestart would start services anew that nobody has judged.
_ENVIRONMENT = ("env", "DEBIAN_FRONTEND=noninteractive", "NEEDRESTART_SUSPEND=1")
_FETCH = ("apt-get", "-q", "-y", "--no-install-recommends", "-o", "APT::Sandbox::User=root")
_INSTALL = (
    *("apt-get", "-q", "-y", "--no-install-recommends", "-o", "Dpkg::Options::=--force-confdef"),
    *("-o", "Dpkg::Options::=--force-confold", "-o", "DPkg::Lock::Timeout=60"),
)
_INSPECT = """\
for deb; do dpkg-deb --fsys-tarfile "$deb" | tar -tf - | grep -E "$0" | \
grep -vE '/qemu-(pr|vmsr)-helper[.](service|socket)$' && exit 1; done; exit 0"""
_VERIFY = """\
for each; do [ "$(dpkg-query -W -f '${Version} ${db:Status-Status}' "${each%%=*}")" = \
"${each#*=} installed" ] || exit 1; done"""


class Archive(msgspec.Struct, frozen=True, kw_only=True):
    """Where the file of a package version is to be had. ``path``: where it lies once it was
    fetched; ``here``: it is at hand already at this path and is copied; ``fetch``: apt gets it."""

    path: str
    here: str = ""
    fetch: bool = False


class Transaction(msgspec.Struct, frozen=True, kw_only=True):
    """What apt would do. ``new`` and ``old`` map a package's name to its archives; an old version
    that is nowhere to be had is missing there. ``directory`` is where they are kept."""

    changes: tuple[PackageChange, ...]
    new: dict[str, Archive]
    old: dict[str, Archive]
    directory: str

    @property
    def upgraded(self) -> tuple[PackageChange, ...]:
        return tuple(change for change in self.changes if change.old and change.new)

    @property
    def lost(self) -> tuple[str, ...]:
        """What there is no way back to."""
        return tuple(f"{c.name} {c.old}" for c in self.upgraded if c.name not in self.old)


def install_words(upgraded: Sequence[PackageChange]) -> tuple[str, ...]:
    """The words of ``apt-get`` that name exact versions. New packages come as they are needed, so
    that apt goes on taking them for such."""
    return "install", "--no-remove", "--only-upgrade", *(f"{c.name}={c.new}" for c in upgraded)


def with_packages(
    manifest: Manifest, transaction: Transaction, verdicts: Sequence[PackageVerdict]
) -> Manifest:
    """The manifest with its packages as steps, before its own; with guests under the QEMU that is
    installed then, where a package is judged so."""
    handed = any(verdict.impact is Impact.HANDOVER for verdict in verdicts)
    return msgspec.structs.replace(
        manifest,
        steps=(*_steps(transaction), *manifest.steps),
        qemu=manifest.qemu or (Qemu() if handed else None),
    )


def package_warnings(transaction: Transaction) -> tuple[str, ...]:
    """What is to be known before the packages are touched."""
    if not transaction.changes:
        return ("[packages]: there is nothing to upgrade",)
    if not transaction.lost:
        return ()
    return (
        f"no archive of {', '.join(transaction.lost)} is to be had: should the update fail, guests "
        "go back to their QEMU, the packages stay as they are then",
    )


def _steps(transaction: Transaction) -> list[Step]:
    upgraded = transaction.upgraded
    if not upgraded:
        return []
    directory = transaction.directory
    into = ("-o", f"Dir::Cache::archives={directory}")
    words = install_words(upgraded)
    steps = [
        _step("download", _sequence(_room(directory), [*_FETCH, *into, "--download-only", *words])),
        _step("look for what was not judged", _inspection(transaction)),
    ]
    undo = None
    if not transaction.lost:
        steps.append(_step("keep the way back", _keeping(transaction, into)))
        undo = _taking_back(transaction, into)
    install = [*_ENVIRONMENT, *_INSTALL, *into, *words]
    verify = ("sh", "-c", _VERIFY, "verify", *_wanted(transaction))
    steps.append(_step("install", tuple(install), undo=undo, verify=verify))
    clear = ("rm", "-rf", "--", directory)
    return [*steps, _step("clear up", clear, phase=Phase.FINISH)]


def _step(
    name: str,
    run: tuple[str, ...],
    *,
    phase: Phase = Phase.STAGE,
    undo: tuple[str, ...] | None = None,
    verify: tuple[str, ...] | None = None,
) -> Step:
    return Step(
        name=f"{PACKAGES} {name}",
        phase=phase,
        run=run,
        undo=undo,
        verify=verify,
        timeout_ns=_INSTALL_NS if undo or verify else _FETCH_NS,
    )


def _wanted(transaction: Transaction) -> list[str]:
    return [f"{dpkg_name(change)}={change.new}" for change in transaction.changes]


def _room(directory: str) -> list[str]:
    return ["install", "-d", "-m", "0700", f"{directory}/partial"]


def _sequence(*commands: Sequence[str]) -> tuple[str, ...]:
    return "sh", "-c", " && ".join(shlex.join(command) for command in commands)


def _inspection(transaction: Transaction) -> tuple[str, ...]:
    """Of packages with judged units newer versions may hold newer units."""
    unjudged = [c for c in transaction.changes if not units_of(c)]
    paths = [transaction.new[change.name].path for change in unjudged]
    return "sh", "-c", _INSPECT, UNJUDGED, *paths


def _keeping(transaction: Transaction, into: Sequence[str]) -> tuple[str, ...]:
    archives = [transaction.old[change.name] for change in transaction.upgraded]
    commands = [_room(transaction.directory)]
    here = [archive.here for archive in archives if archive.here]
    if here:
        commands.append(["cp", "--", *here, transaction.directory])
    fetched = [c for c in transaction.upgraded if transaction.old[c.name].fetch]
    if fetched:
        wanted = [f"{change.name}={change.old}" for change in fetched]
        commands.append(
            [*_FETCH, *into, "--download-only", "--reinstall", "--no-remove", "install", *wanted]
        )
    return _sequence(*commands)


def _taking_back(transaction: Transaction, into: Sequence[str]) -> tuple[str, ...]:
    """dpkg may have been interrupted. Names that end with a minus are removed: what was new."""
    paths = [transaction.old[change.name].path for change in transaction.upgraded]
    new = [f"{change.name}-" for change in transaction.changes if not change.old]
    words = [*_INSTALL, *into, "--allow-downgrades", "install", *paths, *new]
    script = shlex.join([*_ENVIRONMENT, *words])
    return "sh", "-c", f"{shlex.join([*_ENVIRONMENT, 'dpkg', '--configure', '-a'])}; exec {script}"
