"""The local socket of a running `serve` or `join`, which `status` queries."""

import contextlib
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import anyio.lowlevel
from grpclib.const import Cardinality, Handler
from grpclib.server import Stream

from siderolink.common.errors import AddressInUseError, ConfigurationError, JoinError, SideroLinkError
from siderolink.common.grpc import GRPCError, Limits, Servable, Status, open_channel, serve, translate_errors
from siderolink.common.pb.siderolink.control import (
    ControlBase,
    ControlStub,
    Event,
    EventsRequest,
    Peer,
    StatusRequest,
    StatusResponse,
)
from siderolink.common.protobuf_wire import encode_in_parts
from siderolink.common.text import one_line
from siderolink.common.wireguard.device import DEFAULT_MTU, PeerStatus, check_interface

_ANSWER_TIMEOUT = 5.0
_DEAD_AFTER = 5.0
"""Seconds after which a socket that refuses connections is dead rather than about to listen."""
_ANSWER_BYTES = 64 * 1024 * 1024
"""Message limit: a status has some 200 bytes for each peer."""

CONTROL_LIMITS = Limits(max_connections=64)
"""For the socket of a single user."""

_STATUS = "/siderolink.control.Control/Status"
_PEERS_AT_ONCE = 50


class Source(Protocol):
    """The source of a status: a running server, or a machine's link."""

    def status(self) -> AsyncIterator[StatusResponse]:
        """The status, in parts that are merged. Yields to other tasks in between."""

    def events(self) -> AsyncIterator[Event]: ...


def data_plane(device_kind: str | None) -> str:
    """The name of the device's packet implementation; empty for the kernel's WireGuard."""
    if device_kind != "userspace":
        return ""
    from siderolink.common.wireguard.packets import row_functions_in_use

    return row_functions_in_use()


class ControlService(ControlBase):
    """Serves one source's socket. Returns UNAVAILABLE, with the reason, while its status is not available."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def __mapping__(self) -> dict[str, Handler]:
        mapping: dict[str, Handler] = super().__mapping__()
        return mapping | {_STATUS: Handler(self._serve_status, Cardinality.UNARY_UNARY, StatusRequest, StatusResponse)}

    async def _serve_status(self, stream: Stream[StatusRequest, bytes]) -> None:
        """Send the status in pieces, because encoding ten thousand peers takes a good part of a second."""
        await stream.recv_message()
        parts: list[bytes] = []
        try:
            async for answer in self._source.status():
                for part in encode_in_parts(answer, "peers", _PEERS_AT_ONCE):
                    parts.append(part)
                    await anyio.lowlevel.checkpoint()
        except SideroLinkError as error:
            raise GRPCError(Status.UNAVAILABLE, one_line(str(error))) from None
        await stream.send_message(b"".join(parts))

    async def events(self, message: EventsRequest) -> AsyncIterator[Event]:
        try:
            async for event in self._source.events():
                yield event
        except SideroLinkError as error:
            raise GRPCError(Status.UNAVAILABLE, one_line(str(error))) from None


_OF_THE_JOIN_UNIT = Path("/run/siderolink-join")
"""See packaging/siderolink-join.service: two services cannot share a RuntimeDirectory= of different users."""


def directory() -> Path:
    """The sockets' directory: /run/siderolink, unless the environment overrides it."""
    return Path(os.environ.get("SIDEROLINK_RUNTIME_DIR", "/run/siderolink"))


@asynccontextmanager
async def control_socket(
    interface: str, services: Sequence[Servable], *, group: int | None = None, limits: Limits = CONTROL_LIMITS
) -> AsyncIterator[Path]:
    """Serve on a socket named after the interface, accessible to this user and optionally to a group.

    Raises ConfigurationError, also for an invalid interface name.
    """
    check_interface(interface, DEFAULT_MTU)
    folder = directory()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"cannot create the control socket directory {folder}: {error.strerror}") from None
    if group is not None:
        with contextlib.suppress(OSError):  # the directory may belong to another user
            os.chown(folder, -1, group)
            folder.chmod(0o750)
    path = folder / f"{interface}.sock"
    async with AsyncExitStack() as stack:
        try:
            await stack.enter_async_context(serve(services, path=path, group=group, limits=limits))
        except AddressInUseError:
            # Another network namespace has an interface of the same name.
            path = folder / f"{interface}.{os.getpid()}.sock"
            await stack.enter_async_context(serve(services, path=path, group=group, limits=limits))
        yield path


@dataclass(slots=True)
class ControlAnswers:
    """The answers of this host's control sockets."""

    answers: list[StatusResponse] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    """One line per socket of a running process that did not answer."""
    notes: list[str] = field(default_factory=list)
    """One line per socket without a process; such sockets are removed."""


async def query_all() -> ControlAnswers:
    """Query all control sockets of this host. Raises ConfigurationError if the sockets cannot be listed."""
    result = ControlAnswers()
    for path in (path for folder in _all_directories() for path in _sockets(folder)):
        try:
            result.answers.append(await _request(path))
        except JoinError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                continue  # its process has just ended
            if isinstance(error.__cause__, ConnectionRefusedError) and path.is_socket():
                result.notes.append(_remove(path))
            else:
                result.failures.append(f"{path} does not answer: {error}")
        except GRPCError as error:
            result.failures.append(f"{path} does not answer: {error.status.name}: {one_line(error.message or '')}")
    return result


def _all_directories() -> list[Path]:
    if "SIDEROLINK_RUNTIME_DIR" in os.environ:
        return [directory()]
    return [directory(), _OF_THE_JOIN_UNIT]


def _sockets(folder: Path) -> list[Path]:
    """Raises ConfigurationError."""
    try:
        return sorted(path for path in folder.iterdir() if path.suffix == ".sock") if folder.exists() else []
    except OSError as error:
        raise ConfigurationError(
            f"cannot read {folder}: {error.strerror}; run this command as the user who runs siderolink"
        ) from None


def _remove(path: Path) -> str:
    """Remove a dead socket. Returns a line that reports it."""
    try:
        # a socket also refuses connections for a moment between bind and listen
        if time.time() - path.stat().st_mtime > _DEAD_AFTER:
            path.unlink()
            return f"{path} was left by a process that has ended, and was removed"
    except OSError as error:
        return f"{path} was left by a process that has ended, and cannot be removed: {error.strerror}"
    return f"{path} does not answer yet: its process is starting"


async def _request(path: Path) -> StatusResponse:
    with translate_errors():
        async with open_channel(path=str(path), limits=Limits.for_answers(_ANSWER_BYTES)) as channel:
            return await ControlStub(channel).status(StatusRequest(), timeout=_ANSWER_TIMEOUT)


def peer_message(
    peer: PeerStatus,
    node_uuid: str = "",
    report_drops: dict[str, int] | None = None,
    *,
    name: str = "",
    limits_biting: Sequence[str] = (),
) -> Peer:
    return Peer(
        public_key=str(peer.public_key),
        allowed_ips=[str(network) for network in peer.allowed_ips],
        path=peer.path or "",
        last_handshake=peer.last_handshake,
        last_received=peer.last_received,
        received_bytes=peer.received_bytes,
        sent_bytes=peer.sent_bytes,
        node_uuid=node_uuid,
        report_drops=report_drops or {},
        name=name,
        limits_biting=list(limits_biting),
    )
