"""Delivery over real sockets on the loopback: to another implementation of gRPC, to disconnecting receivers, to no receiver."""

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import grpc
import grpc.aio
import pytest

from siderolink.client.reporting import (
    EventSender,
    KernelMessage,
    LogDestination,
    LogSender,
    forward_log,
    log_sender,
    read_kernel_log,
)
from siderolink.client.reporting.event_sender import MAX_REFUSALS
from siderolink.common.errors import ConfigurationError
from siderolink.common.grpc.listeners import accept
from siderolink.common.hostport import HostPort
from siderolink.common.machine_events import unpack_event
from siderolink.common.pb.events import EventRequest
from siderolink.common.pb.machine import ConfigLoadErrorEvent, PhaseEvent
from siderolink.common.tasks import background_tasks
from tests.support.proxy import running_proxy

pytestmark = pytest.mark.anyio


class ForeignSink:
    """An event sink of grpcio's server; refuses the first `failures` calls."""

    def __init__(self, failures: int = 0) -> None:
        self.failures = failures
        self.taken: list[EventRequest] = []

    async def publish(self, request: bytes, context: Any) -> bytes:
        if self.failures:
            self.failures -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "not now")
        self.taken.append(EventRequest.parse(request))
        return b""

    @asynccontextmanager
    async def serve(self, port: int = 0) -> AsyncIterator[int]:
        server = grpc.aio.server()
        handlers = {"Publish": grpc.unary_unary_rpc_method_handler(self.publish)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("events.EventSinkService", handlers),))
        port = server.add_insecure_port(f"127.0.0.1:{port}")
        await server.start()
        try:
            yield port
        finally:
            await server.stop(0)

    def phases(self) -> list[str]:
        payloads = [unpack_event(request.data) for request in self.taken if request.data is not None]
        return [payload.phase for payload in payloads if isinstance(payload, PhaseEvent)]


async def until(condition: Any) -> None:
    with anyio.fail_after(30):
        while not condition():
            await anyio.sleep(0.005)


async def test_every_event_arrives_once_and_in_order_though_calls_fail() -> None:
    sink, sender = ForeignSink(failures=2), EventSender()
    for number in range(5):
        sender.publish(PhaseEvent(phase=str(number)), actor_id="actor")
    async with sink.serve() as port, background_tasks() as tasks:
        tasks.start_soon(sender.run, HostPort("127.0.0.1", port))
        await until(lambda: sender.delivered == 5)
        assert sink.phases() == list("01234")
        assert {request.actor_id for request in sink.taken} == {"actor"}
        assert [request.id for request in sink.taken] == sorted({request.id for request in sink.taken})


async def test_an_event_refused_as_invalid_does_not_block_later_ones_forever() -> None:
    class Picky(ForeignSink):
        async def publish(self, request: bytes, context: Any) -> bytes:
            if b"odd" in request:
                self.failures += 1
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "this event is odd")
            self.taken.append(EventRequest.parse(request))
            return b""

    sink, sender = Picky(), EventSender()
    for phase in ("first", "odd", "last"):
        sender.publish(PhaseEvent(phase=phase))
    async with sink.serve() as port, background_tasks() as tasks:
        tasks.start_soon(sender.run, HostPort("127.0.0.1", port))
        with anyio.fail_after(30):
            while sender.waiting:
                sender.kick()
                await anyio.sleep(0.02)
    assert sink.phases() == ["first", "last"]
    assert (sender.delivered, sender.refused, sender.lost, sink.failures) == (2, 1, 1, MAX_REFUSALS)


async def test_a_host_name_is_resolved_at_each_connection_and_no_name_ends_delivery(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    loop = asyncio.get_running_loop()
    resolve = loop.getaddrinfo

    async def getaddrinfo(host: Any, port: Any, **options: Any) -> Any:
        asked.append(host)
        if len(asked) == 1:
            raise UnicodeError("label empty or too long")
        if len(asked) == 2:
            raise socket.gaierror(socket.EAI_AGAIN, "try again")
        return await resolve("127.0.0.1", port, **options)

    monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo)
    receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    receiver.bind(("127.0.0.1", 0))
    receiver.setblocking(False)
    monkeypatch.setattr("siderolink.client.reporting.log_sender.RESOLVE_SECONDS", 0.0001)
    sender = LogSender(LogDestination("udp", HostPort("collector.example", receiver.getsockname()[1])))
    with receiver:
        async with background_tasks() as tasks:
            tasks.start_soon(sender.run)
            for number in range(3):
                sender.add(KernelMessage(message=str(number)))
                with anyio.fail_after(30):
                    while sender.waiting:
                        sender.kick()
                        await anyio.sleep(0.02)
        assert [json.loads(receiver.recv(4096))["msg"] for _ in range(3)] == ["0", "1", "2"]
    assert len(asked) >= 4
    assert set(asked) == {"collector.example"}


async def test_delivery_goes_on_where_it_stopped_when_the_sink_is_back() -> None:
    sink, sender = ForeignSink(), EventSender()
    async with background_tasks() as tasks:
        async with sink.serve() as port:
            tasks.start_soon(sender.run, HostPort("127.0.0.1", port))
            sender.publish(PhaseEvent(phase="0"))
            await until(lambda: sender.delivered == 1)
        for number in range(1, 4):
            sender.publish(PhaseEvent(phase=str(number)))
        await anyio.sleep(0.1)
        assert (sender.waiting, sender.lost) == (3, 0)
        async with sink.serve(port):
            sender.kick()
            await until(lambda: sender.waiting == 0)
        assert sink.phases() == list("0123")


async def test_an_overlay_address_is_never_reached_by_a_proxy(monkeypatch: pytest.MonkeyPatch, no_leaks: None) -> None:
    async with running_proxy("http") as proxy, background_tasks() as tasks:
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.port}")
        for host in ("fdff::1", "sink.example"):
            sender = EventSender()
            sender.publish(PhaseEvent(phase="0"))
            tasks.start_soon(sender.run, HostPort(host, 8090))
        await until(lambda: proxy.asked)
        await anyio.sleep(0.2)
        assert set(proxy.asked) == {"sink.example:8090"}


@pytest.mark.parametrize(("error", "actor"), [("x" * 300_000, ""), ("", "a" * 1000)])
async def test_an_event_that_no_sink_would_accept_is_refused_at_once(error: str, actor: str) -> None:
    sender = EventSender()
    with pytest.raises(ConfigurationError, match="an event has at most"):
        sender.publish(ConfigLoadErrorEvent(error=error), actor_id=actor)
    assert sender.waiting == 0


async def test_events_beyond_the_queue_are_lost_counted_and_reported(caplog: pytest.LogCaptureFixture) -> None:
    sink, sender = ForeignSink(), EventSender(max_events=3)
    for number in range(10):
        sender.publish(PhaseEvent(phase=str(number)))
    async with sink.serve() as port, background_tasks() as tasks:
        tasks.start_soon(sender.run, HostPort("127.0.0.1", port))
        await until(lambda: sender.delivered == 3)
    assert sink.phases() == list("789")
    assert sender.lost == 7
    assert "7 events were lost" in caplog.text


class Receiver:
    """Receives lines by TCP; resets its connections on request."""

    def __init__(self) -> None:
        self.data = b""
        self.reading = True
        self.writers: list[asyncio.StreamWriter] = []

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        try:
            while chunk := await reader.read(4096):
                self.data += chunk
        except OSError:
            pass
        writer.close()

    @asynccontextmanager
    async def serve(self, port: int = 0) -> AsyncIterator[int]:
        server = await asyncio.start_server(self._take, "127.0.0.1", port)
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            server.close()
            self.break_off()
            await anyio.sleep(0.02)

    def break_off(self) -> None:
        for writer in self.writers:
            writer.transport.abort()
        self.writers.clear()

    def messages(self) -> list[str]:
        return [json.loads(line)["msg"] for line in self.data.split(b"\n")[:-1]]


def sender_to(port: int, protocol: Any = "tcp", **options: Any) -> LogSender:
    return LogSender(LogDestination(protocol, HostPort("127.0.0.1", port)), **options)


async def test_no_line_is_lost_over_a_broken_connection(no_leaks: None) -> None:
    receiver = Receiver()
    async with background_tasks() as tasks:
        async with receiver.serve() as port:
            sender = sender_to(port)
            tasks.start_soon(sender.run)
            for number in range(100):
                sender.add(KernelMessage(message=str(number)))
            await until(lambda: sender.waiting == 0)
        for number in range(100, 200):
            sender.add(KernelMessage(message=str(number)))
        async with receiver.serve(port):
            sender.kick()
            await until(lambda: sender.waiting == 0)
            await until(lambda: receiver.messages()[-1:] == ["199"])
            assert list(dict.fromkeys(receiver.messages())) == [str(number) for number in range(200)]
            assert sender.lost == 0


async def test_what_was_not_written_when_the_receiver_ended_is_sent_again(no_leaks: None) -> None:
    """The end comes while a batch is being written, by a receiver that reads on for a while, as our own server does."""
    got: list[int] = []
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1220)
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        listening.setblocking(False)

        async def serve(*, until_ended: bool) -> None:
            (taken, _), data, loop = await accept(listening), b"", asyncio.get_running_loop()
            with taken, anyio.move_on_after(1.0 if until_ended else 30.0):
                if until_ended:
                    await until(lambda: sender.waiting < 2000)
                    taken.shutdown(socket.SHUT_WR)
                while piece := await loop.sock_recv(taken, 65536):
                    data += piece
                    if data.endswith(b"\n") and json.loads(data.splitlines()[-1])["seq"] == 1999:
                        break  # the last one
            got.extend(json.loads(line)["seq"] for line in data.split(b"\n")[:-1])

        sender = sender_to(listening.getsockname()[1])
        for number in range(2000):
            sender.add(KernelMessage(message="x" * 400, seq=number))
        async with background_tasks() as tasks:
            tasks.start_soon(sender.run)
            await serve(until_ended=True)
            assert sender.lost == 0
            assert sender.delivered <= len(got) < 2000
            await serve(until_ended=False)
    assert sorted(set(got)) == list(range(2000))


async def test_a_receiver_that_reads_nothing_costs_bounded_memory(no_leaks: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sender = sender_to(deaf.getsockname()[1], max_lines=100, max_bytes=1_000_000)
        async with background_tasks() as tasks:
            tasks.start_soon(sender.run)
            for number in range(2000):
                sender.add(KernelMessage(message="x" * 4000, seq=number))
                if not number % 100:
                    await anyio.lowlevel.checkpoint()
            await until(lambda: sender.lost > 0)
            assert sender.waiting <= 100


async def test_lines_go_by_datagram_one_each_without_an_end(no_leaks: None) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", 0))
        receiver.setblocking(False)
        sender = sender_to(receiver.getsockname()[1], "udp")
        async with background_tasks() as tasks:
            tasks.start_soon(sender.run)
            for text in ("one", "two\nlines"):
                sender.add(KernelMessage(message=text))
            loop = asyncio.get_running_loop()
            with anyio.fail_after(30):
                found = [await loop.sock_recv(receiver, 65535) for _ in range(2)]
    assert [json.loads(data)["msg"] for data in found] == ["one", "two\nlines"]
    assert not any(b"\n" in data for data in found)


@pytest.mark.parametrize("character", ["x", "é", "\x01", "\\", "\ud800", "😀"])
@pytest.mark.parametrize("length", [3900, 5000, 100_000])
async def test_an_overlong_message_is_cut(character: str, length: int) -> None:
    """Existing receivers close the connection at a line of more than 4,096 bytes."""
    receiver = Receiver()
    async with receiver.serve() as port, background_tasks() as tasks:
        sender = sender_to(port)
        sender.add(KernelMessage(message=character * length))
        tasks.start_soon(sender.run)
        await until(lambda: receiver.data.endswith(b"\n"))
        assert len(receiver.data) <= 4096
        [text] = receiver.messages()
        is_whole = len(json.dumps(character, ensure_ascii=False)[1:-1].encode(errors="replace")) * length <= 3900
        assert text.endswith("…") is not is_whole
        assert is_whole or len(receiver.data) > 2800


async def test_a_receiver_that_resets_at_one_line_gets_the_later_ones(no_leaks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_sender, "MAX_REPEATS", 3)
    got: list[str] = []

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                got.append(json.loads(line)["msg"])
                if got[-1] == "poison":
                    break
        finally:
            reset = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
            writer.transport.abort()

    server = await asyncio.start_server(take, "127.0.0.1", 0)
    async with server, background_tasks() as tasks:
        sender = sender_to(server.sockets[0].getsockname()[1])
        tasks.start_soon(sender.run)
        for text in ("before", "poison"):
            sender.add(KernelMessage(message=text))
        number = 0
        while not got or "later" not in got[-1]:
            sender.add(KernelMessage(message=f"later {number}"))
            number += 1
            before = len(got)
            sender.kick()
            await until(lambda: len(got) > before)  # noqa: B023
    assert 1 < got.count("poison") <= 4


async def test_any_source_is_forwarded_and_delivery_outlives_it(no_leaks: None) -> None:
    async def source() -> AsyncIterator[KernelMessage]:
        yield KernelMessage(message="from elsewhere")

    receiver = Receiver()
    async with receiver.serve() as port, background_tasks() as tasks:
        tasks.start_soon(forward_log, source(), [sender_to(port), sender_to(port)])
        await until(lambda: receiver.messages() == ["from elsewhere"] * 2)


async def test_the_kernels_own_log_is_read_as_it_grows(no_leaks: None) -> None:
    mark = "siderolink test of the kernel log"
    with anyio.fail_after(30):
        records = read_kernel_log()
        first = await anext(records)
        assert first.time_ns > 0
        await anyio.Path("/dev/kmsg").write_text(f"<30>{mark}\n")
        async for message in records:
            if mark in message.message:
                assert (message.priority, message.facility) == (6, 3)
                break
        await records.aclose()  # type: ignore[attr-defined]


async def test_a_log_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read"):
        await anext(read_kernel_log(tmp_path / "none"))
