"""The machine's own API: who it runs for, what it shows, and where it listens."""

from siderolink.client.maintenance.api import (
    API_PORT,
    Everywhere,
    MaintenanceApi,
    Nowhere,
    OnOverlay,
    serve_maintenance,
)
from siderolink.client.maintenance.hooks import (
    ApplyAnswer,
    ApplyRequest,
    MachineHooks,
    MachineVersion,
    RebootRequest,
    ResetPartition,
    ResetRequest,
)
from siderolink.client.maintenance.presence import LinkPresence
from siderolink.client.maintenance.resources import Resource, ResourceSpec, ResourceStore, ResourceType

__all__ = [
    "API_PORT",
    "ApplyAnswer",
    "ApplyRequest",
    "Everywhere",
    "LinkPresence",
    "MachineHooks",
    "MachineVersion",
    "MaintenanceApi",
    "Nowhere",
    "OnOverlay",
    "RebootRequest",
    "ResetPartition",
    "ResetRequest",
    "Resource",
    "ResourceSpec",
    "ResourceStore",
    "ResourceType",
    "serve_maintenance",
]
