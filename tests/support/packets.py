"""Simple, slow packet code, one packet at a time: the reference for the vectorised data plane."""

import struct
from dataclasses import dataclass, replace

from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from siderolink.common.wireguard.noise import Packets
from siderolink.common.wireguard.packets.parts import SmallPacketGatherer, SuperPacketSplitter
from siderolink.common.wireguard.path import Datagrams

FIN, SYN, RST, PSH, ACK, URG, ECE, CWR = (1 << bit for bit in range(8))
TCP, UDP = 6, 17


def checksum(data: bytes) -> int:
    """RFC 1071, word by word."""
    if len(data) % 2:
        data += b"\0"
    total = 0
    for (word,) in struct.iter_unpack(">H", data):
        total += word
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


@dataclass(frozen=True, kw_only=True)
class Packet:
    """A TCP or UDP packet in parts."""

    version: int = 6
    protocol: int = TCP
    source: int = 1
    destination: int = 2
    ports: tuple[int, int] = (1000, 2000)
    sequence: int = 1
    acknowledgement: int = 77
    flags: int = ACK
    window: int = 500
    urgent: int = 0
    options: bytes = b""
    payload: bytes = b"x"
    identifier: int = 7
    fragment: int = 0x4000
    traffic_class: int = 0
    flow_label: int = 0
    ip_options: bytes = b""
    hop_limit: int = 64

    def _transport(self) -> tuple[bytearray, int]:
        if self.protocol == TCP:
            offset = (20 + len(self.options)) // 4
            header = struct.pack(
                ">HHIIBBHHH",
                *self.ports,
                self.sequence & 0xFFFFFFFF,
                self.acknowledgement,
                offset << 4,
                self.flags,
                self.window,
                0,
                self.urgent,
            )
            return bytearray(header + self.options + self.payload), 16
        return bytearray(struct.pack(">HHHH", *self.ports, 8 + len(self.payload), 0) + self.payload), 6

    def _addresses(self) -> bytes:
        if self.version == 6:
            return b"\xfd" + self.source.to_bytes(15, "big") + b"\xfd" + self.destination.to_bytes(15, "big")
        return b"\x0a" + self.source.to_bytes(3, "big") + b"\x0a" + self.destination.to_bytes(3, "big")

    def _ip_header(self, size: int) -> bytes:
        if self.version == 6:
            word = 6 << 28 | self.traffic_class << 20 | self.flow_label
            return struct.pack(">IHBB", word, size, self.protocol, self.hop_limit) + self._addresses()
        length = 20 + len(self.ip_options)
        first = struct.pack(
            ">BBHHHBB",
            4 << 4 | length // 4,
            self.traffic_class,
            length + size,
            self.identifier & 0xFFFF,
            self.fragment,
            self.hop_limit,
            self.protocol,
        )
        header = first + b"\0\0" + self._addresses() + self.ip_options
        return header[:10] + checksum(header).to_bytes(2, "big") + header[12:]

    def encode(self, *, partial: bool = False) -> bytes:
        """The packet with its checksum; `partial`: with the pseudo-header's sum in place of it."""
        segment, at = self._transport()
        pseudo = self._addresses() + struct.pack(">II", len(segment), self.protocol)
        if partial:
            value = ~checksum(pseudo) & 0xFFFF
        else:
            value = checksum(pseudo + segment)
            if self.protocol == UDP and not value:
                value = 0xFFFF
        segment[at : at + 2] = value.to_bytes(2, "big")
        return self._ip_header(len(segment)) + segment

    @property
    def transport(self) -> int:
        return 40 if self.version == 6 else 20 + len(self.ip_options)

    def frame(self, gso_size: int) -> bytes:
        """The packet as a super-packet read from a TUN interface."""
        if self.protocol == UDP:
            gso_type, offset, header = 5, 6, self.transport + 8
        else:
            gso_type = (4 if self.version == 6 else 1) | (0x80 if self.flags & CWR else 0)
            offset, header = 16, self.transport + 20 + len(self.options)
        return struct.pack("=BBHHHH", 1, gso_type, header, gso_size, self.transport, offset) + self.encode(partial=True)

    def segments(self, gso_size: int) -> list["Packet"]:
        """The packets of the super-packet, as sent on the network."""
        chunks = [self.payload[at : at + gso_size] for at in range(0, len(self.payload), gso_size)]
        segments = []
        for index, chunk in enumerate(chunks):
            flags = self.flags
            if self.protocol == TCP:
                if index:
                    flags &= ~CWR
                if index < len(chunks) - 1:
                    flags &= ~(FIN | PSH)
            segments.append(
                replace(
                    self,
                    payload=chunk,
                    flags=flags,
                    sequence=self.sequence + index * gso_size,
                    identifier=self.identifier + index,
                )
            )
        return segments


def collected(collector: SuperPacketSplitter | SmallPacketGatherer, frame: bytes | memoryview) -> Packets:
    """The rows of one frame."""
    assert collector.add(memoryview(frame))
    packets = collector.take()
    assert packets is not None
    return packets


def decode(data: bytes) -> Packet:
    """Parse a packet with options but without extension headers; checksums are ignored."""
    version = data[0] >> 4
    if version == 6:
        transport, protocol, ip_options = 40, data[6], b""
        source, destination = int.from_bytes(data[9:24], "big"), int.from_bytes(data[25:40], "big")
        traffic_class, flow_label, hop_limit = (
            data[0] << 4 & 0xF0 | data[1] >> 4,
            int.from_bytes(data[1:4], "big") & 0xFFFFF,
            data[7],
        )
        identifier, fragment = 7, 0x4000
    else:
        transport, protocol = (data[0] & 15) * 4, data[9]
        ip_options = data[20:transport]
        source, destination = int.from_bytes(data[13:16], "big"), int.from_bytes(data[17:20], "big")
        traffic_class, flow_label, hop_limit = data[1], 0, data[8]
        identifier, fragment = struct.unpack(">HH", data[4:8])
    segment = data[transport:]
    common = Packet(
        version=version,
        protocol=protocol,
        source=source,
        destination=destination,
        ports=struct.unpack(">HH", segment[:4]),
        traffic_class=traffic_class,
        flow_label=flow_label,
        hop_limit=hop_limit,
        identifier=identifier,
        fragment=fragment,
        ip_options=ip_options,
        payload=segment[8:],
    )
    if protocol == UDP:
        return common
    sequence, acknowledgement, offset, flags, window, _, urgent = struct.unpack(">IIBBHHH", segment[4:20])
    return replace(
        common,
        sequence=sequence,
        acknowledgement=acknowledgement,
        flags=flags,
        window=window,
        urgent=urgent,
        options=segment[20 : (offset >> 4) * 4],
        payload=segment[(offset >> 4) * 4 :],
    )


def segment_frame(frame: bytes) -> list[bytes]:
    """The packets that the kernel makes of a frame written to a TUN interface, with complete checksums."""
    flags, gso_type, header, gso_size, start, offset = struct.unpack("=BBHHHH", frame[:10])
    packet = frame[10:]
    if not gso_type:
        assert not flags
        return [packet]
    whole = decode(packet)
    assert flags == 1
    assert whole.encode(partial=True) == packet
    assert whole.frame(gso_size) == frame
    assert (start, header) == (whole.transport, len(packet) - len(whole.payload))
    assert offset == (16 if whole.protocol == TCP else 6)
    return [segment.encode() for segment in whole.segments(gso_size)]


def pad(packet: bytes, mtu: int = 1280) -> bytes:
    size = -(-len(packet) // 16) * 16
    return packet + bytes(max(0, min(size, mtu) - len(packet)))


def seal(aead: ChaCha20Poly1305, plaintext: bytes, receiver: int, counter: int) -> bytes:
    """One WireGuard transport message."""
    nonce = bytes(4) + counter.to_bytes(8, "little")
    return struct.pack("<IIQ", 4, receiver, counter) + aead.encrypt(nonce, plaintext, None)


def batch(datagrams: list[bytes], headroom: int = 0) -> Datagrams:
    """One batch of equally long datagrams; the last may be shorter."""
    data = b"".join(bytes(headroom) + datagram for datagram in datagrams)
    return Datagrams(memoryview(data), len(datagrams), headroom + len(datagrams[0]), headroom)


def runs_of_one_size(packets: list[bytes]) -> list[list[bytes]]:
    """Group neighbours of equal length like a receiver; the last of a group may be shorter."""
    groups: list[list[bytes]] = []
    for packet in packets:
        if groups and len(groups[-1][-1]) == len(groups[-1][0]) >= len(packet):
            groups[-1].append(packet)
        else:
            groups.append([packet])
    return groups
