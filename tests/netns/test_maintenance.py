"""The machine's API in namespaces: where it listens, the admin role, and attempts to obtain it."""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import anyio
import grpc
import pytest
from anyio.from_thread import BlockingPortal

from siderolink import JoinURL, Server
from siderolink.client.maintenance import Everywhere, Nowhere, OnOverlay
from siderolink.common.pb.cosi import resource as cosi
from siderolink.common.pb.machine import (
    ApplyConfigurationRequest,
    ApplyConfigurationRequestMode,
    ApplyConfigurationResponse,
    MetaDeleteRequest,
    MetaDeleteResponse,
    MetaWriteRequest,
    MetaWriteResponse,
    RebootRequest,
    RebootResponse,
    ResetRequest,
    ResetResponse,
)
from tests.conftest import descriptor_kinds, opened_since
from tests.support.agent import Agent, agent
from tests.support.machine_api import MACHINE, STATE, MachineClient, machine_client, status_of
from tests.support.netns import Namespace, link
from tests.support.topology import SERVER_V4, Net, direct

PORT = 50000
MACHINE_V4 = "192.0.2.2"
TOKEN = "the-join-token"
URL = f"grpc://{SERVER_V4}:4000?jointoken={TOKEN}"
DENIED = ("PERMISSION_DENIED", "not authorized")
READABLE = ("links", "addresses", "hostname", "systeminformation", "siderolinkstatus")
SENSITIVE = ("linkspec", "siderolinkconfig", "siderolinktunnel", "machineconfig")
CHANGING: tuple[tuple[str, object, type], ...] = (
    ("Reboot", RebootRequest(), RebootResponse),
    ("Reset", ResetRequest(graceful=True, reboot=True), ResetResponse),
    ("MetaWrite", MetaWriteRequest(key=16, value=b"a token"), MetaWriteResponse),
    ("MetaDelete", MetaDeleteRequest(key=16), MetaDeleteResponse),
)


@dataclass
class Scene:
    """A server, and a machine with an API."""

    net: Net
    server_portal: BlockingPortal
    portal: BlockingPortal
    machine: Agent

    def client(self, host: str, work: "Callable[[MachineClient], object]") -> object:
        """Do something with a client that runs on the server's host."""
        return in_namespace(self.net.server, host, work)

    def wait_overlay(self) -> OnOverlay:
        """Wait until the API listens on the overlay address."""
        self.portal.call(self._on_overlay)
        place = self.machine.api.place
        assert isinstance(place, OnOverlay)
        return place

    async def _on_overlay(self) -> None:
        with anyio.fail_after(30):
            while not isinstance(self.machine.api.place, OnOverlay):
                await anyio.sleep(0.01)
            await self.machine.api.wait_listening()


def in_namespace(namespace: Namespace, host: str, work: "Callable[[MachineClient], object]") -> object:
    def call() -> object:
        with machine_client(host, PORT) as client:
            return work(client)

    return namespace.call(call)


@contextmanager
def scene(url: str | None = None, *, serve: bool = True) -> Iterator[Scene]:
    with direct() as net, net.server.portal() as server_portal, net.machine.portal() as portal:
        endpoints = [f"{SERVER_V4}:51820"]
        server = Server(api_listen="0.0.0.0:4000", wireguard_endpoints=endpoints, join_token=TOKEN, device="userspace")
        configured = None if url is None else JoinURL.parse(url)
        if not serve:
            with portal.wrap_async_context_manager(agent(configured)) as machine:
                yield Scene(net, server_portal, portal, machine)
            return
        with (
            server_portal.wrap_async_context_manager(server),
            portal.wrap_async_context_manager(agent(configured)) as machine,
        ):
            yield Scene(net, server_portal, portal, machine)


def version_tag(client: MachineClient) -> str:
    [message] = client.version().messages
    assert message.version is not None
    return message.version.tag


def refusal(work: "Callable[[], object]") -> tuple[str, str]:
    with pytest.raises(grpc.RpcError) as caught:
        work()
    return status_of(caught.value)


def connect_to(host: str) -> None:
    socket.create_connection((host, PORT), timeout=3).close()


def test_a_configuration_by_the_api_moves_the_api_to_the_overlay() -> None:
    documents = f"apiVersion: v1alpha1\nkind: SideroLinkConfig\napiUrl: {URL}\n".encode()

    def apply(client: MachineClient, *, dry_run: bool = False) -> ApplyConfigurationResponse:
        request = ApplyConfigurationRequest(data=documents, mode=ApplyConfigurationRequestMode.AUTO, dry_run=dry_run)
        return client.call(f"{MACHINE}ApplyConfiguration", request, ApplyConfigurationResponse)

    with scene() as found:
        assert found.machine.api.place == Everywhere()
        for host in (MACHINE_V4, "2001:db8::2"):
            assert found.client(host, version_tag)
        found.client(MACHINE_V4, partial(apply, dry_run=True))
        assert found.machine.api.place == Everywhere()
        answer = found.client(MACHINE_V4, apply)
        assert isinstance(answer, ApplyConfigurationResponse)
        assert (answer.messages[0].warnings, answer.messages[0].mode_details) == (["a warning"], "applied")
        place = found.wait_overlay()
        for host in (MACHINE_V4, "2001:db8::2"):
            with pytest.raises(ConnectionRefusedError):
                found.net.server.call(connect_to, host)
        assert found.client(str(place.address), version_tag)


@pytest.mark.parametrize("url", [URL, f"{URL}&grpc_tunnel=true"])
def test_the_server_is_admin_over_the_overlay(url: str) -> None:
    def look(client: MachineClient) -> None:
        for alias in READABLE:
            assert client.get_all(alias), alias
        [status] = client.get_all("siderolinkstatus")
        assert status.metadata is not None
        assert status.metadata.id == "siderolink-status"
        [config] = client.get_all("siderolinkconfig")
        assert config.spec is not None
        assert TOKEN in config.spec.yaml_spec
        [spec] = client.get_all("linkspec")
        assert spec.metadata is not None
        assert spec.metadata.id == ("siderolinktun" if "tunnel" in url else "siderolink")
        assert len(client.get_all("siderolinktunnel")) == ("tunnel" in url)
        for name, request, answer in CHANGING:
            assert client.call(f"{MACHINE}{name}", request, answer).messages  # type: ignore[arg-type]
        assert refusal(lambda: client.call(f"{MACHINE}MetaDelete", MetaDeleteRequest(key=16), MetaDeleteResponse)) == (
            "NOT_FOUND",
            "meta key not found",
        )
        assert refusal(lambda: client.call(f"{MACHINE}MetaWrite", MetaWriteRequest(key=256), MetaWriteResponse)) == (
            "INVALID_ARGUMENT",
            "key must be a uint8",
        )

    with scene(url) as found:
        found.client(str(found.wait_overlay().address), look)
        assert len(found.machine.calls) == 2


def test_the_machines_own_processes_are_readers() -> None:
    def look(client: MachineClient) -> None:
        for alias in READABLE:
            assert client.get_all(alias), alias
        for alias in SENSITIVE:
            assert refusal(partial(client.get_all, alias)) == DENIED
        for name, request, answer in CHANGING:
            assert refusal(partial(client.call, f"{MACHINE}{name}", request, answer)) == DENIED  # type: ignore[arg-type]

        documents = ApplyConfigurationRequest(data=b"kind: SideroLinkConfig")
        assert refusal(lambda: client.call(f"{MACHINE}ApplyConfiguration", documents, ApplyConfigurationResponse)) == DENIED

    with scene(URL) as found:
        in_namespace(found.net.machine, str(found.wait_overlay().address), look)
        assert not found.machine.calls


def test_everyone_is_a_reader_on_the_regular_address() -> None:
    def look(client: MachineClient) -> None:
        assert client.get_all("links")
        for alias in SENSITIVE:
            assert refusal(partial(client.get_all, alias)) == DENIED
            definition = client.definition(alias)
            watch = cosi.WatchRequest(namespace=definition.default_namespace, type=definition.resource_type)
            assert refusal(lambda watch=watch: next(client.stream(f"{STATE}Watch", watch))) == DENIED  # type: ignore[misc]
        for name, request, answer in CHANGING:
            assert refusal(partial(client.call, f"{MACHINE}{name}", request, answer)) == DENIED  # type: ignore[arg-type]

    with scene(serve=False) as found:
        # even with an address that looks like an overlay's
        found.net.server.add_address("eth0", "fdae:41e4:649b:9303::1/64")
        found.net.machine.add_address("eth0", "fdae:41e4:649b:9303::2/64")
        for host in (MACHINE_V4, "fdae:41e4:649b:9303::2"):
            found.client(host, look)


def test_it_listens_nowhere_while_there_is_no_overlay_address() -> None:
    with scene(URL, serve=False) as found:
        assert found.machine.api.place == Nowhere()
        found.portal.call(found.machine.api.wait_listening)
        with pytest.raises(ConnectionRefusedError):
            found.net.server.call(connect_to, MACHINE_V4)
        assert found.machine.api.port is None


def test_a_forged_overlay_source_on_the_lan_reaches_nothing() -> None:
    """A neighbour on the LAN sends from the server's overlay address to the machine's, and even has a route for answers."""
    with scene(URL) as found:
        place = found.wait_overlay()
        machine = found.net.machine
        # The worst case: the machine forwards, has a route to the forged source by the LAN, where somebody holds the address.
        with Namespace("neighbour") as neighbour:
            link(machine, neighbour, names=("lan", "eth0"), addresses=(["2001:db8:1::1/64"], ["2001:db8:1::2/64"]))
            neighbour.add_address("eth0", f"{place.server}/128")
            neighbour.add_route(f"{place.address}/128", "2001:db8:1::1")
            machine.forward()
            neighbour.run(["ping", "-c1", "-W20", "2001:db8:1::1"])
            # positive control: a socket that is not bound to the interface is reached with the forged address
            with control_socket(machine, str(place.address)) as reached:
                assert syn_is_answered(neighbour, str(place.server), str(place.address), 50001, 30)
                assert reached() == str(place.server)
                assert not syn_is_answered(neighbour, str(place.server), str(place.address), PORT)
        assert found.client(str(place.address), version_tag)


@contextmanager
def control_socket(namespace: Namespace, address: str) -> "Iterator[Callable[[], str]]":
    """A plain socket on the overlay address; the answer goes by the LAN, for the time of the control."""

    def listen() -> socket.socket:
        sock = socket.socket(socket.AF_INET6)
        sock.bind((address, 50001))
        sock.listen()
        sock.settimeout(30)
        return sock

    route = ("fdae:41e4:649b:9303::1/128", "via", "2001:db8:1::2", "dev", "lan", "metric", "1")
    namespace.run(["ip", "-6", "route", "add", *route])
    sock = namespace.call(listen)
    try:

        def source() -> str:
            connection, peer = sock.accept()
            connection.close()
            return str(peer[0])

        yield source
    finally:
        sock.close()
        namespace.run(["ip", "-6", "route", "del", *route])


def syn_is_answered(namespace: Namespace, source: str, target: str, port: int, patience: float = 3) -> bool:
    """Whether a connection from `source` is established."""

    def connect() -> bool:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind((source, 0))
            sock.settimeout(patience)
            try:
                sock.connect((target, port))
            except OSError:
                return False
            return True

    return namespace.call(connect)


def test_a_cancelled_machine_leaves_no_socket() -> None:
    async def serve_and_cancel() -> bool:
        with anyio.CancelScope() as scope:
            async with agent():
                scope.cancel()
                await anyio.sleep_forever()
        return scope.cancelled_caught

    with direct() as net, net.machine.portal() as portal:
        assert portal.call(serve_and_cancel)
        before = descriptor_kinds()
        for _ in range(10):
            assert portal.call(serve_and_cancel)
        assert not opened_since(before)


def test_a_watch_tells_of_links_that_come_and_go() -> None:
    with scene(serve=False) as found:

        def watch(client: MachineClient) -> None:
            request = cosi.WatchRequest(
                namespace="network",
                type="LinkStatuses.net.talos.dev",
                options=cosi.WatchOptions(bootstrap_contents=True),
                api_version=1,
            )
            answers = (cosi.WatchResponse.parse(data) for data in client.stream(f"{STATE}Watch", request))
            assert next(answers).event == []
            bootstrapped: list[str] = []
            while True:
                [event] = next(answers).event
                if event.event_type == cosi.EventType.BOOTSTRAPPED:
                    break
                assert event.event_type == cosi.EventType.CREATED
                bootstrapped.append(name_of(event))
            assert set(bootstrapped) >= {"lo", "eth0"}
            found.net.machine.run(["ip", "link", "add", "veth7", "type", "veth", "peer", "veth8"])
            seen = set()
            while (cosi.EventType.CREATED, "veth7") not in seen:
                [event] = next(answers).event
                seen.add((event.event_type, name_of(event)))
            found.net.machine.run(["ip", "link", "del", "veth7"])
            while (cosi.EventType.DESTROYED, "veth7") not in seen:
                [event] = next(answers).event
                seen.add((event.event_type, name_of(event)))

        found.client(MACHINE_V4, watch)


def name_of(event: cosi.Event) -> str:
    assert event.resource is not None
    assert event.resource.metadata is not None
    return event.resource.metadata.id
