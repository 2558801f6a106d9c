"""hostupdate: update a Linux/KVM host under its running guests."""

__version__ = "0.1.0"
