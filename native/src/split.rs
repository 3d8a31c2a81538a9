//! From a super-packet of a TUN interface to padded packets as rows: segmentation of TCP (TSO) and UDP (USO).

use crate::checksum::{complement, word_sum, MODULUS};
use crate::headers::{
    parse_gso, pseudo_sum, put_16, put_32, put_ipv4_checksum, put_total, read_16, read_32, CWR, FIN, GSO_ECN, GSO_TCPV4,
    GSO_TCPV6, GSO_UDP, NEEDS_CSUM, PSH, TCP, UDP, VNET,
};
use crate::layout::{Margins, Refused, Rows};

/// No IP packet is longer, so no frame is.
pub(crate) const MAX_FRAME: usize = VNET + 65_535 + 40;
const MAX_SEGMENTS: usize = 2048;
const MAX_BYTES: usize = 1 << 19;
/// The longest text that one UDP datagram can carry over IPv4, too.
const MAX_TEXT: usize = 65_507 - 32;

/// Why a frame was not split.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// The frame contradicts itself.
    Malformed(&'static str),
    /// The caller's numbers do not fit together.
    Arguments(Refused),
}

/// What was made of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segments {
    /// The number of rows.
    pub rows: usize,
    /// The padded length of each but the last.
    pub length: usize,
    /// The padded length of the last one.
    pub last: usize,
}

/// What all segments of a frame have in common.
struct Shape {
    version: u8,
    protocol: u8,
    transport: usize,
    header: usize,
    gso_size: usize,
    /// The sum of the pseudo-header without the length.
    pseudo: u32,
}

/// The length to seal: up to the next multiple of 16, but not beyond the MTU or what UDP can carry.
pub(crate) fn padded_length(size: usize, mtu: usize) -> usize {
    size.max(size.next_multiple_of(16).min(mtu).min(MAX_TEXT))
}

/// Write the segments of `frame` as rows of `buffer`, the first row's margin at `at`.
///
/// None if the rows do not fit behind `at`, or are not `wanted` bytes long where that is not 0: nothing is written then.
pub fn split(
    frame: &[u8],
    mtu: usize,
    buffer: &mut [u8],
    at: usize,
    margins: Margins,
    wanted: usize,
) -> Result<Option<Segments>, Failure> {
    let shape = parse_shape(frame)?;
    let packet = &frame[VNET..];
    let size = shape.header + shape.gso_size;
    let payload = packet.len() - shape.header;
    let count = payload.div_ceil(shape.gso_size);
    if count == 0 || count > MAX_SEGMENTS || count * size.next_multiple_of(16) > MAX_BYTES {
        return Err(Failure::Malformed("a super-packet of too many segments"));
    }
    let last_size = packet.len() - (count - 1) * shape.gso_size;
    let found = Segments {
        rows: count,
        length: padded_length(if count > 1 { size } else { last_size }, mtu),
        last: padded_length(last_size, mtu),
    };
    // a frame of one segment is a row like the others of its batch, or the shorter last one
    let length = if count == 1 && wanted >= found.length {
        wanted
    } else {
        found.length
    };
    if wanted != 0 && wanted != length {
        return Ok(None);
    }
    let too_large = Failure::Arguments(Refused("the margins are too large"));
    let stride = margins
        .before
        .checked_add(margins.after)
        .and_then(|around| around.checked_add(length))
        .ok_or(too_large)?;
    let start = at.checked_add(margins.before).ok_or(too_large)?;
    let Ok(rows) = Rows::new(buffer.len(), start, stride, (length, found.last), count, margins) else {
        return Ok(None);
    };
    for row in 0..count {
        let from = shape.header + row * shape.gso_size;
        let to = (from + shape.gso_size).min(packet.len());
        let text = &mut buffer[rows.text(row)];
        let end = shape.header + to - from;
        text[..shape.header].copy_from_slice(&packet[..shape.header]);
        text[shape.header..end].copy_from_slice(&packet[from..to]);
        text[end..].fill(0);
        finish(&mut text[..end], &shape, row, row + 1 == count);
    }
    Ok(Some(Segments { length, ..found }))
}

/// Make a segment's headers its own; what is there so far is the super-packet's.
fn finish(segment: &mut [u8], shape: &Shape, row: usize, is_last: bool) {
    let size = segment.len();
    let transport = shape.transport;
    put_total(segment, shape.version, size);
    if shape.version == 4 {
        let identifier = read_16(segment, 4).wrapping_add(row as u16);
        put_16(segment, 4, identifier);
        put_ipv4_checksum(segment, transport);
    }
    let field = if shape.protocol == TCP {
        let sequence = read_32(segment, transport + 4).wrapping_add((row * shape.gso_size) as u32);
        put_32(segment, transport + 4, sequence);
        if row > 0 {
            segment[transport + 13] &= !CWR;
        }
        if !is_last {
            segment[transport + 13] &= !(FIN | PSH);
        }
        transport + 16
    } else {
        put_16(segment, transport + 4, (size - transport) as u16);
        transport + 6
    };
    put_16(segment, field, 0);
    let sum = word_sum(&segment[transport..]) + shape.pseudo + (size - transport) as u32;
    let checksum = complement(sum);
    // of UDP, zero would mean "no checksum" (RFC 768)
    put_16(
        segment,
        field,
        if checksum == 0 && shape.protocol == UDP {
            0xFFFF
        } else {
            checksum
        },
    );
}

fn parse_shape(frame: &[u8]) -> Result<Shape, Failure> {
    if frame.len() < VNET + 20 || frame.len() > MAX_FRAME {
        return Err(Failure::Malformed("a frame of such a length"));
    }
    let gso = parse_gso(frame);
    let packet = &frame[VNET..];
    let version = packet[0] >> 4;
    let protocol = match (gso.kind & !GSO_ECN, version) {
        (GSO_UDP, 4 | 6) if gso.kind == GSO_UDP => UDP,
        (GSO_TCPV4, 4) | (GSO_TCPV6, 6) => TCP,
        _ => return Err(Failure::Malformed("a GSO type that is not for this IP version")),
    };
    let start = (gso.flags & NEEDS_CSUM != 0).then_some(gso.csum_start);
    let (transport, pseudo) = find_transport(packet, version, protocol, start)?;
    let shortest = if protocol == TCP { 20 } else { 8 };
    if packet.len() < transport + shortest {
        return Err(Failure::Malformed("the transport header is cut off"));
    }
    let header = if protocol == TCP {
        transport + usize::from(packet[transport + 12] >> 4) * 4
    } else {
        transport + 8
    };
    if header < transport + shortest || header >= packet.len() {
        return Err(Failure::Malformed("the transport header does not fit the packet"));
    }
    if start.is_some_and(|start| start != transport) {
        return Err(Failure::Malformed("the checksum does not start at the transport header"));
    }
    if gso.size == 0 || gso.size > 65_535 - header.min(65_535) {
        return Err(Failure::Malformed("segments of such a size"));
    }
    Ok(Shape {
        version,
        protocol,
        transport,
        header,
        gso_size: gso.size,
        pseudo,
    })
}

fn find_transport(packet: &[u8], version: u8, protocol: u8, csum_start: Option<usize>) -> Result<(usize, u32), Failure> {
    if version == 4 {
        let transport = usize::from(packet[0] & 15) * 4;
        if transport < 20 || packet[9] != protocol || packet[6] & 0x3F != 0 || packet[7] != 0 {
            return Err(Failure::Malformed("an IPv4 header that cannot be segmented"));
        }
        if packet.len() < transport {
            return Err(Failure::Malformed("the IPv4 header is cut off"));
        }
        return Ok((transport, pseudo_sum(packet, 4, protocol)));
    }
    if packet.len() < 40 {
        return Err(Failure::Malformed("the IPv6 header is cut off"));
    }
    if packet[6] == protocol {
        return Ok((40, pseudo_sum(packet, 6, protocol)));
    }
    // Behind extension headers the kernel says where, and its partial checksum holds the pseudo-header's sum.
    let field = if protocol == TCP { 16 } else { 6 };
    match csum_start {
        Some(start) if start >= 48 && start % 4 == 0 && start + field + 2 <= packet.len() => {
            let partial = u32::from(read_16(packet, start + field));
            let length = (packet.len() - start) as u32 % MODULUS;
            Ok((start, (partial + MODULUS - length) % MODULUS))
        }
        _ => Err(Failure::Malformed("IPv6 extension headers without a place for the checksum")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_bytes_are_taken() {
        let mut state = 1u64;
        let mut next = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as u8
        };
        let rounds = if cfg!(miri) { 60 } else { 20_000 };
        let mut buffer = vec![0; 4096];
        for round in 0..rounds {
            let mut frame: Vec<u8> = (0..30 + round % 200).map(|_| next()).collect();
            frame[0] &= 1;
            frame[1] = [1, 4, 5, 0x84][usize::from(next() % 4)];
            frame[4..6].copy_from_slice(&u16::from(next()).to_ne_bytes());
            frame[6..8].copy_from_slice(&u16::from(next() % 80).to_ne_bytes());
            frame[10] = [0x45, 0x46, 0x60, 0x4F][usize::from(next() % 4)];
            frame[16] = [6, 17, 0][usize::from(next() % 3)];
            frame[19] = [6, 17, 0][usize::from(next() % 3)];
            let margins = Margins { before: 24, after: 16 };
            if let Ok(Some(found)) = split(&frame, 1280, &mut buffer, usize::from(next()), margins, 0) {
                assert!(found.rows > 0 && found.last <= found.length);
            }
        }
    }
}
