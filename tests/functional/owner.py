"""``python -m tests.functional.owner STATE VERB NAME [ARGUMENT]``: what a guest's owner does.

A process of its own: the embedded driver is let go of only when its process ends.
"""

from __future__ import annotations

import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from hostupdate.cli.compose import vital_signs
from hostupdate.errors import HostUpdateError
from hostupdate.guests import Hypervisor, default_lab_uri
from hostupdate.guests.scratch import ScratchGuests
from hostupdate.host.processes import find_qemus

#: In a guest: is there when nothing is spoilt any more.
HEALED = "/run/healed"
_SECOND_NS = 1_000_000_000
_PATIENCE_NS = 40 * _SECOND_NS


def act(state: Path, verb: str, name: str, *arguments: str) -> str:
    """Runs this module for the guests of ``state``; what it prints."""
    argv = [sys.executable, "-m", "tests.functional.owner", str(state), verb, name, *arguments]
    done = subprocess.run(argv, check=True, timeout=60, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip()


class Owner(ScratchGuests):
    """Suspends, resumes, and does things in a guest through its agent."""

    def ping(self, name: str) -> None:
        """Waits until the agent answers."""
        self._wait(name, {"execute": "guest-ping"})

    def healed(self, name: str) -> None:
        """Waits until a script that spoilt something has put it back."""
        arguments = {"path": HEALED, "mode": "r"}
        self._wait(name, {"execute": "guest-file-open", "arguments": arguments})

    def _wait(self, name: str, command: Mapping[str, Any]) -> None:
        deadline_ns = time.monotonic_ns() + _PATIENCE_NS
        while True:
            try:
                self.agent(name, command, _SECOND_NS)
                return
            except HostUpdateError:
                if time.monotonic_ns() >= deadline_ns:
                    raise
                time.sleep(0.1)

    def shell(self, name: str, script: str) -> None:
        """Starts a shell script in the guest."""
        self._tell(name, "guest-exec", {"path": "/bin/sh", "arg": ["-c", script]})

    def plug(self, name: str, mac: str) -> None:
        """Gives the guest a network card, in a network of QEMU's own."""
        xml = _card(mac)
        self._of(f"plug {name}", name, lambda domain: domain.attachDevice(xml))

    def unplug(self, name: str, mac: str) -> None:
        """Takes it back; the guest lets go of it in its own time."""
        xml = _card(mac)
        self._of(f"unplug {name}", name, lambda domain: domain.detachDevice(xml))

    def links(self, name: str) -> None:
        """Prints the state of every link, one a line."""

        def ask(domain: Any) -> list[str]:
            devices = ET.fromstring(domain.XMLDesc()).iterfind("devices/interface")
            links = [device.find("link") for device in devices]
            return ["up" if link is None else str(link.get("state")) for link in links]

        print("\n".join(self._of(f"links of {name}", name, ask)))

    def look(self, name: str) -> None:
        """Prints the guest's vitals."""
        (guest,) = (each for each in self._hypervisor.guests() if each.name == name)
        pid = find_qemus([guest.uuid])[guest.uuid].pid
        found = vital_signs(self._hypervisor).look([(guest.uuid, pid)], 10 * _SECOND_NS)
        print(msgspec.json.encode(found[guest.uuid]).decode())

    def shift(self, name: str, ahead_ns: str) -> None:
        """Sets the guest's clock to the host's plus so many ns."""
        self._tell(name, "guest-set-time", {"time": time.time_ns() + int(ahead_ns)})

    def _tell(self, name: str, command: str, arguments: Mapping[str, Any]) -> None:
        self.ping(name)
        self.agent(name, {"execute": command, "arguments": arguments}, 10 * _SECOND_NS)


def _card(mac: str) -> str:
    return f"<interface type='user'><mac address='{mac}'/><model type='e1000'/></interface>"


if __name__ == "__main__":
    state, verb, *rest = sys.argv[1:]
    hypervisor = Hypervisor(default_lab_uri(Path(state)), timeout_ns=10_000_000_000)
    getattr(Owner(hypervisor), verb)(*rest)
    hypervisor.close()
