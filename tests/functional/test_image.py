"""A guest's saved state, rewritten by us, is what QEMU and libvirt take without the capability."""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import UUID

import pytest
from qemu.qmp import QMPClient

from hostupdate.handover import domain, image, parked_image
from hostupdate.handover.stream import strip
from hostupdate.lab import accelerator, console
from hostupdate.lab import image as lab_image
from hostupdate.lab.domain import Witness, kernel_command_line
from tests.functional.conftest import make_cache
from tests.requirements import need

RAM = 192 << 20
_WAIT_S = 120
_POLL_S = 0.05
IGNORE_SHARED = {"capabilities": [{"capability": "x-ignore-shared", "state": True}]}


@pytest.fixture
def directory() -> Iterator[Path]:
    """In memory, as a guest's RAM file has to be."""
    need("root", "qemu")
    with TemporaryDirectory(dir="/dev/shm", prefix="hu-image-") as path:
        yield Path(path)


class Qmp:
    """A QEMU's monitor and its guest's console."""

    def __init__(self, socket: Path, log: Path) -> None:
        self._socket = socket
        self.log = log

    def ask(self, *commands: tuple[str, dict[str, Any] | None]) -> Any:
        """The last command's answer, asked again until it is about no state in between."""
        return asyncio.run(self._ask(commands))

    async def _ask(self, commands: tuple[tuple[str, dict[str, Any] | None], ...]) -> Any:
        for _ in range(int(_WAIT_S / _POLL_S)):
            client = QMPClient("image")
            try:
                await client.connect(str(self._socket))
                break
            except Exception:  # qemu.qmp wraps whatever kept it from connecting
                await asyncio.sleep(_POLL_S)
        answer: Any = None
        for command, arguments in commands:
            answer = await client.execute(command, arguments)
        while answer["status"] in ("setup", "active", "inmigrate"):
            await asyncio.sleep(_POLL_S)
            answer = await client.execute(commands[-1][0])
        await client.disconnect()
        return answer


@contextmanager
def guest(directory: Path, name: str, *arguments: str) -> Iterator[Qmp]:
    """A QEMU of a lab guest on the RAM file of ``directory``, its console in ``name``."""
    cache = directory / "cache"
    built = lab_image.build(cache if cache.exists() else make_cache(directory))
    kind = accelerator.probe(built, cache)
    backend = f"memory-backend-file,id=pc.ram,mem-path={directory}/ram,size={RAM},share=on"
    argv = [str(kind.emulator), "-machine", f"pc,accel={kind.kind},memory-backend=pc.ram"]
    argv += ["-object", backend, "-m", f"{RAM >> 20}", "-nodefaults", "-display", "none"]
    argv += ["-device", "VGA", "-serial", f"file:{directory}/{name}"]
    argv += ["-kernel", str(built.kernel), "-initrd", str(built.initramfs)]
    argv += ["-append", kernel_command_line(Witness(rate_ms=20)), *arguments]
    argv += ["-qmp", f"unix:{directory}/{name}.qmp,server=on,wait=off"]
    with subprocess.Popen(argv) as process:
        try:
            yield Qmp(directory / f"{name}.qmp", directory / name)
        finally:
            process.kill()


def deadline_ns() -> int:
    return time.monotonic_ns() + _WAIT_S * 1_000_000_000


def test_a_stripped_stream_is_loaded_without_the_capability(directory: Path) -> None:
    need("lab")
    saved = directory / "stream"
    with guest(directory, "old") as old:
        console.wait_ready(old.log, deadline_ns())
        console.wait_ticks(old.log, 1, deadline_ns())
        save = {"uri": f"exec:cat >{saved}"}
        asked = ("migrate-set-capabilities", IGNORE_SHARED), ("stop", None), ("migrate", save)
        assert old.ask(*asked, ("query-migrate", None))["status"] == "completed"
        before = console.ticks(old.log)[-1]
    stripped = strip(saved.read_bytes())
    assert stripped.kept == {"pc.ram": RAM}
    assert {"pc.bios", "0000:00:02.0/vga.vram"} < {block.name for block in stripped.blocks}
    whole = directory / "stripped.gz"
    whole.write_bytes(image.gzipped(stripped.stream))
    with guest(directory, "new", "-S", "-incoming", f"exec:gzip -dc <{whole}") as new:
        assert new.ask(("query-status", None))["status"] == "paused"
        assert new.ask(("cont", None), ("query-status", None))["status"] == "running"
        passes = before.passes
        while passes < before.passes + 2:  # all of its RAM was looked at after the load
            passes = console.wait_ticks(new.log, 1, deadline_ns())[-1].passes
        ticks = console.ticks(new.log)
    assert before.seq <= ticks[0].seq <= before.seq + 2
    assert {tick.bad for tick in ticks} == {0}


DOMAIN = """\
<domain type='qemu'>
  <name>image</name>
  <memory unit='MiB'>16</memory>
  <memoryBacking><source type='file'/><access mode='shared'/></memoryBacking>
  <os><type arch='x86_64' machine='pc'>hvm</type></os>
  <devices><emulator>{emulator}</emulator><memballoon model='none'/></devices>
</domain>
"""
QEMU_CONF = """\
stdio_handler = "file"
security_driver = "none"
user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
namespaces = []
cgroup_controllers = []
memory_backing_dir = "{ram}"
"""


class Virsh:
    """libvirt's embedded driver, below a root of its own."""

    def __init__(self, root: Path) -> None:
        self._argv = ["virsh", "-q", "-c", f"qemu:///embed?root={root}"]

    def __call__(self, *commands: str, fails: bool | None = False) -> str:
        """What it says. ``fails`` is whether it has to; None where that does not matter."""
        argv = [*self._argv, "; ".join(commands)]
        ended = subprocess.run(argv, capture_output=True, text=True, timeout=_WAIT_S, check=False)
        said = ended.stdout + ended.stderr
        # virsh may crash as it closes the embedded driver, when it has done all (libvirt 9.0).
        failed = ended.returncode > 0 or (ended.returncode < 0 and ended.stderr != "")
        assert fails is None or failed == fails, said
        return said if fails else ended.stdout.strip()


def test_libvirt_restores_a_rewritten_image(directory: Path) -> None:
    """libvirt runs no hook here, so that the guest's RAM is a new file: it is not resumed."""
    root, other = directory / "root", directory / "qemu"
    for name in ("etc", "ram"):
        (root / name).mkdir(parents=True)
    (root / "etc/qemu.conf").write_text(QEMU_CONF.format(ram=root / "ram"))
    emulator = accelerator.find_emulator()
    (directory / "domain.xml").write_text(DOMAIN.format(emulator=emulator))
    other.symlink_to(emulator)
    virsh = Virsh(root)
    turn_on = json.dumps({"execute": "migrate-set-capabilities", "arguments": IGNORE_SHARED})
    try:
        virsh(f"define {directory}/domain.xml", "start image --paused")
        virsh(f"qemu-monitor-command image '{turn_on}'", "managedsave image --running")
        (path,) = root.rglob("image.save")
        kept = {"pc.ram": 16 << 20}
        found = image.read_image(path)
        image.check(found, uuid=UUID(virsh("domuuid image")), kept=kept)
        assert "x-ignore-shared" in virsh("start image", fails=True)
        path.write_bytes(parked_image.loadable(found, str(other), "ticket"))
        virsh("start image")
        assert virsh("domstate image") == "paused"
        assert str(other) in virsh("dumpxml image")
        assert "ticket" in virsh(f"metadata image {domain.NAMESPACE}")
        assert "ticket" not in virsh("dumpxml --inactive image")
        assert not path.exists()
    finally:
        virsh("destroy image", "undefine image --managed-save", fails=None)
