"""Compares the shortcuts of `private` with h2 and hpack once per process: environments may bring any version of them."""

from collections.abc import Sequence

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, Event, ResponseReceived, StreamEnded, TrailersReceived
from hpack import Decoder, Encoder

from siderolink.common.grpc import frames, private

_REQUEST = [(":method", "POST"), (":scheme", "http"), (":path", "/"), (":authority", "x")]


def try_shortcuts() -> bool:
    """Run both paths in parallel: events, states, windows and bytes must be equal. Raises AttributeError and the like."""
    client = H2Connection(H2Configuration(client_side=True, header_encoding="latin-1"))
    server, plain = (H2Connection(H2Configuration(client_side=False, header_encoding="latin-1")) for _ in range(2))
    for connection in (client, server, plain):
        connection.initiate_connection()
    client.receive_data(server.data_to_send())
    plain.clear_outbound_data_buffer()
    for stream_id in (1, 3):
        client.send_headers(stream_id, _REQUEST, end_stream=stream_id == 1)
    client.send_data(3, bytes(30), end_stream=True)
    client.increment_flow_control_window(40)
    client.increment_flow_control_window(30, stream_id=3)
    wire = client.data_to_send()
    private.expect_frames_past_h2(server)
    sent = wire[len(frames.PREFACE) :]
    events = private.receive_by_shortcut(server, sent, frames.read_headers(sent))
    if list(map(_describe, events)) != list(map(_describe, plain.receive_data(wire))):
        return False
    if server.data_to_send() != plain.data_to_send() or _windows(server) != _windows(plain):
        return False
    return _try_sending(client, server, plain) and _try_remembering() and _try_ending(client, server, plain)


def _try_remembering() -> bool:
    encoder = Encoder()
    requests = ([*_REQUEST, ("grpc-timeout", value), ("user-agent", "a")] for value in ("1S", "20S"))
    first, second = (bytes(encoder.encode(request)) for request in requests)
    beginnings: list[private.Beginning] = []
    decoders = [Decoder(), private.RequestDecoder(1 << 16, beginnings), private.RequestDecoder(1 << 16, beginnings)]
    plain, learning, knowing = (
        ([list(decoder.decode(block, True)) for block in (first, second)], vars(decoder.header_table)) for decoder in decoders
    )
    return plain == learning == knowing and len(beginnings) == 1


def _describe(event: Event) -> tuple[str, list[tuple[str, str]]]:
    """A comparable form of an event."""
    return type(event).__name__, sorted((name, repr(value)) for name, value in vars(event).items())


def _windows(engine: H2Connection) -> tuple[int, ...]:
    return engine.local_flow_control_window(3), engine.inbound_flow_control_window, engine.open_inbound_streams


def _try_ending(client: H2Connection, server: H2Connection, plain: H2Connection) -> bool:
    client.close_connection(error_code=2, additional_data=b"why")
    wire = client.data_to_send()
    ways = (private.receive_by_shortcut(server, wire, frames.read_headers(wire)), plain.receive_data(wire))
    return (
        len({tuple(map(repr, map(_describe, events))) for events in ways}) == 1
        and server.state_machine.state is plain.state_machine.state
    )


def _try_sending(client: H2Connection, server: H2Connection, plain: H2Connection) -> bool:
    window = server.local_flow_control_window(3)
    opened = (new.inbound_flow_control_window for new in (server, plain))
    for new, opens in (
        (server, lambda size: private.open_window_past_h2(server, size)),
        (plain, plain.increment_flow_control_window),
    ):
        opens(5)
        new.clear_outbound_data_buffer()
    if len(set(opened)) != 1:
        return False
    answer = private.answer_past_h2(server, 1, bytes(10))
    if answer is None or not _is_answer(client.receive_data(answer), 10):
        return False
    for step in private.ANSWER_STEPS:
        plain.streams[1].state_machine.process_input(step)
    if vars(server.streams[1].state_machine) != vars(plain.streams[1].state_machine):
        return False
    if server.open_inbound_streams != 1:
        return False
    left = server.outbound_flow_control_window
    server.streams[3].outbound_flow_control_window -= 20
    server.outbound_flow_control_window -= 20
    if server.outbound_flow_control_window != left - 20 or server.local_flow_control_window(3) != window - 20:
        return False
    server.encoder.header_table_size = 0
    return bool(server.encoder.table_size_changes)


def _is_answer(events: Sequence[Event], size: int) -> bool:
    kinds = [event.__class__ for event in events]
    bodies = [len(event.data or b"") for event in events if isinstance(event, DataReceived)]
    return kinds == [ResponseReceived, DataReceived, TrailersReceived, StreamEnded] and bodies == [size]
