"""The hook: a shell script that libvirt runs before a guest starts, run as libvirt runs it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import msgspec
import pytest

from hostupdate.errors import InputError, PrerequisiteError
from hostupdate.handover.domain import with_ticket
from hostupdate.handover.hook import Hook
from hostupdate.parked import ParkedRecord, RamFile
from tests.unit.test_parked import RECORD, UUID

ID = 7
TICKET = "0123456789abcdef"


class World:
    """A parked guest, libvirt's RAM directory for its next start, and the hook."""

    def __init__(self, top: Path, name: str = "g1") -> None:
        self.directory = top / "shm with room/libvirt/qemu"
        self.links = top / "shm with room/hostupdate-parked" / UUID
        self.home = self.directory / f"{ID}-{name[:20]}"
        self.home.mkdir(parents=True)
        self.links.mkdir(parents=True)
        files = []
        for block in ("ram-node0", "ram-node1"):
            path = self.links / block
            path.write_bytes(block.encode())
            status = path.stat()
            files.append(
                RamFile(
                    block=block,
                    link=str(path),
                    size_bytes=status.st_size,
                    inode=status.st_ino,
                    device=status.st_dev,
                )
            )
        self.record: ParkedRecord = msgspec.structs.replace(
            RECORD,
            name=name,
            ram_directory=str(self.directory),
            short_name=name[:20],
            ram=tuple(files),
        )
        self.hook = Hook(top / "hooks/qemu.d/hostupdate", top / "state/hook")
        self.hook.install()

    def call(
        self,
        operation: str = "start",
        sub: str = "begin",
        *,
        name: str = "",
        uuid: str = UUID,
        ticket: str = TICKET,
        metadata: str = "",
    ) -> subprocess.CompletedProcess[str]:
        name = name or self.record.name
        xml = (
            f"<domain type='kvm' id='{ID}' xmlns:q='x'>\n  <name>{name}</name>\n"
            f"  <uuid>{uuid}</uuid>\n  <memory unit='KiB'>1</memory>\n" + " <x/>\n" * 20000
        )
        if ticket:
            xml = with_ticket(xml + "</domain>", ticket, "test")
            xml = xml.replace("<metadata>", "\n  <metadata>")  # as libvirt writes it
            xml = xml.replace("</metadata>", f"{metadata}</metadata>")
        return subprocess.run(
            [self.hook.path, name, operation, sub, "-"],
            input=xml,
            capture_output=True,
            text=True,
            env={"PATH": os.environ["PATH"]},
            check=False,
        )

    def refusal(self, **arguments: str) -> str:
        ended = self.call(**arguments)
        assert ended.returncode == 1 and ended.stdout == ""
        assert list(self.home.iterdir()) == [] or "cannot be linked" in ended.stderr
        return ended.stderr


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def passes(ended: subprocess.CompletedProcess[str]) -> bool:
    assert ended.stdout == ""  # libvirt would take it for XML
    return ended.returncode == 0 and ended.stderr == ""


@pytest.mark.parametrize("name", ["g1", "a guest's name of some length", "bläck-Gästlein-nö-1"])
def test_its_ram_is_given_back_to_whom_we_start(tmp_path: Path, name: str) -> None:
    world = World(tmp_path, name)
    world.hook.guard(world.record)
    world.hook.allow(world.record, TICKET)
    assert passes(world.call("prepare"))
    assert list(world.home.iterdir()) == []
    assert passes(world.call("start"))
    for ram in world.record.ram:
        assert (world.home / ram.block).stat().st_ino == ram.inode


def test_nobody_else_starts_it(world: World) -> None:
    world.hook.guard(world.record)
    for operation in ("prepare", "start"):
        said = world.refusal(operation=operation)
        assert "hostupdate resume" in said and RECORD.run_id in said


def test_nor_do_we_once_we_are_dead(world: World) -> None:
    world.hook.guard(world.record)
    world.hook.allow(world.record, TICKET)
    path = world.hook.state / UUID
    text = path.read_text()
    ours = f"unpark {os.getpid()} "
    assert ours in text
    path.write_text(text.replace(ours, ours + "1"))  # another process of this pid
    assert "hostupdate resume" in world.refusal()
    path.write_text(text.replace(ours, "unpark 999999999 "))
    assert "hostupdate resume" in world.refusal()


def test_nor_while_nobody_has_taken_note_of_our_death(world: World) -> None:
    world.hook.guard(world.record)
    world.hook.allow(world.record, TICKET)
    with subprocess.Popen(["true"]) as dead:
        stat = Path(f"/proc/{dead.pid}/stat")
        while ") Z " not in stat.read_text():
            pass
        started = stat.read_text().rpartition(")")[2].split()[19]
        path = world.hook.state / UUID
        lines = path.read_text().splitlines()
        lines[1] = f"unpark {dead.pid} {started}"
        path.write_text("\n".join(lines) + "\n")
        assert "hostupdate resume" in world.refusal()


def test_what_owners_have_in_their_metadata_says_nothing(world: World) -> None:
    world.hook.guard(world.record)
    world.hook.allow(world.record, TICKET)
    other = "\n<uuid>other</uuid>\n<domain id='8'>\n"
    assert passes(world.call(metadata=other))
    assert len(list(world.home.iterdir())) == 2
    world.hook.guard(world.record)
    assert "hostupdate resume" in world.call(metadata=other).stderr


@pytest.mark.parametrize("ticket", ["", "0123456789abcdee", "0123456789abcde", "0123456789abcdeff"])
def test_nor_does_anybody_while_we_do(world: World, ticket: str) -> None:
    """Whoever starts it at that moment, without our image, would boot it on its parked RAM."""
    world.hook.guard(world.record)
    world.hook.allow(world.record, TICKET)
    for operation in ("prepare", "start"):
        assert "hostupdate resume" in world.refusal(operation=operation, ticket=ticket)
    assert passes(world.call())


def test_another_guest_of_its_name(world: World) -> None:
    world.hook.guard(world.record)
    world.hook.allow(world.record, TICKET)
    assert "the name g1" in world.refusal(uuid=UUID.replace("4", "5"))


def test_other_guests_and_operations(world: World) -> None:
    world.hook.guard(world.record)
    other = UUID.replace("4", "5")
    assert passes(world.call(name="g2", uuid=other))
    assert passes(world.call(name="..", uuid=other))
    for operation, sub in (("stopped", "end"), ("release", "end"), ("reconnect", "begin")):
        assert passes(world.call(operation, sub))
    world.hook.release(world.record)
    assert passes(world.call())
    assert list(world.home.iterdir()) == []


def test_without_any_parked_guest(world: World) -> None:
    assert passes(world.call())
    (world.hook.state / "name").rmdir()
    world.hook.state.rmdir()
    assert passes(world.call())


def test_it_says_that_it_is_called(world: World) -> None:
    ended = world.call("prepare", name="hostupdate-hook-probe")
    assert ended.returncode == 1 and "is called" in ended.stderr


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("spoil", ["missing", "longer", "replaced", "link", "directory"])
def test_ram_that_is_not_as_it_was(world: World, spoil: str, block: int) -> None:
    world.hook.guard(world.record)
    world.hook.allow(world.record, TICKET)
    path = Path(world.record.ram[block].link)
    data = path.read_bytes()
    if spoil == "longer":
        path.write_bytes(data + b"x")
    else:
        path.rename(path.with_name("aside"))
    if spoil == "replaced":
        path.write_bytes(data)
    if spoil == "link":
        path.symlink_to("/dev/null")
    if spoil == "directory":
        path.mkdir()
    ended = world.call()
    assert ended.returncode == 1 and "its RAM file" in ended.stderr
    assert path.name in ended.stderr


def test_libvirt_keeps_ram_elsewhere(world: World) -> None:
    world.hook.guard(world.record)
    world.hook.allow(world.record, TICKET)
    world.home.rename(world.home.with_name(f"{ID}-g12"))
    assert "elsewhere" in world.call().stderr


def test_a_file_that_is_there_already(world: World) -> None:
    world.hook.guard(world.record)
    world.hook.allow(world.record, TICKET)
    (world.home / "ram-node1").touch()
    assert "cannot be linked" in world.refusal()


@pytest.mark.parametrize("lines", range(7))
def test_half_of_what_it_must_know(world: World, lines: int) -> None:
    """It refuses, whatever it has done until then: libvirt removes the directory."""
    world.hook.guard(world.record)
    world.hook.allow(world.record, TICKET)
    path = world.hook.state / UUID
    text = path.read_text().splitlines(keepends=True)
    path.write_text("".join(text[:lines]))
    assert world.call().returncode == 1


def test_it_is_installed_beside_others_and_taken_away(world: World) -> None:
    other = world.hook.path.with_name("other")
    other.write_text("#!/bin/sh\n")
    world.hook.guard(world.record)
    world.hook.uninstall()
    assert world.hook.path.exists()  # a guest is parked
    world.hook.release(world.record)
    world.hook.uninstall()
    world.hook.uninstall()
    assert [path.name for path in world.hook.path.parent.iterdir()] == ["other"]
    assert not world.hook.state.exists()


def test_an_older_one_of_ours_is_replaced_and_anothers_is_not(world: World) -> None:
    world.hook.path.write_text("#!/bin/sh\n# Installed by hostupdate: an older one\n")
    world.hook.install()
    assert "prepare/begin" in world.hook.path.read_text()
    assert os.access(world.hook.path, os.X_OK)
    world.hook.path.write_text("#!/bin/sh\n# somebody else's\n")
    with pytest.raises(PrerequisiteError, match="not hostupdate's"):
        world.hook.install()
    world.hook.uninstall()
    assert world.hook.path.exists()


def test_a_state_directory_that_a_script_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        Hook(tmp_path / "hook", tmp_path / "it's")


def test_it_is_not_executable_before_it_is_whole(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libvirt runs every executable file beside it."""
    new = world.hook.path.with_name("hostupdate.new")
    new.write_text("half of it")
    new.chmod(0o755)
    modes = []
    write = os.write

    def part(fd: int, data: bytes) -> int:
        modes.append(new.stat().st_mode & 0o777)
        return write(fd, data[:100])

    monkeypatch.setattr(os, "write", part)
    text = world.hook.path.read_bytes()
    world.hook.path.unlink()
    world.hook.install()
    monkeypatch.setattr(os, "write", write)
    assert len(modes) > 2 and set(modes) == {0o600}
    assert world.hook.path.read_bytes() == text
    assert world.hook.path.stat().st_mode & 0o777 == 0o755
