"""QMP commands to a guest through libvirt, which stays its only monitor client."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import libvirt_qemu

from hostupdate.errors import HypervisorError
from hostupdate.guests.hypervisor import Hypervisor


class GuestCommand:
    """Commands to the guest ``uuid``. libvirt marks its QEMU as ``custom-monitor`` in its log.

    Raises HypervisorError where libvirt or QEMU answers with an error, DeadlineError.
    """

    def __init__(self, hypervisor: Hypervisor, uuid: str, timeout_ns: int) -> None:
        self._hypervisor = hypervisor
        self._uuid = uuid
        self._timeout_ns = timeout_ns

    def __call__(self, name: str, arguments: Mapping[str, Any], *, fd: int | None = None) -> Any:
        text = json.dumps({"execute": name, "arguments": arguments}, separators=(",", ":"))

        def send(connection: Any) -> str:
            domain = connection.lookupByUUIDString(self._uuid)
            if fd is None:
                return str(libvirt_qemu.qemuMonitorCommand(domain, text, 0))
            answer, _files = libvirt_qemu.qemuMonitorCommandWithFiles(domain, text, [fd], 0)
            return str(answer)

        answer = json.loads(self._hypervisor.call(f"monitor {name}", send, self._timeout_ns))
        if "error" in answer:
            raise HypervisorError(f"QEMU: {name}: {answer['error']['desc']}")
        return answer["return"]
