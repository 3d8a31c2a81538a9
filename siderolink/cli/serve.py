"""`siderolink serve`: the server in the foreground."""

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from siderolink.cli.control import control_socket, peer_message
from siderolink.cli.running import run_until_stopped, say
from siderolink.cli.secret import read_secret
from siderolink.common.errors import ConfigurationError
from siderolink.common.pb.siderolink.control import Event, StatusResponse
from siderolink.common.wireguard.device import DeviceKind
from siderolink.server import (
    EventsLost,
    HandshakeCompleted,
    JoinRefused,
    LinkDown,
    MachineJoined,
    MachineLeft,
    Server,
    ServerEvent,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """As given on the command line."""

    api_listen: str
    wireguard_endpoints: tuple[str, ...]
    join_token: str | None = field(repr=False)
    join_token_file: Path | None
    interface: str
    device: DeviceKind


class ServerSource:
    """A server, as the control socket shows it."""

    def __init__(self, server: Server) -> None:
        self._server = server

    async def status(self) -> StatusResponse:
        server = self._server
        uuids = {status.machine.public_key: status.machine.node_uuid for status in await server.machines()}
        return StatusResponse(
            role="server",
            interface=server.device.name,
            device_kind=server.device.kind,
            transport="udp,tunnel" if server.wireguard_port is not None else "tunnel",
            addresses=[f"{server.address}/64"],
            public_key=str(server.public_key),
            listen_port=server.wireguard_port or 0,
            peers=[peer_message(peer, uuids.get(peer.public_key, "")) for peer in await server.device.peers()],
            drops=server.drops(),
            refusals=server.refusals(),
            state="serving",
        )

    async def events(self) -> AsyncIterator[Event]:
        async for event in self._server.events():
            name, subject, text = describe(event)
            yield Event(time=time.time(), kind=name, subject=subject, detail=text)


def describe(event: ServerEvent) -> tuple[str, str, str]:
    """The event's name in words, whom it is about, and what there is to say about it."""
    match event:
        case MachineJoined(machine=machine):
            way = "tunnel" if machine.tunnel else "udp"
            return "joined", machine.node_uuid, f"{machine.overlay_address} by {way}"
        case HandshakeCompleted(machine=machine, is_first=is_first):
            return "handshake", machine.node_uuid, f"{machine.overlay_address}{' is up' if is_first else ''}"
        case LinkDown(machine=machine):
            return "link down", machine.node_uuid, str(machine.overlay_address)
        case MachineLeft(machine=machine, reason=reason):
            return "left", machine.node_uuid, f"{machine.overlay_address}: {reason}"
        case JoinRefused(reason=reason, node_uuid=node_uuid, source=source):
            return "refused", node_uuid or "", f"{reason}, from {source}"
        case EventsLost(count=count):
            return "events lost", "", str(count)


def run_serve(options: ServeOptions) -> None:
    """Serve until stopped. Raises SideroLinkError."""
    token = read_secret("join-token", options.join_token, options.join_token_file)
    if token is None:
        raise ConfigurationError(
            "a server needs a join token: by --join-token-file, by SIDEROLINK_JOIN_TOKEN, "
            "or by the systemd credential siderolink.join-token"
        )
    server = Server(
        api_listen=options.api_listen,
        wireguard_endpoints=options.wireguard_endpoints,
        join_token=token,
        interface=options.interface,
        device=options.device,
    )

    async def work() -> None:
        async with server, control_socket(options.interface, ServerSource(server)):
            say("serving", f"API on {options.api_listen}, WireGuard on UDP port {server.wireguard_port}")
            say("overlay", f"{server.address} on {server.device.name} ({server.device.kind} device), key {server.public_key}")
            async for event in server.events():
                name, subject, text = describe(event)
                say(name, f"{subject} {text}".strip())

    run_until_stopped(work)
