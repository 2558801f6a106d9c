"""A new QEMU under a running guest, its RAM left in place. libvirt is given in."""
