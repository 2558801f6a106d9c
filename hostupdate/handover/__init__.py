"""A guest under another QEMU, its RAM left in place. libvirt is given in."""
