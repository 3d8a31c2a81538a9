"""The machines of one server: rows, sessions, liveness, dialling, and what is applied to the device."""
