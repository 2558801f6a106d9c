"""The directory under which lab guests live, and what of it is ours.

Beside what libvirt's embedded driver keeps there: ``etc/qemu.conf``, ``guests/NAME.xml`` (written
before a guest is defined, removed after it is undefined: the proof that the guest is ours) and
``console/NAME.log``.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from hostupdate.errors import LabError
from hostupdate.lab import files

_OWN_NAME = re.compile(r"hu-lab-[1-9][0-9]*")
#: A UNIX socket's path holds 107 bytes; libvirt adds at most so many to the root.
_LONGEST_SOCKET = "/lib/qemu/channel/target/domain-1000-hu-lab-100/org.qemu.guest_agent.0"
#: No virtlogd, no security labels, QEMU as the user who runs the lab: nothing but the root is
#: touched, and it may lie where no other user can go.
_QEMU_CONF = """\
stdio_handler = "file"
security_driver = "none"
user = "+{uid}"
group = "+{gid}"
dynamic_ownership = 0
remember_owner = 0
namespaces = []
cgroup_controllers = []
"""


def prepare_root(root: Path) -> None:
    """Make ``root`` (absolute) fit for ``qemu:///embed?root=ROOT``; call it before opening that.

    Repeatable. Raises ``LabError`` when the path is relative or too long for the sockets below
    it, ``OSError`` when it cannot be written.
    """
    if not root.is_absolute():
        raise LabError(f"the lab's root {root} is not absolute", remedy="give an absolute path")
    room = 107 - len(_LONGEST_SOCKET)
    if len(os.fsencode(root)) > room:
        problem = f"the path of the lab's root {root} is longer than {room} bytes"
        raise LabError(problem, remedy="choose a shorter --state directory")
    for name in ("etc", "guests", "console"):
        (root / name).mkdir(parents=True, exist_ok=True)
    settings = _QEMU_CONF.format(uid=os.geteuid(), gid=os.getegid())
    conf = root / "etc/qemu.conf"
    if not conf.exists() or conf.read_text() != settings:
        files.write(conf, settings)


def console_path(root: Path, name: str) -> Path:
    """The console log of the guest ``name``."""
    return root / "console" / f"{name}.log"


def log_paths(root: Path, name: str) -> tuple[Path, ...]:
    """All logs of the guest ``name``: its console's, and what QEMU itself said."""
    return console_path(root, name), root / "log/qemu" / f"{name}.log"


def record_path(root: Path, name: str) -> Path:
    """The XML that the guest ``name`` was made from; exists as long as the guest is ours."""
    return root / "guests" / f"{name}.xml"


def recorded_names(root: Path) -> list[str]:
    """Names of the guests that ``up`` has made, by number."""
    names = [path.stem for path in (root / "guests").glob("*.xml")]
    own = [name for name in names if is_own_name(name)]
    return sorted(own, key=lambda name: int(name.rpartition("-")[2]))


def is_own_name(name: str) -> bool:
    """Whether ``name`` is one that a lab guest may bear."""
    return _OWN_NAME.fullmatch(name) is not None
