"""A TLS handshake begins when its ClientHello is there, and when it is its source's turn."""

import asyncio
import contextlib
import socket
import ssl
from pathlib import Path

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from siderolink.common.grpc import Limits, Refusal, client_tls, open_channel, serve, server_tls
from siderolink.common.grpc.handshakes import SECOND_HELLOS
from siderolink.common.grpc.tls import hello_bytes, may_need_another, wait_for_hello
from siderolink.common.grpc.turns import Turns
from tests.support.api import Raw, Service, method
from tests.support.certificates import make_certificate

pytestmark = pytest.mark.anyio


def client_hello() -> bytes:
    """A client's first bytes."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["h2"])
    outgoing = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="test")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


HELLO = client_hello()


def in_records(message: bytes, size: int) -> bytes:
    pieces = [message[start : start + size] for start in range(0, len(message), size)]
    return b"".join(b"\x16\x03\x01" + len(piece).to_bytes(2) + piece for piece in pieces)


@given(st.integers(1, 600), st.integers(0, 4000), st.binary(max_size=9))
def test_a_client_hello_is_complete_with_its_last_record(record: int, cut: int, more: bytes) -> None:
    wire = in_records(HELLO[5:], record)
    assert hello_bytes(wire + more) == len(wire)
    if cut < len(wire):
        assert cut < hello_bytes(wire[:cut]) <= len(wire)


@given(st.binary(max_size=40_000))
def test_other_bytes_are_not_waited_for(data: bytes) -> None:
    if data[:1] != b"\x16":
        assert hello_bytes(data) <= max(len(data), 5)
    assert hello_bytes(data) < 40_000


def connected() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        theirs = socket.create_connection(listening.getsockname())
        theirs.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        ours, _ = listening.accept()
    ours.setblocking(False)
    return ours, theirs


@pytest.mark.parametrize("size", [1, 7, 100, 10_000])
async def test_waiting_leaves_the_bytes_in_the_socket(size: int) -> None:
    ours, theirs = connected()
    with ours, theirs:
        waiting = asyncio.create_task(wait_for_hello(ours))
        for start in range(0, len(HELLO), size):
            assert not waiting.done()
            theirs.sendall(HELLO[start : start + size])
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        await waiting
        assert ours.recv(10_000) == HELLO


async def test_a_closed_connection_ends_the_wait() -> None:
    ours, theirs = connected()
    with ours:
        theirs.sendall(HELLO[:20])
        theirs.close()
        await wait_for_hello(ours)


async def test_a_burst_of_handshakes_takes_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a time slice of zero, each turn of the event loop runs one handshake."""
    monkeypatch.setattr("siderolink.common.grpc.turns.TURN_SECONDS", -1.0)
    asked: list[float] = []
    real = Turns.wait

    async def wait(turns: Turns, source: str, seconds: float, *, is_known: bool) -> None:
        asked.append(seconds)
        await real(turns, source, seconds, is_known=is_known)

    monkeypatch.setattr(Turns, "wait", wait)
    root = make_certificate("the root")
    (tmp_path / "server.pem").write_text(root.sign("localhost").pem)
    context = server_tls(tmp_path / "server.pem")
    async with serve([Service()], host="127.0.0.1", tls=context, limits=Limits(preface_timeout=5)) as server:
        crowd = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(30)]
        for _, writer in crowd:
            writer.write(HELLO[:-1])
        await anyio.sleep(0.1)
        assert not asked
        for _, writer in crowd:
            writer.write(HELLO[-1:])
        for reader, writer in crowd:
            assert (await reader.readexactly(1))[0] in (0x15, 0x16)
            writer.transport.abort()
        assert asked == [0.001] * 30
        tls = client_tls(extra_roots=root.certificate_pem)
        async with open_channel("localhost", server.port, tls) as channel:
            assert (await method(channel)(Raw(b"x"))).data == b"x"


async def test_an_incomplete_hello_times_out(tmp_path: Path) -> None:
    (tmp_path / "server.pem").write_text(make_certificate("localhost").pem)
    context = server_tls(tmp_path / "server.pem")
    async with serve([Service()], host="127.0.0.1", tls=context, limits=Limits(preface_timeout=0.2)) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(HELLO[:50])
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
        writer.close()
        assert server.refusals == {Refusal.TLS_HANDSHAKE_FAILED: 1}


def changed(hello: bytes, kind: int, data: bytes) -> bytes:
    """The hello with another content of an extension."""
    message = hello[5:]
    pos = 4 + 2 + 32
    pos += 1 + message[pos]
    pos += 2 + int.from_bytes(message[pos : pos + 2])
    pos += 1 + message[pos]
    first, extensions, pos = message[4:pos], b"", pos + 2
    while pos < len(message):
        size = int.from_bytes(message[pos + 2 : pos + 4])
        is_it = int.from_bytes(message[pos : pos + 2]) == kind
        extensions += kind.to_bytes(2) + len(data).to_bytes(2) + data if is_it else message[pos : pos + 4 + size]
        pos += 4 + size
    body = first + len(extensions).to_bytes(2) + extensions
    return in_records(b"\x01" + len(body).to_bytes(3) + body, 10_000)


NO_SHARE = changed(HELLO, 51, b"\0\0")
"""It asks which group the server wants."""


def test_which_hellos_may_need_a_retry() -> None:
    ordinary = changed(HELLO, 10, b"\0\4\0\x1d\0\x17")
    assert not may_need_another(ordinary)
    assert not may_need_another(in_records(ordinary[5:], 50))
    assert may_need_another(NO_SHARE)
    assert may_need_another(changed(ordinary, 51, b"\0\x06\0\x18\0\2xx"))
    assert may_need_another(changed(ordinary, 10, b"\0\4\x11\xec\0\x1d")), "a newer server asks for the newer group"
    assert not may_need_another(changed(NO_SHARE, 43, b"\2\3\3")), "TLS 1.2 has no second one"


@given(st.binary(max_size=2000), st.integers(0, 600))
def test_any_bytes_are_classified(data: bytes, cut: int) -> None:
    may_need_another(data)
    may_need_another(HELLO[:cut] + data)


async def test_few_handshakes_with_a_second_hello_run_at_a_time(tmp_path: Path) -> None:
    root = make_certificate("the root")
    (tmp_path / "server.pem").write_text(root.sign("localhost").pem)
    context = server_tls(tmp_path / "server.pem")
    most = SECOND_HELLOS
    async with serve([Service()], host="127.0.0.1", tls=context) as server:
        crowd = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(3 * most)]
        for _, writer in crowd:
            writer.write(NO_SHARE)
        answers = [asyncio.create_task(reader.readexactly(1)) for reader, _ in crowd]
        while sum(answer.done() for answer in answers) < most:
            await anyio.sleep(0.01)
        async with open_channel("localhost", server.port, client_tls(extra_roots=root.certificate_pem)) as channel:
            assert (await method(channel)(Raw(b"x"))).data == b"x", "an ordinary one does not wait"
        assert sum(answer.done() for answer in answers) == most
        for answer, (_, writer) in zip(answers, crowd, strict=True):
            if answer.done():
                writer.transport.abort()
        while sum(answer.done() for answer in answers) < 2 * most:
            await anyio.sleep(0.01)
        for answer, (_, writer) in zip(answers, crowd, strict=True):
            answer.cancel()
            writer.transport.abort()
