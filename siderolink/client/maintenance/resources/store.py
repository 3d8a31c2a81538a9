"""The machine's resources, and who watches them. No I/O; everything is called on one event loop."""

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime

from siderolink.client.maintenance.resources.changes import Change, ChangeKind, History, Resource
from siderolink.client.maintenance.resources.definitions import (
    MACHINE_TYPES,
    NAMESPACE,
    RESOURCE_DEFINITION,
    ResourceType,
    namespace_spec,
)
from siderolink.client.maintenance.resources.spec import ResourceSpec
from siderolink.common.queues import Overflow, Subscription

WATCH_LIMIT = 1024
"""Changes that wait for one slow watcher before its watch is ended."""
WATCH_BYTES = 4 * 1024 * 1024
"""How much of them, roughly."""


class WatchTooSlowError(Exception):
    """Raised when a watcher did not take its changes in time; it has to begin anew."""


class Watch:
    """The changes of one type, or of one resource, since the watch began."""

    def __init__(self, type_name: str, namespace: str, resource_id: str | None) -> None:
        self._kind = type_name, namespace
        self._id = resource_id
        self._changes: Subscription[Change | None] = Subscription(
            limit=WATCH_LIMIT, max_bytes=WATCH_BYTES, lost=lambda _: None, overflow=Overflow.DROP_ALL
        )
        self._too_slow = False

    def offer(self, change: Change) -> None:
        """Queue the change if this watch asked for it."""
        resource = change.resource
        if (resource.type.name, resource.namespace) == self._kind and self._id in (None, resource.id):
            self._changes.add(change, change.size)

    async def next(self) -> Change:
        """The next change. Raises WatchTooSlowError."""
        change = None if self._too_slow else await anext(self._changes)
        if change is None:
            self._too_slow = True
            raise WatchTooSlowError
        return change


class ResourceStore:
    """Resources by type, namespace and id; the definitions of the types are resources, too."""

    def __init__(self) -> None:
        self._types: dict[str, ResourceType] = {}
        self._resources: dict[tuple[str, str], dict[str, Resource]] = {}
        self._histories: dict[tuple[str, str], History] = {}
        self._watches: set[Watch] = set()
        for resource_type in (RESOURCE_DEFINITION, NAMESPACE, *MACHINE_TYPES):
            self.define(resource_type)

    def define(self, resource_type: ResourceType) -> None:
        """Offer one more type."""
        self._types[resource_type.name] = resource_type
        self._histories.setdefault((resource_type.name, resource_type.namespace), History())
        self.put(RESOURCE_DEFINITION, resource_type.id, resource_type.definition())
        self.put(NAMESPACE, resource_type.namespace, namespace_spec(f"The resources of {resource_type.namespace}."))
        self._resources.setdefault((resource_type.name, resource_type.namespace), {})

    def type(self, name: str) -> ResourceType | None:
        return self._types.get(name)

    def get(self, resource_type: ResourceType, resource_id: str, namespace: str = "") -> Resource | None:
        return self._shelf(resource_type, namespace).get(resource_id)

    def list(self, resource_type: ResourceType, namespace: str = "") -> "list[Resource]":
        """All of one type, by id."""
        shelf = self._shelf(resource_type, namespace)
        return [shelf[resource_id] for resource_id in sorted(shelf)]

    def put(
        self,
        resource_type: ResourceType,
        resource_id: str,
        spec: ResourceSpec,
        *,
        labels: Mapping[str, str] | None = None,
        annotations: Mapping[str, str] | None = None,
    ) -> None:
        """Set what a resource says, its labels and its annotations; nothing happens where it says so already."""
        shelf = self._resources.setdefault((resource_type.name, resource_type.namespace), {})
        old = shelf.get(resource_id)
        about = dict(labels or {}), dict(annotations or {})
        if old is not None and old.spec == spec and (old.labels, old.annotations) == about:
            return
        now = datetime.now(UTC)
        new = Resource(
            type=resource_type,
            namespace=resource_type.namespace,
            id=resource_id,
            version=1 if old is None else old.version + 1,
            created=now if old is None else old.created,
            updated=now,
            spec=spec,
            labels=about[0],
            annotations=about[1],
        )
        shelf[resource_id] = new
        self._tell(ChangeKind.CREATED if old is None else ChangeKind.UPDATED, new, old)

    def remove(self, resource_type: ResourceType, resource_id: str) -> None:
        """Take a resource away, if there is one."""
        old = self._shelf(resource_type, "").pop(resource_id, None)
        if old is not None:
            self._tell(ChangeKind.DESTROYED, old)

    def replace(self, resource_type: ResourceType, specs: Mapping[str, ResourceSpec]) -> None:
        """Make these all there are of the type."""
        for resource_id in self._shelf(resource_type, "").keys() - specs.keys():
            self.remove(resource_type, resource_id)
        for resource_id, spec in specs.items():
            self.put(resource_type, resource_id, spec)

    def watch(self, resource_type: ResourceType, resource_id: str | None, namespace: str = "") -> Watch:
        """Watch until `unwatch`."""
        watch = Watch(resource_type.name, namespace or resource_type.namespace, resource_id)
        self._watches.add(watch)
        return watch

    def history(self, resource_type: ResourceType, namespace: str = "") -> History:
        """The last changes of a type."""
        return self._histories.get((resource_type.name, namespace or resource_type.namespace)) or History()

    def unwatch(self, watch: Watch) -> None:
        self._watches.discard(watch)

    def __iter__(self) -> Iterator[ResourceType]:
        return iter(self._types.values())

    def _shelf(self, resource_type: ResourceType, namespace: str) -> dict[str, Resource]:
        return self._resources.get((resource_type.name, namespace or resource_type.namespace), {})

    def _tell(self, kind: ChangeKind, resource: Resource, old: Resource | None = None) -> None:
        history = self._histories.setdefault((resource.type.name, resource.namespace), History())
        change = history.add(kind, resource, old)
        for watch in self._watches:
            watch.offer(change)
