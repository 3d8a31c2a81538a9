"""Metrics without a server: the limits of the pages, the text format, and totals that outlive their objects."""

import asyncio
import contextlib
import errno
import gc
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import chain

import anyio
import anyio.lowlevel
import pytest
from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from siderolink.cli.metrics import endpoint, families, http
from siderolink.cli.metrics.endpoint import Families, Pages
from siderolink.cli.metrics.families import DEVICE_DROPS, MachineSeries, by, device_families, machine_families
from siderolink.cli.metrics.http import PageAnswer, serve_pages
from siderolink.cli.options import MetricsOptions, metrics_options
from siderolink.common.errors import AddressInUseError, ConfigurationError, StoreError, StoreFullError
from siderolink.common.hostport import HostPort
from siderolink.common.keys import PrivateKey
from siderolink.server import Machine, MachineStatus, MemoryStore, Store
from siderolink.server.counters import HealthCheck
from siderolink.server.fleet.directory import LinkState
from siderolink.server.store.base import Transaction
from siderolink.server.store.measured import MeasuredStore
from tests.support.crowd import open_crowd

pytestmark = pytest.mark.anyio

LOOPBACK = HostPort("127.0.0.1", 0)


async def hello() -> PageAnswer:
    return PageAnswer(b"hello")


async def ask(port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        return await asyncio.wait_for(reader.read(), 20)
    finally:
        writer.close()


async def test_metrics_pages_answer_and_refuse_other_requests() -> None:
    async def broken() -> PageAnswer:
        raise ValueError("secret detail")

    async with serve_pages(LOOPBACK, {"/hello": hello, "/broken": broken}) as port:
        answer = await ask(port, b"GET /hello?x=1 HTTP/1.1\r\nHost: here\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"Content-Length: 5\r\n" in answer
        assert answer.endswith(b"\r\n\r\nhello")
        assert (await ask(port, b"HEAD /hello HTTP/1.1\r\n\r\n")).endswith(b"\r\n\r\n")
        assert b" 404 " in await ask(port, b"GET /else HTTP/1.1\r\n\r\n")
        assert b" 405 " in await ask(port, b"POST /hello HTTP/1.1\r\n\r\n")
        assert b" 400 " in await ask(port, b"\x16\x03\x01\r\n\r\n")
        assert b" 431 " in await ask(port, b"GET /hello HTTP/1.1\r\nX: " + bytes(http.MAX_REQUEST_BYTES) + b"\r\n\r\n")
        failed = await ask(port, b"GET /broken HTTP/1.1\r\n\r\n")
        assert b" 500 " in failed
        assert b"secret" not in failed


async def test_a_page_that_the_host_prevents_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    async def broken() -> PageAnswer:
        raise OSError(errno.EMFILE, "Too many open files")

    async with serve_pages(LOOPBACK, {"/broken": broken}) as port:
        assert b" 503 " in await ask(port, b"GET /broken HTTP/1.1\r\n\r\n")
    (record,) = caplog.records
    assert record.exc_info is None
    assert "the page /broken failed: this process has too many files open" in record.getMessage()


async def test_metrics_are_read_where_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nothing:
        certificate, is_leaving = None, False

        async def read(self) -> Families:
            return list

        async def health(self) -> list[HealthCheck]:
            return []

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert b"process_open_fds" in (await Pages(Nothing()).metrics()).body


async def test_idle_clients_hold_few_connections_and_exclude_nobody() -> None:
    async with serve_pages(LOOPBACK, {"/hello": hello}) as port:
        idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(http.MAX_CONNECTIONS)]
        await asyncio.sleep(0)
        assert (await ask(port, b"GET /hello HTTP/1.1\r\n\r\n")).endswith(b"\r\n\r\nhello")
        with contextlib.suppress(ConnectionError):  # the first one was closed to make room
            assert await idle[0][0].read() == b""
        last_reader, last = idle[-1]
        last.write(b"GET /hello HTTP/1.1\r\n\r\n")
        assert (await last_reader.read()).endswith(b"hello")
        for _, writer in idle:
            writer.close()


async def test_no_connection_is_taken_while_all_are_being_answered() -> None:
    begun, go_on = asyncio.Semaphore(0), asyncio.Event()

    async def slow() -> PageAnswer:
        begun.release()
        await go_on.wait()
        return await hello()

    async with serve_pages(LOOPBACK, {"/slow": slow}) as port:
        asked = [asyncio.create_task(ask(port, b"GET /slow HTTP/1.1\r\n\r\n")) for _ in range(http.MAX_CONNECTIONS)]
        for _ in asked:
            await begun.acquire()
        try:
            answer = await ask(port, b"GET /slow HTTP/1.1\r\n\r\n")
        except ConnectionError:
            answer = b""
        assert answer == b""
        go_on.set()
        assert all(answer.endswith(b"hello") for answer in await asyncio.gather(*asked))


@pytest.mark.parametrize(
    "anyio_backend", [("asyncio", {"use_uvloop": loop}) for loop in (False, True)], ids=["asyncio", "uvloop"]
)
async def test_a_client_that_is_gone_before_its_answer_is_no_error() -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()
    errors: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))

    async def slow() -> PageAnswer:
        begun.set()
        await go_on.wait()
        return await hello()

    async with serve_pages(LOOPBACK, {"/slow": slow}) as port:
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"GET /slow HTTP/1.1\r\n\r\n")
            await begun.wait()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing it resets it
        await asyncio.sleep(0.1)
        go_on.set()
        await asyncio.sleep(0.1)
    gc.collect()  # an exception that nobody retrieved is reported then
    assert not errors


async def test_idle_clients_are_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "REQUEST_TIMEOUT", 0.05)
    async with serve_pages(LOOPBACK, {"/hello": hello}) as port:
        assert await ask(port, b"GET /hello HTTP/1.1\r\n") == b""


async def test_a_port_in_use_raises_our_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(AddressInUseError):
        async with serve_pages(HostPort("127.0.0.1", taken.getsockname()[1]), {}):
            raise AssertionError


@pytest.mark.parametrize(
    ("given", "host", "port"),
    [("9180", "127.0.0.1", 9180), (":9180", "127.0.0.1", 9180), ("[::1]:1", "::1", 1), ("0.0.0.0:9180", "0.0.0.0", 9180)],
)
async def test_a_port_without_a_host_means_the_loopback(given: str, host: str, port: int) -> None:
    assert metrics_options(given) == MetricsOptions(listen=HostPort(host, port))


@pytest.mark.parametrize("given", ["", "x", "99999", "host:", "1:2:3"])
async def test_another_address_is_refused(given: str) -> None:
    with pytest.raises(ConfigurationError):
        metrics_options(given)


def values(metrics: Iterable[Metric]) -> dict[str, float]:
    return {sample.name + "".join(sample.labels.values()): sample.value for found in metrics for sample in found.samples}


async def test_totals_of_a_device_survive_its_peers() -> None:
    async with open_crowd(3) as crowd:
        for member in crowd.members:
            crowd.hear(member, crowd.packet(member))
        before = await crowd.device.counters()
        assert (before.peers, len(before.session_ages)) == (3, 3)
        assert min(before.received_bytes, before.sent_bytes) > 0
        for member in crowd.members[:2]:
            await crowd.leave(member)
        after = await crowd.device.counters()
        assert (after.peers, len(after.session_ages)) == (1, 1)
        assert (after.received_bytes, after.sent_bytes) == (before.received_bytes, before.sent_bytes)
        found = values(device_families(after, crowd.device.drops() | {"malformed": 7}))
        assert found["siderolink_wireguard_bytes_totalreceived"] == before.received_bytes
        assert found["siderolink_drops_totalmalformed"] == 7
        assert all(f"siderolink_drops_total{reason}" in found for reason in DEVICE_DROPS)
        assert found["siderolink_session_age_seconds_bucket+Inf"] == 1


async def test_other_tasks_run_while_peers_are_listed() -> None:
    async with open_crowd(250) as crowd:
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await anyio.lowlevel.checkpoint()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(count)
            await anyio.lowlevel.checkpoint()
            turns = 0
            assert len(await crowd.device.peers()) == 250
            assert turns >= 3
            keys = [member.key.public_key() for member in crowd.members[:2]] + [PrivateKey.generate().public_key()]
            assert {peer.public_key for peer in await crowd.device.peers(keys)} == set(keys[:2])
            tasks.cancel_scope.cancel()


async def test_a_page_is_rendered_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted, not timed: what is made and rendered in one turn of the loop fits into two parts."""
    made = rendered = most_made = most_rendered = 0

    def render(found: Collector) -> bytes:
        nonlocal rendered, most_rendered
        rendered += sum(len(family.samples) for family in found.collect())
        most_rendered = max(most_rendered, rendered)
        return generate_latest(found)

    class Counting:
        """A machine's status, counted when a sample is made of it."""

        peer = None
        machine: Machine

        @property
        def state(self) -> LinkState:
            nonlocal made, most_made
            made += 1
            most_made = max(most_made, made)
            return LinkState.UP

    async def turn() -> None:
        nonlocal made, rendered
        while True:
            made = rendered = 0
            await anyio.lowlevel.checkpoint()

    monkeypatch.setattr(endpoint, "generate_latest", render)
    async with open_crowd(1) as crowd:
        machine = await crowd.machines.find(crowd.members[0].node_uuid)
    assert machine is not None
    rows = []
    for number in range(5 * families.MACHINES_AT_ONCE + 7):
        rows.append(Counting())
        rows[-1].machine = replace(machine, id=f"m{number}")
    long = by("long", "One family of many values.", "name", {f"n{number}": number for number in range(3000)})
    source = Fixed(lambda: chain([long], machine_families(MachineSeries(rows, 0))))  # type: ignore[arg-type]
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(turn)
        text = (await Pages(source).metrics()).body.decode()
        tasks.cancel_scope.cancel()
    assert 0 < most_made <= 2 * families.MACHINES_AT_ONCE
    assert 0 < most_rendered <= 2 * endpoint.SAMPLES_AT_ONCE
    found = {family.name: family for family in text_string_to_metric_families(text)}
    assert len(found["siderolink_long"].samples) == 3000
    assert len(found["siderolink_machine_up"].samples) == len(rows)
    heads = [line for line in text.splitlines() if line.startswith("# HELP")]
    assert len(heads) == len(set(heads))


class Failing(MemoryStore):
    """Fails on request."""

    error: StoreError | None = None

    async def transact(self, work):  # type: ignore[no-untyped-def]
        if self.error is not None:
            raise self.error
        return await super().transact(work)


async def test_a_store_is_measured() -> None:
    inner = Failing()
    store: Store = (measured := MeasuredStore(inner))

    async def work(transaction: Transaction) -> str:
        assert await transaction.server() is None
        return "done"

    assert await store.transact(work) == "done"
    inner.error = StoreFullError("no room")
    with pytest.raises(StoreFullError):
        await store.transact(work)
    inner.error = StoreError("broken")
    with pytest.raises(StoreError):
        await store.transact(work)
    found = measured.counters()
    assert (found.count, found.failures) == (3, 2)
    assert (measured.refused_at is not None, measured.refusal) == (True, "no room")
    assert found.seconds > 0


async def test_labels_from_machines_are_escaped() -> None:
    async with open_crowd(1) as crowd:
        found = await crowd.machines.find(crowd.members[0].node_uuid)
    assert found is not None
    hostile = 'v1"} 1\nsiderolink_forged 1\\'
    machine = MachineStatus(machine=replace(found, talos_version=hostile), state=LinkState.UP, peer=None)
    source = Fixed(lambda: machine_families(MachineSeries([machine], 4)))
    text = (await Pages(source).metrics()).body.decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert "siderolink_forged" not in families
    assert families["siderolink_machine_info"].samples[0].labels["talos_version"] == hostile
    assert families["siderolink_machine_series_omitted"].samples[0].value == 4


class Fixed:
    """A source that always gives the same values and counts how often it was read."""

    certificate = None
    is_leaving = False

    def __init__(self, families: Families, *checks: HealthCheck) -> None:
        self.reads = 0
        self._families = families
        self._checks = checks

    async def read(self) -> Families:
        self.reads += 1
        return self._families

    async def health(self) -> Sequence[HealthCheck]:
        return self._checks


async def test_scrapes_that_come_together_share_an_answer() -> None:
    pages = Pages(source := Fixed(lambda: ()))
    async with anyio.create_task_group() as tasks:
        for _ in range(20):
            tasks.start_soon(pages.metrics)
    assert source.reads == 1


@asynccontextmanager
async def at_date(monkeypatch: pytest.MonkeyPatch, moment: float) -> AsyncIterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: moment)
        yield


async def test_a_draining_server_is_healthy_but_not_ready() -> None:
    source = Fixed(lambda: (), HealthCheck(name="store", is_good=True, text=""))
    source.is_leaving = True
    pages = Pages(source)
    ready = await pages.ready()
    assert (ready.status, b'"drain"' in ready.body) == (503, True)
    assert (await pages.live()).status == 200
    assert b'check="drain"' not in (await pages.metrics()).body


async def test_health_names_what_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(name: str, good: bool) -> HealthCheck:
        return HealthCheck(name=name, is_good=good, text=f"{name} is {good}")

    good = Pages(Fixed(lambda: (), check("device", True), check("store", True)))
    assert (await good.live()).status == (await good.ready()).status == 200
    no_store = Pages(Fixed(lambda: (), check("device", True), check("store", False)))
    assert ((await no_store.live()).status, (await no_store.ready()).status) == (200, 503)
    assert b"store is False" in (await no_store.ready()).body
    no_device = Pages(Fixed(lambda: (), check("device", False)))
    assert ((await no_device.live()).status, (await no_device.ready()).status) == (503, 503)
    async with at_date(monkeypatch, 86_400.0):
        old = await good.ready()
    assert old.status == 503
    assert b"long past" in old.body
