"""API keys, the audit, events and the server itself by gRPC; and the list of all services of the admin API."""

import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from functools import partial
from importlib.metadata import version
from typing import Protocol

from siderolink.common.errors import ConfigurationError
from siderolink.common.grpc import Servable
from siderolink.common.pb.siderolink.admin import v1 as pb
from siderolink.common.tasks import map_in_parts
from siderolink.common.text import one_line
from siderolink.server.admin.administration import Administration
from siderolink.server.admin.services.access import GetAdministration, actor
from siderolink.server.admin.services.forward import ForwardService
from siderolink.server.admin.services.machines import BanService, MachineService
from siderolink.server.admin.services.records import HistoryService
from siderolink.server.admin.services.tokens import TokenService
from siderolink.server.events import EventStream, describe_event
from siderolink.server.store import AuditEntry, AuditQuery, Principal, Role

API_VERSION = "v1"
_CHUNK_BYTES = 32 * 1024


class ServerFacts(Protocol):
    """The server's information about itself."""

    def events(self) -> EventStream: ...

    def info(self) -> pb.ServerInfo: ...

    def servers(self) -> list[pb.FleetServer]: ...

    async def figures(self) -> pb.ServerStatus: ...


GetFacts = Callable[[], ServerFacts]


class ApiKeyService(pb.ApiKeyServiceBase):
    """See admin.proto."""

    def __init__(self, administration: GetAdministration) -> None:
        self._administration = administration

    async def create_api_key(self, message: pb.CreateApiKeyRequest) -> pb.CreateApiKeyResponse:
        made, secret = await self._administration().api_keys.create(
            message.name,
            _role(message.role),
            expires_at=message.expires_at,
            ttl=message.ttl,
            forward=message.forward,
            actor=actor(),
        )
        return pb.CreateApiKeyResponse(key=_key_message(self._administration(), made), secret=secret)

    async def list_api_keys(self, message: pb.ListApiKeysRequest) -> pb.ListApiKeysResponse:
        administration = self._administration()
        page = await administration.api_keys.page(message.page_size, message.page_token, actor=actor())
        found = await map_in_parts(partial(_key_message, administration), page.items)
        return pb.ListApiKeysResponse(keys=found, next_page_token=page.next_page_token, total=page.total)

    async def delete_api_key(self, message: pb.ApiKeyRequest) -> pb.ApiKey:
        administration = self._administration()
        return _key_message(administration, await administration.api_keys.delete(message.name, actor=actor()))

    async def revoke_api_key(self, message: pb.ApiKeyRequest) -> pb.ApiKey:
        administration = self._administration()
        return _key_message(administration, await administration.api_keys.revoke(message.name, actor=actor()))


def _role(text: str) -> Role:
    try:
        return Role(text)
    except ValueError:
        raise ConfigurationError(f"a role must be viewer, operator or admin, not {one_line(text, limit=32)!r}") from None


def _key_message(administration: Administration, principal: Principal) -> pb.ApiKey:
    now = administration.api_keys.now()
    names = [
        (administration.machines.shown_name(grant.machine_id) or grant.machine_id, grant.port) for grant in principal.grants
    ]
    state = "revoked" if principal.revoked_at is not None else "active" if principal.is_active(now) else "expired"
    return pb.ApiKey(
        id=principal.id,
        name=principal.name,
        role=str(principal.role),
        state=state,
        created_at=principal.created_at,
        created_by=principal.created_by,
        expires_at=principal.expires_at,
        last_used_at=principal.last_used_at,
        last_source=principal.last_source,
        revoked_at=principal.revoked_at,
        forward=[name if port is None else f"{name}:{port}" for name, port in names],
    )


class AuditService(pb.AuditServiceBase):
    """See admin.proto."""

    def __init__(self, administration: GetAdministration) -> None:
        self._administration = administration

    async def list_audit(self, message: pb.ListAuditRequest) -> pb.ListAuditResponse:
        query = _audit_query(message.filter, limit=message.page_size)
        page = await self._administration().audit.page(query, message.page_token, actor=actor())
        entries = await map_in_parts(_audit_message, page.items)
        return pb.ListAuditResponse(entries=entries, next_page_token=page.next_page_token)

    async def follow_audit(self, message: pb.FollowAuditRequest) -> AsyncIterator[pb.AuditEntry]:
        query = _audit_query(message.filter, after_seq=message.after_seq)
        async for entry in self._administration().audit.follow(query, actor=actor()):
            yield _audit_message(entry)

    async def export_audit(self, message: pb.ExportAuditRequest) -> AsyncIterator[pb.Chunk]:
        lines, size = list[bytes](), 0
        async for entry in self._administration().audit.export(_audit_query(message.filter), actor=actor()):
            lines.append(entry.to_json().encode() + b"\n")
            size += len(lines[-1])
            if size >= _CHUNK_BYTES:
                yield pb.Chunk(data=b"".join(lines))
                lines, size = [], 0
        if lines:
            yield pb.Chunk(data=b"".join(lines))


def _audit_query(wanted: pb.AuditFilter | None, *, limit: int = 0, after_seq: int | None = None) -> AuditQuery:
    found = wanted or pb.AuditFilter()
    if (after_seq or 0) >= 2**63:
        raise ConfigurationError("after_seq must be the number of an entry")
    return AuditQuery(
        actor=found.actor,
        action=found.action,
        object=found.object,
        since=found.since,
        until=found.until,
        after_seq=after_seq,
        limit=limit,
    )


def _audit_message(entry: AuditEntry) -> pb.AuditEntry:
    return pb.AuditEntry(
        seq=entry.seq,
        at=entry.at,
        actor=entry.actor.name,
        role=str(entry.actor.role or ""),
        source=entry.actor.source,
        action=entry.action,
        object_kind=entry.object_kind,
        object_id=entry.object_id,
        object_name=entry.object_name,
        before=_json(entry.before),
        after=_json(entry.after),
    )


def _json(fields: Mapping[str, object]) -> str:
    return json.dumps(dict(fields)) if fields else ""


class EventService(pb.EventServiceBase):
    """See admin.proto."""

    def __init__(self, administration: GetAdministration, facts: GetFacts) -> None:
        self._administration = administration
        self._facts = facts

    async def follow_events(self, message: pb.FollowEventsRequest) -> AsyncIterator[pb.Event]:
        wanted = None
        if message.machine:
            wanted = (await self._administration().machines.get(message.machine)).machine
        kinds = frozenset(message.kinds)
        async for event in self._facts().events():
            found = describe_event(event)
            machine = getattr(event, "machine", None)
            is_about = machine is not None and wanted is not None and machine.id == wanted.id
            if wanted is not None and not is_about and found.subject != wanted.node_uuid:
                continue
            if kinds and found.name not in kinds:
                continue
            yield pb.Event(
                at=time.time(),
                kind=found.name,
                subject=found.subject,
                detail=one_line(found.text),
                machine_id="" if machine is None else machine.id,
                node_uuid="" if machine is None else machine.node_uuid,
                machine_name="" if machine is None else machine.shown_name,
            )


class ServerService(pb.ServerServiceBase):
    """See admin.proto."""

    def __init__(self, administration: GetAdministration, facts: GetFacts) -> None:
        self._administration = administration
        self._facts = facts

    async def get_version(self, message: pb.GetVersionRequest) -> pb.GetVersionResponse:
        who = actor()
        return pb.GetVersionResponse(version=version("siderolink"), api=API_VERSION, actor=who.name, role=str(who.role or ""))

    async def get_info(self, message: pb.GetInfoRequest) -> pb.ServerInfo:
        return self._facts().info()

    async def get_status(self, message: pb.GetStatusRequest) -> pb.ServerStatus:
        return await self._facts().figures()

    async def list_servers(self, message: pb.ListServersRequest) -> pb.ListServersResponse:
        return pb.ListServersResponse(servers=self._facts().servers())

    async def drain(self, message: pb.DrainRequest) -> AsyncIterator[pb.DrainProgress]:
        steps = self._administration().servers.drain(message.server, message.timeout, actor=actor())
        async with aclosing(steps):
            async for step in steps:
                yield pb.DrainProgress(left=step.left, others=step.others, is_over=step.is_over)

    async def undo_drain(self, message: pb.UndoDrainRequest) -> pb.UndoDrainResponse:
        await self._administration().servers.undo_drain(message.server, actor=actor())
        return pb.UndoDrainResponse()


def admin_services(administration: GetAdministration, facts: GetFacts) -> list[Servable]:
    """All services of the admin API. `guarded` authenticates their callers."""
    return [
        MachineService(administration),
        BanService(administration),
        ApiKeyService(administration),
        AuditService(administration),
        EventService(administration, facts),
        ServerService(administration, facts),
        TokenService(administration),
        HistoryService(administration),
        ForwardService(administration),
    ]
