"""What a guest's QEMU says of its RAM and of what keeps it from being handed over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hostupdate.eligibility import RamBackend

#: Sends one QMP command with its arguments, with a deadline; returns what it returns. Raises
#: HypervisorError where QEMU answers with an error or not at all, DeadlineError.
Command = Callable[[str, Mapping[str, Any]], Any]

_BACKEND = "child<memory-backend-"


def backends(command: Command) -> tuple[RamBackend, ...]:
    """The memory backends, hot-plugged ones too. Empty for a QEMU that was given none: its RAM is
    private then. Raises what ``command`` raises."""
    found = []
    for child in command("qom-list", {"path": "/objects"}):
        if child["type"].startswith(_BACKEND):
            kind = child["type"].removeprefix(_BACKEND).removesuffix(">")
            found.append(_backend(command, child["name"], kind))
    return tuple(found)


def _backend(command: Command, name: str, kind: str) -> RamBackend:
    def get(field: str) -> Any:
        return command("qom-get", {"path": f"/objects/{name}", "property": field})

    is_file = kind == "file"
    return RamBackend(
        id=name,
        kind=kind,
        size_bytes=get("size"),
        shared=get("share"),
        discard=is_file and get("discard-data"),
        path=get("mem-path") if is_file else "",
    )


def blockers(command: Command) -> tuple[str, ...]:
    """QEMU's reasons against saving this guest (``blocked-reasons``, since QEMU 6.0)."""
    return tuple(command("query-migrate", {}).get("blocked-reasons", ()))


def block_jobs(command: Command) -> tuple[str, ...]:
    """Ids of the block jobs that run."""
    return tuple(job["device"] for job in command("query-block-jobs", {}))
