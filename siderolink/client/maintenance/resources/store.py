"""The machine's resources, their history and their watchers. No I/O; everything runs on one event loop."""

import os
import struct
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum, auto

from siderolink.client.maintenance.resources.definitions import (
    MACHINE_TYPES,
    NAMESPACE,
    RESOURCE_DEFINITION,
    ResourceType,
    namespace_spec,
)
from siderolink.client.maintenance.resources.spec import ResourceSpec
from siderolink.common.queues import Overflow, Subscription

HISTORY_LIMIT = 256
"""Past changes kept per resource type, for watches that start from a bookmark."""
HISTORY_BYTES = 1024 * 1024
"""Bytes of past changes kept per resource type; configurations may be long."""
WATCH_LIMIT = 1024
"""Changes queued for a slow watcher before its watch ends."""
WATCH_BYTES = 1024 * 1024
"""Approximate bytes queued for a slow watcher before its watch ends."""
_BOOKMARK = struct.Struct(">8sq")


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource:
    """One version of a resource."""

    type: ResourceType
    namespace: str
    id: str
    version: int
    created: datetime
    updated: datetime
    spec: ResourceSpec
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)


class ChangeKind(Enum):
    """The kind of a change."""

    CREATED = auto()
    UPDATED = auto()
    DESTROYED = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One change of a resource."""

    kind: ChangeKind
    resource: Resource
    old: Resource | None = None
    """The previous version, for an update."""
    number: int = 0
    """Increases by one with each change of this resource type."""

    @property
    def size(self) -> int:
        """Approximate size in bytes."""
        return self.resource.spec.size + (0 if self.old is None else self.old.spec.size)


class BookmarkError(ValueError):
    """Raised when a bookmark is foreign or older than the history."""


class RecentChanges:
    """The last changes of one resource type, each with a bookmark."""

    def __init__(self, limit: int = HISTORY_LIMIT, max_bytes: int = HISTORY_BYTES) -> None:
        self._changes: deque[Change] = deque()
        self._limit, self._max_bytes = limit, max_bytes
        self._size = 0
        self._end = 0
        self._cookie = os.urandom(8)  # bookmarks of an earlier process are invalid

    def add(self, kind: ChangeKind, resource: Resource, old: Resource | None = None) -> Change:
        change = Change(kind=kind, resource=resource, old=old, number=self._end)
        self._end += 1
        self._changes.append(change)
        self._size += change.size
        while len(self._changes) > self._limit or self._size > self._max_bytes:
            self._size -= self._changes.popleft().size
        return change

    def bookmark(self, number: int | None = None) -> bytes:
        """The bookmark of a change, by default the latest."""
        return _BOOKMARK.pack(self._cookie, self._end - 1 if number is None else number)

    def after(self, bookmark: bytes) -> list[Change]:
        """The changes after a bookmark. Raises BookmarkError."""
        cookie, number = _BOOKMARK.unpack(bookmark) if len(bookmark) == _BOOKMARK.size else (b"", 0)
        if cookie != self._cookie or not self._end - len(self._changes) - 1 <= number < self._end:
            raise BookmarkError("invalid watch bookmark")
        return [change for change in self._changes if change.number > number]

    def last(self, count: int, resource_id: str | None = None) -> list[Change]:
        """The last changes, of all or of one resource, the oldest first."""
        found = [change for change in self._changes if resource_id in (None, change.resource.id)]
        return found[-count:] if count > 0 else []


class WatchTooSlowError(Exception):
    """Raised when a watcher was too slow and has to start over."""


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
        """Queue the change if it concerns this watch."""
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
        self._histories: dict[tuple[str, str], RecentChanges] = {}
        self._watches: set[Watch] = set()
        for resource_type in (RESOURCE_DEFINITION, NAMESPACE, *MACHINE_TYPES):
            self.define(resource_type)

    def define(self, resource_type: ResourceType) -> None:
        """Register a type."""
        self._types[resource_type.name] = resource_type
        self._histories.setdefault((resource_type.name, resource_type.namespace), RecentChanges())
        self.put(RESOURCE_DEFINITION, resource_type.id, resource_type.definition())
        self.put(NAMESPACE, resource_type.namespace, namespace_spec(f"The resources of {resource_type.namespace}."))
        self._resources.setdefault((resource_type.name, resource_type.namespace), {})

    def type(self, name: str) -> ResourceType | None:
        return self._types.get(name)

    def get(self, resource_type: ResourceType, resource_id: str, namespace: str = "") -> Resource | None:
        return self._of_type(resource_type, namespace).get(resource_id)

    def list(self, resource_type: ResourceType, namespace: str = "") -> "list[Resource]":
        """All resources of one type, by id."""
        found = self._of_type(resource_type, namespace)
        return [found[resource_id] for resource_id in sorted(found)]

    def put(
        self,
        resource_type: ResourceType,
        resource_id: str,
        spec: ResourceSpec,
        *,
        labels: Mapping[str, str] | None = None,
        annotations: Mapping[str, str] | None = None,
    ) -> None:
        """Create or update a resource. Equal contents cause no change."""
        found = self._resources.setdefault((resource_type.name, resource_type.namespace), {})
        old = found.get(resource_id)
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
        found[resource_id] = new
        self._publish(ChangeKind.CREATED if old is None else ChangeKind.UPDATED, new, old)

    def remove(self, resource_type: ResourceType, resource_id: str) -> None:
        """Remove a resource if it exists."""
        old = self._of_type(resource_type, "").pop(resource_id, None)
        if old is not None:
            self._publish(ChangeKind.DESTROYED, old)

    def replace(self, resource_type: ResourceType, specs: Mapping[str, ResourceSpec]) -> None:
        """Replace all resources of a type."""
        for resource_id in self._of_type(resource_type, "").keys() - specs.keys():
            self.remove(resource_type, resource_id)
        for resource_id, spec in specs.items():
            self.put(resource_type, resource_id, spec)

    def watch(self, resource_type: ResourceType, resource_id: str | None, namespace: str = "") -> Watch:
        """Watch until `unwatch`."""
        watch = Watch(resource_type.name, namespace or resource_type.namespace, resource_id)
        self._watches.add(watch)
        return watch

    def history(self, resource_type: ResourceType, namespace: str = "") -> RecentChanges:
        """The last changes of a type."""
        return self._histories.get((resource_type.name, namespace or resource_type.namespace)) or RecentChanges()

    @property
    def watches(self) -> int:
        """How many watches are running."""
        return len(self._watches)

    def has_namespace(self, namespace: str) -> bool:
        """Whether the namespace contains resources of any type."""
        return namespace in self._resources.get((NAMESPACE.name, NAMESPACE.namespace), {})

    def unwatch(self, watch: Watch) -> None:
        self._watches.discard(watch)

    def __iter__(self) -> Iterator[ResourceType]:
        return iter(self._types.values())

    def _of_type(self, resource_type: ResourceType, namespace: str) -> dict[str, Resource]:
        return self._resources.get((resource_type.name, namespace or resource_type.namespace), {})

    def _publish(self, kind: ChangeKind, resource: Resource, old: Resource | None = None) -> None:
        history = self._histories.setdefault((resource.type.name, resource.namespace), RecentChanges())
        change = history.add(kind, resource, old)
        for watch in self._watches:
            watch.offer(change)
