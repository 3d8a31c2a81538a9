"""The resources that describe a machine, by type, namespace and id."""

from siderolink.client.maintenance.resources.definitions import ResourceType
from siderolink.client.maintenance.resources.spec import ResourceSpec
from siderolink.client.maintenance.resources.store import Resource, ResourceStore

__all__ = ["Resource", "ResourceSpec", "ResourceStore", "ResourceType"]
