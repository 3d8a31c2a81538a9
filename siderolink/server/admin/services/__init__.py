"""The admin API by gRPC: the services translate, and decide nothing."""

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
