"""A guest's RAM files: found, given a second name, proven to be the same."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hostupdate.errors import GuestError
from hostupdate.handover import ram_store
from hostupdate.parked import ParkedRecord
from tests.unit.test_parked import RECORD, UUID

_SLEEP = "import sys; print(flush=True); sys.stdin.read()"


@pytest.fixture
def top(tmp_path: Path) -> Iterator[Path]:
    """A directory in RAM."""
    path = Path("/dev/shm") / f"hu-test-{os.getpid()}"
    path.mkdir(mode=0o755)
    yield path
    subprocess.run(["rm", "-r", path], check=True)


def make(top: Path, home: str = "3-g1", blocks: tuple[str, ...] = ("pc.ram",)) -> Path:
    directory = top / "libvirt/qemu" / home
    directory.mkdir(parents=True)
    for block in blocks:
        (directory / block).write_bytes(b"r" * 8192)
    return directory


def backend(path: Path, **changes: Any) -> str:
    return json.dumps(
        {"qom-type": "memory-backend-file", "id": path.name, "mem-path": str(path), "share": True}
        | changes
    )


def find(*arguments: str) -> ram_store.GuestRam:
    """What is found for a process of these arguments."""
    argv = [sys.executable, "-c", _SLEEP, *arguments]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            return ram_store.find("g1", UUID, process.pid)
        finally:
            process.communicate()


def record_of(ram: ram_store.GuestRam) -> ParkedRecord:
    return msgspec.structs.replace(
        RECORD, ram_directory=str(ram.directory), short_name=ram.short_name, ram=ram.files
    )


def test_ram_is_found(top: Path) -> None:
    home = make(top, blocks=("ram-node0", "ram-node1", "plugged-in-later"))
    old = f"memory-backend-file,id=ram-node1,mem-path={home}/ram-node1,share=yes,size=8192"
    ram = find("-m", "1", "-object", backend(home / "ram-node0"), "-object", old)
    assert (ram.directory, ram.short_name) == (home.parent, "g1")
    assert ram.links == top / "hostupdate-parked" / UUID
    assert {file.block for file in ram.files} == {"ram-node0", "ram-node1", "plugged-in-later"}
    assert ram.size_bytes == 3 * 8192
    assert ram.files[0].inode == (home / ram.files[0].block).stat().st_ino


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"qom-type": "memory-backend-memfd"}, "memory-backend-memfd"),
        ({"qom-type": "memory-backend-ram"}, "memory-backend-ram"),
        ({"share": False}, "private"),
        ({"discard-data": True}, "throws its RAM away"),
        ({"mem-path": "/dev/shm/elsewhere/pc.ram"}, "not libvirt's"),
        ({"mem-path": "/dev/shm/9-g1/pc.ram"}, "cannot be looked at"),
    ],
)
def test_ram_that_cannot_be_kept(top: Path, changes: dict[str, Any], problem: str) -> None:
    home = make(top)
    with pytest.raises(GuestError, match=problem):
        find("-object", backend(home / "pc.ram", **changes))


@pytest.mark.parametrize(
    "argument",
    [
        '{"qom-type":"memory-backend-file","share":true',
        '{"qom-type":"memory-backend-file","share":true}',
    ],
)
def test_a_command_line_that_is_not_understood(top: Path, argument: str) -> None:
    home = make(top)
    with pytest.raises(GuestError, match="not understood"):
        find("-object", backend(home / "pc.ram"), "-object", argument)


def test_a_mount_of_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``mount -t tmpfs '' DIRECTORY``: its source has no characters at all."""
    device = tmp_path.stat().st_dev
    table = tmp_path / "mountinfo"
    table.write_text(
        f"36 35 {os.major(device)}:{os.minor(device)} / /mnt rw - tmpfs  rw,size=1k\n"
        "37 35 98:1 / /x rw - ext4 /dev/x rw\n"
    )
    real = open
    monkeypatch.setattr("builtins.open", lambda _path, **options: real(table, **options))
    assert ram_store.filesystem(tmp_path) == "tmpfs"


def test_ram_of_no_files() -> None:
    with pytest.raises(GuestError, match="private") as caught:
        find("-m", "512")
    assert "<source type='file'/>" in caught.value.remedy


def test_ram_in_two_places(top: Path) -> None:
    one, two = make(top), make(top, "4-g1")
    with pytest.raises(GuestError, match="several directories"):
        find("-object", backend(one / "pc.ram"), "-object", backend(two / "pc.ram"))


def test_a_file_without_a_name(top: Path) -> None:
    home = make(top)
    gone = backend(home / "gone")
    with pytest.raises(GuestError, match="no name"):
        find("-object", backend(home / "pc.ram"), "-object", gone)


def test_a_directory_that_is_not_libvirts(top: Path) -> None:
    home = make(top, "huge")
    with pytest.raises(GuestError, match="not libvirt's"):
        find("-object", backend(home / "pc.ram"))


def test_ram_on_a_disk() -> None:
    top = Path("/var/tmp") / f"hu-test-{os.getpid()}"
    if ram_store.filesystem(top.parent) == "tmpfs":
        pytest.skip("/var/tmp is in RAM")
    try:
        home = make(top)
        with pytest.raises(GuestError, match="written to a disk"):
            find("-object", backend(home / "pc.ram"))
    finally:
        subprocess.run(["rm", "-r", top], check=True)


def test_a_second_name_outlives_the_first(top: Path) -> None:
    home = make(top, blocks=("ram-node0", "ram-node1"))
    record = record_of(find("-object", backend(home / "ram-node0")))
    ram_store.link(record)
    ram_store.link(record)
    links = Path(record.ram[0].link).parent
    assert links.stat().st_mode & 0o777 == 0o700
    for block in ("ram-node0", "ram-node1"):
        (home / block).unlink()
    assert ram_store.problem_of(record) == ""
    ram_store.unlink(record)
    ram_store.unlink(record)
    assert not links.parent.exists()
    assert "cannot be found" in ram_store.problem_of(record)


def test_a_file_that_changed_before_it_was_linked(top: Path) -> None:
    home = make(top, blocks=("a", "b"))
    record = record_of(find("-object", backend(home / "a")))
    (home / "b").rename(home / "c")
    (home / "b").write_bytes(b"r" * 8192)
    with pytest.raises(GuestError, match="changed meanwhile"):
        ram_store.link(record)
    assert not Path(record.ram[0].link).exists()


def test_what_a_dead_run_has_left_is_replaced(top: Path) -> None:
    home = make(top)
    record = record_of(find("-object", backend(home / "pc.ram")))
    path = Path(record.ram[0].link)
    path.parent.mkdir(mode=0o700, parents=True)
    path.parent.parent.chmod(0o700)
    path.write_bytes(b"q" * 8192)
    ram_store.link(record)
    assert path.samefile(home / "pc.ram")


def test_a_file_that_changes_as_it_is_linked(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = make(top)
    record = record_of(find("-object", backend(home / "pc.ram")))
    real = os.link

    def link(source: Path, target: str, *, follow_symlinks: bool) -> None:
        real(source, target, follow_symlinks=follow_symlinks)
        os.truncate(target, 4096)

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(GuestError, match="4096 bytes"):
        ram_store.link(record)
    assert not (top / "hostupdate-parked").exists()


def test_a_directory_that_others_may_enter(top: Path) -> None:
    home = make(top)
    record = record_of(find("-object", backend(home / "pc.ram")))
    (top / "hostupdate-parked").mkdir(mode=0o755)
    with pytest.raises(GuestError, match="others"):
        ram_store.link(record)


def test_another_owners_directory_is_not_followed(top: Path) -> None:
    home = make(top)
    record = record_of(find("-object", backend(home / "pc.ram")))
    (top / "hostupdate-parked").symlink_to(home)
    with pytest.raises(GuestError, match="others"):
        ram_store.link(record)


def test_what_has_become_of_a_parked_file(top: Path) -> None:
    home = make(top)
    record = record_of(find("-object", backend(home / "pc.ram")))
    ram_store.link(record)
    path = Path(record.ram[0].link)
    os.truncate(path, 4096)
    assert "4096 bytes, not 8192" in ram_store.problem_of(record)
    path.rename(path.with_name("aside"))
    path.write_bytes(b"r" * 8192)
    assert "replaced" in ram_store.problem_of(record)


def test_whose_memory_it_is(top: Path) -> None:
    home = make(top)
    record = record_of(find("-object", backend(home / "pc.ram")))
    ram_store.link(record)
    assert not ram_store.is_mapped(record, os.getpid())
    with (home / "pc.ram").open("rb+") as file:
        private = mmap.mmap(file.fileno(), 8192, flags=mmap.MAP_PRIVATE)
        assert not ram_store.is_mapped(record, os.getpid())
        with mmap.mmap(file.fileno(), 8192):
            assert ram_store.is_mapped(record, os.getpid())
        private.close()
