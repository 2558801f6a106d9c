"""One libvirt connection to this host's QEMU driver, system-wide or embedded."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import libvirt

from hostupdate.durations import format_duration
from hostupdate.errors import (
    DeadlineError,
    GuestError,
    HypervisorError,
    InputError,
    StopError,
)
from hostupdate.guestpolicy import NAMESPACE, GuestPolicy, decode_guest_policy
from hostupdate.guests.uri import embedded_root
from hostupdate.guests.workers import Worker, call_within
from hostupdate.model import Guest, GuestState

T = TypeVar("T")

_STATES = {
    libvirt.VIR_DOMAIN_RUNNING: GuestState.RUNNING,
    libvirt.VIR_DOMAIN_BLOCKED: GuestState.RUNNING,
    libvirt.VIR_DOMAIN_PAUSED: GuestState.PAUSED,
    libvirt.VIR_DOMAIN_PMSUSPENDED: GuestState.PAUSED,
    libvirt.VIR_DOMAIN_SHUTDOWN: GuestState.RUNNING,  # shutting down: its vCPUs still run
    libvirt.VIR_DOMAIN_SHUTOFF: GuestState.SHUTOFF,
    libvirt.VIR_DOMAIN_CRASHED: GuestState.CRASHED,
}
_KEEPALIVE_S = 2
_KEEPALIVE_COUNT = 3

_event_loop_started = False


def _start_event_loop() -> None:
    """libvirt's event loop: keepalive needs it, and the embedded driver notices a guest's end by
    it. Once a process, before the first connection is opened."""
    global _event_loop_started
    if _event_loop_started:
        return
    libvirt.registerErrorHandler(lambda *_: None, None)  # else libvirt prints to stderr
    libvirt.virEventRegisterDefaultImpl()

    def run() -> None:
        while True:
            libvirt.virEventRunDefaultImpl()

    threading.Thread(target=run, name="libvirt-events", daemon=True).start()
    _event_loop_started = True


class Hypervisor:
    """Guests through libvirt. ``timeout_ns`` bounds every call.

    A call that does not answer raises DeadlineError, an answer that is an error HypervisorError
    (GuestError where it is about one guest). Neither closes the connection.
    """

    def __init__(self, uri: str, *, timeout_ns: int) -> None:
        self.uri = uri
        self._timeout_ns = timeout_ns
        root = embedded_root(uri)
        if root is not None and not root.is_dir():  # libvirt would make it
            raise HypervisorError(
                f"libvirt: {uri}: {root}: no such directory",
                remedy="`hostupdate lab up` makes guests for --connect lab",
            )
        self._embedded = root is not None
        self._workers: dict[str, Worker] = {}
        self._domains: dict[str, Any] = {}
        self._guest_connections: list[Any] = []
        _start_event_loop()
        self._connection: Any = None
        self._open(f"open {uri}", timeout_ns)

    def close(self) -> None:
        """Closes the connection; guests are not touched. Never raises."""
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()
        self._domains.clear()
        connection, self._connection = self._connection, None
        deadline_ns = time.monotonic_ns() + self._timeout_ns
        closing = []
        for each in [connection, *self._guest_connections]:
            if each is not None:  # one that hangs holds up none of the others
                worker = Worker("close")
                closing.append(worker.submit("close", each.close))
                worker.close()
        self._guest_connections.clear()
        for call in closing:
            with suppress(libvirt.libvirtError, DeadlineError):
                call.result(deadline_ns, self._timeout_ns)

    def guests(self) -> list[Guest]:
        """Every guest that libvirt knows, by name; InputError for metadata that is wrong."""
        found = []
        for domain in self._call("list guests", lambda: self._connection.listAllDomains()):
            guest = self._call("inspect a guest", partial(self._describe, domain))
            if guest is not None:
                found.append(guest)
        return sorted(found, key=lambda guest: guest.name)

    def xml(self, uuid: str) -> str:
        """The live definition of a guest."""
        return str(
            self._call(
                "describe a guest",
                lambda: self._connection.lookupByUUIDString(uuid).XMLDesc(),
            )
        )

    def version(self) -> str:
        """libvirt's version, as major.minor.release."""
        number = self._call("version", lambda: self._connection.getLibVersion())
        return f"{number // 1000000}.{number // 1000 % 1000}.{number % 1000}"

    def state(self, uuid: str, timeout_ns: int | None = None) -> GuestState:
        """GONE where libvirt knows no such guest, UNKNOWN where it does not answer."""

        def ask() -> GuestState:
            try:
                number, _reason = self._connection.lookupByUUIDString(uuid).state()
            except libvirt.libvirtError as error:
                if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                    return GuestState.GONE
                raise
            return _STATES.get(number, GuestState.UNKNOWN)

        with suppress(HypervisorError, DeadlineError):
            return self._call("state", ask, timeout_ns)
        try:
            self._reopen(timeout_ns)
            return self._call("state", ask, timeout_ns)
        except (HypervisorError, DeadlineError):
            return GuestState.UNKNOWN

    def prepare(self, uuids: Sequence[str], timeout_ns: int | None = None) -> None:
        """Looks the guests up and starts a worker thread for each, so that stopping them needs
        neither later. HypervisorError where one is unknown.

        Under a daemon each guest has a connection of its own: on a common one a guest that does
        not answer keeps the others from being resumed (seen; and libvirtd reads no more than
        max_client_requests calls of a connection at a time).
        """
        for uuid in uuids:
            connection = self._connection
            if not self._embedded:
                connection = self._call("open for a guest", self._connect, timeout_ns)
                self._guest_connections.append(connection)
            self._domains[uuid] = self._call(
                "look up a guest", partial(connection.lookupByUUIDString, uuid), timeout_ns
            )
            self._workers[uuid] = Worker(f"guest-{uuid[:8]}")

    def stop(self, guests: Sequence[tuple[str, str]], timeout_ns: int) -> dict[str, int]:
        """Suspends the prepared guests, given as (uuid, name), in parallel.

        Returns uuid -> CLOCK_MONOTONIC ns at which each suspend was asked for. Raises StopError
        for the first that was not stopped, by its owner's doing or not in time; those that were
        are running again then, and one that stops later is resumed at that moment.
        """
        deadline_ns = time.monotonic_ns() + timeout_ns
        calls = {
            uuid: self._workers[uuid].submit(
                f"suspend {name}",
                partial(_suspend, self._domains[uuid]),
                partial(_take_back, self._domains[uuid]),
            )
            for uuid, name in guests
        }
        problems: dict[str, str] = {}
        late = []
        stopped = []
        for uuid, name in guests:
            try:
                if calls[uuid].result(deadline_ns, timeout_ns):
                    stopped.append((uuid, name))
                else:
                    problems.setdefault(name, "its owner has paused it")
            except DeadlineError:
                late.append(uuid)
                problems.setdefault(name, f"it did not stop within {format_duration(timeout_ns)}")
                self._workers[uuid] = Worker(f"guest-{uuid[:8]}")
            except libvirt.libvirtError as error:
                problems.setdefault(name, f"libvirt cannot suspend it: {error}")
        if problems:
            self.resume(stopped, timeout_ns)
            name, problem = next(iter(problems.items()))
            remedy = "look for storage that does not answer, or a job that holds its lock"
            raise StopError(name, problem, late=late, remedy=remedy if late else "")
        return {uuid: call.started_ns for uuid, call in calls.items()}

    def resume(
        self, guests: Sequence[tuple[str, str]], timeout_ns: int
    ) -> dict[str, int | Exception]:
        """Resumes the prepared guests in parallel, all of them whatever happens to one.

        Returns for each uuid the CLOCK_MONOTONIC ns at which it ran again, or the error. A daemon
        that was started anew meanwhile is connected to again.
        """
        deadline_ns = time.monotonic_ns() + timeout_ns
        outcome = self._resume(guests, deadline_ns, timeout_ns)
        failed = [guest for guest in guests if not isinstance(outcome[guest[0]], int)]
        if failed:
            with suppress(HypervisorError, DeadlineError):
                left_ns = max(1, deadline_ns - time.monotonic_ns())
                self._reopen(left_ns)
                self.prepare([uuid for uuid, _ in failed], left_ns)
                outcome |= self._resume(failed, deadline_ns, timeout_ns)
        return outcome

    def _resume(
        self, guests: Sequence[tuple[str, str]], deadline_ns: int, timeout_ns: int
    ) -> dict[str, int | Exception]:
        calls = {
            uuid: self._workers[uuid].submit(
                f"resume {name}", partial(_let_run, self._domains[uuid])
            )
            for uuid, name in guests
        }
        outcome: dict[str, int | Exception] = {}
        for uuid, name in guests:
            try:
                calls[uuid].result(deadline_ns, timeout_ns)
                outcome[uuid] = calls[uuid].ended_ns
            except (DeadlineError, libvirt.libvirtError) as error:
                outcome[uuid] = GuestError(name, f"libvirt cannot resume it: {error}")
                self._workers[uuid].close()
                self._workers[uuid] = Worker(f"guest-{uuid[:8]}")
        return outcome

    def apart(self) -> Hypervisor:
        """A connection of its own to the same libvirt, for calls that may hang: they keep no other
        calls waiting, see :meth:`prepare`. The embedded driver serves one: it is this one then.
        :meth:`let_go` ends it."""
        return self if self._embedded else Hypervisor(self.uri, timeout_ns=self._timeout_ns)

    def let_go(self, own: Hypervisor) -> None:
        """Closes what :meth:`apart` has opened."""
        if own is not self:
            own.close()

    def call(
        self,
        what: str,
        run: Callable[[Any], T],
        timeout_ns: int | None = None,
        on_late: Callable[[T], None] | None = None,
    ) -> T:
        """Runs ``run`` with the connection on a thread of its own, within a deadline; ``on_late``
        takes back what succeeds after it."""
        return self._call(what, lambda: run(self._connection), timeout_ns, on_late)

    def revive(self) -> None:
        """Opens the connection again where its daemon has gone. HypervisorError, DeadlineError:
        it is still away."""
        if not self._embedded and self._connection.isAlive() != 1:
            self._reopen(None)

    def _reopen(self, timeout_ns: int | None) -> None:
        """The daemon may have been what was updated: a connection outlives it only in name."""
        if self._embedded or self._connection is None or self._connection.isAlive() == 1:
            raise HypervisorError(f"libvirt: {self.uri} does not answer", remedy=_remedy(self.uri))
        self._open(f"open {self.uri} again", timeout_ns)

    def _open(self, what: str, timeout_ns: int | None) -> None:
        self._connection = self._call(what, self._connect, timeout_ns)

    def _connect(self) -> Any:
        connection = libvirt.open(self.uri)
        if not self._embedded:
            connection.setKeepAlive(_KEEPALIVE_S, _KEEPALIVE_COUNT)
        return connection

    def _describe(self, domain: Any) -> Guest | None:
        name = domain.name()
        try:
            state, max_kib, _memory_kib, vcpus, _cpu_ns = domain.info()
            try:
                element = domain.metadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, NAMESPACE)
            except libvirt.libvirtError as error:
                if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN_METADATA:
                    raise
                element = None
            policy = GuestPolicy() if element is None else decode_guest_policy(element, name)
            return Guest(
                name=name,
                uuid=domain.UUIDString(),
                state=_STATES.get(state, GuestState.UNKNOWN),
                memory_bytes=max_kib * 1024,
                vcpus=vcpus,
                policy=policy,
            )
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                return None  # it went away between the list and the look
            raise

    def _call(
        self,
        what: str,
        run: Callable[[], T],
        timeout_ns: int | None = None,
        on_late: Callable[[T], None] | None = None,
    ) -> T:
        try:
            return call_within(what, timeout_ns or self._timeout_ns, run, on_late)
        except libvirt.libvirtError as error:
            raise HypervisorError(f"libvirt: {what}: {error}", remedy=_remedy(self.uri)) from error
        except InputError:
            raise
        except DeadlineError as error:
            error.remedy = _remedy(self.uri)
            raise


def _suspend(domain: Any) -> bool:
    """False where it did not run: libvirt suspends a paused guest without a word, and we would
    resume it against its owner's will."""
    if _STATES.get(domain.state()[0]) is not GuestState.RUNNING:
        return False
    domain.suspend()
    return True


def _take_back(domain: Any, stopped: bool) -> None:
    if stopped:
        _let_run(domain)


def _let_run(domain: Any) -> None:
    """libvirt refuses to resume a guest that runs."""
    try:
        domain.resume()
    except libvirt.libvirtError:
        if _STATES.get(domain.state()[0]) is not GuestState.RUNNING:
            raise


def _remedy(uri: str) -> str:
    if "/embed" in uri:
        return "only one process at a time can open an embedded driver's root: end the other one"
    return f"check that libvirt's daemon runs and answers: virsh -c {uri} list"
