"""The race guard: for a run, nobody but the run acts on guests, packages or the host's power.

Units are held still by a drop-in below /run, which a boot takes away, and not by ``systemctl mask
--runtime``, for what that does (seen with systemd 252):

- a timer that is masked, or that fires for a masked service, fails ("resources") and stays failed
  once the mask is gone: the host would not update itself again before its next boot;
- a masked libvirt-guests can be stopped, but not started: a package's scripts that restart it leave
  it stopped, and when the host is shut down later nobody saves its guests;
- a unit below /etc/systemd/system cannot be masked at runtime at all.

An updater's drop-in is a condition that fails while the drop-in is there: timers go on, what they
start is skipped, which is no failure, and all is as before even if systemd is not told.
libvirt-guests' drop-in replaces what it runs: started, stopped or restarted by whomever, it touches
no guest, keeps its state, and has its own commands again afterwards.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from hostupdate.durations import format_duration
from hostupdate.errors import HostUpdateError
from hostupdate.host.inhibitor import Inhibitor
from hostupdate.host.package_locks import busy_locks
from hostupdate.host.systemd import Systemd
from hostupdate.rivals import Held, Rivals

_GUESTS = "libvirt-guests.service"
#: All are started by timers and end by themselves. Not here: unattended-upgrades.service, which
#: acts when the host shuts down, and PackageKit, which acts for a person and answers apt's hook.
_UPDATERS = (
    "apt-daily.service",
    "apt-daily-upgrade.service",
    "dnf-automatic.service",
    "dnf-automatic-download.service",
    "dnf-automatic-install.service",
    "dnf-automatic-notifyonly.service",
    "dnf-makecache.service",
    "dnf5-automatic.service",
    "dnf5-automatic-install.service",
    "dnf5-makecache.service",
    "os-update.service",
)
_UNITS = "run/systemd/system"
#: Last of all drop-ins, so that it has the last word.
_DROP_IN = "zz-hostupdate.conf"
_DROP_INS = {
    _GUESTS: "[Service]\nExecStart=\nExecStart=true\nExecStop=\n",
    **{u: f"[Unit]\nConditionPathExists=!/{_UNITS}/{u}.d/{_DROP_IN}\n" for u in _UPDATERS},
}
#: Of a unit that is doing something. An updater is a oneshot: at work it is never "active".
_AT_WORK = {"activating", "deactivating", "reloading"}
#: A shutdown further away than this is no concern of a run.
_NEAR_NS = 3_600_000_000_000

#: A libvirt daemon that does not find this at its start makes it and starts guests, so that it does
#: so once a boot (virDriverShouldAutostart). It may be missing although guests run: their daemon
#: was of a libvirt that did not know it, or somebody took it away.
_AUTOSTARTED = "run/libvirt/qemu/autostarted"
#: libvirt makes an empty one: this one is ours.
_OURS = b"made by hostupdate for a run\n"
_AUTO_SHUTDOWN = re.compile(
    r'^\s*(auto_shutdown_(?:try_save|try_shutdown|poweroff))\s*=\s*"(?:persistent|transient|all)"',
    re.MULTILINE,
)


class Guard:
    """Looks for rivals, holds them still, and puts back what that took.

    ``root`` is where the host's files begin, ``path`` where its programs are searched (default:
    PATH); ``timeout_ns`` bounds each call to systemd. ``close`` ends the inhibitor, which also ends
    with this process; all else stays until :meth:`restore`.
    """

    def __init__(
        self, root: Path = Path("/"), *, path: str | None = None, timeout_ns: int = 10_000_000_000
    ) -> None:
        self._root = root
        self._path = path
        self._timeout_ns = timeout_ns
        self._systemd = Systemd(root, path, timeout_ns)
        self._inhibitor: Inhibitor | None = None

    def survey(self, uri: str) -> Rivals:
        """What acts by itself on this host and on the guests of ``uri``. Changes nothing.

        Raises HostUpdateError where systemd runs and cannot be asked.
        """
        busy, notes = list(busy_locks(self._root)), []
        units: tuple[str, ...] = ()
        marker, inhibitor = "", None
        if self._systemd.runs():
            states = self._systemd.show(_DROP_INS)
            units = tuple(u for u, state in states.items() if state["LoadState"] == "loaded")
            busy += [f"{u} is at work" for u in states if states[u]["ActiveState"] in _AT_WORK]
            left_ns = self._systemd.shutdown_in_ns()
            if left_ns is not None and left_ns < _NEAR_NS:  # logind does it, inhibited or not
                when = f"within {format_duration(left_ns)}" if left_ns else "now"
                busy.append(f"a shutdown of the host is due {when} (shutdown -c cancels it)")
            inhibitor = shutil.which("systemd-inhibit", path=self._path)
            if inhibitor is None:
                notes.append("nothing here holds off a shutdown of the host during the run")
        if _is_system(uri):
            path = self._root / _AUTOSTARTED
            if path.parent.is_dir() and not path.exists():
                marker = f"/{_AUTOSTARTED}"
            notes += self._auto_shutdown()
        return Rivals(
            units=units,
            autostart_marker=marker,
            inhibit=inhibitor is not None,
            busy=tuple(busy),
            notes=tuple(notes),
        )

    def hold(self, rivals: Rivals) -> tuple[str, ...]:
        """Holds ``rivals`` still; returns what an operator should know, one sentence each.

        No inhibitor is such a sentence. Raises HostUpdateError where anything else fails; all that
        was done is put back then, as far as it can be.
        """
        notes: tuple[str, ...] = ()
        try:
            if rivals.inhibit:
                notes = self._inhibit()
            for unit in rivals.units:
                directory = self._root / _UNITS / f"{unit}.d"
                directory.mkdir(exist_ok=True)
                (directory / _DROP_IN).write_text(_DROP_INS[unit])
            if rivals.units:
                self._systemd.reload()
                if missing := set(rivals.units) - self._heeded(rivals.units):
                    units = ", ".join(sorted(missing))
                    raise HostUpdateError(f"systemd does not heed the drop-ins of {units}")
            if rivals.autostart_marker:
                # Made by libvirt since the look: then it is libvirt's.
                with suppress(FileExistsError), open(self._marker(rivals.held), "xb") as marker:
                    marker.write(_OURS)
        except (HostUpdateError, OSError) as error:
            self.close()
            with suppress(HostUpdateError):
                self.restore(rivals.held)
            if isinstance(error, HostUpdateError):
                raise
            raise HostUpdateError(f"rivals cannot be held still: {error}") from error
        return notes

    def restore(self, held: Held) -> None:
        """Puts back what ``held`` names, as far as it is ours.

        Safe to repeat, after a boot, and where nothing was held. Each part is tried; one
        HostUpdateError then tells all that could not be put back.
        """
        parts: list[Callable[[], None]] = [partial(self._lift, unit) for unit in held.units]
        parts += [partial(self._unmark, held), partial(self._forget, held.units)]
        problems = []
        for part in parts:
            try:
                part()
            except (HostUpdateError, OSError) as error:
                problems.append(str(error))
        if problems:
            raise HostUpdateError(
                f"not put back: {'; '.join(problems)}",
                remedy=f"rm -f /{_UNITS}/*.d/{_DROP_IN}; systemctl daemon-reload",
            )

    def close(self) -> None:
        """Ends the inhibitor. Safe to repeat."""
        inhibitor, self._inhibitor = self._inhibitor, None
        if inhibitor is not None:
            inhibitor.close()

    def _inhibit(self) -> tuple[str, ...]:
        self.close()
        program = shutil.which("systemd-inhibit", path=self._path) or "systemd-inhibit"
        why = "the host is updated under its running guests"
        self._inhibitor = Inhibitor(program, why, self._timeout_ns)
        if not self._inhibitor.problem:
            return ()
        return (f"a shutdown of the host is not held off: {self._inhibitor.problem}",)

    def _lift(self, unit: str) -> None:
        drop_in = self._root / _UNITS / f"{unit}.d" / _DROP_IN
        drop_in.unlink(missing_ok=True)
        with suppress(OSError):  # other drop-ins are there, or no directory
            drop_in.parent.rmdir()

    def _unmark(self, held: Held) -> None:
        path = self._marker(held)
        if held.autostart_marker and path.exists() and path.read_bytes() == _OURS:
            path.unlink()

    def _forget(self, units: Sequence[str]) -> None:
        """Has systemd forget drop-ins that are gone. After a boot it knows none of them."""
        if units and self._systemd.runs() and self._heeded(units):
            self._systemd.reload()

    def _heeded(self, units: Sequence[str]) -> set[str]:
        """Those units that systemd has loaded with our drop-in."""
        states = self._systemd.show(units).items()
        return {unit for unit, state in states if f"/{_DROP_IN}" in state["DropInPaths"]}

    def _marker(self, held: Held) -> Path:
        return self._root / held.autostart_marker.lstrip("/")

    def _auto_shutdown(self) -> list[str]:
        try:
            text = (self._root / "etc/libvirt/qemu.conf").read_text(errors="replace")
        except OSError:
            return []
        if not (names := _AUTO_SHUTDOWN.findall(text)):
            return []
        return [f"libvirt saves or stops guests when the host shuts down ({', '.join(names)})"]


def _is_system(uri: str) -> bool:
    """Whether the guests of ``uri`` belong to this host's own daemon, not a user's or another's."""
    parts = urlsplit(uri)
    return parts.scheme.startswith("qemu") and parts.path == "/system" and not parts.netloc
