"""Server-sent events: the parts of a page that changed, and a machine's kernel log."""

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
from siderolink.common.text import one_line
from siderolink.web.api import ApiError, Caller, ServerAwayError, SignedOutError, explained
from siderolink.web.sessions import Session, Sessions, TooManyError
from siderolink.web.templating import timestamp

EVERY: Final = 2.0
SHARE: Final = 20.0
"""A pause is this many times as long as the look before it took: no page takes more than a twentieth of a core."""
SELDOM: Final = 20.0
"""The longest pause."""
_BREATH: Final = 15.0
"""Seconds between words that only keep the connection."""
_LOG_TAIL: Final = 200
_LOG_PENDING: Final = 1000
_LOG_EVERY: Final = 0.25
_HEADERS: Final = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]

ROW_BYTES: Final = 48 * 1024
"""Of changed rows, at most so many bytes (or one row) are told after one look; the others follow after the next ones."""


@dataclass(frozen=True, slots=True)
class Looks:
    """How a page looks now."""

    regions: Mapping[str, str]
    """The HTML of each part that may change, by its id."""
    rows: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """The HTML of each row, in order, by the ids of part and row."""


Render = Callable[[], Awaitable[Looks]]


def event(name: str, data: object) -> bytes:
    """One event; JSON holds no line end."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


class ToldRows:
    """What a browser was told of a part's rows."""

    def __init__(self) -> None:
        self._order: list[str] = []
        self._told: dict[str, str] = {}
        """By the rows' ids, the one that was told the longest ago first."""

    def news(self, rows: Mapping[str, str]) -> dict[str, Any] | None:
        """What to tell now: the order, and as many changed rows as ROW_BYTES holds. None where there is nothing."""
        order = list(rows)
        for row_id in [row_id for row_id in self._told if row_id not in rows]:
            del self._told[row_id]
        new = [row_id for row_id in order if row_id not in self._told]
        changed = new + [row_id for row_id, html in self._told.items() if rows[row_id] != html]
        told: dict[str, str] = {}
        left = ROW_BYTES
        for row_id in changed:
            left -= len(rows[row_id])
            if left < 0 and told:
                break
            told[row_id] = rows[row_id]
            self._told.pop(row_id, None)
            self._told[row_id] = rows[row_id]
        if not told and order == self._order:
            return None
        self._order = order
        return {"order": order, "rows": told}


class _Told:
    """What a browser was told of a page."""

    def __init__(self) -> None:
        self._regions: dict[str, str] = {}
        self._rows: dict[str, ToldRows] = {}

    def news(self, looks: Looks) -> Iterator[bytes]:
        """The events that tell how a page looks now."""
        for name, html in looks.regions.items():
            if self._regions.get(name) != html:
                self._regions[name] = html
                yield event("region", {"id": name, "html": html})
        for name, rows in looks.rows.items():
            if (found := self._rows.setdefault(name, ToldRows()).news(rows)) is not None:
                yield event("rows", {"id": name} | found)


class LiveStream:
    """The answer to one EventSource: until the browser goes, the session ends, or there is nothing more to show."""

    def __init__(self, sessions: Sessions, session: Session, render: Render) -> None:
        self._sessions = sessions
        self._session = session
        self._render = render
        self._log: tuple[Caller, str] | None = None
        self._send: Send
        self._lock = anyio.Lock()

    def with_log(self, caller: Caller, machine: str) -> None:
        """Tell a machine's kernel log, too."""
        self._log = caller, machine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._send = send
        await send({"type": "http.response.start", "status": 200, "headers": list(_HEADERS)})
        try:
            with self._sessions.streaming(self._session):
                async with background_tasks() as tasks:
                    tasks.start_soon(_cancel_when_gone, receive, tasks)
                    tasks.start_soon(self._breathe)
                    if self._log is not None:
                        tasks.start_soon(self._follow_log, *self._log)
                    await self._show()
        except TooManyError as error:
            await self._tell(event("stopped", str(error)))
        if self._session.is_over:
            await self._tell(event("signed-out", ""))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _tell(self, data: bytes) -> None:
        async with self._lock:
            await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def _breathe(self) -> None:
        while True:
            await anyio.sleep(_BREATH)
            await self._tell(b": still here\n\n")

    async def _show(self) -> None:
        told = _Told()
        is_away = False
        while self._sessions.is_live(self._session):
            began = time.monotonic()
            try:
                looks = await self._render()
                for data in told.news(looks):
                    await self._tell(data)
                if is_away:
                    await self._tell(event("back", ""))
                is_away = False
            except SignedOutError:
                self._sessions.end(self._session)
                return
            except ServerAwayError as error:
                if not is_away:
                    await self._tell(event("away", str(error)))
                is_away = True
            except ApiError as error:
                await self._tell(event("stopped", str(error)))
                return
            took = 0.0 if is_away else time.monotonic() - began
            await anyio.sleep(min(max(EVERY, SHARE * took), SELDOM))

    async def _follow_log(self, caller: Caller, machine: str) -> None:
        """The last lines, and those that come; the follower is begun again where the server was away."""
        pending: deque[MachineLogLine] = deque(maxlen=_LOG_PENDING)
        async with background_tasks() as tasks:
            tasks.start_soon(self._tell_lines, pending)
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
                    await self._tell(event("log-stopped", str(error)))
                    return
                await anyio.sleep(EVERY)

    async def _tell_lines(self, pending: "deque[MachineLogLine]") -> None:
        while True:
            await anyio.sleep(_LOG_EVERY)
            if pending:
                lines = [pending.popleft() for _ in range(len(pending))]
                await self._tell(event("log", _log_rows(lines)))


def _log_rows(lines: Sequence[MachineLogLine]) -> list[list[str]]:
    return [
        [timestamp(line.received_at)[11:19], one_line(line.level, limit=20), one_line(line.message, limit=2000)]
        for line in lines
    ]


async def _cancel_when_gone(receive: Receive, tasks: TaskGroup) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    tasks.cancel_scope.cancel()
