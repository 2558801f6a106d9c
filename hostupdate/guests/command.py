"""QMP commands to a guest through libvirt, which stays its only monitor client."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hostupdate.guests import streaming
from hostupdate.guests.hypervisor import Hypervisor

#: What a command that is done when nobody waits for it any more must not leave behind.
_UNDO = {"stop": streaming.go_on, "migrate-set-capabilities": streaming.heed_shared}


class GuestCommand:
    """Commands to the guest ``uuid``. libvirt marks its QEMU as ``custom-monitor`` in its log.

    Raises HypervisorError where libvirt or QEMU answers with an error, DeadlineError: of a ``stop``
    or a capability that comes after it, the undo follows at once.
    """

    def __init__(self, hypervisor: Hypervisor, uuid: str, timeout_ns: int) -> None:
        self._hypervisor = hypervisor
        self._uuid = uuid
        self._timeout_ns = timeout_ns

    def __call__(self, name: str, arguments: Mapping[str, Any], *, fd: int | None = None) -> Any:
        def send(connection: Any) -> tuple[Any, Any]:
            domain = connection.lookupByUUIDString(self._uuid)
            return streaming.command(domain, name, arguments, fd), domain

        def late(answered: tuple[Any, Any]) -> None:
            if name in _UNDO:
                _UNDO[name](answered[1])

        return self._hypervisor.call(f"monitor {name}", send, self._timeout_ns, late)[0]
