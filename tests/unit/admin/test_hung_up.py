"""Callers that disconnect during any call of the admin API: the server continues, and each operation completes or is undone."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import grpc.aio
import pytest

from siderolink.common.pb.siderolink.admin import v1 as pb
from siderolink.server.admin.services import LocalAccess
from siderolink.server.reporting import KeepOptions, LogLine, ReportOptions, Reports
from siderolink.server.reporting.archive import Archive
from siderolink.server.reporting.ingest import ReportIngest
from siderolink.server.store import Actor, AuditQuery, HistoryQuery
from tests.support.admin_server import AdminServer, open_admin_server
from tests.support.manager import FakeMachine
from tests.support.stores import opened
from tests.unit.admin.test_matrix import PREFIX, ROWS

pytestmark = pytest.mark.anyio

TURNS = (0, 1, 2, 3, 5, 8)
"""The caller disconnects after the call has run in this many turns of the event loop."""
SECONDS = (0.0003, 0.001, 0.002, 0.004, 0.008, 0.02)
"""The same in time, for a call that waits for a thread or for the database."""
POINTS = (*TURNS, *SECONDS)


class HangingUp:
    """Ends each call of the server at the point that was set last, as the connection does when its stream is reset."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.point: int | float | None = None
        self.ended = 0
        recognise = LocalAccess.of

        async def of(access: LocalAccess, call: Any) -> tuple[Actor, Any]:
            """The first step of each call."""
            task = asyncio.current_task()
            assert task is not None
            if isinstance(self.point, int):
                self._step(task, self.point)
            elif self.point is not None:
                asyncio.get_running_loop().call_later(self.point, self._end, task)
            return await recognise(access, call)

        monkeypatch.setattr(LocalAccess, "of", of)

    def _step(self, task: "asyncio.Task[object]", left: int) -> None:
        if left:
            asyncio.get_running_loop().call_soon(self._step, task, left - 1)
        else:
            self._end(task)

    def _end(self, task: "asyncio.Task[object]") -> None:
        if not task.done():
            self.ended += 1
            task.cancel()


@asynccontextmanager
async def busy_admin_server(folder: Path, kind: str) -> AsyncIterator[tuple[AdminServer, str]]:
    """With a machine, its history and its log lines; and the machine's UUID."""
    archive = Archive(KeepOptions(folder=folder / "reports", max_age=1e12, write_after=0.0))
    archive.open()
    reports = Reports(ReportIngest(ReportOptions(), lambda address: None), archive)
    async with opened(kind) as store, open_admin_server(folder, store, reports=reports) as admin_server:
        machine = FakeMachine()
        await admin_server.manager.join(machine)
        await admin_server.manager.handshake(machine)
        row = await admin_server.manager.row(machine)
        for number in range(3000):
            archive.add(LogLine(machine=row, received_at=float(number), raw=b"<6>1,%d,1,-;line" % number))
        try:
            yield admin_server, machine.node_uuid
        finally:
            archive.close()


def request_for(name: str, node_uuid: str, number: int) -> bytes:
    """The row's request, for the existing machine; calls that need a new name get one."""
    message: Any = type(ROWS[name][1]).parse(bytes(ROWS[name][1]))
    if hasattr(message, "machine"):
        message.machine = node_uuid
    elif name.startswith("MachineService/") and hasattr(message, "name"):
        message.name = node_uuid
    if name.endswith(("/CreateToken", "/CreateApiKey")):
        message.name = f"x{number}"
    if hasattr(message, "follow"):
        message.follow = number % 2 == 1
    return bytes(message)


async def call_and_leave(channel: grpc.aio.Channel, name: str, request: bytes) -> None:
    """Call, and read what comes before the call has ended, or for a moment."""
    call = channel.unary_stream(PREFIX + name)(request, timeout=20)
    with contextlib.suppress(grpc.aio.AioRpcError, TimeoutError):
        async with asyncio.timeout(0.05):
            async for _ in call:
                pass
    call.cancel()


@pytest.mark.parametrize("kind", ["sql", "postgres"])
async def test_the_server_goes_on_after_callers_disconnect_in_any_call(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging_up = HangingUp(monkeypatch)
    faults: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: faults.append(context))
    caplog.set_level(logging.WARNING)
    async with busy_admin_server(tmp_path, kind) as (admin_server, node_uuid):
        async with grpc.aio.insecure_channel(f"unix:{admin_server.path}") as channel:
            await channel.channel_ready()
            last = ("MachineService/DenyMachine", "MachineService/RemoveMachine")
            for name in (*(name for name in ROWS if name not in last), *last):
                for number, point in enumerate(POINTS):
                    hanging_up.point = point
                    await call_and_leave(channel, name, request_for(name, node_uuid, number))
            hanging_up.point = None
            await still_works(channel, admin_server)
        assert hanging_up.ended > 5 * len(ROWS), "most calls were ended amid their work"
        assert faults == []
        assert [record.getMessage() for record in caplog.records if record.name.startswith("siderolink")] == []
        # changes were audited and took effect at once
        made = await admin_server.administration.audit.page(AuditQuery(action="token.create", limit=100))
        names = [status.token.name for status in await admin_server.administration.tokens.list(limit=100)]
        assert sorted(entry.object_name for entry in made.items) == sorted(name for name in names if name != "given")
        seen = [
            (one.machine_id, one.kind, one.at) for one in await admin_server.manager.store.history(HistoryQuery(after_seq=0))
        ]
        assert len(seen) == len(set(seen)), "no entry of the history is written twice"


async def still_works(channel: grpc.aio.Channel, admin_server: AdminServer) -> None:
    """The server answers, by its store too, and a machine can join."""
    call = channel.unary_unary(PREFIX + "TokenService/ListTokens")
    with anyio.fail_after(20):
        answer = pb.ListTokensResponse.parse(await call(bytes(pb.ListTokensRequest())))
        assert any(token.is_given for token in answer.tokens)
        await admin_server.administration.audit.page()
        machine = FakeMachine()
        await admin_server.manager.join(machine)
        await admin_server.manager.handshake(machine)
