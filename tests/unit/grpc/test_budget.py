"""Which connections a server keeps, decided without sockets; and the same on a real server."""

import asyncio
import contextlib
import logging
import random
import ssl
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from h2.errors import ErrorCodes
from hyperframe.frame import SettingsFrame

from siderolink.common.grpc import Limits, Refusal, TrustedProxies, open_channel, serve, server_tls
from siderolink.common.grpc.budget import RESERVED, ConnectionBudget, Held
from tests.support.api import CALL, Raw, Tokens, method
from tests.support.certificates import make_certificate
from tests.support.http2 import PREFACE, RawPeer

LIMITS = Limits(max_connections=100, max_connections_per_address=10, max_unproven_connections=40, unproven_timeout=20)


class Door:
    """A budget, and what it closed."""

    def __init__(self, limits: Limits = LIMITS, reserved_for: tuple[str, ...] = (), *, has_tokens: bool = True) -> None:
        self.budget = ConnectionBudget(limits, 1 << 20, has_tokens=has_tokens, reserved_for=frozenset(reserved_for))
        self.closed: list[tuple[str, Refusal]] = []
        self.now = 0.0

    def enter(self, source: str) -> Held | Refusal:
        return self.budget.enter(source, self.now, lambda refusal, _: self.closed.append((source, refusal)))

    def fill(self, source: str, count: int) -> list[Held]:
        found = [self.enter(source) for _ in range(count)]
        held = [each for each in found if isinstance(each, Held)]
        assert len(held) == count, found
        return held


def test_one_address_may_hold_more_than_its_limit_while_there_is_room_for_all() -> None:
    door = Door()
    door.budget.know("192.0.2.1")
    door.fill("192.0.2.1", 51)
    assert door.enter("192.0.2.1") is Refusal.TOO_MANY_CONNECTIONS_FROM_ADDRESS
    door.budget.know("192.0.2.2")
    door.fill("192.0.2.2", 10)
    assert door.enter("192.0.2.2") is Refusal.TOO_MANY_CONNECTIONS_FROM_ADDRESS
    assert not door.closed


def test_a_full_budget_whose_sources_have_all_become_known_refuses_a_stranger() -> None:
    limits, known = replace(LIMITS, max_connections=3000, max_unproven_connections=3000), set[str]()
    budget = ConnectionBudget(limits, 1 << 20, has_tokens=True, is_known=known.__contains__)
    closed: list[Refusal] = []
    addresses = [f"2001:db8::{number:x}" for number in range(3000)]
    for address in addresses:
        assert isinstance(budget.enter(address, 0, lambda refusal, _: closed.append(refusal), address=address), Held)
    known.update(addresses)
    found = budget.enter("192.0.2.1", 0, lambda refusal, _: closed.append(refusal), address="192.0.2.1")
    assert found is Refusal.TOO_MANY_CONNECTIONS
    assert not closed
    assert len(budget) == 3000
    assert all(map(budget.is_known, addresses))


def test_a_stranger_with_all_connections_excludes_nobody() -> None:
    door = Door()
    door.fill("192.0.2.1", 40)
    assert door.enter("192.0.2.1") is Refusal.TOO_MANY_CONNECTIONS
    for number in range(100):
        assert isinstance(door.enter(f"198.51.100.{number}"), Held)
    assert Counter(door.closed)["192.0.2.1", Refusal.CROWDED_OUT] >= 39
    assert len(door.budget) == 40


def test_connections_are_reserved_for_known_addresses() -> None:
    door = Door()
    for number in range(200):
        door.enter(f"198.51.100.{number}")
    assert len(door.budget) == 40
    door.budget.know("192.0.2.1")
    for number in range(60):
        door.budget.know(f"203.0.113.{number}")
        door.fill(f"203.0.113.{number}", 1)
    assert len(door.budget) == 100
    door.closed.clear()
    # or all of it, if they need it
    door.fill("192.0.2.1", 1)
    assert len(door.budget) == 100
    assert [refusal for _, refusal in door.closed] == [Refusal.CROWDED_OUT]


def test_a_call_with_a_valid_token_makes_all_of_its_address_known() -> None:
    door = Door()
    held = door.fill("192.0.2.1", 40)
    door.budget.know("192.0.2.1")
    for number in range(40):
        door.fill(f"198.51.100.{number}", 1)
    assert not door.closed
    for each in held:
        door.budget.leave(each)
        door.budget.leave(each)
    assert len(door.budget) == 40


def test_an_address_known_by_its_machine_is_no_stranger() -> None:
    """A tunnel opened again after a restart carries no token, but packets of its machine."""
    heard = {"192.0.2.1"}
    closed: list[str] = []
    limits = replace(LIMITS, max_connections_per_address=100)
    budget = ConnectionBudget(limits, 1 << 20, has_tokens=True, is_known=heard.__contains__)

    def enter(source: str, now: float = 0.0) -> Held | Refusal:
        return budget.enter(source, now, lambda *_: closed.append(source), address=source)

    for _ in range(45):
        assert isinstance(enter("192.0.2.1"), Held)
    # another machine is heard only after it has connected
    for _ in range(30):
        assert isinstance(enter("192.0.2.2"), Held)
    heard.add("192.0.2.2")
    for number in range(25):
        assert isinstance(enter(f"198.51.100.{number}", 60.0), Held)
    assert not closed
    assert isinstance(enter("203.0.113.1", 60.0), Held)
    assert len(closed) == 1
    assert closed[0].startswith("198.51.100.")


def test_strangers_have_less_time_while_there_are_many() -> None:
    door = Door()
    first = door.fill("192.0.2.1", 21)
    assert len(first) == 21
    door.now = 19.0
    door.fill("198.51.100.1", 1)
    assert not door.closed
    door.now = 21.0
    door.fill("198.51.100.2", 1)
    assert door.closed == [("192.0.2.1", Refusal.UNPROVEN_TOO_LONG)] * 8
    door.closed.clear()
    door.fill("198.51.100.3", 1)
    assert not door.closed, "no more than half of what strangers may have is in use"


def test_without_tokens_no_connection_ends_by_time() -> None:
    door = Door(has_tokens=False)
    for number in range(100):
        door.fill(f"198.51.100.{number}", 1)
    door.now = 1e6
    assert isinstance(door.enter("192.0.2.1"), Held)
    assert [refusal for _, refusal in door.closed] == [Refusal.CROWDED_OUT]


def test_four_addresses_cannot_exclude_the_administrator() -> None:
    door = Door(Limits(max_connections=64, max_connections_per_address=16), ("fd00::1/128",), has_tokens=False)
    for number in range(4):
        for _ in range(100):
            door.enter(f"192.0.2.{number}")
    assert len(door.budget) == 64
    assert isinstance(door.enter("192.0.2.9"), Held), "another reader"
    door.closed.clear()
    door.fill("fd00::1/128", RESERVED)
    assert not door.closed, "the administrator's do not depend on what others hold"
    assert isinstance(door.enter("fd00::1/128"), Held)


def test_a_reached_limit_is_logged_once_a_minute_with_its_option(caplog: pytest.LogCaptureFixture) -> None:
    door = Door()
    door.budget.know("192.0.2.1")
    door.fill("192.0.2.1", 51)
    with caplog.at_level(logging.WARNING):
        for _ in range(1000):
            assert door.enter("192.0.2.1") is Refusal.TOO_MANY_CONNECTIONS_FROM_ADDRESS
    (line,) = caplog.messages
    assert "192.0.2.1 has 51 of 51 API connections" in line
    assert "--connections-per-address: 10" in line
    door.now = 61.0
    with caplog.at_level(logging.WARNING):
        door.enter("192.0.2.1")
    assert len(caplog.messages) == 2


def test_the_counts_are_right_after_any_sequence() -> None:
    """A thousand random steps against a plain list; nothing the budget closed counts any more."""
    chance = random.Random(1)
    door = Door()
    inside: dict[int, tuple[str, Held]] = {}
    closed: set[int] = set()
    for step in range(5000):
        door.now += chance.random()
        source = f"192.0.2.{chance.randrange(12)}"
        action = chance.random()
        if action < 0.6:
            found = door.budget.enter(source, door.now, lambda *_, step=step: closed.add(step))
            if isinstance(found, Held):
                inside[step] = source, found
        elif action < 0.95 and inside:
            _, held = inside.pop(chance.choice(list(inside)))
            door.budget.leave(held)
        elif chance.random() < 0.05:
            door.budget.know(source)
        for number in closed & inside.keys():
            del inside[number]
        assert len(door.budget) == len(inside) <= 100


def test_the_cost_of_a_connection_does_not_grow_in_a_flood() -> None:
    """Counted in steps of the interpreter, not in time."""

    def steps(count: int) -> int:
        limits = Limits(max_connections=count * 2, max_unproven_connections=count)
        door = Door(limits)
        for number in range(count):
            door.enter(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}")
        lines = 0

        def trace(*_: object) -> object:
            nonlocal lines
            lines += 1
            return trace

        import sys

        before = sys.gettrace()  # coverage's, perhaps
        sys.settrace(trace)  # type: ignore[arg-type]
        try:
            for number in range(50):
                door.enter(f"198.51.100.{number}")
        finally:
            sys.settrace(before)
        return lines

    assert steps(4000) < 1.2 * steps(100)


@pytest.fixture
def h2_by() -> None:
    """How h2 is used does not matter here."""


@pytest.fixture
def quiet() -> None:
    """These tests meet limits that are logged."""
    return


@contextlib.asynccontextmanager
async def holding(port: int, source: str, count: int) -> AsyncIterator[list[RawPeer]]:
    """So many connections from one of this host's addresses that say HTTP/2's preface and nothing more."""
    async with contextlib.AsyncExitStack() as stack:
        peers = []
        for _ in range(count):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0))
            stack.callback(writer.transport.abort)
            peer = RawPeer(reader, writer)
            peer.write(PREFACE + SettingsFrame(0).serialize())
            assert isinstance(await peer.frame(), SettingsFrame)
            peers.append(peer)
        yield peers


@pytest.mark.anyio
async def test_a_stranger_with_all_connections_excludes_no_machine() -> None:
    limits = Limits(max_connections=60, max_unproven_connections=20)
    async with serve([Tokens()], host="127.0.0.1", limits=limits, has_tokens=True) as server:
        async with holding(server.port, "127.0.0.2", 20) as peers:
            async with open_channel("127.0.0.1", server.port) as channel:
                assert (await method(channel)(Raw(b"valid"), timeout=30)).data == b"valid"
                frames = await peers[0].until_closed()
                assert frames
                assert peers[0].goaway is not None
                assert peers[0].goaway.error_code == ErrorCodes.ENHANCE_YOUR_CALM
                # the stranger's next connection replaces its own, and the machine's stays
                async with RawPeer.connect(server.port, "127.0.0.1"):
                    assert (await method(channel)(Raw(b"x"), timeout=30)).data == b"x"
        assert server.refusals[Refusal.CROWDED_OUT] >= 1


@pytest.mark.anyio
async def test_connections_in_their_tls_handshake_are_evicted_too(tmp_path: Path) -> None:
    root = make_certificate("root")
    (tmp_path / "pem").write_text(root.sign("127.0.0.1").pem)
    limits = Limits(max_connections=60, max_unproven_connections=5)
    trusting = ssl.create_default_context(cadata=root.certificate_pem)
    async with (
        serve([Tokens()], host="127.0.0.1", limits=limits, has_tokens=True, tls=server_tls(tmp_path / "pem")) as server,
        contextlib.AsyncExitStack() as stack,
    ):
        strangers = []  # kept, because a discarded writer closes its connection
        for _ in range(5):
            _, writer = await asyncio.open_connection("127.0.0.1", server.port, local_addr=("127.0.0.2", 0))
            strangers.append(writer)
            stack.callback(writer.transport.abort)
        while server.connections < len(strangers):
            await asyncio.sleep(0)
        async with open_channel("127.0.0.1", server.port, trusting) as channel:
            assert (await method(channel)(Raw(b"valid"), timeout=30)).data == b"valid"
        assert server.refusals[Refusal.CROWDED_OUT] == 1


@pytest.mark.anyio
async def test_strangers_have_fewer_connections_by_tls_which_are_larger(tmp_path: Path) -> None:
    (tmp_path / "pem").write_text(make_certificate("127.0.0.1").pem)
    limits = Limits(max_unproven_connections=20, max_unproven_tls_connections=5)
    for tls, most in ((None, 20), (server_tls(tmp_path / "pem"), 5)):
        async with (
            serve([Tokens()], host="127.0.0.1", limits=limits, has_tokens=True, tls=tls) as server,
            contextlib.AsyncExitStack() as stack,
        ):
            strangers = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(25)]
            for _, writer in strangers:
                stack.callback(writer.transport.abort)
            while server.connections + server.refusals.total() < 25:
                await asyncio.sleep(0.01)
            assert server.connections == most
            assert server.refusals == {Refusal.TOO_MANY_CONNECTIONS: 25 - most}


@pytest.mark.anyio
async def test_a_thousand_machines_behind_one_address_join_again_at_once(no_leaks: None) -> None:
    """Each uses a connection for the call and keeps another one, while a stranger holds as many as it can."""
    patient = Limits(preface_timeout=200, connect_timeout=200, unproven_timeout=200)  # the load of this host is not tested
    # on a busy host all connections are open before the first call has been served
    limits = replace(patient, max_connections=5000, max_connections_per_address=1024, max_unproven_connections=2500)
    served = 0

    def count(data: bytes) -> bytes:
        nonlocal served
        served += 1
        return data

    async with serve([Tokens(count)], host="127.0.0.1", limits=limits, has_tokens=True) as server:
        async with holding(server.port, "127.0.0.2", 200), contextlib.AsyncExitStack() as kept, asyncio.timeout(200):

            async def join() -> None:
                channel = await kept.enter_async_context(open_channel("127.0.0.1", server.port, limits=patient))
                await channel.connect()
                async with open_channel("127.0.0.1", server.port, limits=patient) as call:
                    await method(call)(Raw(b"valid"), timeout=200)

            began = time.process_time()
            await asyncio.gather(*(join() for _ in range(1000)))
            took = time.process_time() - began
            assert served == 1000
            assert not server.refusals
            assert server.connections >= 1000
    assert took < 60, (
        "seconds of processor time for both ends, of which 2 are usual; what grows with the crowd is counted above"
    )


def test_the_helpers_of_this_file_fit_the_interfaces() -> None:
    assert CALL in Tokens().__mapping__()
    assert TrustedProxies().forwarded_for("192.0.2.1", ["198.51.100.1"]) == "192.0.2.1"
