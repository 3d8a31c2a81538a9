"""Dialling: one socket of several attempts is kept, host names cannot smuggle, and private CAs are taken on every Python."""

import asyncio
import datetime
import errno
import ipaddress
import re
import socket
import ssl
import struct
import threading
from pathlib import Path
from typing import Any

import anyio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from siderolink.common.errors import ConfigurationError, ServerUnreachableError, reason_of
from siderolink.common.grpc import Limits, client_tls, open_channel, serve, server_tls, translate_errors
from siderolink.common.grpc.dialing import authority, check_host, connect
from tests.support.api import Raw, Service, method, serving
from tests.support.certificates import make_certificate

pytestmark = pytest.mark.anyio


async def test_of_two_dials_that_finish_in_one_turn_one_socket_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    original = loop.sock_connect
    dialled: list[socket.socket] = []
    both = asyncio.Event()

    async def slow_connect(sock: socket.socket, address: Any) -> None:
        dialled.append(sock)
        await original(sock, address)
        if len(dialled) < 2:
            await both.wait()
        else:  # both continue in the event loop's next turn
            both.set()
            await asyncio.sleep(0)

    with socket.create_server(("127.0.0.1", 0)) as first, socket.create_server(("127.0.0.1", 0)) as second:
        infos = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", listening.getsockname()) for listening in (first, second)]

        async def resolve(*_: object, **__: object) -> list[Any]:
            return infos

        monkeypatch.setattr(loop, "getaddrinfo", resolve)
        monkeypatch.setattr(loop, "sock_connect", slow_connect)
        with await connect("two.test", 1, 60) as kept:
            assert len(dialled) == 2
            assert [sock.fileno() for sock in dialled if sock is not kept] == [-1]


async def test_roots_are_loaded_beside_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenSSL takes tens of milliseconds for those of a system."""
    loaded: list[threading.Thread] = []
    create = ssl.create_default_context

    def create_default_context(*args: Any, **kwargs: Any) -> ssl.SSLContext:
        loaded.append(threading.current_thread())
        return create(*args, **kwargs)

    monkeypatch.setattr("siderolink.common.grpc.tls.ssl.create_default_context", create_default_context)
    async with open_channel("a.test", 1, True):
        pass
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        monkeypatch.setenv("https_proxy", f"https://127.0.0.1:{listening.getsockname()[1]}")
        async with open_channel("a.test", 1, limits=Limits(connect_timeout=60.0)) as channel:
            connecting = asyncio.ensure_future(channel.connect())
            proxy, _ = await asyncio.get_running_loop().sock_accept(listening)
            with proxy:
                assert await asyncio.get_running_loop().sock_recv(proxy, 1), "its first TLS message"
                connecting.cancel()
                await asyncio.wait([connecting])
    assert len(loaded) == 2
    assert threading.main_thread() not in loaded


async def test_a_lookup_may_take_most_of_the_time_limit_that_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    async def resolve(*_: object, **__: object) -> list[Any]:
        return await asyncio.Event().wait()  # type: ignore[return-value]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolve)
    async with open_channel("silent.test", 1, direct=True, limits=Limits(connect_timeout=0.5)) as channel:
        with pytest.raises(ServerUnreachableError, match=r"silent\.test was not resolved within 0\.45 s"):
            await channel.connect()


async def test_the_second_family_is_tried_when_the_first_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as server:
        loop = asyncio.get_running_loop()

        async def resolve(*_: object, **__: object) -> list[Any]:
            return [
                (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", server.port, 0, 0)),
                (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", server.port)),
            ]

        monkeypatch.setattr(loop, "getaddrinfo", resolve)
        async with open_channel("both.test", server.port) as channel:
            assert (await method(channel)(Raw(b"x"))).data == b"x"


@pytest.mark.parametrize(
    "host",
    [
        "",
        "a b",
        "a\r\nX-Evil: 1",
        "a\nb",
        "a\x00b",
        "name:80",
        "user@name",
        "name/path",
        "[::1]",
        "fe80::1%eth0\r\nX: 1",
        "fe80::1%",
        "127.0.0.1%x",
        "a" * 254,
        "\u2028",
        "ex\u00e4mple..com",
        "\ud800",
    ],
)
async def test_an_invalid_host_is_refused_before_a_connection_is_opened(host: str) -> None:
    with pytest.raises(ConfigurationError, match="is neither a host name nor an IP address"):
        async with open_channel(host, 1):
            raise AssertionError("it must not come to this")


async def test_host_names_are_normalised() -> None:
    assert check_host("siderolink.example") == "siderolink.example"
    assert check_host("b\u00fccher.example") == "xn--bcher-kva.example"
    assert authority(check_host("fe80::1%eth0"), 443) == "[fe80::1]:443"
    assert authority(check_host("192.0.2.1"), 443) == "192.0.2.1:443"


async def test_a_host_with_a_line_break_injects_no_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    for host in ("a\r\nProxy-Authorization: x", "a\r\n\r\nGET / HTTP/1.1"):
        with pytest.raises(ConfigurationError):
            async with open_channel(host, 443) as channel:
                await channel.connect()


def _certificate(
    name: str, signer: "tuple[x509.Certificate, ec.EllipticCurvePrivateKey] | None", *, ca: bool
) -> tuple[Any, Any]:
    """A certificate without key identifiers, as many a private CA makes them."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(signer[0].subject if signer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
    )
    if ca:
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=False)
    else:
        names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        builder = builder.add_extension(names, critical=False)
    return builder.sign(signer[1] if signer else key, hashes.SHA256()), key


async def test_a_private_ca_without_key_identifiers_is_trusted(tmp_path: Path) -> None:
    root = _certificate("root", None, ca=True)
    intermediate = _certificate("intermediate", root, ca=True)
    leaf, key = _certificate("leaf", intermediate, ca=False)
    pem = serialization.Encoding.PEM
    (tmp_path / "root").write_bytes(root[0].public_bytes(pem))
    (tmp_path / "intermediate").write_bytes(intermediate[0].public_bytes(pem))
    (tmp_path / "cert").write_bytes(leaf.public_bytes(pem) + intermediate[0].public_bytes(pem))
    (tmp_path / "key").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    async with serve([Service()], host="127.0.0.1", tls=server_tls(tmp_path / "cert", tmp_path / "key")) as server:
        for trusted in ("root", "intermediate"):
            context = client_tls(tmp_path / trusted)
            assert not context.verify_flags & ssl.VerifyFlags.VERIFY_X509_STRICT
            async with open_channel("127.0.0.1", server.port, context) as channel:
                assert (await method(channel)(Raw(b"x"))).data == b"x"
        with pytest.raises(ServerUnreachableError, match="not trusted"), translate_errors():
            async with open_channel("127.0.0.1", server.port, client_tls()) as channel:
                await channel.connect()


@pytest.mark.parametrize(("host", "certified"), [("::1%1", "::1"), ("named.test.", "named.test"), ("NAMED.test", "named.test")])
async def test_a_certificate_names_a_host_without_its_zone_and_its_last_dot(
    host: str, certified: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    resolve = loop.getaddrinfo

    async def resolve_here(name: Any, *args: Any, **options: Any) -> list[Any]:
        return await resolve("::1" if "test" in str(name) else name, *args, **options)

    monkeypatch.setattr(loop, "getaddrinfo", resolve_here)
    root = make_certificate("a root")
    (tmp_path / "root").write_text(root.certificate_pem)
    (tmp_path / "server").write_text(root.sign(certified).pem)
    async with (
        serve([Service()], host="::1", tls=server_tls(tmp_path / "server")) as server,
        open_channel(host, server.port, client_tls(tmp_path / "root"), direct=True) as channel,
    ):
        assert (await method(channel)(Raw(b"x"))).data == b"x"


@pytest.mark.parametrize("use_uvloop", [False, True])
@pytest.mark.parametrize("is_reset", [False, True], ids=["closed", "reset"])
def test_a_connection_that_ends_within_its_tls_handshake_has_a_reason(is_reset: bool, use_uvloop: bool) -> None:
    async def end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        if is_reset:
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    async def dial() -> str:
        async with await asyncio.start_server(end, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            async with open_channel("127.0.0.1", port, True, direct=True) as channel:
                with pytest.raises(ServerUnreachableError) as caught, translate_errors():
                    await channel.connect()
        return str(caught.value)

    assert re.fullmatch(
        r"(.* cannot be reached|no TLS with .*): .*\w.*", anyio.run(dial, backend_options={"use_uvloop": use_uvloop})
    )


async def test_an_error_without_text_has_a_reason() -> None:
    for error in (ConnectionResetError(), ConnectionAbortedError()):
        assert reason_of(error) == "the connection was closed"
    assert reason_of(OSError(errno.EIO, "Input/output error")) == "Input/output error"
    assert reason_of(OSError("other")) == "other"
