"""Server-sent events: the changed parts of a page, and a machine's kernel log."""

import json
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import anyio
from anyio.abc import TaskGroup
from starlette.types import Receive, Scope, Send

from siderolink.common.pb.siderolink.admin.v1 import HistoryServiceStub, MachineLogLine, MachineLogsRequest
from siderolink.common.tasks import background_tasks
from siderolink.common.text import one_line, timestamp
from siderolink.web.api import ApiError, Caller, ServerAwayError, SignedOutError, explained
from siderolink.web.sessions import Session, Sessions, TooManyError

EVERY: Final = 2.0
SHARE: Final = 20.0
"""A pause is this many times as long as the last rendering, so that no page takes more than a twentieth of a core."""
SELDOM: Final = 20.0
"""The longest pause."""
_BREATH: Final = 15.0
"""Seconds between comments that keep the connection open."""
_LOG_TAIL: Final = 200
_LOG_PENDING: Final = 1000
_LOG_EVERY: Final = 0.25
_HEADERS: Final = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]

ROW_BYTES: Final = 48 * 1024
"""Maximum bytes of changed rows (or one row) sent after one rendering; the others follow after later ones."""


@dataclass(frozen=True, slots=True)
class Rendering:
    """The present rendering of a page."""

    regions: Mapping[str, str]
    """The HTML of each changeable part, by its id."""
    rows: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """The HTML of each row, in order, by the ids of part and row."""


Render = Callable[[], Awaitable[Rendering]]


def event(name: str, data: object) -> bytes:
    """Encode one event; JSON contains no line end."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


class SentRows:
    """The rows of a part as sent to a browser."""

    def __init__(self) -> None:
        self._order: list[str] = []
        self._sent: dict[str, str] = {}
        """By row id, least recently sent first."""

    def changes(self, rows: Mapping[str, str]) -> dict[str, Any] | None:
        """What to send now: the order, and as many changed rows as fit into ROW_BYTES. None if nothing changed."""
        order = list(rows)
        for row_id in [row_id for row_id in self._sent if row_id not in rows]:
            del self._sent[row_id]
        new = [row_id for row_id in order if row_id not in self._sent]
        changed = new + [row_id for row_id, html in self._sent.items() if rows[row_id] != html]
        sent: dict[str, str] = {}
        left = ROW_BYTES
        for row_id in changed:
            left -= len(rows[row_id])
            if left < 0 and sent:
                break
            sent[row_id] = rows[row_id]
            self._sent.pop(row_id, None)
            self._sent[row_id] = rows[row_id]
        if not sent and order == self._order:
            return None
        self._order = order
        return {"order": order, "rows": sent}


class _SentPage:
    """A page as sent to a browser."""

    def __init__(self) -> None:
        self._regions: dict[str, str] = {}
        self._rows: dict[str, SentRows] = {}

    def changes(self, rendering: Rendering) -> Iterator[bytes]:
        """The events for the differences to a new rendering."""
        for name, html in rendering.regions.items():
            if self._regions.get(name) != html:
                self._regions[name] = html
                yield event("region", {"id": name, "html": html})
        for name, rows in rendering.rows.items():
            if (found := self._rows.setdefault(name, SentRows()).changes(rows)) is not None:
                yield event("rows", {"id": name} | found)


class LiveStream:
    """The response to an EventSource, until the browser disconnects, the session ends, or nothing more can be shown."""

    def __init__(self, sessions: Sessions, session: Session, render: Render) -> None:
        self._sessions = sessions
        self._session = session
        self._render = render
        self._log: tuple[Caller, str] | None = None
        self._send: Send
        self._lock = anyio.Lock()

    def with_log(self, caller: Caller, machine: str) -> None:
        """Also send a machine's kernel log."""
        self._log = caller, machine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._send = send
        await send({"type": "http.response.start", "status": 200, "headers": list(_HEADERS)})
        try:
            with self._sessions.streaming(self._session):
                async with background_tasks() as tasks:
                    tasks.start_soon(_cancel_on_disconnect, receive, tasks)
                    tasks.start_soon(self._send_keepalives)
                    if self._log is not None:
                        tasks.start_soon(self._follow_log, *self._log)
                    await self._show()
        except TooManyError as error:
            await self._send_event(event("stopped", str(error)))
        if self._session.is_over:
            await self._send_event(event("signed-out", ""))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_event(self, data: bytes) -> None:
        async with self._lock:
            await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def _send_keepalives(self) -> None:
        while True:
            await anyio.sleep(_BREATH)
            await self._send_event(b": still here\n\n")

    async def _show(self) -> None:
        sent = _SentPage()
        is_away = False
        while self._sessions.is_live(self._session):
            began = time.monotonic()
            try:
                rendering = await self._render()
                for data in sent.changes(rendering):
                    await self._send_event(data)
                if is_away:
                    await self._send_event(event("back", ""))
                is_away = False
            except SignedOutError:
                self._sessions.end(self._session)
                return
            except ServerAwayError as error:
                if not is_away:
                    await self._send_event(event("away", str(error)))
                is_away = True
            except ApiError as error:
                await self._send_event(event("stopped", str(error)))
                return
            took = 0.0 if is_away else time.monotonic() - began
            await anyio.sleep(min(max(EVERY, SHARE * took), SELDOM))

    async def _follow_log(self, caller: Caller, machine: str) -> None:
        """Send the last lines and new ones; restarts when the server was unavailable."""
        pending: deque[MachineLogLine] = deque(maxlen=_LOG_PENDING)
        async with background_tasks() as tasks:
            tasks.start_soon(self._send_lines, pending)
            since: float | None = None
            while True:
                try:
                    async with caller.following(HistoryServiceStub) as stub:
                        with explained():
                            request = MachineLogsRequest(machine=machine, follow=True, since=since, tail=_LOG_TAIL)
                            async for line in stub.machine_logs(request):
                                pending.append(line)
                                since = line.received_at + 1e-6
                except SignedOutError:
                    self._sessions.end(self._session)
                    return
                except ServerAwayError:
                    pass
                except ApiError as error:
                    await self._send_event(event("log-stopped", str(error)))
                    return
                await anyio.sleep(EVERY)

    async def _send_lines(self, pending: "deque[MachineLogLine]") -> None:
        while True:
            await anyio.sleep(_LOG_EVERY)
            if pending:
                lines = [pending.popleft() for _ in range(len(pending))]
                await self._send_event(event("log", _log_rows(lines)))


def _log_rows(lines: Sequence[MachineLogLine]) -> list[list[str]]:
    return [
        [timestamp(line.received_at)[11:19], one_line(line.level, limit=20), one_line(line.message, limit=2000)]
        for line in lines
    ]


async def _cancel_on_disconnect(receive: Receive, tasks: TaskGroup) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    tasks.cancel_scope.cancel()
