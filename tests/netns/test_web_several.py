"""Several servers over one store, in the browser: a machine of one is seen, followed and changed through another's page."""

import json
import os
import re
import subprocess
import uuid
from pathlib import Path

from playwright.sync_api import expect

from tests.netns.test_several_servers import servers, url
from tests.netns.test_web import live, send_lines
from tests.support.browser import browser_in, picture, sign_in, visitor
from tests.support.commands import COMMAND
from tests.support.netns import stop
from tests.support.talosctl import Talosctl
from tests.support.topology import several


def test_a_machine_of_another_server_through_this_ones_page(tmp_path: Path) -> None:
    node_uuid = str(uuid.uuid4())
    with several(2) as net, servers(net, tmp_path, "--device", "userspace", "--web-listen", "8096") as (a, b):
        (machine_host,) = net.machines
        command = [*COMMAND, "join", url(net, 1), "--uuid", node_uuid, "--device", "userspace", "--maintenance-api"]
        machine = machine_host.popen(
            [*command, "--identity", str(tmp_path / "machine")],
            env=os.environ | {"SIDEROLINK_RUNTIME_DIR": str(tmp_path / "machine-run")},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        b.wait_for("is up", 60)
        if not any(" page: " in line for line in a.lines):
            a.wait_for(" page: ")
        key = json.loads(a.command(["apikey", "create", "ops", "--role", "operator", "-o", "json"]))["secret"]
        with browser_in(net.servers[0], tmp_path) as browser, visitor(browser, "http://127.0.0.1:8096") as page:
            sign_in(page, key)
            page.goto("/servers")
            rows = page.locator("#fleet-servers tbody tr")
            expect(rows).to_have_count(2)
            expect(rows.locator(".state")).to_have_text(["up", "up"])
            expect(rows.nth(0)).to_contain_text("(this one)")
            expect(rows.locator("td[data-name=Machines]")).to_have_text(["0", "1"])
            picture(page, "web-several-servers")

            page.goto("/machines")
            live(page)
            row = page.locator("tr", has_text=node_uuid)
            expect(row.locator(".state")).to_have_text("up")
            row.get_by_role("link", name=node_uuid).click()
            live(page)
            expect(page.locator("#answer")).to_contain_text("maintenance")
            machine_host.call(send_lines, [{"msg": "eth0: link up", "talos-level": "info"}])
            expect(page.locator("#log")).to_contain_text("info: eth0: link up")

            page.get_by_text("Name, note, labels, transport").click()
            page.get_by_label("Name", exact=True).fill("edge-1")
            page.get_by_role("button", name="Set the name").click()
            expect(page.get_by_role("heading", level=1)).to_have_text("edge-1")
            assert json.loads(b.command(["machine", "show", "edge-1", "-o", "json"]))["node_uuid"] == node_uuid

            forward = a.popen(["forward", "edge-1", "50000", "--local", "127.0.0.1:0"])
            assert forward.stdout is not None
            (port,) = re.findall(r":([0-9]+) -> edge-1:50000", forward.stdout.readline())
            said = net.servers[0].call(lambda: Talosctl("127.0.0.1", int(port)).version_soon())
            assert "NODE:        127.0.0.1\n" in said
            stop(forward)

            page.locator("summary", has_text="Admission").click()
            page.get_by_role("button", name="Deny").click()
            expect(page.locator("#machine-state")).to_have_text("denied")
            expect(page.locator("#timeline")).to_contain_text("denied")
        entries = json.loads(a.command(["audit", "-o", "json"]))
        by_page = {one["action"]: one["source"] for one in entries if one["actor"] == "ops"}
        assert {"machine.rename", "machine.deny"} <= by_page.keys()
        assert all(" by server " in by_page[action] for action in ("machine.rename", "machine.deny"))
        stop(machine)
