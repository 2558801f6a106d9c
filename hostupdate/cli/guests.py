"""``hostupdate guests``."""

from __future__ import annotations

import click
import msgspec
from rich.markup import escape

from hostupdate.cli.compose import located_guests, open_cgroups, open_hypervisor, require_root
from hostupdate.cli.settings import Settings, global_options, pass_settings
from hostupdate.cli.terminal import MISSING, err, out, print_json, size, table
from hostupdate.model import GuestState, LocatedGuest, Protection
from hostupdate.plan import protection_of

SCHEMA = "hostupdate-guests-v1"


class GuestRow(msgspec.Struct, frozen=True, kw_only=True):
    """One guest in ``guests --json``. ``pausable`` null: it does not run."""

    name: str
    uuid: str
    state: GuestState
    memory_bytes: int
    vcpus: int
    pid: int | None
    cgroup: str | None
    own_cgroup: bool | None
    pausable: bool | None
    protection: Protection | None
    digest: bool | None
    notes: tuple[str, ...]
    availability_set: str | None
    update_domain: int | None
    max_blackout_ns: int | None


def _row(located: LocatedGuest, *, cgroup2: bool, lock: bool) -> GuestRow:
    guest, place = located.guest, located.place
    running = guest.state is GuestState.RUNNING
    notes = [located.problem] if located.problem else []
    protection = None
    if place is not None:
        if place.frozen:
            notes.append("its owner has frozen its cgroup")
        if place.shared_cgroup:
            notes.append("in a shared cgroup, moved to its own for a pause")
        if place.dma_writers:
            notes.append("no RAM digest: " + ", ".join(place.dma_writers))
        protection = protection_of(place, lock=lock)
    return GuestRow(
        name=guest.name,
        uuid=guest.uuid,
        state=guest.state,
        memory_bytes=guest.memory_bytes,
        vcpus=guest.vcpus,
        pid=place.pid if place else None,
        cgroup=place.cgroup if place else None,
        own_cgroup=(not place.shared_cgroup) if place and cgroup2 else None,
        pausable=(place is not None and not place.frozen) if running else None,
        protection=protection,
        digest=(not place.dma_writers) if place else None,
        notes=tuple(notes),
        availability_set=guest.policy.availability_set,
        update_domain=guest.policy.update_domain,
        max_blackout_ns=guest.policy.max_blackout_ns,
    )


@click.command("guests")
@global_options
@pass_settings
def command(settings: Settings) -> None:
    """Show the guests of this host and how each can be paused."""
    require_root()
    config = settings.load_config()
    cgroups = open_cgroups(config)
    with open_hypervisor(settings, config) as hypervisor:
        located = located_guests(hypervisor, cgroups)
    cgroup2, lock = cgroups is not None, config.residency.lock
    rows = [_row(guest, cgroup2=cgroup2, lock=lock) for guest in located]
    if settings.json:
        print_json({"schema": SCHEMA, "uri": settings.uri, "guests": rows})
        return
    if not rows:
        err().print(f"no guests at {escape(settings.uri)}")
        return
    shown = table("guest", "state", ">memory", ">vcpus", ">pid", "pause", "pages kept by", "note")
    for row in rows:
        pause = {True: "yes", False: "no", None: MISSING}[row.pausable]
        shown.add_row(
            escape(row.name),
            str(row.state),
            size(row.memory_bytes),
            str(row.vcpus),
            MISSING if row.pid is None else str(row.pid),
            pause,
            MISSING if row.protection is None else str(row.protection),
            escape("; ".join(row.notes)),
        )
    out().print(shown)
