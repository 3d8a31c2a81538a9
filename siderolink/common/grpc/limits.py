"""How much one peer of the API may ask for, before it is refused."""

from dataclasses import dataclass
from typing import Self

from siderolink.common.errors import ConfigurationError

DEFAULT_WINDOW = 65_535
"""A connection's window before anyone has changed it (RFC 9113, 6.9.2)."""
_LARGEST_WINDOW = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds on connections, streams and messages. Sizes are bytes, times seconds; the defaults fit a server."""

    max_message_bytes: int = 64 * 1024
    """The longest gRPC message taken by an ordinary call, refused by its length prefix before it is buffered."""
    max_header_bytes: int = 16 * 1024
    """The longest header list, and the longest header block as it travels, of one call."""
    max_frame_bytes: int = 64 * 1024
    """The longest HTTP/2 frame taken (RFC 9113, 4.2: 16,384 to 16,777,215)."""
    stream_window_bytes: int = 512 * 1024
    """How much a peer may send on one stream before it is acknowledged."""
    connection_window_bytes: int = 1024 * 1024
    """How much a peer may send on all streams of one connection before it is acknowledged."""

    max_received_bytes: int = 256 * 1024
    """How much one connection may have sent that no call has taken yet: unfinished frames and messages. At least a message of
    the largest size and a frame are allowed."""
    max_unsent_bytes: int = 512 * 1024
    """How much may wait in this process for one peer to read it; the connection ends beyond it."""
    unread_timeout: float = 30.0
    """How long a peer may leave what waits for it unread."""
    max_call_bytes: int = 32 * 1024 * 1024
    """Memory that ordinary calls of all peers may take together: 16 KiB each, and the bytes that wait for them."""
    max_call_bytes_per_address: int = 8 * 1024 * 1024
    """The share of one address once more than half is in use."""
    max_unproven_call_bytes: int = 8 * 1024 * 1024
    """The part of `max_call_bytes` for addresses without a call with a valid token so far; each may have a quarter of it."""

    max_connections: int = 16_384
    """Connections in all; never more than the process may have descriptors."""
    max_connections_per_address: int = 1_024
    """Connections from one IPv4 address or one IPv6 /64, while the server is crowded. Many machines may share one NAT."""
    crowded_from: float = 0.5
    """The share of `max_connections` in use above which the server is crowded; 0 for always."""
    max_unproven_connections: int = 2_048
    """Connections, of `max_connections`, from addresses from which no call with a valid token has come yet.
    One such address may have all of them while no other wants any; each takes some 26 KB."""
    max_unproven_tls_connections: int = 768
    """The same of a server with TLS, where each takes some 68 KB."""
    unproven_timeout: float = 20.0
    """How long such a connection may stay while more than half of `max_unproven_connections` are in use."""
    ipv6_source_bits: int = 64
    """How much of an IPv6 address tells callers apart: a /64 is one host's; on an overlay each address is a machine's."""
    max_streams: int = 128
    """Calls at the same time on one connection."""
    max_unproven_streams: int = 32
    """Calls at the same time on one connection from an address from which no call with a valid token has come yet."""

    preface_timeout: float = 10.0
    """From accepting a connection to the end of the TLS handshake, and from there to the peer's first SETTINGS frame."""
    request_timeout: float = 20.0
    """From a call's headers to the end of its only request message."""
    connection_idle_timeout: float = 300.0
    """How long a connection may be without any call."""
    stream_idle_timeout: float | None = 300.0
    """How long a byte stream may receive nothing (WireGuard keeps it busy every 25 s). None disables the limit."""
    shutdown_timeout: float = 1.0
    """How long running calls may take to end when the server stops."""

    flood_interval: float = 10.0
    """The span over which the following counts are taken."""
    max_resets: int = 200
    """Calls per interval that the peer resets (CVE-2023-44487) or makes this side reset or refuse (CVE-2025-8671)."""
    max_pings: int = 100
    """PING frames per interval that no data of ours called for (CVE-2019-9512)."""
    max_settings: int = 100
    """SETTINGS frames per interval (CVE-2019-9515)."""
    max_settings_entries: int = 256
    """Entries of all these frames per interval."""
    max_empty_frames: int = 100
    """Empty DATA, HEADERS and CONTINUATION frames per interval (CVE-2019-9518)."""
    max_small_frames: int = 2_000
    """DATA frames per interval of fewer than 32 bytes that do not end their stream."""
    max_window_updates: int = 2_000
    """WINDOW_UPDATE frames per interval that no data of ours called for."""
    max_other_frames: int = 500
    """PRIORITY, GOAWAY, CONTINUATION, trailers and unknown frames per interval (CVE-2019-9513)."""

    server_ping_interval: float | None = 45.0
    """A server asks after a silent connection this often, which also keeps silent calls open at proxies that wait 60 s."""
    client_ping_interval: float | None = 330.0
    """A client asks after a silent connection this often; existing servers end connections that ask within 300 s."""
    ping_timeout: float = 20.0
    """How long an answer to such a PING may take; peers need not ask themselves."""
    tcp_keepalive_idle: int = 30
    """Whole seconds of silence before the kernel probes the peer; it gives up after three probes."""
    tcp_keepalive_interval: int = 10
    """Whole seconds between these probes."""
    connect_timeout: float = 10.0
    """How long a client waits for a connection, the TLS handshake included."""

    @classmethod
    def for_answers(cls, size: int) -> Self:
        """A client's, that takes answers of up to `size` bytes."""
        return cls(max_message_bytes=size, stream_window_bytes=size + 5, connection_window_bytes=max(size + 5, 1 << 20))

    @property
    def received_bytes(self) -> int:
        """`max_received_bytes`, or as much as the largest message needs."""
        return max(self.max_received_bytes, self.max_message_bytes + 5 + self.max_frame_bytes)

    def __hash__(self) -> int:
        """Of a few fields: every connection looks up what is the same for all with its limits."""
        return hash((self.max_message_bytes, self.connection_window_bytes, self.max_streams))

    def __post_init__(self) -> None:
        """Raises ConfigurationError for what HTTP/2 cannot express."""
        if not 16_384 <= self.max_frame_bytes < 1 << 24:
            raise ConfigurationError(f"max_frame_bytes is 16384 to 16777215, not {self.max_frame_bytes}")
        if not DEFAULT_WINDOW <= self.connection_window_bytes <= _LARGEST_WINDOW:
            raise ConfigurationError(f"connection_window_bytes is 65535 to 2147483647, not {self.connection_window_bytes}")
        # A message is acknowledged when it is whole: it would never be, where a window is smaller.
        for name in ("stream_window_bytes", "connection_window_bytes"):
            if not self.max_message_bytes + 5 <= getattr(self, name) <= _LARGEST_WINDOW:
                raise ConfigurationError(f"{name} is max_message_bytes + 5 to 2147483647, not {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CallLimits:
    """Bounds of the calls of one method, where they are tighter than those of `Limits`."""

    max_message_bytes: int | None = None
    """The longest request message."""
    max_fields: int | None = None
    """Protobuf fields of one request message, unknown ones included. They are counted before the message is decoded."""
    max_calls: int | None = None
    """Calls at the same time on one connection."""
    message_timeout: float | None = None
    """How long a call that streams requests may wait for its next one."""
    call_timeout: float | None = None
    """How long the whole call may last."""
