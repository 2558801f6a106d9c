"""Another program's settings: replaced as a whole, what was there kept beside."""

from __future__ import annotations

import os
from pathlib import Path


def read(path: Path) -> str:
    """The text; empty where there is no such file. OSError."""
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except FileNotFoundError:
        return ""


def replace(path: Path, text: str, stamp: str) -> Path | None:
    """Writes ``text`` with owner and mode of the file that was there, which is kept as
    ``NAME.before-hostupdate-STAMP``; its path, None: there was none.

    A link is followed. OSError: the file is as it was.
    """
    path = path.resolve()
    kept = path.with_name(f"{path.name}.before-hostupdate-{stamp}")
    draft = path.with_name(f".{path.name}.hostupdate")
    draft.unlink(missing_ok=True)
    status = path.stat() if path.exists() else None
    try:
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(fd, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)
            if status is not None:
                os.fchown(fd, status.st_uid, status.st_gid)
                os.fchmod(fd, status.st_mode & 0o7777)
            file.flush()
            os.fsync(fd)
        if status is not None:
            os.link(path, kept)
        draft.rename(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    return kept if status is not None else None


def put_back(path: Path, kept: Path | None) -> None:
    """Takes back what :func:`replace` has done. OSError."""
    path = path.resolve()
    if kept is None:
        path.unlink(missing_ok=True)
    else:
        kept.rename(path)
