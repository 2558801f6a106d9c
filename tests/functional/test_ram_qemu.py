"""The rule by which RAM blocks are found, against what QEMU itself says of its blocks."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from qemu.qmp import QMPClient

from hostupdate.core import ram
from hostupdate.core.ram import Backing
from tests.requirements import need

MIB = 1 << 20
RAM_MIB = 64


@contextmanager
def qemu(directory: Path, *arguments: str) -> Iterator[tuple[int, list[int]]]:
    """A stopped QEMU: its pid, and the sizes of all its RAM blocks by its own account."""
    socket = directory / "qmp"
    command = ["qemu-system-x86_64", "-S", "-display", "none", "-nodefaults", "-accel", "tcg"]
    command += ["-m", str(RAM_MIB), "-vga", "std", "-device", "e1000"]
    command += ["-qmp", f"unix:{socket},server=on,wait=on", *arguments]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            yield process.pid, asyncio.run(block_sizes(socket))
        finally:
            process.kill()


async def block_sizes(socket: Path) -> list[int]:
    client = QMPClient("ram")
    for _ in range(200):
        try:
            await client.connect(str(socket))
            break
        except Exception:  # qemu.qmp wraps whatever kept it from connecting
            await asyncio.sleep(0.05)
    command = {"command-line": "info ramblock"}
    text = await client.execute("human-monitor-command", command)
    await client.disconnect()
    return sorted(int(line.split()[-1], 16) for line in str(text).splitlines()[1:] if line)


def backend(kind: str, **options: object) -> list[str]:
    settings = {"qom-type": kind, "id": "r", "size": RAM_MIB * MIB, **options}
    return ["-object", json.dumps(settings), "-machine", "memory-backend=r"]


@pytest.mark.parametrize(
    ("kind", "options", "place", "backing", "shared"),
    [
        ("memory-backend-ram", {}, None, Backing.ANONYMOUS, False),
        ("memory-backend-ram", {"share": True}, None, Backing.ANONYMOUS, True),
        ("memory-backend-memfd", {"share": True}, None, Backing.MEMFD, True),
        ("memory-backend-file", {"share": True}, "/dev/shm", Backing.SHMEM, True),
        ("memory-backend-file", {"share": True}, "/var/tmp", Backing.FILE, True),
        ("memory-backend-file", {"share": False}, "/var/tmp", Backing.FILE, False),
    ],
)
def test_blocks(
    kind: str,
    options: dict[str, object],
    place: str | None,
    backing: Backing,
    shared: bool,
    tmp_path: Path,
) -> None:
    need("root", "qemu")
    with TemporaryDirectory(dir=place) as directory:
        if place is not None:
            options = {**options, "mem-path": f"{directory}/ram"}
        with qemu(tmp_path, *backend(kind, **options)) as (pid, sizes):
            found = ram.mappings(pid)
            assert sorted(mapping.length_bytes for mapping in found) == sizes

            (main,) = (m for m in found if m.length_bytes == RAM_MIB * MIB)
            assert (main.backing, main.shared) == (backing, shared)

            before = ram.digest_guest(pid, found)
            assert before.pages > 10  # the firmware at the least
            assert ram.digest_guest(pid, found) == before
            assert ram.mappings(pid) == found  # nothing was touched
            if shared:
                fd = ram.open_mapping(pid, main)
                try:
                    assert os.fstat(fd).st_size == RAM_MIB * MIB
                finally:
                    os.close(fd)
