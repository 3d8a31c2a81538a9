"""`siderolink top`: the links and peers of this host, live, for people without a browser."""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

import anyio
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from siderolink.cli.control import Asked, ask_all
from siderolink.cli.running import loop_options
from siderolink.cli.status import describe_age, describe_size
from siderolink.common.pb.siderolink.control import Peer, StatusResponse
from siderolink.common.text import one_line

UP_FOR: Final = 275.0
"""Seconds since the last handshake for which a link is up."""
HISTORY: Final = 20
"""Rates that the sparkline shows."""
BARS: Final = " ▁▂▃▄▅▆▇█"


class Order(StrEnum):
    """What the rows are sorted by."""

    RATE = "rate"
    HANDSHAKE = "handshake"
    NAME = "name"


@dataclass(slots=True)
class Row:
    """One peer as it is shown."""

    name: str
    path: str
    last_handshake: float | None
    received_rate: float
    sent_rate: float
    history: Sequence[float]

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
    """Bytes per second of each peer, from one look to the next."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], _Seen] = {}

    def rows(self, answers: Iterable[StatusResponse], now: float) -> list[Row]:
        """`now` is seconds on a clock that nobody sets. Peers that are gone are forgotten."""
        kept: dict[tuple[str, str], _Seen] = {}
        found = []
        for answer in answers:
            for peer in answer.peers:
                key = answer.interface, peer.public_key
                seen = kept[key] = self._note(key, peer, now)
                name = one_line(peer.node_uuid or peer.public_key)
                found.append(Row(name, one_line(peer.path), peer.last_handshake, *seen.rates, tuple(seen.history)))
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
    """One character for each value, as high as it is against the highest."""
    highest = max(values, default=0.0)
    if not highest:
        return BARS[0] * len(values)
    return "".join(BARS[round(value / highest * (len(BARS) - 1))] for value in values)


def choose(rows: Iterable[Row], *, order: Order, containing: str, count: int) -> list[Row]:
    """The first `count` rows whose name or path holds a text; the busiest, or those silent for longest, first."""
    found = [row for row in rows if containing.lower() in f"{row.name} {row.path}".lower()]
    keys: dict[Order, Callable[[Row], tuple[float, str]]] = {
        Order.RATE: lambda row: (-row.received_rate - row.sent_rate, row.name),
        Order.HANDSHAKE: lambda row: (row.last_handshake or 0.0, row.name),
        Order.NAME: lambda row: (0.0, row.name),
    }
    return sorted(found, key=keys[order])[:count]


def render(asked: Asked, rows: Sequence[Row], shown: Sequence[Row], now: float) -> Group:
    """The whole screen; `now` is Unix time."""
    lines = [Text(one_line(line)) for line in (*asked.notes, *asked.failures)]
    for answer in asked.answers:
        kind = " ".join(filter(None, (answer.device_kind, answer.transport)))
        reason = f", {answer.reason}" if answer.reason else ""
        lines.append(Text(one_line(f"{answer.interface}: {answer.role}, {answer.state}{reason}  {kind}")))
    up = sum(row.is_up(now) for row in rows)
    lines.append(Text(f"{len(rows)} peers, {up} up, {sum(row.is_tunnel for row in rows)} by the tunnel"))
    table = Table(box=None, pad_edge=False)
    for heading in ("state", "peer", "path", "handshake", "received/s", "sent/s", "traffic"):
        table.add_column(heading, no_wrap=True)
    for row in shown:
        state = "up" if row.is_up(now) else "down" if row.last_handshake is not None else "new"
        rates = describe_size(round(row.received_rate)), describe_size(round(row.sent_rate))
        cells = (state, row.name, row.path or "-", describe_age(row.last_handshake), *rates, sparkline(row.history))
        table.add_row(*map(Text, cells))
    return Group(*lines, table)


def run_top(*, seconds: float, order: Order, containing: str, once: bool) -> None:
    """Show until stopped; `once` prints after two looks and ends. Raises ConfigurationError."""
    # a pipe has no size of its own: nothing is cut there
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    rates = Rates()

    async def look() -> Group:
        asked = await ask_all()
        rows = rates.rows(asked.answers, time.monotonic())
        count = len(rows) if once else max(1, console.height - 3 - len(asked.answers))
        return render(asked, rows, choose(rows, order=order, containing=containing, count=count), time.time())

    async def work() -> None:
        if once:
            await look()
            await anyio.sleep(seconds)
            console.print(await look())
            return
        with Live(console=console, screen=console.is_terminal, auto_refresh=False) as live:
            while True:
                live.update(await look(), refresh=True)
                await anyio.sleep(seconds)

    try:
        anyio.run(work, backend_options=loop_options())
    except KeyboardInterrupt:
        pass
