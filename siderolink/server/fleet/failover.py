"""What a server does about others that fail: it dials the machines of dead servers, and holds back without the database.

Each machine of a dead server that can be dialled is dialled by one of the servers that are left. A server without the database
cannot know who took its machines meanwhile: after a while it sends only to those that it hears.
"""

import logging
from ipaddress import ip_address

import anyio

from siderolink.common.errors import SideroLinkError, StoreError
from siderolink.common.hostport import HostPort
from siderolink.common.wireguard.device import Device
from siderolink.common.wireguard.path import Endpoint
from siderolink.server.clock import Clock
from siderolink.server.fleet.dialling import dial_links
from siderolink.server.fleet.directory import Directory, MachineLink
from siderolink.server.fleet.owners import Owners
from siderolink.server.fleet.reconciler import Reconciler
from siderolink.server.fleet.sessions import Sessions
from siderolink.server.store import Store

log = logging.getLogger(__name__)

LEASE_SECONDS = 10.0
"""For so long without the database a server goes on as before."""
HEARD_SECONDS = 30.0
"""After that it sends only to machines that it heard within so many seconds."""
_LOOK_SECONDS = 2.0
_RETRY_SECONDS = 1.0
DIALS = 3
"""How often a dead server's machines are dialled, those that have not answered."""
DIAL_SECONDS = 2.0
"""Between these: WireGuard itself tries again only after 5 s, and not while a server is in doubt."""


class Failover:
    """Dials the machines of servers that died."""

    def __init__(
        self,
        owners: Owners,
        directory: Directory,
        sessions: Sessions,
        reconciler: Reconciler,
        store: Store,
        clock: Clock,
    ) -> None:
        self._owners = owners
        self._directory = directory
        self._sessions = sessions
        self._reconciler = reconciler
        self._store = store
        self._clock = clock
        self._dead: dict[str, int] = {}
        """How often the machines of each are still to be dialled."""
        self._wake = anyio.Event()
        owners.membership.on_dead = self._note_death

    def _note_death(self, server_id: str) -> None:
        self._dead[server_id] = DIALS
        self._wake.set()

    async def run(self) -> None:
        """Take over from each server that dies, until cancelled."""
        while True:
            await self._wake.wait()
            self._wake = anyio.Event()
            while self._dead:
                with anyio.move_on_after(await self.take_turn()):
                    await self._wake.wait()
                    self._wake = anyio.Event()

    async def take_turn(self) -> float:
        """Take over from all that are dead, once; seconds until the next turn.

        Servers that see each other's heartbeats late may disagree for a moment about who dials a machine, and dials are lost.
        """
        pause = DIAL_SECONDS
        for server_id in list(self._dead):
            try:
                await self.take_over(server_id)
            except SideroLinkError as error:
                log.warning("the machines of a dead server could not be read; retrying: %s", error)
                pause = _RETRY_SECONDS
                continue
            self._dead[server_id] -= 1
            if not self._dead[server_id]:
                del self._dead[server_id]
        return pause if self._dead else 0.0

    async def take_over(self, server_id: str) -> None:
        """Dial those machines of a dead server that this one inherits. Raises StoreError."""
        endpoints: dict[str, Endpoint] = {}
        links: list[MachineLink] = []
        async for owned in self._store.owners(server_id):
            link, endpoint = self._directory.get(owned.machine_id), _parse(owned.endpoint)
            if link is not None and link.streams:
                self._owners.settle_all([owned.machine_id])  # it came here already, with the session of the dead one
            if link is not None and endpoint is not None and self._owners.may_dial(owned.machine_id):
                self._owners.taken(owned)
                self._owners.raise_stamp(owned)
                endpoints[owned.machine_id] = endpoint
                links.append(link)
        await dial_links(
            links,
            self._directory,
            self._sessions,
            self._reconciler,
            clock=self._clock,
            may_dial=self._owners.may_dial,
            endpoint_of=lambda link: endpoints.get(link.machine.id),
        )


def _parse(endpoint: str | None) -> Endpoint | None:
    if endpoint is None:
        return None
    try:
        place = HostPort.parse(endpoint)
        return ip_address(place.host), place.port
    except ValueError:
        return None


class Lease:
    """What a server may do without the database."""

    def __init__(
        self,
        owners: Owners,
        directory: Directory,
        device: Device,
        clock: Clock,
        max_offline: float | None,
    ) -> None:
        """`max_offline`: seconds without the database after which the server ends; None for never."""
        self._owners = owners
        self._directory = directory
        self._device = device
        self._clock = clock
        self._max_offline = max_offline
        owners.membership.on_beat, owners.membership.on_return = device.own_peers_for, owners.refresh

    async def run(self) -> None:
        """Look at it, until cancelled. Raises StoreError when the database was away for too long."""
        while True:
            await self._clock.sleep(_LOOK_SECONDS)
            await self.look()

    async def look(self) -> None:
        """Hold back, or go on. Raises StoreError."""
        offline_for = self._owners.membership.offline_for
        if self._max_offline is not None and offline_for >= self._max_offline:
            raise StoreError(
                f"the database did not answer for {self._max_offline:g} s, which is as long as this server may go on"
            )
        if offline_for >= LEASE_SECONDS:
            if not self._owners.is_holding_back:
                log.warning("no database for %.0f s: only machines that were just heard are sent to", offline_for)
            self._owners.hold_back(await self._unheard())
        elif self._owners.is_holding_back:
            self._owners.go_on()

    async def _unheard(self) -> list[str]:
        found = []
        for status in await self._device.peers():
            link = self._directory.by_key(status.public_key)
            if link is None or link.claim is not None:
                continue
            silence = status.silence(self._clock.host_time())
            if silence is None or silence > HEARD_SECONDS:
                found.append(link.machine.id)
        return found
