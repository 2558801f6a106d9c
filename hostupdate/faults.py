"""Named places at which tests make a run fail or stand still. Inert unless asked for.

``HOSTUPDATE_FAULT`` names one place and what happens there::

    HOSTUPDATE_FAULT=freeze.end=fail       it raises FaultError
    HOSTUPDATE_FAULT=freeze.end=stop       the process stops as by SIGSTOP, for a test to kill it,
                                           to break something around it, or to let it go on
    HOSTUPDATE_FAULT=park.end@2=fail       at the second time that it is there, and at no other;
                                           without a number that is the first

Places in the engine are ``KIND.begin`` and ``KIND.end`` for each kind of action (``step:NAME`` for
steps), ``probe.started`` while libvirt's start of a QEMU is tried, ``rehearse.stopped`` while a
guest is, and ``park.parked`` once one is, in the recovery ``resume.WHAT``. The C core has its own,
compiled in only where HOSTUPDATE_FAULTS was set when it was built (csrc/fault.h).
"""

from __future__ import annotations

import os
import signal

from hostupdate.errors import HostUpdateError

_WHERE, _, _MODE = os.environ.get("HOSTUPDATE_FAULT", "").partition("=")
_PLACE, _, _TIME = _WHERE.partition("@")
_times = 0


class FaultError(HostUpdateError):
    """A test asked for it."""


def point(place: str) -> None:
    """Does what was asked for at this place, and nothing where nothing was."""
    global _times
    if place != _PLACE:
        return
    _times += 1
    if _times != int(_TIME or 1):
        return
    if _MODE == "fail":
        raise FaultError(f"fault at {place}")
    if _MODE == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
