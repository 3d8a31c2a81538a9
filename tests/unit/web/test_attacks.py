"""Attacks on the page: each is refused, bounded or shown as text, and the page serves others meanwhile."""

import logging
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import anyio
import pytest
from anyio.abc import SocketStream

import siderolink.web.guard
import siderolink.web.live
import siderolink.web.run
from siderolink.common.grpc import ServerCertificate
from siderolink.server import Role
from siderolink.server.store import Transaction
from siderolink.web.guard import Origins
from siderolink.web.sessions import (
    COOKIE,
    MAX_SESSIONS_PER_ACTOR,
    MAX_STREAMS,
    MAX_STREAMS_PER_ACTOR,
    Session,
    Sessions,
    TooManyError,
)
from tests.support.certificates import make_certificate
from tests.unit.web.test_fleet import machine
from tests.unit.web.test_site import Browser, Stage, page

pytestmark = pytest.mark.anyio

MARKUP = "<img src=x onerror=alert(1)>"
STEERING = "\N{RIGHT-TO-LEFT OVERRIDE}\N{ZERO WIDTH SPACE}\x1b[31m\x00\r\n\N{LINE SEPARATOR}"


async def raw(stage: Stage, head: str, body: bytes = b"") -> str:
    """The head of the answer to these bytes; empty if the connection is closed."""
    async with await anyio.connect_tcp("127.0.0.1", stage.port) as stream:
        with anyio.fail_after(60):
            try:
                await stream.send(f"{head}\r\nHost: 127.0.0.1:{stage.port}\r\nConnection: close\r\n\r\n".encode() + body)
                return (await stream.receive(65536)).decode("latin-1").partition("\r\n\r\n")[0]
            except (anyio.EndOfStream, anyio.BrokenResourceError):
                return ""


async def test_paths_do_not_escape_the_site(tmp_path: Path) -> None:
    async with page(tmp_path) as stage:
        browser = await stage.visitor(Role.VIEWER)
        for path in (
            *(
                "/static/../run.py",
                "/static/%2e%2e/run.py",
                "/static/..%2frun.py",
                "/static/%2fetc/passwd",
                "/static//etc/passwd",
            ),
            *(
                "//evil.example/",
                "/\\evil.example",
                "/machines/%0d%0aSet-Cookie:%20x=1",
                "/machines/%00",
                "/tokens/..%2f..%2faudit",
            ),
            *("/live/nowhere", "/machines/", "/machines/x/y", "/%ff", "http://evil.example/"),
        ):
            said = await raw(stage, f"GET {path} HTTP/1.1\r\nCookie: {COOKIE}={browser.cookie}")
            status = int(said.split()[1])
            assert status in (400, 403, 404, 421), (path, said)
            assert "location:" not in said.lower(), path
            assert "x=1" not in said, path


async def test_signing_in_redirects_within_the_site_and_makes_a_new_cookie(tmp_path: Path) -> None:
    async with page(tmp_path) as stage:
        for wanted in (
            "//evil.example",
            "/\\evil.example",
            "https://evil.example",
            "/\r\nSet-Cookie: a=b",
            "evil",
            "/" + "x" * 600,
        ):
            browser = Browser(stage.port, cookie="A" * 43)
            answer = await browser.post("/sign-in", {"key": stage.keys[Role.VIEWER], "next": wanted})
            assert (answer.status, answer.headers["location"]) == (303, "/"), wanted
            assert browser.cookie != "A" * 43
        fixed = Browser(stage.port, cookie="A" * 43)
        assert (await fixed.get("/machines")).status == 303


async def test_too_long_or_incomplete_requests_are_refused(tmp_path: Path) -> None:
    async with page(tmp_path) as stage:
        browser = await stage.visitor(Role.OPERATOR)
        assert (await browser.get("/machines?text=" + "x" * 20_000)).status == 414
        assert (await browser.get("/machines?text=" + "x" * 5_000)).status == 200
        assert (await browser.get("/machines?" + "&".join(f"a{number}=1" for number in range(700)))).status == 200
        assert (await Browser(stage.port, cookie="x" * 9000).get("/machines")).status == 303
        signed_in = f"Cookie: {COOKIE}={browser.cookie}\r\nOrigin: http://127.0.0.1:{stage.port}"
        form = "Content-Type: application/x-www-form-urlencoded"
        for head, wanted in (
            (f"POST /bans HTTP/1.1\r\n{signed_in}\r\n{form}\r\nTransfer-Encoding: chunked", "411"),
            (f"POST /bans HTTP/1.1\r\n{signed_in}\r\n{form}\r\nTransfer-Encoding: chunked\r\nContent-Length: 5", "411"),
            (f"POST /bans HTTP/1.1\r\n{signed_in}\r\n{form}\r\nContent-Length: 99999999", "413"),
            (f"HEAD /live/machines HTTP/1.1\r\n{signed_in}", "405"),
            (f"TRACE /machines HTTP/1.1\r\n{signed_in}", "405"),
            (f"GET /machines HTTP/1.1\r\nX-Long: {'x' * 40_000}", "400"),  # h11 refuses it before it is whole
        ):
            said = await raw(stage, head)
            assert not said or said.split()[1].startswith(wanted), (head[:80], said)
        assert (await stage.admin_server.administration.bans.page()).total == 0


async def test_headers_that_are_judged_come_once(tmp_path: Path) -> None:
    async with page(tmp_path) as stage:
        own = f"Origin: http://127.0.0.1:{stage.port}"
        form = "Content-Type: application/x-www-form-urlencoded"
        browser = await stage.visitor(Role.VIEWER)
        cookie = f"Cookie: {COOKIE}={browser.cookie}"
        for head in (
            f"POST /sign-out HTTP/1.1\r\n{cookie}\r\n{own}\r\nOrigin: https://evil.example\r\n{form}\r\nContent-Length: 0",
            f"POST /sign-out HTTP/1.1\r\n{cookie}\r\n{own}\r\n{form}\r\nContent-Type: text/plain\r\nContent-Length: 0",
            f"GET /live/machines HTTP/1.1\r\n{cookie}\r\nSec-Fetch-Site: same-origin\r\nSec-Fetch-Site: cross-site",
        ):
            assert (await raw(stage, head)).startswith("HTTP/1.1 400 "), head
        assert (await browser.get("/machines")).status == 200, "still signed in"


async def test_malformed_requests_of_strangers_are_no_log_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "uvicorn.error")
    upgrade = (
        "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13"
    )
    async with page(tmp_path) as stage:
        assert (await raw(stage, "GET /sign-in HTTP/1.1\r\nno colon")).startswith("HTTP/1.1 400 ")
        assert (await raw(stage, f"GET /sign-in HTTP/1.1\r\n{upgrade}")).startswith("HTTP/1.1 200 ")
    assert [record.getMessage() for record in caplog.records if record.name.startswith("uvicorn")] == []


async def test_text_of_machines_and_users_is_escaped_in_one_line(tmp_path: Path) -> None:
    async with page(tmp_path) as stage:
        browser = await stage.visitor(Role.ADMIN)
        long = "w" * 10_000
        hostile = replace(
            machine(1),
            name=f"{MARKUP}{STEERING}",
            note=f"{MARKUP}{STEERING}{long}",
            labels={f"a{MARKUP}": STEERING, long: long},
            talos_version=f"v1{MARKUP}{STEERING}",
            last_endpoint=f"{MARKUP}{STEERING}",
        )

        async def work(transaction: Transaction) -> None:
            await transaction.insert(hostile)

        await stage.admin_server.manager.store.transact(work)
        await stage.admin_server.manager.reconciler.load()
        for path in ("/machines", f"/machines/{hostile.id}"):
            with anyio.fail_after(60):
                while "&lt;img src=x" not in (text := (await browser.get(path)).text):
                    await anyio.sleep(0.05)  # the page follows the list
            assert "<img" not in text
            for steering in (one for one in STEERING if not one.isspace() and one not in "[31m"):
                assert steering not in text, (path, steering)
            assert len(text) < 40_000


@asynccontextmanager
async def following(stage: Stage, browser: Browser) -> AsyncIterator[SocketStream]:
    async with await anyio.connect_tcp("127.0.0.1", stage.port) as stream:
        head = f"GET /live/machines HTTP/1.1\r\nHost: {browser.host}\r\nSec-Fetch-Site: same-origin\r\n"
        await stream.send(f"{head}Cookie: {COOKIE}={browser.cookie}\r\n\r\n".encode())
        with anyio.fail_after(60):
            assert b" 200 " in await stream.receive()
        yield stream


@pytest.mark.parametrize("end", ["key", "role"])
async def test_a_stream_ends_with_its_key_or_role(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    monkeypatch.setattr(siderolink.web.live, "EVERY", 0.05)
    async with page(tmp_path) as stage:
        key, secret = await stage.admin_server.administration.api_keys.create("short", Role.OPERATOR)
        browser = Browser(stage.port)
        await browser.sign_in(secret)

        async def work(transaction: Transaction) -> None:
            await transaction.put_principal(replace(key, role=Role.VIEWER))

        async with following(stage, browser) as stream:
            if end == "key":
                await stage.admin_server.administration.api_keys.revoke("short")
            else:
                await stage.admin_server.manager.store.transact(work)
            said = b""
            with anyio.fail_after(60):
                while b"signed-out" not in said:
                    said += await stream.receive()
        assert (await browser.get("/machines")).status == 303


async def test_one_visitor_cannot_use_up_all_connections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a proxy, where all connections are the proxy's."""
    monkeypatch.setattr(siderolink.web.guard, "MAX_REQUESTS_PER_VISITOR", 2)
    async with page(tmp_path, origins=("https://fleet.example.com",), proxies=("127.0.0.1",)) as stage:
        browser = await stage.visitor(Role.VIEWER)
        async with following(stage, browser), following(stage, browser):
            assert (await browser.get("/sign-in")).status == 429
            assert (await browser.get("/sign-in", x_forwarded_for="198.51.100.7")).status == 200
        with anyio.fail_after(60):
            while (await browser.get("/sign-in")).status != 200:
                await anyio.sleep(0.05)


async def test_connections_without_tls_are_dropped_and_leave_room_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(siderolink.web.run, "MAX_CONNECTIONS_PER_ADDRESS", 3)
    file = tmp_path / "tls.pem"
    file.write_text(make_certificate("a root").sign("127.0.0.1").pem)
    trusting = ssl.create_default_context()
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    hello = ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        trusting.wrap_bio(ssl.MemoryBIO(), hello, server_hostname="x").do_handshake()
    begun = (b"", hello.read(50), b"GET / HTTP/1.1")

    async def is_ended(stream: SocketStream) -> None:
        """With a TLS alert if the bytes were not TLS."""
        with anyio.fail_after(60), suppress(anyio.EndOfStream, anyio.BrokenResourceError):
            while await stream.receive():
                pass

    async with page(tmp_path, ServerCertificate(file)) as stage, AsyncExitStack() as stack:
        silent = [await stack.enter_async_context(await anyio.connect_tcp("127.0.0.1", stage.port)) for _ in range(3)]
        await is_ended(await stack.enter_async_context(await anyio.connect_tcp("127.0.0.1", stage.port)))
        elsewhere = await anyio.connect_tcp(
            "127.0.0.1", stage.port, local_host="127.0.0.2", ssl_context=trusting, tls=True, tls_standard_compatible=False
        )
        async with elsewhere:
            await elsewhere.send(b"GET /sign-in HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n\r\n" % stage.port)
            assert (await elsewhere.receive()).startswith(b"HTTP/1.1 200")
        for stream in silent:
            await stream.aclose()
        monkeypatch.setattr(siderolink.web.run, "REQUEST_SECONDS", 0.2)
        for said in begun:
            async with await anyio.connect_tcp("127.0.0.1", stage.port) as stream:
                if said:
                    await stream.send(said)
                await is_ended(stream)


async def test_one_key_cannot_use_up_all_sessions_and_streams() -> None:
    sessions = Sessions()
    _, other = sessions.begin("other", "other", "viewer", "192.0.2.1")
    own = [sessions.begin("key", "one", "viewer", "192.0.2.2")[1] for _ in range(3 * MAX_SESSIONS_PER_ACTOR)]
    assert not other.is_over
    assert sum(not one.is_over for one in own) == MAX_SESSIONS_PER_ACTOR

    with ExitStack() as stack:

        def opened(session: Session) -> int:
            count = 0
            for _ in range(MAX_STREAMS + 1):
                with suppress(TooManyError):
                    stack.enter_context(sessions.streaming(session))
                    count += 1
            return count

        assert sum(opened(one) for one in own if not one.is_over) == MAX_STREAMS_PER_ACTOR
        assert opened(other) == MAX_STREAMS


@pytest.mark.parametrize("referer", ["http://[", "//[x]", "http://a\N{ADDRESSED TO THE SUBJECT}b/", "//evil.example/x"])
async def test_an_unknown_form_redirects_to_the_first_page(tmp_path: Path, referer: str) -> None:
    async with page(tmp_path) as stage:
        browser = await stage.visitor(Role.VIEWER)
        answer = await browser.post("/bans", {"name": "x"}, referer=referer.encode().decode("latin-1"))
        assert (answer.status, answer.headers["location"]) in ((303, "/"), (303, "/x"))


def test_the_first_label_of_a_certificates_name_is_one() -> None:
    origins = Origins(frozenset(), ("https://*.example.com:8096",))
    for host in ("fleet.example.com:8096", "FLEET-1.example.com:8096", "my_fleet.example.com:8096"):
        assert origins.has_host(host)
    for label in ("[x", "a@b", "x:1", "x/y", "x#", "x?", "", "*", " ", "\N{FULLWIDTH SOLIDUS}", "a.b"):
        assert not origins.has_host(f"{label}.example.com:8096"), label
