"""A save image's stream, unpacked by the program that libvirt packed it with.

``save_image_format`` of qemu.conf names one; where the host has none of that name, libvirt stores
raw. It unpacks with ``PROGRAM -dc`` (qemuSaveImageGetCompressionCommand).
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading

from hostupdate.errors import DeadlineError, PrerequisiteError

_UNPACK_NS = 20_000_000_000


def unpacked(program: str, packed: bytes, size_max_bytes: int) -> bytes | None:
    """What ``packed`` holds; None: it is not ``program``'s, or not whole. No more than a byte
    above ``size_max_bytes`` of it is read. PrerequisiteError: there is no such program.
    DeadlineError."""
    with open(os.memfd_create("packed"), "w+b", buffering=0) as file:
        left = memoryview(packed)
        while left:
            left = left[file.write(left) or 0 :]
        file.seek(0)
        try:
            process = subprocess.Popen(
                [program, "-dc"], stdin=file, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        except OSError as error:
            raise PrerequisiteError(
                f"{program}: {error.strerror}", remedy=f"install {program}: libvirt packed with it"
            ) from error
    late = threading.Timer(_UNPACK_NS / 1e9, process.kill)
    late.start()
    try:
        assert process.stdout is not None
        with process.stdout:
            data = process.stdout.read(size_max_bytes + 1)
        if len(data) > size_max_bytes:
            return data
        status = process.wait()
        if status == -signal.SIGKILL:
            raise DeadlineError(f"{program} -dc", _UNPACK_NS)
        return data if status == 0 else None
    finally:
        late.cancel()
        process.kill()
        process.wait()
