"""Machines and bans by gRPC."""

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Final

import anyio
from anyio.lowlevel import checkpoint

from siderolink.common.errors import ConfigurationError
from siderolink.common.grpc import GRPCError, Status
from siderolink.common.pb.siderolink.admin import v1 as pb
from siderolink.common.tasks import in_parts, map_in_parts, merged
from siderolink.common.text import one_line
from siderolink.server.admin.administration import Administration
from siderolink.server.admin.bans import StandingBan
from siderolink.server.admin.following import MAX_FOLLOWERS, FollowedPart
from siderolink.server.admin.machines import MachineQuery, MachineStatus
from siderolink.server.admin.services.access import GetAdministration, actor
from siderolink.server.fleet.limit_watch import LimitsChanged
from siderolink.server.store import (
    BanGrounds,
    BanKind,
    ChangesLost,
    Machine,
    MachineChanged,
    MachineDeleted,
    TunnelSetting,
)

DIGEST_DIGITS = 12
_AT_ONCE = 100
_POLL_SECONDS: Final = 2.0
_MAX_POLL_SECONDS: Final = 30.0
_PAUSE: Final = 20.0
"""The pause between two polls is at least this many times the duration of the last one."""


async def machine_message(administration: Administration, status: MachineStatus) -> pb.Machine:
    (found,) = await machine_messages(administration, [status])
    return found


async def machine_messages(administration: Administration, statuses: Sequence[MachineStatus]) -> list[pb.Machine]:
    token_ids = {status.machine.token_id for status in statuses if status.machine.token_id is not None}
    names = await administration.token_names(token_ids)
    found: list[pb.Machine] = []
    for part in in_parts(statuses, _AT_ONCE):
        found += [_message(administration, status, names.get(status.machine.token_id or "", "")) for status in part]
        await checkpoint()
    return found


def _message(administration: Administration, status: MachineStatus, token_name: str) -> pb.Machine:
    row, peer = status.machine, status.peer
    admits = administration.admits(row)
    return pb.Machine(
        id=row.id,
        node_uuid=row.node_uuid,
        name=row.shown_name,
        given_name=row.name or "",
        hostname=administration.hostnames.of(row.id),
        labels=dict(row.labels),
        note=row.note,
        public_key="" if row.public_key is None else row.public_key.encode(),
        overlay_address=str(row.overlay_address),
        virtual_address="" if row.virtual_address is None else str(row.virtual_address),
        admission=str(row.admission),
        link=str(status.state),
        transport="tunnel" if row.tunnel else "udp",
        tunnel=str(row.tunnel_setting),
        talos_version=row.talos_version,
        has_unique_token=row.bound_digest is not None,
        fingerprint=row.unique_fingerprint,
        has_uuid_conflict=row.has_uuid_conflict,
        assigned_uuid=row.assigned_uuid or "",
        join_token="" if row.join_token_digest is None else row.join_token_digest.hex()[:DIGEST_DIGITS],
        join_token_name=token_name,
        join_token_admits="" if admits is None else "yes" if admits else "no",
        endpoint=(peer.path if peer is not None else None) or row.last_endpoint or "",
        last_source=row.last_source or "",
        created_at=row.created_at,
        joined_at=row.joined_at,
        last_handshake_at=(peer.last_handshake if peer is not None else None) or row.last_handshake_at,
        last_seen_at=status.last_seen_at,
        received_bytes=0 if peer is None else peer.received_bytes,
        sent_bytes=0 if peer is None else peer.sent_bytes,
        revision=row.revision,
        server=administration.owner_of(row.id) or "",
        rate_rx=row.rate_rx,
        rate_tx=row.rate_tx,
        limit_drops=administration.limits.dropped(row.id),
        limits_biting=list(status.limits_biting),
    )


async def _part_message(administration: Administration, part: FollowedPart) -> pb.MachinesPart:
    machines = await machine_messages(administration, part.machines) if part.machines else []
    links = [_link_message(administration, status) for status in part.links]
    await checkpoint()  # encoding them takes as long
    return pb.MachinesPart(machines=machines, links=links, gone=part.gone, is_last=part.is_last)


def _link_message(administration: Administration, status: MachineStatus) -> pb.LinkChange:
    row, peer = status.machine, status.peer
    return pb.LinkChange(
        id=row.id,
        link=str(status.state),
        endpoint=(peer.path if peer is not None else None) or row.last_endpoint or "",
        last_handshake_at=(peer.last_handshake if peer is not None else None) or row.last_handshake_at,
        last_seen_at=status.last_seen_at,
        received_bytes=0 if peer is None else peer.received_bytes,
        sent_bytes=0 if peer is None else peer.sent_bytes,
        server=administration.owner_of(row.id) or "",
        limits_biting=list(status.limits_biting),
    )


def _query(message: pb.MachineFilter | None, sort: str) -> MachineQuery:
    wanted = message or pb.MachineFilter()
    return MachineQuery(
        states=tuple(wanted.states),
        text=wanted.text,
        selector=wanted.selector,
        version=wanted.version,
        token=wanted.token,
        transport=wanted.transport,
        sort=sort,
    )


def tunnel_setting(text: str) -> TunnelSetting:
    """Raises ConfigurationError."""
    try:
        return TunnelSetting(text or TunnelSetting.INHERIT)
    except ValueError:
        raise ConfigurationError(f"the tunnel must be inherit, force or forbid, not {one_line(text, limit=32)}") from None


class MachineService(pb.MachineServiceBase):
    """See admin.proto."""

    def __init__(self, administration: GetAdministration) -> None:
        self._administration = administration

    async def list_machines(self, message: pb.ListMachinesRequest) -> pb.ListMachinesResponse:
        administration = self._administration()
        query = _query(message.filter, message.sort)
        page = await administration.machines.page(replace(query, page_size=message.page_size, page_token=message.page_token))
        found = await machine_messages(administration, page.items)
        return pb.ListMachinesResponse(machines=found, next_page_token=page.next_page_token, total=page.total)

    async def watch_machines(self, message: pb.WatchMachinesRequest) -> AsyncIterator[pb.MachineChange]:
        administration = self._administration()
        query = _query(message.filter, message.sort)
        if not message.follow:
            async for known in self._all(administration, query):
                yield known
            return
        limits = administration.limits.changes.subscribe()
        async with administration.changes() as changes:
            async for known in self._known(administration, query):
                yield known
            async for change in merged(changes, limits):
                match change:
                    case MachineChanged(machine=machine) | LimitsChanged(machine=machine):
                        if (await administration.machines.selects(query))(machine):
                            yield await self._changed(administration, "changed", machine)
                    case MachineDeleted(machine=machine):
                        yield await self._changed(administration, "gone", machine)
                    case ChangesLost():
                        async for known in self._known(administration, query):
                            yield known
                    case _:
                        pass

    async def _known(self, administration: Administration, query: MachineQuery) -> AsyncIterator[pb.MachineChange]:
        async for known in self._all(administration, query):
            yield known
        yield pb.MachineChange(kind="synced")

    async def _all(self, administration: Administration, query: MachineQuery) -> AsyncIterator[pb.MachineChange]:
        async for status in administration.machines.all(query):
            yield pb.MachineChange(kind="known", machine=await machine_message(administration, status))

    async def _changed(self, administration: Administration, kind: str, machine: Machine) -> pb.MachineChange:
        status = await administration.machines.status(machine)
        return pb.MachineChange(kind=kind, machine=await machine_message(administration, status))

    async def follow_machines(self, message: pb.FollowMachinesRequest) -> AsyncIterator[pb.MachinesPart]:
        administration, every = self._administration(), message.every or _POLL_SECONDS
        if not 1.0 <= every <= _MAX_POLL_SECONDS:
            raise ConfigurationError(f"every must be 1 to {_MAX_POLL_SECONDS:.0f} seconds, not {every:g}")
        with administration.followers.register() as follower:
            if follower is None:
                raise GRPCError(Status.RESOURCE_EXHAUSTED, f"{MAX_FOLLOWERS} programs already follow the machines")
            while True:
                began = time.monotonic()
                async for part in follower.changes():
                    yield await _part_message(administration, part)
                took = time.monotonic() - began
                await anyio.sleep(min(max(every, _PAUSE * took), _MAX_POLL_SECONDS))

    async def get_machine(self, message: pb.MachineRequest) -> pb.Machine:
        administration = self._administration()
        return await machine_message(administration, await administration.machines.get(message.name))

    async def ask_machine(self, message: pb.MachineRequest) -> pb.MachineAnswer:
        found = await self._administration().answers.query(message.name)
        disks = [
            pb.MachineDisk(device=one.device, size=one.size, model=one.model, is_system=one.is_system) for one in found.disks
        ]
        return pb.MachineAnswer(
            version=found.version,
            platform=found.platform,
            stage=found.stage,
            is_ready=found.is_ready,
            unmet=found.unmet,
            hostname=found.hostname,
            addresses=found.addresses,
            disks=disks,
            refused=found.refused,
        )

    async def rename_machine(self, message: pb.RenameMachineRequest) -> pb.Machine:
        changed = await self._administration().machines.rename(message.name, message.new_name, actor=actor())
        return await self._shown(changed)

    async def label_machine(self, message: pb.LabelMachineRequest) -> pb.Machine:
        machines = self._administration().machines
        return await self._shown(await machines.label(message.name, message.set, message.remove, actor=actor()))

    async def note_machine(self, message: pb.NoteMachineRequest) -> pb.Machine:
        return await self._shown(await self._administration().machines.annotate(message.name, message.note, actor=actor()))

    async def set_machine_tunnel(self, message: pb.SetMachineTunnelRequest) -> pb.Machine:
        setting = tunnel_setting(message.tunnel)
        return await self._shown(await self._administration().machines.set_tunnel(message.name, setting, actor=actor()))

    async def set_machine_rates(self, message: pb.SetMachineRatesRequest) -> pb.Machine:
        machines = self._administration().machines
        return await self._shown(await machines.set_rates(message.name, rx=message.rx, tx=message.tx, actor=actor()))

    async def remove_machine(self, message: pb.MachineRequest) -> pb.Machine:
        administration = self._administration()
        return await machine_message(administration, await administration.machines.remove(message.name, actor=actor()))

    async def accept_machine(self, message: pb.MachineRequest) -> pb.Machine:
        return await self._shown(await self._administration().machines.accept(message.name, actor=actor()))

    async def deny_machine(self, message: pb.MachineRequest) -> pb.Machine:
        return await self._shown(await self._administration().machines.deny(message.name, actor=actor()))

    async def forget_unique_token(self, message: pb.MachineRequest) -> pb.Machine:
        return await self._shown(await self._administration().machines.forget_unique_token(message.name, actor=actor()))

    async def _shown(self, machine: Machine) -> pb.Machine:
        administration = self._administration()
        return await machine_message(administration, await administration.machines.status(machine))


class BanService(pb.BanServiceBase):
    """See admin.proto."""

    def __init__(self, administration: GetAdministration) -> None:
        self._administration = administration

    async def ban(self, message: pb.BanRequest) -> pb.BanResponse:
        administration = self._administration()
        kind = _kind(message.kind) if message.kind else None
        outcome = await administration.bans.add(message.name, kind=kind, reason=message.reason, actor=actor())
        grounds = BanGrounds(reason=message.reason, created_by=actor().name)
        machine = None if outcome.machine is None else await machine_message(administration, outcome.machine)
        return pb.BanResponse(ban=_ban_message(StandingBan(ban=outcome.ban, grounds=grounds)), machine=machine)

    async def unban(self, message: pb.UnbanRequest) -> pb.BanEntry:
        kind = _kind(message.kind) if message.kind else BanKind.UUID
        ban = await self._administration().bans.lift(message.value, kind=kind, actor=actor())
        return pb.BanEntry(kind=str(ban.kind), value=ban.value)

    async def list_bans(self, message: pb.ListBansRequest) -> pb.ListBansResponse:
        page = await self._administration().bans.page(message.page_size, message.page_token)
        bans = await map_in_parts(_ban_message, page.items)
        return pb.ListBansResponse(bans=bans, next_page_token=page.next_page_token, total=page.total)


def _kind(text: str) -> BanKind:
    try:
        return BanKind(text)
    except ValueError:
        raise ConfigurationError(
            f"the kind of a ban must be uuid, key or unique (a unique token), not {one_line(text, limit=32)}"
        ) from None


def _ban_message(standing: StandingBan) -> pb.BanEntry:
    ban, grounds = standing.ban, standing.grounds
    return pb.BanEntry(
        kind=str(ban.kind),
        value=ban.value,
        reason=grounds.reason,
        created_by=grounds.created_by,
        created_at=grounds.created_at,
    )
