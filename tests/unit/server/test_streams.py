"""Tunnel streams that claim a virtual address: takeover only by proof, bounds on those that prove nothing."""

from dataclasses import dataclass, field, replace

import anyio
import pytest

from siderolink.common.grpc import GRPCError, open_byte_stream, open_channel, serve
from siderolink.common.pb.sidero.link import ProvisionResponse
from siderolink.common.transport.tunnel import ADDRESS_METADATA
from siderolink.server import MachineLimits, StreamRefusal
from siderolink.server.api.tunnel import TunnelService
from siderolink.server.fleet.directory import Stream
from tests.support.fake_device import FakePath
from tests.support.manager import FakeMachine, Manager, new_key

pytestmark = pytest.mark.anyio


@dataclass
class Claim:
    """One stream as the tunnel service would hold it."""

    path: FakePath
    ended: list[StreamRefusal] = field(default_factory=list)
    stream: Stream | None = None

    def end(self, refusal: StreamRefusal) -> None:
        self.ended.append(refusal)
        self.path.is_open = False


def claim(manager: Manager, answer: ProvisionResponse, machine: FakeMachine) -> Claim:
    new = Claim(FakePath(machine.key))
    new.stream = manager.monitor.open_stream(manager.link(answer), new.path, new.end)
    return new


async def test_a_second_stream_takes_over_only_after_an_authenticated_packet() -> None:
    manager, machine = Manager(), FakeMachine(tunnel=True)
    answer = await manager.join(machine)
    first = claim(manager, answer, machine)
    manager.device.hear(machine.key, first.path, handshake=True)
    second = claim(manager, answer, machine)
    await manager.pass_time(50)
    assert (first.ended, second.ended) == ([], [])
    manager.device.hear(machine.key, second.path)
    assert (first.ended, second.ended) == ([StreamRefusal.REPLACED], [])
    await manager.pass_time(90)
    assert second.ended == []


async def test_a_stream_that_proves_nothing_is_ended_and_the_living_one_stays() -> None:
    manager, machine = Manager(), FakeMachine(tunnel=True)
    answer = await manager.join(machine)
    living = claim(manager, answer, machine)
    manager.device.hear(machine.key, living.path, handshake=True)
    squatter = claim(manager, answer, machine)
    assert manager.monitor.next_check_at == 90
    await manager.pass_time(80)
    manager.device.hear(machine.key)
    await manager.pass_time(10)
    assert squatter.ended == [StreamRefusal.NEVER_AUTHENTICATED]
    assert living.ended == []


async def test_a_reopened_stream_that_goes_on_with_its_session_is_proven_without_a_handshake() -> None:
    manager, machine = Manager(), FakeMachine(tunnel=True)
    answer = await manager.join(machine)
    cut = claim(manager, answer, machine)
    manager.device.hear(machine.key, cut.path, handshake=True)
    cut.path.is_open = False
    assert cut.stream is not None
    manager.monitor.close_stream(cut.stream)
    await manager.pass_time(10)
    again = claim(manager, answer, machine)
    await manager.pass_time(5)
    manager.device.hear(machine.key)
    await manager.pass_time(90)
    assert again.ended == []
    silent = claim(manager, answer, machine)
    await manager.pass_time(90)
    assert silent.ended == [StreamRefusal.NEVER_AUTHENTICATED]


async def test_the_oldest_of_too_many_unproven_streams_gives_way() -> None:
    manager, machine = Manager(limits=MachineLimits(max_unproven_streams=2)), FakeMachine(tunnel=True)
    answer = await manager.join(machine)
    living = claim(manager, answer, machine)
    manager.device.hear(machine.key, living.path, handshake=True)
    claims = [claim(manager, answer, machine) for _ in range(5)]
    assert [bool(each.ended) for each in claims] == [True, True, True, False, False]
    assert claims[0].ended == [StreamRefusal.CROWDED_OUT]
    assert living.ended == []


@pytest.mark.parametrize("how", ["removed", "banned", "never linked", "down", "new key", "new address", "key given away"])
async def test_a_stream_ends_with_its_machine_or_virtual_address(how: str) -> None:
    manager, machine = Manager(), FakeMachine(tunnel=True, unique_token="u")
    answer = await manager.join(machine)
    row = await manager.row(machine)
    await manager.pass_time(590)
    stream = claim(manager, answer, machine)
    if how != "never linked":
        manager.device.hear(machine.key, stream.path, handshake=True)
        await manager.monitor.check()
    expected = StreamRefusal.REPLACED
    match how:
        case "removed":
            await manager.machines.remove(row.id)
            expected = StreamRefusal.MACHINE_GONE
        case "banned":
            await manager.bans.add(machine.node_uuid)
            expected = StreamRefusal.MACHINE_GONE
        case "never linked":
            await manager.pass_time(10)
            expected = StreamRefusal.MACHINE_GONE
        case "down":
            await manager.pass_time(275)
            expected = StreamRefusal.LINK_DOWN
        case "new key":
            reborn = replace(machine, key=new_key())
            await manager.join(reborn)
            assert not stream.ended
            await manager.handshake(reborn)
        case "new address":
            await manager.pass_time(180)
            await manager.join(machine)
        case "key given away":
            await manager.join(FakeMachine(key=machine.key, unique_token="u"))
            expected = StreamRefusal.MACHINE_GONE
    assert stream.ended == [expected]
    link = manager.links.get(row.id)
    assert link is None or not link.streams


async def test_a_machine_that_changes_to_udp_ends_its_stream() -> None:
    manager, machine = Manager(), FakeMachine(tunnel=True)
    answer = await manager.join(machine)
    stream = claim(manager, answer, machine)
    manager.device.hear(machine.key, stream.path, handshake=True)
    manager.device.hear(machine.key, FakePath())
    assert stream.ended == [StreamRefusal.REPLACED]


async def test_a_stranger_does_not_crowd_out_the_machine() -> None:
    """A stranger who knows the virtual address keeps opening streams: its own are ended, and the machine's stays."""
    manager, machine = Manager(), FakeMachine(tunnel=True)
    link = manager.link(await manager.join(machine))
    ended = {"thief": 0, "machine": 0}

    def open_one(who: str, source: str) -> FakePath:
        def end(refusal: StreamRefusal) -> None:
            ended[who] += 1

        path = FakePath(machine.key)
        manager.monitor.open_stream(link, path, end, source)
        return path

    for number in range(4):
        open_one("thief", f"2001:db8::{number}")
    path = open_one("machine", "192.0.2.7")
    for number in range(20):
        open_one("thief", f"2001:db8::1:{number}")
    assert ended == {"thief": 21, "machine": 0}
    manager.device.hear(machine.key, path, handshake=True)
    assert link.path is path


async def test_a_server_that_drains_refuses_a_second_stream_while_the_first_carries_packets() -> None:
    manager, machine = Manager(), FakeMachine(tunnel=True)
    answer = await manager.join(machine)
    living = claim(manager, answer, machine)
    manager.device.hear(machine.key, living.path, handshake=True)
    leaving = [False, True]
    service = TunnelService(manager.links, manager.reconciler, manager.monitor, manager.device, leaving.pop)
    metadata = {ADDRESS_METADATA: answer.grpc_peer_addr_port}

    async with serve([service.service()], host="127.0.0.1") as server, open_channel("127.0.0.1", server.port, None) as channel:

        async def opened() -> int:
            """Open streams of the machine while another one is."""
            async with open_byte_stream(channel, metadata=metadata) as stream:
                with anyio.fail_after(10):
                    while not (service.refusals or len(manager.link(answer).streams) > 1):
                        await anyio.sleep(0.01)
                if service.refusals:
                    with pytest.raises(GRPCError, match="is draining"):
                        await stream.wait_ended()
                return len(manager.link(answer).streams)

        assert await opened() == 1
        assert service.refusals == {StreamRefusal.DRAINING: 1}
        service.refusals.clear()
        assert await opened() == 2  # the drain is cancelled
        leaving.append(True)
        manager.time.advance(10)  # silent for so long that its stream may be dead
        with anyio.fail_after(10):
            while len(manager.link(answer).streams) > 1:
                await anyio.sleep(0.01)
        assert await opened() == 2
    assert living.ended == []
