"""Guest RAM: where a QEMU process has it, the files behind it, and a digest of its content."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from errno import E2BIG
from hashlib import blake2b
from struct import pack
from typing import TYPE_CHECKING

from hostupdate.core._boundary import check, ffi, lib

if TYPE_CHECKING:
    from hostupdate._core import CData

__all__ = (
    "Backing",
    "Digest",
    "Mapping",
    "digest_file",
    "digest_guest",
    "digest_process",
    "mappings",
    "open_mapping",
)


class Backing(Enum):
    """What holds the pages of a mapping."""

    #: No file that has a name; where ``shared``, a nameless one.
    ANONYMOUS = "anonymous"
    MEMFD = "memfd"
    #: A file on tmpfs.
    SHMEM = "shmem"
    #: Huge pages, which are never swapped.
    HUGETLB = "hugetlb"
    #: A file on any other file system.
    FILE = "file"


_BACKINGS = {
    lib.HU_RAM_ANONYMOUS: Backing.ANONYMOUS,
    lib.HU_RAM_MEMFD: Backing.MEMFD,
    lib.HU_RAM_SHMEM: Backing.SHMEM,
    lib.HU_RAM_HUGETLB: Backing.HUGETLB,
    lib.HU_RAM_FILE: Backing.FILE,
}
_CAPACITY = 64  # a plain guest has 9; one with many memory devices may have hundreds


@dataclass(frozen=True, slots=True, kw_only=True)
class Mapping:
    """A RAM block of a QEMU process, or part of one.

    ``resident_bytes`` and ``swapped_bytes`` are what that process' page tables say: pages of a
    shared file that it has not touched are neither. ``path`` is as the kernel prints it, cut to
    255 bytes.
    """

    start: int
    length_bytes: int
    offset_bytes: int
    inode: int
    resident_bytes: int
    swapped_bytes: int
    locked_bytes: int
    backing: Backing
    shared: bool
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Digest:
    """128 bits that tell whether RAM changed by accident; no protection from forgery.

    ``pages`` of 4 KiB went into it: those that were read and are not all zeros.
    """

    low: int
    high: int
    pages: int

    @property
    def hex(self) -> str:
        return f"{self.high:016x}{self.low:016x}"


def mappings(pid: int) -> tuple[Mapping, ...]:
    """The RAM blocks of a QEMU process: RAM, ROM and video memory, by address.

    The kernel walks the page tables for it, some 13 ms for each GiB: not for the blackout.
    Raises CoreError: ESRCH for a process that is gone, EACCES for one that is not ours to look
    at, EAGAIN where it changed its mappings meanwhile, EBADMSG for a kernel that is not understood.
    """
    capacity = _CAPACITY
    while True:
        found = ffi.new("struct hu_ram_mapping[]", capacity)
        count = lib.hu_ram_mappings(pid, found, capacity)
        if count != -E2BIG:
            break
        capacity *= 4
    check("hu_ram_mappings", count, f"pid {pid}")
    return tuple(_mapping(found[i]) for i in range(count))


def open_mapping(pid: int, mapping: Mapping) -> int:
    """Opens the file behind a shared mapping, read-only; the descriptor is the caller's.

    It keeps the RAM in existence when the process ends. Raises CoreError: EINVAL for a private
    mapping, ENOENT where the process has that mapping no more, ESRCH and EACCES as ``mappings``.
    """
    result = lib.hu_ram_open(pid, _struct(mapping))
    return check("hu_ram_open", result, _where(pid, mapping))


def digest_file(
    fd: int, *, offset_bytes: int = 0, length_bytes: int, sample_pages: int = 0
) -> Digest:
    """The digest of part of a file of guest RAM, holes skipped.

    ``sample_pages`` of it, evenly spread and the same ones each time; 0 for all. Raises CoreError:
    EINVAL for an offset within a page.
    """
    result = ffi.new("struct hu_ram_digest *")
    r = lib.hu_ram_digest_file(fd, offset_bytes, length_bytes, sample_pages, result)
    check("hu_ram_digest_file", r)
    return _digest(result)


def digest_process(pid: int, mapping: Mapping, *, sample_pages: int = 0) -> Digest:
    """The digest of a mapping as its process sees it; no memory is made in the guest.

    Equal content has the digest that ``digest_file`` gives. Pages that were swapped out come back.
    Raises CoreError: as ``open_mapping``, EFAULT where the mapping is gone or its memory defective,
    EOPNOTSUPP for private memory on a machine with other pages than of 4 KiB.
    """
    result = ffi.new("struct hu_ram_digest *")
    r = lib.hu_ram_digest_process(pid, _struct(mapping), sample_pages, result)
    check("hu_ram_digest_process", r, _where(pid, mapping))
    return _digest(result)


def digest_guest(pid: int, mappings: Iterable[Mapping], *, sample_pages: int = 0) -> Digest:
    """One digest for all of a guest's mappings, wherever they are and in whatever order.

    ``sample_pages`` are shared among them by size, at least one each. It only compares with that
    of the same blocks, split in the same way. Raises CoreError as ``digest_process``.
    """
    blocks = tuple(mappings)
    total = sum(block.length_bytes for block in blocks)
    parts = []
    for block in blocks:
        share = -(-sample_pages * block.length_bytes // total)  # rounded up; 0 stays 0: all
        digest = digest_process(pid, block, sample_pages=share)
        parts.append((block.length_bytes, block.offset_bytes, digest))
    packed = sorted(
        pack("<QQQQQ", length, offset, digest.low, digest.high, digest.pages)
        for length, offset, digest in parts
    )
    combined = blake2b(b"".join(packed), digest_size=16).digest()
    return Digest(
        low=int.from_bytes(combined[:8], "little"),
        high=int.from_bytes(combined[8:], "little"),
        pages=sum(digest.pages for _, _, digest in parts),
    )


def _mapping(found: CData) -> Mapping:
    return Mapping(
        start=found.start,
        length_bytes=found.length_bytes,
        offset_bytes=found.offset_bytes,
        inode=found.inode,
        resident_bytes=found.resident_bytes,
        swapped_bytes=found.swapped_bytes,
        locked_bytes=found.locked_bytes,
        backing=_BACKINGS[found.backing],
        shared=bool(found.shared),
        path=os.fsdecode(ffi.string(found.path)),
    )


def _struct(mapping: Mapping) -> CData:
    """What the C core needs to find a mapping again."""
    return ffi.new(
        "struct hu_ram_mapping *",
        {
            "start": mapping.start,
            "length_bytes": mapping.length_bytes,
            "offset_bytes": mapping.offset_bytes,
            "inode": mapping.inode,
            "shared": mapping.shared,
        },
    )


def _digest(result: CData) -> Digest:
    return Digest(low=result.low, high=result.high, pages=result.pages)


def _where(pid: int, mapping: Mapping) -> str:
    return f"pid {pid}, {mapping.path or 'anonymous memory'} at {mapping.start:#x}"
