"""The parts of reporting without I/O: their limits, and arbitrary input."""

import json
from datetime import datetime, timedelta
from ipaddress import IPv6Address
from types import SimpleNamespace
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from siderolink.client.reporting.event_sender import IdMaker
from siderolink.client.reporting.kernel_log import FACILITIES, PRIORITIES, KernelMessage, parse_record, rfc3339
from siderolink.common.errors import ConfigurationError
from siderolink.common.machine_events import is_known_event, pack_event, unpack_event
from siderolink.common.pb.google.protobuf import Any
from siderolink.common.pb.machine import (
    ApplyConfigurationRequest,
    MachineStatusEvent,
    MachineStatusEventMachineStage,
    MachineStatusEventMachineStatus,
    ServiceStateEvent,
)
from siderolink.common.pb.sidero.link import ProvisionRequest
from siderolink.common.protobuf_wire import MalformedWireError, is_whole, refuse_strings_as_numbers
from siderolink.common.queues import Broadcast, DeliveryQueue
from siderolink.common.token_bucket import TokenBucket
from siderolink.server.reporting.ingest import ITEM_BYTES, ReportIngest, RingBuffers
from siderolink.server.reporting.log_listener import LineSplitter
from siderolink.server.reporting.model import LinesDropped, LogLine, MachineEvent, ReportOptions, ReportsLost
from siderolink.server.store import Machine

CAP = 40
ADDRESS = IPv6Address("fdae:41e4:649b:9303::42")


def machine(name: str = "m") -> Machine:
    return cast("Machine", SimpleNamespace(id=name, overlay_address=ADDRESS))


# --- lines


@given(st.binary(max_size=400), st.lists(st.integers(1, 50), max_size=30))
def test_lines_are_the_same_however_they_are_cut(data: bytes, cuts: list[int]) -> None:
    whole = LineSplitter(CAP)
    expected = whole.feed(data)
    pieces = LineSplitter(CAP)
    found: list[bytes] = []
    rest = data
    for cut in cuts:
        found += pieces.feed(rest[:cut])
        rest = rest[cut:]
    found += pieces.feed(rest)
    assert (found, pieces.partial(), pieces.too_long) == (expected, whole.partial(), whole.too_long)
    assert all(len(line) <= CAP for line in found)
    assert len(pieces.partial()) <= CAP


def test_an_endless_line_is_skipped_without_being_kept() -> None:
    splitter = LineSplitter(CAP)
    for _ in range(1000):
        assert splitter.feed(b"x" * 1000) == []
        assert len(splitter.partial()) <= CAP
    assert splitter.feed(b"\nnext\n") == [b"next"]
    assert splitter.too_long == 1


# --- what is kept


def test_what_is_kept_is_bounded_for_one_and_for_all() -> None:
    recent: RingBuffers[int] = RingBuffers(count=3, machine_bytes=10 * (ITEM_BYTES + 10), total_bytes=5 * (ITEM_BYTES + 10))
    for number in range(5):
        recent.add("a", number, 10)
    assert recent.of("a") == [2, 3, 4]
    for number in range(3):
        recent.add("b", number, 10)
    assert recent.of("a") == []
    assert recent.of("b") == [0, 1, 2]
    recent.add("b", 9, 100 * ITEM_BYTES)
    assert recent.of("b") == [9]
    recent.forget("b")
    assert (recent.size, recent.machines()) == (0, [])


def test_a_bucket_fills_with_time() -> None:
    now = 0.0
    bucket = TokenBucket(10, 20, lambda: now)
    assert bucket.take(20)
    assert not bucket.take(1)
    now = 1.0
    assert bucket.take(10)
    assert not bucket.take(1)
    now = 1000.0
    assert not bucket.take(21)
    assert bucket.take(20)
    assert TokenBucket(0, 0, lambda: now).take(1e9)


def test_a_machine_that_sends_too_much_loses_lines_and_readers_are_told() -> None:
    now = 0.0
    options = ReportOptions(line_bytes_per_second=10, line_burst_bytes=20)
    ingest = ReportIngest(options, {ADDRESS: machine()}.get, lambda: now)
    for _ in range(5):
        ingest.add_line(machine(), b"123456789")
    now = 1.0
    ingest.add_line(machine(), b"later")
    assert [line.raw for line in ingest.recent_lines.of("m")] == [b"123456789", b"123456789", b"later"]
    assert ingest.drops_of("m") == {"line rate limited": 3}


@pytest.mark.anyio
async def test_a_reader_is_told_what_was_dropped() -> None:
    ingest = ReportIngest(ReportOptions(line_bytes_per_second=1, line_burst_bytes=12), {ADDRESS: machine()}.get, lambda: 0.0)
    stream = ingest.lines.subscribe()
    for line in (b"one", b"much too long", b"two"):
        ingest.add_line(machine(), line)
    ingest.end()
    told = [report async for report in stream]
    assert [type(report) for report in told] == [LogLine, LinesDropped, LogLine]
    assert isinstance(told[1], LinesDropped)
    assert told[1].count == 1


@pytest.mark.anyio
async def test_a_slow_reader_loses_the_oldest_by_number_and_by_bytes_and_is_told() -> None:
    feed: Broadcast[int | ReportsLost] = Broadcast(limit=3, max_bytes=100, lost=lambda count: ReportsLost(count=count))
    stream = feed.subscribe()
    for number in range(5):
        feed.publish(number, 10)
    assert await stream.__anext__() == ReportsLost(count=2)
    feed.publish(5, 95)
    feed.end()
    assert [report async for report in stream] == [ReportsLost(count=3), 5]
    assert [report async for report in feed.subscribe()] == []


@pytest.mark.anyio
async def test_an_event_that_comes_again_is_kept_once_and_a_departed_machine_is_forgotten() -> None:
    known = {ADDRESS: machine()}
    ingest = ReportIngest(ReportOptions(), known.get)
    event = MachineEvent(machine=machine(), received_at=0, id="1", actor_id="", type_url="t", data=b"")
    ingest.add_event(event)
    ingest.add_event(event)
    assert ingest.recent_events.of("m") == [event]
    ingest.drop(machine(), next(iter(ingest.drops)))
    known.clear()
    await ingest.forget_departed()
    assert ingest.recent_events.of("m") == []
    assert ingest.drops_of("m") == {}
    assert ingest.find_machine("fdae::1%eth0") is None
    assert ingest.find_machine("no address") is None


@given(st.binary(max_size=200))
def test_any_line_has_a_message(raw: bytes) -> None:
    line = LogLine(machine=machine(), received_at=0, raw=raw)
    assert isinstance(line.message, str)


@pytest.mark.parametrize("raw", [b"[" * 100_000, b'{"a":' * 50_000, b'{"msg": ' + b"9" * 10_000 + b"}", b"null", b'"text"'])
def test_lines_that_are_costly_to_parse_are_kept_unparsed(raw: bytes) -> None:
    line = LogLine(machine=machine(), received_at=0, raw=raw)
    assert line.fields() == {}
    assert line.message == raw.decode()


# --- events


@given(st.binary(max_size=200))
def test_no_data_makes_decoding_fail(value: bytes) -> None:
    for name in ("MachineStatusEvent", "SequenceEvent", "ServiceStateEvent", "AddressEvent"):
        found = unpack_event(Any(type_url=f"type.googleapis.com/machine.{name}", value=value))
        assert found is None or bytes(found) is not None


def test_events_go_out_and_come_back_the_same() -> None:
    event = MachineStatusEvent(stage=MachineStatusEventMachineStage.UPGRADING)
    packed = pack_event(event)
    assert packed.type_url == "type.googleapis.com/machine.MachineStatusEvent"
    assert packed.value == b"\x08\x08"
    assert unpack_event(packed) == event
    assert is_known_event(packed.type_url)
    assert not is_known_event("type.googleapis.com/machine.ConfigValidationErrorEvent")
    assert unpack_event(Any(type_url="type.googleapis.com/machine.ServiceStateEvent", value=b"\x0a\x03etc")) == (
        ServiceStateEvent(service="etc")
    )


@pytest.mark.parametrize(
    ("data", "whole"),
    [
        (b"", True),
        (b"\x08\x01", True),
        (b"\x0a\x02ab", True),
        (b"\x0d1234", True),
        (b"\x0912345678", True),
        (b"\x08", False),
        (b"\x0a\x03ab", False),
        (b"\x0d123", False),
        (b"\x0b", False),
        (b"\x00\x01", False),
        (b"\xff\xff", False),
        (b"\x08" + b"\xff" * 10 + b"\x01", False),
    ],
)
def test_a_complete_message_is_recognised(data: bytes, whole: bool) -> None:
    assert is_whole(data) is whole


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (ProvisionRequest, b"\x32\xc0\x3e" + b"\x01" * 8000),
        (ApplyConfigurationRequest, b"\x22\xc0\x3e" + b"\x01" * 8000),
        (ApplyConfigurationRequest, b"\x32\xc3\x3e" + b"\x0a\xc0\x3e" + b"\x01" * 8000),
    ],
    ids=["a flag", "an enum", "a number in a message within"],
)
def test_a_string_in_the_place_of_a_number_is_refused_before_it_is_decoded(kind: type, data: bytes) -> None:
    with pytest.raises(MalformedWireError, match="is a number"):
        refuse_strings_as_numbers(kind, data)


def test_messages_of_the_declared_types_are_not_refused() -> None:
    message = ApplyConfigurationRequest(data=b"x" * 100_000, dry_run=True, try_mode_timeout=timedelta(seconds=3))
    refuse_strings_as_numbers(ApplyConfigurationRequest, bytes(message) + b"\x9a\x06\x80\x08" + b"y" * 1024)
    status = MachineStatusEvent(status=MachineStatusEventMachineStatus(ready=True))
    refuse_strings_as_numbers(MachineStatusEvent, bytes(status) * 200)


# --- the machine's side


def test_an_outbox_drops_its_oldest_and_counts_them() -> None:
    outbox: DeliveryQueue[int] = DeliveryQueue(max_items=3, max_bytes=100)
    for number in range(5):
        outbox.put(number, 10)
    assert (outbox.lost, outbox.first, outbox.end, len(outbox)) == (2, 2, 5, 3)
    assert [outbox.get(number) for number in range(2, 5)] == [2, 3, 4]
    outbox.acknowledge(1)
    outbox.acknowledge(4)
    assert (outbox.first, len(outbox)) == (4, 1)
    outbox.put(9, 95)
    assert (outbox.lost, len(outbox)) == (3, 1)
    outbox.put(10, 1000)
    assert (outbox.lost, outbox.get(outbox.first)) == (4, 10)


def test_ids_have_twenty_characters_and_rise_also_when_the_clock_is_set_back() -> None:
    now = 1_700_000_000.0
    maker = IdMaker(lambda: now, lambda count: b"\xff" * count)
    ids = [maker.next() for _ in range(3)]
    now -= 3600
    ids += [maker.next() for _ in range(3)]
    assert ids == sorted(set(ids))
    assert all(len(each) == 20 and set(each) <= set("0123456789abcdefghijklmnopqrstuv") for each in ids)


def test_an_id_is_made_as_others_make_it() -> None:
    # the example of rs/xid: its twelve bytes and their text
    packed = bytes([0x4D, 0x88, 0xE1, 0x5B, 0x60, 0xF4, 0x86, 0xE4, 0x28, 0x41, 0x2D, 0xC9])
    entropy = iter([packed[4:9], (int.from_bytes(packed[9:]) - 1).to_bytes(3)])
    assert IdMaker(lambda: int.from_bytes(packed[:4]), lambda _: next(entropy)).next() == "9m4e2mr0ui3e8a215n4g"


def test_a_record_becomes_a_line_of_the_known_keys() -> None:
    record = b"30,1234,5678901,-;systemd[1]: Started \xc3\xa9.\n SUBSYSTEM=x\n"
    message = parse_record(record, 1_700_000_000_000_000_000)
    assert json.loads(message.line()) == {
        "msg": "systemd[1]: Started é.",
        "talos-time": "2023-11-14T22:13:25.678901Z",
        "talos-level": "info",
        "facility": "daemon",
        "seq": 1234,
        "clock": 5678901,
        "priority": "info",
    }


@pytest.mark.parametrize(
    ("priority", "level"),
    list(zip(PRIORITIES, ["error", "error", "error", "error", "warn", "info", "info", "debug"], strict=True)),
)
def test_priorities_have_their_levels(priority: str, level: str) -> None:
    line = json.loads(KernelMessage(message="", priority=PRIORITIES.index(priority), facility=23).line())
    assert (line["priority"], line["talos-level"], line["facility"]) == (priority, level, "local7")
    assert len(FACILITIES) == 24


@given(st.binary(max_size=100))
def test_any_record_is_read_or_refused(record: bytes) -> None:
    try:
        message = parse_record(record, 0)
    except ConfigurationError:
        return
    assert b"\n" not in message.line()


@given(st.integers(0, 4_102_444_800_000_000_000))
def test_times_are_written_to_the_nanosecond(time_ns: int) -> None:
    text = rfc3339(time_ns)
    assert text.endswith("Z")
    assert datetime.fromisoformat(text[:19] + "+00:00").timestamp() == time_ns // 10**9
    decimals = text[19:-1].removeprefix(".")
    assert int(decimals.ljust(9, "0") or 0) == time_ns % 10**9
    assert not decimals.endswith("0")
