"""A guest's RAM files: where they are, and a second name for each that outlives its QEMU.

libvirt deletes a domain's RAM directory when its QEMU ends. A hard link in the same mount keeps the
file. QEMU makes RAM files readable for all: the directory of the links is what protects them.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from hostupdate.errors import GuestError
from hostupdate.parked import ParkedRecord, RamFile

#: Below ``memory_backing_dir`` of qemu.conf.
PARKED_DIRECTORY = "hostupdate-parked"
_IN_RAM = {"tmpfs", "hugetlbfs"}
_USE_FILES = (
    "give it <memoryBacking><source type='file'/><access mode='shared'/></memoryBacking> "
    "and start it anew"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestRam:
    """Where a running guest's RAM lies: ``directory`` / ``ID-short_name`` / a file for each block,
    and ``links``, where our names of them go."""

    directory: Path
    short_name: str
    links: Path
    files: tuple[RamFile, ...]

    @property
    def size_bytes(self) -> int:
        """Of all files."""
        return sum(file.size_bytes for file in self.files)


def find(name: str, uuid: str, pid: int) -> GuestRam:
    """The RAM of the QEMU process ``pid``, by its command line. Changes nothing.

    GuestError: RAM that cannot be kept in place, with the reason and what to change.
    """
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
        backends = list(_backends(raw.decode(errors="replace").split("\0")))
        home = _home(name, backends)
        directory = home.parent
        number, _, short_name = home.name.partition("-")
        if not number.isdigit() or not short_name:
            raise GuestError(name, f"its RAM lies in {home}, which is not libvirt's")
        links = _top(directory) / PARKED_DIRECTORY / uuid
        if foreign := _foreign(_top(directory)):
            raise GuestError(
                name, f"its RAM lies in {directory}, and {foreign}: they could take it away",
                remedy="set memory_backing_dir in qemu.conf to a directory that only root can "
                "write to, and start it anew",
            )  # fmt: skip
        found = []
        for path in sorted(home.iterdir()):  # blocks plugged in later are here, not in the command
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode) or "\n" in str(path) or " " in path.name:
                raise GuestError(name, f"{path} is no plain file with a plain name")
            found.append(
                RamFile(
                    block=path.name,
                    link=str(links / path.name),
                    size_bytes=status.st_size,
                    inode=status.st_ino,
                    device=status.st_dev,
                )
            )
        missing = {backend["mem-path"] for backend in backends} - {str(p) for p in home.iterdir()}
        if missing:
            raise GuestError(name, f"a file of its RAM has no name any more: {min(missing)}")
        kind = filesystem(home)
    except OSError as error:
        raise GuestError(name, f"its RAM cannot be looked at: {error}") from error
    except (ValueError, KeyError) as error:
        raise GuestError(name, f"what its QEMU knows of RAM is not understood: {error}") from error
    if kind not in _IN_RAM and not kind.endswith("+dax"):
        raise GuestError(
            name, f"its RAM lies in {directory}, on {kind}: it would be written to a disk",
            remedy='set memory_backing_dir = "/dev/shm/hostupdate" in qemu.conf and start it anew',
        )  # fmt: skip
    return GuestRam(directory=directory, short_name=short_name, links=links, files=tuple(found))


def link(record: ParkedRecord) -> None:
    """Gives each RAM file its second name. Safe to repeat. GuestError: it cannot, and has not.

    The guest has a record by then, and had none before: another file under such a name is garbage.
    """
    running = [
        path
        for path in Path(record.ram_directory).glob("*-*")
        if path.name.partition("-")[2] == record.short_name
    ]
    directory = Path(record.ram[0].link).parent
    try:
        for made in (directory.parent, directory):
            made.mkdir(mode=0o700, exist_ok=True)
            status = made.lstat()
            if (
                not stat.S_ISDIR(status.st_mode)
                or status.st_uid != os.geteuid()
                or status.st_mode & 0o077
            ):
                raise GuestError(
                    record.name, f"{made} can be entered by others", remedy=f"remove {made}"
                )
        for ram in record.ram:
            homes = [path / ram.block for path in running]
            source = next((path for path in homes if _is(path, ram)), None)
            if source is None:
                raise GuestError(record.name, f"its RAM file {ram.block} has changed meanwhile")
            if not _is(Path(ram.link), ram):  # else of a run that died, and is in no record
                Path(ram.link).unlink(missing_ok=True)
                os.link(source, ram.link, follow_symlinks=False)
        problem = problem_of(record)
        if problem:
            raise GuestError(record.name, problem)
    except OSError as error:
        unlink(record)
        raise GuestError(record.name, f"its RAM cannot be linked: {error}") from error
    except GuestError:
        unlink(record)
        raise


def problem_of(record: ParkedRecord) -> str:
    """What is wrong with the parked files; empty where they are as they were when linked."""
    for ram in record.ram:
        try:
            status = os.lstat(ram.link)
        except OSError as error:
            return f"its RAM file {ram.link} cannot be found: {error.strerror}"
        if not stat.S_ISREG(status.st_mode) or status.st_ino != ram.inode:
            return f"its RAM file {ram.link} has been replaced"
        if status.st_size != ram.size_bytes:
            return f"its RAM file {ram.link} has {status.st_size} bytes, not {ram.size_bytes}"
    return ""


def unlink(record: ParkedRecord) -> None:
    """Takes the second names away. Safe to repeat."""
    directory = Path(record.ram[0].link).parent
    for ram in record.ram:
        Path(ram.link).unlink(missing_ok=True)
    for made in (directory, directory.parent):  # the latter while no other guest is parked
        with suppress(OSError):
            made.rmdir()


def is_mapped(record: ParkedRecord, pid: int) -> bool:
    """Whether the process has every one of the RAM files as its memory."""
    mapped = set()
    with suppress(OSError), open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as maps:
        for line in maps:
            _range, modes, _offset, device, inode, *_ = line.split(maxsplit=5)
            if modes.endswith("s"):
                major, minor = (int(part, 16) for part in device.split(":"))
                mapped.add((os.makedev(major, minor), int(inode)))
    try:
        return all((os.lstat(ram.link).st_dev, ram.inode) in mapped for ram in record.ram)
    except OSError:
        return False


def filesystem(path: Path) -> str:
    """The type of the file system that holds ``path``, with ``+dax`` where files are mapped from
    the device itself. OSError."""
    device = path.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    found = "an unknown file system"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
        for line in mounts:
            before, _, after = line.partition(" - ")
            if before.split()[2] == wanted:
                kind, _source, options = after.rstrip("\n").split(" ")[:3]  # the source may be ""
                dax = {"dax", "dax=always"} & set(options.split(","))
                found = f"{kind}+dax" if dax else kind
    return found


def _backends(arguments: list[str]) -> Iterator[dict[str, Any]]:
    """Every memory backend on a QEMU command line, as JSON or as key=value."""
    for option, value in pairwise(arguments):
        if option != "-object":
            continue
        if value.startswith("{"):
            found = json.loads(value)
        else:
            kind, *pairs = value.replace(",,", "\0").split(",")
            found = {"qom-type": kind} | {
                key: text.replace("\0", ",") for key, _, text in (p.partition("=") for p in pairs)
            }
        if str(found.get("qom-type", "")).startswith("memory-backend"):
            yield found


def _home(name: str, backends: list[dict[str, Any]]) -> Path:
    homes = set()
    for backend in backends:
        kind = backend["qom-type"]
        if kind != "memory-backend-file":
            raise GuestError(name, f"its RAM is a {kind}, not named files", remedy=_USE_FILES)
        if backend.get("share") not in (True, "on", "yes"):
            raise GuestError(name, "its RAM is private to its QEMU", remedy=_USE_FILES)
        if backend.get("discard-data") in (True, "on", "yes"):
            raise GuestError(
                name, "its QEMU throws its RAM away when it ends",
                remedy="take <discard/> out of its <memoryBacking> and start it anew",
            )  # fmt: skip
        homes.add(Path(str(backend["mem-path"])).parent)
    if not homes:
        raise GuestError(name, "its RAM is private to its QEMU", remedy=_USE_FILES)
    if len(homes) > 1:
        raise GuestError(name, f"its RAM lies in several directories: {sorted(map(str, homes))}")
    return homes.pop()


def _top(directory: Path) -> Path:
    """``memory_backing_dir``: libvirt appends libvirt/qemu to it (qemu_conf.c)."""
    return directory.parents[1] if directory.parts[-2:] == ("libvirt", "qemu") else directory


def _foreign(directory: Path) -> str:
    """Who else may rename what is in it, or itself; empty: nobody."""
    real = directory.resolve()
    for place in (directory, *directory.parents, real, *real.parents):
        status = place.lstat()
        if status.st_uid not in (0, os.geteuid()):
            return f"{place} is others'"
        shared = status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX
        if shared and not stat.S_ISLNK(status.st_mode):
            return f"others may write to {place}"
    return ""


def _is(path: Path, ram: RamFile) -> bool:
    try:
        status = path.lstat()
    except OSError:
        return False
    return (status.st_ino, status.st_dev, status.st_size) == (
        ram.inode, ram.device, ram.size_bytes,
    )  # fmt: skip
