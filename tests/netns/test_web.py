"""The page, in a real browser, of a real server with real machines."""

import json
import os
import re
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.support.browser import browser_in, faults_of, picture, sign_in, visitor
from tests.support.commands import COMMAND
from tests.support.netns import Namespace, stop
from tests.support.serving import API, TOKEN, Served, served
from tests.support.topology import routed

URL = f"grpc://{API}?jointoken={TOKEN}"
BASE = "http://127.0.0.1:8096"
OVERLAY = "fdae:41e4:649b:9303::1"
FIRST = str(uuid.uuid4())
MARKUP = "<img src=x onerror=alert(1)></script><script>alert(2)</script>"
COOKIE = "__Host-siderolink"


@dataclass(frozen=True, slots=True)
class Fleet:
    """A server with its page, a machine, a host for another one, and a browser on the server's host."""

    server: Served
    hosts: tuple[Namespace, ...]
    folder: Path
    browser: Browser
    keys: dict[str, str]

    def join(self, host: int, node_uuid: str, url: str = URL) -> "subprocess.Popen[str]":
        folder = self.folder / node_uuid
        command = [*COMMAND, "join", url, "--uuid", node_uuid, "--device", "userspace", "--identity", str(folder)]
        command += ["--maintenance-api"]
        environment = os.environ | {"SIDEROLINK_RUNTIME_DIR": str(folder / "run")}
        return self.hosts[host].popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def command(self, *arguments: str) -> str:
        return self.server.command(list(arguments))

    def new_key(self, name: str, role: str) -> str:
        return str(json.loads(self.command("apikey", "create", name, "--role", role, "-o", "json"))["secret"])


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("page")
    options = ["--device", "userspace", "--web-listen", "8096"]
    with routed(2) as net, served(net.server, folder, *options) as server:
        if not any(" page: " in line for line in server.lines):  # the page may be faster than the server
            server.wait_for(" page: ")
        with browser_in(net.server, folder) as browser:
            fleet = Fleet(server, net.machines, folder, browser, {})
            fleet.keys.update((role, fleet.new_key(role, role)) for role in ("viewer", "operator", "admin"))
            machine = fleet.join(0, FIRST)
            server.wait_for("is up", 60)
            yield fleet
            stop(machine)


def live(page: Page) -> None:
    expect(page.locator("#live-state")).to_have_text("Live")


def test_a_machine_joins_and_is_seen_to_come_up_and_a_ban_to_take_it_away(fleet: Fleet) -> None:
    node_uuid = str(uuid.uuid4())
    with visitor(fleet.browser, BASE) as page, visitor(fleet.browser, BASE) as other:
        page.goto("/machines")
        expect(page.get_by_role("heading", level=1)).to_have_text("Sign in")
        sign_in(page, fleet.keys["operator"])
        page.get_by_role("link", name="Machines", exact=True).click()
        live(page)
        machine = fleet.join(1, node_uuid)
        try:
            row = page.locator("tr", has_text=node_uuid)
            expect(row.locator(".state")).to_have_text("up")
            row.get_by_role("link", name=node_uuid).click()
            expect(page.locator("#machine-state")).to_have_text("up")
            expect(page.locator("#timeline")).to_contain_text("joined")

            sign_in(other, fleet.keys["viewer"])  # viewers see everything and change nothing
            other.goto("/machines")
            live(other)
            expect(other.locator("tr", has_text=node_uuid)).to_have_count(1)
            page.get_by_text("Ban or remove").click()
            page.get_by_label("Reason").fill("it was sold")
            page.get_by_role("button", name="Ban this machine").click()
            expect(page.locator("#bans tr", has_text=node_uuid)).to_contain_text("it was sold")
            expect(other.locator("tr", has_text=node_uuid)).to_have_count(0)
            other.goto("/bans")
            expect(other.locator("#bans tr", has_text=node_uuid)).to_have_count(1)
            expect(other.get_by_role("button", name="Lift")).to_have_count(0)
        finally:
            stop(machine)


def test_a_token_is_created_joined_by_and_revoked(fleet: Fleet) -> None:
    node_uuid = str(uuid.uuid4())
    with visitor(fleet.browser, BASE) as page:
        sign_in(page, fleet.keys["operator"])
        page.get_by_role("link", name="Join tokens").click()
        page.get_by_text("Create a token").click()
        page.get_by_label("Name", exact=True).fill("rack-1")
        page.get_by_label("Days until it expires").fill("7")
        page.get_by_role("button", name="Create the token").click()
        url = page.locator("#join-url").inner_text()
        assert re.fullmatch(r"grpc://192\.0\.2\.1:4000\?jointoken=\S+", url)
        assert f"siderolink.api={url} " in page.locator("#kernel-arguments").inner_text()
        assert f"apiUrl: {url}" in page.locator("#documents").inner_text()
        with page.expect_download() as download:
            page.get_by_role("button", name="Download the documents").click()
        assert f"apiUrl: {url}" in Path(download.value.path()).read_text()
        machine = fleet.join(1, node_uuid, url)
        try:
            page.get_by_role("link", name="Back to the token").click()
            expect(page.locator("#token li", has_text=node_uuid)).to_have_count(1)
            page.get_by_text("Revoke or delete").click()
            page.get_by_role("button", name="Revoke the token").click()
            expect(page.locator("#token-state")).to_have_text("revoked")
        finally:
            stop(machine)
        assert "revoked" in fleet.command("token", "show", "rack-1")
        late = fleet.join(1, str(uuid.uuid4()), url)
        page.goto("/limits")
        expect(page.locator("#refusals")).to_contain_text("token")
        stop(late)


def send_lines(lines: list[dict[str, str]]) -> None:
    """From the machine's namespace, by its overlay address."""
    with socket.create_connection((OVERLAY, 8092), timeout=30) as connection:
        for line in lines:
            connection.sendall(json.dumps(line).encode() + b"\n")


def test_a_log_is_followed_and_what_machines_say_is_text(fleet: Fleet) -> None:
    with visitor(fleet.browser, BASE) as page:
        page.on("dialog", lambda dialog: pytest.fail(f"a script of a machine ran: {dialog.message}"))
        sign_in(page, fleet.keys["viewer"])
        fleet.command("machine", "note", FIRST, MARKUP)
        page.get_by_role("link", name="Machines", exact=True).click()
        page.get_by_role("link", name=FIRST).click()
        live(page)
        fleet.hosts[0].call(send_lines, [{"msg": "eth0: link up", "talos-level": "info"}])
        expect(page.locator("#log")).to_contain_text("info: eth0: link up")
        expect(page.locator("#answer")).to_contain_text("maintenance")
        expect(page.locator("#answer")).to_contain_text("198.51.100.2/24")
        fleet.hosts[0].call(send_lines, [{"msg": f"{MARKUP} \x1b[31m\N{RIGHT-TO-LEFT OVERRIDE}", "talos-level": MARKUP}])
        expect(page.locator("#log div").last).to_contain_text(MARKUP)
        assert "\N{RIGHT-TO-LEFT OVERRIDE}" not in page.locator("#log").inner_text()
        expect(page.locator("#state")).to_contain_text(MARKUP)
        fleet.command("machine", "note", FIRST, f"{MARKUP} once more")
        expect(page.locator("#state")).to_contain_text(f"{MARKUP} once more")
        expect(page.locator("img, #log script, #state script")).to_have_count(0)
        page.goto(f"/machines?text={MARKUP}")
        expect(page.locator("caption")).to_have_text("0 machines")
        picture(page, "web-search")


def test_searching_while_one_types_changes_the_list_and_the_address(fleet: Fleet) -> None:
    with visitor(fleet.browser, BASE) as page:
        sign_in(page, fleet.keys["viewer"])
        page.goto("/machines")
        live(page)
        page.get_by_label("Name, hostname or UUID").press_sequentially("nobody")
        expect(page.locator("caption")).to_have_text("0 machines")
        expect(page).to_have_url(re.compile(r"text=nobody"))
        page.get_by_label("Name, hostname or UUID").fill(FIRST[:8])
        expect(page.locator("caption")).to_have_text("1 machine")
        page.keyboard.press("Enter")
        expect(page.get_by_role("link", name=FIRST)).to_be_visible()
        page.get_by_role("columnheader", name="Version").get_by_role("link").click()
        expect(page).to_have_url(re.compile(r"sort=version"))
        expect(page.get_by_role("columnheader", name="Version")).to_have_attribute("aria-sort", "ascending")
        expect(page.get_by_label("Order")).to_have_value("version")
        expect(page.locator("table[data-rows]")).to_have_attribute("aria-rowcount", "2")
        page.go_back()
        expect(page).not_to_have_url(re.compile(r"sort=version"))
        expect(page.get_by_label("Order")).to_have_value("name")
        page.goto("/servers")
        expect(page.locator("#fleet-servers tbody tr")).to_have_count(1)
        expect(page.locator("#fleet-servers .state")).to_have_text("up")


def test_a_stolen_cookie_ends_the_session_and_a_revoked_key_the_page(fleet: Fleet) -> None:
    secret = fleet.new_key("short-lived", "viewer")
    with visitor(fleet.browser, BASE) as page:
        sign_in(page, fleet.keys["viewer"])
        (cookie,) = page.context.cookies()
        assert (cookie["name"], cookie["httpOnly"], cookie["secure"], cookie["sameSite"]) == (COOKIE, True, True, "Strict")
        assert COOKIE not in str(page.evaluate("document.cookie"))
        live(page)
        program = (
            "import http.client, sys\n"
            "connection = http.client.HTTPConnection('127.0.0.1', 8096, source_address=('127.0.0.2', 0))\n"
            f"connection.request('GET', '/machines', headers={{'cookie': '{COOKIE}=' + sys.argv[1]}})\n"
            "print(connection.getresponse().status)"
        )
        assert fleet.server.namespace.run([sys.executable, "-c", program, cookie["value"]], timeout=60).strip() == "303"
        expect(page.get_by_role("heading", level=1)).to_have_text("Sign in")
        sign_in(page, secret)
        live(page)
        fleet.command("apikey", "revoke", "short-lived", "--yes")
        expect(page.get_by_role("heading", level=1)).to_have_text("Sign in")


def test_a_request_that_another_site_forges_is_refused(fleet: Fleet) -> None:
    folder = fleet.folder / "evil"
    folder.mkdir()
    form = f'<form method="post" action="{BASE}/bans"><input name="name" value="{FIRST}"><button>Win a prize</button></form>'
    (folder / "index.html").write_text(form)
    other = fleet.server.namespace.popen(
        [sys.executable, "-u", "-m", "http.server", "9000", "--bind", "127.0.0.1", "--directory", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert other.stdout is not None
        assert "Serving" in other.stdout.readline()
        context = fleet.browser.new_context()
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.goto(f"{BASE}/sign-in")
        page.get_by_label("API key").fill(fleet.keys["operator"])
        page.get_by_role("button", name="Sign in").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("Overview")
        # the same host by another port is the same site to browsers, which send the cookie along
        page.goto("http://127.0.0.1:9000/")
        with page.expect_response(f"{BASE}/bans") as answer:
            page.get_by_role("button", name="Win a prize").click()
        assert answer.value.status == 403
        assert json.loads(fleet.command("machine", "show", FIRST, "-o", "json"))["link"] == "up"
        assert fleet.command("ban", "list", "-o", "json").find(FIRST) == -1
        context.close()
    finally:
        stop(other)


@contextmanager
def shown_fleet(fleet: Fleet) -> Iterator[None]:
    """Where pictures are taken for the documentation, there is something to see on them."""
    if not os.environ.get("SIDEROLINK_PICTURES"):
        yield
        return
    fleet.command("machine", "rename", FIRST, "berlin-1")
    fleet.command("machine", "note", FIRST, "behind the door")
    fleet.command("machine", "label", FIRST, "site=berlin", "rack=1")
    command = [*COMMAND, "simulate", URL, "--machines", "11", "--tunnel-share", "0.3", "--json"]
    simulated = fleet.hosts[1].popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert simulated.stdout is not None
        simulated.stdout.readline()
        yield
    finally:
        stop(simulated)
        fleet.command("machine", "rename", FIRST, "")


def test_the_web_ui_is_accessible(fleet: Fleet) -> None:
    """axe, in the dark on a narrow screen and in the light on a wide one; and the keyboard."""
    with shown_fleet(fleet), visitor(fleet.browser, BASE, color_scheme="dark", viewport={"width": 390, "height": 844}) as page:
        page.goto("/sign-in")
        assert faults_of(page) == []
        sign_in(page, fleet.keys["admin"])
        page.keyboard.press("Tab")
        expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
        machine = json.loads(fleet.command("machine", "show", FIRST, "-o", "json"))["id"]
        short = ("/", f"/machines/{machine}", "/machines", "/limits")
        paths = (*short, "/tokens", "/bans", "/audit", "/servers")
        for scheme, width in (("dark", 390), ("light", 1280)):
            page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
            page.set_viewport_size({"width": width, "height": 844})
            for path in paths if width == 390 else short:
                name = "machine" if machine in path else path.strip("/") or "overview"
                page.goto(path)
                live(page)
                assert faults_of(page) == [], (path, scheme)
                assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (path, width)
                picture(page, f"web-{name}-{scheme}")


@pytest.mark.timeout(240)
def test_the_web_ui_reconnects_to_its_server(fleet: Fleet) -> None:
    """A page by a process that is not the server's child, so that it outlives it."""
    arguments = ["web", "--server", f"unix://{fleet.folder}/run/siderolink.sock", "--listen", "8097"]
    process = fleet.server.namespace.popen([*COMMAND, *arguments], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert "http://127.0.0.1:8097" in process.stdout.readline()
        with visitor(fleet.browser, "http://127.0.0.1:8097") as page:
            sign_in(page, fleet.keys["viewer"])
            page.goto("/machines")
            live(page)
            row = page.locator("tr", has_text=FIRST)
            expect(row.locator(".state")).to_have_text("up")
            fleet.server.kill()
            expect(page.locator("#live-state")).to_contain_text("does not answer")
            expect(row).to_have_count(1)
            fleet.server.start()
            live(page)
            expect(row.locator(".state")).to_have_text("up")
    finally:
        stop(process)
