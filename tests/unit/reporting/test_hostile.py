"""Hostile reports of a machine cost little, whatever they contain. All costs here are counted."""

import socket
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import fields
from ipaddress import IPv6Address
from itertools import cycle
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import anyio
import grpc
import pytest
from grpclib import GRPCError
from hypothesis import given
from hypothesis import strategies as st

from siderolink.common import protobuf_wire
from siderolink.common.grpc import serve
from siderolink.common.machine_events import MAX_FIELDS, SHAPES, SUMMARY_FIELDS, Shape, pack_event
from siderolink.common.pb import machine as pb
from siderolink.common.pb.events import EventRequest
from siderolink.common.pb.google.protobuf import Any as Any_
from siderolink.common.protobuf_wire import encode_varint
from siderolink.common.text import LONGEST
from siderolink.server.reporting import log_listener
from siderolink.server.reporting.event_sink import MAX_FIELDS as MAX_REQUEST_FIELDS
from siderolink.server.reporting.event_sink import MAX_NAME_BYTES, EventSink, read_event
from siderolink.server.reporting.ingest import ITEM_BYTES, ReportIngest, RingBuffers
from siderolink.server.reporting.log_listener import BYTES_AT_ONCE, LineSplitter, listen_for_lines
from siderolink.server.reporting.model import LogLine, MachineEvent, ReportDrop, ReportOptions

if TYPE_CHECKING:
    from siderolink.server.store import Machine

MACHINE = cast("Machine", SimpleNamespace(id="m", node_uuid="u", overlay_address=IPv6Address("::1")))
PREFIX = b"type.googleapis.com/machine."
KINDS = sorted(
    kind.removeprefix("type.googleapis.com/machine.")
    for kind in (
        pack_event(event).type_url
        for event in (
            pb.SequenceEvent(),
            pb.PhaseEvent(),
            pb.TaskEvent(),
            pb.ServiceStateEvent(),
            pb.RestartEvent(),
            pb.ConfigLoadErrorEvent(),
            pb.AddressEvent(),
            pb.MachineStatusEvent(),
        )
    )
)


def field(number: int, value: bytes) -> bytes:
    return encode_varint(number << 3 | 2) + encode_varint(len(value)) + value


def nested(number: int, depth: int) -> bytes:
    found = b""
    for _ in range(depth):
        found = field(number, found)
    return found


def request(kind: str, data: bytes, *, name: bytes = b"id") -> bytes:
    return field(1, field(1, PREFIX + kind.encode()) + field(2, data)) + field(2, name)


def event(kind: str, data: bytes) -> MachineEvent:
    return read_event(MACHINE, request(kind, data))


def ingest(**options: Any) -> ReportIngest:
    return ReportIngest(ReportOptions(**options), {MACHINE.overlay_address: MACHINE}.get)


HOSTILE = {
    "empty conditions": field(2, field(2, b"") * 120_000),
    "conditions": field(2, field(2, field(1, b"a") + field(2, b"b")) * 20_000),
    "unknown fields": b"\x98\x06\x01" * 80_000,
    "unknown messages": field(99, b"") * 60_000,
    "repeated scalar": b"\x08\x01" * 120_000,
    "repeated string": field(1, b"x") * 80_000,
    "repeated message": field(2, b"") * 120_000,
    "deep nesting": nested(2, 10_000),
    "deep nesting elsewhere": nested(4, 10_000),
    "long string": field(1, b"x" * 240_000),
    "long nested string": field(2, field(2, field(1, b"x" * 240_000))),
    "invalid UTF-8": field(1, b"\xff\xfe\xc0\x80"),
    "invalid nested UTF-8": field(2, field(2, field(1, b"\xed\xa0\x80"))),
    "control characters": field(1, b"\x1b[2J\x1b]0;x\x07\r\n\0"),
    "bidirectional text": field(1, "\u202egnp.exe\u2066\u2028".encode()),
    "combining characters": field(1, ("e" + "\u0301" * 50_000).encode()),
    "huge varint": b"\x08" + b"\xff" * 9 + b"\x01",
    "endless varint": b"\x08" + b"\xff" * 1000,
    "huge length": b"\x0a\xff\xff\xff\xff\x0f",
    "huge key": b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
    "field number zero": b"\x00\x01",
    "group": b"\x0b\x0c" * 50_000,
    "cut short": field(1, b"abc")[:-1],
    "wrong wire types": b"\x0d1234\x11" + b"12345678" + b"\x18\x01\x25abcd",
    "a message that is a number": b"\x10\x01\x20\x01\x18\x01",
    "anys in an error": field(3, field(3, field(1, b"x") + field(2, b"y")) * 10_000),
    "random": bytes(range(256)) * 900,
}


@pytest.fixture
def keys_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Where each field that is looked at begins."""
    found: list[int] = []

    def read_key(data: bytes | memoryview, pos: int) -> tuple[int, int, int]:
        found.append(pos)
        return protobuf_wire.read_key(data, pos)

    for module in ("siderolink.common.machine_events", "siderolink.server.reporting.event_sink"):
        monkeypatch.setattr(f"{module}.read_key", read_key)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_whatever_an_event_holds_a_bounded_number_of_fields_is_read(kind: str, data: bytes, keys_read: list[int]) -> None:
    found = event(kind, data)
    assert len(keys_read) == 4, "the request's own fields: its message is not looked at before somebody reads it"
    keys_read.clear()
    payload = found.payload
    assert len(keys_read) <= MAX_FIELDS
    assert payload is None or objects_in(payload) <= MAX_FIELDS + 1
    keys_read.clear()
    summary = found.summary
    assert len(keys_read) <= SUMMARY_FIELDS
    assert summary.isprintable()
    assert len(summary) <= LONGEST
    assert found.data == data


@pytest.mark.parametrize(("kind", "number"), [("MachineStatusEvent", 1), ("TaskEvent", 2), ("RestartEvent", 1)])
def test_a_string_in_the_place_of_a_number_is_not_decoded(kind: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder would take it for a list of numbers, in a time that grows with the square of its length."""
    decoded: list[object] = []
    monkeypatch.setattr("siderolink.common.machine_events.has_declared_types", decoded.append)
    found = event(kind, field(number, b"\x01" * 200_000))
    assert found.payload is None
    assert found.summary == "an unreadable event"
    assert decoded == []


def objects_in(message: Any) -> int:
    """How many values and messages there are in a message."""
    if isinstance(message, list):
        return sum(map(objects_in, message))
    if not hasattr(message, "__dataclass_fields__"):
        return 1
    return 1 + sum(objects_in(getattr(message, each.name)) for each in fields(message) if getattr(message, each.name))


def test_the_first_conditions_are_shown_and_the_stage_behind_them_is_not_needed() -> None:
    conditions = b"".join(field(2, field(1, b"etcd") + field(2, f"reason {number}".encode())) for number in range(5000))
    found = event("MachineStatusEvent", b"\x08\x03" + field(2, conditions))
    payload = found.payload
    assert isinstance(payload, pb.MachineStatusEvent)
    assert payload.status is not None
    assert [each.reason for each in payload.status.unmet_conditions][:3] == ["reason 0", "reason 1", "reason 2"]
    assert found.summary.startswith("stage maintenance, not ready, etcd: reason 0, etcd: reason 1, ")


def test_every_message_within_an_event_is_walked() -> None:
    """Where a new model gets a field that is a message, the table has to know it, or it would be decoded without a bound."""

    def check(kind: Any, shape: Shape) -> None:
        for name, each in kind.__dataclass_fields__.items():
            declared = each.metadata["betterproto"]
            assert declared.number in shape.wire_types
            assert (declared.number in shape.messages) is (declared.proto_type == "message"), (kind, name)
            if declared.proto_type == "message":
                inner = datetime_or_message(kind, name)
                check(inner, shape.messages[declared.number])

    def datetime_or_message(kind: Any, name: str) -> Any:
        inner = str(kind.__annotations__[name]).removeprefix("list[").split(" |")[0].rstrip("]").split(".")[-1]
        homes = {"Error": "common", "Any": "google.protobuf", "datetime": "google.protobuf"}
        module = sys.modules[f"siderolink.common.pb.{homes.get(inner, 'machine')}"]
        return getattr(module, "Timestamp" if inner == "datetime" else inner)

    assert len(SHAPES) == len(KINDS)
    for kind, shape in SHAPES.items():
        check(kind, shape)


@given(st.binary(max_size=300), st.sampled_from(KINDS))
def test_any_bytes_are_an_event_that_can_be_shown(data: bytes, kind: str) -> None:
    found = event(kind, data)
    assert found.summary.isprintable()
    found.payload  # noqa: B018 # it raises nothing


@given(st.binary(max_size=300))
def test_any_request_is_read_or_refused(data: bytes) -> None:
    try:
        found = read_event(MACHINE, data)
    except ValueError:
        return
    assert found.kind.isprintable()


REFUSED = {
    "nothing": b"",
    "no data": field(2, b"id"),
    "a long id": request("PhaseEvent", b"", name=b"x" * (MAX_NAME_BYTES + 1)),
    "an id that is no text": request("PhaseEvent", b"", name=b"\xff"),
    "a long type": field(1, field(1, b"x" * 100_000)),
    "many fields": request("PhaseEvent", b"") + b"\x98\x06\x01" * 80_000,
    "many ids": field(2, b"id") * 50_000,
    "many anys": field(1, b"") * 100_000,
    "many fields in the any": field(1, field(1, PREFIX) * 5000),
    "a group": b"\x0b" * 1000,
    "an id that is a number": request("PhaseEvent", b"")[:-4] + b"\x10\x01",
}


@pytest.mark.parametrize("data", REFUSED.values(), ids=REFUSED)
def test_what_is_no_event_is_refused_after_few_fields_and_counted(data: bytes, keys_read: list[int]) -> None:
    found = ingest()
    with pytest.raises(GRPCError, match="the event could not be parsed: "):
        EventSink(found).publish(MACHINE, data)
    assert len(keys_read) <= 2 * MAX_REQUEST_FIELDS
    assert found.drops_of("m") == {"event malformed": 1}
    assert found.taken_events == 0


def test_counted_memory_is_the_memory_used() -> None:
    def kept(make: Callable[[int], MachineEvent | LogLine]) -> tuple[int, int]:
        ring: RingBuffers[MachineEvent | LogLine] = RingBuffers(count=10_000, machine_bytes=1 << 30, total_bytes=1 << 30)
        tracemalloc.start()
        for number in range(200):
            item = make(number)
            ring.add("m", item, item.size)
        used, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return used, ring.size

    def hostile(number: int) -> MachineEvent:
        found = read_event(MACHINE, request("MachineStatusEvent", HOSTILE["empty conditions"][: 20_000 + number]))
        assert found.summary
        return found

    def wide(number: int) -> MachineEvent:
        return read_event(MACHINE, request("PhaseEvent", b"", name="🙂".encode() * 60 + str(number).encode()))

    def line(number: int) -> LogLine:
        return LogLine(machine=MACHINE, received_at=float(number), raw=b"x" * (number % 7))

    for make in (hostile, wide, line):
        used, counted = kept(make)
        assert used <= counted + 64 * ITEM_BYTES, make.__name__


# --- how much


async def publish(found: ReportIngest, events: list[bytes]) -> list[str]:
    """The answer that a real client gets."""
    async with serve([EventSink(found)], host="::1") as server:

        def call() -> Iterator[str]:
            with grpc.insecure_channel(f"[::1]:{server.port}", options=(("grpc.enable_http_proxy", 0),)) as channel:
                method = channel.unary_unary("/events.EventSinkService/Publish")
                for data in events:
                    try:
                        method(data, timeout=10)
                        yield "OK"
                    except grpc.RpcError as error:
                        yield error.code().name

        return await anyio.to_thread.run_sync(lambda: list(call()))


@pytest.mark.anyio
async def test_events_are_limited_by_their_bytes_before_they_are_read() -> None:
    found = ingest(event_bytes_per_second=1, event_burst_bytes=100_000)
    large = [request("PhaseEvent", field(1, b"x" * 60_000), name=str(number).encode()) for number in range(4)]
    # one message beyond the burst passes, and counts against the next ones
    assert await publish(found, large) == ["OK", "OK", "RESOURCE_EXHAUSTED", "RESOURCE_EXHAUSTED"]
    assert (found.taken_events, found.drops_of("m")) == (2, {"event rate limited": 2})


@pytest.mark.anyio
async def test_malformed_events_count_against_the_limit_too() -> None:
    found = ingest(events_per_second=1e-6, event_burst=3)
    assert await publish(found, [b"\xff"] * 5) == ["INVALID_ARGUMENT"] * 3 + ["RESOURCE_EXHAUSTED"] * 2
    assert found.drops_of("m") == {"event malformed": 3, "event rate limited": 2}


def test_requests_of_newer_machines_are_accepted() -> None:
    data = request("PhaseEvent", bytes(pb.PhaseEvent(phase="boot"))) + b"\x98\x06\x01" + field(101, b"new")
    assert read_event(MACHINE, data).payload == pb.PhaseEvent(phase="boot")
    again = EventRequest(data=pack_event(pb.RestartEvent(cmd=-1)), id="i", actor_id="a")
    found = read_event(MACHINE, bytes(again))
    assert (found.id, found.actor_id, found.payload, found.kind) == ("i", "a", pb.RestartEvent(cmd=-1), "RestartEvent")


SUMMARIES: list[tuple[Any, str]] = [
    (pb.SequenceEvent(sequence="boot", action=pb.SequenceEventAction(1)), "sequence boot: start"),
    (pb.PhaseEvent(phase="network", action=pb.PhaseEventAction(1)), "phase network: stop"),
    (pb.TaskEvent(task="mount", action=pb.TaskEventAction(0)), "task mount: start"),
    (
        pb.ServiceStateEvent(service="etcd", message="up", health=pb.ServiceHealth(healthy=True)),
        "service etcd: initialized, up, healthy",
    ),
    (pb.RestartEvent(cmd=7), "restart, command 7"),
    (pb.ConfigLoadErrorEvent(error="line 3\nis odd"), "configuration error: line 3 is odd"),
    (pb.AddressEvent(hostname="m1", addresses=["fd00::1", "fd00::2"]), "host name m1, addresses fd00::1 fd00::2"),
]


@pytest.mark.parametrize(("payload", "text"), SUMMARIES, ids=[type(payload).__name__ for payload, _ in SUMMARIES])
def test_events_are_shown_in_words(payload: Any, text: str) -> None:
    assert read_event(MACHINE, bytes(EventRequest(data=pack_event(payload)))).summary == text


def test_an_unknown_event_is_named() -> None:
    data = bytes(EventRequest(data=Any_(type_url="type.googleapis.com/machine.New\nEvent", value=b"\x08\x01")))
    assert read_event(MACHINE, data).summary == "an event of the unknown type New Event"
    assert read_event(MACHINE, data).payload is None


# --- lines


def log_sockets() -> tuple[socket.socket, socket.socket]:
    tcp = socket.socket(socket.AF_INET6)
    udp = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    for sock in (tcp, udp):
        sock.setblocking(False)
        sock.bind(("::1", 0))
    tcp.listen()
    return tcp, udp


@pytest.mark.anyio
async def test_a_flood_of_short_lines_is_counted_and_split_in_small_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces: list[int] = []

    class Counting(LineSplitter):
        def feed(self, data: bytes) -> list[bytes]:
            pieces.append(len(data))
            return super().feed(data)

    monkeypatch.setattr(log_listener, "LineSplitter", Counting)
    found = ingest(line_burst=5000, lines_per_second=1)
    tcp, udp = log_sockets()
    sent = 400_000
    async with listen_for_lines(found, tcp, udp):
        async with await anyio.connect_tcp("::1", tcp.getsockname()[1]) as stream:
            await stream.send(b"x\n" * sent)
            await stream.send_eof()
            with anyio.fail_after(30):
                while found.taken_lines + found.drops[ReportDrop.LINE_RATE_LIMITED] < sent:
                    await anyio.sleep(0.01)
    assert 5000 <= found.taken_lines < 5100
    assert found.taken_lines + found.drops[ReportDrop.LINE_RATE_LIMITED] == sent
    assert max(pieces) <= BYTES_AT_ONCE
    assert len(found.recent_lines.of("m")) <= ReportOptions().recent_lines


@pytest.mark.anyio
async def test_what_is_read_beyond_the_rate_is_not_split_when_the_rate_allows_more_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pieces: list[int] = []

    class Counting(LineSplitter):
        def feed(self, data: bytes) -> list[bytes]:
            pieces.append(len(data))
            return super().feed(data)

    answers = cycle([False, True])
    monkeypatch.setattr(log_listener, "LineSplitter", Counting)
    monkeypatch.setattr(ReportIngest, "may_send_lines", lambda *_: next(answers))
    found = ingest()
    tcp, udp = log_sockets()
    async with listen_for_lines(found, tcp, udp), await anyio.connect_tcp("::1", tcp.getsockname()[1]) as stream:
        with anyio.fail_after(30):
            while len(pieces) < 5:
                await stream.send(b"x\n" * 5000)
                await anyio.sleep(0.01)
    assert max(pieces) <= BYTES_AT_ONCE


@pytest.mark.anyio
@pytest.mark.parametrize("data", [b"\n" * 100_000, b"x" * 100_000 + b"\n\n"], ids=["empty lines", "a line without an end"])
async def test_bytes_that_are_no_line_count_towards_the_rate(data: bytes) -> None:
    found = ingest(line_bytes_per_second=1, line_burst_bytes=20_000, max_line_bytes=4096)
    tcp, udp = log_sockets()
    async with listen_for_lines(found, tcp, udp), await anyio.connect_tcp("::1", tcp.getsockname()[1]) as stream:
        await stream.send(data)
        with anyio.fail_after(30):
            while not found.drops[ReportDrop.LINE_RATE_LIMITED]:
                await anyio.sleep(0.01)


@given(st.lists(st.sampled_from([b"", b"a", b"bb\r", b"c" * 41, b"d" * 90]), max_size=8), st.integers(1, 50))
def test_every_byte_is_in_a_line_or_counted(lines: list[bytes], step: int) -> None:
    splitter, found = LineSplitter(40), list[bytes]()
    data = b"".join(line + b"\n" for line in lines)
    for start in range(0, len(data), step):
        found += splitter.feed(data[start : start + step])
    assert found == [line.rstrip(b"\r") for line in lines if line and len(line) <= 40]
    assert splitter.useless == sum(len(line) + 1 for line in lines if not line or len(line) > 40)


@given(st.binary(max_size=400), st.binary(max_size=60))
def test_discarding_counts_lines_and_keeps_the_last_ones_beginning(data: bytes, after: bytes) -> None:
    splitter, other = LineSplitter(40), LineSplitter(40)
    assert splitter.discard(data) == data.count(b"\n")
    other.feed(data.rpartition(b"\n")[2])
    assert splitter.feed(after) == other.feed(after)
    assert splitter.partial() == other.partial()


@pytest.mark.parametrize(
    "raw",
    [
        b'{"msg": "\\ud800"}',
        b'{"msg": "\\u202e\\u001b[2J"}',
        b'{"msg": 1e999}',
        b'{"msg": ' + b"[" * 60_000,
        b"\xff" * 100,
        b'{"msg": NaN}',
    ],
)
def test_the_message_of_any_line_can_be_written_anywhere(raw: bytes) -> None:
    assert LogLine(machine=MACHINE, received_at=0, raw=raw).message.encode()
