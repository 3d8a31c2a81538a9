"""This server among those that share its store: queries in both directions, and relayed admin API calls."""

from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

from siderolink.common.grpc import Servable, Turns, serve
from siderolink.common.hostport import HostPort
from siderolink.common.keys import PrivateKey
from siderolink.common.tasks import background_tasks, keep_running
from siderolink.server.admin.api_keys import ApiKeys
from siderolink.server.admin.services import guarded
from siderolink.server.clock import Clock
from siderolink.server.fleet.machines import find_named
from siderolink.server.peers.access import PeerAccess
from siderolink.server.peers.channels import PEER_LIMITS, PeerChannels
from siderolink.server.peers.forwards import connected_at_the_owner
from siderolink.server.peers.gathering import deleted_everywhere, events_of_all, reports_of_all
from siderolink.server.peers.identity import PeerIdentity
from siderolink.server.peers.queries import PeerQueries
from siderolink.server.peers.relay import Routing, at_the_named_server, at_the_owner, relayed_by
from siderolink.server.peers.service import PeerService
from siderolink.server.peers.watch import ConnectionWatch
from siderolink.server.store import Actor, FleetServer, Store, Transaction

if TYPE_CHECKING:
    from siderolink.common.grpc.piped import JoinedStreams

SWEEP_SECONDS: Final = 1.0
_API: Final = "/siderolink.admin.v1"
_OF_A_MACHINE: Final = (
    "GetMachine",
    "RenameMachine",
    "LabelMachine",
    "NoteMachine",
    "SetMachineTunnel",
    "AskMachine",
    "SetMachineRates",
    "RemoveMachine",
    "AcceptMachine",
    "DenyMachine",
    "ForgetUniqueToken",
)


def _named(message: Any) -> str:
    name: str = message.name
    return name


def _machine(message: Any) -> str:
    name: str = message.machine
    return name


def _server(message: Any) -> str:
    name: str = message.server
    return name


ROUTES: Final[Mapping[str, Routing]] = {
    **{f"{_API}.MachineService/{name}": partial(at_the_owner, _named) for name in _OF_A_MACHINE},
    f"{_API}.HistoryService/MachineLogs": reports_of_all,
    f"{_API}.HistoryService/MachineEvents": reports_of_all,
    f"{_API}.HistoryService/DeleteHistory": deleted_everywhere,
    f"{_API}.EventService/FollowEvents": events_of_all,
    f"{_API}.ForwardService/CheckForward": partial(at_the_owner, _machine),
    f"{_API}.ServerService/Drain": partial(at_the_named_server, _server),
    f"{_API}.ServerService/UndoDrain": partial(at_the_named_server, _server),
    f"{_API}.ForwardService/Forward": connected_at_the_owner,
}
"""Routing each admin API call is routed when there are other servers. Calls not listed are answered by this server alone."""


class Members(Protocol):
    """The servers of one store."""

    @property
    def id(self) -> str:
        """This server's id."""

    def living(self) -> Sequence[FleetServer]:
        """The servers with a fresh heartbeat, including this one. Does not block."""


class Peers:
    """See the module. Created before the listener, so that this server's row can name both its address and its certificate."""

    def __init__(self, members: Members, shared_key: PrivateKey, store: Store, clock: Clock) -> None:
        self._members = members
        self._store = store
        self._clock = clock
        self.identity = PeerIdentity.make(shared_key, members.id)
        self.forwards: dict[JoinedStreams, Actor] = {}
        """The connections to machines' ports that this server relays, with their callers."""
        self.channels = PeerChannels(self.identity, self.others)
        self.queries = PeerQueries(self.channels, self.others, clock)
        self.on_stopped: Callable[[str], None] = lambda server_id: None
        """Called with the id of a server whose process seems to have ended; see `ConnectionWatch`."""

    def others(self) -> list[FleetServer]:
        """The other live servers that have an address to call."""
        return [one for one in self._members.living() if one.id != self._members.id and one.peer_address]

    async def owner_of(self, machine: str) -> FleetServer | None:
        """The other live server that has the machine's link, if any. Raises StoreError."""

        async def work(transaction: Transaction) -> str | None:
            row = await find_named(transaction, machine)
            owner = None if row is None else await transaction.ownership.of(row.id)
            return None if owner is None else owner.server_id

        server_id = await self._store.transact(work)
        return next((one for one in self.others() if one.id == server_id), None)

    @asynccontextmanager
    async def listen(
        self, address: str, service: PeerService, admin_services: Sequence[Servable], api_keys: ApiKeys, turns: Turns
    ) -> AsyncIterator[int]:
        """Serve the other servers until the context ends; yields the port. `turns` are those of the API.

        Raises AddressInUseError or ConfigurationError.
        """
        access = PeerAccess(self.others, api_keys)
        listen = HostPort.parse(address, port_zero=True)

        async def sweep() -> None:
            while True:
                await self._clock.sleep(SWEEP_SECONDS)
                access.end_calls_of_stopped_servers()
                await self.channels.sweep()

        services = guarded([service, *admin_services], access)
        tls = self.identity.server_tls
        async with (
            serve(
                services, host=listen.host, port=listen.port, tls=tls, limits=PEER_LIMITS, has_tokens=True, turns=turns
            ) as server,
            aclosing(self.channels),
            background_tasks() as tasks,
        ):
            tasks.start_soon(keep_running, "looking after the other servers", sweep)
            watch = ConnectionWatch(self.channels, self.others, lambda one: self.on_stopped(one), self._clock)
            tasks.start_soon(keep_running, "watching the connections to the other servers", watch.run)
            yield server.port


def relayed(services: Iterable[Servable], peers: Callable[[], Peers | None]) -> list[Servable]:
    """The services of the admin API for this server's callers, with relaying to the other servers."""
    return relayed_by(services, peers, ROUTES)
