"""The initramfs writer: the bytes that the kernel's unpacker expects, the same every time."""

from __future__ import annotations

import shutil
import stat
import subprocess

import pytest

from hostupdate.lab import cpio

ENTRIES = [
    cpio.program("bin/tool", b"\x7fELF!"),
    cpio.directory("bin"),
    cpio.text("etc", "x\n"),
    cpio.link("bin/sh", "/bin/tool"),
]


def test_a_member_is_written_as_the_format_says() -> None:
    data = cpio.archive([cpio.text("ab", "hello")])
    header = data[:110].decode()
    assert header[:6] == "070701"
    fields = [int(header[6 + 8 * i : 14 + 8 * i], 16) for i in range(13)]
    assert fields == [1, stat.S_IFREG | 0o644, 0, 0, 1, 0, 5, 0, 0, 0, 0, 3, 0]
    assert data[110:116] == b"ab" + b"\0" * 4
    assert data[116:124] == b"hello\0\0\0"
    assert b"TRAILER!!!\0" in data[124:]
    assert len(data) % 4 == 0


def test_order_of_entries_does_not_matter_and_directories_come_first() -> None:
    data = cpio.archive(ENTRIES)
    assert data == cpio.archive(reversed(ENTRIES))
    assert data.index(b"bin\0") < data.index(b"bin/sh\0") < data.index(b"bin/tool\0")


def test_a_name_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="twice"):
        cpio.archive([cpio.directory("a"), cpio.text("a", "")])


@pytest.mark.skipif(shutil.which("cpio") is None, reason="the program cpio is not installed")
def test_the_program_cpio_reads_it() -> None:
    done = subprocess.run(
        ["cpio", "-t", "--quiet"], input=cpio.archive(ENTRIES), capture_output=True, timeout=10
    )
    assert done.stdout.decode().split() == ["bin", "bin/sh", "bin/tool", "etc"]
