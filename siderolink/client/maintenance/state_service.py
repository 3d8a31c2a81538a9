"""cosi.resource.State: reading the machine's resources. Sensitive ones are for the admin alone."""

from collections.abc import Sequence
from typing import Any, TypeVar

from grpclib import GRPCError, Status
from grpclib.const import Cardinality, Handler
from grpclib.server import Stream

from siderolink.client.maintenance.callers import Admittance
from siderolink.client.maintenance.resources.definitions import ResourceType
from siderolink.client.maintenance.resources.store import (
    Change,
    ChangeKind,
    Resource,
    ResourceStore,
    Watch,
    WatchTooSlowError,
)
from siderolink.common.pb.cosi import resource as pb
from siderolink.common.text import one_line
from siderolink.common.wire_types import has_declared_types

R = TypeVar("R", pb.GetRequest, pb.ListRequest, pb.WatchRequest)

SERVICE = "cosi.resource.State"
_LONGEST_NAME = 1024
_EVENT_TYPES = {
    ChangeKind.CREATED: pb.EventType.CREATED,
    ChangeKind.UPDATED: pb.EventType.UPDATED,
    ChangeKind.DESTROYED: pb.EventType.DESTROYED,
}


class StateService:
    """Serves a store to the callers of one socket."""

    def __init__(self, store: ResourceStore, admittance: Admittance) -> None:
        self._store = store
        self._admittance = admittance

    def __mapping__(self) -> dict[str, Handler]:
        return {
            f"/{SERVICE}/Get": Handler(self._get, Cardinality.UNARY_UNARY, pb.GetRequest, pb.GetResponse),
            f"/{SERVICE}/List": Handler(self._list, Cardinality.UNARY_STREAM, pb.ListRequest, pb.ListResponse),
            f"/{SERVICE}/Watch": Handler(self._watch, Cardinality.UNARY_STREAM, pb.WatchRequest, pb.WatchResponse),
        }

    async def _get(self, stream: Stream[pb.GetRequest, pb.GetResponse]) -> None:
        request = _readable(await stream.recv_message())
        resource_type = self._permitted(stream, request.type)
        found = self._store.get(resource_type, request.id, request.namespace)
        if found is None:
            name = one_line(f"{request.type}({request.namespace}/{request.id}@undefined)")
            raise GRPCError(Status.NOT_FOUND, f"resource {name} doesn't exist")
        await stream.send_message(pb.GetResponse(resource=message_of(found)))

    async def _list(self, stream: Stream[pb.ListRequest, pb.ListResponse]) -> None:
        request = _readable(await stream.recv_message())
        resource_type = self._permitted(stream, request.type)
        if request.options is not None:
            _refuse_queries(request.options.label_query, request.options.id_query)
        for found in self._store.list(resource_type, request.namespace):
            await stream.send_message(pb.ListResponse(resource=message_of(found)))

    async def _watch(self, stream: Stream[pb.WatchRequest, pb.WatchResponse]) -> None:
        request = _readable(await stream.recv_message())
        options = request.options or pb.WatchOptions()
        resource_type = self._permitted(stream, request.type)
        _refuse_queries(options.label_query, options.id_query)
        if options.tail_events or options.start_from_bookmark is not None or options.bootstrap_bookmark:
            raise GRPCError(Status.UNIMPLEMENTED, "no past events are kept here; watch from now on")
        if request.id is not None and options.bootstrap_contents:
            raise GRPCError(Status.UNIMPLEMENTED, "bootstrap contents is not implemented for resource watch")
        # nothing is awaited between these two, so that no change falls between
        watch = self._store.watch(resource_type, request.id, request.namespace)
        contents = self._contents(request, options, resource_type)
        try:
            await stream.send_message(pb.WatchResponse())
            for events in [contents] if options.aggregated else [[event] for event in contents]:
                await stream.send_message(pb.WatchResponse(event=events))
            await _send_changes(stream, watch)
        finally:
            self._store.unwatch(watch)

    def _contents(self, request: pb.WatchRequest, options: pb.WatchOptions, resource_type: ResourceType) -> list[pb.Event]:
        """What there is now, as far as it was asked for."""
        if request.id is not None:
            found = self._store.get(resource_type, request.id, request.namespace)
            return [_event(pb.EventType.DESTROYED, _tombstone(resource_type, request)) if found is None else _created(found)]
        if not options.bootstrap_contents:
            return []
        events = [_created(found) for found in self._store.list(resource_type, request.namespace)]
        if request.api_version >= 1:
            events.append(pb.Event(event_type=pb.EventType.BOOTSTRAPPED))
        return events

    def _permitted(self, stream: Stream[Any, Any], name: str) -> ResourceType:
        """The type of that name. Raises GRPCError where there is none, or where the caller may not read it."""
        found = self._store.type(name)
        if found is None:
            raise GRPCError(Status.NOT_FOUND, f"resource type {one_line(name, limit=128)!r} is not registered")
        if found.is_sensitive:
            self._admittance.require_admin(stream)
        return found


async def _send_changes(stream: Stream[pb.WatchRequest, pb.WatchResponse], watch: Watch) -> None:
    while True:
        try:
            change = await watch.next()
        except WatchTooSlowError:
            raise GRPCError(Status.RESOURCE_EXHAUSTED, "the watch did not take its events in time; watch anew") from None
        await stream.send_message(pb.WatchResponse(event=[_changed(change)]))


def message_of(found: Resource) -> pb.Resource:
    """A resource as it travels."""
    metadata = pb.Metadata(
        namespace=found.namespace,
        type=found.type.name,
        id=found.id,
        version=str(found.version),
        phase="running",
        created=found.created,
        updated=found.updated,
    )
    return pb.Resource(metadata=metadata, spec=pb.Spec(proto_spec=found.spec.proto, yaml_spec=found.spec.yaml()))


def _created(found: Resource) -> pb.Event:
    return _event(pb.EventType.CREATED, message_of(found))


def _changed(change: Change) -> pb.Event:
    event = _event(_EVENT_TYPES[change.kind], message_of(change.resource))
    if change.old is not None:
        event.old = message_of(change.old)
    return event


def _event(event_type: pb.EventType, found: pb.Resource) -> pb.Event:
    return pb.Event(event_type=event_type, resource=found)


def _tombstone(resource_type: ResourceType, request: pb.WatchRequest) -> pb.Resource:
    """What stands for a resource that is not there."""
    metadata = pb.Metadata(
        namespace=request.namespace or resource_type.namespace,
        type=resource_type.name,
        id=request.id or "",
        version="undefined",
        phase="running",
    )
    return pb.Resource(metadata=metadata, spec=pb.Spec())


def _readable(request: R | None) -> R:
    if request is None or not has_declared_types(request):
        raise GRPCError(Status.INVALID_ARGUMENT, "the message could not be read")
    if max(len(request.type), len(request.namespace)) > _LONGEST_NAME:
        raise GRPCError(Status.INVALID_ARGUMENT, f"a name has at most {_LONGEST_NAME} characters")
    return request


def _refuse_queries(labels: Sequence[pb.LabelQuery], ids: pb.IdQuery | None) -> None:
    if any(query.terms for query in labels) or (ids is not None and ids.regexp):
        raise GRPCError(Status.UNIMPLEMENTED, "queries by label or id pattern are not served here; ask for all")
