"""The list of listeners in docs/limits.md: all of them, with the figures of the code."""

import re
from pathlib import Path

import pytest

from siderolink.cli.metrics import http
from siderolink.client.maintenance.api import LIMITS as MACHINE_LIMITS
from siderolink.client.maintenance.dispatch import CALL_LIMITS
from siderolink.common import goodbye
from siderolink.common.grpc import Limits
from siderolink.common.grpc.budget import RESERVED
from siderolink.common.grpc.sources import HEADER_SECONDS, MAX_HEADER_BYTES
from siderolink.common.wireguard import udp_socket
from siderolink.common.wireguard.noise import cookies, exchange
from siderolink.common.wireguard.uapi.protocol import MAX_REQUEST_BYTES
from siderolink.common.wireguard.uapi.server import IDLE_TIMEOUT, MAX_CLIENTS
from siderolink.server.admin.services import ADMIN_LIMITS
from siderolink.server.peers.channels import PEER_LIMITS
from siderolink.server.reporting.log_listener import BYTES_PER_TURN
from siderolink.server.reporting.model import ReportOptions
from siderolink.web import guard, run

ROOT = Path(__file__).parents[2]
API, REPORTS = Limits(), ReportOptions()


def kib(size: int) -> str:
    return f"{size // 1024:,} KiB" if size < 1 << 20 else f"{size >> 20} MiB"


ROWS = {
    "API": f"{API.max_connections:,}; {API.max_connections_per_address:,} once half are in use; "
    f"{API.max_unproven_connections:,} of unknown sources | see below | "
    f"{API.preface_timeout:g} s, {API.request_timeout:g} s",
    "API with the PROXY protocol": f"the same | {MAX_HEADER_BYTES} bytes of header | {HEADER_SECONDS:g} s",
    "WireGuard's UDP port": f"from {cookies.UNDER_LOAD_RATE} handshakes/s on: {cookies.COOKIE_RATE:,.0f} cookies/s; "
    f"of one source with a cookie {cookies.SOURCE_RATE:g}/s, {cookies.SOURCE_BURST:,.0f} at once | "
    f"a datagram; {kib(udp_socket.MAX_BYTES)} in one turn; {exchange.MAX_STRANGERS} initiations of unknown keys and "
    f"{cookies.SOURCE_SLOTS:,} slots for sources are kept | –",
    "event sink": f"{REPORTS.max_connections_per_machine} of one machine | {kib(REPORTS.max_event_bytes)}; "
    f"{REPORTS.events_per_second}/s, {kib(REPORTS.event_bytes_per_second)}/s | {API.request_timeout:g} s",
    "kernel logs, TCP and UDP": f"{REPORTS.max_connections_per_machine} of one machine | "
    f"a line of {kib(REPORTS.max_line_bytes)}; {REPORTS.lines_per_second:,}/s, "
    f"{kib(REPORTS.line_bytes_per_second)}/s; {kib(BYTES_PER_TURN)} in one turn | –",
    "goodbyes, UDP": f"– | {goodbye.GOODBYE_BYTES} bytes; one removal of a machine at a time | –",
    "a server's request to move, UDP, at the machine": f"– | {goodbye.GOODBYE_BYTES} bytes; "
    f"one in {goodbye.MOVE_SECONDS:g} s | –",
    "admin API, and `serve`'s control socket": f"{ADMIN_LIMITS.max_connections}; "
    f"{ADMIN_LIMITS.max_connections_per_address}; {ADMIN_LIMITS.max_unproven_connections} without a valid key | "
    f"{kib(ADMIN_LIMITS.max_message_bytes)} | {ADMIN_LIMITS.request_timeout:g} s",
    "control socket of `join` and `wireguard`": f"{API.max_connections:,} | {kib(API.max_message_bytes)} | "
    f"{API.request_timeout:g} s",
    "other servers": f"{PEER_LIMITS.max_connections}; {PEER_LIMITS.max_connections_per_address}; "
    f"{PEER_LIMITS.max_unproven_connections} without a known certificate | "
    f"{kib(PEER_LIMITS.max_message_bytes + 5)} | {PEER_LIMITS.request_timeout:g} s",
    "metrics and health": f"{http.MAX_CONNECTIONS}; a new one replaces the longest idle | "
    f"{kib(http.MAX_REQUEST_BYTES)} | {http.REQUEST_TIMEOUT:g} s, {http.ANSWER_TIMEOUT:g} s for the answer",
    "web UI": f"{run.MAX_CONNECTIONS}; {run.MAX_CONNECTIONS_PER_ADDRESS} | {kib(guard.MAX_HEADERS)} of headers, "
    f"{kib(guard.MAX_BODY)} of content | {run.REQUEST_SECONDS:g} s, {guard.BODY_SECONDS:g} s for the content",
    "a machine's own API": f"{MACHINE_LIMITS.max_connections}; {MACHINE_LIMITS.max_connections_per_address} "
    f"once half are in use; {RESERVED} more for the server | {kib(CALL_LIMITS.max_message_bytes or 0)}; "
    f"{kib(MACHINE_LIMITS.max_message_bytes)} of configuration | {MACHINE_LIMITS.request_timeout:g} s",
    "socket for `wg`": f"{MAX_CLIENTS}; a new one replaces the oldest | {kib(MAX_REQUEST_BYTES)} | "
    f"{IDLE_TIMEOUT:g} s, {IDLE_TIMEOUT:g} s for the answer",
}
"""Connections, of all and of one source; bytes of one request; and the seconds that it may take."""

OPENERS = re.compile(
    r"(?<!def )(?<![\w.])(?:serve|listen_tcp|listen_unix|bind_overlay|open_udp)\((?!\))"
    r"|\.(?:start_server|start_unix_server|create_server)\("
)
MODULES = {
    "cli/admin/forward.py": "a port on the user's own loopback, whose connections the user makes",
    "cli/control.py": "control socket of `join` and `wireguard`",
    "cli/demo/transfer.py": "one transfer within a namespace of `siderolink demo`",
    "cli/metrics/http.py": "metrics and health",
    "client/maintenance/api.py": "a machine's own API",
    "common/goodbye.py": "a server's request to move, UDP, at the machine",
    "common/grpc/server.py": "the server of all gRPC listeners",
    "common/wireguard/uapi/server.py": "socket for `wg`",
    "common/wireguard/userspace.py": "WireGuard's UDP port",
    "server/composition.py": "API",
    "server/fleet/goodbyes.py": "goodbyes, UDP",
    "server/peers/peers.py": "other servers",
    "server/reporting/reports.py": "event sink",
    "web/run.py": "web UI",
}
"""Modules that open listening sockets, and their row, or what else they are."""


@pytest.mark.parametrize("name", ROWS)
def test_every_listeners_budget_is_written_as_the_code_has_it(name: str) -> None:
    assert f"| {name} | {ROWS[name]} |" in (ROOT / "docs/limits.md").read_text()


def test_every_module_that_listens_has_a_row() -> None:
    package = ROOT / "siderolink"
    found = {str(path.relative_to(package)) for path in package.rglob("*.py") if OPENERS.search(path.read_text())}
    assert found == set(MODULES)
    rows = re.search(r"## Every listener\n(.*?)\n## ", (ROOT / "docs/limits.md").read_text(), re.S)
    assert rows is not None
    assert len(re.findall(r"^\| (?!listener|---)", rows[1], re.M)) == len(ROWS)
