"""The web UI by plain HTTP: sign-in, refusals, headers of every response; with a real server and API."""

import http.client
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlencode

import anyio
import anyio.to_thread
import pytest

import siderolink.web.run
from siderolink.common.admin_channel import ServerAddress
from siderolink.common.errors import ConfigurationError
from siderolink.common.grpc import ServerCertificate
from siderolink.common.hostport import HostPort
from siderolink.common.tasks import background_tasks
from siderolink.server import Role
from siderolink.server.store import Transaction
from siderolink.web.guard import find_origins, read_origin
from siderolink.web.run import WebOptions, serve_page
from siderolink.web.sessions import COOKIE, MAX_SIGN_INS_PER_SOURCE
from siderolink.web.views import VIEWS
from tests.support.admin_server import AdminServer, open_admin_server
from tests.support.certificates import make_certificate
from tests.support.fake_device import VirtualClock

pytestmark = pytest.mark.anyio


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    text: str


@dataclass
class Browser:
    """A browser's requests: its cookie and the headers that browsers send."""

    port: int
    cookie: str = ""
    origin: str = ""
    source: str = "127.0.0.1"
    sent: dict[str, str] = field(default_factory=dict)

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def get(self, path: str, **headers: str) -> Answer:
        return await anyio.to_thread.run_sync(self._send, "GET", path, None, headers)

    async def post(self, path: str, form: Mapping[str, str], **headers: str) -> Answer:
        given = {"content-type": "application/x-www-form-urlencoded", "origin": f"http://{self.host}"} | headers
        return await anyio.to_thread.run_sync(self._send, "POST", path, urlencode(form), given)

    def _send(self, method: str, path: str, body: str | None, headers: Mapping[str, str]) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60, source_address=(self.source, 0))
        named = {name.replace("_", "-"): value for name, value in headers.items() if value}
        if self.cookie:
            named["cookie"] = f"{COOKIE}={self.cookie}"
        try:
            connection.request(method, path, body, named)
            answer = connection.getresponse()
            found = {name.lower(): value for name, value in answer.getheaders()}
            if (cookie := found.get("set-cookie", "")).startswith(f"{COOKIE}="):
                self.cookie = cookie.partition("=")[2].partition(";")[0].strip('"')
            return Answer(answer.status, found, answer.read().decode())
        finally:
            connection.close()

    async def sign_in(self, key: str) -> Answer:
        return await self.post("/sign-in", {"key": key, "next": "/machines"})


@dataclass(frozen=True, slots=True)
class Stage:
    admin_server: AdminServer
    port: int
    keys: Mapping[Role, str]

    async def visitor(self, role: Role) -> Browser:
        browser = Browser(self.port)
        answer = await browser.sign_in(self.keys[role])
        assert (answer.status, answer.headers["location"]) == (303, "/machines"), answer.text
        return browser


@asynccontextmanager
async def page(
    folder: Path, certificate: ServerCertificate | None = None, *, origins: tuple[str, ...] = (), proxies: tuple[str, ...] = ()
) -> AsyncIterator[Stage]:
    async with open_admin_server(folder) as admin_server, background_tasks() as tasks:
        keys = {role: (await admin_server.administration.api_keys.create(str(role), role))[1] for role in Role}
        ready = anyio.Event()
        found: list[HostPort] = []

        def listening(address: HostPort) -> None:
            found.append(address)
            ready.set()

        server = ServerAddress(host="127.0.0.1", port=admin_server.port, is_plain=True)
        options = WebOptions(
            listen=HostPort("127.0.0.1", 0),
            server=server,
            certificate=certificate,
            origins=origins,
            forwarded_from=proxies,
        )
        tasks.start_soon(serve_page, options, listening)
        await ready.wait()
        yield Stage(admin_server, found[0].port, keys)
        tasks.cancel_scope.cancel()


async def test_signing_in_needs_a_valid_key_and_sets_a_protected_cookie(tmp_path: Path) -> None:
    async with page(tmp_path) as stage:
        stranger = Browser(stage.port)
        for path in (view.path.format(machine="m", token="t") for view in VIEWS):
            answer = await stranger.get(path)
            assert (answer.status, answer.headers["location"].partition("?")[0]) == (303, "/sign-in"), path
        wrong = await stranger.sign_in("slk_wrong")
        assert (wrong.status, stranger.cookie) == (401, "")
        assert "slk_wrong" not in wrong.text
        answer = await stranger.sign_in(stage.keys[Role.VIEWER])
        parts = {part.strip().lower() for part in answer.headers["set-cookie"].split(";")[1:]}
        assert {"secure", "httponly", "samesite=strict", "path=/"} <= parts
        assert not any(part.startswith("domain") for part in parts)
        assert stage.keys[Role.VIEWER] not in answer.headers["set-cookie"]
        assert "viewer" in (await stranger.get("/")).text


async def test_wrong_keys_are_answered_late_and_limited_per_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The delay is the server's, whose clock does not advance here."""
    released = anyio.Event()

    waiting: list[float] = []

    async def sleep(clock: VirtualClock, seconds: float) -> None:
        waiting.append(seconds)
        await released.wait()

    monkeypatch.setattr(VirtualClock, "sleep", sleep)
    async with page(tmp_path) as stage:
        statuses: list[int] = []

        async def guess(number: int) -> None:
            statuses.append((await Browser(stage.port).sign_in(f"slk_{number}")).status)

        await stage.visitor(Role.ADMIN)
        others = len(waiting)
        async with anyio.create_task_group() as guessing:
            for number in range(MAX_SIGN_INS_PER_SOURCE):
                guessing.start_soon(guess, number)
            with anyio.fail_after(60):
                while len(waiting) < others + MAX_SIGN_INS_PER_SOURCE:
                    await anyio.sleep(0.01)
            assert (await Browser(stage.port).sign_in(stage.keys[Role.ADMIN])).status == 429
            assert (await Browser(stage.port, source="127.0.0.2").sign_in(stage.keys[Role.ADMIN])).status == 303
            assert statuses == []
            released.set()
        assert statuses == [401] * MAX_SIGN_INS_PER_SOURCE
        delays = waiting[others : others + MAX_SIGN_INS_PER_SOURCE]
        assert len({round(delay, 3) for delay in delays}) == MAX_SIGN_INS_PER_SOURCE, "each waits longer than the one before"
        await stage.visitor(Role.ADMIN)


async def test_a_session_ends_when_its_key_has_another_role(tmp_path: Path) -> None:
    async with page(tmp_path) as stage:
        browser = await stage.visitor(Role.OPERATOR)

        async def work(transaction: Transaction) -> None:
            (key,) = (one for one in await transaction.principals() if one.role is Role.OPERATOR)
            await transaction.put_principal(replace(key, role=Role.VIEWER))

        await stage.admin_server.manager.store.transact(work)
        with anyio.fail_after(60):
            while (answer := await browser.get("/machines")).status == 200:
                await anyio.sleep(0.01)
        assert answer.status == 303
        assert answer.headers["location"].startswith("/sign-in")
        again = await browser.sign_in(stage.keys[Role.OPERATOR])
        assert (again.status, "Ban a machine" in (await browser.get("/bans")).text) == (303, False)


async def test_every_answer_has_security_headers(tmp_path: Path) -> None:
    async with page(tmp_path) as stage:
        browser = await stage.visitor(Role.ADMIN)
        for path in ("/", "/machines", "/limits", "/servers", "/static/page.js", "/nowhere", "/machines/nobody", "/sign-in"):
            answer = await browser.get(path)
            policy = answer.headers["content-security-policy"]
            assert "unsafe" not in policy
            assert {"default-src 'none'", "frame-ancestors 'none'", "script-src 'self'"} <= set(policy.split("; "))
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["cache-control"] == ("no-cache" if path.startswith("/static") else "no-store")
            assert not {"server", "access-control-allow-origin"} & answer.headers.keys()
            for inline in ("<script>", " style=", " onclick", "javascript:"):
                assert inline not in answer.text or path.endswith(".js"), (path, inline)
        assert {(await browser.get(view.path)).status for view in VIEWS if view.title} == {200}
        assert (await browser.get("/machines/nobody")).status == 404
        assert (await browser.get("/nowhere")).status == 404


async def test_forged_requests_are_refused(tmp_path: Path) -> None:
    async with page(tmp_path) as stage:
        browser = await stage.visitor(Role.OPERATOR)
        ban = {"name": "3e1d4b52-0f8b-4d4d-9a34-1d4e3b7c6a51", "kind": "uuid"}
        for headers in (
            {"origin": "http://evil.example"},
            {"origin": ""},
            {"origin": "null"},
            {"origin": f"https://127.0.0.1:{stage.port}"},
            {"origin": f"http://localhost:{stage.port}"},  # a host name of the site, but not of this request
        ):
            assert (await browser.post("/bans", ban, **headers)).status == 403, headers
        assert (await browser.post("/bans", ban, host="evil.example")).status == 421
        assert (await browser.get("/machines", host=f"evil.example:{stage.port}")).status == 421
        assert (await browser.post("/bans", ban, content_type="text/plain")).status == 415
        assert (await browser.post("/bans", {"name": "x" * 70_000})).status == 413
        for headers in ({}, {"sec_fetch_site": "cross-site"}, {"origin": "http://evil.example"}):
            assert (await browser.get("/live/machines", **headers)).status == 403, headers
        assert (await stage.admin_server.administration.bans.page()).total == 0
        assert (await browser.post("/bans", ban)).headers["location"] == "/bans"
        assert (await stage.admin_server.administration.bans.page()).total == 1
        entry = (await stage.admin_server.administration.audit.page()).items[0]
        assert (entry.action, entry.actor.name) == ("ban.add", "operator")


async def test_each_role_sees_its_pages_and_forms(tmp_path: Path) -> None:
    async with page(tmp_path) as stage:
        viewer = await stage.visitor(Role.VIEWER)
        text = (await viewer.get("/bans")).text
        assert "Ban a machine" not in text
        assert "/audit" not in text
        assert (await viewer.get("/audit")).status == 403
        refused = await viewer.post("/bans", {"name": "3e1d4b52-0f8b-4d4d-9a34-1d4e3b7c6a51"}, referer="/bans")
        assert refused.status == 303
        assert "This needs the role operator" in (await viewer.get("/bans")).text
        assert (await stage.admin_server.administration.bans.page()).total == 0
        admin = await stage.visitor(Role.ADMIN)
        assert "apikey.create" in (await admin.get("/audit")).text


async def test_a_session_ends_with_its_key_and_when_one_signs_out_or_its_cookie_is_stolen(tmp_path: Path) -> None:
    async with page(tmp_path) as stage:
        for end in ("revoked", "signed out", "stolen"):
            browser = await stage.visitor(Role.VIEWER)
            assert (await browser.get("/machines")).status == 200
            if end == "signed out":
                cookie = browser.cookie
                assert (await browser.post("/sign-out", {})).status == 303
                browser.cookie = cookie
            elif end == "stolen":
                thief = Browser(stage.port, cookie=browser.cookie, source="127.0.0.2")
                assert (await thief.get("/machines")).status == 303
            else:
                name = "another"
                _, secret = await stage.admin_server.administration.api_keys.create(name, Role.VIEWER)
                browser = Browser(stage.port)
                await browser.sign_in(secret)
                assert (await browser.get("/machines")).status == 200
                await stage.admin_server.administration.api_keys.revoke(name)
            assert (await browser.get("/machines")).status == 303, end


async def test_a_token_is_made_and_shown_with_an_audit_and_leads_where_the_form_says(tmp_path: Path) -> None:
    async with page(tmp_path) as stage:
        browser = await stage.visitor(Role.OPERATOR)
        made = await browser.post("/tokens", {"name": "rack-1", "days": "7", "uses": "3"})
        assert made.status == 200
        tokens = (await stage.admin_server.administration.tokens.list(limit=10)) or []
        (status,) = (one for one in tokens if one.token.name == "rack-1")
        assert status.token.max_uses == 3
        shown = await browser.post(f"/tokens/{status.token.id}/secret", {"reach": "siderolink.example:443"})
        assert "grpc://siderolink.example:443?jointoken=" in shown.text
        actions = [entry.action for entry in (await stage.admin_server.administration.audit.page()).items]
        assert actions[:2] == ["token.show", "token.create"]
        answer = await browser.post("/tokens", {"name": "rack-1", "days": "<b>"}, referer="/tokens")
        assert answer.status == 303
        assert "Days must be a number." in (await browser.get("/tokens")).text
        assert (await browser.post(f"/tokens/{status.token.id}/revoke", {})).status == 303
        assert "revoked" in (await browser.get(f"/tokens/{status.token.id}")).text


async def test_behind_a_proxy_the_visitors_address_counts(tmp_path: Path) -> None:
    """For the session and in the audit; a header written by the visitor is ignored."""
    public = {"host": "fleet.example.com", "origin": "https://fleet.example.com"}

    def says(address: str, **more: str) -> dict[str, str]:
        return {**more, "x_forwarded_for": address}

    async with page(tmp_path, origins=("https://fleet.example.com",), proxies=("127.0.0.1/32",)) as stage:
        browser = Browser(stage.port)
        form = {"key": stage.keys[Role.OPERATOR], "next": "/"}
        assert (await browser.post("/sign-in", form, **says("192.0.2.66, 198.51.100.7", **public))).status == 303
        cookie = browser.cookie
        assert (await browser.get("/machines", **says("203.0.113.5, 198.51.100.7", host=public["host"]))).status == 200
        ban = {"name": "3e1d4b52-0f8b-4d4d-9a34-1d4e3b7c6a51", "kind": "uuid"}
        assert (await browser.post("/bans", ban, **says("198.51.100.7", **public))).headers["location"] == "/bans"
        entry = (await stage.admin_server.administration.audit.page()).items[0]
        assert (entry.action, entry.actor.source) == ("ban.add", "127.0.0.1"), "the page has no key of its own at this server"
        for thief, said in (
            ("127.0.0.1", "192.0.2.66"),
            ("127.0.0.2", "198.51.100.7"),
        ):  # from another address, and without the proxy
            browser = Browser(stage.port, cookie=cookie, source=thief)
            assert (await browser.get("/machines", **says(said, host=public["host"]))).status == 303
            again = Browser(stage.port)
            await again.post("/sign-in", form, **says("198.51.100.7", **public))
            cookie = again.cookie
        assert (await Browser(stage.port).get("/sign-in", host="evil.example.com")).status == 421
    with pytest.raises(ConfigurationError, match="--origin"):
        WebOptions(
            listen=HostPort("127.0.0.1", 0),
            server=ServerAddress(host="127.0.0.1", port=1, is_plain=True),
            forwarded_from=("127.0.0.1",),
        )


async def test_unfinished_requests_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(siderolink.web.run, "REQUEST_SECONDS", 0.2)
    async with page(tmp_path) as stage:
        whole = b"GET /sign-in HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n\r\n" % stage.port
        for begun in (b"", b"GET / HTTP/1.1\r\nHo", whole + b"GET / HT"):
            async with await anyio.connect_tcp("127.0.0.1", stage.port) as stream:
                if begun:
                    await stream.send(begun)
                with anyio.fail_after(60), pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
                    while True:
                        await stream.receive()


@pytest.mark.parametrize(
    "begun", [b"NONSENSE\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", b"GET / HTTP/1.1\r\nA: " + b"x" * 100_000]
)
async def test_malformed_requests_are_refused(tmp_path: Path, begun: bytes) -> None:
    async with page(tmp_path) as stage:
        async with await anyio.connect_tcp("127.0.0.1", stage.port) as stream:
            with anyio.fail_after(60):
                try:
                    await stream.send(begun)
                    assert (await stream.receive()).split()[1] in (b"400", b"421", b"431")
                except (anyio.EndOfStream, anyio.BrokenResourceError):
                    pass  # closed at once
        assert (await (await stage.visitor(Role.VIEWER)).get("/")).status == 200


async def test_with_tls_the_names_of_the_certificate_count(tmp_path: Path) -> None:
    made = make_certificate("a root").sign("127.0.0.1")
    file = tmp_path / "tls.pem"
    file.write_text(made.pem)
    trusting = ssl.create_default_context()
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    async with page(tmp_path, ServerCertificate(file)) as stage:
        async with await anyio.connect_tcp(
            "127.0.0.1", stage.port, ssl_context=trusting, tls=True, tls_standard_compatible=False
        ) as stream:
            await stream.send(b"GET /sign-in HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n\r\n" % stage.port)
            assert (await stream.receive()).startswith(b"HTTP/1.1 200")
    origins = find_origins(HostPort("0.0.0.0", 8096), file, ["https://fleet.example.com"])
    assert origins.has("https://127.0.0.1:8096")
    assert origins.has("https://fleet.example.com")
    for wrong in ("http://127.0.0.1:8096", "https://127.0.0.1", "https://fleet.example.com:8096", "null", "https://", ""):
        assert not origins.has(wrong), wrong


def test_without_tls_it_is_served_on_the_loopback_alone() -> None:
    server = ServerAddress(host="127.0.0.1", port=1, is_plain=True)
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.com"):
        with pytest.raises(ConfigurationError, match="TLS"):
            WebOptions(listen=HostPort(host, 8096), server=server)
    for text in (
        "http://example.com",
        "https://example.com/path",
        "ftp://localhost",
        "example.com",
        "https://a:x",
        "https://u@a",
    ):
        with pytest.raises(ConfigurationError):
            read_origin(text)
    assert read_origin("https://Example.com:443") == "https://example.com"
