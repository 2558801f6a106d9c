"""``hostupdate guests``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress

import click
import msgspec
from rich.markup import escape

from hostupdate.cli.candidates import eligibility
from hostupdate.cli.compose import located_guests, open_cgroups, open_hypervisor, require_root
from hostupdate.cli.handing_over import parking_host
from hostupdate.cli.settings import Settings, global_options, pass_settings
from hostupdate.cli.terminal import MISSING, err, out, print_json, size, table
from hostupdate.eligibility import Blocker, Eligibility
from hostupdate.errors import InputError
from hostupdate.model import GuestState, LocatedGuest, Protection
from hostupdate.plan import protection_of

SCHEMA = "hostupdate-guests-v1"
_WORDS = {True: "yes", False: "no", None: MISSING}


class HandoverRow(msgspec.Struct, frozen=True, kw_only=True):
    """Whether another QEMU can be put under a guest, its RAM left in place."""

    eligible: bool
    blockers: tuple[Blocker, ...]
    warnings: tuple[Blocker, ...]


class GuestRow(msgspec.Struct, frozen=True, kw_only=True):
    """One guest in ``guests --json``. ``pausable`` null: it does not run; ``handover`` null: nor
    does it answer, or nobody has asked."""

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
    handover: HandoverRow | None
    notes: tuple[str, ...]
    availability_set: str | None
    update_domain: int | None
    max_blackout_ns: int | None


def _row(
    located: LocatedGuest, found: Eligibility | None, *, cgroup2: bool, lock: bool
) -> GuestRow:
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
        handover=_handover(found),
        notes=tuple(notes),
        availability_set=guest.policy.availability_set,
        update_domain=guest.policy.update_domain,
        max_blackout_ns=guest.policy.max_blackout_ns,
    )


def _handover(found: Eligibility | None) -> HandoverRow | None:
    if found is None:
        return None
    return HandoverRow(
        eligible=not found.blockers, blockers=found.blockers, warnings=found.warnings
    )


def _remarks(row: GuestRow) -> Iterator[str]:
    """What does not fit into a row of the table."""
    yield from row.notes
    if row.handover is None:
        return
    blockers = row.handover.blockers
    yield from (f"no handover: {each.reason} ({each.remedy})" for each in blockers)
    if any(blocker.by_restart for blocker in blockers):
        yield f"`hostupdate prepare-guest {row.name}` shows what to change"
    if not blockers:
        yield from (f"in a handover {each.reason}" for each in row.handover.warnings)


@click.command("guests")
@global_options
@pass_settings
def command(settings: Settings) -> None:
    """Show the guests of this host, how each can be paused, and which can be handed over."""
    require_root()
    config = settings.load_config()
    cgroups = open_cgroups(config)
    with open_hypervisor(settings, config) as hypervisor:
        located = located_guests(hypervisor, cgroups)
        host = None
        with suppress(InputError):  # a state directory that only a handover cannot use
            host = parking_host(settings, config, hypervisor, "")
        found = eligibility(hypervisor, located, config, host)
    cgroup2, lock = cgroups is not None, config.residency.lock
    rows = [_row(each, found.get(each.guest.uuid), cgroup2=cgroup2, lock=lock) for each in located]
    if settings.json:
        print_json({"schema": SCHEMA, "uri": settings.uri, "guests": rows})
        return
    if not rows:
        err().print(f"no guests at {escape(settings.uri)}")
        return
    print_rows(rows)


def print_rows(rows: Sequence[GuestRow]) -> None:
    """A table that fits 80 columns with names of up to 17 characters, then what is to be said of
    single guests, a line each."""
    shown = table("guest", "state", ">memory", ">vcpus", ">pid", "pause", "handover", "kept by")
    for column in shown.columns[1:]:
        column.no_wrap = True
    for row in rows:
        handover = None if row.handover is None else row.handover.eligible
        shown.add_row(
            escape(row.name),
            str(row.state),
            size(row.memory_bytes),
            str(row.vcpus),
            MISSING if row.pid is None else str(row.pid),
            _WORDS[row.pausable],
            _WORDS[handover],
            MISSING if row.protection is None else str(row.protection),
        )
    console = out()
    console.print(shown)
    for row in rows:
        for remark in _remarks(row):
            console.print(f"{escape(row.name)}: {escape(remark)}")
