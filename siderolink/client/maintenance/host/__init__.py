"""What the kernel and the firmware say of this host: plain functions that read files, to be called in a thread."""
