"""Information about this host from the kernel and the firmware: blocking functions, to be called in a thread."""
