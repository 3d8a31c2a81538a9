"""Failover: dials the machines of servers that died or drain, and limits what a server does without the database.

Each machine of a dead server that can be dialled is dialled by one of the remaining servers. A server without the database
cannot know which of its machines another server took; after a while it sends only to machines that it hears.
"""

import logging
from functools import partial
from ipaddress import ip_address
from typing import TYPE_CHECKING

import anyio
from anyio.lowlevel import checkpoint

from siderolink.common.errors import SideroLinkError, StoreError
from siderolink.common.hostport import HostPort
from siderolink.common.tasks import background_tasks
from siderolink.common.wireguard.device import Device
from siderolink.common.wireguard.path import Endpoint
from siderolink.server.clock import Clock
from siderolink.server.fleet.dialling import dial_links
from siderolink.server.fleet.directory import Directory, MachineLink
from siderolink.server.fleet.owners import Owners
from siderolink.server.fleet.reconciler import Reconciler
from siderolink.server.fleet.sessions import Sessions
from siderolink.server.store import Store

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    Act = Callable[[str], Coroutine[object, object, None]]

log = logging.getLogger(__name__)

LEASE_SECONDS = 10.0
"""Seconds for which a server continues unchanged without the database."""
HEARD_SECONDS = 30.0
"""After that, it sends only to machines heard within this many seconds."""
_POLL_SECONDS = 2.0
_RETRY_SECONDS = 1.0
DIAL_PAUSES = (2.0, 2.0, 10.0, 20.0, 40.0)
"""Seconds between dials of a dead server's machines that have not answered yet.

The first pauses are short, because WireGuard itself retries only after 5 s, and not while ownership is unclear. The later ones
are for machines whose host is busy or whose network is down.
"""
_AT_ONCE = 32
"""Machines of a server that are looked at before other tasks run."""
INVITE_AFTER = 5.0
"""Seconds after which machines still at a draining server are dialled. Those that understand the request have moved by then."""
INVITE_SECONDS = 1.5
"""Seconds for which packets are sent to such a machine, so that it can complete the handshake and move."""
INVITATIONS = 3
INVITE_INTERVAL_SECONDS = 10.0
"""Seconds between two dials of one machine, in which only its owner sends to it."""


class Failover:
    """Dials the machines of servers that died, and machines that remain at a draining server."""

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
        self._pending: dict[str, Act] = {}
        """Actions not started yet, by server id."""
        self._wake = anyio.Event()
        owners.membership.on_dead = partial(self._note, self.succeed)
        owners.membership.on_drained = partial(self._note, self.relieve)

    def _note(self, act: "Act", server_id: str) -> None:
        self._pending[server_id] = act
        self._wake.set()

    async def run(self) -> None:
        """Take over from each server that dies or drains, concurrently, until cancelled."""
        async with background_tasks() as tasks:
            while True:
                await self._wake.wait()
                self._wake = anyio.Event()
                pending, self._pending = self._pending, {}
                for server_id, act in pending.items():
                    tasks.start_soon(act, server_id)

    async def succeed(self, server_id: str) -> None:
        """Take over from a dead server.

        Dials are repeated, because servers may briefly disagree about which of them dials a machine, and datagrams are lost.
        """
        await self._retry(self.take_over, server_id)
        for pause in DIAL_PAUSES:
            await self._clock.sleep(pause)
            if self._owners.membership.is_alive(server_id):
                return
            await self._retry(self.take_over, server_id)

    async def relieve(self, server_id: str) -> None:
        """Invite the machines that remain at a draining server, some seconds after it asked them to move."""
        for turn in range(INVITATIONS):
            await self._clock.sleep(INVITE_INTERVAL_SECONDS if turn else INVITE_AFTER)
            if not self._owners.membership.is_leaving(server_id):
                return
            await self._retry(self.invite, server_id)

    async def _retry(self, act: "Act", server_id: str) -> None:
        while True:
            try:
                return await act(server_id)
            except SideroLinkError as error:
                log.warning("the machines of the server %s could not be read; retrying: %s", server_id, error)
                await self._clock.sleep(_RETRY_SECONDS)

    async def take_over(self, server_id: str) -> None:
        """Dial the machines of a dead server that this one inherits. Raises StoreError."""
        await self._dial(server_id, self._owners.may_dial, self._reconciler.dial)

    async def invite(self, server_id: str) -> None:
        """Dial the machines of a draining server that this server should get. Raises StoreError.

        The owner serves them until they answer. This server sends to them only briefly; those that do not answer stay there.
        """

        async def dial(link: MachineLink, endpoint: Endpoint) -> None:
            self._owners.send_windows.begin(link.machine.id, INVITE_SECONDS)
            await self._reconciler.dial(link, endpoint)

        await self._dial(server_id, self._may_invite, dial)

    def _may_invite(self, machine_id: str) -> bool:
        owners, membership = self._owners, self._owners.membership
        owner = owners.owner_of(machine_id)
        if owner is None or not membership.is_leaving(owner) or membership.heir(machine_id) != membership.id:
            return False
        return not membership.has_wrong_clock and not owners.is_holding_back

    async def _dial(
        self, server_id: str, may_dial: "Callable[[str], bool]", dial: "Callable[[MachineLink, Endpoint], Awaitable[None]]"
    ) -> None:
        endpoints: dict[str, Endpoint] = {}
        links: list[MachineLink] = []
        seen = 0
        async for owned in self._store.owners(server_id):
            seen += 1
            if seen % _AT_ONCE == 0:
                await checkpoint()
            link, endpoint = self._directory.get(owned.machine_id), _parse(owned.endpoint)
            if link is not None and link.streams:
                self._owners.settle_all([owned.machine_id])  # it is here already, in the dead server's session
            if link is not None and endpoint is not None and may_dial(owned.machine_id):
                self._owners.update(owned)
                self._owners.raise_stamp(owned)
                endpoints[owned.machine_id] = endpoint
                links.append(link)
        await dial_links(
            links,
            self._directory,
            self._sessions,
            dial,
            clock=self._clock,
            may_dial=may_dial,
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
    """Limits what a server does without the database."""

    def __init__(
        self,
        owners: Owners,
        directory: Directory,
        device: Device,
        clock: Clock,
        max_offline: float | None,
    ) -> None:
        """`max_offline`: seconds without the database after which the server stops; None disables it."""
        self._owners = owners
        self._directory = directory
        self._device = device
        self._clock = clock
        self._max_offline = max_offline
        owners.membership.on_beat, owners.membership.on_return = device.own_peers_for, owners.refresh

    async def run(self) -> None:
        """Poll until cancelled. Raises StoreError if the database was unavailable for too long."""
        while True:
            await self._clock.sleep(_POLL_SECONDS)
            await self.check()

    async def check(self) -> None:
        """Start or end holding back, as needed. Raises StoreError."""
        offline_for = self._owners.membership.offline_for
        if self._max_offline is not None and offline_for >= self._max_offline:
            raise StoreError(
                f"the database did not answer for {self._max_offline:g} s, the longest that this server may run without it"
            )
        if offline_for >= LEASE_SECONDS:
            if not self._owners.is_holding_back:
                log.warning("no database for %.0f s: sending only to machines that were heard recently", offline_for)
            self._owners.hold_back(await self._unheard())
        elif self._owners.is_holding_back:
            self._owners.resume()

    async def _unheard(self) -> list[str]:
        found = []
        async for part in self._device.peers_in_parts():
            for status in part:
                link = self._directory.by_key(status.public_key)
                if link is None or link.claim is not None:
                    continue
                silence = status.silence(self._clock.host_time())
                if silence is None or silence > HEARD_SECONDS:
                    found.append(link.machine.id)
        return found
