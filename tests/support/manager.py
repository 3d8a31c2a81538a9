"""The server's parts on a fake device in virtual time, without sockets."""

import os
import uuid
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import anyio
import pytest
from grpclib import GRPCError, Status

from siderolink.common.addressing import overlay_prefix, parse_peer_addr_port
from siderolink.common.hostport import HostPort
from siderolink.common.keys import PrivateKey, PublicKey
from siderolink.common.pb.sidero.link import ProvisionRequest, ProvisionResponse
from siderolink.server.admin.bans import Bans
from siderolink.server.admin.machines import MachineAdministration
from siderolink.server.admin.tokens import Tokens
from siderolink.server.admission.limits import MachineLimits
from siderolink.server.admission.policy import JoinPolicy, JoinTokensMode
from siderolink.server.admission.request import Authorize, allow_all
from siderolink.server.admission.tokens import JoinTokenCheck
from siderolink.server.api.provision import ProvisionService, ResponseBuilder
from siderolink.server.events import EventHub, EventsLost, EventStream, ServerEvent
from siderolink.server.fleet.directory import MachineLink
from siderolink.server.fleet.fleet import make_fleet
from siderolink.server.fleet.last_seen import LastSeenNotes
from siderolink.server.fleet.membership import Membership
from siderolink.server.store import Machine, MemoryStore, Store
from tests.support.fake_device import FakeDevice, VirtualClock

TOKEN = "the-join-token"


def new_key() -> PublicKey:
    return PrivateKey.generate().public_key()


@dataclass(kw_only=True)
class FakeMachine:
    """One machine's side of Provision."""

    node_uuid: str = field(default_factory=lambda: str(uuid.uuid4()))
    key: PublicKey = field(default_factory=new_key)
    unique_token: str | None = None
    tunnel: bool = False
    source: str = "198.51.100.7"
    """The source address of its calls."""

    def request(self, **changes: object) -> ProvisionRequest:
        request = ProvisionRequest(
            node_uuid=self.node_uuid,
            node_public_key=self.key.encode(),
            join_token=TOKEN,
            node_unique_token=self.unique_token,
            talos_version="v1.13.0",
            wireguard_over_grpc=self.tunnel,
        )
        for name, value in changes.items():
            setattr(request, name, value)
        return request


class Manager:
    """A server without sockets."""

    def __init__(
        self,
        *,
        limits: MachineLimits | None = None,
        store: Store | None = None,
        force_tunnel: bool = False,
        authorize: Authorize = allow_all,
        join_token: str | None | JoinTokenCheck = TOKEN,
        entropy: list[bytes] | None = None,
        time: VirtualClock | None = None,
        last_seen: LastSeenNotes | None = None,
        mode: JoinTokensMode | None = None,
        trust_fingerprints: bool = False,
        server_id: str | None = None,
    ) -> None:
        """With `server_id` it is one of several servers of its store."""
        limits = limits or MachineLimits()
        self.time = time or VirtualClock()
        self.device = FakeDevice(self.time)
        self.store: Store = store or MemoryStore()
        self.hub = EventHub()
        self.join_token = join_token if isinstance(join_token, JoinTokenCheck) else JoinTokenCheck(join_token)
        prefix = overlay_prefix()
        policy = JoinPolicy(mode=mode, trust_fingerprints=trust_fingerprints)
        endpoints = tuple(HostPort("192.0.2.1" if server_id is None else f"{server_id}.example", port) for port in (1, 2, 3))
        self.membership = None if server_id is None else self._join_servers(server_id, endpoints)
        self.fleet = make_fleet(
            self.device,
            self.store,
            self.hub,
            prefix,
            limits=limits,
            policy=policy,
            clock=self.time.clock,
            last_seen=last_seen,
            entropy=os.urandom if entropy is None else lambda count: entropy.pop(0),
            membership=self.membership,
        )
        self.links = self.fleet.directory
        self.machines = self.fleet.machines
        self.admin = MachineAdministration(self.store, self.links, self.machines, self.device, self.hub, self.time.clock)
        self.bans = Bans(self.store, self.machines, self.admin, self.time.clock)
        self.monitor = self.fleet.monitor
        self.reconciler = self.fleet.reconciler
        self.device.on_event = self.monitor.on_device_event
        self.service = ProvisionService(
            self.machines,
            self.links,
            ResponseBuilder(self.device.public_key, prefix, endpoints, self.membership),
            self.hub,
            self.join_token,
            policy=policy,
            server_key=self.device.public_key,
            force_tunnel=force_tunnel,
            authorize=authorize,
            authorize_timeout=limits.authorize_timeout,
            clock=self.time.clock,
        )
        self._events = self.hub.subscribe()

    def _join_servers(self, server_id: str, endpoints: Iterable[HostPort]) -> Membership:
        return Membership(self.store, self.time.clock, server_id=server_id, endpoints=map(str, endpoints))

    async def join(self, machine: FakeMachine, **changes: object) -> ProvisionResponse:
        return await self.service.provision(machine.request(**changes), source=f"{machine.source}:1")

    async def refuses(self, machine: FakeMachine, **changes: object) -> tuple[Status, str]:
        """The status and text of the refusal; fails if the join is admitted."""
        with pytest.raises(GRPCError) as caught:
            await self.join(machine, **changes)
        return caught.value.status, caught.value.message or ""

    async def row(self, machine: FakeMachine) -> Machine:
        row = await self.machines.find(machine.node_uuid)
        assert row is not None
        return row

    async def handshake(self, machine: FakeMachine) -> None:
        """Complete the machine's handshake, and wait for its consequences."""
        self.device.hear(machine.key, handshake=True)
        await self.monitor.check()

    async def pass_time(self, seconds: float) -> None:
        self.time.advance(seconds)
        await self.monitor.check()

    def link(self, answer: ProvisionResponse) -> MachineLink:
        """The link for a tunnel stream with this answer's address."""
        link = self.links.by_virtual_address(parse_peer_addr_port(answer.grpc_peer_addr_port)[0])
        assert link is not None
        return link

    async def events(self) -> list[ServerEvent]:
        """The events since the last call."""
        return await drain(self.hub, self._events)


async def drain(hub: EventHub, events: EventStream) -> list[ServerEvent]:
    """All pending events: those before a marker that is added last."""
    mark = EventsLost(count=0)
    hub.publish(mark)
    found = []
    async for event in events:
        if event is mark:
            break
        found.append(event)
    return found


@asynccontextmanager
async def following(manager: Manager) -> AsyncIterator[Manager]:
    """A manager that follows its store's changes."""
    from siderolink.common.tasks import background_tasks

    async with background_tasks() as tasks:
        await tasks.start(manager.reconciler.follow)
        if manager.fleet.owners is not None:
            tasks.start_soon(manager.fleet.owners.run)
        yield manager


async def pass_time_of_moves(manager: Manager, seconds: float = 0) -> None:
    """Run the moves' task for three turns of its clock, or until no move is left."""
    turns = 0

    def on_sleep() -> None:
        nonlocal turns
        turns += 1
        manager.time.advance(seconds)
        if turns > 3:
            scope.cancel()

    manager.time.on_sleep = on_sleep
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(manager.fleet.moves.run, lambda address: None)
            await anyio.wait_all_tasks_blocked()
            scope.cancel()


def tokens_of(manager: Manager) -> Tokens:
    return Tokens(
        manager.store,
        manager.join_token,
        on_changed=manager.links.known.set_token,
        count_machines=lambda token_id: manager.links.token_users[token_id],
    )


def managed(mode: JoinTokensMode | None = None) -> tuple[Manager, Tokens]:
    manager = Manager(mode=mode)
    manager.store.time = manager.time.clock.time  # type: ignore[method-assign]
    return manager, tokens_of(manager)
