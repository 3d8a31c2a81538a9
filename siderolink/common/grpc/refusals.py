"""Named reasons for refusals by the API layer."""

from enum import StrEnum

from h2.errors import ErrorCodes


class Refusal(StrEnum):
    """A reason for refusing a connection, a call or a message. Counted by the server; listed in docs/drops.md."""

    TOO_MANY_CONNECTIONS = "too_many_connections"
    """The server's limit of connections is reached."""
    TOO_MANY_CONNECTIONS_FROM_ADDRESS = "too_many_connections_from_address"
    """The limit of connections from one address (an IPv6 /64 counts as one) is reached."""
    CROWDED_OUT = "crowded_out"
    """The server was full, and the connection's address had more connections than any other without a valid token."""
    UNPROVEN_TOO_LONG = "unproven_too_long"
    """Many connections had no valid token, and this one had none for too long."""
    NOT_FROM_PROXY = "not_from_proxy"
    """A connection did not come from a configured proxy although the PROXY protocol is required."""
    BAD_PROXY_HEADER = "bad_proxy_header"
    """A proxy's connection did not begin with a PROXY protocol header in time."""
    TLS_HANDSHAKE_FAILED = "tls_handshake_failed"
    """The TLS handshake failed or took too long."""
    PREFACE_TIMEOUT = "preface_timeout"
    """The peer did not complete HTTP/2's preface and first SETTINGS in time."""
    NOT_HTTP2 = "not_http2"
    """The connection did not start with the HTTP/2 preface."""
    PROTOCOL_ERROR = "protocol_error"
    """The peer violated HTTP/2."""
    FRAME_TOO_LARGE = "frame_too_large"
    """A frame was longer than announced to the peer."""
    HEADERS_TOO_LARGE = "headers_too_large"
    """A header block was too long."""
    FLOW_CONTROL = "flow_control"
    """The peer sent more than its window."""
    CONNECTION_IDLE = "connection_idle"
    """A connection had no call for too long."""
    PING_TIMEOUT = "ping_timeout"
    """The peer did not answer a PING in time."""
    TOO_MANY_STREAMS = "too_many_streams"
    """The peer exceeded its limit of concurrent calls."""
    RESET_FLOOD = "reset_flood"
    """Too many calls were reset, or had to be reset or refused, in a short time."""
    PING_FLOOD = "ping_flood"
    """Too many PING frames in a short time."""
    SETTINGS_FLOOD = "settings_flood"
    """Too many SETTINGS frames, or entries in them, in a short time."""
    EMPTY_FRAME_FLOOD = "empty_frame_flood"
    """Too many empty frames in a short time."""
    SMALL_FRAME_FLOOD = "small_frame_flood"
    """Too many DATA frames of a few bytes in a short time, or too many messages in one frame."""
    WINDOW_UPDATE_FLOOD = "window_update_flood"
    """Too many WINDOW_UPDATE frames in a short time."""
    OTHER_FRAME_FLOOD = "other_frame_flood"
    """Too many PRIORITY, GOAWAY, CONTINUATION, trailers or unknown frames in a short time."""
    TOO_MANY_CALLS = "too_many_calls"
    """Too many concurrent calls of one method on one connection."""
    CALL_MEMORY = "call_memory"
    """Calls and their waiting data reached the memory limit of the server or of one address."""
    BAD_REQUEST = "bad_request"
    """A call's headers were not valid for gRPC, or its metadata was malformed."""
    UNKNOWN_METHOD = "unknown_method"
    """A call requested a method that this server does not have."""
    MESSAGE_TOO_LARGE = "message_too_large"
    """A gRPC message announced a length above the limit."""
    MESSAGE_COMPRESSED = "message_compressed"
    """A gRPC message was marked as compressed although no compression was negotiated."""
    MESSAGE_MALFORMED = "message_malformed"
    """A gRPC message was cut short, had too many fields, or was not the protobuf message of its method."""
    REQUEST_TIMEOUT = "request_timeout"
    """A call's request message was not complete in time, or the call exceeded its method's time limit."""
    ANSWER_NOT_TAKEN = "answer_not_taken"
    """The peer left no room for an answer, or left too much data unread, or left it unread for too long."""
    STREAM_IDLE = "stream_idle"
    """A byte stream received nothing for too long."""
    INTERNAL_ERROR = "internal_error"
    """An internal error while handling a connection; the log has its traceback."""


PEER_FAULTS = frozenset((
    Refusal.BAD_REQUEST,
    Refusal.UNKNOWN_METHOD,
    Refusal.TOO_MANY_STREAMS,
    Refusal.TOO_MANY_CALLS,
    Refusal.MESSAGE_TOO_LARGE,
    Refusal.MESSAGE_COMPRESSED,
    Refusal.MESSAGE_MALFORMED,
    Refusal.SMALL_FRAME_FLOOD,
    Refusal.REQUEST_TIMEOUT,
    Refusal.ANSWER_NOT_TAKEN,
    Refusal.FLOW_CONTROL,
))  # fmt: skip
"""Refusals of a call that only the peer can cause. Too many of them end its connection."""

ERROR_CODES: dict[Refusal, ErrorCodes] = {
    Refusal.TOO_MANY_CONNECTIONS: ErrorCodes.ENHANCE_YOUR_CALM,
    Refusal.TOO_MANY_CONNECTIONS_FROM_ADDRESS: ErrorCodes.ENHANCE_YOUR_CALM,
    Refusal.CROWDED_OUT: ErrorCodes.ENHANCE_YOUR_CALM,
    Refusal.UNPROVEN_TOO_LONG: ErrorCodes.ENHANCE_YOUR_CALM,
    Refusal.PREFACE_TIMEOUT: ErrorCodes.SETTINGS_TIMEOUT,
    Refusal.FRAME_TOO_LARGE: ErrorCodes.FRAME_SIZE_ERROR,
    Refusal.HEADERS_TOO_LARGE: ErrorCodes.ENHANCE_YOUR_CALM,
    Refusal.FLOW_CONTROL: ErrorCodes.FLOW_CONTROL_ERROR,
    Refusal.CONNECTION_IDLE: ErrorCodes.NO_ERROR,
    Refusal.PING_TIMEOUT: ErrorCodes.NO_ERROR,
    Refusal.TOO_MANY_STREAMS: ErrorCodes.ENHANCE_YOUR_CALM,
    Refusal.RESET_FLOOD: ErrorCodes.ENHANCE_YOUR_CALM,
    Refusal.PING_FLOOD: ErrorCodes.ENHANCE_YOUR_CALM,
    Refusal.SETTINGS_FLOOD: ErrorCodes.ENHANCE_YOUR_CALM,
    Refusal.EMPTY_FRAME_FLOOD: ErrorCodes.ENHANCE_YOUR_CALM,
    Refusal.SMALL_FRAME_FLOOD: ErrorCodes.ENHANCE_YOUR_CALM,
    Refusal.WINDOW_UPDATE_FLOOD: ErrorCodes.ENHANCE_YOUR_CALM,
    Refusal.OTHER_FRAME_FLOOD: ErrorCodes.ENHANCE_YOUR_CALM,
    Refusal.CALL_MEMORY: ErrorCodes.ENHANCE_YOUR_CALM,
    Refusal.ANSWER_NOT_TAKEN: ErrorCodes.ENHANCE_YOUR_CALM,
    Refusal.INTERNAL_ERROR: ErrorCodes.INTERNAL_ERROR,
}
"""The HTTP/2 error code (RFC 9113, 7) in the GOAWAY of a refused connection; PROTOCOL_ERROR for all others."""


class Refused(Exception):
    """Raised inside the API layer when the peer of a connection or stream is refused."""

    def __init__(self, refusal: Refusal, message: str) -> None:
        super().__init__(message)
        self.refusal = refusal
        self.message = message
