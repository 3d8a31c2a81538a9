"""Connections to ports of machines at another server: buffers of a stalled one at each server, and the effect on others."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import anyio
import pytest

from siderolink.common.grpc import GrpcChannel, GRPCError, Limits, Status, open_channel
from siderolink.common.grpc.piped import PIPE_WINDOW_BYTES
from siderolink.server.admin import forwards as forwards_module
from siderolink.server.admin.forwards import ForwardCounters
from siderolink.server.peers import forwards as relays
from siderolink.server.store import Role
from tests.support.manager import FakeMachine
from tests.support.siblings import Registry, Sibling, open_sibling
from tests.unit.admin.test_forward import HELD, Carried, Ports, forwarded, read_exactly

pytestmark = pytest.mark.anyio


@dataclass
class Relay:
    """A machine of server a, and callers at server b."""

    a: Sibling
    b: Sibling
    ports: Ports
    machine_id: str
    channel: GrpcChannel

    def counters(self, server: Sibling) -> ForwardCounters:
        return server.admin_server.administration.forwards.counters().with_relayed(server.peers.forwards)

    def open_and_relayed(self) -> list[tuple[int, int]]:
        return [(one.open, one.relayed) for one in map(self.counters, (self.a, self.b))]

    def held(self) -> dict[str, int]:
        """Bytes that each server holds of all connections."""
        return {"owner": self.counters(self.a).held_bytes, "relay": self.counters(self.b).held_bytes}


@pytest.fixture
async def relay(tmp_path: Path) -> AsyncIterator[Relay]:
    registry, ports = Registry(), Ports.open()
    with ports.listener:
        async with (
            open_sibling(tmp_path, "a", registry, open_port=ports.connect) as a,
            open_sibling(tmp_path, "b", registry) as b,
        ):
            machine_id = await a.join(FakeMachine())
            await b.knows(machine_id)
            limits = Limits(stream_window_bytes=PIPE_WINDOW_BYTES)
            async with open_channel(path=str(b.admin_server.path), limits=limits) as channel:
                yield Relay(a, b, ports, machine_id, channel)


async def standing(relay: Relay, carried: Carried) -> dict[str, int]:
    """The held bytes once all three have not changed for half a second."""
    with anyio.fail_after(60):
        same, before = 0, (-1, relay.held())
        while same < 10:
            await anyio.sleep(0.05)
            now = (carried.pipe.from_connection + carried.pipe.held, relay.held())
            same, before = (same + 1 if now == before else 0), now
    return before[1]


async def echo(relay: Relay, port: int, size: int) -> None:
    """Both ways on a connection of its own."""
    loop, data = asyncio.get_running_loop(), bytes(range(256)) * (size // 256)
    async with forwarded(relay.channel, relay.machine_id, port) as other:
        with await relay.ports.accept() as far:
            for out, back in ((other.near, far), (far, other.near)):
                sending = asyncio.create_task(loop.sock_sendall(out, data))
                assert await read_exactly(back, size) == data
                await sending


async def test_a_stalled_forward_holds_little_memory_at_each_server_and_delays_no_other(relay: Relay) -> None:
    loop, data = asyncio.get_running_loop(), bytes(range(256)) * (64 << 10)
    async with forwarded(relay.channel, relay.machine_id) as stalled:
        with await relay.ports.accept() as far:
            pushing = [asyncio.create_task(loop.sock_sendall(end, data)) for end in (stalled.near, far)]
            for number in range(3):
                await echo(relay, 1000 + number, 1 << 20)
            held = await standing(relay, stalled)
            assert not any(one.done() for one in pushing)
            # both directions are full, at both servers and at the caller
            assert 3 * HELD // 4 < held["relay"] <= HELD, held
            assert HELD // 2 < held["owner"] <= HELD, held
            assert PIPE_WINDOW_BYTES // 2 < stalled.pipe.held <= HELD
            await echo(relay, 1003, 1 << 20)
            with anyio.fail_after(20):  # the others no longer count
                while relay.open_and_relayed() != [(1, 0), (0, 1)]:
                    await anyio.sleep(0.01)
            # reading continues where it stopped
            for end in (far, stalled.near):
                assert await read_exactly(end, len(data)) == data
            await asyncio.gather(*pushing)
            far.shutdown(socket.SHUT_WR)
            stalled.near.shutdown(socket.SHUT_WR)
            await asyncio.wait_for(stalled.done, 20)
    assert relay.held() == {"owner": 0, "relay": 0}


async def test_the_number_of_relayed_forwards_is_limited(relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relays, "MAX_FORWARDS", 1)
    async with forwarded(relay.channel, relay.machine_id):
        with await relay.ports.accept():
            async with forwarded(relay.channel, relay.machine_id) as refused:
                with pytest.raises(GRPCError, match="1 forwarded connections are relayed already") as caught:
                    await asyncio.wait_for(refused.done, 20)
                assert caught.value.status is Status.FAILED_PRECONDITION
    with anyio.fail_after(20):
        while relay.b.peers.forwards:
            await anyio.sleep(0.01)
    await echo(relay, 22, 1 << 16)


async def test_a_key_with_grants_at_several_servers_cannot_use_up_all_forwards(
    relay: Relay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (relays, forwards_module):
        monkeypatch.setattr(module, "MAX_FORWARDS_BY_GRANT", 2)
    async with AsyncExitStack() as stack:

        async def open_one(channel: GrpcChannel, machine: str, metadata: dict[str, str] | None = None) -> None:
            await stack.enter_async_context(forwarded(channel, machine, metadata=metadata))
            stack.enter_context(await relay.ports.accept())

        c = await stack.enter_async_context(open_sibling(tmp_path, "c", relay.a.registry, open_port=relay.ports.connect))
        other = await c.join(FakeMachine())
        await relay.b.knows(other)
        keys, grants = relay.b.admin_server.administration.api_keys, [relay.machine_id, other]
        ci, cd = [
            {"authorization": f"Bearer {(await keys.create(name, Role.VIEWER, forward=grants))[1]}"} for name in ("ci", "cd")
        ]
        channel = await stack.enter_async_context(relay.b.admin_server.remote())
        for machine in grants:
            await open_one(channel, machine, ci)
        # each owner has one grant and would open a second forward
        async with forwarded(channel, other, metadata=ci) as refused:
            with pytest.raises(GRPCError, match="2 forwarded connections of this API key are relayed already") as caught:
                await asyncio.wait_for(refused.done, 20)
            assert caught.value.status is Status.FAILED_PRECONDITION
        await open_one(channel, other, cd)
        for _ in range(3):
            await open_one(relay.channel, relay.machine_id)
        assert [relay.counters(one).open for one in (relay.a, c)] == [4, 2]
        assert relay.counters(relay.b).relayed == 6
    with anyio.fail_after(20):
        while relay.b.peers.forwards:
            await anyio.sleep(0.01)
