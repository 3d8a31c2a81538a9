//! Small packets of many sessions, each by itself: received and opened, written, read, sealed and sent, many in one call.
//!
//! By which key a packet is sealed, whether one that was opened may pass, and where it goes is decided elsewhere, between two of
//! these calls.

use std::ops::Range;

use crate::cipher::{open_row, seal_row, Key, AROUND, HEADER, TAG, TRANSPORT};
use crate::gather::{addresses, check, finish, Read};
use crate::headers::{total_length, VNET};
use crate::layout::{Margins, Refused};
use crate::split::{padded_length, MAX_FRAME};

/// No receive gives more, with or without GRO.
const MAX_RECEIVED: usize = 1 << 16;
const SOL_UDP: i32 = 17;
const UDP_GRO: i32 = 104;
/// Bytes of a control message's header: its length, level and type.
const CONTROL: usize = size_of::<usize>() + 8;

/// One receive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Arrived<S> {
    /// Who sent it.
    pub sender: S,
    /// Where it begins in the buffer.
    pub start: usize,
    /// Its bytes.
    pub size: usize,
    /// The bytes of each datagram in it but the last.
    pub stride: usize,
    /// The receiver index, if it is one data message.
    pub receiver: Option<u32>,
}

/// What one receive gave.
pub enum Receive<S> {
    /// So many bytes, in datagrams of so many, from this sender.
    Datagrams(usize, usize, S),
    /// Nothing is waiting.
    Drained,
    /// An error, which need not be the end of the socket.
    Failed,
}

/// Receive into `buffer`, one behind the other, up to `most` times, and no more than `others` times what is no data message.
///
/// The second value is true after an error.
pub fn receive<S>(
    mut receive: impl FnMut(&mut [u8]) -> Receive<S>,
    buffer: &mut [u8],
    most: usize,
    mut others: usize,
) -> (Vec<Arrived<S>>, bool) {
    let mut found = Vec::new();
    let mut start = 0;
    while found.len() < most && others > 0 && buffer.len() - start >= MAX_RECEIVED {
        let room = &mut buffer[start..];
        let (size, stride, sender) = match receive(room) {
            Receive::Datagrams(size, stride, sender) => (size.min(room.len()), stride.min(size), sender),
            Receive::Drained => break,
            Receive::Failed => return (found, true),
        };
        let receiver = if size == stride { data_receiver(&room[..size]) } else { None };
        if receiver.is_none() {
            others -= 1;
        }
        found.push(Arrived {
            sender,
            start,
            size,
            stride,
            receiver,
        });
        start += size;
    }
    (found, false)
}

/// Neighbours from one sender with datagrams of one length, which lie one behind the other, as one batch.
pub fn join<S: PartialEq>(found: Vec<Arrived<S>>) -> Vec<Arrived<S>> {
    let mut joined: Vec<Arrived<S>> = Vec::with_capacity(found.len());
    for next in found {
        match joined.last_mut() {
            Some(batch) if batch.is_continued_by(&next) => {
                batch.size += next.size;
                batch.receiver = None;
            }
            _ => joined.push(next),
        }
    }
    joined
}

impl<S: PartialEq> Arrived<S> {
    fn is_continued_by(&self, next: &Self) -> bool {
        let is_full = self.stride > 0 && self.size % self.stride == 0;
        is_full && next.stride == self.stride && next.sender == self.sender
    }
}

fn data_receiver(datagram: &[u8]) -> Option<u32> {
    let is_data = datagram.len() >= HEADER + TAG && datagram[..4] == TRANSPORT.to_le_bytes();
    is_data.then(|| u32::from_le_bytes([datagram[4], datagram[5], datagram[6], datagram[7]]))
}

/// The data of a control message with the length of datagrams (UDP_GRO), and that of another one.
pub fn controls(mut rest: &[u8]) -> (Option<usize>, &[u8]) {
    let (mut segment, mut other): (_, &[u8]) = (None, &[]);
    while let Some(head) = rest.get(..CONTROL) {
        let (size, kinds) = head.split_at(size_of::<usize>());
        let size = size.try_into().map_or(0, usize::from_ne_bytes);
        let Some(data) = rest.get(CONTROL..size) else {
            break;
        };
        let number = |at: usize| i32::from_ne_bytes([kinds[at], kinds[at + 1], kinds[at + 2], kinds[at + 3]]);
        if (number(0), number(4)) == (SOL_UDP, UDP_GRO) {
            segment = data
                .get(..4)
                .map(|raw| u32::from_ne_bytes([raw[0], raw[1], raw[2], raw[3]]) as usize);
        } else {
            other = data;
        }
        rest = rest.get(size.next_multiple_of(size_of::<usize>())..).unwrap_or_default();
    }
    (segment, other)
}

/// A text in a buffer, and its key.
pub struct Row {
    /// The session's key.
    pub key: Key,
    /// Where the text is.
    pub text: Range<usize>,
}

impl Row {
    /// Where the whole message is.
    pub fn message(&self) -> Range<usize> {
        self.text.start - HEADER..self.text.end + TAG
    }
}

/// Refused unless all rows with their margins lie in a buffer of `size` bytes, one behind the other.
fn check_rows<'a>(rows: impl Iterator<Item = &'a Row>, size: usize) -> Result<(), Refused> {
    let mut free = 0;
    for Row { text, .. } in rows {
        if text.start < AROUND.before || text.start - AROUND.before < free {
            return Err(Refused("the rows overlap"));
        }
        free = text
            .end
            .checked_add(AROUND.after)
            .filter(|&end| text.start <= text.end && end <= size)
            .ok_or(Refused("the rows leave the buffer"))?;
    }
    Ok(())
}

/// An opened data message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Text {
    /// Its counter, which is genuine; None if the tag was bad, and the text is erased then.
    pub counter: Option<u64>,
    /// Where source and destination are; None for a keepalive and for a packet that contradicts itself.
    pub addresses: Option<Range<usize>>,
    /// Where the packet ends; of one that contradicts itself, where its padding does.
    pub end: usize,
}

/// Open messages in place, each with its key; what is opened has an empty virtio_net_hdr before it.
pub fn open(buffer: &mut [u8], rows: &[Row]) -> Result<Vec<Text>, Refused> {
    check_rows(rows.iter(), buffer.len())?;
    let mut found = Vec::with_capacity(rows.len());
    for Row { key, text } in rows {
        let (counter, good) = open_row(key, buffer, text.clone());
        buffer[text.start - VNET..text.start].fill(0);
        let packet = &buffer[text.clone()];
        let total = total_length(packet).filter(|_| good);
        found.push(Text {
            counter: good.then_some(counter),
            addresses: total.map(|_| match packet[0] >> 4 {
                6 => text.start + 8..text.start + 40,
                _ => text.start + 12..text.start + 20,
            }),
            end: text.start + total.unwrap_or(packet.len()),
        });
    }
    Ok(found)
}

/// Write header and tag of messages, and encrypt their texts: each with its key, for a receiver, under a counter that the caller
/// never uses again.
pub fn seal(buffer: &mut [u8], rows: &[(Row, u32, u64)]) -> Result<(), Refused> {
    check_rows(rows.iter().map(|(row, ..)| row), buffer.len())?;
    for (Row { key, text }, receiver, counter) in rows {
        seal_row(key, buffer, text.clone(), *receiver, *counter)?;
    }
    Ok(())
}

/// A frame in a buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// Where its packet begins, behind the virtio_net_hdr.
    pub start: usize,
    /// The bytes of its packet.
    pub size: usize,
    /// With padding; 0 for a super-packet and for what is no packet, which are left as they were read.
    pub length: usize,
    /// Source and destination as they were read, if it is IP.
    pub addresses: Option<Vec<u8>>,
}

/// Read up to `most` frames into `buffer`, each with these margins around its padded packet, and finish them: padding and
/// checksum are written, and nothing is left to do by the virtio_net_hdr. It ends with a frame that cannot be finished.
///
/// The second value is true after an error.
pub fn read(
    mut read: impl FnMut(&mut [u8]) -> Read,
    buffer: &mut [u8],
    mtu: usize,
    margins: Margins,
    most: usize,
) -> Result<(Vec<Frame>, bool), Refused> {
    if margins.before < VNET {
        return Err(Refused("there is no room before a packet"));
    }
    let mut found = Vec::new();
    let mut at = 0usize;
    while found.len() < most {
        let Some(start) = at.checked_add(margins.before) else {
            break;
        };
        let end = start
            .checked_add(MAX_FRAME + 16)
            .and_then(|end| end.checked_add(margins.after));
        if end.is_none_or(|end| end > buffer.len()) {
            break;
        }
        let room = &mut buffer[start - VNET..start - VNET + MAX_FRAME];
        let size = match read(room) {
            Read::Frame(size) => size.min(MAX_FRAME),
            Read::Drained => break,
            Read::Failed => return Ok((found, true)),
        };
        let frame = &room[..size];
        let size = size.saturating_sub(VNET);
        let mut placed = Frame {
            start,
            size,
            length: 0,
            addresses: addresses(&room[VNET..VNET + size]).map(<[u8]>::to_vec),
        };
        let Ok(unfinished) = check(frame) else {
            found.push(placed);
            break;
        };
        placed.length = padded_length(size, mtu);
        let end = start + placed.length;
        finish(&mut buffer[start..end], size, unfinished);
        buffer[start - VNET..start].fill(0);
        found.push(placed);
        at = end + margins.after;
    }
    Ok((found, false))
}

/// Write packets of `buffer`, each with the virtio_net_hdr before it, until one is not taken; returns how many were.
pub fn write(
    mut write: impl FnMut(&[u8]) -> bool,
    buffer: &[u8],
    packets: impl Iterator<Item = (usize, usize)>,
) -> Result<usize, Refused> {
    let mut written = 0;
    for (start, end) in packets {
        let frame = start
            .checked_sub(VNET)
            .filter(|_| start <= end)
            .and_then(|start| buffer.get(start..end))
            .ok_or(Refused("a packet leaves the buffer"))?;
        if !write(frame) {
            break;
        }
        written += 1;
    }
    Ok(written)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(receiver: u32, size: usize) -> Vec<u8> {
        let mut message = vec![7; size];
        message[..4].copy_from_slice(&TRANSPORT.to_le_bytes());
        message[4..8].copy_from_slice(&receiver.to_le_bytes());
        message
    }

    #[test]
    fn what_is_received_lies_one_behind_the_other() {
        let waiting = [
            (data(5, 32), 32),
            (data(6, 100), 50),
            (data(7, 31), 31),
            (vec![], 0),
            (data(8, 64), 99),
        ];
        for (most, others, expected) in [(9, 9, 5), (2, 9, 2), (9, 2, 3), (0, 9, 0), (9, 0, 0)] {
            let mut left = waiting.iter();
            let mut buffer = vec![0; MAX_RECEIVED + 300];
            let give = |into: &mut [u8]| match left.next() {
                Some((bytes, stride)) => {
                    into[..bytes.len()].copy_from_slice(bytes);
                    Receive::Datagrams(bytes.len(), *stride, bytes.len())
                }
                None => Receive::Drained,
            };
            let (found, has_failed) = receive(give, &mut buffer, most, others);
            assert!(!has_failed);
            assert_eq!(found.len(), expected);
            let mut at = 0;
            for (came, (bytes, _)) in found.iter().zip(&waiting) {
                assert_eq!((came.start, came.size, came.sender), (at, bytes.len(), bytes.len()));
                assert_eq!(buffer[at..at + came.size], bytes[..]);
                at += came.size;
            }
            let receivers: Vec<_> = found.iter().map(|came| came.receiver).collect();
            assert_eq!(receivers, [Some(5), None, None, None, Some(8)][..expected]);
        }
        let fail = |_: &mut [u8]| Receive::<()>::Failed;
        assert_eq!(receive(fail, &mut [0; MAX_RECEIVED], 1, 1), (vec![], true));
        assert_eq!(receive(fail, &mut [0; MAX_RECEIVED - 1], 1, 1), (vec![], false));
    }

    #[test]
    fn only_full_neighbours_of_one_sender_and_one_length_are_joined() {
        let mut start = 0;
        let mut found = Vec::new();
        for (sender, size, stride) in [
            (1, 64, 64),
            (1, 128, 64),
            (1, 96, 64),
            (1, 64, 64),
            (2, 64, 64),
            (2, 0, 0),
            (2, 0, 0),
        ] {
            let receiver = (size == stride).then_some(9);
            found.push(Arrived {
                sender,
                start,
                size,
                stride,
                receiver,
            });
            start += size;
        }
        let joined: Vec<_> = join(found)
            .iter()
            .map(|came| (came.start, came.size, came.receiver))
            .collect();
        let alone = Some(9);
        assert_eq!(
            joined,
            [
                (0, 288, None),
                (288, 64, alone),
                (352, 64, alone),
                (416, 0, alone),
                (416, 0, alone)
            ]
        );
    }

    #[test]
    fn a_packet_is_written_with_the_header_before_it() {
        let buffer: Vec<u8> = (0..40).collect();
        let mut taken = Vec::new();
        let mut take = |packets: &[(usize, usize)]| {
            write(
                |frame| {
                    frame.len() < 20 && {
                        taken.push(frame.to_vec());
                        true
                    }
                },
                &buffer,
                packets.iter().copied(),
            )
        };
        assert_eq!(take(&[(10, 12), (20, 29), (30, 40), (10, 11)]), Ok(2));
        for bad in [(9, 12), (30, 41), (12, 11), (usize::MAX, usize::MAX)] {
            assert!(take(&[bad]).is_err());
        }
        assert_eq!(taken, [buffer[..12].to_vec(), buffer[10..29].to_vec()]);
    }

    #[test]
    fn control_messages_are_read_within_their_bounds() {
        let one = |level: i32, kind: i32, data: &[u8]| {
            let mut bytes = (CONTROL + data.len()).to_ne_bytes().to_vec();
            bytes.extend(level.to_ne_bytes());
            bytes.extend(kind.to_ne_bytes());
            bytes.extend(data);
            bytes.resize(bytes.len().next_multiple_of(size_of::<usize>()), 0);
            bytes
        };
        let both = [one(0, 8, &[1; 12]), one(SOL_UDP, UDP_GRO, &1300u32.to_ne_bytes())].concat();
        assert_eq!(controls(&both), (Some(1300), &[1; 12][..]));
        for end in 0..both.len() {
            controls(&both[..end]);
        }
        for size in [0, CONTROL - 1, usize::MAX, both.len() + 1] {
            let mut bad = both.clone();
            bad[..size_of::<usize>()].copy_from_slice(&size.to_ne_bytes());
            assert_eq!(controls(&bad), (None, &[][..]));
        }
    }

    #[test]
    fn frames_are_finished_where_they_are() {
        let mut small = vec![0; VNET + 48];
        small[VNET] = 0x60;
        small[VNET + 8..VNET + 40].fill(9);
        small[0] = 1;
        small[6..8].copy_from_slice(&40u16.to_ne_bytes());
        small[8..10].copy_from_slice(&6u16.to_ne_bytes());
        let mut large = small.clone();
        large[1] = 5;
        let margins = Margins { before: 16, after: 16 };
        for (frames, lengths, has_failed) in [
            (vec![small.clone(), small.clone()], vec![48, 48], false),
            (vec![small.clone(), large, small.clone()], vec![48, 0], false),
            (vec![vec![1; 5]], vec![0], false),
            (vec![small.clone(), vec![]], vec![48], true),
        ] {
            let mut left = frames.into_iter();
            let give = |into: &mut [u8]| match left.next() {
                Some(frame) if frame.is_empty() => Read::Failed,
                Some(frame) => {
                    into[..frame.len()].copy_from_slice(&frame);
                    Read::Frame(frame.len())
                }
                None => Read::Drained,
            };
            let mut buffer = vec![0xAA; MAX_FRAME + 400];
            let (found, failed) = read(give, &mut buffer, 1280, margins, 9).unwrap();
            assert_eq!(found.iter().map(|frame| frame.length).collect::<Vec<_>>(), lengths);
            assert_eq!(failed, has_failed);
            if lengths[0] == 48 {
                assert_eq!(found[0].addresses, Some(vec![9; 32]));
                assert_eq!(buffer[6..16], [0; VNET]);
                assert_eq!(buffer[62..64], [0xFF, 0xFF]);
            }
        }
        let none = Margins { before: 9, after: 0 };
        assert!(read(|_| Read::Drained, &mut [0; 100], 1280, none, 1).is_err());
        for (before, after) in [(16, usize::MAX), (usize::MAX, 16), (usize::MAX - 70_000, 16)] {
            let found = read(|_| Read::Frame(99), &mut [0; 100], 1280, Margins { before, after }, 1).unwrap();
            assert_eq!(found, (vec![], false));
        }
    }

    #[cfg(not(miri))]
    #[test]
    fn what_is_sealed_opens_and_a_bad_one_spoils_no_other() {
        let rows = |places: &[Range<usize>]| {
            let row = |(number, text): (usize, &Range<usize>)| Row {
                key: Key::new(&[number as u8; 32]).unwrap(),
                text: text.clone(),
            };
            places.iter().enumerate().map(row).collect::<Vec<_>>()
        };
        let places = [16..64, 96..96, 128..150];
        let mut buffer = vec![0; 166];
        buffer[16] = 0x60;
        buffer[21] = 3;
        let sealed: Vec<_> = rows(&places)
            .into_iter()
            .zip(5..)
            .map(|(row, counter)| (row, 1, counter))
            .collect();
        seal(&mut buffer, &sealed).unwrap();
        buffer[130] ^= 1;
        let found = open(&mut buffer, &rows(&places)).unwrap();
        let text = |counter, addresses, end| Text { counter, addresses, end };
        assert_eq!(
            found,
            [
                text(Some(5), Some(24..56), 59),
                text(Some(6), None, 96),
                text(None, None, 150)
            ]
        );
        assert_eq!(buffer[128..166], [0; 38]);
        for bad in [[15..20, 96..96], [16..64, 96..151], [16..64, 95..96], [96..96, 16..64]] {
            assert!(open(&mut buffer, &rows(&bad)).is_err());
        }
    }
}
