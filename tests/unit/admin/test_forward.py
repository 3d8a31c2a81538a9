"""A machine's port through the admin API: permissions, transport of data, buffers of a stalled connection, and the audit."""

import asyncio
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from ipaddress import IPv6Address
from pathlib import Path

import anyio
import pytest

from siderolink.common.errors import ConfigurationError, ForbiddenError, NotFoundError
from siderolink.common.grpc import ByteStream, GrpcChannel, GRPCError, Limits, Status, open_byte_stream, open_channel
from siderolink.common.grpc.listeners import accept
from siderolink.common.grpc.piped import PIPE_WINDOW_BYTES, Inbox, Pipe, close_with_reset
from siderolink.common.pb.siderolink.admin import v1 as pb
from siderolink.server.admin import forwards as forwards_module
from siderolink.server.admin.forwards import RECEIVE_BUFFER_BYTES, UNSENT_BYTES, open_machine_port
from siderolink.server.admin.services.forward import FORWARD
from siderolink.server.store import Actor, AuditEntry, AuditQuery, Machine, Role
from tests.support.admin_server import AdminServer, open_admin_server
from tests.support.manager import FakeMachine

pytestmark = pytest.mark.anyio

HELD = 256 * 1024
"""What one forwarded connection may hold."""


@dataclass
class Ports:
    """Stands in for the overlay: the machines' ports are listeners on this host."""

    listener: socket.socket
    address: tuple[str, int]
    wanted: list[tuple[str, int]] = field(default_factory=list)

    @classmethod
    def open(cls) -> "Ports":
        listener = socket.create_server(("127.0.0.1", 0))
        listener.setblocking(False)
        return cls(listener, listener.getsockname())

    async def connect(self, machine: Machine, port: int) -> socket.socket:
        self.wanted.append((str(machine.overlay_address), port))
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            await asyncio.get_running_loop().sock_connect(sock, self.address)
        except OSError:
            sock.close()
            raise
        return sock

    async def accept(self) -> socket.socket:
        with anyio.fail_after(20):
            return (await accept(self.listener))[0]


@dataclass
class Desk:
    admin_server: AdminServer
    ports: Ports
    machine: Machine


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    ports = Ports.open()
    with ports.listener:
        async with open_admin_server(tmp_path, open_port=ports.connect) as admin_server:
            machine = FakeMachine()
            await admin_server.manager.join(machine)
            yield Desk(admin_server, ports, await admin_server.manager.row(machine))


@dataclass
class Carried:
    """One connection of a caller: `near` is the program's end of it."""

    near: socket.socket
    pipe: Pipe
    stream: ByteStream
    done: "asyncio.Task[None]"


@asynccontextmanager
async def forwarded(
    channel: GrpcChannel, machine: str, port: int = 50000, metadata: Mapping[str, str] | None = None
) -> AsyncIterator[Carried]:
    """Does what `siderolink forward` does for each connection."""
    near, far = socket.socketpair()
    near.setblocking(False)
    far.setblocking(False)
    with near, far:
        async with open_byte_stream(channel, FORWARD, metadata) as stream:
            pipe = Pipe(stream, Inbox(stream), far)

            async def run() -> None:
                await pipe.send(bytes(pb.ForwardRequest(machine=machine, port=port)))
                await pipe.run()
                stream.end()
                await stream.wait_ended()

            task = asyncio.create_task(run())
            try:
                yield Carried(near, pipe, stream, task)
            finally:
                task.cancel()
                await asyncio.wait([task])


@asynccontextmanager
async def local(desk: Desk) -> AsyncIterator[GrpcChannel]:
    limits = Limits(stream_window_bytes=PIPE_WINDOW_BYTES)
    async with open_channel(path=str(desk.admin_server.path), limits=limits) as channel:
        yield channel


async def read_exactly(sock: socket.socket, size: int) -> bytes:
    data = bytearray()
    with anyio.fail_after(30):
        while len(data) < size:
            data += await asyncio.get_running_loop().sock_recv(sock, min(1 << 16, size - len(data)))
    return bytes(data)


async def standing(carried: Carried) -> None:
    """Wait until no more bytes are accepted from the connection."""
    with anyio.fail_after(30):
        taken = -1
        while taken != (taken := carried.pipe.from_connection) or carried.stream.room:
            await anyio.sleep(0.1)


async def entries(desk: Desk, count: int) -> list[AuditEntry]:
    """The audit entries of forwards, oldest first, once there are this many."""
    with anyio.fail_after(20):
        while True:
            page = await desk.admin_server.administration.audit.page(AuditQuery(action="forward."))
            if len(page.items) >= count:
                return list(reversed(page.items))
            await anyio.sleep(0.01)


async def test_bytes_and_half_closes_pass_both_ways_and_start_and_end_are_audited(desk: Desk) -> None:
    loop = asyncio.get_running_loop()
    async with local(desk) as channel, forwarded(channel, desk.machine.node_uuid) as carried:
        far = await desk.ports.accept()
        with far:
            await loop.sock_sendall(carried.near, b"question")
            carried.near.shutdown(socket.SHUT_WR)
            assert await read_exactly(far, 8) == b"question"
            assert await loop.sock_recv(far, 10) == b"", "the caller's half is closed"
            answer = bytes(range(256)) * 4096
            await loop.sock_sendall(far, answer[:9])
            sending = asyncio.create_task(loop.sock_sendall(far, answer[9:]))
            assert await read_exactly(carried.near, len(answer)) == answer
            await sending
            far.shutdown(socket.SHUT_WR)
            assert await loop.sock_recv(carried.near, 10) == b""
            await asyncio.wait_for(carried.done, 20)
    opened, closed = await entries(desk, 2)
    assert (opened.action, opened.object_id, opened.after) == ("forward.open", desk.machine.id, {"port": 50000})
    assert opened.actor.source.startswith("uid ")
    assert closed.action == "forward.close"
    told = dict(closed.after)
    assert float(str(told.pop("seconds"))) >= 0
    assert told == {"port": 50000, "to_machine_bytes": 8, "from_machine_bytes": 1 << 20, "outcome": "closed"}
    assert desk.ports.wanted == [(str(desk.machine.overlay_address), 50000)]
    counters = desk.admin_server.administration.forwards.counters()
    assert (counters.open, counters.opened, counters.held_bytes) == (0, 1, 0)
    assert (counters.to_machines, counters.from_machines) == (8, 1 << 20)


async def test_a_machines_reset_reaches_the_caller(desk: Desk) -> None:
    async with local(desk) as channel, forwarded(channel, desk.machine.id) as carried:
        far = await desk.ports.accept()
        close_with_reset(far)
        with pytest.raises(GRPCError) as caught:
            await asyncio.wait_for(carried.done, 20)
        assert caught.value.status is Status.ABORTED
    assert (await entries(desk, 2))[1].after["outcome"] == "reset by the machine"


async def test_a_callers_reset_reaches_the_machine(desk: Desk) -> None:
    loop = asyncio.get_running_loop()
    async with local(desk) as channel:
        async with forwarded(channel, desk.machine.id) as carried:
            far = await desk.ports.accept()
            await loop.sock_sendall(carried.near, b"x")
            assert await read_exactly(far, 1) == b"x"
        with far, pytest.raises(ConnectionResetError):
            await asyncio.wait_for(loop.sock_recv(far, 1), 20)
    assert (await entries(desk, 2))[1].after["to_machine_bytes"] == 1


async def test_a_stalled_connection_holds_little_and_delays_no_other(desk: Desk) -> None:
    loop = asyncio.get_running_loop()
    async with local(desk) as channel, forwarded(channel, desk.machine.id) as stalled:
        far = await desk.ports.accept()
        pushing = asyncio.create_task(loop.sock_sendall(stalled.near, bytes(64 << 20)))
        forwards = desk.admin_server.administration.forwards
        for number in range(8):  # other forwards on the same connection are not affected
            async with forwarded(channel, desk.machine.id, 1000 + number) as other:
                end = await desk.ports.accept()
                with end:
                    sending = asyncio.create_task(loop.sock_sendall(other.near, bytes(1 << 20)))
                    left = 1 << 20
                    while left:
                        left -= len(await asyncio.wait_for(loop.sock_recv(end, 1 << 16), 20))
                    await sending
        await standing(stalled)
        assert 0 < forwards.counters().held_bytes <= HELD, "what the server holds of it"
        assert stalled.pipe.held <= HELD, "what the caller's end holds of it"
        assert not pushing.done()
        # it continues when it is read again
        assert await read_exactly(far, 8 << 20) == bytes(8 << 20)
        pushing.cancel()
        far.close()


async def test_a_caller_that_reads_nothing_stalls_only_its_own_connection(desk: Desk) -> None:
    loop = asyncio.get_running_loop()
    async with local(desk) as channel, forwarded(channel, desk.machine.id) as stalled:
        far = await desk.ports.accept()
        pushing = asyncio.create_task(loop.sock_sendall(far, bytes(64 << 20)))
        async with forwarded(channel, desk.machine.id, 22) as other:
            end = await desk.ports.accept()
            with end:
                sending = asyncio.create_task(loop.sock_sendall(end, bytes(2 << 20)))
                assert await read_exactly(other.near, 2 << 20) == bytes(2 << 20)
                await sending
        assert desk.admin_server.administration.forwards.counters().held_bytes <= HELD
        with anyio.fail_after(20):
            while stalled.pipe.held < PIPE_WINDOW_BYTES - (32 << 10):
                await anyio.sleep(0.01)
        assert stalled.pipe.held <= HELD
        pushing.cancel()
        far.close()


async def test_only_admins_and_keys_with_a_grant_forward(desk: Desk) -> None:
    keys = desk.admin_server.administration.api_keys
    forwards = desk.admin_server.administration.forwards
    for role in (Role.VIEWER, Role.OPERATOR):
        with pytest.raises(ForbiddenError, match="role admin"):
            await forwards.check(desk.machine.id, 50000, actor=Actor(name="x", role=role))
    with pytest.raises(NotFoundError):
        await forwards.check("nobody", 50000)
    with pytest.raises(ConfigurationError, match="65535"):
        await forwards.check(desk.machine.id, 65536)
    _, secret = await keys.create("looks", Role.OPERATOR)
    metadata = {"authorization": f"Bearer {secret}"}
    async with desk.admin_server.remote() as channel, forwarded(channel, desk.machine.id, metadata=metadata) as carried:
        with pytest.raises(GRPCError) as caught:
            await asyncio.wait_for(carried.done, 20)
        assert caught.value.status is Status.PERMISSION_DENIED
    assert desk.ports.wanted == []
    assert forwards.counters().refusals == {"not granted": 3, "no machine": 1}
    refused = (await entries(desk, 3))[-1]
    assert (refused.action, refused.actor.name, refused.object_name) == ("forward.refuse", "looks", desk.machine.id)


async def test_a_key_with_a_grant_reaches_that_machine_and_port_alone(desk: Desk) -> None:
    other = FakeMachine()
    await desk.admin_server.manager.join(other)
    async with local(desk) as channel:
        stub = pb.ApiKeyServiceStub(channel)
        named = pb.CreateApiKeyRequest(name="ci", role="viewer", forward=[f"{desk.machine.node_uuid}:50000"])
        made = await stub.create_api_key(named)
        assert made.key is not None
        assert made.key.forward == [f"{desk.machine.node_uuid}:50000"]
        assert (await stub.list_api_keys(pb.ListApiKeysRequest())).keys[0].forward == made.key.forward
        for wrong, status in (("nobody:1", Status.NOT_FOUND), (f"{desk.machine.id}:0", Status.INVALID_ARGUMENT)):
            with pytest.raises(GRPCError) as caught:
                await stub.create_api_key(pb.CreateApiKeyRequest(name="x", role="viewer", forward=[wrong]))
            assert caught.value.status is status
        every = await stub.create_api_key(pb.CreateApiKeyRequest(name="all", role="operator", forward=[desk.machine.id]))
    metadata = {"authorization": f"Bearer {made.secret}"}
    async with desk.admin_server.remote() as channel:
        forwards = pb.ForwardServiceStub(channel)
        # the grant does not apply to another machine that gets the name later
        await desk.admin_server.administration.machines.rename(desk.machine.id, "edge")
        target = await forwards.check_forward(pb.ForwardRequest(machine="edge", port=50000), metadata=metadata)
        assert (target.machine_id, target.name) == (desk.machine.id, "edge")
        await desk.admin_server.administration.machines.rename(desk.machine.id, "")
        await desk.admin_server.administration.machines.rename(other.node_uuid, "edge")
        for machine, port in (("edge", 50000), (desk.machine.id, 22), ("nobody", 50000)):
            with pytest.raises(GRPCError) as caught:
                await forwards.check_forward(pb.ForwardRequest(machine=machine, port=port), metadata=metadata)
            assert caught.value.status in (Status.PERMISSION_DENIED, Status.NOT_FOUND)
        wide = {"authorization": f"Bearer {every.secret}"}
        await forwards.check_forward(pb.ForwardRequest(machine=desk.machine.id, port=22), metadata=wide)
        async with forwarded(channel, desk.machine.id, metadata=metadata) as carried:
            with await desk.ports.accept() as far:
                await asyncio.get_running_loop().sock_sendall(carried.near, b"x")
                assert await read_exactly(far, 1) == b"x"
    assert (await entries(desk, 2))[-1].actor.name == "ci"


async def test_a_key_with_a_grant_cannot_use_up_all_forwards(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forwards_module, "MAX_FORWARDS_BY_GRANT", 2)
    secret = (await desk.admin_server.administration.api_keys.create("ci", Role.VIEWER, forward=[desk.machine.id]))[1]
    metadata = {"authorization": f"Bearer {secret}"}
    async with desk.admin_server.remote() as channel, local(desk) as admin, AsyncExitStack() as stack:
        for _ in range(2):
            await stack.enter_async_context(forwarded(channel, desk.machine.id, metadata=metadata))
            stack.enter_context(await desk.ports.accept())
        async with forwarded(channel, desk.machine.id, metadata=metadata) as carried:
            with pytest.raises(GRPCError, match="2 forwarded connections of this API key") as caught:
                await asyncio.wait_for(carried.done, 20)
            assert caught.value.status is Status.FAILED_PRECONDITION
        for _ in range(3):
            await stack.enter_async_context(forwarded(admin, desk.machine.id))
            stack.enter_context(await desk.ports.accept())
    assert desk.admin_server.administration.forwards.counters().refusals == {"too many": 1}


async def test_socket_buffers_are_small_and_the_servers_own_address_is_refused(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def dial(*_: object, **__: object) -> socket.socket:
        return await desk.ports.connect(desk.machine, 1)

    monkeypatch.setattr(forwards_module, "dial_overlay", dial)
    server = IPv6Address("fdae:41e4:649b:9303::1")
    with await open_machine_port(desk.machine, 1, source=server, interface="lo") as sock:
        # the kernel doubles the value and then stops growing the buffer
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 2 * RECEIVE_BUFFER_BYTES
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT) == UNSENT_BYTES
    desk.ports.wanted.clear()
    with pytest.raises(ForbiddenError, match="own address"):
        await open_machine_port(replace(desk.machine, overlay_address=server), 1, source=server, interface="lo")
    assert desk.ports.wanted == []


async def test_a_connection_ends_with_its_key_and_with_its_machine(desk: Desk) -> None:
    keys = desk.admin_server.administration.api_keys
    _, secret = await keys.create("admin", Role.ADMIN)
    metadata = {"authorization": f"Bearer {secret}"}
    async with desk.admin_server.remote() as channel, forwarded(channel, desk.machine.id, metadata=metadata) as carried:
        with await desk.ports.accept() as far:
            await keys.revoke("admin")
            with pytest.raises(GRPCError) as caught:
                await asyncio.wait_for(carried.done, 20)
            assert caught.value.status is Status.UNAUTHENTICATED
            with pytest.raises(ConnectionResetError):
                await asyncio.wait_for(asyncio.get_running_loop().sock_recv(far, 1), 20)
    async with local(desk) as channel, forwarded(channel, desk.machine.id) as carried:
        with await desk.ports.accept():
            await desk.admin_server.administration.machines.remove(desk.machine.id)
            with pytest.raises(GRPCError) as caught:
                await asyncio.wait_for(carried.done, 20)
            assert "removed or denied" in (caught.value.message or "")


async def test_a_closed_port_is_reported(desk: Desk) -> None:
    desk.ports.listener.close()
    async with local(desk) as channel, forwarded(channel, desk.machine.id, 22) as carried:
        with pytest.raises(GRPCError, match="nothing listens at port 22") as caught:
            await asyncio.wait_for(carried.done, 20)
        assert caught.value.status is Status.FAILED_PRECONDITION
    closed = (await entries(desk, 2))[1]
    assert closed.after["outcome"] == f"nothing listens at port 22 of {desk.machine.shown_name}"
    assert desk.admin_server.administration.forwards.counters().refusals == {"port closed": 1}


@pytest.mark.parametrize(
    ("first", "status"),
    [
        (b"", Status.NOT_FOUND),
        (bytes(pb.ForwardRequest(machine="x", port=1, data=b"x")), Status.INVALID_ARGUMENT),
        (bytes(pb.ForwardRequest(machine="x", port=1, end=True)), Status.INVALID_ARGUMENT),
        (bytes(pb.ForwardRequest(machine="x", port=70000)), Status.INVALID_ARGUMENT),
        (b"\xff", Status.INVALID_ARGUMENT),
        (b"\x22\x05abc", Status.INVALID_ARGUMENT),
        (b"\x20\x05", Status.INVALID_ARGUMENT),
        (bytes(1 << 17), Status.INVALID_ARGUMENT),
    ],
)
async def test_a_first_request_that_names_no_port_is_refused(desk: Desk, first: bytes, status: Status) -> None:
    if not first:
        first = bytes(pb.ForwardRequest(machine="x", port=1))
    async with local(desk) as channel, open_byte_stream(channel, FORWARD) as stream:
        stream.receive(lambda pieces: None)
        stream.send(memoryview(bytes(1) + len(first).to_bytes(4) + first[:1000]))
        with pytest.raises(GRPCError) as caught:
            await asyncio.wait_for(stream.wait_ended(), 20)
        assert caught.value.status is status
    assert desk.ports.wanted == []


async def test_more_than_the_window_is_refused(desk: Desk) -> None:
    """A peer that exceeds its credit, and a malformed message."""
    for message in (b"\x08\x01", b"\x12\x01x", b"\x0a\x7f"):
        async with local(desk) as channel, forwarded(channel, desk.machine.id) as carried:
            with await desk.ports.accept():
                await carried.pipe.send(message)
                with pytest.raises(GRPCError) as caught:
                    await asyncio.wait_for(carried.done, 20)
                assert caught.value.status is Status.INVALID_ARGUMENT
