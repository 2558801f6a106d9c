"""``hostupdate prepare-guest``."""

from __future__ import annotations

import difflib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import click
import msgspec
from rich.markup import escape

from hostupdate.cli.candidates import eligibility
from hostupdate.cli.compose import (
    located_guests,
    open_cgroups,
    open_hypervisor,
    require_root,
)
from hostupdate.cli.settings import Settings, global_options, pass_settings
from hostupdate.cli.terminal import err, out, print_json
from hostupdate.config import Config
from hostupdate.eligibility import Blocker, HandoverFacts, judge
from hostupdate.errors import RefusedError
from hostupdate.guests import Hypervisor, definitions
from hostupdate.guests.definitions import Definition
from hostupdate.guests.uri import embedded_root
from hostupdate.host import ram_backing, settings_file
from hostupdate.model import LocatedGuest
from hostupdate.remedy import judge_directory, memory_backing_dir, remedy_changes

SCHEMA = "hostupdate-prepare-guest-v1"
DEFAULT_DIRECTORY = "/dev/shm/hostupdate"


class Prepared(msgspec.Struct, kw_only=True):
    """What is, or was, to be changed. ``eligible`` tells of the guest as it runs now; None: it does
    not run, or cannot be asked. ``backups`` are what was there before."""

    schema: str = SCHEMA
    guest: str
    uuid: str
    eligible: bool | None
    applied: bool
    memory_backing_dir: str
    file_system: str
    domain_diff: str
    qemu_conf: str
    qemu_conf_diff: str
    backups: list[str] = []
    remaining: tuple[Blocker, ...] = ()
    warnings: list[str] = []
    next: list[str] = []


@click.command("prepare-guest")
@click.argument("name", metavar="NAME")
@click.option("--apply", "apply_", is_flag=True, help="Make the changes; else they are printed.")
@click.option(
    "--memory-backing-dir",
    metavar="DIR",
    help=f"Where guests' RAM is to lie [default: as qemu.conf has it, else {DEFAULT_DIRECTORY}].",
)
@global_options
@pass_settings
def command(settings: Settings, name: str, apply_: bool, memory_backing_dir: str | None) -> None:
    """Make the RAM of guest NAME one that can stay in place while its QEMU is replaced.

    Prints what changes in its definition and in libvirt's qemu.conf. No guest that runs is
    touched: the change takes effect at its next start.
    """
    require_root()
    config = settings.load_config()
    with open_hypervisor(settings, config) as hypervisor:
        if embedded_root(hypervisor.uri) is not None:
            raise RefusedError(
                ["libvirt's embedded driver runs no hooks: its guests cannot be handed over"],
                remedy="define the guest under qemu:///system",
            )
        prepared = _prepare(settings, config, hypervisor, name, memory_backing_dir, apply_)
    print_json(prepared) if settings.json else _print(prepared)


def _prepare(
    settings: Settings,
    config: Config,
    hypervisor: Hypervisor,
    name: str,
    asked: str | None,
    apply_: bool,
) -> Prepared:
    definition = definitions.read(hypervisor, name)
    path = Path(config.paths.qemu_conf)
    conf = settings_file.read(path)
    directory = asked or _directory(conf)
    place = ram_backing.backing_directory(Path(directory))
    huge = place.file_system == "hugetlbfs"
    xml, new_conf = remedy_changes(definition.xml, conf, directory, on_hugetlbfs=huge)
    secret, _ = remedy_changes(definition.secret, conf, directory, on_hugetlbfs=huge)
    swap = ram_backing.swap_bytes()
    reasons, warnings = judge_directory(place, definition.memory_bytes, swap)
    if reasons:
        raise RefusedError(reasons, remedy="name another with --memory-backing-dir, or mount one")

    found = eligibility(hypervisor, _running(hypervisor, config, definition), config)
    eligible = not found[definition.uuid].blockers if definition.uuid in found else None
    prepared = Prepared(
        guest=definition.name,
        uuid=definition.uuid,
        eligible=eligible,
        applied=False,
        memory_backing_dir=directory,
        file_system=place.file_system,
        domain_diff=_diff(definition.xml, xml, definition.name),
        qemu_conf=str(path),
        qemu_conf_diff=_diff(conf, new_conf, str(path)),
        remaining=_remaining(xml),
        warnings=warnings,
    )
    if apply_ and xml != definition.xml:
        prepared.backups += [str(_keep_definition(settings, definition))]
    if apply_ and (xml != definition.xml or new_conf != conf):
        kept = None
        if new_conf != conf:
            kept = settings_file.replace(path, new_conf, _stamp())
            prepared.backups += [str(kept)] if kept else []
        try:
            if xml != definition.xml:
                definitions.define(hypervisor, secret)
        except BaseException:
            if new_conf != conf:
                settings_file.put_back(path, kept)
            raise
        prepared.applied = True
    prepared.next = list(_next(prepared, definition.active, apply_))
    return prepared


def _directory(conf: str) -> str:
    """The one that other guests have already, where it will do."""
    found = memory_backing_dir(conf)
    if found and not judge_directory(ram_backing.backing_directory(Path(found)), 0, 0)[0]:
        return found
    return DEFAULT_DIRECTORY


def _running(hypervisor: Hypervisor, config: Config, definition: Definition) -> list[LocatedGuest]:
    located = located_guests(hypervisor, open_cgroups(config))
    return [each for each in located if each.guest.uuid == definition.uuid]


def _remaining(xml: str) -> tuple[Blocker, ...]:
    """What of the definition the changes do not mend."""
    facts = HandoverFacts(
        domain_xml=xml,
        backends=(),
        embedded=False,
        swap_bytes=0,
        security_drivers=ram_backing.security_drivers(),
    )
    return tuple(each for each in judge(facts).blockers if not each.by_restart)


def _keep_definition(settings: Settings, definition: Definition) -> Path:
    directory = settings.state / "definitions"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = directory / f"{definition.uuid}-{_stamp()}.xml"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(fd, "w", encoding="utf-8") as file:
        file.write(definition.secret)
        file.flush()
        os.fsync(fd)
    return path


def _stamp() -> str:
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())


def _next(prepared: Prepared, active: bool, apply_: bool) -> Iterator[str]:
    changes = prepared.domain_diff or prepared.qemu_conf_diff
    if changes and not apply_:
        yield "nothing was changed: run it again with --apply"
    # A reload reads the definitions of guests only (qemuStateReload).
    if prepared.qemu_conf_diff:
        yield "restart libvirtd (or virtqemud), a reload is not enough: no guest is touched by it"
    elif not changes and not prepared.eligible:
        yield "where libvirtd was not restarted since qemu.conf was changed, restart it"
    if active and not prepared.eligible:
        yield "shut the guest down and start it: a reboot from within keeps its QEMU"
    for blocker in prepared.remaining:
        yield f"{blocker.reason}: {blocker.remedy}"


def _diff(before: str, after: str, name: str) -> str:
    """A unified diff; empty where nothing changes."""
    lines = difflib.unified_diff(
        before.splitlines(), after.splitlines(), name, f"{name} (prepared)", lineterm=""
    )
    return "".join(f"{line}\n" for line in lines)


def _print(prepared: Prepared) -> None:
    """The diffs are the result; what to do about them is told beside."""
    console = out()
    for diff in (prepared.domain_diff, prepared.qemu_conf_diff):
        if diff:
            console.print(escape(diff), end="", soft_wrap=True)
    beside = err()
    for warning in prepared.warnings:
        beside.print(f"[yellow]warning:[/] {escape(warning)}")
    if prepared.eligible and not prepared.domain_diff:
        beside.print(f"guest {escape(prepared.guest)} can be handed over")
    elif prepared.applied:
        beside.print(f"guest {escape(prepared.guest)}: changed")
    for backup in prepared.backups:
        beside.print(f"kept: {escape(backup)}")
    for text in prepared.next:
        beside.print(f"next: {escape(text)}")
