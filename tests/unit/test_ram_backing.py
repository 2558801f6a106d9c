"""Which mount holds a RAM file."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import msgspec
import pytest

from hostupdate.eligibility import RamBackend
from hostupdate.errors import HypervisorError
from hostupdate.handover import inquiry
from hostupdate.host import ram_backing
from tests.requirements import need

MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw,errors=remount-ro
24 22 0:20 / /dev/shm rw,nosuid shared:3 - tmpfs tmpfs rw,inode64
25 24 0:31 / /dev/shm/hu\\040ram rw - tmpfs none rw,noswap,size=1g
26 22 0:32 / /dev/hugepages rw - hugetlbfs hugetlbfs rw,pagesize=2M
27 22 259:0 / /run/pmem rw,relatime - ext4 /dev/pmem0 rw,dax=always
28 22 0:33 / /mnt rw - tmpfs a rw
29 22 0:34 / /mnt rw - xfs b rw
torn line
"""


@pytest.mark.parametrize(
    ("path", "file_system", "options"),
    [
        ("/var/lib/ram", "ext4", {"errors=remount-ro"}),
        ("/dev/shm/x", "tmpfs", {"inode64", "nosuid"}),
        ("/dev/shmx", "ext4", set()),
        ("/dev/shm/hu ram/libvirt/pc.ram", "tmpfs", {"noswap"}),
        ("/mnt/a", "xfs", set()),
    ],
)
def test_the_deepest_and_last_mount_counts(path: str, file_system: str, options: set[str]) -> None:
    mount = ram_backing.mount_of(path, MOUNTS)
    assert mount is not None and mount.file_system == file_system
    assert options <= mount.options


def test_no_mount_at_all() -> None:
    assert ram_backing.mount_of("/x", "") is None


def backend(path: str) -> RamBackend:
    return RamBackend(id="pc.ram", kind="file", size_bytes=1, shared=True, path=path)


@pytest.mark.parametrize(
    ("path", "known"),
    [
        ("/dev/shm/hu ram/pc.ram", {"named": True, "file_system": "tmpfs", "noswap": True}),
        ("/dev/shm/gone", {"file_system": "tmpfs"}),
        ("/dev/hugepages", {"file_system": "hugetlbfs"}),  # a directory: the file has no name
        ("/run/pmem/pc.ram", {"named": True, "file_system": "ext4", "dax": True}),
        ("", {}),
    ],
)
def test_a_backend_is_completed_as_its_qemu_sees_it(
    tmp_path: Path, path: str, known: dict[str, object]
) -> None:
    (tmp_path / "mountinfo").write_text(MOUNTS)
    for name in ("dev/shm/hu ram/pc.ram", "run/pmem/pc.ram", "dev/hugepages/x"):
        file = tmp_path / "root" / name
        file.parent.mkdir(parents=True)
        file.touch()
    found = ram_backing.complete((backend(path),), tmp_path)
    assert found == (msgspec.structs.replace(backend(path), **known),)


def test_a_process_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        ram_backing.complete((backend("/x"),), tmp_path / "gone")


def test_this_host_is_read() -> None:
    shm = ram_backing.complete((backend("/dev/shm/none"),), Path(f"/proc/{os.getpid()}"))
    assert shm[0].file_system == "tmpfs" and not shm[0].named


def test_swap_is_added_up(tmp_path: Path) -> None:
    swaps = tmp_path / "swaps"
    swaps.write_text("Filename Type Size Used Priority\n")
    assert ram_backing.swap_bytes(swaps) == 0
    swaps.write_text("Filename Type Size Used\n/a\\040b file 4 0\n/dev/sdb partition 1020 8\n")
    assert ram_backing.swap_bytes(swaps) == 1 << 20


def test_security_drivers(tmp_path: Path) -> None:
    assert ram_backing.security_drivers(tmp_path) == frozenset()
    (tmp_path / "lsm").write_text("lockdown,yama,apparmor")
    assert "apparmor" in ram_backing.security_drivers(tmp_path)


def test_a_qemu_is_asked_for_its_backends_and_blockers() -> None:
    properties = {
        "/objects/pc.ram": {"size": 7, "share": True, "mem-path": "/r", "discard-data": True},
        "/objects/m": {"size": 8, "share": True},
    }

    def command(name: str, arguments: object, *, fd: int | None = None) -> object:
        assert isinstance(arguments, dict)
        match name:
            case "qom-list":
                kinds = {"pc.ram": "memory-backend-file", "m": "memory-backend-memfd", "o": "rng"}
                return [{"name": n, "type": f"child<{k}>"} for n, k in kinds.items()]
            case "qom-get":
                found = properties[arguments["path"]]
                if arguments["property"] not in found:
                    raise HypervisorError("no such property")
                return found[arguments["property"]]
            case "query-migrate":
                return {"blocked-reasons": ["a device"]}
            case "query-block-jobs":
                return [{"device": "job0", "type": "commit"}]
        raise AssertionError(name)

    assert inquiry.backends(command) == (
        RamBackend(id="pc.ram", kind="file", size_bytes=7, shared=True, discard=True, path="/r"),
        RamBackend(id="m", kind="memfd", size_bytes=8, shared=True),
    )
    assert inquiry.blockers(command) == ("a device",)
    assert inquiry.block_jobs(command) == ("job0",)


@pytest.mark.parametrize(
    ("mode", "made", "foreign"),
    [(0o755, "", False), (0o1777, "", True), (0o1777, "d {} 0755", False)],
)
def test_who_else_may_decide_where_ram_lies(
    tmp_path: Path, mode: int, made: str, foreign: bool
) -> None:
    need("root")
    base = Path(tempfile.mkdtemp(dir="/run"))  # every directory above is root's alone
    try:
        room = base / "room"
        room.mkdir()
        room.chmod(mode)
        (tmp_path / "own.conf").write_text(made.format(room / "hostupdate"))
        found = ram_backing._foreign(room / "hostupdate", tmp_path)
        assert found == (f"everybody may write to {room}" if foreign else "")
        os.chown(room, 65534, 65534)
        assert ram_backing._foreign(room / "x", tmp_path) == f"{room} is not root's"
        assert ram_backing._foreign(room, tmp_path) == f"{room} is not root's"
    finally:
        shutil.rmtree(base)


def test_a_directory_that_is_not_there_yet_is_known_by_its_mount() -> None:
    found = ram_backing.backing_directory(Path("/dev/shm/hu-not-there/below"))
    assert found.file_system == "tmpfs" and found.path == "/dev/shm/hu-not-there/below"
    assert found.total_bytes is None or found.total_bytes >= (found.free_bytes or 0) > 0
