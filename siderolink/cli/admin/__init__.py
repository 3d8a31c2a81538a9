"""The commands that manage a server, local or remote, as clients of the API ``siderolink.admin.v1``."""
