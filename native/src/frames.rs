//! From opened rows to frames for a TUN interface with offloads: a run of one flow becomes one super-packet, in place.
//!
//! A run is merged only if cutting it again gives the very same packets: equal headers, sequence numbers (and IPv4 IDs) in
//! steps, full segments but for the last, and right checksums. Whatever does not fit goes on alone, untouched and in order.

use crate::checksum::{word_sum, MODULUS};
use crate::headers::{
    parse_inner, pseudo_sum, put_16, put_gso, put_ipv4_checksum, put_total, read_16, read_32, total_length, Inner, ACK, CWR,
    FIN, GSO_ECN, GSO_TCPV4, GSO_TCPV6, GSO_UDP, PSH, RST, SYN, TCP, UDP, URG, VNET,
};
use crate::layout::{Margins, Rows};

/// A frame's virtio_net_hdr is written before its packet.
pub const AROUND: Margins = Margins { before: VNET, after: 0 };

const MAX_RUN: usize = 512;
const MAX_UDP_RUN: usize = 64;
const MAX_TOTAL: usize = 65_535;

/// What the interface takes.
#[derive(Debug, Clone, Copy)]
pub struct Offloads {
    /// Super-packets of TCP.
    pub tso: bool,
    /// Super-packets of UDP.
    pub uso: bool,
}

/// One frame in the buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame {
    /// Where its virtio_net_hdr begins.
    pub start: usize,
    /// Where its packet ends. Of a packet that contradicts itself, where its row ends.
    pub end: usize,
    /// The number of packets in it.
    pub rows: usize,
}

/// Make frames of the rows that are `good` and not empty.
pub fn find(buffer: &mut [u8], rows: &Rows, good: Option<&[bool]>, offloads: Offloads) -> Vec<Frame> {
    let mut found = Vec::with_capacity(rows.count());
    let mut row = 0;
    while row < rows.count() {
        let text = rows.text(row);
        if text.is_empty() || !good.is_none_or(|good| good[row]) {
            row += 1;
            continue;
        }
        let start = text.start - VNET;
        let packet = &buffer[text.clone()];
        let total = total_length(packet);
        let inner = total
            .filter(|_| row + 1 < rows.count())
            .and_then(|total| mergeable(packet, total, offloads));
        let batch = Batch { buffer, rows, good };
        let run = inner.map_or(1, |inner| batch.run_length(row, &inner));
        let end = match inner {
            Some(inner) if run > 1 => merge(buffer, rows, row, run, &inner),
            _ => {
                buffer[start..text.start].fill(0);
                text.start + total.unwrap_or(text.len())
            }
        };
        found.push(Frame { start, end, rows: run });
        row += run;
    }
    found
}

/// What is in a packet if it could begin a run.
fn mergeable(packet: &[u8], total: usize, offloads: Offloads) -> Option<Inner> {
    let inner = parse_inner(packet, total).filter(|inner| inner.header < total)?;
    let may_begin = if inner.protocol == UDP {
        offloads.uso && read_16(packet, inner.transport + 6) != 0
    } else {
        let flags = packet[inner.transport + 13] & (FIN | SYN | RST | PSH | ACK | URG);
        offloads.tso && flags == ACK
    };
    may_begin.then_some(inner)
}

struct Batch<'a> {
    buffer: &'a [u8],
    rows: &'a Rows,
    good: Option<&'a [bool]>,
}

impl Batch<'_> {
    /// A row, if it may be part of a run.
    fn packet(&self, row: usize) -> Option<&[u8]> {
        let is_there = row < self.rows.count() && self.good.is_none_or(|good| good[row]);
        is_there.then(|| &self.buffer[self.rows.text(row)])
    }

    /// How many rows from `first` on make one super-packet; 1 if its neighbour or its own checksum does not fit.
    fn run_length(&self, first: usize, inner: &Inner) -> usize {
        let most = if inner.protocol == UDP { MAX_UDP_RUN } else { MAX_RUN };
        let room = most.min((MAX_TOTAL - inner.header) / (inner.total - inner.header));
        let Some(mut before) = self.packet(first) else {
            return 1;
        };
        let Some(neighbour) = self.packet(first + 1) else {
            return 1;
        };
        let ports = inner.transport + 4;
        if room < 2
            || neighbour.len() < ports
            || before[..2] != neighbour[..2]
            || before[ports - 4..ports] != neighbour[ports - 4..ports]
        {
            return 1;
        }
        if !is_valid(before, inner, inner.total) {
            return 1;
        }
        let mut run = 1;
        while run < room {
            let Some(packet) = self.packet(first + run).filter(|packet| packet.len() >= inner.total) else {
                break;
            };
            if has_ended(before, inner) || !continues(before, packet, inner) || !is_valid(packet, inner, inner.total) {
                break;
            }
            before = packet;
            run += 1;
        }
        if run < room && self.is_short_tail(first, run, inner) {
            run += 1;
        }
        run
    }

    /// Whether the row at `position` of a run, shorter than the others, can end it.
    fn is_short_tail(&self, first: usize, position: usize, inner: &Inner) -> bool {
        let (Some(head), Some(before), Some(packet)) = (
            self.packet(first),
            self.packet(first + position - 1),
            self.packet(first + position),
        ) else {
            return false;
        };
        let Some(length) = total_length(packet) else {
            return false;
        };
        if length <= inner.header || length >= inner.total || has_ended(before, inner) {
            return false;
        }
        let mut wanted = [0u8; 120];
        let wanted = &mut wanted[..inner.header];
        wanted.copy_from_slice(&head[..inner.header]);
        put_total(wanted, inner.version, length);
        if inner.version == 4 {
            let identifier = read_16(wanted, 4).wrapping_add(position as u16);
            put_16(wanted, 4, identifier);
            wanted[10..12].copy_from_slice(&packet[10..12]);
        }
        let field = if inner.protocol == TCP {
            let step = (position * (inner.total - inner.header)) as u32;
            let sequence = read_32(wanted, inner.transport + 4).wrapping_add(step);
            wanted[inner.transport + 4..inner.transport + 8].copy_from_slice(&sequence.to_be_bytes());
            let flags = &mut wanted[inner.transport + 13];
            *flags = *flags & !CWR | packet[inner.transport + 13] & (FIN | PSH);
            inner.transport + 16
        } else {
            put_16(wanted, inner.transport + 4, (length - inner.transport) as u16);
            if read_16(packet, inner.transport + 6) == 0 {
                return false;
            }
            inner.transport + 6
        };
        wanted[field..field + 2].copy_from_slice(&packet[field..field + 2]);
        *wanted == packet[..inner.header] && is_valid(packet, inner, length)
    }
}

/// Whether a packet may not be followed by another of its run.
fn has_ended(packet: &[u8], inner: &Inner) -> bool {
    inner.protocol == TCP && packet[inner.transport + 13] & (FIN | PSH) != 0
}

/// Whether a packet goes on where the one before ended: the same header but for what counts up, and for the checksums.
fn continues(before: &[u8], packet: &[u8], inner: &Inner) -> bool {
    let transport = inner.transport;
    let same = |from: usize, to: usize| before[from..to] == packet[from..to];
    let network = if inner.version == 4 {
        let next = read_16(before, 4).wrapping_add(1);
        same(0, 4) && read_16(packet, 4) == next && same(6, 10) && same(12, transport)
    } else {
        same(0, transport)
    };
    if !network {
        return false;
    }
    if inner.protocol == UDP {
        return same(transport, transport + 6) && read_16(packet, transport + 6) != 0;
    }
    let next = read_32(before, transport + 4).wrapping_add((inner.total - inner.header) as u32);
    let flags = before[transport + 13] ^ packet[transport + 13];
    read_32(packet, transport + 4) == next
        && same(transport, transport + 4)
        && same(transport + 8, transport + 13)
        && flags & !(CWR | FIN | PSH) == 0
        && packet[transport + 13] & CWR == 0
        && same(transport + 14, transport + 16)
        && same(transport + 18, inner.header)
}

/// Whether the checksums of a segment of `total` bytes are right.
fn is_valid(packet: &[u8], inner: &Inner, total: usize) -> bool {
    if inner.version == 4 && word_sum(&packet[..inner.transport]) != 0 {
        return false;
    }
    let sum = word_sum(&packet[inner.transport..total])
        + pseudo_sum(packet, inner.version, inner.protocol)
        + (total - inner.transport) as u32;
    sum % MODULUS == 0
}

/// Make one super-packet with a partial checksum of the `run` rows from `first` on; returns where it ends.
fn merge(buffer: &mut [u8], rows: &Rows, first: usize, run: usize, inner: &Inner) -> usize {
    let (version, transport, header) = (inner.version, inner.transport, inner.header);
    let size = inner.total - header;
    let start = rows.text(first).start;
    let last = rows.text(first + run - 1).start;
    let tail_flags = if inner.protocol == TCP {
        buffer[last + transport + 13]
    } else {
        0
    };
    let tail_total = if version == 6 {
        40 + usize::from(read_16(buffer, last + 4))
    } else {
        usize::from(read_16(buffer, last + 2))
    };
    for row in 1..run {
        let from = rows.text(first + row).start + header;
        let length = if row + 1 == run { tail_total - header } else { size };
        buffer.copy_within(from..from + length, start + header + row * size);
    }
    let merged = header + (run - 1) * size + tail_total - header;
    let head = &mut buffer[start..start + header];
    put_total(head, version, merged);
    let mut kind = GSO_UDP;
    let offset = if inner.protocol == TCP {
        kind = if version == 6 { GSO_TCPV6 } else { GSO_TCPV4 };
        if head[transport + 13] & CWR != 0 {
            kind |= GSO_ECN;
        }
        head[transport + 13] |= tail_flags & (FIN | PSH);
        16
    } else {
        put_16(head, transport + 4, (merged - transport) as u16);
        6
    };
    let pseudo = pseudo_sum(head, version, inner.protocol) + (merged - transport) as u32;
    put_16(head, transport + offset, (pseudo % MODULUS) as u16);
    if version == 4 {
        put_ipv4_checksum(head, transport);
    }
    put_gso(&mut buffer[start - VNET..start], kind, header, size, transport, offset);
    start + merged
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::split::split;

    fn frame(segments: usize, gso_size: usize) -> Vec<u8> {
        let payload = segments * gso_size - 3;
        let mut frame = vec![0u8; VNET + 60 + payload];
        put_gso(&mut frame, GSO_TCPV6, 60, gso_size, 40, 16);
        let packet = &mut frame[VNET..];
        packet[0] = 0x60;
        put_16(packet, 4, (20 + payload) as u16);
        packet[6] = TCP;
        packet[8..40].fill(3);
        packet[52] = 0x50;
        packet[53] = ACK | PSH;
        for (index, byte) in packet[60..].iter_mut().enumerate() {
            *byte = index as u8;
        }
        frame
    }

    #[test]
    fn what_was_split_becomes_one_frame_again() {
        let frame = frame(9, 50);
        let mut buffer = vec![0; 4096];
        let margins = Margins { before: 16, after: 16 };
        let found = split(&frame, 1280, &mut buffer, 0, margins, 0).unwrap().unwrap();
        assert_eq!((found.rows, found.length, found.last), (9, 112, 112));
        let rows = Rows::new(buffer.len(), 16, 144, (found.length, found.last), found.rows, AROUND).unwrap();
        let frames = find(&mut buffer, &rows, None, Offloads { tso: true, uso: false });
        assert_eq!(frames.len(), 1);
        assert_eq!(frames[0].rows, 9);
        let merged = &buffer[frames[0].start..frames[0].end];
        assert_eq!(merged[VNET + 60..], frame[VNET + 60..]);
        let again = find(
            &mut buffer.clone(),
            &rows,
            Some(&[false; 9]),
            Offloads { tso: true, uso: true },
        );
        assert!(again.is_empty());
    }

    #[test]
    fn any_bytes_are_taken() {
        let mut state = 7u64;
        let rounds = if cfg!(miri) { 40 } else { 20_000 };
        for _ in 0..rounds {
            let mut buffer: Vec<u8> = (0..400)
                .map(|_| {
                    state = state
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1_442_695_040_888_963_407);
                    (state >> 35) as u8
                })
                .collect();
            for row in 0..5 {
                buffer[16 + row * 80] = [0x45, 0x60, 0x46, 0x45, 0x60][row];
                buffer[16 + row * 80 + 6] = [6, 6, 0, 0, 17][(state as usize + row) % 5];
            }
            let rows = Rows::new(buffer.len(), 16, 80, (64, 64), 5, AROUND).unwrap();
            let frames = find(&mut buffer, &rows, None, Offloads { tso: true, uso: true });
            assert_eq!(frames.iter().map(|frame| frame.rows).sum::<usize>(), 5);
            assert!(frames.iter().all(|frame| frame.start < frame.end && frame.end <= 400));
        }
    }
}
