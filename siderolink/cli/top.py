"""`siderolink top`: a live view of the links and peers of this host in a terminal."""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

import anyio
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from siderolink.cli.admin.connection import TargetOptions, connect, find_target
from siderolink.cli.admin.records import read_history
from siderolink.cli.control import ControlAnswers, query_all
from siderolink.cli.output import describe_age, describe_size
from siderolink.cli.running import run_until_stopped
from siderolink.cli.top_keys import Keyboard, Order, ViewState
from siderolink.common.errors import SideroLinkError
from siderolink.common.pb.siderolink.admin.v1 import HistoryEntry, ListHistoryRequest
from siderolink.common.pb.siderolink.control import Peer, StatusResponse
from siderolink.common.text import one_line, timestamp

UP_FOR: Final = 275.0
"""Seconds after the last handshake during which a link counts as up."""
HISTORY: Final = 20
"""Number of rates in the sparkline."""
TIMELINE: Final = 500
"""Maximum entries in a machine's timeline."""
BARS: Final = " ▁▂▃▄▅▆▇█"


@dataclass(slots=True)
class PeerRow:
    """One displayed peer."""

    name: str
    path: str
    last_handshake: float | None
    received_rate: float
    sent_rate: float
    history: Sequence[float]
    interface: str = ""
    node_uuid: str = ""
    """The machine's UUID, at a server; otherwise empty."""
    public_key: str = ""
    limits: Sequence[str] = ()
    """The machine's limits that drop something now."""

    @property
    def key(self) -> str:
        """The row's identity."""
        return f"{self.interface} {self.public_key}"

    @property
    def is_tunnel(self) -> bool:
        return self.path.startswith("tunnel")

    def is_up(self, now: float) -> bool:
        return self.last_handshake is not None and now - self.last_handshake < UP_FOR


@dataclass(slots=True)
class _Seen:
    at: float
    received: int
    sent: int
    rates: tuple[float, float] = (0.0, 0.0)
    history: deque[float] = field(default_factory=lambda: deque(maxlen=HISTORY))


class Rates:
    """Each peer's bytes per second between two polls."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], _Seen] = {}

    def rows(self, answers: Iterable[StatusResponse], now: float) -> list[PeerRow]:
        """`now` is monotonic, in seconds. Removed peers are dropped."""
        kept: dict[tuple[str, str], _Seen] = {}
        found = []
        for answer in answers:
            for peer in answer.peers:
                key = answer.interface, peer.public_key
                seen = kept[key] = self._note(key, peer, now)
                name = one_line(peer.name or peer.node_uuid or peer.public_key)
                who = answer.interface, peer.node_uuid if answer.role == "server" else "", peer.public_key
                history, limits = tuple(seen.history), tuple(peer.limits_biting)
                found.append(PeerRow(name, one_line(peer.path), peer.last_handshake, *seen.rates, history, *who, limits))
        self._seen = kept
        return found

    def _note(self, key: tuple[str, str], peer: Peer, now: float) -> _Seen:
        seen = self._seen.get(key)
        if seen is None or peer.received_bytes < seen.received or peer.sent_bytes < seen.sent or now <= seen.at:
            return _Seen(now, peer.received_bytes, peer.sent_bytes)
        seconds = now - seen.at
        seen.rates = (peer.received_bytes - seen.received) / seconds, (peer.sent_bytes - seen.sent) / seconds
        seen.history.append(sum(seen.rates))
        seen.at, seen.received, seen.sent = now, peer.received_bytes, peer.sent_bytes
        return seen


def sparkline(values: Sequence[float]) -> str:
    """One character per value, with a height relative to the highest."""
    highest = max(values, default=0.0)
    if not highest:
        return BARS[0] * len(values)
    return "".join(BARS[round(value / highest * (len(BARS) - 1))] for value in values)


def choose(rows: Iterable[PeerRow], *, order: Order, containing: str, count: int) -> list[PeerRow]:
    """The first `count` rows whose name, UUID or path contains a text: the busiest first, or the longest silent."""
    found = [row for row in rows if containing.lower() in f"{row.name} {row.node_uuid} {row.path}".lower()]
    keys: dict[Order, Callable[[PeerRow], tuple[float, str]]] = {
        Order.RATE: lambda row: (-row.received_rate - row.sent_rate, row.name),
        Order.HANDSHAKE: lambda row: (row.last_handshake or 0.0, row.name),
        Order.NAME: lambda row: (0.0, row.name),
    }
    return sorted(found, key=keys[order])[:count]


def render(result: ControlAnswers, rows: Sequence[PeerRow], shown: Sequence[PeerRow], now: float, selected: str = "") -> Group:
    """Render the rows; `now` is Unix time."""
    lines = [Text(one_line(line)) for line in (*result.notes, *result.failures)]
    for answer in result.answers:
        kind = " ".join(filter(None, (answer.device_kind, answer.transport)))
        reason = f", {answer.reason}" if answer.reason else ""
        lines.append(Text(one_line(f"{answer.interface}: {answer.role}, {answer.state}{reason}  {kind}")))
    up = sum(row.is_up(now) for row in rows)
    counts = f"{len(rows)} peers, {up} up, {sum(row.is_tunnel for row in rows)} by the tunnel"
    limited = sum(bool(row.limits) for row in rows)
    lines.append(Text(f"{counts}, {limited} limited" if limited else counts))
    table = Table(box=None, pad_edge=False)
    for heading in ("state", "peer", "path", "handshake", "received/s", "sent/s", "traffic"):
        table.add_column(heading, no_wrap=True)
    for row in shown:
        state = "up" if row.is_up(now) else "down" if row.last_handshake is not None else "new"
        state += ", limited" if row.limits else ""
        rates = describe_size(round(row.received_rate)), describe_size(round(row.sent_rate))
        cells = (state, row.name, row.path or "-", describe_age(row.last_handshake), *rates, sparkline(row.history))
        table.add_row(*map(Text, cells), style="reverse" if row.key == selected else None)
    return Group(*lines, table)


def render_timeline(row: PeerRow, entries: Sequence[HistoryEntry], problem: str, count: int, scrolled: int) -> Group:
    """Render one machine's history, newest entry first."""
    uuid = f" ({row.node_uuid})" if row.node_uuid not in ("", row.name) else ""
    state = f"{row.path or 'no path'}, handshake {describe_age(row.last_handshake)}  {sparkline(row.history)}"
    lines = [Text(one_line(f"{row.name}{uuid}: {state}"))]
    if row.limits:
        lines.append(Text(one_line(f"limited: {', '.join(row.limits)}")))
    if problem or not entries:
        lines.append(Text(one_line(problem) or "nothing is kept of it"))
    table = Table(box=None, pad_edge=False)
    for heading in ("time", "event", "detail", "from", "by", "version"):
        table.add_column(heading, no_wrap=True)
    for entry in entries[scrolled : scrolled + count]:
        cells = (timestamp(entry.at), entry.kind, entry.detail, entry.source, entry.transport, entry.version)
        table.add_row(*(Text(one_line(cell)) for cell in cells))
    return Group(*lines, table)


class _Screen:
    """The last status, and its rendering."""

    def __init__(self, console: Console, view: ViewState) -> None:
        self._console = console
        self.view = view
        self._rates = Rates()
        self._result = ControlAnswers()
        self._rows: list[PeerRow] = []
        self._entries: Sequence[HistoryEntry] = ()
        self._problem = ""

    @property
    def _page(self) -> int:
        return max(
            1, self._console.height - 4 - len(self._result.answers) - len(self._result.notes) - len(self._result.failures)
        )

    def _chosen(self) -> list[PeerRow]:
        return choose(self._rows, order=self.view.order, containing=self.view.containing, count=len(self._rows))

    def _selected(self) -> PeerRow | None:
        return next((row for row in self._rows if row.key == self.view.selected), None)

    async def poll(self) -> None:
        """Query the status again."""
        self._result = await query_all()
        self._rows = self._rates.rows(self._result.answers, time.monotonic())
        if self.view.is_timeline:
            await self._request_history()

    async def press(self, key: str) -> None:
        was_timeline = self.view.is_timeline
        self.view.press(key, [row.key for row in self._chosen()], self._page)
        if self.view.is_timeline and not was_timeline:
            await self._request_history()
        self.view.scrolled = min(self.view.scrolled, max(0, len(self._entries) - 1))

    async def _request_history(self) -> None:
        row = self._selected()
        self._entries, self._problem = (), ""
        if row is None or not row.node_uuid:
            self._problem = "only a server keeps a history of its machines"
            return
        try:
            async with connect(find_target(TargetOptions(interface=row.interface))) as connection:
                self._entries = await read_history(connection, ListHistoryRequest(machine=row.node_uuid), TIMELINE)
        except SideroLinkError as error:
            self._problem = str(error)

    def all(self) -> Group:
        """All selected rows."""
        return render(self._result, self._rows, self._chosen(), time.time())

    def shown(self) -> Group:
        """The rows that fit on the screen, and a line of key bindings."""
        view, row = self.view, self._selected()
        if view.is_timeline and row is not None:
            count = max(1, self._console.height - 4)
            body = render_timeline(row, self._entries, self._problem, count, view.scrolled)
            return Group(body, Text("esc back  up/down scroll", style="dim"))
        chosen = self._chosen()
        at = next((number for number, one in enumerate(chosen) if one.key == view.selected), 0)
        first = max(0, at - self._page + 1)
        body = render(self._result, self._rows, chosen[first : first + self._page], time.time(), view.selected)
        return Group(body, Text(self._help(), style="dim"))

    def _help(self) -> str:
        if self.view.is_typing:
            return f"filter: {self.view.containing}_  enter done  esc none"
        found = f" ({self.view.containing})" if self.view.containing else ""
        return f"s sort ({self.view.order})  / filter{found}  up/down select  enter timeline  q quit"


def run_top(*, seconds: float, order: Order, containing: str, once: bool) -> None:
    """Run until stopped; `once` prints after two polls and exits. Raises ConfigurationError."""
    # a pipe has no size: nothing is cut there
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    screen = _Screen(console, ViewState(order=order, containing=containing))

    async def print_once() -> None:
        await screen.poll()
        await anyio.sleep(seconds)
        await screen.poll()
        console.print(screen.all())

    async def watch() -> None:
        with (
            Keyboard() as keyboard,
            Live(console=console, screen=console.is_terminal, auto_refresh=False) as live,
        ):
            while not screen.view.is_over:
                await screen.poll()
                live.update(screen.shown(), refresh=True)
                next_at = anyio.current_time() + seconds
                while not screen.view.is_over and (left := next_at - anyio.current_time()) > 0:
                    for key in await keyboard.pressed(left):
                        await screen.press(key)
                    live.update(screen.shown(), refresh=True)

    run_until_stopped(print_once if once else watch)
