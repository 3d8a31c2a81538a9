"""Resources, and what happens to them. No I/O."""

import os
import struct
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum, auto

from siderolink.client.maintenance.resources.definitions import ResourceType
from siderolink.client.maintenance.resources.spec import ResourceSpec

HISTORY_LIMIT = 256
"""Changes of one kind of resource that are kept for those who watch from an earlier moment on."""
HISTORY_BYTES = 1024 * 1024
"""How much of them: a configuration may be long, and applied again and again."""
_BOOKMARK = struct.Struct(">8sq")


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource:
    """One resource as it was at some moment."""

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
    """What happened to a resource."""

    CREATED = auto()
    UPDATED = auto()
    DESTROYED = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One thing that happened to a resource."""

    kind: ChangeKind
    resource: Resource
    old: Resource | None = None
    """What it was before an update."""
    number: int = 0
    """Rises by one with each change of this kind of resource."""

    @property
    def size(self) -> int:
        """Roughly the bytes that it takes."""
        return self.resource.spec.size + (0 if self.old is None else self.old.spec.size)


class BookmarkError(ValueError):
    """Raised when a bookmark is none of ours, or of a time that is no longer known."""


class History:
    """The last changes of one kind of resource, each of which has a bookmark."""

    def __init__(self, limit: int = HISTORY_LIMIT, max_bytes: int = HISTORY_BYTES) -> None:
        self._changes: deque[Change] = deque()
        self._limit, self._max_bytes = limit, max_bytes
        self._size = 0
        self._end = 0
        self._cookie = os.urandom(8)  # bookmarks of another life of this program are not ours

    def add(self, kind: ChangeKind, resource: Resource, old: Resource | None = None) -> Change:
        change = Change(kind=kind, resource=resource, old=old, number=self._end)
        self._end += 1
        self._changes.append(change)
        self._size += change.size
        while len(self._changes) > self._limit or self._size > self._max_bytes:
            self._size -= self._changes.popleft().size
        return change

    def bookmark(self, number: int | None = None) -> bytes:
        """The bookmark of a change; without its number, of the last one up to now."""
        return _BOOKMARK.pack(self._cookie, self._end - 1 if number is None else number)

    def after(self, bookmark: bytes) -> list[Change]:
        """What came after a bookmark. Raises BookmarkError."""
        cookie, number = _BOOKMARK.unpack(bookmark) if len(bookmark) == _BOOKMARK.size else (b"", 0)
        if cookie != self._cookie or not self._end - len(self._changes) - 1 <= number < self._end:
            raise BookmarkError("invalid watch bookmark")
        return [change for change in self._changes if change.number > number]

    def last(self, count: int, resource_id: str | None = None) -> list[Change]:
        """The last changes, of all or of one resource, the oldest first."""
        found = [change for change in self._changes if resource_id in (None, change.resource.id)]
        return found[-count:] if count > 0 else []
