"""Guests as libvirt knows them. The only importer of libvirt; every call has a deadline."""

import os

# The embedded driver logs to stderr of whoever opens it, from its import on; what concerns a caller
# is raised. Somebody who wants the log says so in the environment.
os.environ.setdefault("LIBVIRT_LOG_OUTPUTS", "4:file:/dev/null")

from hostupdate.guests.hypervisor import Hypervisor
from hostupdate.guests.uri import default_lab_uri, embedded_root

__all__ = ("Hypervisor", "default_lab_uri", "embedded_root")
