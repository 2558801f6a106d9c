"""KVM's kernel modules: they can be replaced once nobody uses them."""

from __future__ import annotations

import time
from pathlib import Path

_SYS_MODULE = Path("/sys/module")
#: Those that hold others: kvm itself is held by each of them.
_VENDORS = ("kvm_intel", "kvm_amd")
_POLL_S = 0.01


def in_use(patience_ns: int, modules: Path = _SYS_MODULE) -> str:
    """Which of them are still in use ``patience_ns`` from now, by how many; empty: none is.

    A virtual machine that is gone lets go of them when the last of its descriptors has been
    closed, a moment after its process (kvm_main.c: kvm_destroy_vm). The count is that of
    /sys/module/NAME/refcnt; a module that is built in has none and cannot be replaced.
    """
    end_ns = time.monotonic_ns() + patience_ns
    while True:
        counts = {name: _count(modules / name / "refcnt") for name in _VENDORS}
        used = [f"{name} was in use by {count}" for name, count in counts.items() if count]
        if not used or time.monotonic_ns() >= end_ns:
            return ", ".join(used)
        time.sleep(_POLL_S)


def _count(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0
