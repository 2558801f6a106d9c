"""``hostupdate lab``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from rich.markup import escape

from hostupdate.cli.compose import require_root
from hostupdate.cli.settings import Settings, global_options, pass_settings
from hostupdate.cli.terminal import MISSING, err, out, print_json, table
from hostupdate.errors import InputError
from hostupdate.guests import Hypervisor, default_lab_uri, embedded_root
from hostupdate.guests.scratch import ScratchGuests
from hostupdate.lab import accelerator, fleet, image

SCHEMA = "hostupdate-lab-v1"
#: Opening a root whose guests died with their host, libvirt looks for each of them in vain first.
_OPEN_NS = 30_000_000_000
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@click.group("lab")
@global_options
def command() -> None:
    """Scratch guests to try things on: libvirt's embedded driver, no daemon, KVM where it works.

    Other verbs reach them with `--connect lab`.
    """


@command.command("up")
@click.option("--guests", default=2, type=click.IntRange(1, 64), show_default=True)
@click.option("--memory", default="256M", show_default=True, help="Of each guest, such as 512M.")
@global_options
@pass_settings
def up(settings: Settings, guests: int, memory: str) -> None:
    """Make N scratch guests run, ready and answering. Repeatable."""
    require_root()
    memory_bytes = _parse_size(memory)
    root = _root(settings)
    say = err()
    if not settings.quiet:
        say.print("building the guests' kernel and initramfs (cached) ...")
    built = image.build(settings.state / "cache")
    acceleration = accelerator.probe(built, settings.state / "cache")
    if not settings.quiet:
        say.print(f"guests run under {acceleration.kind}: {escape(acceleration.reason)}")
    with _scratch(settings, root) as host:
        made = fleet.up(host, root, guests, memory_bytes, image=built, acceleration=acceleration)
    _print(settings, made)


@command.command("status")
@global_options
@pass_settings
def status(settings: Settings) -> None:
    """Show the scratch guests and what they say of themselves."""
    require_root()
    root = _root(settings)
    if not root.exists():
        _print(settings, ())
        return
    with _scratch(settings, root) as host:
        _print(settings, fleet.status(host, root))


@command.command("down")
@click.option("--keep-logs", is_flag=True, help="Leave the console logs.")
@global_options
@pass_settings
def down(settings: Settings, keep_logs: bool) -> None:
    """Remove the scratch guests. Repeatable."""
    require_root()
    root = _root(settings)
    removed: tuple[str, ...] = ()
    if root.exists():
        with _scratch(settings, root) as host:
            removed = fleet.down(host, root, keep_logs=keep_logs)
    if settings.json:
        print_json({"schema": SCHEMA, "removed": removed})
    else:
        out().print(f"removed {escape(', '.join(removed))}" if removed else "no lab guests")


def _root(settings: Settings) -> Path:
    uri = settings.uri if settings.connect else default_lab_uri(settings.state)
    root = embedded_root(uri)
    if root is None:
        raise InputError(
            "command line", "--connect", f"{uri!r} is not an embedded driver",
            remedy="leave --connect away, or use qemu:///embed?root=DIR",
        )  # fmt: skip
    return root


class LabGuests(ScratchGuests):
    """Scratch guests as the fleet wants them."""

    def names(self) -> list[fleet.Known]:
        """All guests, running or not."""
        return [fleet.Known(name=name, active=active) for name, active in self.known().items()]


@contextmanager
def _scratch(settings: Settings, root: Path) -> Iterator[LabGuests]:
    config = settings.load_config()
    fleet.prepare_root(root)
    uri = settings.uri if settings.connect else default_lab_uri(settings.state)
    hypervisor = Hypervisor(uri, timeout_ns=max(_OPEN_NS, config.deadlines.libvirt_ns))
    try:
        yield LabGuests(hypervisor)
    finally:
        hypervisor.close()


def _parse_size(text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,6})([KMG])(i?B)?", text)
    if match is None:
        raise InputError(
            "command line", "--memory", f"{text!r} is not a size",
            remedy="write a number and K, M or G, such as 256M",
        )  # fmt: skip
    return int(match[1]) * _UNITS[match[2]]


def _print(settings: Settings, guests: tuple[fleet.GuestStatus, ...]) -> None:
    if settings.json:
        print_json({"schema": SCHEMA, "guests": guests})
        return
    if not guests:
        out().print("no lab guests: `hostupdate lab up` makes some")
        return
    shown = table("guest", "state", ">ticks", ">passes", ">bad pages", "console")
    for guest in guests:
        state = "ready" if guest.ready else "booting" if guest.active else "off"
        tick = guest.tick
        shown.add_row(
            guest.name,
            state,
            MISSING if tick is None else str(tick.seq),
            MISSING if tick is None else str(tick.passes),
            MISSING if tick is None else str(tick.bad),
            escape(str(guest.console)),
        )
    out().print(shown)
