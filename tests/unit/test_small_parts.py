"""The small parts that every room uses."""

import asyncio
import socket
import subprocess
import sys
import threading
from collections.abc import Coroutine, Sequence
from ipaddress import IPv6Address
from typing import Any

import anyio
import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from siderolink.common import hostport
from siderolink.common.backoff import Backoff
from siderolink.common.errors import ConfigurationError
from siderolink.common.hostport import AddressInfo, HostPort
from siderolink.common.netlink import run_netlink
from siderolink.common.newest_dict import NewestDict
from siderolink.common.queues import Broadcast
from siderolink.common.tasks import background_tasks
from siderolink.common.text import one_line, shared
from tests.support.turns import counting_turns
from tests.support.waiting import until


def test_equal_texts_are_one_object_and_few_of_them_are_kept() -> None:
    def version(number: int) -> str:
        return f"v1.{number}.0"

    kept = shared(version(0))
    assert shared(version(0)) is kept
    for number in range(1000):
        shared(version(number))
    assert shared.cache_info().currsize <= 256
    assert shared(version(999)) == version(999)
    assert shared(version(0)) is not kept


def test_a_wait_that_fails_says_what_it_waited_for() -> None:
    found = ["one"]
    with pytest.raises(AssertionError, match=r"(?s)after 0 s it is False: .*len\(found\) > 1.*found = \['one'\]"):
        until(lambda: len(found) > 1, 0)


def test_backoff_doubles_up_to_its_cap() -> None:
    backoff = Backoff(first=1, cap=10, floor=0.5, at_once=True, uniform=lambda low, high: high)
    assert [backoff.next() for _ in range(7)] == [0, 1, 2, 4, 8, 10, 10]
    backoff.reset()
    assert backoff.next() == 0


@given(st.integers(min_value=0, max_value=2000))
def test_backoff_is_bounded_however_often_it_fails(failures: int) -> None:
    backoff = Backoff(first=0.5, cap=10)
    delay = 0.0
    for _ in range(failures):
        delay = backoff.next()
    assert 0 <= delay <= 10


@pytest.mark.anyio
async def test_broadcast_gives_past_items_then_new_ones_then_ends() -> None:
    broadcast: Broadcast[int] = Broadcast(history=2)
    for number in range(3):
        broadcast.publish(number)
    got: list[int] = []

    async def listen() -> None:
        async for number in broadcast.subscribe():
            got.append(number)  # noqa: PERF401

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(listen)
        await anyio.wait_all_tasks_blocked()
        broadcast.publish(3)
        await anyio.wait_all_tasks_blocked()
        broadcast.publish(4)
        broadcast.end()
    assert got == [1, 2, 3, 4]


@pytest.mark.anyio
async def test_a_reader_of_many_items_lets_others_run() -> None:
    broadcast: Broadcast[int] = Broadcast()
    listening = broadcast.subscribe()
    for number in range(1000):
        broadcast.publish(number)
    broadcast.end()
    got: list[int] = []
    async with counting_turns() as turns:
        async for number in listening:
            turns.count()
            got.append(number)
    assert got == [*range(1000)]
    assert turns.most <= 32


@pytest.mark.anyio
async def test_broadcast_bounds_what_waits_for_a_slow_reader() -> None:
    broadcast: Broadcast[int] = Broadcast()
    listening = broadcast.subscribe(limit=3)
    first = asyncio.ensure_future(anext(listening))
    await anyio.wait_all_tasks_blocked()
    for number in range(10):
        broadcast.publish(number)
    broadcast.end()
    assert [await first, *[number async for number in listening]] == [7, 8, 9]


@pytest.mark.anyio
async def test_background_tasks_raise_a_lone_error_as_itself() -> None:
    async def fail() -> None:
        raise LookupError("task")

    with pytest.raises(LookupError, match="task"):
        async with background_tasks() as tasks:
            tasks.start_soon(fail)
            await anyio.sleep_forever()
    with pytest.raises(KeyError, match="body"):
        async with background_tasks() as tasks:
            tasks.start_soon(anyio.sleep_forever)
            raise KeyError("body")


@pytest.mark.anyio
async def test_background_tasks_end_with_the_body() -> None:
    ended = anyio.Event()

    async def wait() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            ended.set()

    async with background_tasks() as tasks:
        tasks.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
    assert ended.is_set()


@pytest.mark.parametrize("text", ["192.0.2.1:1", "[2001:db8::1]:51820", "host:65535", "a-b.example.:443", "[fe80::1%eth0]:5"])
def test_host_and_port(text: str) -> None:
    assert str(HostPort.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":1",
        "host",
        "host:",
        "host:0",
        "host:65536",
        "host:١",
        "host:+1",
        "2001:db8::1:51820",
        "[192.0.2.1]:1",
        "[::1]",
        "-a:1",
    ]
    + ["a..b:1", "256.1.1.1:1", "a b:1", "a/b:1", "x" * 300 + ":1", "x" * 64 + ".example:1", "[::1]x:1", "host:1\n"],
)
def test_host_and_port_refused(text: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        HostPort.parse(text)
    assert len(str(refused.value)) < 600


@given(st.text())
def test_host_and_port_reads_any_text_or_refuses_it(text: str) -> None:
    try:
        HostPort.parse(text)
    except ConfigurationError:
        pass


@pytest.mark.anyio
async def test_names_are_resolved_and_addresses_are_not() -> None:
    assert [str(address) for address, _ in await HostPort.parse("[2001:db8::1]:5").resolve()] == ["2001:db8::1"]
    found = await HostPort("localhost", 5).resolve()
    assert all(address.is_loopback and port == 5 for address, port in found)
    with pytest.raises(OSError, match=r".+"):
        await HostPort("does-not-exist.invalid", 5).resolve()


@pytest.mark.anyio
async def test_an_address_that_a_name_has_on_one_link_only_keeps_its_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    async def look_up(host: str, port: int, *options: object) -> Sequence[AddressInfo]:
        return socket.getaddrinfo("fe80::1%lo", port, type=socket.SOCK_DGRAM)

    monkeypatch.setattr(hostport, "look_up", look_up)
    zone = socket.if_nametoindex("lo")
    assert await HostPort("router.local", 5).resolve() == [(IPv6Address(f"fe80::1%{zone}"), 5)]


@given(st.text(), st.integers(min_value=0, max_value=50))
def test_foreign_text_becomes_one_short_line(text: str, limit: int) -> None:
    line = one_line(text, limit=limit)
    assert len(line) <= limit
    assert line.isprintable()


@pytest.mark.parametrize("loop_factory", [asyncio.SelectorEventLoop, uvloop.new_event_loop])
def test_netlink_work_runs_beside_any_loop(loop_factory: type[asyncio.AbstractEventLoop]) -> None:
    """The kernel may take long, and a dump of thousands of interfaces does."""

    async def work() -> list[str]:
        from pyroute2 import AsyncIPRoute

        assert threading.current_thread() is not threading.main_thread()
        async with AsyncIPRoute() as netlink:
            return [link.get("ifname") async for link in await netlink.link("dump")]

    async def fail() -> None:
        raise LookupError("it went wrong")

    def run(main: Coroutine[Any, Any, Any]) -> object:
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            return runner.run(main)

    assert "lo" in str(run(run_netlink(work)))
    with pytest.raises(LookupError, match="it went wrong"):
        run(run_netlink(fail))


def test_cancellation_waits_for_netlink_work() -> None:
    done: list[bool] = []

    async def work() -> None:
        await asyncio.sleep(0.05)
        done.append(True)

    async def main() -> None:
        task = asyncio.create_task(run_netlink(work))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
    assert done == [True]


def test_client_and_server_do_not_import_each_other() -> None:
    for name, other in (("connect", "server"), ("Server", "client")):
        program = f"import sys, siderolink; siderolink.{name}; print('siderolink.{other}' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "False"


def test_every_name_of_the_package_is_there() -> None:
    import siderolink

    assert all(getattr(siderolink, name) is not None for name in siderolink.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        siderolink.nothing  # type: ignore[attr-defined] # noqa: B018


def test_a_newest_dict_keeps_the_entries_that_were_put_last() -> None:
    newest: NewestDict[str, int] = NewestDict(2)
    for key, value in (("a", 1), ("b", 2), ("a", 3), ("c", 4)):
        newest.put(key, value)
    assert list(newest.items()) == [("a", 3), ("c", 4)]
