"""What can go wrong, and in what state the host is when it does.

::

    HostUpdateError
    ├── InputError            bad manifest, configuration, record or argument; nothing happened
    ├── ImageError            a guest's saved state is not what a handover wrote; it is untouched
    ├── PrerequisiteError     a program, package or kernel feature is missing; nothing happened
    ├── RefusedError          judged and declined; nothing happened
    ├── BusyError             another run holds the host; nothing happened
    ├── DeadlineError         an outside party did not answer in time
    ├── CoreError             the C core returned -errno; the call undid what it had done
    ├── HypervisorError       libvirt or QEMU reported an error or is unreachable
    │   └── AgentError        a guest's agent is missing, silent, or refused a command
    ├── GuestError            one guest, by name, could not be handled
    │   └── StopError         it could not be stopped
    ├── StepError             one step of an update failed, hung or did not verify
    ├── Interrupted           the operator or the system asked the run to stop
    └── LabError              a scratch guest could not be made

Faces turn these into messages and exit codes; nobody else prints them.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import strerror


class HostUpdateError(Exception):
    """Root of every error that this project raises on purpose.

    ``remedy`` is one sentence that tells the operator what to do, or the empty string.
    """

    remedy: str

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.remedy = remedy


class InputError(HostUpdateError):
    """A file, field or argument from outside is wrong. Nothing was changed.

    ``source`` names the file (or ``command line``), ``field`` the place in it in dotted form
    (``step[2].timeout``; empty where the whole is wrong), ``problem`` what is wrong with which
    value.
    """

    def __init__(self, source: str, field: str, problem: str, *, remedy: str) -> None:
        where = f"{source}: {field}" if field else source
        super().__init__(f"{where}: {problem}", remedy=remedy)
        self.source = source
        self.field = field
        self.problem = problem


class ImageError(HostUpdateError):
    """A guest's saved state is not what a handover wrote, or cannot be read or placed. The state
    is as it was.

    ``source`` names the file or the stream, ``field`` the place in it, ``offset`` where that place
    begins, in bytes from the start of the file (header and XML) or of the migration stream (all
    else); None where the whole is meant. ``problem`` says what was found and what was expected.
    """

    def __init__(
        self, source: str, field: str, offset: int | None, problem: str, *, remedy: str
    ) -> None:
        where = f"{source}: {field}" if offset is None else f"{source}: {field} at byte {offset}"
        super().__init__(f"{where}: {problem}", remedy=remedy)
        self.source = source
        self.field = field
        self.offset = offset
        self.problem = problem


class PrerequisiteError(HostUpdateError):
    """Something that must be present on the host is not. Nothing was changed."""

    def __init__(self, what: str, *, remedy: str) -> None:
        super().__init__(what, remedy=remedy)
        self.what = what


class RefusedError(HostUpdateError):
    """The update was judged and declined, before anything was touched.

    ``reasons`` holds at least one sentence.
    """

    def __init__(self, reasons: Sequence[str], *, remedy: str = "") -> None:
        super().__init__("; ".join(reasons), remedy=remedy)
        self.reasons = tuple(reasons)


class BusyError(HostUpdateError):
    """Another run holds the host. ``holder`` describes it: run, pid and start time."""

    def __init__(self, holder: str) -> None:
        super().__init__(
            f"the host is held by {holder}",
            remedy="wait for that run to end; `hostupdate status` shows it",
        )
        self.holder = holder


class DeadlineError(HostUpdateError):
    """``what`` did not finish within ``timeout_ns``; it may still finish later, unobserved."""

    def __init__(self, what: str, timeout_ns: int, *, remedy: str = "") -> None:
        super().__init__(f"{what}: no answer within {timeout_ns / 1e9:.3g} s", remedy=remedy)
        self.what = what
        self.timeout_ns = timeout_ns


class CoreError(HostUpdateError):
    """A call into the C core failed with ``errno``. What that call had changed is undone."""

    def __init__(self, operation: str, errno: int, *, detail: str = "") -> None:
        text = f"{operation}: {strerror(errno)}"
        super().__init__(f"{text} ({detail})" if detail else text)
        self.operation = operation
        self.errno = errno
        self.detail = detail


class HypervisorError(HostUpdateError):
    """libvirt or QEMU answered with an error, or cannot be reached."""


class AgentError(HypervisorError):
    """A guest's agent did not do what it was asked.

    ``refused``: it answered, with an error; else it is silent, and a command that it was sent may
    still be executed. ``missing``: the guest has no channel for one.
    """

    def __init__(
        self, problem: str, *, refused: bool = False, missing: bool = False, remedy: str = ""
    ) -> None:
        super().__init__(problem, remedy=remedy)
        self.refused = refused
        self.missing = missing


class GuestError(HostUpdateError):
    """``guest`` (its name) could not be handled; the message says what was tried."""

    def __init__(self, guest: str, problem: str, *, remedy: str = "") -> None:
        super().__init__(f"guest {guest}: {problem}", remedy=remedy)
        self.guest = guest
        self.problem = problem


class StopError(GuestError):
    """A guest could not be stopped. No guest is stopped by us then, except that those of ``late``
    (uuids) did not answer: one of them that stops after all is resumed at that moment."""

    def __init__(
        self, guest: str, problem: str, *, late: Sequence[str] = (), remedy: str = ""
    ) -> None:
        super().__init__(guest, problem, remedy=remedy)
        self.late = tuple(late)


class StepError(HostUpdateError):
    """``step`` failed, hung or did not verify; its process group is gone when this is raised."""

    def __init__(self, step: str, problem: str) -> None:
        super().__init__(f"step {step!r}: {problem}")
        self.step = step
        self.problem = problem


class Interrupted(HostUpdateError):
    """A signal asked the run to stop."""


class LabError(HostUpdateError):
    """A scratch guest could not be made; what was made of it has been removed."""

    def __init__(self, problem: str, *, remedy: str) -> None:
        super().__init__(problem, remedy=remedy)
