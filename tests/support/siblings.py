"""Admin APIs of servers that share a store, connected by real mutual TLS; tests set which servers are alive."""

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import anyio.lowlevel

from siderolink.common.grpc import Turns
from siderolink.common.keys import PrivateKey
from siderolink.common.pb.siderolink.admin import v1 as pb
from siderolink.server.admin.forwards import OpenPort
from siderolink.server.clock import Clock
from siderolink.server.fleet.directory import MachineLink
from siderolink.server.peers import Peers, PeerService, relayed
from siderolink.server.reporting import Reports
from siderolink.server.store import FleetServer, MemoryStore, Ownership
from tests.support.admin_server import AdminServer, open_admin_server
from tests.support.fake_device import VirtualClock
from tests.support.manager import FakeMachine, following

SHARED_KEY = PrivateKey(bytes([7]) * 32)


class RestingClock(VirtualClock):
    """Advanced only by hand."""

    async def sleep(self, seconds: float) -> None:
        await anyio.sleep(seconds)


@dataclass
class Registry:
    """The shared state of the siblings."""

    store: MemoryStore = field(default_factory=MemoryStore)
    time: VirtualClock = field(default_factory=RestingClock)
    rows: dict[str, FleetServer] = field(default_factory=dict)
    """The live servers, by id."""


@dataclass(frozen=True)
class View:
    """One server's view of the others."""

    id: str
    registry: Registry

    def living(self) -> Sequence[FleetServer]:
        return list(self.registry.rows.values())


@dataclass
class Sibling:
    """One of the servers."""

    id: str
    admin_server: AdminServer
    peers: Peers
    registry: Registry

    async def join(self, machine: FakeMachine) -> str:
        """A machine joins here and this server owns its link; returns its id."""
        await self.admin_server.manager.join(machine)
        await self.admin_server.manager.handshake(machine)
        row = await self.admin_server.manager.row(machine)
        await self.own(row.id, machine)
        return row.id

    async def own(self, machine_id: str, machine: FakeMachine) -> None:
        owned = Ownership(machine_id=machine_id, server_id=self.id, public_key=machine.key, heard_at=0.0)
        await self.registry.store.transact(lambda transaction: transaction.ownership.take(owned))

    async def knows(self, machine_id: str) -> MachineLink:
        """Wait for a row that another server wrote."""
        with anyio.fail_after(30):
            while (link := self.admin_server.manager.links.get(machine_id)) is None:
                await anyio.lowlevel.checkpoint()
        return link

    def revive(self) -> None:
        self.registry.rows[self.id] = self.row

    def die(self) -> None:
        self.row = self.registry.rows.pop(self.id)

    async def get(self, name: str) -> pb.Machine:
        async with self.admin_server.local() as channel:
            return await pb.MachineServiceStub(channel).get_machine(pb.MachineRequest(name=name))


@asynccontextmanager
async def open_sibling(
    folder: Path,
    name: str,
    registry: Registry,
    *,
    reports: Reports | None = None,
    shared_key: PrivateKey = SHARED_KEY,
    open_port: OpenPort | None = None,
) -> AsyncIterator[Sibling]:
    """Everything except the device and the heartbeat is real."""
    clock = Clock()
    peers = Peers(View(name, registry), shared_key, registry.store, clock)
    (folder / name).mkdir(exist_ok=True)
    async with AsyncExitStack() as stack:
        admin_server = await stack.enter_async_context(
            open_admin_server(
                folder / name,
                registry.store,
                reports=reports,
                time=registry.time,
                relays=lambda services: relayed(services, lambda: peers),
                open_port=open_port,
            )
        )
        manager = admin_server.manager
        await stack.enter_async_context(following(manager))

        async def heard_at(machine_id: str) -> float:
            link = manager.links.get(machine_id)
            silence = None if link is None else await manager.fleet.liveness.silence(link.machine)
            return 0.0 if silence is None else registry.store.time() - silence

        face = PeerService(manager.links, manager.device, registry.time.clock, heard_at, admin_server.administration.limits)
        listening = peers.listen("127.0.0.1:0", face, admin_server.services, admin_server.administration.api_keys, Turns())
        port = await stack.enter_async_context(listening)
        admin_server.administration.machines.other_servers = peers.queries
        registry.rows[name] = FleetServer(
            id=name, peer_address=f"127.0.0.1:{port}", peer_fingerprint=peers.identity.fingerprint, heartbeat_at=0.0
        )
        try:
            yield Sibling(name, admin_server, peers, registry)
        finally:
            registry.rows.pop(name, None)
