"""The commands that manage a server, local or remote: clients of the API ``siderolink.admin.v1``."""
