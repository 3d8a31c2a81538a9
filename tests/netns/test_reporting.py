"""Events and kernel log lines from real machines to a real server, in namespaces: delivered, kept over breaks, refused."""

import json
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import anyio
import anyio.abc
import grpc
import pytest
from anyio.from_thread import BlockingPortal

from siderolink import Link, Server, connect
from siderolink.client.reporting import EventSender, KernelMessage, LogDestination, LogSender, forward_log
from siderolink.common.hostport import HostPort
from siderolink.common.keys import PrivateKey
from siderolink.common.machine_events import MachineEventPayload
from siderolink.common.pb.events import EventRequest
from siderolink.common.pb.google.protobuf import Any as PbAny
from siderolink.common.pb.machine import MachineStatusEvent, MachineStatusEventMachineStage, PhaseEvent, SequenceEvent
from siderolink.common.tasks import background_tasks
from siderolink.server import LinesDropped, LogLine, MachineEvent, ReportOptions
from tests.conftest import descriptor_kinds, opened_since
from tests.support.grpcio_target import target_in_namespace
from tests.support.machine_api import status_of
from tests.support.topology import SERVER_V4, Net, routed

TOKEN = "the-join-token"
URL = f"grpc://{SERVER_V4}:4000?jointoken={TOKEN}"
SERVER = "fdae:41e4:649b:9303::1"
SINK, LOGS = 8090, 8092
KEY = PrivateKey.generate()


@contextmanager
def serving(net: Net, **options: Any) -> Iterator[tuple[Server, BlockingPortal]]:
    reports = ReportOptions(event_sink_port=SINK, log_port=LOGS, **options)
    server = Server(
        api_listen="0.0.0.0:4000",
        wireguard_endpoints=[f"{SERVER_V4}:51820"],
        join_token=TOKEN,
        device="userspace",
        private_key=KEY,
        reports=reports,
    )
    with net.server.portal() as portal, portal.wrap_async_context_manager(server):
        yield server, portal


@dataclass
class Reporter:
    """A machine that reports."""

    link: Link
    events: EventSender
    logs: LogSender
    lines: "anyio.abc.ObjectSendStream[KernelMessage]"


@asynccontextmanager
async def reporter(protocol: str = "tcp", **options: Any) -> AsyncIterator[Reporter]:
    send, receive = anyio.create_memory_object_stream[KernelMessage](1000)
    events = EventSender()
    logs = LogSender(LogDestination(protocol, HostPort(SERVER, LOGS)), **options)  # type: ignore[arg-type]
    async with send, receive, connect(URL, uuid=str(uuid.uuid4()), device="userspace") as link, background_tasks() as tasks:
        tasks.start_soon(events.run, HostPort(SERVER, SINK))
        tasks.start_soon(forward_log, receive, [logs])
        yield Reporter(link, events, logs, send)


@contextmanager
def reporting(net: Net, number: int = 0, **options: Any) -> Iterator[tuple[Reporter, BlockingPortal]]:
    with net.machines[number].portal() as portal, portal.wrap_async_context_manager(reporter(**options)) as machine:
        yield machine, portal


def wait(portal: BlockingPortal, condition: Callable[[], bool], seconds: float = 30) -> None:
    async def until() -> None:
        with anyio.fail_after(seconds):
            while not condition():
                await anyio.sleep(0.01)

    portal.call(until)


def only_machine(server: Server, portal: BlockingPortal) -> str:
    [status] = portal.call(server.machines)
    return status.machine.id


def kept_events(server: Server, portal: BlockingPortal) -> list[MachineEvent]:
    return server.reports.recent_events(only_machine(server, portal))


def kept_lines(server: Server, portal: BlockingPortal) -> list[LogLine]:
    return server.reports.recent_lines(only_machine(server, portal))


PAYLOADS: list[MachineEventPayload] = [
    SequenceEvent(sequence="boot"),
    PhaseEvent(phase="network"),
    MachineStatusEvent(stage=MachineStatusEventMachineStage.MAINTENANCE),
]


def test_events_and_lines_arrive_in_order() -> None:
    with routed() as net, serving(net) as (server, server_portal):
        streams = server_portal.call(lambda: (server.reports.events(), server.reports.lines()))
        with reporting(net) as (machine, portal):
            ids = [portal.call(machine.events.publish, payload) for payload in PAYLOADS]
            for number in range(3):
                portal.call(machine.lines.send, KernelMessage(message=f"line {number}", seq=number, priority=3, clock=7))
            wait(portal, lambda: machine.events.delivered == 3)

            async def read() -> tuple[list[object], list[object]]:
                with anyio.fail_after(30):
                    return [await streams[0].__anext__() for _ in range(3)], [await streams[1].__anext__() for _ in range(3)]

            told_events, told_lines = server_portal.call(read)
            events, lines = kept_events(server, server_portal), kept_lines(server, server_portal)
            assert (told_events, told_lines) == (events, lines)
            assert [(event.id, event.payload) for event in events] == list(zip(ids, PAYLOADS, strict=True))
            assert ids == sorted(ids)
            assert [line.message for line in lines] == ["line 0", "line 1", "line 2"]
            assert set(lines[0].fields()) == {"msg", "talos-time", "talos-level", "facility", "seq", "clock", "priority"}
            assert (lines[0].fields()["priority"], lines[0].fields()["talos-level"]) == ("err", "error")
            assert lines[0].machine.overlay_address == machine.link.address


def test_lines_arrive_by_udp() -> None:
    with routed() as net, serving(net) as (server, server_portal), reporting(net, protocol="udp") as (machine, portal):
        portal.call(machine.lines.send, KernelMessage(message="by datagram"))
        wait_for_lines(server, server_portal, 1)
        [line] = kept_lines(server, server_portal)
        assert json.loads(line.raw)["msg"] == "by datagram"


def wait_for_lines(server: Server, portal: BlockingPortal, count: int) -> None:
    machine_id = only_machine(server, portal)
    wait(portal, lambda: len(server.reports.recent_lines(machine_id)) >= count)


@pytest.mark.timeout(240)
def test_nothing_is_lost_while_the_server_is_away() -> None:
    with routed() as net, serving(net) as (server, server_portal), reporting(net) as (machine, portal):
        portal.call(machine.events.publish, PAYLOADS[0])
        portal.call(machine.lines.send, KernelMessage(message="before", seq=1))
        wait(portal, lambda: machine.events.delivered == 1 and machine.logs.waiting == 0)
        net.server.set_link("eth0", up=False)
        for number in range(20):
            portal.call(machine.events.publish, PhaseEvent(phase=f"phase {number}"))
            portal.call(machine.lines.send, KernelMessage(message=f"away {number}", seq=2 + number))
        assert machine.events.waiting == 20
        net.server.set_link("eth0", up=True)
        net.server.add_route("default", "192.0.2.254")
        wait(portal, lambda: machine.events.waiting == 0 and machine.logs.waiting == 0, 40)
        found = kept_events(server, server_portal)
        assert [event.payload for event in found[1:]] == [PhaseEvent(phase=f"phase {number}") for number in range(20)]
        wait_for_lines(server, server_portal, 21)
        messages = [line.message for line in kept_lines(server, server_portal)]
        assert list(dict.fromkeys(messages)) == ["before", *(f"away {number}" for number in range(20))]
        assert (machine.events.lost, machine.logs.lost) == (0, 0)


def test_lines_beyond_the_bound_are_lost_oldest_first_and_counted() -> None:
    with routed() as net, serving(net) as (_, __), reporting(net, max_lines=10) as (machine, portal):
        net.server.run(["nft", "add table inet cut; add chain inet cut in { type filter hook input priority 0; policy drop; }"])
        for number in range(2000):
            machine_event = PhaseEvent(phase=str(number))
            portal.call(machine.events.publish, machine_event)
        for number in range(1000):
            portal.call(machine.lines.send, KernelMessage(message="x" * 5000, seq=number))
        wait(portal, lambda: machine.logs.lost > 0)
        assert machine.events.lost >= 999
        assert machine.events.waiting <= 1000


def raw_lines(net: Net, link: Link, data: bytes, *, source: str | None = None, port: int = LOGS, patience: float = 30) -> str:
    """Send bytes to the log receiver from the machine's namespace; says how it ended."""

    def send() -> str:
        with socket.socket(socket.AF_INET6) as sock:
            sock.settimeout(patience)
            try:
                if source is not None:
                    sock.bind((source, 0))
                sock.connect((str(link.server_address), port))
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
                return "closed" if sock.recv(1) == b"" else "answered"
            except OSError as error:
                return type(error).__name__

    return net.machine.call(send)


def test_malformed_lines_are_dropped_counted_and_reported_and_others_pass() -> None:
    with routed() as net, serving(net, max_line_bytes=8192) as (server, portal), reporting(net) as (machine, _):
        stream = portal.call(server.reports.lines)
        good = b'{"msg": "good"}\n'
        long = b'{"msg": "' + b"x" * 5000 + b'"}\n'
        data = good + b"x" * 100_000 + b"\n" + b"\n\n" + long + b"[" * 8000 + b"\nplain text\r\n" + b'{"msg": "cut'
        assert raw_lines(net, machine.link, data) == "closed"
        wait_for_lines(server, portal, 4)
        found = kept_lines(server, portal)
        assert [line.message[:10] for line in found] == ["good", "x" * 10, "[" * 10, "plain text"]
        assert server.reports.drops() == {"line too long": 1, "line incomplete": 1}

        async def read() -> list[object]:
            with anyio.fail_after(30):
                return [await anext(stream) for _ in range(3)]

        told = portal.call(read)
        assert isinstance(told[1], LinesDropped) or isinstance(told[0], LinesDropped)


def test_a_flood_of_one_machine_does_not_affect_others() -> None:
    with (
        routed(2) as net,
        serving(net, line_bytes_per_second=1000, line_burst_bytes=10_000) as (server, portal),
        reporting(net, 0) as (flooder, _),
        reporting(net, 1) as (other, other_portal),
    ):
        raw_lines(net, flooder.link, b'{"msg": "flood"}\n' * 20_000)
        other_portal.call(other.lines.send, KernelMessage(message="quiet"))
        wait(other_portal, lambda: other.logs.waiting == 0)
        machines = {status.machine.overlay_address: status.machine.id for status in portal.call(server.machines)}
        quiet = machines[other.link.address]
        wait(portal, lambda: [line.message for line in server.reports.recent_lines(quiet)] == ["quiet"])
        noisy = machines[flooder.link.address]
        wait(portal, lambda: server.reports.drops(noisy).get("line rate limited", 0) > 10_000)
        assert server.reports.drops(quiet) == {}


def test_strangers_are_refused() -> None:
    with routed() as net, serving(net) as (server, portal), reporting(net) as (machine, _):
        # from the underlay, nothing listens there
        def dial(host: str, port: int) -> None:
            socket.create_connection((host, port), timeout=3).close()

        for port in (SINK, LOGS):
            with pytest.raises(ConnectionRefusedError):
                net.machine.call(dial, SERVER_V4, port)
        assert raw_lines(net, machine.link, b"{}\n") == "closed"
        # once the server forgets the machine, its link is gone and so is its way in
        portal.call(server.remove, only_machine(server, portal))
        assert raw_lines(net, machine.link, b"{}\n", patience=2) in ("TimeoutError", "timeout")
        assert server.reports.drops() == {}


def test_unknown_events_are_kept_undecoded_and_repeated_ones_once() -> None:
    def publish(address: str, requests: list[bytes]) -> list[tuple[str, str]]:
        results = []
        with target_in_namespace(address, SINK) as target, grpc.insecure_channel(target) as channel:
            method = channel.unary_unary("/events.EventSinkService/Publish")
            for request in requests:
                try:
                    assert method(request, timeout=10) == b""
                    results.append(("OK", ""))
                except grpc.RpcError as error:
                    results.append(status_of(error))
        return results

    def event(type_url: str, value: bytes, event_id: str = "") -> bytes:
        return bytes(EventRequest(data=PbAny(type_url=type_url, value=value), id=event_id, actor_id="a"))

    known = "type.googleapis.com/machine.MachineStatusEvent"
    with routed() as net, serving(net, max_event_bytes=5000) as (server, portal), reporting(net):
        results = net.machine.call(
            publish,
            SERVER,
            [
                event("type.googleapis.com/machine.ConfigValidationErrorEvent", b"anything", "1"),
                event(known, b"\x08\x03\x12\x02\x08\x01", "2"),
                event(known, b"\x08\x03\x12\x02\x08\x01", "2"),
                event(known, b"\x0a\x03abc", "3"),
                event(known, b"\xff\xff", "4"),
                event(known, b"", "5" * 300),
                b"",
                event(known, bytes(6000), "6"),
                b"\xff\xff\xff",
            ],
        )
        assert [status for status, _ in results[:5]] == ["OK"] * 5
        assert [status for status, _ in results[5:]] == [
            "INVALID_ARGUMENT",
            "INVALID_ARGUMENT",
            "RESOURCE_EXHAUSTED",
            "INVALID_ARGUMENT",
        ]
        found = kept_events(server, portal)
        assert [(each.id, each.payload is not None) for each in found] == [
            ("1", False),
            ("2", True),
            ("3", False),
            ("4", False),
        ]
        assert found[0].data == b"anything"
        assert server.reports.drops() == {"event repeated": 1, "event malformed": 3}


def test_one_machine_cannot_take_all_connections() -> None:
    def refused() -> int:
        by_logs, by_sink = server.reports.drops(), server.reports.refusals()
        return by_logs.get("too many connections", 0) + by_sink.get("too_many_connections_from_address", 0)

    def hoard(host: str) -> list[str]:
        """Open many connections to both receivers, and say how those beyond the bound ended."""
        held, ends = [], []
        for port in (LOGS, SINK):
            for _ in range(8):
                sock = socket.create_connection((host, port), timeout=30)
                held.append(sock)
        deadline = time.monotonic() + 30
        while refused() < 12 and time.monotonic() < deadline:
            time.sleep(0.02)
        for sock in held:
            sock.settimeout(1)
            try:
                ends.append("ended" if sock.recv(100) in (b"",) else "answered")
            except TimeoutError:
                ends.append("held")
            except OSError:
                ends.append("ended")
        for sock in held:
            sock.close()
        return ends

    with (
        routed(2) as net,
        serving(net, max_connections_per_machine=2) as (server, portal),
        reporting(net, 0),
        reporting(net, 1) as (other, other_portal),
    ):
        ends = net.machine.call(hoard, SERVER)
        assert ends[:8].count("held") == 2
        assert server.reports.drops() == {"too many connections": 6}
        assert server.reports.refusals()["too_many_connections_from_address"] == 6
        other_portal.call(other.events.publish, PAYLOADS[0])
        other_portal.call(other.lines.send, KernelMessage(message="still heard"))
        wait(other_portal, lambda: other.events.waiting == 0 and other.logs.waiting == 0)


def test_a_cancelled_server_leaves_no_socket() -> None:
    async def serve_and_cancel() -> bool:
        reports = ReportOptions(event_sink_port=SINK, log_port=LOGS)
        with anyio.CancelScope() as scope:
            async with Server(
                api_listen=f"{SERVER_V4}:0", force_tunnel=True, allow_any_token=True, device="userspace", reports=reports
            ):
                scope.cancel()
                await anyio.sleep_forever()
        return scope.cancelled_caught

    with routed(1) as net, net.server.portal() as portal:
        assert portal.call(serve_and_cancel)
        before = descriptor_kinds()
        for _ in range(10):
            assert portal.call(serve_and_cancel)
        assert not opened_since(before)
