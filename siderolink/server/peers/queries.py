"""Queries to the other servers. A server that is unreachable or does not answer in time is left out."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final

import anyio

from siderolink.common.errors import SideroLinkError
from siderolink.common.grpc import GRPCError, translate_errors
from siderolink.common.keys import PublicKey
from siderolink.common.pb.siderolink.peers import v1 as pb
from siderolink.common.wireguard.device import PeerStatus
from siderolink.server.admin.machines import LinkElsewhere
from siderolink.server.clock import Clock
from siderolink.server.fleet.directory import LinkState
from siderolink.server.peers.channels import PeerChannels, Purpose
from siderolink.server.store import FleetServer

log = logging.getLogger(__name__)

ANSWER_SECONDS: Final = 1.0
"""Time limit of an answer about one machine."""
LIST_SECONDS: Final = 5.0
"""Time limit of an answer about all machines."""
FRESH_SECONDS: Final = 1.0
"""How long an answer about all machines is cached."""


class PeerQueries:
    """Queries the live servers."""

    def __init__(self, channels: PeerChannels, others: Callable[[], Sequence[FleetServer]], clock: Clock) -> None:
        self._channels = channels
        self._others = others
        self._clock = clock
        self._lock = anyio.Lock()
        self._all: Mapping[str, LinkElsewhere] = {}
        self._all_at: float | None = None

    async def heard_at(self, owner_server_id: str, machine_id: str) -> float | None:
        """See `OwnerQueries`."""
        server = next((one for one in self._others() if one.id == owner_server_id), None)
        answer: pb.LastHeardResponse | None = None
        with anyio.move_on_after(ANSWER_SECONDS):
            if server is not None:
                answer = await self._last_heard(server, machine_id)
        return None if answer is None else answer.heard_at

    async def _last_heard(self, server: FleetServer, machine_id: str) -> pb.LastHeardResponse | None:
        try:
            with translate_errors(f"the server {server.id}"):
                stub = pb.PeerServiceStub(self._channels.to(server, Purpose.QUERIES))
                return await stub.last_heard(pb.LastHeardRequest(machine_id=machine_id))
        except (SideroLinkError, GRPCError) as error:
            log.debug("the server %s did not answer when it last heard a machine: %s", server.id, error)
            return None

    async def link(self, machine_id: str) -> LinkElsewhere | None:
        """The machine's link at the server that heard it most recently; None if no other server has one."""
        return (await self._query_all([machine_id], ANSWER_SECONDS)).get(machine_id)

    async def links(self) -> Mapping[str, LinkElsewhere]:
        """All links of the other servers, by machine id; at most FRESH_SECONDS old."""
        async with self._lock:
            now = self._clock.monotonic()
            if self._all_at is None or now - self._all_at > FRESH_SECONDS:
                self._all = await self._query_all([], LIST_SECONDS)
                self._all_at = self._clock.monotonic()
            return self._all

    async def _query_all(self, machine_ids: Collection[str], seconds: float) -> Mapping[str, LinkElsewhere]:
        found: dict[str, LinkElsewhere] = {}

        def add(link: LinkElsewhere, machine_id: str) -> None:
            known = found.get(machine_id)
            if known is None or link.heard_at > known.heard_at:
                found[machine_id] = link

        with anyio.move_on_after(seconds):
            async with anyio.create_task_group() as queries:
                for server in self._others():
                    queries.start_soon(self._query, server, list(machine_ids), add)
        return found

    async def _query(self, server: FleetServer, machine_ids: list[str], add: Callable[[LinkElsewhere, str], None]) -> None:
        try:
            with translate_errors(f"the server {server.id}"):
                stub = pb.PeerServiceStub(self._channels.to(server, Purpose.QUERIES))
                async for part in stub.link_states(pb.LinkStatesRequest(machine_ids=machine_ids)):
                    for one in part.links:
                        add(self._parse_link(server, one), one.machine_id)
        except (SideroLinkError, GRPCError, ValueError) as error:
            log.debug("the server %s did not list its links: %s", server.id, error)

    def _parse_link(self, server: FleetServer, one: pb.LinkStatus) -> LinkElsewhere:
        """Raises ValueError."""
        now = self._clock.host_time()
        return LinkElsewhere(
            server_id=server.id,
            state=LinkState(one.state),
            peer=PeerStatus(
                public_key=PublicKey(one.public_key),
                allowed_ips=(),
                path=one.path or None,
                last_handshake=None if one.handshake_age is None else now - one.handshake_age,
                last_received=now - one.silent_for,
                received_bytes=one.received_bytes,
                sent_bytes=one.sent_bytes,
                persistent_keepalive=0,
                silent_for=one.silent_for,
            ),
            limits_biting=tuple(one.limits_biting),
        )
