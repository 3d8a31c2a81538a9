"""A machine's link to its server, as an embedder uses it."""

import os
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from ipaddress import IPv6Address, IPv6Interface
from pathlib import Path
from typing import Literal

import anyio

from siderolink.client.link.events import ConnectionState, LinkEvent
from siderolink.client.link.host import Host
from siderolink.client.link.identity import TALOS_VERSION, UniqueTokens, machine_identity, machine_uuid
from siderolink.client.link.provisioning import NodeInfo, Provisioned
from siderolink.client.link.runner import LinkOptions, LinkRunner, ServerKeys
from siderolink.client.link.supervisor import VERDICT_TIMEOUT, LinkSupervisor, Verdict
from siderolink.common.errors import ConfigurationError, DeviceError, HandshakeTimeoutError, SideroLinkError
from siderolink.common.grpc import client_tls
from siderolink.common.join_url import JoinURL
from siderolink.common.keys import PrivateKey, PublicKey
from siderolink.common.queues import Broadcast
from siderolink.common.tasks import background_tasks, in_thread
from siderolink.common.wireguard.device import Device, DeviceKind, PeerStatus

EVENT_HISTORY = 256
"""Number of past events kept for late readers."""
HANDSHAKE_TIMEOUT = 60.0
"""Seconds from the server's first answer to the first handshake."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkStatus:
    """A snapshot of a link."""

    state: ConnectionState
    reason: str
    """Why it is in this state."""
    since: float
    """Unix time in seconds of the last transition."""
    interface: str | None
    """None while there is no interface."""
    device: Literal["kernel", "userspace"] | None
    transport: Literal["udp", "tunnel"] | None
    route: str | None
    """The route to the server in use, or last tried."""
    address: IPv6Interface | None
    server_address: IPv6Address | None
    public_key: PublicKey
    """This machine's ephemeral key."""
    listen_port: int | None
    server: PeerStatus | None
    """The server as the device knows it."""
    drops: dict[str, int]
    refused_settings: str = ""
    """Why the latest settings are not in force; empty if they are."""
    last_refused: str = ""
    """The last settings that were refused and dropped, and why; empty once later ones were applied."""


class Link:
    """A running link. The docstrings say which properties can change when the link is re-established.

    Before the server's first answer (visible only with `connect(wait=False)`), properties taken from it raise SideroLinkError.
    """

    def __init__(self, runner: LinkRunner, supervisor: LinkSupervisor, broadcast: Broadcast[LinkEvent]) -> None:
        self._runner = runner
        self._supervisor = supervisor
        self._broadcast = broadcast

    @property
    def address(self) -> IPv6Address:
        """This machine's overlay address. It changes if the server has forgotten the machine."""
        return self._answer.address.ip

    @property
    def server_address(self) -> IPv6Address:
        """The server's overlay address."""
        return self._answer.server_address

    @property
    def server_key(self) -> PublicKey:
        """The server's WireGuard key. It changes when a server without a state file restarts."""
        return self._answer.server_key

    @property
    def public_key(self) -> PublicKey:
        """This machine's ephemeral WireGuard key."""
        return self._runner.public_key

    @property
    def state(self) -> ConnectionState:
        return self._runner.state

    @property
    def transport(self) -> Literal["udp", "tunnel"]:
        """The transport that the server's last answer selected."""
        transport = self._runner.transport
        if transport is None:
            raise SideroLinkError("the server has not answered yet")
        return transport.kind

    @property
    def device(self) -> Device:
        """The WireGuard device. Raises DeviceError while it is replaced by another, or after the link was left."""
        if self._runner.device is None:
            raise DeviceError("the link has no interface at present")
        return self._runner.device

    @property
    def interface(self) -> str:
        """The interface's name. Raises as `device` does."""
        return self.device.name

    @property
    def options(self) -> LinkOptions:
        """The settings in force."""
        return self._runner.options

    @property
    def private_key(self) -> PrivateKey:
        """This machine's private key for the current server; each server gets another one."""
        return self._runner.private_key

    @property
    def has_worked(self) -> bool:
        """Whether the link has been up with the settings in force."""
        progress = self._runner.progress
        return progress.machine.was_up and not progress.has_new_settings

    def runs_by(self, options: LinkOptions) -> bool:
        """Whether the link is up with these settings."""
        runner = self._runner
        return runner.options == options and runner.is_up and not runner.progress.has_new_settings

    async def apply(
        self, options: LinkOptions, *, timeout: float = VERDICT_TIMEOUT, keep: bool = False, prove_first: bool = False
    ) -> Verdict:
        """Test new settings alongside the link and switch to them only if they work; see `LinkSupervisor.apply`.

        Create them with `dataclasses.replace(link.options, ...)`.
        """
        return await self._supervisor.apply(options, timeout=timeout, keep=keep, prove_first=prove_first)

    async def status(self) -> LinkStatus:
        """A snapshot of the link's state."""
        return await read_status(self._runner, self._supervisor.refusal, self._supervisor.last_refused)

    def events(self) -> AsyncIterator[LinkEvent]:
        """The most recent events, then each new one, until the link is left."""
        return self._broadcast.subscribe()

    async def wait_answered(self) -> None:
        """Wait for the server's first answer."""
        await self._runner.answered.wait()

    async def wait_connected(self) -> None:
        """Wait for the first handshake."""
        await self._runner.progress.connected.wait()

    async def wait_down(self) -> None:
        """Wait until the link is down; returns immediately if it already is."""
        await self._runner.progress.down.wait()

    @property
    def _answer(self) -> Provisioned:
        answer = self._runner.answer
        if answer is None:
            raise SideroLinkError("the server has not answered yet")
        return answer

    def __repr__(self) -> str:
        if self._runner.answer is None:
            return f"<Link {self.state}>"
        return f"<Link {self.state} {self.address} to {self.server_address} by {self.transport}>"


async def read_status(runner: LinkRunner, refused_settings: str = "", last_refused: str = "") -> LinkStatus:
    device, answer, transport = runner.device, runner.answer, runner.transport
    return LinkStatus(
        state=runner.state,
        reason=runner.progress.machine.reason,
        since=runner.progress.machine.since,
        interface=device.name if device else None,
        device=device.kind if device else None,
        transport=transport.kind if transport else None,
        route=str(runner.route) if runner.route else None,
        address=answer.address if answer else None,
        server_address=answer.server_address if answer else None,
        public_key=runner.public_key,
        listen_port=device.listen_port if device else None,
        server=await device.peer(answer.server_key) if device and answer else None,
        drops=device.drops() if device else {},
        refused_settings=refused_settings,
        last_refused=last_refused,
    )


@asynccontextmanager
async def connect(
    url: JoinURL | str,
    *,
    uuid: str | None = None,
    unique_token: str = "",
    identity: str | os.PathLike[str] | None = None,
    talos_version: str = TALOS_VERSION,
    interface: str | None = None,
    device: DeviceKind = "auto",
    namespace: str | None = None,
    private_key: PrivateKey | None = None,
    tls: ssl.SSLContext | None = None,
    ca_file: str | os.PathLike[str] | None = None,
    fallback_tunnel: bool = False,
    wait: bool = True,
    handshake_timeout: float | None = HANDSHAKE_TIMEOUT,
    on_event: Callable[[LinkEvent], None] | None = None,
) -> AsyncIterator[Link]:
    """Join the server at `url` and keep the link up. The body runs once traffic flows; leaving it removes the interface.

    `uuid` defaults to the firmware's. `identity` is a folder in which the machine stores a unique token for each server, unless
    `unique_token` is given; the token ensures that no other machine can join with this UUID, also after a restart. `interface`
    defaults to the transport's usual name. `namespace` is the network namespace of the interface; datagrams and calls use the
    caller's. `private_key` defaults to a new one; with the same key, the server treats a new join as the same link. The
    certificate of an https URL is verified by the system's roots, by `ca_file` (PEM), or by `tls`, which is changed to offer
    HTTP/2. `on_event` is called on the event loop for every event and must be quick. A dead link is re-established
    indefinitely, which `events` reports; `Link.apply` changes its settings.

    Raises JoinURLError or ConfigurationError for unusable arguments; ServerUnreachableError, JoinRefusedError or
    InvalidAnswerError if the first join fails; HandshakeTimeoutError after `handshake_timeout` seconds without a handshake
    (None waits indefinitely); a DeviceError if no interface can be created.
    """
    if tls is not None and ca_file is not None:
        raise ConfigurationError("give either tls or ca_file, not both")
    url = JoinURL.parse(url) if isinstance(url, str) else url
    folder = None if identity is None else Path(identity)
    node_uuid = machine_identity(uuid) if uuid is not None else await in_thread(partial(machine_uuid, folder=folder))
    if url.tls and tls is None:
        tls = await in_thread(_roots, ca_file)
    options = LinkOptions(
        url=url,
        machine=NodeInfo(uuid=node_uuid, unique_token=unique_token, version=talos_version),
        interface=interface,
        device=device,
        namespace=namespace,
        tls=tls,
        private_key=private_key,
        fallback_tunnel=fallback_tunnel,
        retry_first=not wait,
    )
    if folder is not None and not unique_token:
        token = await UniqueTokens(folder).token(options.server, node_uuid)
        options = replace(options, machine=replace(options.machine, unique_token=token))
    async with open_link(options, on_event) as link:
        if wait:
            await _first_handshake(link, handshake_timeout)
        yield link


@asynccontextmanager
async def open_link(
    options: LinkOptions,
    on_event: Callable[[LinkEvent], None] | None = None,
    *,
    host: Host | None = None,
    keys: ServerKeys | None = None,
) -> AsyncIterator[Link]:
    """Run a link with these options while the body runs. Permanent failures are raised in the body, as in `connect`.

    `keys` are the private keys per server, shared by consecutive links.
    """
    broadcast: Broadcast[LinkEvent] = Broadcast(history=EVENT_HISTORY)

    def emit(event: LinkEvent) -> None:
        broadcast.publish(event)
        if on_event is not None:
            on_event(event)

    runner = LinkRunner(options, emit, host, keys)
    supervisor = LinkSupervisor(runner, emit)
    try:
        async with background_tasks() as tasks:
            tasks.start_soon(runner.run, name="siderolink link")
            tasks.start_soon(supervisor.run, name="siderolink settings")
            yield Link(runner, supervisor, broadcast)
    finally:
        broadcast.end()


def _roots(ca_file: str | os.PathLike[str] | None) -> ssl.SSLContext:
    return client_tls(os.fspath(ca_file) if ca_file is not None else None)


async def _first_handshake(link: Link, timeout: float | None) -> None:
    await link.wait_answered()
    with anyio.move_on_after(timeout):
        await link.wait_connected()
        return
    raise HandshakeTimeoutError(
        f"no WireGuard handshake within {timeout:g} s; last tried: {(await link.status()).route}. "
        "Check that the server's endpoint is reachable by UDP, or use the tunnel: grpc_tunnel=true"
    )
