"""Connection URIs: which hypervisors can be this host's."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import parse_qs, quote, urlsplit

from hostupdate.errors import InputError


def embedded_root(uri: str) -> Path | None:
    """The root directory of libvirt's embedded QEMU driver, or None for a daemon's URI.

    Raises InputError for a URI that cannot lead to guests of this host.
    """
    parts = urlsplit(uri)
    if "+" in parts.scheme or parts.netloc:
        raise InputError(
            "--connect", "", f"{uri!r} leads to another host",
            remedy="run hostupdate on the host whose guests are to be paused",
        )  # fmt: skip
    if parts.scheme != "qemu":
        raise InputError(
            "--connect", "", f"{uri!r} is not a QEMU driver",
            remedy="use qemu:///system or qemu:///embed?root=DIR",
        )  # fmt: skip
    if parts.path != "/embed":
        return None
    roots = parse_qs(parts.query).get("root", [])
    if len(roots) != 1 or not roots[0].startswith("/"):
        raise InputError(
            "--connect", "", f"{uri!r} names no root directory",
            remedy="write qemu:///embed?root=/absolute/directory",
        )  # fmt: skip
    return Path(roots[0])


def default_lab_uri(state: Path) -> str:
    """URI of the lab's guests for a state directory."""
    return f"qemu:///embed?root={quote(str(state / 'lab'))}"
