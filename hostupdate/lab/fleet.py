"""Start, look at and remove the lab guests of one root directory."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from hostupdate.errors import HostUpdateError, LabError
from hostupdate.lab import console, files
from hostupdate.lab.accelerator import Acceleration
from hostupdate.lab.console import Clock, SystemClock, Tick
from hostupdate.lab.domain import Witness, domain_xml
from hostupdate.lab.image import GuestImage
from hostupdate.lab.root import (
    console_path,
    is_own_name,
    log_paths,
    prepare_root,
    record_path,
    recorded_names,
)

__all__ = (
    "GuestStatus",
    "Known",
    "LabHost",
    "console_path",
    "down",
    "prepare_root",
    "status",
    "up",
)

_log = logging.getLogger(__name__)

SMALLEST_MEMORY = 160 << 20
PING_TIMEOUT_NS = 2_000_000_000
SET_TIME_TIMEOUT_NS = 10_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A guest that libvirt has defined under the root; ``active``: it has a QEMU process."""

    name: str
    active: bool


class LabHost(Protocol):
    """What a fleet needs of libvirt. Every method may raise any ``HostUpdateError``."""

    def names(self) -> Sequence[Known]:
        """All guests, running or not."""

    def define(self, xml: str) -> None:
        """Define a guest."""

    def start(self, name: str) -> None:
        """Start a defined guest."""

    def destroy(self, name: str) -> None:
        """End a guest's QEMU process at once."""

    def undefine(self, name: str) -> None:
        """Forget a guest that does not run."""

    def agent(self, name: str, command: Mapping[str, Any], timeout_ns: int) -> Mapping[str, Any]:
        """Send a command to the guest agent and return its answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestStatus:
    """One lab guest. ``ready``: it has stamped its RAM; ``tick`` is the newest one."""

    name: str
    active: bool
    ready: bool
    tick: Tick | None
    console: Path


def status(host: LabHost, root: Path) -> tuple[GuestStatus, ...]:
    """All lab guests of ``root``, by number. Raises what ``host`` raises; changes nothing."""
    active = _active(host)
    return tuple(_status(root, name, active.get(name, False)) for name in recorded_names(root))


def up(
    host: LabHost,
    root: Path,
    count: int,
    memory_bytes: int,
    *,
    image: GuestImage,
    acceleration: Acceleration,
    witness: Witness | None = None,
    metadata: Mapping[str, Mapping[str, str]] | None = None,
    ram_in_files: bool = False,
    timeout_ns: int = 90_000_000_000,
    clock: Clock | None = None,
) -> tuple[GuestStatus, ...]:
    """Make ``hu-lab-1`` to ``hu-lab-COUNT`` run, ready and answering through their agents.

    New guests get the host's time once (to about the agent's round trip, 1 ms when idle). Guests
    that run are kept as they are, also those above ``count``. ``metadata`` holds, by guest name,
    what goes into the domain's ``urn:hostupdate:guest:1`` element.

    Raises ``LabError`` or what ``host`` raises when a guest cannot be made or is not ready within
    ``timeout_ns``; the guests that this call has made are removed then, others are as they were.
    """
    if memory_bytes < SMALLEST_MEMORY:
        smallest = f"{SMALLEST_MEMORY >> 20} MiB"
        raise LabError(f"a lab guest needs at least {smallest}", remedy=f"--memory {smallest}")
    clock = clock or SystemClock()
    deadline_ns = clock.monotonic_ns() + timeout_ns
    known = _active(host)
    names = [f"hu-lab-{number}" for number in range(1, count + 1)]
    for name in names:
        if name in known and not record_path(root, name).exists():
            problem = f"a guest {name} exists that `lab up` has not made"
            raise LabError(problem, remedy="rename that guest, or use another --state directory")
    made: list[str] = []
    try:
        for name in names:
            # libvirt may still be finding out that a guest which it lists as running is dead.
            if known.get(name) and _answers(host, root, name, deadline_ns, clock):
                continue
            made.append(name)
            _remove(host, root, name, keep_logs=False)
            xml = domain_xml(
                name=name,
                uuid=uuid4(),
                memory_bytes=memory_bytes,
                image=image,
                acceleration=acceleration,
                console=console_path(root, name),
                witness=witness,
                metadata=(metadata or {}).get(name),
                ram_in_files=ram_in_files,
            )
            files.write(record_path(root, name), xml)
            host.define(xml)
            host.start(name)
            _log.info("lab guest %s started", name)
        for name in made:
            if not _answers(host, root, name, deadline_ns, clock):
                raise _not_up(root, name, "its QEMU process has ended")
        for name in made:
            # It has booted with the time of its RTC, which counts whole seconds.
            now = {"execute": "guest-set-time", "arguments": {"time": clock.real_ns()}}
            host.agent(name, now, SET_TIME_TIMEOUT_NS)
    except BaseException:
        for name in made:
            with suppress(HostUpdateError):
                _remove(host, root, name, keep_logs=False)
        raise
    return status(host, root)


def down(
    host: LabHost, root: Path, *, names: Sequence[str] | None = None, keep_logs: bool = False
) -> tuple[str, ...]:
    """Destroy and forget the lab guests ``names`` (all by default); returns those removed.

    Only guests that ``up`` has made under ``root`` are touched; asked for any other, it raises
    ``LabError`` before anything is done. Repeatable: what is gone already is no error. Raises
    what ``host`` raises; a guest that could not be removed keeps its record for the next call.
    """
    own = recorded_names(root)
    for name in names or ():
        if not is_own_name(name) or (name in _active(host) and name not in own):
            problem = f"{name} is not a lab guest of {root}"
            raise LabError(problem, remedy="`hostupdate lab status` lists the lab guests")
    chosen = [name for name in own if names is None or name in names]
    for name in chosen:
        _remove(host, root, name, keep_logs=keep_logs)
    return tuple(chosen)


def _answers(host: LabHost, root: Path, name: str, deadline_ns: int, clock: Clock) -> bool:
    """Wait until the guest is ready and its agent answers; False when it ends before.

    Raises ``LabError`` at the deadline, after one look at least.
    """
    log = console_path(root, name)
    while True:
        problem = "it is not ready"
        if console.ready(log) is not None:
            try:
                host.agent(name, {"execute": "guest-ping"}, PING_TIMEOUT_NS)
                return True
            except HostUpdateError as error:
                problem = f"its agent does not answer ({error})"
        if not _active(host).get(name):
            return False
        if clock.monotonic_ns() >= deadline_ns:
            raise _not_up(root, name, problem)
        clock.sleep_ns(console.POLL_NS)


def _not_up(root: Path, name: str, why: str) -> LabError:
    said = console.tail(console_path(root, name)) or "(nothing)"
    problem = f"lab guest {name} did not come up: {why}; its console says last:\n{said}"
    return LabError(problem, remedy="look at the machine's load and free memory, then try again")


def _remove(host: LabHost, root: Path, name: str, *, keep_logs: bool) -> None:
    known = _active(host)
    if known.get(name):
        try:
            host.destroy(name)
        except HostUpdateError:
            # libvirt says "domain is not running" when it sees the death that it caused first.
            if _active(host).get(name):
                raise
    if name in known:
        host.undefine(name)
    if not keep_logs:
        for log in log_paths(root, name):
            log.unlink(missing_ok=True)
    record_path(root, name).unlink(missing_ok=True)


def _active(host: LabHost) -> dict[str, bool]:
    return {guest.name: guest.active for guest in host.names()}


def _status(root: Path, name: str, active: bool) -> GuestStatus:
    log = console_path(root, name)
    return GuestStatus(
        name=name,
        active=active,
        ready=active and console.ready(log) is not None,
        tick=console.last_tick(log),
        console=log,
    )
