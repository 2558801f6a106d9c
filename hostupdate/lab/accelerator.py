"""Does KVM really run a guest here? Found out by booting one.

/dev/kvm that opens proves nothing: on a nested or restricted host the guest may never execute an
instruction.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import msgspec

from hostupdate.errors import PrerequisiteError
from hostupdate.lab import console, files
from hostupdate.lab.image import GuestImage

#: How long a guest has to boot under KVM, ns. One that works needs less than a second or two.
PROBE_NS = 8_000_000_000
_KVM = Path("/dev/kvm")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_EMULATORS = ("qemu-system-x86_64", "/usr/libexec/qemu-kvm", "/usr/bin/qemu-kvm")
_EXIT_TIMEOUT = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Acceleration:
    """How lab guests run here, why, and by which QEMU binary."""

    kind: Literal["kvm", "tcg"]
    reason: str
    emulator: Path

    @property
    def domain_type(self) -> str:
        """libvirt's word for it: ``<domain type=...>``."""
        return "kvm" if self.kind == "kvm" else "qemu"


class _Record(msgspec.Struct, frozen=True, kw_only=True):
    key: list[str]
    kind: Literal["kvm", "tcg"]
    reason: str


def find_emulator() -> Path:
    """The QEMU system emulator for x86-64. Raises ``PrerequisiteError`` when there is none."""
    for candidate in _EMULATORS:
        if found := shutil.which(candidate):
            return Path(found)
    raise PrerequisiteError("no qemu-system-x86_64", remedy="apt-get install qemu-system-x86")


def probe(image: GuestImage, cache: Path) -> Acceleration:
    """``kvm`` where ``image`` boots under it within ``PROBE_NS``, else ``tcg``, with the reason.

    The answer is kept in ``cache`` and holds for this boot of the host, this QEMU binary and this
    image. Raises ``PrerequisiteError`` when QEMU is missing; a QEMU started here is gone whatever
    happens, unless this process is killed.
    """
    emulator = find_emulator()
    if not os.access(_KVM, os.R_OK | os.W_OK):
        reason = f"{_KVM} cannot be opened" if _KVM.exists() else f"there is no {_KVM}"
        return Acceleration(kind="tcg", reason=reason, emulator=emulator)
    status = emulator.stat()
    key = [
        _BOOT_ID.read_text().strip(),
        f"{emulator} {status.st_size} {status.st_mtime_ns}",
        image.digest,
    ]
    kept = cache / "acceleration.json"
    record = _kept(kept)
    if record is None or record.key != key:
        problem = _boot(emulator, image)
        record = _Record(
            key=key,
            kind="tcg" if problem else "kvm",
            reason=problem or "a guest booted under KVM",
        )
        cache.mkdir(parents=True, exist_ok=True)
        files.write(kept, msgspec.json.encode(record))
    return Acceleration(kind=record.kind, reason=record.reason, emulator=emulator)


def _kept(path: Path) -> _Record | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Record)
    except (OSError, msgspec.MsgspecError):
        return None


def _boot(emulator: Path, image: GuestImage) -> str:
    """Boot under KVM; the empty string, or why that did not work."""
    with tempfile.TemporaryDirectory(prefix="hostupdate-probe-") as scratch:
        log = Path(scratch) / "kvm-probe"
        argv = [str(emulator), "-machine", "pc,accel=kvm", "-cpu", "host", "-m", "256"]
        argv += ["-nodefaults", "-display", "none", "-no-reboot", "-serial", f"file:{log}"]
        argv += ["-kernel", str(image.kernel), "-initrd", str(image.initramfs)]
        argv += ["-append", "console=ttyS0 panic=-1 hu.fill=16M"]
        with (Path(scratch) / "errors").open("w+b") as errors:
            process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors)
            try:
                return _watch(process, log, errors)
            finally:
                process.kill()
                process.wait(_EXIT_TIMEOUT)


def _watch(process: subprocess.Popen[bytes], log: Path, errors: IO[bytes]) -> str:
    deadline_ns = time.monotonic_ns() + PROBE_NS
    while time.monotonic_ns() < deadline_ns:
        if console.ready(log) is not None:
            return ""
        if process.poll() is not None:
            errors.seek(0)
            said = errors.read().decode("utf-8", "replace").strip().splitlines() or ["no message"]
            return f"QEMU with KVM ended with {process.returncode}: {said[-1]}"
        time.sleep(console.POLL_NS / 1e9)
    return f"no guest booted under KVM within {PROBE_NS / 1e9:g} s"
