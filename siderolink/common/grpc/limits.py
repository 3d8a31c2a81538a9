"""Limits on the resources that one peer of the API may use."""

from dataclasses import dataclass
from typing import Self

from siderolink.common.errors import ConfigurationError

DEFAULT_WINDOW = 65_535
"""A connection's initial window (RFC 9113, 6.9.2)."""
_LARGEST_WINDOW = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of connections, streams and messages. Sizes are in bytes, times in seconds; the defaults fit a server."""

    max_message_bytes: int = 64 * 1024
    """Maximum gRPC message of an ordinary call; longer ones are refused by their length prefix before they are buffered."""
    max_answer_fields: int | None = None
    """Maximum protobuf fields of one message that a client receives, counted before decoding: each takes some 5 µs."""
    max_header_bytes: int = 16 * 1024
    """Maximum header list, and maximum encoded header block, of one call."""
    max_frame_bytes: int = 64 * 1024
    """Maximum HTTP/2 frame accepted (RFC 9113, 4.2: 16,384 to 16,777,215)."""
    stream_window_bytes: int = 512 * 1024
    """How much a peer may send on one stream before it is acknowledged."""
    connection_window_bytes: int = 1024 * 1024
    """How much a peer may send on all streams of one connection before it is acknowledged."""

    max_received_bytes: int = 256 * 1024
    """Maximum data of one connection that no call has consumed: incomplete frames and messages. At least one message of maximum
    size and a frame are allowed."""
    max_unsent_bytes: int = 512 * 1024
    """Maximum unsent data for one peer in this process; more ends the connection."""
    unread_timeout: float = 30.0
    """How long a peer may leave sent data unread."""
    max_call_bytes: int = 32 * 1024 * 1024
    """Memory of ordinary calls of all peers together: 16 KiB each, and the bytes waiting for them."""
    max_call_bytes_per_address: int = 8 * 1024 * 1024
    """The share of one address while more than half is in use."""
    max_unproven_call_bytes: int = 8 * 1024 * 1024
    """The part of `max_call_bytes` for addresses without a valid token so far; each may have a quarter of it."""

    max_connections: int = 16_384
    """Maximum connections; further limited by the process's file descriptors."""
    max_connections_per_address: int = 1_024
    """Connections from one IPv4 address or IPv6 /64 while the server is crowded. Many machines may share one NAT."""
    crowded_from: float = 0.5
    """The share of `max_connections` above which the server is crowded; 0 for always."""
    max_unproven_connections: int = 2_048
    """The part of `max_connections` for addresses without a valid token so far, some 26 KB each.
    One such address may use all of them while no other needs any."""
    max_unproven_tls_connections: int = 768
    """The same for a server with TLS, where each takes some 68 KB."""
    unproven_timeout: float = 20.0
    """How long such a connection may stay while more than half of `max_unproven_connections` are in use."""
    ipv6_source_bits: int = 64
    """Prefix length that identifies an IPv6 caller: a /64 is one host; on an overlay each address is one machine."""
    max_streams: int = 128
    """Concurrent calls on one connection."""
    max_unproven_streams: int = 32
    """Concurrent calls on one connection from an address without a valid token so far."""

    preface_timeout: float = 10.0
    """Time limit from accepting to the end of the TLS handshake, and from there to the peer's first SETTINGS frame."""
    request_timeout: float = 20.0
    """Time limit from a call's headers to the end of its only request message."""
    connection_idle_timeout: float = 300.0
    """How long a connection may have no call."""
    stream_idle_timeout: float | None = 300.0
    """How long a byte stream may receive nothing (WireGuard sends every 25 s). None disables the limit."""
    shutdown_timeout: float = 1.0
    """How long running calls may take to end when the server stops."""

    flood_interval: float = 10.0
    """The interval of the following counts."""
    max_resets: int = 200
    """Calls per interval that the peer resets (CVE-2023-44487) or makes this side reset or refuse (CVE-2025-8671)."""
    max_pings: int = 100
    """PING frames per interval that are not in response to our data (CVE-2019-9512)."""
    max_settings: int = 100
    """SETTINGS frames per interval (CVE-2019-9515)."""
    max_settings_entries: int = 256
    """Entries of all these frames per interval."""
    max_empty_frames: int = 100
    """Empty DATA, HEADERS and CONTINUATION frames per interval (CVE-2019-9518)."""
    max_small_frames: int = 2_000
    """DATA frames per interval with fewer than 32 bytes that do not end their stream."""
    max_window_updates: int = 2_000
    """WINDOW_UPDATE frames per interval that are not in response to our data."""
    max_other_frames: int = 500
    """PRIORITY, GOAWAY, CONTINUATION, trailers and unknown frames per interval (CVE-2019-9513)."""

    server_ping_interval: float | None = 45.0
    """Interval of a server's PINGs on a silent connection; also keeps silent calls open at proxies with a timeout of 60 s."""
    client_ping_interval: float | None = 330.0
    """Interval of a client's PINGs on a silent connection; existing servers end connections with more than one in 300 s."""
    ping_timeout: float = 20.0
    """Time limit of the answer to such a PING; peers need not send any themselves."""
    tcp_keepalive_idle: int = 30
    """Whole seconds of silence before the kernel probes the peer; it gives up after five probes."""
    tcp_keepalive_interval: int = 6
    """Whole seconds between these probes."""
    connect_timeout: float = 10.0
    """Time limit of a client's connection setup, including the TLS handshake."""

    @classmethod
    def for_answers(cls, size: int, max_fields: int | None = None) -> Self:
        """A client's limits for answers of up to `size` bytes and, if given, `max_fields` fields."""
        return cls(
            max_message_bytes=size,
            max_answer_fields=max_fields,
            stream_window_bytes=size + 5,
            connection_window_bytes=max(size + 5, 1 << 20),
        )

    @property
    def received_bytes(self) -> int:
        """`max_received_bytes`, or more if the largest message needs it."""
        return max(self.max_received_bytes, self.max_message_bytes + 5 + self.max_frame_bytes)

    def __hash__(self) -> int:
        """A hash of a few fields only, because every connection looks up shared values by its limits."""
        return hash((self.max_message_bytes, self.connection_window_bytes, self.max_streams))

    def __post_init__(self) -> None:
        """Raises ConfigurationError for values that HTTP/2 cannot express."""
        if not 16_384 <= self.max_frame_bytes < 1 << 24:
            raise ConfigurationError(f"max_frame_bytes must be 16384 to 16777215, not {self.max_frame_bytes}")
        if not DEFAULT_WINDOW <= self.connection_window_bytes <= _LARGEST_WINDOW:
            raise ConfigurationError(f"connection_window_bytes must be 65535 to 2147483647, not {self.connection_window_bytes}")
        # A message is acknowledged when it is complete, so a window smaller than a message would block it forever.
        for name in ("stream_window_bytes", "connection_window_bytes"):
            if not self.max_message_bytes + 5 <= getattr(self, name) <= _LARGEST_WINDOW:
                raise ConfigurationError(f"{name} must be max_message_bytes + 5 to 2147483647, not {getattr(self, name)}")


WATCHFUL = Limits(tcp_keepalive_idle=4, tcp_keepalive_interval=1)
"""For a client that has somewhere else to go: it gives a connection up 9 s after its last sign of life, because a host that
vanishes closes none. The kernels at both ends do that, which costs no process anything; HTTP/2 pings may not be sent that
often, because other servers end connections for it. Five lost probes in a row are rare even on a lossy network.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallLimits:
    """Limits for the calls of one method that are tighter than those of `Limits`."""

    max_message_bytes: int | None = None
    """Maximum request message."""
    max_fields: int | None = None
    """Maximum protobuf fields of one request message, including unknown ones; counted before decoding."""
    max_calls: int | None = None
    """Concurrent calls on one connection."""
    message_timeout: float | None = None
    """How long a call with a request stream may wait for its next request."""
    call_timeout: float | None = None
    """Maximum duration of a call."""
