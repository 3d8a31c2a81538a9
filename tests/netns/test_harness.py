"""The network topologies that the other tests use."""

import socket
import subprocess
import threading

import anyio
import pytest
from pyroute2 import netns

from tests.support.netns import Namespace, run_beside
from tests.support.topology import SERVER_V4, SERVER_V6, direct, routed


def receiver(host: str) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.settimeout(2)
    sock.bind((host, 4000))
    return sock


def sender() -> socket.socket:
    return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)


def test_nothing_is_left_behind_after_an_error() -> None:
    threads = threading.active_count()
    with pytest.raises(RuntimeError), Namespace("x") as namespace:
        process = namespace.popen(["sleep", "60"])
        raise RuntimeError
    assert namespace.name not in netns.listnetns()
    assert process.poll() is not None
    assert threading.active_count() == threads


def test_two_namespaces_reach_each_other() -> None:
    with direct() as net:
        net.machine.run(["ping", "-c1", "-W20", SERVER_V4])
        net.machine.run(["ping", "-c1", "-W20", SERVER_V6])
        assert net.machine.interfaces() == {"lo", "eth0"}
        assert {"192.0.2.2/24", "2001:db8::2/64"} <= net.machine.addresses("eth0")
        net.server.set_link("eth0", up=False)
        with pytest.raises(AssertionError):
            net.machine.run(["ping", "-c1", "-W1", SERVER_V4])


def test_blocked_udp_leaves_tcp_alone() -> None:
    with direct() as net:
        net.machine.drop_udp()
        with net.server.call(receiver, SERVER_V4) as udp, net.machine.call(sender) as client:
            with pytest.raises(PermissionError):
                client.sendto(b"x", (SERVER_V4, 4000))
            net.machine.allow_udp()
            client.sendto(b"y", (SERVER_V4, 4000))
            assert udp.recv(9) == b"y"


def test_a_router_with_nat_hides_the_machines_and_can_rebind() -> None:
    with routed(2, nat=True) as net:
        assert net.router is not None
        with net.server.call(receiver, SERVER_V4) as udp, net.machines[1].call(sender) as client:
            client.sendto(b"x", (SERVER_V4, 4000))
            _, (host, port) = udp.recvfrom(9)
            assert host == "192.0.2.254"
            client.sendto(b"x", (SERVER_V4, 4000))
            assert udp.recvfrom(9)[1] == (host, port)
            net.router.forget_connections()
            client.sendto(b"x", (SERVER_V4, 4000))
            assert udp.recvfrom(9)[1] != (host, port)


def test_a_namespace_runs_an_event_loop() -> None:
    async def listen() -> str:
        async with await anyio.create_tcp_listener(local_host=SERVER_V4, local_port=0) as listener:
            return str(listener.extra(anyio.abc.SocketAttribute.local_address)[0])

    with direct() as net:
        with net.server.portal() as portal:
            assert portal.call(listen) == SERVER_V4
        with net.machine.portal() as portal, pytest.raises(OSError, match="assign requested address"):
            portal.call(listen)


def test_each_program_may_have_a_uapi_folder_of_its_own() -> None:
    with Namespace("a") as namespace:
        script = "touch /var/run/wireguard/seen && echo ready && sleep 60"
        process = namespace.popen(["sh", "-c", script], own_uapi_folder=True, stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert run_beside(process, ["ls", "/var/run/wireguard"]) == "seen\n"
        assert "seen" not in namespace.run(["sh", "-c", "ls /var/run/wireguard || true"])
