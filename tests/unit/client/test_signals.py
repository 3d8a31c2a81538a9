"""What a link does about news of the API, the network, the interface and the size of packets; on a fake device."""

from dataclasses import replace
from ipaddress import IPv6Network

import anyio
import pytest

from siderolink.client.link import events, signals
from siderolink.client.link.events import ConnectionState
from siderolink.common.hostport import HostPort
from siderolink.common.keys import PublicKey
from siderolink.common.netlink import OutgoingRoute
from siderolink.common.wireguard.device import InterfaceLost, PeerConfig, PeerStatus
from tests.support.fake_device import FakeDevice, FakeKernelDevice
from tests.support.provision import SERVER_ADDRESS, new_key, response
from tests.unit.client.test_runner import ONE, TWO, VIRTUAL, Bench, running

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]


async def connect(bench: Bench, server: PublicKey) -> None:
    await bench.saw(events.Connecting)
    await anyio.wait_all_tasks_blocked()
    bench.shake_hands(server)
    await bench.saw(events.Connected)


def handshakes_begun(bench: Bench) -> int:
    assert bench.device is not None
    return sum(call == "handshake" for call, _ in bench.device.calls)


async def begun(bench: Bench, more_than: int) -> None:
    with anyio.fail_after(30):
        while handshakes_begun(bench) <= more_than:
            await anyio.sleep(0.01)


async def test_a_lost_api_connection_causes_a_handshake_and_no_change_of_state() -> None:
    server = new_key()
    async with running(response(server, ONE)) as bench:
        await connect(bench, server)
        before = handshakes_begun(bench)
        bench.put(signals.ApiLost())
        await begun(bench, before)
        bench.shake_hands(server)
        await bench.saw(events.Handshake, 2)
        assert bench.state() is ConnectionState.CONNECTED
        assert not any(isinstance(event, events.Disconnected) for event in bench.events)


async def test_a_dead_server_causes_an_echo_while_the_link_works_and_a_call_otherwise() -> None:
    server = new_key()
    async with running(response(server, ONE)) as bench:
        await connect(bench, server)
        before, calls = handshakes_begun(bench), len(bench.service.requests)
        bench.is_server_answering = True
        bench.put(signals.ServerDied())
        with anyio.fail_after(30):
            while not bench.echo_checks:
                await anyio.sleep(0.01)
        await anyio.wait_all_tasks_blocked()
        assert (handshakes_begun(bench), len(bench.service.requests)) == (before, calls)
        bench.is_server_answering = False
        bench.service.answer = response(server, TWO)
        bench.put(signals.ServerDied())
        await bench.saw(events.Connecting, condition=lambda event: event.route == f"udp {TWO}")
        assert len(bench.service.requests) == calls + 1


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that stalls makes no calls that the test does not expect."""
    for name in ("_QUERY_OTHERS_AFTER", "_QUERY_NEXT_AFTER"):
        monkeypatch.setattr(f"siderolink.client.link.monitor.{name}", 1000)


@pytest.fixture(params=[1000.0])
def echo_seconds(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The large packets that are sent at once are answered: in time, also on a host that stalls, or (below 0) too late."""
    monkeypatch.setattr("siderolink.client.link.monitor._SIZE_PROBE_AFTER", 0.0)
    monkeypatch.setattr("siderolink.client.link.echoes.ECHO_SECONDS", request.param)


@pytest.mark.usefixtures("patient", "echo_seconds")
async def test_a_failed_server_is_left_for_the_next_endpoint_without_a_call() -> None:
    server, (one, two) = new_key(), (HostPort.parse(text) for text in (ONE, TWO))
    async with running(response(server, TWO, ONE), attempt_timeout=60.0) as bench:
        await connect(bench, server)
        calls = len(bench.service.requests)
        bench.put(signals.ServerDied(frozenset({two})))
        bench.put(signals.ApiLost(frozenset({two})))
        await anyio.wait_all_tasks_blocked()
        assert bench.echo_checks == 0, "another server's death concerns other machines"
        bench.put(signals.ServerDied(frozenset({one, two})))
        await bench.saw(events.Connecting, condition=lambda event: event.route == f"udp {TWO}")
        await anyio.wait_all_tasks_blocked()
        bench.shake_hands(server)
        await bench.saw(events.Reestablished, condition=lambda event: event.route == f"udp {TWO}")
        assert (bench.echo_checks, len(bench.service.requests)) == (1, calls)


@pytest.mark.usefixtures("echo_seconds")
async def test_the_api_is_asked_where_the_next_server_does_not_answer_either() -> None:
    server, one = new_key(), HostPort.parse(ONE)
    three = "192.0.2.3:51820"
    async with running(response(server, TWO, ONE), attempt_timeout=60.0) as bench:
        await connect(bench, server)
        await anyio.wait_all_tasks_blocked()
        calls = len(bench.service.requests)
        bench.service.answer = response(server, three)
        bench.put(signals.ServerDied(frozenset({one})))
        await bench.saw(events.Connecting, condition=lambda event: event.route == f"udp {three}")
        tried = [event.route for event in bench.events if isinstance(event, events.Connecting)]
        assert tried == [f"udp {ONE}", f"udp {TWO}", f"udp {three}"]
        assert len(bench.service.requests) == calls + 1


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("echo_seconds", [-1.0], indirect=True)
async def test_a_link_whose_echoes_are_answered_too_late_is_left_only_if_handshakes_go_unanswered(echo_seconds: None) -> None:
    """As by satellite, where a balancer that is reloaded cuts the connection to the API."""
    server, one = new_key(), HostPort.parse(ONE)
    async with running(response(server, TWO, ONE)) as bench:
        await connect(bench, server)
        await anyio.wait_all_tasks_blocked()
        before = handshakes_begun(bench)
        bench.put(signals.ApiLost(frozenset({one})))
        await begun(bench, before)
        assert bench.echo_checks == 1
        bench.shake_hands(server)
        await bench.saw(events.Handshake, 2)
        await anyio.wait_all_tasks_blocked()
        assert [event.route for event in bench.events if isinstance(event, events.Connecting)] == [f"udp {ONE}"]
        assert bench.state() is ConnectionState.CONNECTED


@pytest.mark.usefixtures("patient", "echo_seconds")
async def test_a_server_that_answers_an_echo_has_not_failed() -> None:
    """A later unanswered echo has another cause, so a handshake decides."""
    server, one = new_key(), HostPort.parse(ONE)
    async with running(response(server, TWO, ONE)) as bench:
        await connect(bench, server)
        bench.is_server_answering = True
        bench.put(signals.ServerDied(frozenset({one})))
        await anyio.wait_all_tasks_blocked()
        assert bench.echo_checks == 1
        bench.is_server_answering = False
        before = handshakes_begun(bench)
        bench.put(signals.ServerDied())
        await begun(bench, before)
        bench.shake_hands(server)
        await bench.saw(events.Handshake, 2)
        await anyio.wait_all_tasks_blocked()
        assert [event.route for event in bench.events if isinstance(event, events.Connecting)] == [f"udp {ONE}"]
        assert bench.state() is ConnectionState.CONNECTED


@pytest.mark.parametrize(
    ("path", "failed", "is_checked"),
    [
        (TWO, TWO, True),
        ("192.0.2.3:51820", TWO, False),
        (TWO, ONE, False),  # the server that was dialled has lost the link already
        (None, ONE, True),
        (None, TWO, False),
        (TWO, "192.0.2.2:51821", False),
        (TWO, "two.example:51820", True),  # it may have any address
        (TWO, "[::ffff:192.0.2.2]:51820", True),
        ("[2001:db8::2]:51820", "[2001:DB8:0:0::2]:51820", True),
        ("[fe80::2%3]:51820", "[fe80::2]:51820", True),
        ("tunnel [fdae:41e4:649b:9304::5]:50888", TWO, False),
    ],
)
async def test_the_server_that_has_the_link_may_be_another_one_than_was_dialled(
    path: str | None, failed: str, is_checked: bool
) -> None:
    class Dialled(FakeDevice):
        async def peer(self, public_key: PublicKey) -> PeerStatus | None:
            status = await super().peer(public_key)
            return status and replace(status, path=path)

    server = new_key()
    async with running(response(server, TWO, ONE)) as bench:
        bench.device_type = Dialled
        await connect(bench, server)
        bench.is_server_answering = True
        bench.put(signals.ServerDied(frozenset({HostPort.parse(failed)})))
        await anyio.wait_all_tasks_blocked()
        assert bench.echo_checks == is_checked
        assert bench.state() is ConnectionState.CONNECTED


@pytest.mark.usefixtures("patient", "echo_seconds")
@pytest.mark.parametrize("is_alive", [False, True])
async def test_if_the_api_and_the_links_server_end_the_link_moves_unless_that_server_answers(is_alive: bool) -> None:
    server, one = new_key(), HostPort.parse(ONE)
    async with running(response(server, TWO, ONE)) as bench:
        await connect(bench, server)
        await anyio.wait_all_tasks_blocked()
        bench.is_server_answering = is_alive
        before, calls = handshakes_begun(bench), len(bench.service.requests)
        bench.put(signals.ApiLost(frozenset({one})))
        await begun(bench, before)
        if not is_alive:
            await bench.saw(events.Connecting, condition=lambda event: event.route == f"udp {TWO}")
            assert len(bench.service.requests) == calls
            return
        bench.shake_hands(server)
        await bench.saw(events.Handshake, 2)
        await anyio.wait_all_tasks_blocked()
        assert bench.state() is ConnectionState.CONNECTED


@pytest.mark.parametrize(("endpoints", "seconds"), [((TWO, ONE), 0.4), ((TWO, ONE), 0.1), ((ONE,), 0.4)])
async def test_unanswered_data_is_a_reason_for_echoes_where_there_are_other_servers(
    endpoints: tuple[str, ...], seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data that was just sent does not count as unanswered yet."""
    monkeypatch.setattr("siderolink.client.link.echoes.UNANSWERED_AFTER", 0.3)
    server, looks = new_key(), 0

    class Unanswered(FakeDevice):
        async def peer(self, public_key: PublicKey) -> PeerStatus | None:
            nonlocal looks
            looks += 1
            status = await super().peer(public_key)
            return status and replace(status, last_handshake=1.0, unanswered_for=seconds)

    async with running(response(server, *endpoints)) as bench:
        bench.device_type = Unanswered
        await connect(bench, server)
        bench.service.answer = response(server, TWO)
        if len(endpoints) > 1 and seconds > 0.3:
            await bench.saw(events.Connecting, condition=lambda event: event.route == f"udp {TWO}")
            assert bench.echo_checks == 1
            return
        before = looks
        with anyio.fail_after(30):
            while len(endpoints) > 1 and looks < before + 3:
                await anyio.sleep(0.01)
        await anyio.wait_all_tasks_blocked()
        assert bench.echo_checks == 0


async def test_no_route_is_trouble_and_its_return_a_handshake() -> None:
    server = new_key()
    async with running(response(server, ONE)) as bench:
        await connect(bench, server)
        bench.out = None
        bench.put(signals.NetworkChanged())
        trouble = await bench.saw(events.StateChanged, condition=lambda event: event.new is ConnectionState.DEGRADED)
        assert trouble.reason == "this host has no route to 192.0.2.1"
        before = handshakes_begun(bench)
        bench.out = OutgoingRoute(b"there", 2)
        bench.put(signals.NetworkChanged())
        await begun(bench, before)
        bench.shake_hands(server)
        await bench.saw(events.StateChanged, condition=lambda event: event.old is ConnectionState.DEGRADED)
        assert bench.state() is ConnectionState.CONNECTED


async def test_a_network_change_without_a_new_route_causes_nothing() -> None:
    server = new_key()
    async with running(response(server, ONE)) as bench:
        await connect(bench, server)
        before = handshakes_begun(bench)
        bench.put(signals.NetworkChanged())
        bench.put(signals.NetworkChanged(carriers=frozenset((1, 3))))  # for example of containers
        await anyio.wait_all_tasks_blocked()
        assert handshakes_begun(bench) == before
        bench.put(signals.NetworkChanged(carriers=frozenset((2, 3))))
        await begun(bench, before)


@pytest.mark.parametrize("is_answering", [True, False])
async def test_a_suspicion_resets_the_kernels_session_only_if_the_server_does_not_answer(is_answering: bool) -> None:
    server = new_key()
    async with running(response(server, ONE)) as bench:
        bench.device_type = FakeKernelDevice
        await connect(bench, server)
        assert bench.device is not None
        bench.device.calls.clear()
        bench.is_server_answering = is_answering
        bench.put(signals.ApiLost())
        await anyio.wait_all_tasks_blocked()
        if is_answering:
            assert bench.device.calls == []
            bench.is_server_answering = False
            bench.put(signals.ApiLost())  # another suspicion, which ends differently
        with anyio.fail_after(30):
            while ("remove", server) not in bench.device.calls:
                await anyio.sleep(0.01)
        assert bench.state() is ConnectionState.CONNECTED


async def test_a_new_server_key_is_used_while_the_link_is_suspect() -> None:
    old, new = new_key(), new_key()
    async with running(response(old, ONE)) as bench:
        await connect(bench, old)
        bench.put(signals.ApiLost())
        answer = bench.runner.answer
        assert answer is not None
        bench.put(signals.Answered(replace(answer, server_key=new)))
        await bench.saw(events.Disconnected)
        await anyio.wait_all_tasks_blocked()
        bench.shake_hands(new)
        await bench.saw(events.Reestablished)
        assert bench.device is not None
        assert set(bench.device.configs) == {new}


async def test_a_stream_that_was_cut_and_brings_no_handshake_is_a_reason_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        await anyio.lowlevel.checkpoint()

    old, new = new_key(), new_key()
    async with running(response(old, ONE)) as bench:
        await connect(bench, old)
        bench.service.answer = response(new, ONE)
        monkeypatch.setattr("siderolink.client.link.monitor.anyio.sleep", sleep)
        bench.put(signals.RouteInterrupted("the server ended it"))
        bench.put(signals.RouteInterrupted("the server ended it"))
        await bench.saw(events.Disconnected)
        await anyio.wait_all_tasks_blocked()
        bench.shake_hands(new)
        await bench.saw(events.Reestablished)
    assert any(4.0 <= wait <= 6.0 for wait in waits)


async def test_the_same_answer_and_other_endpoints_change_nothing_on_a_good_link() -> None:
    server = new_key()
    async with running(response(server, ONE, TWO)) as bench:
        await connect(bench, server)
        answer = bench.runner.answer
        assert answer is not None
        bench.put(signals.Answered(answer))
        bench.put(signals.Answered(replace(answer, endpoints=answer.endpoints[:1])))
        await anyio.wait_all_tasks_blocked()
        assert bench.state() is ConnectionState.CONNECTED


async def test_lost_large_packets_are_reported_until_they_pass_again() -> None:
    server = new_key()
    async with running(response(server, ONE)) as bench:
        await connect(bench, server)
        bench.put(signals.LargePackets(False))
        trouble = await bench.saw(events.StateChanged, condition=lambda event: event.new is ConnectionState.DEGRADED)
        assert "packets of 1280 bytes do not pass by udp" in trouble.reason
        bench.shake_hands(server)
        await anyio.wait_all_tasks_blocked()
        assert bench.state() is ConnectionState.DEGRADED, "a handshake says nothing about large packets"
        bench.put(signals.LargePackets(True))
        await bench.saw(events.StateChanged, condition=lambda event: event.old is ConnectionState.DEGRADED)
        assert bench.state() is ConnectionState.CONNECTED


async def test_a_repaired_interface_is_reported_and_probed() -> None:
    server = new_key()
    async with running(response(server, ONE)) as bench:
        await connect(bench, server)
        before = handshakes_begun(bench)
        bench.put(signals.Repaired("it was set down"))
        assert (await bench.saw(events.InterfaceRepaired)).what == "it was set down"
        await begun(bench, before)
        assert bench.state() is ConnectionState.DEGRADED
        bench.shake_hands(server)
        await anyio.wait_all_tasks_blocked()
        assert bench.state() is ConnectionState.CONNECTED


async def test_a_deleted_interface_is_created_again_with_the_same_key() -> None:
    server = new_key()
    async with running(response(server, ONE)) as bench:
        await connect(bench, server)
        bench.put(InterfaceLost(reason="the interface siderolink was deleted by another program"))
        await bench.saw(events.InterfaceConfigured, 2)
        await anyio.wait_all_tasks_blocked()
        assert bench.state() is ConnectionState.REESTABLISHING
        bench.shake_hands(server)
        await bench.saw(events.Reestablished)
        assert bench.configs[0].private_key == bench.configs[1].private_key
        assert bench.configs[0].timestamps is bench.configs[1].timestamps, "or a clock set back would end it"


async def test_the_devices_only_peer_is_always_the_server() -> None:
    server = new_key()
    async with running(response(server, VIRTUAL, virtual=VIRTUAL)) as bench:
        await bench.saw(events.Connecting)
        await anyio.wait_all_tasks_blocked()
        assert bench.device is not None
        assert bench.device.configs[server].allowed_ips == (IPv6Network(SERVER_ADDRESS),)


async def test_a_missing_route_fails_at_once_with_its_reason() -> None:
    async with running(response(new_key(), ONE), attempt_timeout=60.0) as bench:
        bench.out = None
        failed = await bench.saw(events.RouteFailed)
        assert failed.reason == "this host has no route to 192.0.2.1"


async def test_regular_cuts_of_a_stream_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("siderolink.client.link.watch.RegularCuts.SHORTEST", 0.0)
    server = new_key()
    async with running(response(server, ONE)) as bench:
        await connect(bench, server)
        for _ in range(4):
            bench.put(signals.RouteInterrupted("the stream ended"))
            await anyio.wait_all_tasks_blocked()
            bench.shake_hands(server)
            await anyio.wait_all_tasks_blocked()
        told = [event for event in bench.events if isinstance(event, events.ConnectionsCut)]
        assert len(told) == 1, "from the third on, and not at each"
        assert "stream" in told[0].what


class FailsOnce(FakeDevice):
    """A device that raises an unexpected error for its first peer."""

    has_failed = False

    async def set_peer(self, peer: PeerConfig) -> None:
        if not FailsOnce.has_failed:
            FailsOnce.has_failed = True
            raise AttributeError("nobody foresaw it")
        await super().set_peer(peer)


async def test_an_unexpected_error_counts_as_a_failed_try(caplog: pytest.LogCaptureFixture) -> None:
    server = new_key()
    async with running(response(server, ONE)) as bench:
        bench.device_type = FailsOnce
        failed = await bench.saw(events.RouteFailed)
        assert failed.reason == "internal error: AttributeError"
        assert "nobody foresaw it" in caplog.text
        await connect(bench, server)
