"""What a server does about others that fail or leave: it dials their machines, and holds back without the database.

Each machine of a dead server that can be dialled is dialled by one of the servers that are left. A server without the database
cannot know who took its machines meanwhile: after a while it sends only to those that it hears.
"""

import logging
from functools import partial
from ipaddress import ip_address
from typing import TYPE_CHECKING

import anyio
from anyio.lowlevel import checkpoint

from siderolink.common.errors import SideroLinkError, StoreError
from siderolink.common.hostport import HostPort
from siderolink.common.tasks import background_tasks, in_parts
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
"""How long a server continues unchanged without the database."""
HEARD_SECONDS = 30.0
"""After that it sends only to machines heard within this time."""
_POLL_SECONDS = 2.0
_IN_ONE_GO = 1000
_RETRY_SECONDS = 1.0
DIAL_PAUSES = (2.0, 2.0, 10.0, 20.0, 40.0)
"""Seconds between dials of a dead server's machines that have not answered.

The first are short: WireGuard itself tries again only after 5 s, and not while a server is in doubt. The others are for
machines that do not answer at first, because their hosts are busy or their network is down.
"""
INVITE_AFTER = 5.0
"""Seconds after which machines still at a draining server are dialled. Those that understand the request have left by then."""
INVITE_SECONDS = 1.5
"""How long packets are sent to such a machine, so that it can complete the handshake and move."""
INVITATIONS = 3
INVITE_INTERVAL_SECONDS = 10.0
"""Time between two dials of one machine, during which only its owner sends to it."""


class Failover:
    """Dials the machines of servers that died, and those that are left at a server that drains."""

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
        """Actions not begun yet, by server id."""
        self._wake = anyio.Event()
        owners.membership.on_dead = partial(self._note, self.succeed)
        owners.membership.on_drained = partial(self._note, self.relieve)

    def _note(self, act: "Act", server_id: str) -> None:
        self._pending[server_id] = act
        self._wake.set()

    async def run(self) -> None:
        """Take over from each server that dies or drains, until cancelled. None of them waits for another."""
        async with background_tasks() as tasks:
            while True:
                await self._wake.wait()
                self._wake = anyio.Event()
                pending, self._pending = self._pending, {}
                for server_id, act in pending.items():
                    tasks.start_soon(act, server_id)

    async def succeed(self, server_id: str) -> None:
        """Take over from a dead server.

        Servers that see each other's heartbeats late may disagree for a moment about who dials a machine, and dials are lost.
        """
        await self._retry(self.take_over, server_id)
        for pause in DIAL_PAUSES:
            await self._clock.sleep(pause)
            if self._owners.membership.is_alive(server_id):
                return
            await self._retry(self.take_over, server_id)

    async def relieve(self, server_id: str) -> None:
        """Invite the machines that stay at a server that drains, some seconds after it asked those that know the word."""
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
        """Dial those machines of a dead server that this one inherits. Raises StoreError."""
        await self._dial(server_id, self._owners.may_dial, self._reconciler.dial)

    async def invite(self, server_id: str) -> None:
        """Dial those machines of a server that drains which this one is to have. Raises StoreError.

        The owner serves them until they answer: they are sent to for a moment only, and those that do not answer stay.
        """

        async def dial(link: MachineLink, endpoint: Endpoint) -> None:
            self._owners.moments.begin(link.machine.id, INVITE_SECONDS)
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
        async for owned in self._store.owners(server_id):
            link, endpoint = self._directory.get(owned.machine_id), _parse(owned.endpoint)
            if link is not None and link.streams:
                self._owners.settle_all([owned.machine_id])  # it came here already, with the session of the dead one
            if link is not None and endpoint is not None and may_dial(owned.machine_id):
                self._owners.taken(owned)
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
        """`max_offline`: seconds without the database after which the server stops; None for never."""
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
        for part in in_parts(await self._device.peers(), _IN_ONE_GO):
            for status in part:
                link = self._directory.by_key(status.public_key)
                if link is None or link.claim is not None:
                    continue
                silence = status.silence(self._clock.host_time())
                if silence is None or silence > HEARD_SECONDS:
                    found.append(link.machine.id)
            await checkpoint()
        return found
