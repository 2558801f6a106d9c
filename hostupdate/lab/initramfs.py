"""What goes into a lab guest's initramfs, gathered from a tree of unpacked packages."""

from __future__ import annotations

import lzma
import re
from pathlib import Path

from hostupdate.errors import LabError
from hostupdate.lab import cpio, packages

#: In load order. What a kernel has built in, or no longer has, is passed over.
MODULES = (
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_console",
    "virtio_blk",
    "failover",
    "net_failover",
    "virtio_net",
)
#: Without these the guest agent has no channel.
NEEDED_MODULES = ("virtio_pci", "virtio_console")

#: The agent runs /sbin/hwclock after it has set the time; the others serve whoever looks inside.
APPLETS = ("sh", "cat", "ls", "ps", "date", "dmesg", "free", "sleep", "hwclock", "poweroff", "halt")

_DIRECTORIES = (
    "bin", "dev", "etc", "lib", "lib/modules", "lib64", "proc", "root", "run", "sbin", "sys",
    "tmp", "usr", "usr/sbin", "var",
)  # fmt: skip
_AGENT = "usr/sbin/qemu-ga"
_LOADER = "ld-linux-x86-64.so.2"
_REMEDY = "please report the versions of linux-image-cloud-amd64 and qemu-guest-agent"


def pack(tree: Path, init: bytes) -> bytes:
    """The initramfs from the packages unpacked in ``tree``, with the program ``init`` as pid 1.

    Raises ``LabError`` when a package does not hold what is expected of it.
    """
    modules = _modules(tree)
    entries = [cpio.directory(name) for name in _DIRECTORIES]
    entries += [
        cpio.program("init", init),
        cpio.program("bin/busybox", _one(tree, "bin/busybox", "usr/bin/busybox").read_bytes()),
        cpio.program(_AGENT, _one(tree, _AGENT).read_bytes()),
        cpio.text("modules", "".join(f"/lib/modules/{name}.ko\n" for name in modules)),
        cpio.text("etc/os-release", "ID=hostupdate-lab\nPRETTY_NAME='hostupdate lab guest'\n"),
        cpio.link("var/run", "/run"),
    ]
    entries += [cpio.program(f"lib/modules/{name}.ko", data) for name, data in modules.items()]
    entries += [cpio.link(f"sbin/{name}", "/bin/busybox") for name in APPLETS]
    entries += [cpio.link("bin/sh", "/bin/busybox")]
    entries += _libraries(tree)
    return cpio.archive(entries)


def _one(tree: Path, *places: str) -> Path:
    for place in places:
        for path in sorted(tree.glob(place)):
            return path
    raise LabError(f"the packages hold no {places[0]}", remedy=_REMEDY)


def _modules(tree: Path) -> dict[str, bytes]:
    """Content of each of MODULES that is a file, decompressed, in load order."""
    builtin = _one(tree, "lib/modules/*/modules.builtin", "usr/lib/modules/*/modules.builtin")
    inside = {Path(line).stem for line in builtin.read_text().split()}
    found = {}
    for name in MODULES:
        for path in builtin.parent.glob(f"kernel/**/{name}.ko*"):
            found[name] = _plain(path)
    missing = [name for name in NEEDED_MODULES if name not in found and name not in inside]
    if missing:
        raise LabError(f"the kernel package has no {', '.join(missing)}", remedy=_REMEDY)
    return found


def _plain(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(data)
    if path.suffix != ".ko":
        raise LabError(f"{path.name}: no way to decompress {path.suffix}", remedy=_REMEDY)
    return data


def _libraries(tree: Path) -> list[cpio.Entry]:
    """The loader and the shared libraries of the agent, as the tree's own loader finds them."""
    places = [tree / "lib/x86_64-linux-gnu", tree / "usr/lib/x86_64-linux-gnu"]
    loader = _one(tree, *(f"{place.relative_to(tree)}/{_LOADER}" for place in places))
    argv = [str(loader), "--inhibit-cache", "--library-path", ":".join(map(str, places))]
    argv += ["--list", str(tree / _AGENT)]
    output = packages.run(argv, timeout=packages.LOCAL_TIMEOUT, remedy=_REMEDY)
    entries = [cpio.program(f"lib64/{_LOADER}", loader.read_bytes())]
    for name, target in re.findall(
        r"^\s*([^/\s]+) => (\S.*?)(?: \(0x\w+\))?$", output, re.MULTILINE
    ):
        path = Path(target)
        if not path.is_relative_to(tree):
            raise LabError(f"qemu-ga needs {name}: {target}, not in the packages", remedy=_REMEDY)
        entries.append(cpio.program(f"lib/{name}", path.read_bytes()))
    return entries
