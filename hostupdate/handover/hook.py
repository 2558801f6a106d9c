"""libvirt's hook: who may start a parked guest, and with which RAM.

libvirt looks for hooks when its daemon starts and when it is told to reload (SIGHUP); if there was
any for QEMU then, it looks into ``qemu.d`` anew at each call (util/virhook.c). So the first hook of
a host needs a reload of the daemon, which touches no guest; whether the daemon calls the hook can
be asked (``Domains.hook_is_called``).
"""

from __future__ import annotations

import os
import re
import threading
from contextlib import suppress
from importlib.resources import files
from pathlib import Path

from hostupdate.errors import InputError, PrerequisiteError
from hostupdate.handover.records import store, sync_directory
from hostupdate.parked import ParkedRecord

_MARK = b"# Installed by hostupdate:"
_PLAIN = re.compile(r"[A-Za-z0-9/_.+-]+")


class Hook:
    """``path`` is the hook's file (``/etc/libvirt/hooks/qemu.d/hostupdate``), ``state`` the
    directory, on a disk, of what it must know: one file for each parked guest.

    InputError: a ``state`` that a shell script cannot hold.
    """

    def __init__(self, path: Path, state: Path) -> None:
        if not _PLAIN.fullmatch(str(state)):
            raise InputError(
                "state directory", "", f"{str(state)!r} has characters that a hook cannot hold",
                remedy="choose another with --state: letters, digits and /_.+- only",
            )  # fmt: skip
        self.path = path
        self.state = state
        self._installing = threading.Lock()  # guests are unparked in parallel
        text = files("hostupdate.handover").joinpath("hook.sh").read_bytes()
        self._text = text.replace(b"@STATE@", os.fsencode(state))

    def check(self) -> bytes:
        """What is there; empty: nothing. PrerequisiteError: another's file has its name."""
        try:
            there = self.path.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise _not_usable(self.path, error) from error
        if _MARK not in there:
            raise PrerequisiteError(
                f"{self.path} is not hostupdate's", remedy="give that hook another name"
            )
        return there

    def install(self) -> None:
        """Puts the hook where libvirt finds it, beside any other; safe to repeat, and then quick.
        PrerequisiteError: it cannot, or another's file has its name."""
        with self._installing:
            self._install(self.check())

    def _install(self, there: bytes) -> None:
        try:
            if there != self._text or not os.access(self.path, os.X_OK):
                self.path.parent.mkdir(parents=True, exist_ok=True)  # readable, as libvirt's are
                store(self.path, self._text, mode=0o755)
            self.state.mkdir(mode=0o700, parents=True, exist_ok=True)
            (self.state / "name").mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise _not_usable(self.path, error) from error

    def uninstall(self) -> None:
        """Takes the hook away. Safe to repeat; does nothing while a guest is parked, or where the
        file is not ours."""
        if any(self.state.glob("*-*")):
            return
        with suppress(FileNotFoundError):
            if _MARK in self.path.read_bytes():
                self.path.unlink()
        with suppress(OSError):
            (self.state / "name").rmdir()
            self.state.rmdir()

    def guard(self, record: ParkedRecord, spare: Path | None = None) -> None:
        """From now on nobody can start the guest. ``spare`` as :func:`store` has it."""
        if not (self.state / "name" / record.name).exists():
            store(self.state / "name" / record.name, b"", spare=spare)
        self._write(record, spare=spare)

    def allow(self, record: ParkedRecord, ticket: str, spare: Path | None = None) -> None:
        """While this process lives, libvirt can start the guest on its RAM from an image that has
        the ``ticket`` in its metadata. Not flushed to disk: in another boot it means nothing."""
        self._write(record, ticket, spare)

    def release(self, record: ParkedRecord) -> None:
        """Everybody can start the guest, after a power failure too. Safe to repeat."""
        for path in (self.state / record.uuid, self.state / "name" / record.name):
            path.unlink(missing_ok=True)
            with suppress(FileNotFoundError):
                sync_directory(path.parent)

    def guards(self, record: ParkedRecord) -> bool:
        """Whether the guest is kept from being started."""
        return (self.state / record.uuid).exists()

    def _write(self, record: ParkedRecord, ticket: str = "", spare: Path | None = None) -> None:
        lines = [f"run {record.run_id}"]
        if ticket:
            lines.append(f"unpark {os.getpid()} {_started()} {ticket}")
        lines += [
            f"directory {record.ram_directory}",
            f"short {record.short_name}",
            f"links {Path(record.ram[0].link).parent}",
            *(f"ram {ram.size_bytes} {ram.inode} {ram.block}" for ram in record.ram),
            "end",
        ]
        text = "\n".join(lines) + "\n"
        store(self.state / record.uuid, text.encode(), durable=not ticket, spare=spare)


def _started() -> str:
    """This process's start, in clock ticks since boot: field 22 of proc_pid_stat(5)."""
    return Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]


def _not_usable(path: Path, error: OSError) -> PrerequisiteError:
    return PrerequisiteError(
        f"{path} cannot be installed: {error.strerror}", remedy="run as root; check the directory"
    )
