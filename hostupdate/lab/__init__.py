"""Scratch guests on which an update can be tried: ``hostupdate lab up | down | status``.

A lab guest is Debian's cloud kernel, busybox, the distribution's real qemu-guest-agent and a
witness (``guest.c``) that stamps and verifies RAM and prints ticks on the serial console. Guests
live on libvirt's embedded driver, with every file of theirs under one root directory.

``image`` builds kernel and initramfs, ``accelerator`` finds out whether KVM works, ``domain``
writes the XML, ``fleet`` starts and removes guests, ``console`` reads what they say.
"""
