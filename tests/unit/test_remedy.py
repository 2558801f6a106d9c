"""The changes that make a guest eligible touch nothing else."""

from __future__ import annotations

import difflib

import msgspec
import pytest

from hostupdate.errors import InputError, RefusedError
from hostupdate.remedy import (
    BackingDirectory,
    judge_directory,
    memory_backing_dir,
    remedy_changes,
)

DOMAIN = """\
<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>müller &amp; g1</name>
  <metadata>
    <x:note xmlns:x="urn:x"><memoryBacking/><![CDATA[<memoryBacking>]]></x:note>
  </metadata>
  <memory unit='KiB'>1048576</memory>
  <currentMemory unit='KiB'>1048576</currentMemory>{backing}
  <vcpu placement='static'>1</vcpu>
  <cpu><numa>
    <cell id='0' cpus='0' memory='524288' memAccess='{access}'/>
    <cell id='1' memory='524288' memAccess="private"></cell>
  </numa></cpu>
  <devices>
    <memory model='dimm' access='{access}'>
      <target><size>1</size></target>
    </memory>
  </devices>
  <qemu:commandline><qemu:arg value='-no-acpi'/></qemu:commandline>
</domain>
"""
RIGHT = """
  <memoryBacking>
    <source type="file" />
    <access mode="shared" />
  </memoryBacking>"""
ROOM = "/dev/shm/hostupdate"


def changed(before: str, after: str) -> list[str]:
    """Lines that went and came, without the heading of the difference."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm="")
    return [line for line in list(lines)[2:] if not line.startswith("@@")]


def domain(backing: str, access: str = "shared") -> str:
    return DOMAIN.format(backing=backing, access=access).replace('"private"', f'"{access}"')


def test_a_guest_without_memory_backing_gets_one() -> None:
    after, _ = remedy_changes(domain(""), "", ROOM)
    assert changed(domain(""), after) == [f"+{line}" for line in RIGHT.splitlines()[1:]]


@pytest.mark.parametrize(
    ("before", "kept"),
    [
        ("<source type='memfd'/><access mode='shared'/>", ""),
        ("<source type='anonymous'/>", ""),
        ("<access mode='private'/>", ""),
        ("<source type='file'/><access mode='shared'/><discard/>", ""),
        ("<locked/><source type='memfd'/>", "locked"),
        ("<nosharepages/><allocation mode='immediate'/>", "nosharepages"),
    ],
)
def test_memory_backing_is_corrected_and_the_rest_of_it_kept(before: str, kept: str) -> None:
    text = domain(f"\n  <memoryBacking>{before}</memoryBacking>")
    after, _ = remedy_changes(text, "", ROOM)
    differing = changed(text, after)
    assert [line for line in differing if line.startswith("-")] == [
        f"-  <memoryBacking>{before}</memoryBacking>"
    ]
    assert '<source type="file" />' in after and '<access mode="shared" />' in after
    assert "discard" not in after and "memfd" not in after and (f"<{kept}" in after or not kept)
    assert remedy_changes(after, "", ROOM)[0] == after


def test_what_is_right_is_not_touched() -> None:
    text = domain("\n  <memoryBacking><source type='file'/><access mode='shared'/></memoryBacking>")
    assert remedy_changes(text, "", ROOM)[0] == text


def test_private_cells_and_memory_devices_are_shared() -> None:
    text = domain(RIGHT, "private")
    after, _ = remedy_changes(text, "", ROOM)
    assert len(changed(text, after)) == 6
    assert after == domain(RIGHT, "shared")


def test_huge_pages_need_a_directory_of_huge_pages() -> None:
    text = domain("<memoryBacking><hugepages/></memoryBacking>")
    with pytest.raises(RefusedError, match="huge pages") as refused:
        remedy_changes(text, "", ROOM)
    assert "hugetlbfs" in refused.value.remedy
    after, _ = remedy_changes(text, "", "/dev/hugepages/hu", on_hugetlbfs=True)
    assert "hugepages" not in after and '<source type="file" />' in after


CONF = '# a comment\n#memory_backing_dir = "/var/lib/libvirt/qemu/ram"\nuser = "root"\n'


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (CONF, CONF.replace('ram"\n', f'ram"\nmemory_backing_dir = "{ROOM}"\n')),
        ('user = "a"\n', f'user = "a"\nmemory_backing_dir = "{ROOM}"\n'),
        ('user = "a"', f'user = "a"\nmemory_backing_dir = "{ROOM}"\n'),
        ("", f'memory_backing_dir = "{ROOM}"\n'),
        ('  memory_backing_dir="/x"  # y\nz = 1\n', f'memory_backing_dir = "{ROOM}"\nz = 1\n'),
        (f'memory_backing_dir = "{ROOM}"\n', f'memory_backing_dir = "{ROOM}"\n'),
    ],
)
def test_qemu_conf_names_the_directory(before: str, after: str) -> None:
    assert remedy_changes(domain(RIGHT), before, ROOM)[1] == after
    assert remedy_changes(domain(RIGHT), after, ROOM)[1] == after


@pytest.mark.parametrize("directory", ["", "dev/shm", '/a"b', "/a\nb", "/a\\b"])
def test_a_directory_that_qemu_conf_cannot_name_is_refused(directory: str) -> None:
    with pytest.raises(InputError):
        remedy_changes(domain(""), "", directory)


@pytest.mark.parametrize("text", ["", "<domain>", "<network/>", "<domain><name>g</name></domain>"])
def test_what_is_no_domain_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="domain XML"):
        remedy_changes(text, "", ROOM)


@pytest.mark.parametrize(
    ("conf", "directory"),
    [("", None), (CONF, None), ('memory_backing_dir="/a"\n memory_backing_dir = "/b" # c\n', "/b")],
)
def test_the_directory_that_qemu_conf_names_is_found(conf: str, directory: str | None) -> None:
    assert memory_backing_dir(conf) == directory


GIB = 1 << 30
TMPFS = BackingDirectory(
    path=ROOM, file_system="tmpfs", dax=False, noswap=False, total_bytes=8 * GIB, free_bytes=4 * GIB
)


@pytest.mark.parametrize(
    ("changes", "swap", "reason", "warning"),
    [
        ({}, 0, "", ""),
        ({}, 1, "", "may be swapped out"),
        ({"noswap": True}, 1, "", ""),
        ({"file_system": "hugetlbfs"}, 1, "", ""),
        ({"file_system": "ext4"}, 0, "is on ext4", ""),
        ({"file_system": "ext4", "dax": True}, 0, "", ""),
        ({"file_system": ""}, 0, "is on no file system", ""),
        ({"free_bytes": GIB}, 0, "", "1024 MiB left, the guest needs 2048"),
        ({"total_bytes": GIB, "free_bytes": 1}, 0, "holds 1024 MiB, the guest has 2048", ""),
        ({"total_bytes": None, "free_bytes": None}, 0, "", ""),
        ({"foreign": "everybody may write to /dev/shm"}, 0, "", "'d /dev/shm/hostupdate 0755"),
    ],
)
def test_a_directory_is_judged(
    changes: dict[str, object], swap: int, reason: str, warning: str
) -> None:
    found = judge_directory(msgspec.structs.replace(TMPFS, **changes), 2 * GIB, swap)
    for texts, words in zip(found, (reason, warning), strict=True):
        assert len(texts) == (1 if words else 0)
        assert not words or words in texts[0]
