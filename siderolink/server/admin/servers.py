"""Draining for administrators: moves the machines of one server to the others of its store."""

import math
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final

from siderolink.common.errors import ConfigurationError, NotFoundError, SideroLinkError
from siderolink.common.text import one_line
from siderolink.server.admin.audit_log import AuditLog
from siderolink.server.admin.names import require
from siderolink.server.clock import Clock
from siderolink.server.fleet.draining import Draining, DrainStep
from siderolink.server.fleet.membership import Membership
from siderolink.server.store import Actor, AuditEntry, FleetServer, Role
from siderolink.server.store.audit import EMBEDDER

DRAIN_SECONDS: Final = 30.0
_LONGEST: Final = 86_400.0


def is_called(server: FleetServer, name: str) -> bool:
    """Whether `name` identifies the server: its id, or the address at which machines or other servers reach it."""
    return name in (server.id, server.peer_address, *server.endpoints)


class Servers:
    """See the module. `membership` and `draining` are None for a store that other servers cannot use."""

    def __init__(self, membership: Membership | None, draining: Draining | None, audit: AuditLog, clock: Clock) -> None:
        self._membership = membership
        self._draining = draining
        self._audit = audit
        self._clock = clock

    async def drain(self, name: str = "", timeout: float = 0.0, *, actor: Actor = EMBEDDER) -> AsyncGenerator[DrainStep]:
        """Move this server's machines to the others; yields the progress every second. Needs the role admin.

        `timeout` is in seconds; 0.0 selects the default. The drain continues when its caller stops reading.
        Raises ConfigurationError, NotFoundError, SideroLinkError.
        """
        draining = self._mine(name, actor)
        if not (math.isfinite(timeout) and 0 <= timeout <= _LONGEST):
            raise ConfigurationError(f"a drain timeout must be 0 to {_LONGEST:g} seconds")
        async with aclosing(draining.steps(timeout or DRAIN_SECONDS)) as steps:
            is_first = True
            async for step in steps:
                if is_first:
                    await self._note("server.drain", actor)
                is_first = False
                yield step

    async def undo_drain(self, name: str = "", *, actor: Actor = EMBEDDER) -> None:
        """End this server's drain. Needs the role admin. Raises NotFoundError, SideroLinkError."""
        await self._mine(name, actor).undo()
        await self._note("server.undo_drain", actor)

    def _mine(self, name: str, actor: Actor) -> Draining:
        require(actor, Role.ADMIN)
        membership, draining = self._membership, self._draining
        if membership is None or draining is None:
            raise SideroLinkError("there are no other servers: draining needs a store in Postgres")
        mine = membership.get(membership.id)
        if name and not (mine is not None and is_called(mine, name)):
            raise NotFoundError(
                f"no live server that can be called has the name {one_line(name, limit=64)!r}: see siderolink servers, "
                "or call that server directly"
            )
        return draining

    async def _note(self, action: str, actor: Actor) -> None:
        server_id = "" if self._membership is None else self._membership.id
        entry = AuditEntry(at=self._clock.time(), actor=actor, action=action, object_kind="server", object_id=server_id)
        await self._audit.add(entry)
