"""The list of listeners in docs/limits.md: all of them, with the figures of the code."""

import re
from pathlib import Path

import pytest

from siderolink.cli.control import CONTROL_LIMITS
from siderolink.cli.metrics import endpoint, http
from siderolink.client.maintenance.api import LIMITS as MACHINE_LIMITS
from siderolink.client.maintenance.dispatch import CALL_LIMITS
from siderolink.common import datagrams, goodbye
from siderolink.common.grpc import Limits, turns
from siderolink.common.grpc import server as grpc_server
from siderolink.common.grpc.accounts import HALF, QUARTER
from siderolink.common.grpc.budget import RESERVED
from siderolink.common.grpc.sources import HEADER_SECONDS, MAX_HEADER_BYTES
from siderolink.common.wireguard import udp_socket
from siderolink.common.wireguard.configure import STEP
from siderolink.common.wireguard.noise import cookies, exchange
from siderolink.common.wireguard.noise import turns as handshake_turns
from siderolink.common.wireguard.uapi.protocol import MAX_REQUEST_BYTES
from siderolink.common.wireguard.uapi.server import IDLE_TIMEOUT, MANY_LINES, MAX_CLIENTS
from siderolink.server.admin.services import ADMIN_LIMITS
from siderolink.server.admin.services.access import CALL_LIMITS as CALL_LIMITS_ADMIN
from siderolink.server.peers.channels import PEER_LIMITS
from siderolink.server.reporting.log_listener import ACCEPTS_PER_TURN
from siderolink.server.reporting.model import ReportOptions
from siderolink.server.reporting.reports import TURN_SHARE
from siderolink.web import guard, run

ROOT = Path(__file__).parents[2]
API, REPORTS = Limits(), ReportOptions()
READ_BYTES = 256 * 1024
"""The event loop's largest read."""
assert (HALF, QUARTER) == (2, 4)


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
    f"{kib(REPORTS.line_bytes_per_second)}/s | –",
    "goodbyes, UDP": f"– | {goodbye.GOODBYE_BYTES} bytes; one removal of a machine at a time | –",
    "a server's request to move, UDP, at the machine": f"– | {goodbye.GOODBYE_BYTES} bytes; "
    f"one in {goodbye.MOVE_SECONDS:g} s | –",
    "admin API, and `serve`'s control socket": f"{ADMIN_LIMITS.max_connections}; "
    f"{ADMIN_LIMITS.max_connections_per_address}; {ADMIN_LIMITS.max_unproven_connections} without a valid key | "
    f"{kib(ADMIN_LIMITS.max_message_bytes)} | {ADMIN_LIMITS.request_timeout:g} s",
    "control socket of `join` and `wireguard`": f"{CONTROL_LIMITS.max_connections} | "
    f"{kib(CONTROL_LIMITS.max_message_bytes)} | {CONTROL_LIMITS.request_timeout:g} s",
    "other servers": f"{PEER_LIMITS.max_connections}; {PEER_LIMITS.max_connections_per_address}; "
    f"{PEER_LIMITS.max_unproven_connections} without a known certificate | "
    f"{kib(PEER_LIMITS.max_message_bytes + 5)} | {PEER_LIMITS.request_timeout:g} s",
    "metrics and health": f"{http.MAX_CONNECTIONS}; a new one replaces the longest idle; "
    f"{http.CONNECTIONS_PER_SECOND}/s of one source, {http.CONNECTION_BURST} at once | "
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


def ms(seconds: float) -> str:
    return f"{seconds * 1000:g} ms"


def calls(limits: Limits, *, has_tokens: bool) -> tuple[str, str]:
    """The memory of calls and of waiting input, before and after a source is known."""
    after = f"{kib(limits.max_call_bytes_per_address)}, or {limits.max_call_bytes >> 21} MiB if others leave it"
    return kib(limits.max_unproven_call_bytes // QUARTER) if has_tokens else after, after


TURN, SLICE = ms(turns.TURN_SECONDS), ms(turns.SLICE_SECONDS)
STRANGERS = f"{TURN} in one turn for all, {SLICE} for one; on average a quarter once all use half"
KNOWN = f"{ms(2 * turns.TURN_SECONDS)} in one turn for all, {SLICE} for one"
REPORTED = (
    f"{ms(TURN_SHARE * turns.TURN_SECONDS)} in one turn for events and lines of all, {SLICE} for one; "
    "on average a quarter once all use half"
)
DATAGRAMS = f"{datagrams.AT_ONCE} datagrams or {ms(datagrams.TURN_SECONDS)} in one turn for all, a quarter on average for all"
RECENT = kib(REPORTS.recent_bytes)
SINK_BYTES = REPORTS.max_event_bytes + 5 + API.max_frame_bytes
COSTS = {
    "API": ("a valid token, a live link", *calls(API, has_tokens=True), STRANGERS, f"{KNOWN}, without raw streams"),
    "API with the PROXY protocol": (
        "its proxy's address; then the same",
        f"{MAX_HEADER_BYTES} bytes",
        "the same",
        f"{grpc_server.ACCEPTS_PER_TURN} connections in one turn for all",
        "the same",
    ),
    "WireGuard's UDP port": (
        "a completed handshake",
        f"none; for all, {handshake_turns.MAX_WAITING:,} messages that wait and {handshake_turns.MAX_PROVEN_WAITING:,} more "
        f"that are proven, and {kib(8 * cookies.SOURCE_SLOTS)}",
        "a peer's sessions",
        f"{handshake_turns.TURN_COST // handshake_turns.HANDSHAKE_COST} handshakes or "
        f"{handshake_turns.TURN_COST // handshake_turns.COOKIE_COST} cookies in {ms(handshake_turns.TURN_INTERVAL)} for all",
        f"{kib(udp_socket.MAX_BYTES)} in one turn for all, and its [bandwidth](#bandwidth)",
    ),
    "event sink": (
        "a machine's overlay address",
        calls(API, has_tokens=False)[1],
        f"the same, of which {kib(SINK_BYTES)} for each connection; {RECENT} of recent events",
        REPORTED,
        "the same",
    ),
    "kernel logs, TCP and UDP": (
        "a machine's overlay address",
        "none",
        f"{kib(READ_BYTES + REPORTS.max_line_bytes)} for each connection; {RECENT} of recent lines",
        f"{ACCEPTS_PER_TURN} connections in one turn for all",
        f"{REPORTED}; by UDP {DATAGRAMS}",
    ),
    "goodbyes, UDP": ("its key and overlay address", "none", "none", DATAGRAMS, "the same"),
    "a server's request to move, UDP, at the machine": (
        "the server's overlay address and key",
        "none",
        "none",
        f"{goodbye.MOVES_AT_ONCE} datagrams in {goodbye.MOVE_SECONDS:g} s",
        "the same",
    ),
    "admin API, and `serve`'s control socket": (
        "a valid API key; for the socket the user",
        *calls(ADMIN_LIMITS, has_tokens=True),
        "the API's share",
        f"the API's share; {CALL_LIMITS_ADMIN.max_fields:,} fields of one request",
    ),
    "control socket of `join` and `wireguard`": (
        "the user of the process",
        "no access",
        calls(CONTROL_LIMITS, has_tokens=False)[1],
        "no access",
        KNOWN,
    ),
    "other servers": (
        "a certificate of a live server",
        *calls(PEER_LIMITS, has_tokens=True),
        "the API's share",
        f"the API's share; {CALL_LIMITS_ADMIN.max_fields:,} fields of one request",
    ),
    "metrics and health": (
        "nobody is",
        f"{kib(2 * http.MAX_REQUEST_BYTES + 2 * http.LONG_ANSWER_BYTES)} for each connection; for all "
        f"{http.MAX_LONG_ANSWERS + 1} answers",
        "–",
        f"{http.ACCEPTS_PER_TURN} connections and {endpoint.SAMPLES_AT_ONCE} samples in one turn for all; "
        "on average a quarter for all scrapes",
        "–",
    ),
    "web UI": (
        "a session",
        f"{calls(guard.LIMITS, has_tokens=True)[0]}, and {kib(guard.MAX_HEADERS + guard.MAX_BODY)} for each connection",
        f"{calls(guard.LIMITS, has_tokens=True)[1]}; the same for each connection",
        f"in its own process: {STRANGERS}",
        KNOWN,
    ),
    "a machine's own API": (
        "the server's overlay address",
        calls(MACHINE_LIMITS, has_tokens=False)[1],
        "the same",
        f"{STRANGERS}; {CALL_LIMITS.max_fields} fields of one request",
        "the same",
    ),
    "socket for `wg`": (
        "the user of the process",
        "no access",
        f"{kib(MAX_REQUEST_BYTES)} for each connection",
        "no access",
        f"{STEP} peers or allowed IPs in one turn; a request of more than {MANY_LINES} lines is read in a thread",
    ),
}
"""How a source is known; its memory, and its processor time, before and after."""

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


@pytest.mark.parametrize("name", COSTS)
def test_every_listeners_memory_and_processor_time_is_written_as_the_code_has_it(name: str) -> None:
    assert f"| {name} | {' | '.join(COSTS[name])} |" in (ROOT / "docs/limits.md").read_text()


@pytest.mark.parametrize("name", ROWS)
def test_every_listeners_budget_is_written_as_the_code_has_it(name: str) -> None:
    assert f"| {name} | {ROWS[name]} |" in (ROOT / "docs/limits.md").read_text()


def test_every_module_that_listens_has_a_row() -> None:
    package = ROOT / "siderolink"
    found = {str(path.relative_to(package)) for path in package.rglob("*.py") if OPENERS.search(path.read_text())}
    assert found == set(MODULES)
    rows = re.search(r"## Every listener\n(.*?)\n## ", (ROOT / "docs/limits.md").read_text(), re.S)
    assert rows is not None
    assert ROWS.keys() == COSTS.keys()
    assert len(re.findall(r"^\| (?!listener|---)", rows[1], re.M)) == len(ROWS) + len(COSTS)
