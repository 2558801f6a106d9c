"""A guest's own monitor socket: the way to its QEMU when libvirt's daemon is away.

QEMU serves one client on it. libvirt's daemon is that client while it lives; once the daemon is
gone the socket is free. Only used to resume a guest that the daemon can no longer resume.
"""

from __future__ import annotations

import asyncio

from qemu.qmp import QMPClient, QMPError

from hostupdate.errors import HypervisorError


def resume_by_monitor(socket_path: str, timeout_ns: int) -> None:
    """Connects, says ``cont`` and waits until QEMU reports that it runs.

    Raises HypervisorError when the socket is taken, gone or does not answer in time: the guest's
    state is unknown then.
    """

    async def talk() -> None:
        client = QMPClient("hostupdate")
        await client.connect(socket_path)
        try:
            await client.execute("cont")
            status = await client.execute("query-status")
            if not isinstance(status, dict) or not status.get("running"):
                raise HypervisorError(f"{socket_path}: QEMU does not run after cont: {status}")
        finally:
            await client.disconnect()

    async def bounded() -> None:
        async with asyncio.timeout(timeout_ns / 1e9):
            await talk()

    try:
        asyncio.run(bounded())
    except TimeoutError as error:
        raise HypervisorError(f"{socket_path}: no answer; another client may hold it") from error
    except (OSError, QMPError) as error:
        raise HypervisorError(f"{socket_path}: {error}") from error
