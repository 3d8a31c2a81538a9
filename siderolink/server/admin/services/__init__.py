"""The admin API by gRPC. The services only translate between messages and the administration."""

from siderolink.server.admin.services.access import ADMIN_LIMITS, GROUP, LocalAccess, RemoteAccess, actor, group_id, guarded
from siderolink.server.admin.services.server import ServerFacts, admin_services

__all__ = [
    "ADMIN_LIMITS",
    "GROUP",
    "LocalAccess",
    "RemoteAccess",
    "ServerFacts",
    "actor",
    "admin_services",
    "group_id",
    "guarded",
]
