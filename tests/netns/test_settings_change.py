"""Changing the settings of a running link: new ones are tested alongside, and adopted only if they work."""

import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from anyio.from_thread import BlockingPortal

from siderolink import ConfigurationError, JoinRefusedError, JoinURL, Link, Server, connect
from siderolink.client import (
    ConnectionState,
    Disconnected,
    Handshake,
    Left,
    LinkEvent,
    SettingsApplied,
    SettingsRefused,
    StateChanged,
    TransportChanged,
)
from siderolink.client.link.supervisor import Verdict
from tests.support.netns import Namespace, link
from tests.support.pings import pinging
from tests.support.topology import SERVER_V4, Net, direct

TOKEN = "the-join-token"
URL = f"grpc://{SERVER_V4}:4000?jointoken={TOKEN}"
OTHER_URL = f"grpc://{SERVER_V4}:5000?jointoken={TOKEN}"
DROPS_UDP = "table inet hole { chain input { type filter hook input priority 0; udp dport 51820 drop; }; }"
TRANSPORTS = pytest.mark.parametrize("query", ["", "&grpc_tunnel=true"], ids=["udp", "tunnel"])


@contextmanager
def serving(net: Net, *, port: int = 4000, **options: object) -> Iterator[tuple[Server, BlockingPortal]]:
    """A server; a second one in the same namespace has other ports, another interface and another overlay."""
    if port != 4000:
        options = {"interface": "other", "installation_id": "another installation"} | options
    server = Server(
        api_listen=f"0.0.0.0:{port}",
        wireguard_endpoints=[f"{SERVER_V4}:{47820 + port}"],
        join_token=TOKEN,
        device="userspace",
        **options,  # type: ignore[arg-type]
    )
    with net.server.portal() as portal, portal.wrap_async_context_manager(server):
        yield server, portal


class Machine:
    def __init__(self, namespace: Namespace, portal: BlockingPortal, held: Link, events: list[LinkEvent]) -> None:
        self.namespace, self.portal, self.link, self.events = namespace, portal, held, events

    def apply(self, **changes: object) -> Verdict:
        """Other settings: `url`, or those of the machine."""
        options = self.link.options
        if "url" in changes:
            options = replace(options, url=JoinURL.parse(str(changes.pop("url"))))
        options = replace(options, machine=replace(options.machine, **changes))  # type: ignore[arg-type]
        return self.portal.call(partial(self.link.apply, options))

    def count(self, kind: type[LinkEvent]) -> int:
        return sum(isinstance(event, kind) for event in self.events)

    def states(self) -> list[ConnectionState]:
        return [event.new for event in self.events if isinstance(event, StateChanged)]

    def ping(self) -> None:
        self.namespace.run(["ping", "-c1", "-i0.2", "-w30", str(self.link.server_address)])

    def interface_index(self) -> int:
        return int(self.namespace.run(["cat", f"/sys/class/net/{self.link.interface}/ifindex"]))

    def wait(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline, [str(event) for event in self.events[-8:]]
            time.sleep(0.02)


@contextmanager
def joined(net: Net, url: str = URL, **options: object) -> Iterator[Machine]:
    events: list[LinkEvent] = []
    options = {"uuid": str(uuid.uuid4()), "unique_token": "mine"} | options
    context = connect(url, device="userspace", on_event=events.append, **options)  # type: ignore[arg-type]
    with net.machine.portal() as portal, portal.wrap_async_context_manager(context) as held:
        yield Machine(net.machine, portal, held, events)


@contextmanager
def conversation(net: Net, machine: Machine) -> Iterator[Callable[[], None]]:
    """A TCP connection from server to machine over the link; what is given checks that it still carries bytes both ways."""
    with ExitStack() as stack:
        listener = stack.enter_context(net.machine.call(partial(socket.create_server, ("::", 9), family=socket.AF_INET6)))
        near = stack.enter_context(net.server.call(partial(socket.create_connection, (str(machine.link.address), 9), 30)))
        far = stack.enter_context(listener.accept()[0])

        def check() -> None:
            for one, other in ((near, far), (far, near)):
                one.sendall(b"alive")
                other.settimeout(30)
                assert other.recv(5) == b"alive"

        check()
        yield check


@TRANSPORTS
def test_a_wrong_token_keeps_the_link_and_is_reported(query: str) -> None:
    """Of a machine without a unique token, which would admit it whatever its join token."""
    alone: dict[str, object] = {"unique_token": ""}
    with direct() as net, serving(net), joined(net, URL + query, **alone) as machine, conversation(net, machine) as lives:
        index, handshakes = machine.interface_index(), machine.count(Handshake)
        verdict = machine.apply(url=URL.replace(TOKEN, "wrong") + query)
        assert (verdict.outcome, verdict.is_refused) == ("refused", True)
        assert "invalid join token" in verdict.reason
        assert "wrong" not in verdict.reason
        lives()
        assert machine.interface_index() == index
        assert machine.count(Handshake) == handshakes, "a refused Provision touches no session"
        assert machine.count(SettingsRefused) == 1
        assert machine.count(Disconnected) == 0


@TRANSPORTS
def test_another_token_at_the_same_server_keeps_key_interface_and_connections(query: str) -> None:
    with direct() as net, serving(net) as (server, _), joined(net, URL + query) as machine:
        with conversation(net, machine) as lives:
            key, index = machine.link.public_key, machine.interface_index()
            server.set_join_token("next")
            assert machine.apply(url=URL.replace(TOKEN, "next") + query).outcome == "applied"
            lives()
            assert (machine.link.public_key, machine.interface_index()) == (key, index)
        assert machine.apply(url=URL.replace(TOKEN, "next") + query).outcome == "unchanged"
        assert machine.count(Disconnected) == machine.count(Left) == 0


def test_a_change_of_transport_is_tried_then_used_and_reported() -> None:
    with direct() as net, serving(net), joined(net) as machine:
        key, address = machine.link.public_key, machine.link.address
        verdict = machine.apply(url=URL + "&grpc_tunnel=true")
        assert verdict.outcome == "applied"
        assert len(verdict.warnings) == 1
        machine.wait(lambda: machine.count(TransportChanged) == 1 and machine.link.state == ConnectionState.CONNECTED)
        machine.ping()
        assert machine.link.interface == "siderolinktun"
        assert (machine.link.public_key, machine.link.address) == (key, address)
        assert "siderolink" not in net.machine.interfaces()


def test_the_old_link_stays_if_the_new_transport_is_blocked() -> None:
    """The trial has the same key, so the old link is silent meanwhile; afterwards it is back without a new Provision."""
    with direct() as net, serving(net), joined(net, URL + "&grpc_tunnel=true") as machine:
        net.server.nft(DROPS_UDP)
        with conversation(net, machine) as lives:
            index = machine.interface_index()
            verdict = machine.apply(url=URL)
            assert verdict.is_refused
            assert "no handshake by udp" in verdict.reason
            lives()
            assert machine.interface_index() == index
        machine.ping()
        assert machine.link.transport == "tunnel"
        assert machine.count(Disconnected) == 0


def test_another_server_gets_another_key_and_is_tried_without_a_break() -> None:
    with direct() as net, serving(net), serving(net, port=5000), joined(net) as machine:
        key, server = machine.link.public_key, machine.link.server_address
        with pinging(net.machine, server) as pings:
            assert machine.apply(url=OTHER_URL.replace(TOKEN, "wrong")).is_refused
            machine.ping()
            assert machine.link.public_key == key
            assert pings.lost() == [], "while another server is tried, nothing is lost"
        assert machine.apply(url=OTHER_URL).outcome == "applied"
        machine.wait(lambda: machine.count(SettingsApplied) == 1)
        machine.wait(lambda: machine.link.state == ConnectionState.CONNECTED)
        assert machine.link.server_address != server
        machine.ping()
        assert machine.link.public_key != key, "B must not know the key that A knows"
        assert machine.apply(url=URL).outcome == "applied"
        machine.wait(lambda: machine.count(SettingsApplied) == 2)
        machine.wait(lambda: machine.link.state == ConnectionState.CONNECTED)
        assert machine.link.public_key == key, "a key belongs to its server for as long as the program runs"


def test_a_change_to_another_server_of_the_same_overlay_is_one_reported_step() -> None:
    with direct() as net, serving(net), joined(net) as machine:
        with serving_elsewhere(net) as url:
            verdict = machine.apply(url=url)
            assert verdict.outcome == "applied"
            assert "same overlay prefix" in verdict.warnings[0]
            machine.wait(lambda: machine.count(SettingsApplied) == 1)
            machine.wait(lambda: machine.link.state == ConnectionState.CONNECTED)
            machine.ping()


@contextmanager
def serving_elsewhere(net: Net) -> Iterator[str]:
    """A second server with the same overlay, in a namespace that the first one's host reaches; its URL for machines."""
    with Namespace("elsewhere") as namespace:
        link(net.machine, namespace, names=("eth1", "eth0"), addresses=(["203.0.113.2/24"], ["203.0.113.1/24"]))
        server = Server(
            api_listen="203.0.113.1:4000", wireguard_endpoints=["203.0.113.1:51820"], join_token=TOKEN, device="userspace"
        )
        with namespace.portal() as portal, portal.wrap_async_context_manager(server):
            yield f"grpc://203.0.113.1:4000?jointoken={TOKEN}"


def test_a_later_change_replaces_one_that_is_still_tried() -> None:
    with direct() as net, serving(net), joined(net) as machine:
        net.server.nft("table inet hole { chain input { type filter hook input priority 0; tcp dport 5000 drop; }; }")
        slow: list[Verdict] = []
        thread = threading.Thread(target=lambda: slow.append(machine.apply(url=OTHER_URL)))
        thread.start()
        time.sleep(0.5)
        assert machine.apply(unique_token="mine", version="v1.13.1").outcome == "applied"
        thread.join()
        assert slow[0].is_refused
        assert "later settings" in slow[0].reason
        machine.ping()


def test_another_uuid_is_the_same_machine_under_another_name() -> None:
    with direct() as net, serving(net) as (server, portal), joined(net) as machine:
        other, key = str(uuid.uuid4()), machine.link.public_key
        assert machine.apply(uuid=other).outcome == "applied"
        machine.wait(lambda: machine.count(SettingsApplied) == 1)
        machine.wait(lambda: machine.link.state == ConnectionState.CONNECTED)
        machine.ping()
        assert machine.link.public_key == key
        assert other in [status.machine.node_uuid for status in portal.call(server.machines)]


def test_a_machine_without_a_token_that_stopped_cleanly_is_admitted_again_at_once() -> None:
    """It has said goodbye inside its session; without that it would be taken for a thief of its own UUID for a minute."""
    node_uuid = str(uuid.uuid4())
    with direct() as net, serving(net):
        for _ in range(3):
            with joined(net, uuid=node_uuid, unique_token="") as machine:
                machine.ping()


def test_an_embedders_machine_keeps_its_tokens_in_a_folder(tmp_path: Path) -> None:
    with direct() as net, serving(net):
        for _ in range(2):
            with joined(net, uuid=str(uuid.UUID(int=77)), unique_token="", identity=tmp_path) as machine:
                assert "Token" in machine.link.options.machine.unique_token
        with pytest.raises(JoinRefusedError, match="another machine"), joined(net, uuid=str(uuid.UUID(int=77))):
            pass


@pytest.mark.parametrize(
    "wrong", ["not-a-uuid", "00000000-0000-0000-0000-000000000000", "03000200-0400-0500-0006-000700080009"]
)
def test_a_wrong_uuid_is_refused_before_anything_is_sent(wrong: str) -> None:
    with direct() as net, pytest.raises(ConfigurationError), joined(net, uuid=wrong):
        pass


def test_settings_work_with_a_server_that_answers_no_echo_requests() -> None:
    with direct() as net, serving(net), serving(net, port=5000), joined(net) as machine:
        net.server.nft("table ip6 mute { chain input { type filter hook input priority 0; icmpv6 type echo-request drop; }; }")
        assert machine.apply(url=OTHER_URL).outcome == "applied"


def test_a_server_that_only_completes_handshakes_is_refused() -> None:
    """Of the other server's datagrams only handshake responses arrive: 92 bytes and a UDP header."""
    with direct() as net, serving(net), serving(net, port=5000), joined(net) as machine:
        net.server.nft(
            "table inet hole { chain output { type filter hook output priority 0; udp sport 52820 udp length != 100 drop; }; }"
        )
        verdict = machine.apply(url=OTHER_URL)
        assert verdict.is_refused
        assert "data went unanswered" in verdict.reason
        machine.ping()
