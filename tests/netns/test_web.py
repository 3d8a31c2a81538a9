"""The page, in a real browser, of a real server with real machines."""

import json
import os
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from tests.support.browser import browser_in, sign_in, visitor
from tests.support.netns import Namespace, stop
from tests.support.serving import API, COMMAND, TOKEN, Served, served
from tests.support.topology import routed

URL = f"grpc://{API}?jointoken={TOKEN}"
BASE = "http://127.0.0.1:8096"


@dataclass(frozen=True, slots=True)
class Fleet:
    """A server with its page, two hosts for machines, and a browser on the server's host."""

    server: Served
    hosts: tuple[Namespace, ...]
    folder: Path
    browser: Browser
    keys: dict[str, str]

    def join(self, host: int, node_uuid: str) -> "subprocess.Popen[str]":
        folder = self.folder / node_uuid
        command = [*COMMAND, "join", URL, "--uuid", node_uuid, "--device", "userspace", "--identity", str(folder)]
        environment = os.environ | {"SIDEROLINK_RUNTIME_DIR": str(folder / "run")}
        return self.hosts[host].popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("page")
    options = ["--device", "userspace", "--web-listen", "8096"]
    with routed(2) as net, served(net.server, folder, *options) as server:
        server.wait_for("page:")
        keys = {}
        for role in ("viewer", "operator", "admin"):
            made = json.loads(server.command(["apikey", "create", role, "--role", role, "-o", "json"]))
            keys[role] = made["secret"]
        with browser_in(net.server, folder) as browser:
            yield Fleet(server, net.machines, folder, browser, keys)


def test_a_machine_joins_and_is_seen_to_come_up(fleet: Fleet) -> None:
    node_uuid = str(uuid.uuid4())
    with visitor(fleet.browser, BASE) as page:
        page.goto("/machines")
        expect(page.get_by_role("heading", level=1)).to_have_text("Sign in")
        sign_in(page, fleet.keys["viewer"])
        page.get_by_role("link", name="Machines", exact=True).click()
        expect(page.locator("#live-state")).to_have_text("Live")
        machine = fleet.join(0, node_uuid)
        row = page.locator("tr", has_text=node_uuid)
        expect(row.locator(".state")).to_have_text("up")
        row.get_by_role("link", name=node_uuid).click()
        expect(page.locator("#machine-state")).to_have_text("up")
        expect(page.locator("#timeline")).to_contain_text("joined")
        expect(page.get_by_role("heading", name="Change")).to_have_count(0)
        stop(machine)
