"""Whole links with every pair of devices, over both transports."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

import siderolink
from siderolink.client import Link
from siderolink.common.wireguard.device import DeviceKind
from siderolink.server import HandshakeCompleted, MachineJoined, Server
from tests.support.topology import SERVER_V4, Net, direct

TOKEN = "the-join-token"
URL = f"grpc://{SERVER_V4}:4000?jointoken={TOKEN}"
PAIRS: tuple[tuple[DeviceKind, DeviceKind], ...] = (("kernel", "kernel"), ("kernel", "userspace"), ("userspace", "kernel"))
"""The server's device and the machine's; the fourth pair needs no such kernel, see tests/netns/test_link.py."""


async def events_of(server: Server, count: int) -> list[str]:
    found: list[str] = []
    async for event in server.events():
        found.append(type(event).__name__)
        if len(found) == count:
            break
    return found


@contextmanager
def linked(net: Net, server_device: DeviceKind, machine_device: DeviceKind, query: str) -> Iterator[tuple[Server, Link]]:
    server = Server(
        api_listen=f"{SERVER_V4}:4000", wireguard_endpoints=[f"{SERVER_V4}:51820"], join_token=TOKEN, device=server_device
    )
    with net.server.portal() as there, net.machine.portal() as here, there.wrap_async_context_manager(server):
        events = there.start_task_soon(events_of, server, 2)
        machine = siderolink.connect(URL + query, uuid=str(uuid.uuid4()), device=machine_device)
        with here.wrap_async_context_manager(machine) as link:
            assert events.result(10) == [MachineJoined.__name__, HandshakeCompleted.__name__]
            [status] = there.call(server.device.peers)
            assert status.path is not None
            assert status.path.startswith("tunnel [" if query else "192.0.2.2:")
            assert status.last_received is not None
            yield server, link


@pytest.mark.parametrize("query", ["", "&grpc_tunnel=true"], ids=["udp", "tunnel"])
@pytest.mark.parametrize(("server_device", "machine_device"), PAIRS)
def test_links_by_udp_and_tunnel_with_the_kernel_device(
    server_device: DeviceKind, machine_device: DeviceKind, query: str
) -> None:
    with direct() as net:
        with linked(net, server_device, machine_device, query) as (server, link):
            assert (server.device.kind, link.device.kind) == (server_device, machine_device)
            for size in ("1232", "4000"):
                for namespace, address in ((net.machine, link.server_address), (net.server, link.address)):
                    # all at once; with an interval, because ping waits that long for the last one, or two round trips
                    said = namespace.run(["ping", "-c3", "-l3", "-i5", f"-s{size}", str(address)])
                    assert "3 received" in said
        assert net.machine.interfaces() == net.server.interfaces() == {"lo", "eth0"}
        assert net.server.run(["nft", "list", "tables"]) == ""


def test_auto_selects_the_kernel_where_possible() -> None:
    with direct() as net, linked(net, "auto", "auto", "") as (server, link):
        assert (server.device.kind, link.device.kind) == ("kernel", "kernel")
        assert f"interface: {link.interface}" in net.machine.run(["wg", "show"])
        assert f"peer: {link.public_key}" in net.server.run(["wg", "show", server.device.name])
