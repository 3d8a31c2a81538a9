"""The machines of one server: rows, sessions, liveness, dialling, and the configuration of the device."""
