"""Calls and byte streams through real proxies of each kind, and through servers that are not proxies."""

import asyncio
import ssl
from collections.abc import Sequence
from pathlib import Path

import anyio
import pytest

from siderolink.common.errors import ServerUnreachableError
from siderolink.common.grpc import (
    ByteStreamService,
    Servable,
    client_tls,
    open_byte_stream,
    open_channel,
    serve,
    server_tls,
    translate_errors,
)
from tests.conftest import descriptor_kinds, opened_since
from tests.support.api import ECHO, Raw, Service, echo, method
from tests.support.certificates import make_certificate
from tests.support.proxy import running_proxy

NAME = "siderolink.test"


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A file with a key and a certificate for NAME; its root lies beside it as ``root``."""
    root = make_certificate("a test root")
    (tmp_path / "root").write_text(root.certificate_pem)
    (tmp_path / "pem").write_text(root.sign(NAME).pem)
    (tmp_path / "here").write_text(root.sign("127.0.0.1").pem)
    return tmp_path / "pem"


@pytest.fixture(params=["http", "https", "socks5"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["plain", "tls"])
def inner(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.anyio
async def test_calls_and_streams_pass(kind: str, inner: str, certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await pass_through(kind, inner, certificate, monkeypatch)


def test_calls_and_streams_pass_on_uvloop(kind: str, inner: str, certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = descriptor_kinds()
    anyio.run(pass_through, kind, inner, certificate, monkeypatch, backend_options={"use_uvloop": True})
    assert not opened_since(before)


async def pass_through(kind: str, inner: str, certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.with_name("root")))
    tls = server_tls(certificate) if inner == "tls" else None
    outer = None
    if kind == "https":
        outer = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        outer.load_cert_chain(certificate.with_name("here"))
    services: list[Servable] = [Service(), ByteStreamService({ECHO: echo})]
    async with (
        serve(services, host="127.0.0.1", tls=tls) as server,
        running_proxy("socks5" if kind == "socks5" else "http", credentials="me:s:cret", tls=outer) as proxy,
    ):
        monkeypatch.setenv("ALL_PROXY", f"{kind}://me:s%3Acret@127.0.0.1:{proxy.port}")
        wanted = client_tls(certificate.with_name("root")) if tls else None
        async with open_channel(NAME, server.port, wanted) as channel:
            assert (await method(channel)(Raw(b"through"), timeout=30)).data == b"through"
            async with open_byte_stream(channel, ECHO) as stream:
                got = bytearray()
                back = asyncio.Event()

                def take(pieces: Sequence[memoryview]) -> None:
                    got.extend(b"".join(pieces))
                    if len(got) >= 50_000:
                        back.set()

                stream.receive(take)
                stream.send(memoryview(bytes(50_000)))
                await asyncio.wait_for(back.wait(), 10)
        assert proxy.asked == [f"{NAME}:{server.port}"]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("kind", "credentials", "says"),
    [("http", "other:word", "it answered 407 Proxy Authentication Required"), ("socks5", "other:word", "uthentication")],
)
async def test_a_proxy_that_refuses_is_one_line(
    kind: str, credentials: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_proxy("socks5" if kind == "socks5" else "http", credentials="me:right") as proxy:
        monkeypatch.setenv("ALL_PROXY", f"{kind}://{credentials}@127.0.0.1:{proxy.port}")
        error = await unreachable()
    assert f"the proxy {kind}://127.0.0.1:{proxy.port} failed: " in error
    assert says in error
    assert "word" not in error.replace("password", "")


@pytest.mark.anyio
async def test_an_absent_proxy_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_proxy() as proxy:
        pass
    monkeypatch.setenv("ALL_PROXY", f"http://127.0.0.1:{proxy.port}")
    assert f"the proxy http://127.0.0.1:{proxy.port} cannot be reached" in await unreachable()


@pytest.mark.anyio
@pytest.mark.parametrize("answer", [b"SSH-2.0-x\r\n\r\n", b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 5000, b""])
async def test_a_server_that_is_no_proxy_is_reported_in_one_line(answer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        if answer:
            await reader.read()
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1")
    try:
        port = server.sockets[0].getsockname()[1]
        monkeypatch.setenv("ALL_PROXY", f"http://127.0.0.1:{port}")
        assert f"the proxy http://127.0.0.1:{port} failed: " in await unreachable()
    finally:
        server.close()


async def unreachable() -> str:
    with pytest.raises(ServerUnreachableError) as caught, translate_errors():
        async with open_channel(NAME, 1) as channel:
            await method(channel)(Raw(b""), timeout=30)
    assert "\n" not in str(caught.value)
    return str(caught.value)
