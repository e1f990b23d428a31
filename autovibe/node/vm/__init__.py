"""Virtual machines: their configuration, their QEMU processes, and what can be changed while they run."""
