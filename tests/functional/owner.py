"""``python -m tests.functional.owner STATE VERB NAME``: a guest's owner suspends or resumes it.

A process of its own: the embedded driver is let go of only when its process ends.
"""

from __future__ import annotations

import sys
from pathlib import Path

from hostupdate.guests import Hypervisor, default_lab_uri
from hostupdate.guests.scratch import ScratchGuests

if __name__ == "__main__":
    state, verb, name = sys.argv[1:]
    hypervisor = Hypervisor(default_lab_uri(Path(state)), timeout_ns=10_000_000_000)
    getattr(ScratchGuests(hypervisor), verb)(name)
    hypervisor.close()
