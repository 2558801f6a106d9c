"""Guests' agents, asked through libvirt."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import libvirt
import libvirt_qemu

from hostupdate.errors import AgentError
from hostupdate.guests.hypervisor import Hypervisor
from hostupdate.model import AgentAnswer

_SECOND_NS = 1_000_000_000

_SILENT = {
    libvirt.VIR_ERR_AGENT_UNRESPONSIVE,
    libvirt.VIR_ERR_AGENT_UNSYNCED,
    libvirt.VIR_ERR_OPERATION_TIMEOUT,
    libvirt.VIR_ERR_OPERATION_INVALID,
    getattr(libvirt, "VIR_ERR_AGENT_COMMAND_TIMEOUT", -1),  # since libvirt 7.1
}


class Agents:
    """The agents of an open connection's guests. Calls for different guests may run in parallel;
    one that hangs holds up nobody else.

    A guest that agent calls are made for is not paused or frozen: libvirt would wait for it.
    """

    def __init__(self, hypervisor: Hypervisor) -> None:
        self._hypervisor = hypervisor

    def revive(self) -> None:
        """Connects again where the daemon was what was updated. HypervisorError: it is away."""
        self._hypervisor.revive()

    def ask(
        self, uuid: str, command: Callable[[int], Mapping[str, Any]], timeout_ns: int
    ) -> AgentAnswer:
        """Sends what ``command`` makes of the CLOCK_MONOTONIC ns at which it is sent.

        libvirt counts its time-out in whole seconds; ours is ``timeout_ns``. AgentError, or
        DeadlineError: whether the command is executed, and when, is not known then.
        """
        seconds = max(1, -(-timeout_ns // _SECOND_NS))

        def run(connection: Any) -> AgentAnswer:
            try:
                domain = connection.lookupByUUIDString(uuid)
                sent_ns = time.monotonic_ns()
                text = json.dumps(command(sent_ns))
                reply = libvirt_qemu.qemuAgentCommand(domain, text, seconds, 0)
                received_ns = time.monotonic_ns()
            except libvirt.libvirtError as error:
                raise _agent_error(error) from error
            answer = json.loads(reply)
            if not isinstance(answer, dict) or "return" not in answer:
                raise AgentError("an answer of its agent that says nothing", refused=True)
            return AgentAnswer(value=answer["return"], sent_ns=sent_ns, received_ns=received_ns)

        return self._hypervisor.call("guest agent", run, timeout_ns)

    def sync_rtc(self, uuid: str, timeout_ns: int) -> None:
        """The guest's clock from its RTC, as ``virsh domtime --sync`` does. AgentError."""

        def run(connection: Any) -> None:
            try:
                domain = connection.lookupByUUIDString(uuid)
                domain.setTime({"seconds": 0, "nseconds": 0}, libvirt.VIR_DOMAIN_TIME_SYNC)
            except libvirt.libvirtError as error:
                raise _agent_error(error) from error

        self._hypervisor.call("set the time from the RTC", run, timeout_ns)


def _agent_error(error: libvirt.libvirtError) -> AgentError:
    code = error.get_error_code()
    if code == libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED:
        return AgentError(
            "it has no guest agent",
            missing=True,
            remedy="give it a channel org.qemu.guest_agent.0 and install qemu-guest-agent in it",
        )
    if code in _SILENT:
        return AgentError(
            f"its agent does not answer ({error})",
            remedy="start qemu-guest-agent in the guest",
        )
    return AgentError(str(error), refused=True)
