"""The page behind nginx and Caddy, configured as docs/web.md says, in a real browser on another host."""

import http.client
import json
import re
import socket
import ssl
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

import pytest
from playwright.sync_api import Browser, expect

from tests.support.browser import browser_in, sign_in, visitor
from tests.support.certificates import make_certificate
from tests.support.netns import Namespace
from tests.support.reverse_proxies import caddy, nginx
from tests.support.serving import SERVER, Served, served
from tests.support.topology import direct

HOST = "fleet.example.com"
BASE = f"https://{HOST}"
VISITOR = "192.0.2.2"
PAGE = (Path(__file__).resolve().parents[2] / "docs" / "web.md").read_text()
OPTIONS = ["--web-listen", "8096", "--web-origin", BASE, "--web-forwarded-from", "127.0.0.1"]


def documented(language: str) -> str:
    """The configuration that the page of the documentation shows."""
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    return str(found)


@dataclass(frozen=True, slots=True)
class Stage:
    """A server with its page, and a browser on another host."""

    server: Served
    elsewhere: Namespace
    browser: Browser
    key: str


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("proxies")
    assert " ".join(OPTIONS) in PAGE
    with direct() as net, served(net.server, folder, "--device", "userspace", *OPTIONS) as server:
        if not any(" page: " in line for line in server.lines):
            server.wait_for(" page: ")
        key = json.loads(server.command(["apikey", "create", "alice", "--role", "operator", "-o", "json"]))["secret"]
        with browser_in(net.machine, folder, f"--host-resolver-rules=MAP {HOST} {SERVER}") as browser:
            yield Stage(server, net.machine, browser, str(key))


def post(stage: Stage, path: str, form: dict[str, str], **headers: str) -> tuple[int, str]:
    """The status and the cookie that a program on the visitor's host gets."""

    def send() -> tuple[int, str]:
        unverified = ssl.create_default_context()
        unverified.check_hostname, unverified.verify_mode = False, ssl.CERT_NONE
        connection = http.client.HTTPSConnection(HOST, timeout=60, context=unverified)
        sock = socket.create_connection((SERVER, 443), 60)
        connection.sock = unverified.wrap_socket(sock, server_hostname=HOST)
        named = {"Host": HOST, "Origin": BASE, "Content-Type": "application/x-www-form-urlencoded"}
        more = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request("POST", path, urlencode(form), {**named, **more})
        try:
            answer = connection.getresponse()
            return answer.status, answer.getheader("set-cookie", "").partition(";")[0]
        finally:
            connection.close()

    return stage.elsewhere.call(send)


@pytest.mark.parametrize("proxy", ["nginx", "caddy"])
def test_the_page_behind_a_proxy(stage: Stage, tmp_path: Path, proxy: str) -> None:
    made = make_certificate("a root").sign(HOST)
    (tmp_path / "fleet.pem").write_text(made.pem)
    text = documented(proxy)
    if proxy == "nginx":
        running = nginx(stage.server.namespace, tmp_path, text.replace("/etc/nginx/", f"{tmp_path}/"))
    else:
        own = f"tls {tmp_path}/fleet.pem {tmp_path}/fleet.pem"  # instead of one from an authority
        running = caddy(stage.server.namespace, tmp_path, text.replace("{\n", f"{{\n    {own}\n", 1))
    banned, first = str(uuid.uuid4()), str(uuid.uuid4())
    with running, visitor(stage.browser, BASE, ignore_https_errors=True) as page:
        sign_in(page, stage.key)
        page.goto("/bans")
        expect(page.locator("#live-state")).to_have_text("Live")
        stage.server.command(["ban", "add", first, "--yes"])  # is seen at once: the stream is not held back
        expect(page.locator("#bans tr", has_text=first)).to_have_count(1)
        page.get_by_text("Ban a machine").click()
        page.get_by_label("Name, UUID or key").fill(banned)
        page.get_by_role("button", name="Ban it").click()
        expect(page.locator("#bans tr", has_text=banned)).to_have_count(1)
        assert page.evaluate("performance.getEntriesByType('navigation')[0].nextHopProtocol") == "h2"

        # what a visitor says of its own address does not count, and other sites are refused
        status, cookie = post(stage, "/sign-in", {"key": stage.key}, X_Forwarded_For="127.0.0.1, 203.0.113.9")
        assert status == 303
        more = {"name": str(uuid.uuid4()), "kind": "uuid"}
        assert post(stage, "/bans", more, X_Forwarded_For="198.51.100.7", Cookie=cookie)[0] == 303
        assert post(stage, "/sign-in", {"key": stage.key}, Origin="https://evil.example.com")[0] == 403
        assert post(stage, "/sign-in", {"key": stage.key}, Host="evil.example.com")[0] != 303
    entries = json.loads(stage.server.command(["audit", "--action", "ban.", "-o", "json"]))
    names = {banned, more["name"]}
    assert [(one["actor"], one["source"]) for one in entries if names & {*map(str, one.values())}] == [("alice", VISITOR)] * 2
