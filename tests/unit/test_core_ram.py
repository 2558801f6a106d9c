"""Guest RAM seen through the C core, on small processes that mark memory as QEMU does."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from hostupdate.core import ram
from hostupdate.core.ram import Backing, Digest, Mapping
from hostupdate.errors import CoreError
from tests.requirements import need

MIB = 1 << 20
PAGE = 4096

Child = subprocess.Popen[str]

#: Opening what is in /proc/PID/map_files takes CAP_CHECKPOINT_RESTORE.
needs_root = pytest.mark.usefixtures("root")

#: A process that does what it reads from its standard input, a line each, and answers.
GUEST = textwrap.dedent(
    """
    import mmap, os, sys

    MIB = 1 << 20
    PAGE = 4096

    def shared(length=MIB):
        fd = os.memfd_create("guest")
        os.ftruncate(fd, length)
        block = mmap.mmap(fd, length, mmap.MAP_SHARED)
        block.madvise(mmap.MADV_DONTFORK)
        return block

    def private(length=MIB):
        block = mmap.mmap(-1, length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        block.madvise(mmap.MADV_NOHUGEPAGE)
        block.madvise(mmap.MADV_DONTFORK)
        return block

    for line in sys.stdin:
        exec(line)
        print("done", flush=True)
    """
)


@pytest.fixture
def root() -> None:
    need("root")


def tell(child: Child, line: str) -> None:
    assert child.stdin is not None and child.stdout is not None
    child.stdin.write(line + "\n")
    child.stdin.flush()
    assert child.stdout.readline() == "done\n"


@pytest.fixture
def child() -> Iterator[Child]:
    with subprocess.Popen(
        [sys.executable, "-c", GUEST], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        yield child
        child.kill()


@pytest.fixture
def guest(child: Child) -> Child:
    """With a shared and a private block of 1 MiB of the same content: 3 pages of data."""
    tell(child, "blocks = [shared(), private()]")
    for page in (0, 7, 254):
        tell(child, f"for block in blocks: block[{page * PAGE + 9}] = {page + 1}")
    return child


def block(found: tuple[Mapping, ...], backing: Backing) -> Mapping:
    (mapping,) = (mapping for mapping in found if mapping.backing is backing)
    return mapping


def error_of(call: Callable[[], object]) -> int:
    with pytest.raises(CoreError) as caught:
        call()
    return caught.value.errno


def test_mappings(guest: Child) -> None:
    found = ram.mappings(guest.pid)
    assert len(found) == 2

    memfd = block(found, Backing.MEMFD)
    assert memfd.shared
    assert memfd.path == "/memfd:guest (deleted)"
    assert memfd.inode != 0
    assert (memfd.length_bytes, memfd.offset_bytes) == (MIB, 0)
    assert memfd.resident_bytes == 3 * PAGE

    anonymous = block(found, Backing.ANONYMOUS)
    assert not anonymous.shared
    assert (anonymous.path, anonymous.inode) == ("", 0)
    assert anonymous.resident_bytes == 3 * PAGE
    assert anonymous.swapped_bytes == 0
    assert anonymous.locked_bytes == 0


def test_mappings_of_a_process_without_any(child: Child) -> None:
    tell(child, "pass")
    assert ram.mappings(child.pid) == ()


def test_more_mappings_than_expected(child: Child) -> None:
    # Each of its own file, so that the kernel does not merge them.
    tell(child, "blocks = [shared(PAGE) for _ in range(300)]")
    assert len(ram.mappings(child.pid)) == 300


@needs_root
def test_backing_by_file_system(child: Child, tmp_path: Path) -> None:
    tell(child, "import tempfile; file = tempfile.TemporaryFile(dir='/dev/shm')")
    tell(child, "file.truncate(MIB); block = mmap.mmap(file.fileno(), MIB, mmap.MAP_SHARED)")
    tell(child, "block.madvise(mmap.MADV_DONTFORK)")
    (mapping,) = ram.mappings(child.pid)
    assert (mapping.backing, mapping.shared) == (Backing.SHMEM, True)
    assert mapping.path.startswith("/dev/shm/")


def test_gone(guest: Child) -> None:
    found = ram.mappings(guest.pid)
    guest.kill()
    guest.wait()
    assert error_of(lambda: ram.mappings(guest.pid)) == errno.ESRCH
    for mapping in found:
        assert error_of(partial(ram.digest_process, guest.pid, mapping)) == errno.ESRCH
    memfd = block(found, Backing.MEMFD)
    assert error_of(lambda: ram.open_mapping(guest.pid, memfd)) == errno.ESRCH


def test_errors_name_the_mapping(guest: Child) -> None:
    anonymous = block(ram.mappings(guest.pid), Backing.ANONYMOUS)
    with pytest.raises(CoreError) as caught:
        ram.open_mapping(guest.pid, anonymous)
    assert caught.value.errno == errno.EINVAL
    assert f"pid {guest.pid}, anonymous memory at {anonymous.start:#x}" in str(caught.value)


@needs_root
def test_open_keeps_the_ram(guest: Child) -> None:
    memfd = block(ram.mappings(guest.pid), Backing.MEMFD)
    before = ram.digest_process(guest.pid, memfd)
    fd = ram.open_mapping(guest.pid, memfd)
    try:
        assert not os.get_inheritable(fd)
        guest.kill()
        guest.wait()
        assert os.pread(fd, 1, 7 * PAGE + 9) == b"\x08"
        assert ram.digest_file(fd, length_bytes=MIB) == before
    finally:
        os.close(fd)


@needs_root
def test_digest_is_the_same_by_both_ways(guest: Child) -> None:
    found = ram.mappings(guest.pid)
    shared = ram.digest_process(guest.pid, block(found, Backing.MEMFD))
    private = ram.digest_process(guest.pid, block(found, Backing.ANONYMOUS))
    assert shared == private
    assert shared.pages == 3
    assert ram.mappings(guest.pid) == found  # nothing was touched


def test_digest_sees_a_bit(guest: Child) -> None:
    anonymous = block(ram.mappings(guest.pid), Backing.ANONYMOUS)
    before = ram.digest_process(guest.pid, anonymous)
    assert ram.digest_process(guest.pid, anonymous) == before
    tell(guest, f"blocks[1][{100 * PAGE}] ^= 1")
    after = ram.digest_process(guest.pid, anonymous)
    assert (before.pages, after.pages) == (3, 4)
    assert before.hex != after.hex
    tell(guest, f"blocks[1][{100 * PAGE}] ^= 1")
    assert ram.digest_process(guest.pid, anonymous) == before


def test_digest_file() -> None:
    fd = os.memfd_create("digest")
    try:
        os.truncate(fd, 4 * MIB)
        assert ram.digest_file(fd, length_bytes=4 * MIB) == Digest(low=0, high=0, pages=0)
        os.pwrite(fd, b"x", MIB + 5)
        digest = ram.digest_file(fd, length_bytes=4 * MIB)
        assert digest.pages == 1
        assert len(digest.hex) == 32
        assert ram.digest_file(fd, offset_bytes=MIB, length_bytes=MIB).pages == 1
        assert ram.digest_file(fd, offset_bytes=2 * MIB, length_bytes=MIB).pages == 0
        assert error_of(lambda: ram.digest_file(fd, offset_bytes=1, length_bytes=1)) == errno.EINVAL

        os.pwrite(fd, b"x" * 4 * MIB, 0)
        assert ram.digest_file(fd, length_bytes=4 * MIB, sample_pages=100).pages == 100
    finally:
        os.close(fd)


@needs_root
def test_digest_of_a_guest(guest: Child) -> None:
    found = ram.mappings(guest.pid)
    before = ram.digest_guest(guest.pid, found)
    assert before.pages == 6
    assert ram.digest_guest(guest.pid, reversed(found)) == before
    assert ram.digest_guest(guest.pid, found[:1]) != before
    tell(guest, "blocks[0][0] += 1")
    assert ram.digest_guest(guest.pid, found) != before


@needs_root
def test_sampled_digest_of_a_guest(child: Child) -> None:
    tell(child, "blocks = [shared(), private(3 * MIB), private(PAGE)]")
    tell(child, "for block in blocks: block[:] = b'x' * len(block)")
    found = ram.mappings(child.pid)
    sampled = ram.digest_guest(child.pid, found, sample_pages=100)
    assert 100 <= sampled.pages <= 103  # shares are rounded up
    assert ram.digest_guest(child.pid, found, sample_pages=100) == sampled
    assert ram.digest_guest(child.pid, found).pages == 1024 + 1


def test_digest_of_nothing() -> None:
    assert ram.digest_guest(os.getpid(), ()).pages == 0
