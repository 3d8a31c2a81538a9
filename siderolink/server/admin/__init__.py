"""The administration of a server: what may be changed by whom, as Python objects and by gRPC."""
