"""The origin of connections and calls as reported by trusted proxies: the parsers, and a server behind such proxies."""

import asyncio
import contextlib
import ipaddress
import socket
import ssl
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest
from grpclib.exceptions import StreamTerminatedError
from hypothesis import given
from hypothesis import strategies as st

from siderolink.common.errors import ConfigurationError
from siderolink.common.grpc import (
    ByteStream,
    ByteStreamService,
    GRPCError,
    Limits,
    Refusal,
    Servable,
    Status,
    TrustedProxies,
    open_byte_stream,
    open_channel,
    parse_networks,
    serve,
    server_tls,
)
from siderolink.common.grpc import sources as sources_module
from siderolink.common.grpc.sources import MAX_HEADER_BYTES, SIGNATURE, BadHeaderError, contains, parse_header, read_header
from siderolink.common.grpc.turns import CALL_SECONDS, Turns
from tests.support.api import ECHO, Raw, Service, Tokens, method
from tests.support.certificates import make_certificate
from tests.support.http2 import PREFACE, RawPeer

LOOPBACK = parse_networks(["127.0.0.0/8"], "an option")
PROXIES = TrustedProxies(protocol_from=LOOPBACK)
ports = st.integers(0, 65535)


def v1(source: str, port: int, target: str = "192.0.2.9", target_port: int = 443) -> bytes:
    family = "TCP6" if ":" in source else "TCP4"
    target = "2001:db8::9" if ":" in source else target
    return f"PROXY {family} {source} {target} {port} {target_port}\r\n".encode()


def v2(source: str, port: int, extra: bytes = b"", command: int = 0x21) -> bytes:
    ip = ipaddress.ip_address(source)
    addresses = ip.packed + ip.packed + struct.pack("!HH", port, 443)
    family = 0x11 if ip.version == 4 else 0x21
    return SIGNATURE + struct.pack("!BBH", command, family, len(addresses) + len(extra)) + addresses + extra


@given(st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)), ports, st.binary(max_size=400))
def test_a_written_proxy_header_is_read_back(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int, extra: bytes
) -> None:
    source = str(address)
    if "%" not in source:
        assert parse_header(v1(source, port)) == (source, port)
        assert parse_header(v2(source, port, extra)) == (source, port)
        assert parse_header(v2(source, port, extra, command=0x20)) is None


@given(st.binary(max_size=600))
def test_any_other_bytes_raise_the_one_error(data: bytes) -> None:
    for header in (data, b"PROXY " + data + b"\r\n", SIGNATURE + data):
        with contextlib.suppress(BadHeaderError):
            found = parse_header(header)
            assert found is None or (str(ipaddress.ip_address(found[0])), 0 <= found[1] <= 65535) == (found[0], True)


@pytest.mark.parametrize(
    "header",
    [
        b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2",
        b"PROXY TCP4 192.0.2.1 192.0.2.2 1\r\n",
        b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2 3\r\n",
        b"PROXY TCP4  192.0.2.1 192.0.2.2 1 2\r\n",
        b"PROXY TCP4 192.0.2.01 192.0.2.2 1 2\r\n",
        b"PROXY TCP4 192.0.2.1 192.0.2.2 01 2\r\n",
        b"PROXY TCP4 192.0.2.1 192.0.2.2 65536 2\r\n",
        b"PROXY TCP4 192.0.2.1 192.0.2.2 -1 2\r\n",
        b"PROXY TCP4 2001:db8::1 192.0.2.2 1 2\r\n",
        b"PROXY TCP6 192.0.2.1 192.0.2.2 1 2\r\n",
        b"PROXY TCP6 fe80::1%eth0 fe80::2 1 2\r\n",
        b"PROXY UDP4 192.0.2.1 192.0.2.2 1 2\r\n",
        b"proxy TCP4 192.0.2.1 192.0.2.2 1 2\r\n",
        b"PROXY \r\n",
        b"PROXY UNKNOWN " + b"x" * 100 + b"\r\n",
        SIGNATURE + b"\x21\x11\x00\x0b" + bytes(11),
        SIGNATURE + b"\x21\x12\x00\x0c" + bytes(12),
        SIGNATURE + b"\x11\x11\x00\x0c" + bytes(12),
        SIGNATURE + b"\x22\x11\x00\x0c" + bytes(12),
        SIGNATURE + b"\x21\x21\x00\x0c" + bytes(12),
        SIGNATURE,
    ],
)
def test_malformed_proxy_headers_are_refused(header: bytes) -> None:
    with pytest.raises(BadHeaderError):
        parse_header(header)


def test_local_connections_of_the_proxy_have_no_client_address() -> None:
    for header in (b"PROXY UNKNOWN\r\n", b"PROXY UNKNOWN ffff::1 ffff::2 1 2\r\n", SIGNATURE + b"\x20\x00\x00\x00"):
        assert parse_header(header) is None
    assert parse_header(SIGNATURE + b"\x21\x31\x00\xd8" + bytes(216)) is None


HEADERS = [
    b"PROXY UNKNOWN\r\n",
    v1("192.0.2.1", 1),
    v1("2001:db8::1", 65535),
    v2("192.0.2.1", 1),
    v2("2001:db8::1", 1, bytes(484)),
    SIGNATURE + b"\x20\x00\x00\x00",
]


@pytest.mark.anyio
@pytest.mark.parametrize("header", HEADERS, ids=range(len(HEADERS)))
@pytest.mark.parametrize("pace", [1, 7, 10_000])
async def test_not_a_byte_beyond_the_header_is_read(header: bytes, pace: int) -> None:
    """The header whole, byte by byte, and with data in the same segment."""
    near, far = socket.socketpair()
    with near, far:
        near.setblocking(False)
        whole = header + b"PRI * HTTP/2.0"

        async def send() -> None:
            for at in range(0, len(whole), pace):
                far.send(whole[at : at + pace])
                await asyncio.sleep(0)

        found, _ = await asyncio.gather(read_header(near), send())
        assert found == parse_header(header)
        assert near.recv(100) == b"PRI * HTTP/2.0"


@pytest.mark.anyio
@pytest.mark.parametrize(
    "data",
    [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03abcdefgh",
        b"PROXY TCP4 " + b"1" * 200,
        b"PROXY " + b"\r" * 200,
        SIGNATURE + b"\x21\x11" + struct.pack("!H", MAX_HEADER_BYTES - 15) + bytes(600),
        SIGNATURE + b"\x21\x11\xff\xff",
    ],
)
async def test_a_missing_header_is_refused_within_536_bytes(data: bytes) -> None:
    near, far = socket.socketpair()
    with near, far:
        near.setblocking(False)
        far.send(data)
        with pytest.raises(BadHeaderError):
            await read_header(near)
        left = len(near.recv(10_000)) if len(data) > 20 else 0
        assert len(data) - left <= MAX_HEADER_BYTES


@pytest.mark.anyio
async def test_a_server_behind_proxies_that_speak_the_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_certificate("root")
    (tmp_path / "pem").write_text(root.sign("127.0.0.1").pem)
    peers: list[object] = []

    class Names(Service):
        async def call(self, stream: object) -> None:
            peers.append(stream.peer.addr())  # type: ignore[attr-defined]
            await super().call(stream)  # type: ignore[arg-type]

    for tls in (None, server_tls(tmp_path / "pem")):
        async with serve([Names()], host="127.0.0.1", tls=tls, proxies=PROXIES) as server:
            for header, address in (
                (v1("192.0.2.1", 7), ("192.0.2.1", 7)),
                (v2("2001:db8::1", 8, bytes(100)), ("2001:db8::1", 8)),
            ):
                async with relay(server.port, header) as port:
                    trusting = None if tls is None else ssl.create_default_context(cadata=root.certificate_pem)
                    async with open_channel("127.0.0.1", port, trusting) as channel:
                        assert (await method(channel)(Raw(b"x"), timeout=30)).data == b"x"
                assert peers.pop() == address
            with monkeypatch.context() as patch:
                patch.setattr(sources_module, "HEADER_SECONDS", 0.2)
                for nothing in (b"", b"PROXY TCP4 ", PREFACE):
                    async with RawPeer.connect(server.port) as peer:
                        peer.write(nothing)
                        assert await peer.until_closed() == []
            assert server.refusals == {Refusal.BAD_PROXY_HEADER: 3}
            while server.connections:
                await asyncio.sleep(0.01)


@pytest.mark.anyio
async def test_clients_other_than_the_proxy_are_refused() -> None:
    proxies = TrustedProxies(protocol_from=parse_networks(["192.0.2.0/24", "::1"], "an option"))
    async with serve([Service()], host="127.0.0.1", proxies=proxies) as server:
        async with RawPeer.connect(server.port) as peer:
            peer.write(v1("192.0.2.1", 1) + PREFACE)
            assert await peer.until_closed() == []
        assert server.refusals == {Refusal.NOT_FROM_PROXY: 1}


@pytest.mark.anyio
async def test_limits_per_address_apply_to_clients_behind_a_proxy() -> None:
    limits = Limits(max_connections_per_address=2, crowded_from=0)
    async with serve([Service()], host="127.0.0.1", limits=limits, proxies=PROXIES) as server:
        async with contextlib.AsyncExitStack() as stack:
            for number in range(3):
                for _ in range(2):
                    peer = await stack.enter_async_context(RawPeer.connect(server.port))
                    peer.write(v1(f"192.0.2.{number}", 1) + PREFACE)
            while server.connections < 6:
                await asyncio.sleep(0.01)
            async with RawPeer.connect(server.port) as peer:
                peer.write(v1("192.0.2.1", 1) + PREFACE)
                await peer.until_closed()
            assert server.refusals == {Refusal.TOO_MANY_CONNECTIONS_FROM_ADDRESS: 1}


@contextlib.asynccontextmanager
async def relay(target: int, header: bytes) -> AsyncIterator[int]:
    """A proxy that speaks the protocol; gives its port."""

    async def serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", target)
        far_writer.write(header)

        async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                while data := await source.read(65536):
                    sink.write(data)
            sink.close()

        await asyncio.gather(copy(reader, far_writer), copy(far_reader, writer))

    server = await asyncio.start_server(serve_one, "127.0.0.1")
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


FORWARDED = TrustedProxies(forwarded_from=parse_networks(["127.0.0.0/8", "10.0.0.0/8", "fd00::/8"], "an option"))


@pytest.mark.parametrize(
    ("peer", "fields", "address"),
    [
        ("127.0.0.1", ["192.0.2.1"], "192.0.2.1"),
        ("::ffff:127.0.0.1", ["192.0.2.1"], "192.0.2.1"),
        ("127.0.0.1", ["198.51.100.1, 192.0.2.1"], "192.0.2.1"),
        ("127.0.0.1", ["198.51.100.1", "192.0.2.1"], "192.0.2.1"),
        ("127.0.0.1", ["198.51.100.1, 192.0.2.1, 10.0.0.1,fd00::2"], "192.0.2.1"),
        ("127.0.0.1", ["10.0.0.2, 10.0.0.1"], "10.0.0.2"),
        ("127.0.0.1", ["192.0.2.1:4711"], "192.0.2.1"),
        ("127.0.0.1", ["[2001:db8::1]:4711"], "2001:db8::1"),
        ("127.0.0.1", ["[2001:db8::1]"], "2001:db8::1"),
        ("127.0.0.1", ["2001:DB8::1"], "2001:db8::1"),
        ("127.0.0.1", ["192.0.2.1, unknown"], "127.0.0.1"),
        ("127.0.0.1", ["192.0.2.1, unknown, 10.0.0.1"], "10.0.0.1"),
        ("127.0.0.1", ["192.0.2.1, "], "127.0.0.1"),
        ("127.0.0.1", [""], "127.0.0.1"),
        ("127.0.0.1", [], "127.0.0.1"),
        ("127.0.0.1", ["fe80::1%eth0"], "127.0.0.1"),
        ("127.0.0.1", ["[192.0.2.1]"], "127.0.0.1"),
        ("127.0.0.1", ["192.0.2.1:x"], "127.0.0.1"),
        ("192.0.2.77", ["198.51.100.1"], "192.0.2.77"),
    ],
)
def test_the_rightmost_address_outside_the_proxies_counts(peer: str, fields: list[str], address: str) -> None:
    assert FORWARDED.forwarded_for(peer, fields) == address


@given(st.lists(st.text(max_size=80), max_size=5))
def test_any_forwarded_field_gives_an_address_or_none(fields: list[str]) -> None:
    ipaddress.ip_address(FORWARDED.forwarded_for("127.0.0.1", fields))


@given(st.text(max_size=60), st.ip_addresses(v=4))
def test_forwarded_fields_of_clients_are_ignored(forged: str, client: ipaddress.IPv4Address) -> None:
    """A proxy appends the address that it saw to what the client sent."""
    if not contains(FORWARDED.forwarded_from, str(client)):
        assert FORWARDED.forwarded_for("127.0.0.1", [f"{forged}, {client}"]) == str(client)


@pytest.mark.anyio
async def test_calls_and_streams_by_a_proxy_that_forwards() -> None:
    found: list[object] = []

    class Names(Service):
        async def call(self, stream: object) -> None:
            found.append(stream.peer.addr())  # type: ignore[attr-defined]
            await super().call(stream)  # type: ignore[arg-type]

    async def name(stream: ByteStream) -> None:
        found.append(stream.peer_name)

    services: list[Servable] = [Names(), ByteStreamService({ECHO: name})]
    async with serve(services, host="127.0.0.1", proxies=FORWARDED) as server:
        async with open_channel("127.0.0.1", server.port) as channel:
            await method(channel)(Raw(b"x"), metadata={"x-forwarded-for": "198.51.100.1, 192.0.2.1"}, timeout=30)
            async with open_byte_stream(channel, ECHO, {"x-forwarded-for": "192.0.2.2"}) as stream:
                await stream.wait_ended()
            await method(channel)(Raw(b"x"), timeout=30)
    assert found[:2] == [("192.0.2.1", 0), "192.0.2.2:0"]
    assert isinstance(found[2], tuple)
    assert found[2][0] == "127.0.0.1"


@pytest.mark.anyio
@pytest.mark.parametrize("proxies", [TrustedProxies(), PROXIES])
async def test_an_ipv4_caller_has_one_address_on_a_socket_for_both_families(proxies: TrustedProxies) -> None:
    """Its UDP endpoint is IPv4, too: as two texts it would be two sources, and a move between them a change of address."""
    found: list[str] = []

    async def name(stream: ByteStream) -> None:
        found.append(stream.peer_name.rpartition(":")[0])

    header = v2("::ffff:192.0.2.1", 8) if proxies.protocol_from else b""
    async with serve([ByteStreamService({ECHO: name})], host=None, proxies=proxies) as server:
        async with relay(server.port, header) as port, open_channel("127.0.0.1", port) as channel:
            async with open_byte_stream(channel, ECHO, {}) as stream:
                await stream.wait_ended()
    assert found == ["192.0.2.1" if proxies.protocol_from else "127.0.0.1"]


@pytest.mark.anyio
async def test_limits_per_address_apply_to_forwarded_callers() -> None:
    """The proxy's own connections meet no limit; the calls of one address behind it do, and tokens make it known."""
    limits = Limits(max_connections=20, max_connections_per_address=2, max_unproven_connections=6, crowded_from=0)
    service = Tokens()
    async with serve([service], host="127.0.0.1", limits=limits, proxies=FORWARDED, has_tokens=True) as server:
        async with open_channel("127.0.0.1", server.port) as channel, anyio.create_task_group() as tasks:
            statuses: list[Status] = []

            async def call(source: str, data: bytes = b"x") -> None:
                try:
                    await method(channel)(Raw(data), metadata={"x-forwarded-for": source}, timeout=10)
                except GRPCError as error:
                    statuses.append(error.status)
                except StreamTerminatedError:
                    statuses.append(Status.ABORTED)

            service.hold.clear()
            for number in range(3):
                for _ in range(3):
                    tasks.start_soon(call, f"192.0.2.{number}")
            while len(statuses) < 3:
                await anyio.sleep(0.01)
            assert statuses == [Status.RESOURCE_EXHAUSTED] * 3
            # six strangers' calls run; another address takes the place of one of theirs
            tasks.start_soon(call, "198.51.100.1", b"valid")
            while len(statuses) < 4:
                await anyio.sleep(0.01)
            assert statuses[3] is Status.ABORTED
            for _ in range(3):
                async with open_channel("127.0.0.1", server.port) as other:
                    await other.connect()
            service.hold.set()
        assert statuses == [Status.RESOURCE_EXHAUSTED] * 3 + [Status.ABORTED]
        assert server.refusals == {Refusal.TOO_MANY_CONNECTIONS_FROM_ADDRESS: 3, Refusal.CROWDED_OUT: 1}


@pytest.mark.anyio
async def test_forwarded_calls_are_charged_to_their_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory and processor time: one client behind the proxy reaches its limit; the others and the proxy do not."""
    waited: list[str] = []
    real = Turns.wait

    async def wait(turns: Turns, source: str, seconds: float = CALL_SECONDS, *, is_known: bool) -> None:
        waited.append(source)
        await real(turns, source, seconds, is_known=is_known)

    monkeypatch.setattr(Turns, "wait", wait)
    limits = Limits(max_unproven_call_bytes=4 * 40_000)  # two calls of a stranger at a time
    service = Tokens()
    refused: list[str] = []
    answered: list[str] = []
    async with (
        serve([service], host="127.0.0.1", limits=limits, proxies=FORWARDED, has_tokens=True) as server,
        open_channel("127.0.0.1", server.port) as channel,
        anyio.create_task_group() as tasks,
    ):

        async def call(source: str, data: bytes = b"x") -> None:
            try:
                await method(channel)(Raw(data), metadata={"x-forwarded-for": source}, timeout=60)
                answered.append(source)
            except GRPCError as error:
                refused.append(source if error.status is Status.RESOURCE_EXHAUSTED else str(error))

        await call("192.0.2.2", b"valid")
        service.hold.clear()
        for _ in range(5):
            tasks.start_soon(call, "192.0.2.1")
        while len(refused) < 3:
            await anyio.sleep(0.01)
        for source in ["192.0.2.2"] * 5 + ["192.0.2.3"] * 2:
            tasks.start_soon(call, source)
        while waited.count("192.0.2.3") < 2:
            await anyio.sleep(0.01)
        service.hold.set()
    assert refused == ["192.0.2.1"] * 3
    assert sorted(answered) == ["192.0.2.1"] * 2 + ["192.0.2.2"] * 6 + ["192.0.2.3"] * 2
    assert server.refusals == {Refusal.CALL_MEMORY: 3}
    assert sorted(waited) == ["192.0.2.1"] * 2 + ["192.0.2.2"] + ["192.0.2.3"] * 2, "a known one's calls do not wait"


@pytest.fixture
def quiet() -> None:
    """Reached limits are logged."""


@pytest.mark.parametrize("text", ["", "192.0.2.1/24", "proxy.example", "192.0.2.0/33", "*"])
def test_an_invalid_network_is_refused_with_the_option_name(text: str) -> None:
    with pytest.raises(ConfigurationError, match="forwarded_from takes a network"):
        parse_networks([text], "forwarded_from")


def test_networks_are_parsed() -> None:
    networks = parse_networks(["192.0.2.0/24", "2001:db8::1"], "an option")
    assert contains(networks, "192.0.2.255")
    assert contains(networks, "::ffff:192.0.2.1")
    assert contains(networks, "2001:db8::1")
    assert not contains(networks, "2001:db8::2")
    assert not contains(networks, "no address")
