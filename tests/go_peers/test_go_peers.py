"""Machines and servers made of grpc-go and wireguard-go, as existing ones are, against ours.

Run it by `make test-go-peers`, which builds the program (`main.go`) first.
"""

import base64
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from ipaddress import IPv6Address, IPv6Interface
from pathlib import Path
from typing import Any

import pytest

from siderolink.common.addressing import VIRTUAL_PREFIX, overlay_prefix
from siderolink.common.pb.sidero.link import ProvisionRequest
from tests.interop.test_wireguard_go import transfer
from tests.support.certificates import make_certificate
from tests.support.commands import end, read_until, start
from tests.support.netns import Namespace, stop
from tests.support.pings import ping, pinging
from tests.support.provision import new_key
from tests.support.topology import SERVER_V4, Net, direct
from tests.support.waiting import until

PROGRAM = os.environ.get("GO_PEERS", "")
TOKEN = "s3cret-token"
UUID = "a1b2c3d4-0000-4000-8000-00000000000a"
UNIQUE = json.dumps({"Fingerprint": "0" * 64, "Token": "5d0f5c0e-3c55-4d3f-8a3c-1f3c0f0b1a5e"})
API = f"{SERVER_V4}:4000"
SERVER = IPv6Address("fdae:41e4:649b:9303::1")
CREATE_STREAM = "/sidero.link.WireGuardOverGRPCService/CreateStream"

Event = dict[str, Any]


class Peer:
    """The program, and what it has printed."""

    def __init__(self, namespace: Namespace, *arguments: str) -> None:
        self.process = namespace.popen([PROGRAM, *arguments], stdout=subprocess.PIPE)
        self.events: list[Event] = []

    def next(self, *kinds: str) -> Event:
        """The next event of one of these kinds."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.events.append(json.loads(line))
            if self.events[-1]["event"] in kinds:
                return self.events[-1]
        raise AssertionError(f"none of {kinds} in {self.events}")

    def count(self, kind: str) -> int:
        return sum(event["event"] == kind for event in self.events)


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Net]:
    monkeypatch.setenv("SIDEROLINK_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path / "state"))
    with direct() as net:
        yield net


def serve(net: Net, *options: str) -> "subprocess.Popen[str]":
    endpoint = ("--wireguard-endpoint", f"{SERVER_V4}:51820", "--wireguard-endpoint", "[2001:db8::1]:51820")
    server = start(net.server, "serve", "--api-listen", "[::]:4000", "--join-token", TOKEN, *endpoint, *options)
    read_until(server, "overlay")
    return server


def machine(net: Net, *options: str, api: str = API) -> Peer:
    told = ("-uuid", UUID, "-token", TOKEN, "-unique", UNIQUE)
    return Peer(net.machine, "machine", "-api", api, *told, *options)


def address_of(event: Event) -> IPv6Interface:
    return IPv6Interface(event["fields"]["4"][0])


def call(net: Net, message: bytes, *options: str) -> list[Event]:
    """What one or more calls of one connection gave."""
    arguments = ["call", "-api", API, "-message", base64.b64encode(message).decode(), *options]
    return [json.loads(line) for line in net.machine.run([PROGRAM, *arguments]).splitlines()]


def request(**fields: Any) -> bytes:
    given = {"node_uuid": UUID, "node_public_key": new_key().encode(), "join_token": TOKEN, "talos_version": "v1.13.0"}
    return bytes(ProvisionRequest(**(given | fields)))


def test_calls_of_grpc_go(net: Net) -> None:
    """Texts and codes are exact, and without details: Go's clients compare whole statuses."""
    server = serve(net, "--no-state")
    right = request()

    def status(message: bytes, *options: str) -> tuple[str, str, int]:
        [answer] = call(net, message, *options)
        return answer["code"], answer["message"], answer["details"]

    assert status(right) == ("OK", "", 0)
    assert status(right, "-authority", "another.example:1", "-user-agent", "talos/1.13") == ("OK", "", 0)
    assert status(right, "-metadata", "trace-bin=\x01\x02\xff", "-metadata", "x-other=a,b") == ("OK", "", 0)
    assert {answer["code"] for answer in call(net, right, "-count", "50")} == {"OK"}
    assert status(request(join_token="wrong")) == ("PermissionDenied", "invalid join token", 0)
    assert status(request(node_public_key="x"))[0] == "InvalidArgument"
    assert status(right, "-gzip")[0] == "Unimplemented"
    assert status(right, "-method", "/sidero.link.None/None")[0] == "Unimplemented"
    assert status(b"\x0a\xff")[0] == "InvalidArgument"
    assert status(bytes(70_000))[0] == "ResourceExhausted"
    denied = ("PermissionDenied", "peer not allowed", 0)
    assert status(b"", "-method", CREATE_STREAM, "-metadata", "x-siderolink-ipv6-addr=[fd00::1]:50888") == denied
    assert status(b"", "-method", CREATE_STREAM)[0] == "Unknown"
    end(server)


def test_the_two_calls_at_the_start_get_the_same_answer(net: Net) -> None:
    server = serve(net, "--no-state")
    for tunnel in (False, True):
        peer = machine(net, "-twice", f"-tunnel={str(tunnel).lower()}", "-uuid", f"{UUID[:-1]}{tunnel:d}", "-unique", "")
        first, second = peer.next("provisioned"), peer.next("provisioned")
        peer.next("up")
        assert first["fields"] == second["fields"]
        assert ("6" in first["fields"]) is tunnel
        ping(net.machine, SERVER)
        ping(net.server, address_of(first).ip)
        stop(peer.process)
    end(server)


def test_a_machine_by_udp(net: Net) -> None:
    server = serve(net, "--no-state")
    peer = machine(net)
    answer = peer.next("provisioned")
    # the preferred endpoint is the last one on the wire
    assert answer["fields"]["1"] == ["[2001:db8::1]:51820", f"{SERVER_V4}:51820"]
    assert peer.next("up")["endpoint"] == f"{SERVER_V4}:51820"
    assert address_of(answer).network == overlay_prefix()
    ping(net.machine, SERVER)
    ping(net.server, address_of(answer).ip)
    transfer(net.server, net.machine, str(address_of(answer).ip))
    transfer(net.machine, net.server, str(SERVER))
    end(server)


@pytest.mark.parametrize("device", ["userspace"])
def test_a_machine_by_the_tunnel_over_tls(net: Net, tmp_path: Path, device: str) -> None:
    """The certificate names an address. Bulk traffic makes grpc-go measure by PINGs, which is no flood."""
    root = make_certificate("a root")
    (tmp_path / "root.pem").write_text(root.certificate_pem)
    (tmp_path / "server.pem").write_text(root.sign(SERVER_V4).pem)
    server = serve(net, "--no-state", "--tls-cert", str(tmp_path / "server.pem"), "--device", device)
    peer = machine(net, "-tunnel", "-ca", str(tmp_path / "root.pem"))
    answer = peer.next("provisioned")
    peer.next("up")
    virtual = answer["fields"]["6"]
    assert answer["fields"]["1"] == virtual
    assert IPv6Address(virtual[0].rpartition(":")[0].strip("[]")) in VIRTUAL_PREFIX
    ping(net.machine, SERVER)
    ping(net.server, address_of(answer).ip)
    transfer(net.server, net.machine, str(address_of(answer).ip))
    transfer(net.machine, net.server, str(SERVER))
    stop(peer.process)
    peer.process.wait()
    assert peer.count("stream opened") <= 1
    end(server)


def test_a_killed_server_comes_back_to_its_streams(net: Net) -> None:
    """The machine opens the next stream only to send, and provisions no more."""
    server = serve(net)
    peer = machine(net, "-tunnel", "-retry", "100ms")
    answer = peer.next("provisioned")
    peer.next("up")
    ping(net.machine, SERVER)
    peer.next("stream opened")
    server.send_signal(signal.SIGKILL)
    server.wait()
    peer.next("stream ended")
    server = serve(net)
    net.machine.popen(["ping", "-q", "-i0.2", str(SERVER)], stdout=subprocess.DEVNULL)
    peer.next("stream opened")
    ping(net.server, address_of(answer).ip)
    ping(net.machine, SERVER)
    assert peer.count("provisioned") == 1
    end(server)


def test_a_machine_that_found_its_link_dead_gets_another_virtual_address_only_when_it_was(net: Net) -> None:
    """It looks every few ms here, and takes each handshake for too old, so it provisions again and again with one key."""
    server = serve(net, "--no-state")
    peer = machine(net, "-tunnel", "-look", "300ms", "-down", "1ms")
    answers = [peer.next("provisioned") for _ in range(4)]
    assert len({json.dumps(answer["fields"]) for answer in answers}) == 1
    # its interface has no address for a moment each time
    until(lambda: "1 received" in net.machine.run(["ping", "-q", "-c1", "-W5", str(SERVER)], check=False))
    end(server)


def go_server(net: Net, *options: str) -> tuple[Peer, str]:
    server = Peer(net.server, "server", "-listen", API, "-token", TOKEN, *options)
    return server, server.next("serving")["key"]


def join(net: Net, url: str, *options: str) -> "subprocess.Popen[str]":
    url += f"{'&' if '?' in url else '?'}jointoken={TOKEN}"
    joined = start(net.machine, "join", url, "--uuid", UUID, "--unique-token", UNIQUE, *options)
    read_until(joined, " connected: ")
    return joined


def test_our_machine_at_a_server_in_go_by_udp(net: Net) -> None:
    server, _ = go_server(net, "-endpoints", f"{SERVER_V4}:50180,[2001:db8::1]:50180")
    joined = join(net, f"grpc://{API}")
    asked = server.next("provision")["fields"]
    assert (asked["1"], asked["3"], asked["4"]) == ([UUID], [TOKEN], [UNIQUE])
    assert asked["5"][0].startswith("v1.")
    ping(net.machine, SERVER)
    transfer(net.machine, net.server, str(SERVER))
    end(joined)


def test_our_machine_at_a_server_in_go_by_the_tunnel(net: Net) -> None:
    """The server ends connections by age, with 3 s for their calls: the stream stays that long, and is then replaced."""
    server, _ = go_server(net, "-max-age", "2s", "-grace", "3s")
    joined = join(net, f"grpc://{API}?grpc_tunnel=true")
    server.next("stream")
    ping(net.machine, SERVER)
    transfer(net.machine, net.server, str(SERVER))
    with pinging(net.machine, SERVER) as pings:
        server.next("stream")
        pings.wait_sent(5)
        server.next("stream")
        pings.wait_sent(5)
    ping(net.machine, SERVER)
    assert server.count("provision") == 1
    end(joined)


def test_our_machine_at_a_server_in_go_with_a_certificate_of_an_address(net: Net, tmp_path: Path) -> None:
    root = make_certificate("a root")
    (tmp_path / "root.pem").write_text(root.certificate_pem)
    (tmp_path / "server.pem").write_text(root.sign(SERVER_V4).pem)
    go_server(net, "-certificate", str(tmp_path / "server.pem"))
    joined = join(net, f"https://{API}?grpc_tunnel=y", "--ca-file", str(tmp_path / "root.pem"))
    ping(net.machine, SERVER)
    end(joined)


if not PROGRAM:
    pytest.exit("run `make test-go-peers`, which builds the program first", returncode=1)
