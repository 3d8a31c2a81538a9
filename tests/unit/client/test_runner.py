"""The life of a link, on a fake device and a real API on the loopback; its timeouts are shortened, its conditions awaited."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, IPv6Interface, IPv6Network
from typing import TypeVar

import anyio
import pytest
from grpclib import GRPCError, Status

from siderolink.client.link import events
from siderolink.client.link.events import ConnectionState
from siderolink.client.link.probes import HandshakeTrial
from siderolink.client.link.provisioning import NodeInfo, Provisioned, Provisioner
from siderolink.client.link.runner import LinkOptions, LinkRunner
from siderolink.client.link.signals import ApiLost, Put
from siderolink.common.errors import JoinRefusedError, OverlayInUseError
from siderolink.common.keys import PublicKey
from siderolink.common.netlink import OutgoingRoute
from siderolink.common.pb.sidero.link import ProvisionResponse
from siderolink.common.tasks import background_tasks
from siderolink.common.transport.choice import Route
from siderolink.common.wireguard.device import Device, DeviceConfig, DeviceKind, HandshakeGaveUp, OnDeviceEvent
from tests.support.fake_device import FakeDevice, VirtualClock
from tests.support.provision import ADDRESS, SERVER_ADDRESS, FakeProvision, new_key, provision_api, response

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]

ONE, TWO = "192.0.2.1:51820", "192.0.2.2:51820"
VIRTUAL = "[fdae:41e4:649b:9304::5]:50888"
E = TypeVar("E", bound=events.LinkEvent)


class Bench:
    """One link under test: its events, its device and its host."""

    def __init__(self, service: FakeProvision) -> None:
        self.service = service
        self.events: list[events.LinkEvent] = []
        self.configs: list[DeviceConfig] = []
        self.device: FakeDevice | None = None
        self.put: Put = lambda signal: None
        self.out: OutgoingRoute | None = OutgoingRoute(b"here", 2)
        self.size_verdicts: list[bool | None] = []
        self.device_type: type[FakeDevice] = FakeDevice
        self.is_server_answering = False
        self.echo_checks = 0
        self.trial: str | None = None
        """Why handshakes beside the link fail; None if they succeed."""
        self._changed = anyio.Event()
        self.runner: LinkRunner

    def emit(self, event: events.LinkEvent) -> None:
        self.events.append(event)
        self._changed.set()

    @asynccontextmanager
    async def open_device(self, kind: DeviceKind, config: DeviceConfig, on_event: OnDeviceEvent) -> AsyncIterator[Device]:
        self.configs.append(config)
        self.device = self.device_type(VirtualClock(), on_event)
        try:
            yield self.device
        finally:
            self.device = None

    async def saw(self, kind: type[E], number: int = 1, condition: Callable[[E], bool] = lambda event: True) -> E:
        """The `number`th event of a kind, once it has come."""
        while True:
            found = [event for event in self.events if isinstance(event, kind) and condition(event)]
            if len(found) >= number:
                return found[number - 1]
            self._changed = anyio.Event()
            await self._changed.wait()

    async def check_overlay(self, overlay: IPv6Network, interface: str) -> None:
        pass

    async def watch(self, device: Device, config: DeviceConfig, put: Put) -> None:
        self.put = put
        await anyio.sleep_forever()

    def way_out(self, remote: str) -> OutgoingRoute | None:
        return self.out

    async def is_answered(self, interface: str, server: IPv6Address, wait: float = 0.0) -> bool:
        self.echo_checks += 1
        return self.is_server_answering

    async def large_packets_pass(self, interface: str, server: IPv6Address) -> bool | None:
        return self.size_verdicts.pop(0) if self.size_verdicts else True

    async def try_handshake(self, trial: HandshakeTrial, route: Route) -> str | None:
        return self.trial

    async def say_goodbye(self, device: Device, source: IPv6Address, server: IPv6Address) -> None:
        """Does nothing, because nobody listens."""

    def state(self) -> ConnectionState:
        return self.runner.state

    def shake_hands(self, key: PublicKey) -> None:
        assert self.device is not None
        self.device.hear(key, handshake=True)

    def give_up(self, key: PublicKey) -> None:
        """The device's handshakes with this peer stay unanswered."""
        assert self.device is not None
        self.device.on_event(HandshakeGaveUp(public_key=key))


@asynccontextmanager
async def running(
    answer: ProvisionResponse | GRPCError,
    *,
    attempt_timeout: float = 5.0,
    down_after: float = 275.0,
    fallback_tunnel: bool = False,
) -> AsyncIterator[Bench]:
    async with provision_api(answer) as (service, url):
        bench = Bench(service)
        options = LinkOptions(
            url=url,
            machine=NodeInfo(uuid="a-uuid"),
            attempt_timeout=attempt_timeout,
            down_after=down_after,
            fallback_tunnel=fallback_tunnel,
        )
        bench.runner = LinkRunner(options, bench.emit, bench)
        async with background_tasks() as tasks:
            tasks.start_soon(bench.runner.run)
            yield bench


async def test_from_the_key_to_the_first_handshake() -> None:
    server = new_key()
    async with running(response(server, ONE)) as bench:
        await bench.saw(events.Connecting)
        assert bench.state() is ConnectionState.CONNECTING
        await anyio.wait_all_tasks_blocked()
        bench.shake_hands(server)
        connected = await bench.saw(events.Connected)
        assert connected.route == f"udp {ONE}"
        assert [type(event).__name__ for event in bench.events] == [
            "KeyCreated",
            "Joined",
            "InterfaceConfigured",
            "Connecting",
            "StateChanged",
            "Handshake",
            "StateChanged",
            "Connected",
        ]
        assert bench.state() is ConnectionState.CONNECTED
        [config] = bench.configs
        assert (config.name, config.mtu, config.listen_port, config.isolate) == ("siderolink", 1280, 0, False)
        assert config.addresses == (IPv6Interface(f"{ADDRESS}/64"),)
        assert bench.device is not None
        peer = bench.device.configs[server]
        assert peer.allowed_ips == (IPv6Network(SERVER_ADDRESS),)
        assert peer.persistent_keepalive == 25
        assert peer.endpoint == (IPv4Address("192.0.2.1"), 51820)
    assert isinstance(bench.events[-1], events.Left)
    assert bench.state() is ConnectionState.LEFT


async def test_each_link_has_a_key_of_its_own() -> None:
    async with running(response(new_key(), ONE)) as one, running(response(new_key(), ONE)) as two:
        assert one.runner.public_key != two.runner.public_key


async def test_endpoints_are_taken_in_turn_and_then_the_api_is_asked_again_with_the_same_key() -> None:
    server = new_key()
    async with running(response(server, TWO, ONE), attempt_timeout=0.03) as bench:
        await bench.saw(events.Joined, 2)
        first = [event.route for event in bench.events if isinstance(event, events.Connecting)]
        assert first[:2] == [f"udp {ONE}", f"udp {TWO}"]
        assert [event.reason for event in bench.events if isinstance(event, events.RouteFailed)] == ["no handshake"] * 2
        keys = {request.node_public_key for request in bench.service.requests}
        assert keys == {str(bench.runner.public_key)}
        assert len(bench.configs) == 1, "the device is kept"


async def test_a_dead_link_is_re_established_by_the_next_endpoint() -> None:
    server = new_key()
    async with running(response(server, TWO, ONE), attempt_timeout=600.0) as bench:
        await bench.saw(events.Connecting)
        await anyio.wait_all_tasks_blocked()
        bench.shake_hands(server)
        await bench.saw(events.Connected)
        bench.give_up(server)
        await bench.saw(events.Disconnected)
        assert bench.state() is ConnectionState.REESTABLISHING
        assert bench.runner.progress.down.is_set()
        await bench.saw(events.Connecting, 2)
        await anyio.wait_all_tasks_blocked()
        bench.shake_hands(server)
        back = await bench.saw(events.Reestablished)
        assert back.route == f"udp {TWO}"
        assert not bench.runner.progress.down.is_set()
        assert len(bench.service.requests) == 1


@pytest.mark.parametrize(("endpoints", "handshakes"), [((ONE,), [4]), ((TWO, ONE), [2, 4])])
async def test_where_the_api_broke_other_servers_are_asked_for_after_one_unanswered_handshake(
    endpoints: tuple[str, ...], handshakes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of the calls hangs, as it may at a dead address."""
    monkeypatch.setattr("siderolink.client.link.watch.PROBE_INTERVAL", 0.05)
    monkeypatch.setattr("siderolink.client.link.watch.PROBE_LIMIT", 1000)  # meanwhile the link stays
    server = new_key()
    async with running(response(server, *endpoints)) as bench:
        await bench.saw(events.Connecting)
        await anyio.wait_all_tasks_blocked()
        bench.shake_hands(server)
        await bench.saw(events.Connected)
        device = bench.device
        assert device is not None
        begun = len(device.calls)
        asked: list[int] = []
        told, shake = Provisioner.request, device.handshake

        async def handshake(key: PublicKey) -> None:
            for _ in range(10):  # the next call counts from the last one, even if this task runs late
                await anyio.lowlevel.checkpoint()
            await shake(key)

        async def request(provisioner: Provisioner, *, tunnel: bool = False) -> Provisioned:
            asked.append(device.calls[begun:].count(("handshake", server)))
            if len(asked) < len(handshakes):
                await anyio.sleep_forever()
            return await told(provisioner, tunnel=tunnel)

        monkeypatch.setattr(device, "handshake", handshake)
        monkeypatch.setattr(Provisioner, "request", request)
        bench.service.answer = response(server, ONE, TWO)
        bench.put(ApiLost())
        await bench.saw(events.Connecting, condition=lambda event: event.route == f"udp {TWO}")
        assert asked == handshakes


async def test_a_device_that_gives_up_means_the_link_is_down() -> None:
    server = new_key()
    async with running(response(server, ONE)) as bench:
        await bench.saw(events.Connecting)
        await anyio.wait_all_tasks_blocked()
        bench.shake_hands(server)
        await bench.saw(events.Connected)
        bench.give_up(new_key())
        await anyio.wait_all_tasks_blocked()
        assert bench.state() is ConnectionState.CONNECTED, "that was another peer"
        bench.give_up(server)
        assert (await bench.saw(events.Disconnected)).reason == "handshakes go unanswered"


async def test_a_handshake_ends_the_calls_to_an_unreachable_api() -> None:
    server = new_key()
    async with running(response(server, ONE), attempt_timeout=600.0) as bench:
        await bench.saw(events.Connecting)
        await anyio.wait_all_tasks_blocked()
        bench.shake_hands(server)
        await bench.saw(events.Connected)
        bench.service.answer = GRPCError(Status.UNAVAILABLE, "away")
        bench.give_up(server)
        failed = await bench.saw(events.ProvisionFailed)
        assert "away" in failed.reason
        assert 0 <= failed.retry_in <= 2
        bench.shake_hands(server)
        await bench.saw(events.Reestablished)
        assert bench.state() is ConnectionState.CONNECTED
        assert len([event for event in bench.events if isinstance(event, events.Joined)]) == 1


async def test_a_later_refusal_is_retried_after_a_long_pause() -> None:
    async with running(response(new_key(), ONE), attempt_timeout=0.03) as bench:
        await bench.saw(events.Connecting)
        bench.service.answer = GRPCError(Status.PERMISSION_DENIED, "invalid join token")
        assert (await bench.saw(events.ProvisionFailed)).retry_in >= 30


@pytest.mark.parametrize("status", [Status.INTERNAL, Status.UNKNOWN, Status.CANCELLED, Status.ABORTED])
async def test_a_server_error_is_retried_soon(status: Status) -> None:
    async with running(response(new_key(), ONE), attempt_timeout=0.03) as bench:
        await bench.saw(events.Connecting)
        bench.service.answer = GRPCError(status, "internal server error")
        assert (await bench.saw(events.ProvisionFailed)).retry_in <= 2


async def test_a_server_with_another_key_takes_the_old_ones_place() -> None:
    old, new = new_key(), new_key()
    async with running(response(old, ONE), attempt_timeout=0.05) as bench:
        await bench.saw(events.Connecting)
        bench.service.answer = response(new, TWO)
        await bench.saw(events.Connecting, condition=lambda event: event.route == f"udp {TWO}")
        await anyio.wait_all_tasks_blocked()
        bench.shake_hands(new)
        await bench.saw(events.Connected)
        assert bench.device is not None
        assert set(bench.device.configs) == {new}
        assert len(bench.configs) == 1


async def test_another_address_or_transport_needs_another_device() -> None:
    server = new_key()
    async with running(response(server, ONE), attempt_timeout=0.05) as bench:
        await bench.saw(events.Connecting)
        bench.service.answer = response(server, ONE, address="fdae:41e4:649b:9303::43/64")
        await bench.saw(events.InterfaceConfigured, 2)
        assert bench.configs[1].addresses == (IPv6Interface("fdae:41e4:649b:9303::43/64"),)
        bench.service.answer = response(server, VIRTUAL, virtual=VIRTUAL)
        await bench.saw(events.InterfaceConfigured, 3)
        assert bench.configs[2].name == "siderolinktun"
        assert bench.configs[2].listen_port is None
        assert bench.configs[2].private_key == bench.configs[0].private_key


async def test_after_an_unusable_answer_the_api_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another link of this host may have the overlay that an answer names; the next answer need not name it."""
    server, taken = new_key(), "fdae:41e4:649b:9399::43/64"

    async def check_overlay(overlay: IPv6Network, interface: str) -> None:
        if overlay == IPv6Interface(taken).network:
            raise OverlayInUseError("another link has it")

    async with running(response(server, ONE), attempt_timeout=600.0) as bench:
        monkeypatch.setattr(bench, "check_overlay", check_overlay)
        await bench.saw(events.Connecting)
        await anyio.wait_all_tasks_blocked()
        bench.shake_hands(server)
        await bench.saw(events.Connected)
        unusable = response(server, ONE, address=taken)
        unusable.server_address = "fdae:41e4:649b:9399::1"
        bench.service.answer = unusable
        bench.give_up(server)
        await bench.service.wait_asked(lambda count: count >= 3)
        bench.service.answer = response(server, TWO)
        await bench.saw(events.Connecting, condition=lambda event: event.route == f"udp {TWO}")


async def test_a_retry_by_udp_uses_the_servers_new_key(monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = new_key(), new_key()
    tried: list[Callable[[], PublicKey]] = []

    async def until_udp_passes(_: object, server_key: Callable[[], PublicKey], *rest: object) -> None:
        tried.append(server_key)
        await anyio.sleep_forever()

    monkeypatch.setattr("siderolink.client.link.runner.until_udp_passes", until_udp_passes)
    async with running(response(old, ONE), attempt_timeout=0.05, fallback_tunnel=True) as bench:
        await bench.saw(events.Connecting)
        bench.service.answer = response(old, VIRTUAL, virtual=VIRTUAL)
        await bench.saw(events.FallbackBegun)
        bench.service.answer = response(new, VIRTUAL, virtual=VIRTUAL)
        await bench.saw(events.Joined, condition=lambda event: event.server_key == new)
        await anyio.wait_all_tasks_blocked()
        assert [server_key() for server_key in tried] == [new]


async def test_a_handshake_whose_event_was_missed_counts_all_the_same() -> None:
    server = new_key()
    async with running(response(server, ONE), attempt_timeout=0.05) as bench:
        await bench.saw(events.Connecting)
        assert bench.device is not None
        told = bench.device.peer

        async def peer(key: PublicKey) -> object:
            status = await told(key)
            return None if status is None else replace(status, last_handshake=4e9)

        bench.device.peer = peer  # type: ignore[method-assign, assignment]
        await bench.saw(events.Connected)


async def test_a_first_refusal_is_raised_as_itself() -> None:
    with pytest.raises(JoinRefusedError, match="invalid join token"):
        async with running(GRPCError(Status.PERMISSION_DENIED, "invalid join token")) as bench:
            await anyio.sleep_forever()
    assert [type(event) for event in bench.events] == [events.KeyCreated, events.StateChanged, events.Left]
