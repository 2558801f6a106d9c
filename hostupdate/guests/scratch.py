"""Making and removing guests: what the lab needs of libvirt, and nothing else does."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import libvirt_qemu

from hostupdate.errors import HypervisorError
from hostupdate.guests.hypervisor import Hypervisor

#: Starting or ending a QEMU takes longer than a question.
_LIFE_NS = 20_000_000_000


class ScratchGuests:
    """Scratch guests through an open connection. Errors are those of :class:`Hypervisor`."""

    def __init__(self, hypervisor: Hypervisor) -> None:
        self._hypervisor = hypervisor

    def known(self) -> dict[str, bool]:
        """All guests by name; true for one that has a QEMU process."""

        def ask(connection: Any) -> dict[str, bool]:
            return {d.name(): bool(d.isActive()) for d in connection.listAllDomains()}

        return self._hypervisor.call("list guests", ask)

    def define(self, xml: str) -> None:
        """Defines a persistent guest."""
        self._hypervisor.call("define a guest", lambda connection: connection.defineXML(xml))

    def start(self, name: str) -> None:
        """Starts a defined guest."""
        self._of(f"start {name}", name, lambda domain: domain.create(), _LIFE_NS)

    def destroy(self, name: str) -> None:
        """Ends a guest at once, as by pulling its plug."""
        self._of(f"destroy {name}", name, lambda domain: domain.destroy(), _LIFE_NS)

    def suspend(self, name: str) -> None:
        """Suspends a guest, as its owner would."""
        self._of(f"suspend {name}", name, lambda domain: domain.suspend())

    def resume(self, name: str) -> None:
        """Resumes a guest, as its owner would."""
        self._of(f"resume {name}", name, lambda domain: domain.resume())

    def undefine(self, name: str) -> None:
        """Forgets a guest that does not run."""
        self._of(f"undefine {name}", name, lambda domain: domain.undefine(), _LIFE_NS)

    def agent(self, name: str, command: Mapping[str, Any], timeout_ns: int) -> Mapping[str, Any]:
        """Sends the guest agent a command; its answer, decoded."""
        seconds = max(1, timeout_ns // 1_000_000_000)
        text = json.dumps(command)

        def ask(domain: Any) -> str:
            return str(libvirt_qemu.qemuAgentCommand(domain, text, seconds, 0))

        answer = json.loads(self._of(f"agent of {name}", name, ask, timeout_ns + 1_000_000_000))
        if not isinstance(answer, dict):
            raise HypervisorError(f"agent of {name}: an answer that is no object")
        return answer

    def _of(
        self, what: str, name: str, act: Callable[[Any], Any], timeout_ns: int | None = None
    ) -> Any:
        def run(connection: Any) -> Any:
            return act(connection.lookupByName(name))

        return self._hypervisor.call(what, run, timeout_ns)
