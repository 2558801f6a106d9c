"""What a guest's QEMU says of its RAM and of what keeps it from being handed over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from hostupdate.eligibility import RamBackend
from hostupdate.handover.harmless import Disk


class Command(Protocol):
    """Sends one QMP command with its arguments, and a descriptor where one goes with it, with a
    deadline; returns what it returns. Raises HypervisorError where QEMU answers with an error or
    cannot be reached, DeadlineError."""

    def __call__(
        self, name: str, arguments: Mapping[str, Any], *, fd: int | None = None
    ) -> Any: ...


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


def disks(command: Command) -> dict[str, Disk]:
    """Disks as they are now, by node name and by the id of their device: after a snapshot a device
    has another node than at its start. An empty drive has none."""
    found = {}
    for block in command("query-block", {}):
        inserted = block.get("inserted")
        if inserted is None:
            continue
        disk = Disk(inserted["image"]["virtual-size"], inserted["ro"])
        # /machine/peripheral/virtio-disk0/virtio-backend, or an id alone
        for name in [inserted.get("node-name", ""), *block.get("qdev", "").split("/")]:
            if name not in ("", "machine", "peripheral", "virtio-backend"):
                found[name] = disk
    return found
