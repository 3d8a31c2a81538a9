"""`serve` on several hosts over one Postgres, as operators run it."""

import json
import re
import sys
import time
from base64 import b64encode
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import anyio

from siderolink.cli.demo.probe import EchoCount, keep_pinging
from siderolink.client import Disconnected, LinkEvent, Moved
from tests.netns.test_serve_memory import joined, pings
from tests.support.netns import stop
from tests.support.postgres import cluster
from tests.support.serving import TOKEN, Served, served
from tests.support.topology import ServersNet, several
from tests.support.waiting import until

KEY = b64encode(bytes(range(32))).decode()


@contextmanager
def servers(net: ServersNet, folder: Path, *options: str) -> Iterator[Sequence[Served]]:
    """One on each host."""
    with cluster().database() as name, ExitStack() as stack:
        yield [
            stack.enter_context(
                served(
                    namespace,
                    folder / f"server{number}",
                    *("--store", cluster().url(name), "--peer-listen", f"{net.address(number)}:4001", *options),
                    address=net.address(number),
                    SIDEROLINK_STATE_KEY=KEY,
                )
            )
            for number, namespace in enumerate(net.servers)
        ]


def url(net: ServersNet, number: int, query: str = "") -> str:
    return f"grpc://{net.address(number)}:4000?jointoken={TOKEN}{query}"


def readiness(server: Served) -> int:
    """The status that a balancer checks."""
    asked = """
import urllib.error, urllib.request
try:
    print(urllib.request.urlopen("http://127.0.0.1:9180/readyz").status)
except urllib.error.HTTPError as error:
    print(error.code)
"""
    return int(server.namespace.run([sys.executable, "-c", asked]))


def start_echo(net: ServersNet, address: str) -> None:
    """A program at the machine that returns everything in reverse order."""
    net.machines[0].popen(
        [
            sys.executable,
            "-c",
            f"""
import socketserver
class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        self.wfile.write(self.rfile.read()[::-1])
class Server(socketserver.TCPServer):
    address_family = 10
Server(("{address}", 7000), Handler).serve_forever()
""",
        ]
    )


def check_forward(server: Served) -> None:
    """A connection by `siderolink forward` at this server ends at the machine, whole both ways."""
    forward = server.popen(["forward", "berlin", "7000", "--local", "127.0.0.1:17000"])
    assert forward.stdout is not None
    assert "17000" in forward.stdout.readline()
    client = """
import socket
data = bytes(range(256)) * 4096
connection = socket.create_connection(("127.0.0.1", 17000))
connection.sendall(data)
connection.shutdown(1)
print(connection.makefile("rb").read() == data[::-1])
"""
    until(lambda: "True" in server.namespace.run([sys.executable, "-c", client], check=False), 30)
    stop(forward)


def test_a_machine_of_one_server_is_seen_and_managed_from_the_other(tmp_path: Path) -> None:
    with (
        several(2) as net,
        servers(net, tmp_path) as (a, b),
        joined(net.machines[0], url(net, 0)) as (
            link,
            portal,
        ),
    ):
        assert pings(net.servers[0], link.address, 60)
        (listed,) = json.loads(b.command(["machine", "list", "-o", "json"]))
        machine_id = listed["id"]
        assert listed["link"] == "up"
        assert listed["endpoint"].startswith("198.51.100.2:")
        assert int(listed["received_bytes"]) > 0
        b.command(["machine", "rename", machine_id, "berlin"])
        start_echo(net, str(link.address))
        for server in (a, b):
            check_forward(server)
        entries = json.loads(a.command(["audit", "-o", "json"]))
        (renamed,) = [one for one in entries if one["action"] == "machine.rename"]
        assert renamed["source"].startswith("uid 0 by server ")
        b.command(["machine", "deny", "berlin"])
        assert not pings(net.servers[0], link.address, 2)


def test_a_rotated_key_reaches_every_server_within_five_seconds(tmp_path: Path) -> None:
    with (
        several(2, machines=1) as net,
        servers(net, tmp_path) as (a, b),
        joined(net.machines[0], url(net, 1)) as (link, _),
    ):
        assert pings(net.servers[1], link.address, 60)
        first = link.server_key
        refused = a.command(["state", "rotate-key"], check=False)
        assert "every machine has to join again? There is no terminal to ask on: add --yes" in refused
        said = a.command(["state", "rotate-key", "--yes"])
        assert "all servers of this store use it" in said
        began = time.monotonic()
        overlay = b.wait_for("key ", timeout=30)
        assert str(first) not in overlay  # it started again
        (key,) = re.findall(r"key (\S{43}=)", overlay)
        assert key in said
        assert time.monotonic() - began < 20  # five, and what a busy host takes to start a server
        until(lambda: link.server_key != first)
        assert pings(net.servers[1], link.address, 60)


def test_a_machine_leaves_a_server_that_drains_without_a_lost_echo(tmp_path: Path) -> None:
    told: list[LinkEvent] = []
    with (
        several(2) as net,
        servers(net, tmp_path, "--drain-timeout", "60", "--metrics-listen", "127.0.0.1:9180") as (a, b),
        joined(net.machines[0], url(net, 0), told.append) as (link, portal),
    ):
        machine = net.machines[0]
        assert pings(machine, link.server_address, 60)
        echoes, stop_echoes = EchoCount(), portal.call(anyio.Event)
        pinging = portal.start_task_soon(partial(keep_pinging, link.server_address, echoes, stop_echoes))
        # from the other server, by the command
        said = b.command(["drain", f"{net.address(0)}:51820", "--timeout", "50s"])
        assert said.splitlines()[-1] == "no machine is left; the server can be stopped"
        assert "192.0.3.1" in str(portal.call(link.status).route)
        assert [one["state"] for one in json.loads(b.command(["servers", "-o", "json"]))] == ["up", "draining"]
        (audited,) = json.loads(b.command(["audit", "--action", "server.drain", "-o", "json"]))
        assert "by server" in audited["source"]
        assert (readiness(a), readiness(b)) == (503, 200)
        refused = b.command(["drain"], check=False)
        assert "no other server remains" in refused
        a.command(["drain", "--undo"])
        assert readiness(a) == 200
        # and by SIGTERM, back
        until(lambda: "draining" not in b.command(["servers"]), 10)
        assert b.stop(timeout=50) == 0
        assert "192.0.2.1" in str(portal.call(link.status).route)
        assert pings(net.servers[0], link.address, 60)
        portal.call(stop_echoes.set)
        pinging.result(60)
        assert len(echoes.sent_at) > 200
        assert echoes.lost == []
        until(lambda: sum(isinstance(event, Moved) for event in told) >= 2)
        assert [event.route for event in told if isinstance(event, Moved)] == ["udp 192.0.3.1:51820", "udp 192.0.2.1:51820"]
        assert not any(isinstance(event, Disconnected) for event in told)
