"""The kernel and the initramfs that lab guests boot, built once and kept in a cache.

Layout of the cache: ``packages/*.deb``; ``images/KEY/{vmlinuz,initramfs,image.json}``, where KEY
stands for our sources and the packages' versions; ``lock``; ``build-*`` of a build in progress,
or of one that was killed, which the next build removes unread.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import msgspec

from hostupdate.errors import LabError, PrerequisiteError
from hostupdate.lab import files, initramfs, packages

_log = logging.getLogger(__name__)

_KERNEL = "linux-image-cloud-amd64"
_AGENT = "qemu-guest-agent"
_BUSYBOX = "busybox-static"
_COMPILE_TIMEOUT = 60.0
_COMPILER_REMEDY = "apt-get install gcc libc6-dev"


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestImage:
    """A bootable pair of files. ``digest`` is the SHA-256 (hex) of both contents."""

    kernel: Path
    initramfs: Path
    kernel_version: str
    digest: str


class _Record(msgspec.Struct, frozen=True, kw_only=True):
    source: str
    packages: list[str]
    kernel_version: str
    digest: str
    kernel_size: int
    initramfs_size: int


def build(cache: Path, *, refresh: bool = False) -> GuestImage:
    """The guest image from ``cache``; built from freshly downloaded packages if there is none.

    An image made from the same sources of ours is taken as it is, without asking apt, unless
    ``refresh`` is set: then newer packages make a new image, and an unreachable mirror is an
    error. Waits while another process builds in the same cache.

    Raises ``PrerequisiteError`` (a program is missing, not x86-64) and ``LabError`` (apt, the
    compiler or a package's content). The cache holds no half-made image then.
    """
    if platform.machine() != "x86_64":
        raise PrerequisiteError("lab guests need an x86-64 host", remedy="use an x86-64 host")
    images = cache / "images"
    images.mkdir(parents=True, exist_ok=True)
    source = _source_digest()
    if not refresh and (image := _newest(images, source)):
        return image
    with files.locked(cache / "lock"):
        if not refresh and (image := _newest(images, source)):
            return image
        for leftover in cache.glob("build-*"):
            shutil.rmtree(leftover)
        wanted = packages.resolve(_package_names())
        names = [package.file for package in wanted]
        key = hashlib.sha256("\n".join([source, *names]).encode()).hexdigest()[:16]
        if image := _load(images / key, source):
            return image
        _log.info("building the guest image from %s", ", ".join(names))
        archives = packages.fetch(wanted, cache / "packages")
        with tempfile.TemporaryDirectory(dir=cache, prefix="build-") as scratch:
            made = _make(Path(scratch), archives, source)
            shutil.rmtree(images / key, ignore_errors=True)
            os.rename(made, images / key)
    image = _load(images / key, source)
    if image is None:
        raise LabError(f"the image in {images / key} vanished", remedy="run the command again")
    return image


def _package_names() -> list[str]:
    kernels = [name for name in packages.dependencies([_KERNEL]) if name.startswith("linux-image-")]
    if not kernels:
        raise LabError(f"apt knows no kernel behind {_KERNEL}", remedy="run `apt-get update`")
    names = [kernels[0], _BUSYBOX, _AGENT]
    fresh = [_AGENT]
    while fresh:
        # Only what can hold a shared library: the full closure of the agent drags in perl.
        needed = packages.dependencies(fresh)
        fresh = [name for name in needed if name.startswith(("lib", "zlib")) and name not in names]
        names += fresh
    return names


def _source_digest() -> str:
    here = Path(__file__).parent
    sources = ("guest.c", "image.py", "initramfs.py", "cpio.py")
    digest = hashlib.sha256()
    for name in sources:
        digest.update((here / name).read_bytes() + b"\0")
    return digest.hexdigest()


def _newest(images: Path, source: str) -> GuestImage | None:
    by_age = sorted(images.iterdir(), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    return next(filter(None, (_load(path, source) for path in by_age)), None)


def _load(directory: Path, source: str) -> GuestImage | None:
    """The image in ``directory``, or None when it is not there, not whole or of other sources."""
    kernel, ramdisk = directory / "vmlinuz", directory / "initramfs"
    try:
        record = msgspec.json.decode((directory / "image.json").read_bytes(), type=_Record)
        sizes = kernel.stat().st_size, ramdisk.stat().st_size
    except (OSError, msgspec.MsgspecError):
        return None
    if record.source != source or sizes != (record.kernel_size, record.initramfs_size):
        return None
    return GuestImage(
        kernel=kernel,
        initramfs=ramdisk,
        kernel_version=record.kernel_version,
        digest=record.digest,
    )


def _make(scratch: Path, archives: list[Path], source: str) -> Path:
    """A complete image directory inside ``scratch``."""
    tree, made = scratch / "tree", scratch / "image"
    tree.mkdir()
    made.mkdir()
    packages.unpack(archives, tree)
    kernels = sorted((tree / "boot").glob("vmlinuz-*"))
    if not kernels:
        raise LabError("the kernel package holds no boot/vmlinuz-*", remedy="run `apt-get update`")
    kernel = kernels[0].read_bytes()
    ramdisk = initramfs.pack(tree, _compile(scratch))
    record = _Record(
        source=source,
        packages=[path.name for path in archives],
        kernel_version=kernels[0].name.removeprefix("vmlinuz-"),
        digest=hashlib.sha256(kernel + ramdisk).hexdigest(),
        kernel_size=len(kernel),
        initramfs_size=len(ramdisk),
    )
    files.write(made / "vmlinuz", kernel)
    files.write(made / "initramfs", ramdisk)
    files.write(made / "image.json", msgspec.json.encode(record))
    return made


def _compile(scratch: Path) -> bytes:
    program = scratch / "guest"
    code = str(Path(__file__).with_name("guest.c"))
    argv = ["cc", "-std=gnu11", "-O2", "-static", "-s", "-o", str(program), code]
    packages.run(argv, timeout=_COMPILE_TIMEOUT, remedy=_COMPILER_REMEDY)
    return program.read_bytes()
