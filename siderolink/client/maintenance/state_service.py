"""cosi.resource.State: reading the machine's resources. Only admins read sensitive ones."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

import anyio.lowlevel
from grpclib import GRPCError, Status
from grpclib.const import Cardinality, Handler
from grpclib.server import Stream

from siderolink.client.maintenance.dispatch import readable
from siderolink.client.maintenance.queries import Selection, read_selection
from siderolink.client.maintenance.resources.definitions import ResourceType
from siderolink.client.maintenance.resources.store import (
    BookmarkError,
    Change,
    ChangeKind,
    RecentChanges,
    Resource,
    ResourceStore,
    Watch,
    WatchTooSlowError,
)
from siderolink.client.maintenance.roles import Admittance, CallerRole, not_authorized
from siderolink.common.grpc import CallLimits
from siderolink.common.pb.cosi import resource as pb
from siderolink.common.text import one_line

MakeEvent = Callable[[], pb.Event | None]
"""Makes an event of a watch; None if the watch does not select it."""
R = TypeVar("R", pb.GetRequest, pb.ListRequest, pb.WatchRequest)

SERVICE = "cosi.resource.State"
_LONGEST_NAME = 1024
MAX_WATCHES = 256
"""Concurrent watches per socket, so that local processes cannot keep the server from watching."""
_EVENT_TYPES = {
    ChangeKind.CREATED: pb.EventType.CREATED,
    ChangeKind.UPDATED: pb.EventType.UPDATED,
    ChangeKind.DESTROYED: pb.EventType.DESTROYED,
}


class StateService:
    """Serves a store to the callers of one socket."""

    call_limits = dict.fromkeys(("Get", "List", "Watch"), CallLimits(max_message_bytes=64 * 1024, max_fields=1024))
    """Enough for the maximum number of label terms."""

    def __init__(self, store: ResourceStore, admittance: Admittance) -> None:
        self._store = store
        self._admittance = admittance
        self._watches = 0

    def __mapping__(self) -> dict[str, Handler]:
        return {
            f"/{SERVICE}/Get": Handler(self._get, Cardinality.UNARY_UNARY, pb.GetRequest, pb.GetResponse),
            f"/{SERVICE}/List": Handler(self._list, Cardinality.UNARY_STREAM, pb.ListRequest, pb.ListResponse),
            f"/{SERVICE}/Watch": Handler(self._watch, Cardinality.UNARY_STREAM, pb.WatchRequest, pb.WatchResponse),
        }

    async def _get(self, stream: Stream[pb.GetRequest, pb.GetResponse]) -> None:
        request = _readable(await stream.recv_message())
        resource_type = self._permitted(stream, request)
        found = self._store.get(resource_type, request.id, request.namespace)
        if found is None:
            name = one_line(f"{request.type}({request.namespace}/{request.id}@undefined)")
            raise GRPCError(Status.NOT_FOUND, f"resource {name} doesn't exist")
        await stream.send_message(pb.GetResponse(resource=message_of(found)))

    async def _list(self, stream: Stream[pb.ListRequest, pb.ListResponse]) -> None:
        request = _readable(await stream.recv_message())
        options = request.options or pb.ListOptions()
        resource_type = self._permitted(stream, request)
        selection = read_selection(options.label_query, options.id_query)
        for found in self._store.list(resource_type, request.namespace):
            await anyio.lowlevel.checkpoint()  # matching takes time; let other tasks run
            if selection.holds(found):
                await stream.send_message(pb.ListResponse(resource=message_of(found)))

    async def _watch(self, stream: Stream[pb.WatchRequest, pb.WatchResponse]) -> None:
        request = _readable(await stream.recv_message())
        options = request.options or pb.WatchOptions()
        resource_type = self._permitted(stream, request)
        selection = _watched(request, options)
        if self._watches >= MAX_WATCHES:
            raise GRPCError(Status.RESOURCE_EXHAUSTED, "too many watches are open on this machine; close some first")
        self._watches += 1
        # no await between these two, so no change is missed
        watch = self._store.watch(resource_type, request.id, request.namespace)
        try:
            beginning = self._beginning(request, options, resource_type, selection)
            await stream.send_message(pb.WatchResponse())
            await _send_beginning(stream, beginning, in_one=options.aggregated)
            await _send_changes(stream, watch, selection, self._store.history(resource_type, request.namespace))
        finally:
            self._store.unwatch(watch)
            self._watches -= 1

    def _beginning(
        self, request: pb.WatchRequest, options: pb.WatchOptions, resource_type: ResourceType, selection: Selection
    ) -> list[MakeEvent]:
        """The first events of a watch: present contents or past changes, as requested."""
        history = self._store.history(resource_type, request.namespace)
        past = _past(request, options, history)
        none = _tombstone(resource_type, request)
        events: list[MakeEvent]
        if past is not None:
            events = [partial(_changed, change, selection, history) for change in past]
        elif request.id is not None:
            found = self._store.get(resource_type, request.id, request.namespace)
            events = [partial(_event, pb.EventType.DESTROYED, none) if found is None else partial(_created, found)]
        else:
            events = self._contents(request, options, resource_type, selection)
        if options.bootstrap_bookmark and request.id is None:
            events.append(partial(_event, pb.EventType.NOOP, none, history.bookmark()))
        return events

    def _contents(
        self, request: pb.WatchRequest, options: pb.WatchOptions, resource_type: ResourceType, selection: Selection
    ) -> list[MakeEvent]:
        if not options.bootstrap_contents:
            return []
        found = self._store.list(resource_type, request.namespace)
        events: list[MakeEvent] = [partial(_created, one, selection) for one in found]
        if request.api_version >= 1:
            mark = self._store.history(resource_type, request.namespace).bookmark()
            events.append(partial(_event, pb.EventType.BOOTSTRAPPED, _tombstone(resource_type, request), mark))
        return events

    def _permitted(self, stream: Stream[Any, Any], request: pb.GetRequest | pb.ListRequest | pb.WatchRequest) -> ResourceType:
        """The requested type. Raises GRPCError if it is not registered or the caller may not read it."""
        found = self._store.type(request.type)
        if found is None:
            text = f'resource type "{one_line(request.type, limit=128)}" is not supported'
            raise GRPCError(Status.PERMISSION_DENIED, text)
        if found.is_sensitive and self._admittance.role(stream.peer.addr()) is not CallerRole.ADMIN:
            raise not_authorized()
        if request.namespace and not self._store.has_namespace(request.namespace):
            text = f'namespace "{one_line(request.namespace, limit=128)}" is not supported'
            raise GRPCError(Status.PERMISSION_DENIED, text)
        return found


def _watched(request: pb.WatchRequest, options: pb.WatchOptions) -> Selection:
    """The selection of a watch. Raises GRPCError for options that contradict each other."""
    if request.id is not None:
        if options.bootstrap_contents:
            raise GRPCError(Status.UNIMPLEMENTED, "bootstrap contents is not implemented for resource watch")
        if options.label_query or (options.id_query is not None and options.id_query.regexp):
            raise GRPCError(Status.UNIMPLEMENTED, "queries are not implemented for resource watch")
    if sum((options.bootstrap_contents, options.tail_events > 0, options.start_from_bookmark is not None)) > 1:
        raise GRPCError(Status.INVALID_ARGUMENT, "a watch starts from contents, past events or a bookmark; choose one")
    return read_selection(options.label_query, options.id_query)


def _past(request: pb.WatchRequest, options: pb.WatchOptions, history: RecentChanges) -> list[Change] | None:
    """The requested past changes, or None if none were requested. Raises GRPCError."""
    if options.tail_events > 0:
        return history.last(options.tail_events, request.id)
    if options.start_from_bookmark is None:
        return None
    try:
        changes = history.after(options.start_from_bookmark)
    except BookmarkError as error:
        raise GRPCError(Status.FAILED_PRECONDITION, str(error)) from None
    return [change for change in changes if request.id in (None, change.resource.id)]


async def _send_beginning(stream: Stream[pb.WatchRequest, Any], beginning: Iterable[MakeEvent], *, in_one: bool) -> None:
    """Send the first events, one by one or all in one message. Each is made in a turn of its own: there may be thousands."""
    parts: list[bytes] = []
    for make in beginning:
        event = make()
        if event is not None and in_one:
            parts.append(bytes(pb.WatchResponse(event=[event])))  # concatenated, these are one message
        elif event is not None:
            await stream.send_message(pb.WatchResponse(event=[event]))
        await anyio.lowlevel.checkpoint()
    if in_one:
        await stream.send_message(b"".join(parts))


async def _send_changes(
    stream: Stream[pb.WatchRequest, pb.WatchResponse], watch: Watch, selection: Selection, history: RecentChanges
) -> None:
    while True:
        try:
            change = await watch.next()
        except WatchTooSlowError:
            raise GRPCError(Status.RESOURCE_EXHAUSTED, "the watch read its events too slowly; start a new watch") from None
        event = _changed(change, selection, history)
        if event is not None:
            await stream.send_message(pb.WatchResponse(event=[event]))
        else:
            await anyio.lowlevel.checkpoint()


def message_of(found: Resource) -> pb.Resource:
    """A resource as its protobuf message."""
    metadata = pb.Metadata(
        namespace=found.namespace,
        type=found.type.name,
        id=found.id,
        version=str(found.version),
        phase="running",
        created=found.created,
        updated=found.updated,
        labels=dict(found.labels),
        annotations=dict(found.annotations),
    )
    return pb.Resource(metadata=metadata, spec=pb.Spec(proto_spec=found.spec.proto, yaml_spec=found.spec.yaml()))


def _created(found: Resource, selection: Selection | None = None) -> pb.Event | None:
    """A resource as an event for a watcher of a selection, or None if it is not selected."""
    if selection is not None and not selection.holds(found):
        return None
    return _event(pb.EventType.CREATED, message_of(found))


def _changed(change: Change, selection: Selection, history: RecentChanges) -> pb.Event | None:
    """A change as an event for a watcher of a selection, or None if it does not concern the watcher."""
    kind = selection.kind_of(change)
    if kind is None:
        return None
    event = _event(_EVENT_TYPES[kind], message_of(change.resource), history.bookmark(change.number))
    if change.old is not None and kind is ChangeKind.UPDATED:
        event.old = message_of(change.old)
    return event


def _event(event_type: pb.EventType, found: pb.Resource, bookmark: bytes | None = None) -> pb.Event:
    return pb.Event(event_type=event_type, resource=found, bookmark=bookmark)


def _tombstone(resource_type: ResourceType, request: pb.WatchRequest) -> pb.Resource:
    """A placeholder for a resource that does not exist."""
    metadata = pb.Metadata(
        namespace=request.namespace or resource_type.namespace,
        type=resource_type.name,
        id=request.id or "",
        version="undefined",
        phase="running",
    )
    return pb.Resource(metadata=metadata, spec=pb.Spec())


def _readable(request: R | None) -> R:
    read: R = readable(request)
    if max(len(read.type), len(read.namespace)) > _LONGEST_NAME:
        raise GRPCError(Status.INVALID_ARGUMENT, f"a name has at most {_LONGEST_NAME} characters")
    return read
