"""``silent_fs.py DIRECTORY BYTES``: a FUSE file system with one file, ``disk``, kept in memory.

Stopped by SIGSTOP it is storage that does not answer; killed, storage that is gone. Prints a line
once it is mounted. The protocol is that of include/uapi/linux/fuse.h, 7.31.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from errno import ENOENT, ENOSYS

ROOT, DISK = 1, 2
LOOKUP, FORGET, GETATTR, SETATTR, OPEN, READ, WRITE = 1, 2, 3, 4, 14, 15, 16
RELEASE, FSYNC, FLUSH, INIT, INTERRUPT, BATCH_FORGET = 18, 20, 25, 26, 36, 42
FOPEN_DIRECT_IO = 1


def attributes(node: int, size: int) -> bytes:
    mode, links = (0o040755, 2) if node == ROOT else (0o100644, 1)
    times = (0,) * 6
    return struct.pack("=QQQ3Q3I7I", node, size, size // 512, *times, mode, links, 0, 0, 0, 4096, 0)


def answer(operation: int, node: int, body: bytes, disk: bytearray) -> bytes | int:
    """What follows the header, or a negative errno."""
    size = 0 if node == ROOT else len(disk)
    if operation == INIT:
        return struct.pack("=IIIIHHIIHHI7I", 7, 31, 0, 0, 12, 9, 1 << 16, 1, 16, 0, 0, *(0,) * 7)
    if operation == LOOKUP:
        if body.rstrip(b"\0") != b"disk":
            return -ENOENT
        return struct.pack("=QQQQII", DISK, 0, 0, 0, 0, 0) + attributes(DISK, len(disk))
    if operation in (GETATTR, SETATTR):
        return struct.pack("=QII", 0, 0, 0) + attributes(node, size)
    if operation == OPEN:
        return struct.pack("=QII", 0, FOPEN_DIRECT_IO, 0)
    if operation == READ:
        _, offset, count = struct.unpack_from("=QQI", body)
        return bytes(disk[offset : offset + count])
    if operation == WRITE:
        _, offset, count = struct.unpack_from("=QQI", body)
        disk[offset : offset + count] = body[40 : 40 + count]
        return struct.pack("=II", count, 0)
    return b"" if operation in (RELEASE, FSYNC, FLUSH) else -ENOSYS


def main(directory: str, size: int) -> None:
    fuse = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={fuse},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"silent", directory.encode(), b"fuse", 0, options):
        raise OSError(ctypes.get_errno(), "mount")
    print("mounted", flush=True)
    disk = bytearray(size)
    while True:
        request = os.read(fuse, 1 << 18)
        _, operation, unique, node = struct.unpack_from("=IIQQ", request)
        if operation in (FORGET, INTERRUPT, BATCH_FORGET):
            continue
        said = answer(operation, node, request[40:], disk)
        errno, data = (said, b"") if isinstance(said, int) else (0, said)
        os.write(fuse, struct.pack("=IiQ", 16 + len(data), errno, unique) + data)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
