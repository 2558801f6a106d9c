"""Parking a guest and unparking it: what crosses from one QEMU to the next."""
