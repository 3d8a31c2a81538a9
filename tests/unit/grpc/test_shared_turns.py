"""Servers that share turns use the loop's time like one; connections are charged, and local users take turns, too."""

import asyncio
import contextlib
import os
from pathlib import Path

import anyio
import pytest

from siderolink.common.grpc import Limits, Turns, open_channel, serve
from siderolink.common.grpc import server as server_module
from siderolink.common.grpc.accounts import CallBudget
from siderolink.common.grpc.turns import Work
from tests.support.api import Raw, Service, method

pytestmark = pytest.mark.anyio


class Recorded(Turns):
    """Turns that record who queued work, and whether it was known."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[tuple[str, bool]] = []

    def queue(self, source: str, work: Work, *, is_known: bool) -> None:
        self.sources.append((source, is_known))
        super().queue(source, work, is_known=is_known)

    def run_or_queue(self, source: str, work: Work, *, is_known: bool) -> None:
        self.sources.append((source, is_known))
        super().run_or_queue(source, work, is_known=is_known)


async def call(**where: object) -> None:
    async with open_channel(**where) as channel:  # type: ignore[arg-type]
        assert (await method(channel)(Raw(b"x"), timeout=30)).data == b"x"


async def test_servers_may_share_turns() -> None:
    turns = Recorded()
    async with (
        serve([Service()], host="127.0.0.1", turns=turns, has_tokens=True) as one,
        serve([Service()], host="::1", turns=turns, has_tokens=True) as other,
    ):
        await call(host="127.0.0.1", port=one.port)
        await call(host="::1", port=other.port)
    assert {("127.0.0.1", False), ("::/64", False)} <= set(turns.sources)


async def test_local_users_take_turns_as_known_sources(tmp_path: Path) -> None:
    turns = Recorded()
    path = tmp_path / "socket"
    async with serve([Service()], path=path, turns=turns):
        await call(path=str(path))
    assert turns.sources
    assert set(turns.sources) == {(f"uid {os.geteuid()}", True)}


async def test_each_connection_of_an_unknown_source_is_charged(monkeypatch: pytest.MonkeyPatch) -> None:
    charged: list[float] = []

    def charge(self: CallBudget, source: str, seconds: float, now: float) -> float:
        charged.append(seconds)
        return 0.0

    monkeypatch.setattr(CallBudget, "charge", charge)
    async with serve([Service()], host="127.0.0.1", has_tokens=True, is_known=lambda address: bool(known)) as server:
        known: list[bool] = []
        for _ in range(3):
            stream = await anyio.connect_tcp("127.0.0.1", server.port)
            await stream.aclose()
        with anyio.fail_after(30):
            while len(charged) < 3 or server.connections:
                await anyio.sleep(0.005)
        assert charged == [server_module.CONNECTION_SECONDS] * 3
        known.append(True)
        await call(host="127.0.0.1", port=server.port)
        assert server_module.CONNECTION_SECONDS not in charged[3:]


async def test_a_source_that_used_its_time_is_not_read_before_it_has_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connections wait, at most until they would have to be ready; others are served."""
    monkeypatch.setattr(server_module, "CONNECTION_SECONDS", 1000.0)
    known = {"::1"}
    limits = Limits(preface_timeout=120.0)
    async with serve(
        [Service()], host=["127.0.0.1", "::1"], limits=limits, has_tokens=True, is_known=known.__contains__
    ) as server:
        waiting = asyncio.ensure_future(call(host="127.0.0.1", port=server.port))
        with anyio.fail_after(30):
            while not server.connections:
                await anyio.sleep(0.005)
        await call(host="::1", port=server.port)
        assert not waiting.done()
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting
