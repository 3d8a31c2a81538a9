//! What is read and written of IP, TCP, UDP and virtio_net headers (RFC 791, 8200, 9293, 768; virtio 5.1.6).

use crate::checksum::{complement, word_sum};

/// Protocol numbers.
pub const TCP: u8 = 6;
/// See `TCP`.
pub const UDP: u8 = 17;
/// Flags of TCP.
pub const FIN: u8 = 0x01;
/// See `FIN`.
pub const SYN: u8 = 0x02;
/// See `FIN`.
pub const RST: u8 = 0x04;
/// See `FIN`.
pub const PSH: u8 = 0x08;
/// See `FIN`.
pub const ACK: u8 = 0x10;
/// See `FIN`.
pub const URG: u8 = 0x20;
/// See `FIN`.
pub const CWR: u8 = 0x80;

/// Bytes of a virtio_net_hdr.
pub const VNET: usize = 10;
/// Its flag for a checksum that is left to the receiver.
pub const NEEDS_CSUM: u8 = 1;
/// Kinds of super-packets.
pub const GSO_TCPV4: u8 = 1;
/// See `GSO_TCPV4`.
pub const GSO_TCPV6: u8 = 4;
/// See `GSO_TCPV4`.
pub const GSO_UDP: u8 = 5;
/// A flag beside the TCP kinds: the first segment may carry CWR.
pub const GSO_ECN: u8 = 0x80;

/// Where things are in one IP packet that carries TCP or UDP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Inner {
    /// 4 or 6.
    pub version: u8,
    /// `TCP` or `UDP`.
    pub protocol: u8,
    /// The offset of the TCP or UDP header.
    pub transport: usize,
    /// The offset of the payload.
    pub header: usize,
    /// The length of the packet by its own account.
    pub total: usize,
}

/// A big-endian number of 16 bits.
pub fn read_16(data: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([data[at], data[at + 1]])
}

/// Write a big-endian number of 16 bits.
pub fn put_16(data: &mut [u8], at: usize, value: u16) {
    data[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

/// A big-endian number of 32 bits.
pub fn read_32(data: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([data[at], data[at + 1], data[at + 2], data[at + 3]])
}

/// Write a big-endian number of 32 bits.
pub fn put_32(data: &mut [u8], at: usize, value: u32) {
    data[at..at + 4].copy_from_slice(&value.to_be_bytes());
}

/// The length of an IP packet by its own account; None if it is not IP, contradicts itself or is longer than `packet`.
pub fn total_length(packet: &[u8]) -> Option<usize> {
    let total = match packet.first()? >> 4 {
        6 if packet.len() >= 40 => 40 + usize::from(read_16(packet, 4)),
        4 if packet.len() >= 20 => {
            let total = usize::from(read_16(packet, 2));
            let header = usize::from(packet[0] & 15) * 4;
            if header < 20 || header > total {
                return None;
            }
            total
        }
        _ => return None,
    };
    (total <= packet.len()).then_some(total)
}

/// Find the TCP or UDP header of an IP packet whose length `total_length` gave.
///
/// None for fragments, for IPv6 extension headers, for other protocols and for headers that do not fit.
pub fn parse_inner(packet: &[u8], total: usize) -> Option<Inner> {
    let (version, protocol, transport) = if packet[0] >> 4 == 6 {
        (6, packet[6], 40)
    } else {
        if packet[6] & 0x3F != 0 || packet[7] != 0 {
            return None;
        }
        (4, packet[9], usize::from(packet[0] & 15) * 4)
    };
    let header = match protocol {
        TCP => {
            if total < transport + 20 {
                return None;
            }
            let header = transport + usize::from(packet[transport + 12] >> 4) * 4;
            if header < transport + 20 || header > total {
                return None;
            }
            header
        }
        UDP => {
            if total < transport + 8 || usize::from(read_16(packet, transport + 4)) != total - transport {
                return None;
            }
            transport + 8
        }
        _ => return None,
    };
    Some(Inner {
        version,
        protocol,
        transport,
        header,
        total,
    })
}

/// The sum of both addresses and the protocol; the length is left to the caller.
pub fn pseudo_sum(packet: &[u8], version: u8, protocol: u8) -> u32 {
    let addresses = if version == 6 { &packet[8..40] } else { &packet[12..20] };
    word_sum(addresses) + u32::from(protocol)
}

/// Write the length field of an IP header.
pub fn put_total(head: &mut [u8], version: u8, total: usize) {
    if version == 6 {
        put_16(head, 4, (total - 40) as u16);
    } else {
        put_16(head, 2, total as u16);
    }
}

/// Write the checksum of an IPv4 header of `size` bytes.
pub fn put_ipv4_checksum(head: &mut [u8], size: usize) {
    put_16(head, 10, 0);
    let checksum = complement(word_sum(&head[..size]));
    put_16(head, 10, checksum);
}

/// The fields of a virtio_net_hdr that tell of segmentation, in the host's byte order.
pub struct GsoFields {
    /// `NEEDS_CSUM` and others.
    pub flags: u8,
    /// The kind of super-packet.
    pub kind: u8,
    /// The payload of each segment but the last.
    pub size: usize,
    /// The offset from which a checksum is to be made.
    pub csum_start: usize,
}

/// Read the first ten bytes of a frame.
pub fn parse_gso(frame: &[u8]) -> GsoFields {
    GsoFields {
        flags: frame[0],
        kind: frame[1],
        size: usize::from(u16::from_ne_bytes([frame[4], frame[5]])),
        csum_start: usize::from(u16::from_ne_bytes([frame[6], frame[7]])),
    }
}

/// Write a virtio_net_hdr for a super-packet with a partial checksum.
pub fn put_gso(frame: &mut [u8], kind: u8, header: usize, size: usize, csum_start: usize, csum_offset: usize) {
    frame[0] = NEEDS_CSUM;
    frame[1] = kind;
    for (at, value) in [(2, header), (4, size), (6, csum_start), (8, csum_offset)] {
        frame[at..at + 2].copy_from_slice(&(value as u16).to_ne_bytes());
    }
}
