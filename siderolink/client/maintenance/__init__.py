"""The machine API: its callers, its resources and its listeners."""

from siderolink.client.maintenance.api import (
    API_PORT,
    Everywhere,
    MaintenanceApi,
    Nowhere,
    OnOverlay,
    serve_maintenance,
)
from siderolink.client.maintenance.configuration import ConfigurationKeeper
from siderolink.client.maintenance.follower import LinkFollower
from siderolink.client.maintenance.hooks import (
    API_RELEASE,
    ApplyAnswer,
    ApplyRequest,
    InstallRequest,
    LogRequest,
    MachineHooks,
    MachineVersion,
    RebootRequest,
    ResetPartition,
    ResetRequest,
    ShutdownRequest,
)
from siderolink.client.maintenance.meta import MetaStore
from siderolink.client.maintenance.resources import Resource, ResourceSpec, ResourceStore, ResourceType

__all__ = [
    "API_PORT",
    "API_RELEASE",
    "ApplyAnswer",
    "ApplyRequest",
    "ConfigurationKeeper",
    "Everywhere",
    "InstallRequest",
    "LinkFollower",
    "LogRequest",
    "MachineHooks",
    "MachineVersion",
    "MaintenanceApi",
    "MetaStore",
    "Nowhere",
    "OnOverlay",
    "RebootRequest",
    "ResetPartition",
    "ResetRequest",
    "Resource",
    "ResourceSpec",
    "ResourceStore",
    "ResourceType",
    "ShutdownRequest",
    "serve_maintenance",
]
