"""The administration of a server, with roles, as Python objects and by gRPC."""

from siderolink.server.admin.administration import Administration
from siderolink.server.admin.api_keys import ApiKeys
from siderolink.server.admin.audit_log import AuditLog
from siderolink.server.admin.bans import Bans
from siderolink.server.admin.lists import Page
from siderolink.server.admin.machines import MachineAdministration, MachineQuery, MachineStatus

__all__ = [
    "Administration",
    "ApiKeys",
    "AuditLog",
    "Bans",
    "MachineAdministration",
    "MachineQuery",
    "MachineStatus",
    "Page",
]
