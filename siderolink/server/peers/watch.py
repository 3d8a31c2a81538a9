"""Detects the end of another server's process by its connection, before heartbeats are missed.

When a process ends, also by SIGKILL, its host closes its connections at once and refuses new ones. A paused or busy process
keeps both, and so does a network failure at first. A firewall may refuse connections, too, so this is only a hint: a server is
dead only without heartbeats.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Final

from siderolink.common.errors import SideroLinkError
from siderolink.common.grpc import GRPCError, translate_errors
from siderolink.common.pb.siderolink.peers import v1 as pb
from siderolink.common.tasks import background_tasks
from siderolink.server.clock import Clock
from siderolink.server.peers.channels import PeerChannels, Purpose
from siderolink.server.store import FleetServer

log = logging.getLogger(__name__)

POLL_SECONDS: Final = 1.0
"""Seconds between polls for new servers, and between attempts to connect to one."""


class ConnectionWatch:
    """Keeps a connection to each live server."""

    def __init__(
        self,
        channels: PeerChannels,
        others: Callable[[], Sequence[FleetServer]],
        on_stopped: Callable[[str], None],
        clock: Clock,
    ) -> None:
        """`on_stopped` is called once for each connection that was closed by a server that then refuses another one."""
        self._channels = channels
        self._others = others
        self._on_stopped = on_stopped
        self._clock = clock
        self._watched: set[str] = set()

    async def run(self) -> None:
        """Watch every server that is alive, until cancelled."""
        async with background_tasks() as tasks:
            while True:
                for server in self._others():
                    if server.id not in self._watched:
                        self._watched.add(server.id)
                        tasks.start_soon(self._watch, server.id)
                await self._clock.sleep(POLL_SECONDS)

    async def _watch(self, server_id: str) -> None:
        """Stay connected to a server for as long as it is alive."""
        was_connected = False
        try:
            while (server := next((one for one in self._others() if one.id == server_id), None)) is not None:
                began_at = self._clock.monotonic()
                try:
                    with translate_errors(f"the server {server_id}"):
                        await self._stay_connected(server)
                    was_connected = True
                    if self._clock.monotonic() - began_at > POLL_SECONDS:
                        continue
                except (SideroLinkError, GRPCError) as error:
                    log.debug("no connection to the server %s: %s", server_id, error)
                    if was_connected and isinstance(error.__cause__, ConnectionRefusedError):
                        was_connected = False
                        self._on_stopped(server_id)
                    was_connected |= isinstance(error, GRPCError)  # it answers, but does not know this server yet
                await self._clock.sleep(POLL_SECONDS)
        finally:
            self._watched.discard(server_id)

    async def _stay_connected(self, server: FleetServer) -> None:
        """Connect, and return once the connection is closed. Raises SideroLinkError, GRPCError."""
        channel = self._channels.to(server, Purpose.QUERIES)
        # A connection that was admitted once may stay open.
        await pb.PeerServiceStub(channel).last_heard(pb.LastHeardRequest(machine_id=""))
        await channel.wait_lost()
