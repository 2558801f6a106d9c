"""Who else acts on a host by itself, as a look found them and as a run holds them still."""

from __future__ import annotations

import msgspec


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """What was changed to hold rivals still; recovery puts it back.

    ``units``: systemd units with a drop-in of ours. ``autostart_marker``: path of the file that
    keeps a starting libvirt daemon from starting guests; empty: not ours.
    """

    units: tuple[str, ...] = ()
    autostart_marker: str = ""


class Rivals(msgspec.Struct, frozen=True, kw_only=True):
    """What a look at the host found. Nothing was changed for it.

    ``units``: systemd units that will be held still. ``autostart_marker``: the file to create;
    empty where it exists, or is of no use. ``inhibit``: whether a shutdown inhibitor is asked for.
    ``busy``: why the run must be refused now, one sentence each. ``notes``: what an operator should
    know, one sentence each.
    """

    units: tuple[str, ...] = ()
    autostart_marker: str = ""
    inhibit: bool = False
    busy: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def held(self) -> Held:
        """What recovery must know before they are held."""
        return Held(units=self.units, autostart_marker=self.autostart_marker)
