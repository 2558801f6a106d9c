"""Debian packages, by apt and dpkg: what an upgrade would change, and where its archives are.

Asks only; what changes the host are steps of the run (:mod:`hostupdate.packaging`). apt and dpkg
take their root from the environment where it names one (APT_CONFIG, DPKG_ROOT).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

import msgspec

from hostupdate.errors import DeadlineError, PrerequisiteError, RefusedError
from hostupdate.impact import PackageChange, dpkg_name
from hostupdate.manifest import Packages
from hostupdate.packaging import Archive, Transaction, install_words

#: apt reads its lists and solves, without the network.
ASK_NS = 120_000_000_000

_INST = re.compile(
    r"^Inst (?P<name>\S+)(?: \[(?P<old>[^\]]+)\])? \((?P<new>\S+) [^)]*\[(?P<arch>[^\]]+)\]\)",
    re.MULTILINE,
)
_REMV = re.compile(r"^(?:Remv|Purg) (?P<name>\S+) \[(?P<old>[^\]]+)\]", re.MULTILINE)
_URI = re.compile(r"^'(?P<uri>[^']+)' (?P<file>\S+) \d+", re.MULTILINE)
_FIELD = re.compile(r"^(Package|Version|Architecture|Section): (\S+)", re.MULTILINE)
_REMEDY = "mend it with apt-get, or write the installation as steps"


class Apt:
    """The packages of this host; archives are kept in ``directory``."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def resolve(self, wanted: Packages) -> Transaction:
        """Everything that upgrading would change, with exact versions. Nothing is downloaded.

        Raises PrerequisiteError where there is no apt or it finds no solution, RefusedError where
        a package is not installed, DeadlineError.
        """
        if shutil.which("apt-get") is None:
            raise PrerequisiteError(
                "[packages]: apt-get is not there: this version judges Debian packages only",
                remedy="write the installation as steps",
            )
        self._require_installed(wanted.upgrade)
        words = ["upgrade", "--with-new-pkgs"]
        if not wanted.all:
            words = ["install", "--only-upgrade", *wanted.upgrade]
        found = self._simulate(words)
        upgraded = [change for change in found if change.old and change.new]
        if upgraded and all(change.new for change in found):
            again = self._simulate(install_words(upgraded))
            if {_key(c) for c in again} != {_key(c) for c in found}:
                raise PrerequisiteError(
                    "[packages]: apt would not do the same with the versions named", remedy=_REMEDY
                )
        new = self._archives([f"{c.name}={c.new}" for c in upgraded], "--only-upgrade")
        old = self._archives([f"{c.name}={c.old}" for c in upgraded], "--reinstall")
        return Transaction(
            changes=_described(found),
            new={c.name: self._new(c, new) for c in found if c.new},
            old={c.name: a for c in upgraded if (a := self._old(c, old)) is not None},
            directory=str(self._directory),
        )

    def _simulate(self, words: Sequence[str]) -> list[PackageChange]:
        said = _run(["apt-get", "-s", "-q", "-y", "--no-install-recommends", *words])
        found = [
            PackageChange(name=m["name"], old=m["old"] or "", new=m["new"], architecture=m["arch"])
            for m in _INST.finditer(said)
        ]
        return found + [
            PackageChange(name=m["name"], old=m["old"], new="") for m in _REMV.finditer(said)
        ]

    def _require_installed(self, names: Sequence[str]) -> None:
        missing = []
        for name in names:
            status = _run(["dpkg-query", "-W", "-f", "${db:Status-Status}\n", name], check=False)
            if "installed" not in status.splitlines():
                missing.append(f"[packages]: {name} is not installed: there is nothing to upgrade")
        if missing:
            raise RefusedError(missing, remedy="correct the names, or install them by steps")

    def _archives(self, versions: Sequence[str], option: str) -> dict[str, str]:
        """File name of each archive that apt would get -> its URI."""
        if not versions:
            return {}
        into = f"Dir::Cache::archives={self._directory}"
        words = ["-o", into, "--print-uris", "--no-install-recommends", option]
        said = _run(["apt-get", "-q", "-y", *words, "install", *versions], check=False)
        return {m["file"]: m["uri"] for m in _URI.finditer(said)}

    def _new(self, change: PackageChange, uris: dict[str, str]) -> Archive:
        file, uri = _named(change, change.new, uris)
        # apt leaves what a file: URI names where it is.
        return Archive(path=_local(uri) or str(self._directory / file), fetch=True)

    def _old(self, change: PackageChange, uris: dict[str, str]) -> Archive | None:
        file, uri = _named(change, change.old, uris)
        if here := _local(uri):
            return Archive(path=str(self._directory / Path(here).name), here=here)
        if uri:
            return Archive(path=str(self._directory / file), fetch=True)
        cache = _run(["apt-config", "shell", "found", "Dir::Cache::archives/d"])
        match = re.search(r"found='(.*)'", cache)
        for place in (str(self._directory), match[1] if match else "/var/cache/apt/archives"):
            kept = next(iter(sorted(Path(place).glob(_pattern(change.name, change.old)))), None)
            if kept is not None:
                there = str(kept) if kept.parent != self._directory else ""
                return Archive(path=str(self._directory / kept.name), here=there)
        return None


def _described(changes: Sequence[PackageChange]) -> tuple[PackageChange, ...]:
    """With their sections and files; all are asked for at once, a question takes a second."""
    versions = [f"{change.name}={change.new}" for change in changes if change.new]
    sections = {}
    for stanza in _run(["apt-cache", "show", *versions]).split("\n\n") if versions else ():
        fields = dict(_FIELD.findall(stanza))
        name = f"{fields.get('Package')}:{fields.get('Architecture')}", fields.get("Version")
        sections[name] = fields.get("Section", "")
    installed = [change for change in changes if change.old]
    names = [dpkg_name(change) if change.new else change.name for change in installed]
    # dpkg parts the lists by empty lines.
    lists = _run(["dpkg-query", "-L", *names]).split("\n\n") if names else []
    files = {change.name: text for change, text in zip(installed, lists, strict=True)}
    return tuple(
        msgspec.structs.replace(
            change,
            section=sections.get((dpkg_name(change), change.new), ""),
            files=_files(files.get(change.name, "")),
        )
        for change in changes
    )


def _files(listed: str) -> tuple[str, ...]:
    """A link's own name is kept: what it leads to may be another package's."""
    directories: dict[str, str] = {}
    found = []
    for path in listed.splitlines():
        parent, _, name = path.rpartition("/")
        if path.startswith("/") and not os.path.isdir(path):
            if parent not in directories:
                directories[parent] = os.path.realpath(parent or "/")
            found.append(os.path.join(directories[parent], name))
    return tuple(found)


def _local(uri: str) -> str:
    """The path that a file: URI names; empty for another."""
    return unquote(urlsplit(uri).path) if uri.startswith("file:") else ""


def _key(change: PackageChange) -> tuple[str, str, str]:
    return change.name, change.old, change.new


def _pattern(name: str, version: str) -> str:
    """How apt names an archive: the version's colon is quoted, the architecture comes last."""
    return f"{name.partition(':')[0]}_{version.replace(':', '%3a')}_*.deb"


def _named(change: PackageChange, version: str, uris: dict[str, str]) -> tuple[str, str]:
    """File name and URI. No URI: it is in the directory already, or nowhere to be had."""
    start = _pattern(change.name, version).removesuffix("*.deb")
    wanted = f"{start}{change.architecture}.deb"
    near = [file for file in uris if file.startswith(start)]  # it may have been of another
    file = wanted if wanted in uris else next(iter(near), wanted)
    return file, uris.get(file, "")


def _run(argv: Sequence[str], *, check: bool = True) -> str:
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env={**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"},
            timeout=ASK_NS / 1e9,
            check=False,
        )
    except OSError as error:
        raise PrerequisiteError(f"{argv[0]}: {error.strerror}", remedy=_REMEDY) from error
    except subprocess.TimeoutExpired as error:
        raise DeadlineError(" ".join(argv[:2]), ASK_NS) from error
    if check and done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        said = "; ".join(line.removeprefix("E: ") for line in lines[-2:])
        raise PrerequisiteError(
            f"[packages]: {argv[0]}: {said or f'exit {done.returncode}'}", remedy=_REMEDY
        )
    return done.stdout.decode(errors="replace")
