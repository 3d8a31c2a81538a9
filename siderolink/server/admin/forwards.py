"""Connections to machines' ports for remote callers: permissions, limits and audit.

A machine treats the server's overlay address as its administrator, so a connection from here has that role.
"""

import contextlib
import logging
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from ipaddress import IPv6Address
from typing import Final, Self

import anyio

from siderolink.common.errors import ConfigurationError, ForbiddenError, NotFoundError, SideroLinkError, StoreError, reason_of
from siderolink.common.grpc.piped import JoinedStreams, Pipe, PipeCutError, close_with_reset
from siderolink.common.overlay_socket import dial_overlay
from siderolink.common.text import one_line
from siderolink.common.token_bucket import TokenBucket
from siderolink.server.admin.audit_log import AuditLog
from siderolink.server.admin.machines import MachineAdministration
from siderolink.server.clock import Clock
from siderolink.server.store import Actor, AuditEntry, Machine, MachineAdmission, Role
from siderolink.server.store.audit import EMBEDDER

log = logging.getLogger(__name__)

MAX_FORWARDS: Final = 256
"""Maximum connections; each buffers 256 KiB at most."""
MAX_FORWARDS_BY_GRANT: Final = 64
"""Maximum connections of one API key without the role admin, so that it cannot use up all connections; as many are relayed."""
UNSENT_BYTES: Final = 64 * 1024
"""Unsent bytes kept by the kernel for a connection to a machine's port; data is credited when the kernel accepts it."""
RECEIVE_BUFFER_BYTES: Final = 128 * 1024
"""Bytes from a machine that the kernel buffers for a slow caller, in up to twice as much memory. The kernel's default grows to
megabytes on a fast connection."""
_REFUSALS_PER_MINUTE: Final = 10
_RECORD_SECONDS: Final = 5.0

OpenPort = Callable[[Machine, int], Awaitable[socket.socket]]
"""Connects to a port of a machine over the overlay. Raises OSError, TimeoutError or SideroLinkError."""
StartPipe = Callable[[socket.socket], Awaitable[Pipe]]
"""Reports to the caller that the port is open, and creates the pipe to it."""


class ForwardRefusal(StrEnum):
    """Why a connection was not opened."""

    NOT_GRANTED = "not granted"
    """The caller is not an admin and has no grant for the machine and port."""
    NO_MACHINE = "no machine"
    """No machine has the name, id, UUID or key that the caller gave."""
    MACHINE_DENIED = "machine denied"
    """The machine is denied and therefore has no link."""
    TOO_MANY = "too many"
    """The limit of open connections is reached, in total or for one API key."""
    NO_ANSWER = "no answer"
    """The machine did not answer in time, or is unreachable."""
    PORT_CLOSED = "port closed"
    """The machine refused the connection: nothing listens there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardCounters:
    """Counters since the start."""

    open: int
    """Open connections."""
    opened: int
    refusals: Mapping[str, int]
    """Connections that were not opened, by `ForwardRefusal`."""
    held_bytes: int
    """Bytes of all connections waiting to be written."""
    to_machines: int
    from_machines: int
    relayed: int = 0
    """Open connections relayed to other servers. Of the other fields, only `held_bytes` includes them."""

    def with_relayed(self, relayed: Collection[JoinedStreams]) -> Self:
        """The counters including relayed connections."""
        return replace(self, relayed=len(relayed), held_bytes=self.held_bytes + sum(one.held for one in relayed))


@dataclass(eq=False)
class _Forward:
    machine: Machine
    port: int
    actor: Actor
    began: float
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    pipe: Pipe | None = None

    def entry(self, at: float, action: str, **after: object) -> AuditEntry:
        return AuditEntry(
            at=at,
            actor=self.actor,
            action=action,
            object_kind="machine",
            object_id=self.machine.id,
            object_name=self.machine.shown_name,
            after={"port": self.port, **after},
        )


class Forwards:
    """Connections to machines' ports, for admins and for API keys with a grant for the machine."""

    def __init__(self, machines: MachineAdministration, audit: AuditLog, clock: Clock, open_port: OpenPort | None) -> None:
        """`open_port` is None without an overlay."""
        self._machines = machines
        self._audit = audit
        self._clock = clock
        self._open_port = open_port
        self._running: set[_Forward] = set()
        self._opened = self._to_machines = self._from_machines = 0
        self._refusals: Counter[ForwardRefusal] = Counter()
        self._noted_refusals = TokenBucket(_REFUSALS_PER_MINUTE / 60, _REFUSALS_PER_MINUTE)

    def counters(self) -> ForwardCounters:
        pipes = [one.pipe for one in self._running if one.pipe is not None]
        return ForwardCounters(
            open=len(self._running),
            opened=self._opened,
            refusals={str(reason): count for reason, count in self._refusals.items()},
            held_bytes=sum(pipe.held for pipe in pipes),
            to_machines=self._to_machines + sum(pipe.to_connection for pipe in pipes),
            from_machines=self._from_machines + sum(pipe.from_connection for pipe in pipes),
        )

    async def check(self, name: str, port: int, *, actor: Actor = EMBEDDER) -> Machine:
        """The machine with this name, id, UUID or public key, if the actor may reach the port.

        Raises ForbiddenError, NotFoundError, ConfigurationError, and SideroLinkError for a machine without a link.
        """
        if not 1 <= port <= 65535:
            raise ConfigurationError(f"a port must be a number from 1 to 65535, not {port}")
        is_admin = _is_admin(actor)
        if not is_admin and not actor.grants:
            await self._refuse(actor, port, one_line(name, limit=64))
        try:
            machine = (await self._machines.get(name)).machine
        except NotFoundError:
            self._refusals[ForwardRefusal.NO_MACHINE] += 1
            raise
        if not is_admin and not any(grant.allows(machine.id, port) for grant in actor.grants):
            await self._refuse(actor, port, machine.shown_name, machine.id)
        if machine.admission is MachineAdmission.DENIED:
            self._refusals[ForwardRefusal.MACHINE_DENIED] += 1
            raise SideroLinkError(f"the machine {machine.shown_name} is denied: it has no link")
        return machine

    async def _refuse(self, actor: Actor, port: int, name: str, machine_id: str = "") -> None:
        """Raises ForbiddenError. A few refusals per minute are audited."""
        self._refusals[ForwardRefusal.NOT_GRANTED] += 1
        if self._noted_refusals.take(1):
            await self._audit.add(
                AuditEntry(
                    at=self._clock.time(),
                    actor=actor,
                    action="forward.refuse",
                    object_kind="machine",
                    object_id=machine_id,
                    object_name=name,
                    after={"port": port},
                )
            )
        raise ForbiddenError(
            f"forwarding needs the role admin, or an API key with a grant for the machine; "
            f"{one_line(actor.name, limit=64)} has none for port {port} of {name}"
        )

    async def run(self, name: str, port: int, start: StartPipe, *, actor: Actor = EMBEDDER) -> None:
        """Run one connection to a machine's port until it ends.

        Raises the errors of `check` and of `Pipe.run`, and SideroLinkError for a port that does not answer.
        """
        machine = await self.check(name, port, actor=actor)
        if len(self._running) >= MAX_FORWARDS:
            self._refusals[ForwardRefusal.TOO_MANY] += 1
            raise SideroLinkError(f"{MAX_FORWARDS} forwarded connections are open already; close some")
        if is_at_grant_limit(actor, (one.actor for one in self._running)):
            self._refusals[ForwardRefusal.TOO_MANY] += 1
            raise SideroLinkError(f"{MAX_FORWARDS_BY_GRANT} forwarded connections of this API key are open already; close some")
        forward = _Forward(machine, port, actor, time.monotonic())
        self._running.add(forward)
        try:
            await self._audit.add(forward.entry(self._clock.time(), "forward.open"))
            outcome = "cut"
            try:
                with forward.scope:
                    outcome = await self._carry(forward, start)
                if forward.scope.cancelled_caught:
                    outcome = "the machine no longer has a link"
                    raise SideroLinkError(f"the machine {machine.shown_name} was removed or denied")
            except PipeCutError as error:
                outcome = "reset by the machine" if error.is_connection else "reset by the caller"
                raise
            except SideroLinkError as error:
                outcome = one_line(str(error), limit=200)
                raise
            finally:
                await self._record_end(forward, outcome)
        finally:
            self._running.discard(forward)

    async def _carry(self, forward: _Forward, start: StartPipe) -> str:
        sock = await self._connect(forward)
        is_whole = False
        try:
            forward.pipe = await start(sock)
            self._opened += 1
            await forward.pipe.run()
            is_whole = True
        finally:
            if is_whole:
                sock.close()
            else:
                close_with_reset(sock)
        return "closed"

    async def _connect(self, forward: _Forward) -> socket.socket:
        if self._open_port is None:
            raise SideroLinkError("this server has no overlay")
        where = f"port {forward.port} of {forward.machine.shown_name}"
        try:
            return await self._open_port(forward.machine, forward.port)
        except TimeoutError:
            refusal, reason = ForwardRefusal.NO_ANSWER, f"{where} does not answer"
        except ConnectionRefusedError:
            refusal, reason = ForwardRefusal.PORT_CLOSED, f"nothing listens at {where}"
        except OSError as error:
            refusal, reason = ForwardRefusal.NO_ANSWER, f"{where} cannot be reached: {reason_of(error)}"
        self._refusals[refusal] += 1
        raise SideroLinkError(reason)

    async def _record_end(self, forward: _Forward, outcome: str) -> None:
        pipe = forward.pipe
        to_machine, from_machine = (0, 0) if pipe is None else (pipe.to_connection, pipe.from_connection)
        self._to_machines += to_machine
        self._from_machines += from_machine
        forward.pipe = None
        entry = forward.entry(
            self._clock.time(),
            "forward.close",
            to_machine_bytes=to_machine,
            from_machine_bytes=from_machine,
            seconds=round(time.monotonic() - forward.began, 3),
            outcome=outcome,
        )
        try:
            with anyio.fail_after(_RECORD_SECONDS, shield=True):
                await self._audit.add(entry)
        except (StoreError, TimeoutError) as error:
            fields = forward.machine.log_fields
            log.warning("cannot audit the end of a forwarded connection: %s", error, extra=fields)

    def end_of(self, machine_id: str) -> None:
        """End the connections to a machine that was removed or denied."""
        for forward in self._running:
            if forward.machine.id == machine_id:
                forward.scope.cancel()


def is_at_grant_limit(actor: Actor, running: Iterable[Actor]) -> bool:
    """Whether the caller is no admin and has `MAX_FORWARDS_BY_GRANT` of the running connections, given by their callers."""
    return not _is_admin(actor) and sum(one.name == actor.name for one in running) >= MAX_FORWARDS_BY_GRANT


def _is_admin(actor: Actor) -> bool:
    return actor.role is not None and actor.role.includes(Role.ADMIN)


async def open_machine_port(
    machine: Machine, port: int, *, source: IPv6Address, interface: str, namespace: str | None = None
) -> socket.socket:
    """Open a TCP connection from the server's overlay address to a machine's port. Raises OSError, TimeoutError.

    Raises ForbiddenError for a row with the server's own address.
    """
    if machine.overlay_address == source:
        raise ForbiddenError("this is the server's own address")
    sock = await dial_overlay(source, machine.overlay_address, port, interface, namespace=namespace)
    with contextlib.suppress(OSError):  # it may already be reset
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 6)
    return sock
