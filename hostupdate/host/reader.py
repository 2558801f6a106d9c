"""A program: ``reader.py SECONDS PATH...`` reads a block of each file, all at once.

Writes a line ``NUMBER ERRNO`` for each, as it is done with it; a file that does not answer has
none. Nothing is locked or changed: the files are opened for reading only. It imports the standard
library only and ends by itself, though a thread in an uninterruptible sleep may outlive it.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
from errno import EINVAL

_BLOCK_BYTES = 4096  # the largest logical block of common devices; a page is aligned to it


def read(path: str) -> int:
    """0, or the errno. Past the page cache, which may know what the storage does not; through it
    where a file system has no direct I/O."""
    for direct in (os.O_DIRECT, 0):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | direct)
            try:
                os.preadv(fd, [mmap.mmap(-1, _BLOCK_BYTES)], 0)
            finally:
                os.close(fd)
        except OSError as error:
            if direct and error.errno == EINVAL:
                continue
            return error.errno or EINVAL
        return 0
    raise AssertionError("unreachable")


def main(seconds: float, paths: list[str]) -> None:
    """Returns once all are read, or after ``seconds``."""
    left = threading.Semaphore(0)

    def tell(number: int, path: str) -> None:
        os.write(1, f"{number} {read(path)}\n".encode())
        left.release()

    for number, path in enumerate(paths):
        threading.Thread(target=tell, args=(number, path), daemon=True).start()
    timer = threading.Timer(seconds, os._exit, (0,))
    timer.daemon = True
    timer.start()
    for _ in paths:
        left.acquire()


if __name__ == "__main__":
    main(float(sys.argv[1]), sys.argv[2:])
    os._exit(0)
