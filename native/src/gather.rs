//! Small packets, which an interface gives and takes one by one, moved many in one call.
//!
//! Out of the interface they become rows of one length, finished and padded at the place where they are sealed. Only packets
//! between the addresses of the first one are read past: whose they are is decided elsewhere, once. Into the interface, what
//! follows a packet that was let in goes with it as long as it has the same addresses.

use crate::checksum::{complement, word_sum};
use crate::headers::{parse_gso, put_16, total_length, NEEDS_CSUM, VNET};
use crate::layout::Rows;
use crate::split::{padded_length, Failure, MAX_FRAME};

/// Write the one packet of a frame to the start of `room`, padded and with a finished checksum; returns its padded length.
///
/// None if it does not fit, and nothing is written then.
pub fn place(frame: &[u8], mtu: usize, room: &mut [u8]) -> Result<Option<usize>, Failure> {
    let unfinished = check(frame)?;
    let packet = &frame[VNET..];
    let length = padded_length(packet.len(), mtu);
    let Some(text) = room.get_mut(..length) else {
        return Ok(None);
    };
    text[..packet.len()].copy_from_slice(packet);
    finish(text, packet.len(), unfinished);
    Ok(Some(length))
}

/// Where a packet's checksum begins, and at which offset from there it is written.
pub(crate) type Unfinished = Option<(usize, usize)>;

/// What is left to do to the one packet of a frame.
pub(crate) fn check(frame: &[u8]) -> Result<Unfinished, Failure> {
    if frame.len() < VNET + 20 || frame.len() > MAX_FRAME {
        return Err(Failure::Malformed("a frame of such a length"));
    }
    let gso = parse_gso(frame);
    if gso.kind != 0 {
        return Err(Failure::Malformed("a super-packet among small ones"));
    }
    let offset = usize::from(u16::from_ne_bytes([frame[8], frame[9]]));
    if gso.flags & NEEDS_CSUM == 0 {
        return Ok(None);
    }
    if gso.csum_start + offset + 2 > frame.len() - VNET {
        return Err(Failure::Malformed("the checksum field lies outside the packet"));
    }
    Ok(Some((gso.csum_start, offset)))
}

/// Write padding and checksum of a packet of `size` bytes at the start of `text`.
pub(crate) fn finish(text: &mut [u8], size: usize, unfinished: Unfinished) {
    text[size..].fill(0);
    if let Some((start, offset)) = unfinished {
        let checksum = complement(word_sum(&text[start..size]));
        // of UDP, zero would mean "no checksum" (RFC 768)
        let checksum = if checksum == 0 && offset == 6 { 0xFFFF } else { checksum };
        put_16(text, start + offset, checksum);
    }
}

/// What came of reading.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gathered {
    /// The number of rows that were added.
    pub rows: usize,
    /// The padded length of the last row.
    pub last: usize,
    /// None if nothing was waiting any more. Else the size of a frame that was read and is no row of this batch; 0 for none.
    pub waiting: Option<usize>,
}

/// What one read gave.
pub enum Read {
    /// A frame of so many bytes.
    Frame(usize),
    /// Nothing is waiting.
    Drained,
    /// It cannot be read; the caller finds out why.
    Failed,
}

/// Read frames by `frame` and make them rows from `filled` (at least 1) on, until one does not belong to the batch.
pub fn gather(
    mut read: impl FnMut(&mut [u8]) -> Read,
    frame: &mut [u8],
    mtu: usize,
    buffer: &mut [u8],
    rows: &Rows,
    filled: usize,
) -> Gathered {
    let mut gathered = Gathered {
        rows: 0,
        last: rows.size(0),
        waiting: Some(0),
    };
    let mut wanted = [0; 32];
    let Some(first) = addresses(&buffer[rows.text(0)]) else {
        return gathered;
    };
    let wanted = &mut wanted[..first.len()];
    wanted.copy_from_slice(first);
    for row in filled..rows.count() {
        let size = match read(frame) {
            Read::Frame(size) => size.min(frame.len()),
            Read::Drained => {
                gathered.waiting = None;
                break;
            }
            Read::Failed => break,
        };
        let text = rows.text(row);
        let is_alike = addresses(frame.get(VNET..size).unwrap_or_default()).is_some_and(|found| found == wanted);
        let placed = if is_alike {
            place(&frame[..size], mtu, &mut buffer[text.clone()])
        } else {
            Ok(None)
        };
        let Ok(Some(length)) = placed else {
            gathered.waiting = Some(size);
            break;
        };
        gathered.rows += 1;
        gathered.last = length;
        if length < text.len() {
            break;
        }
    }
    gathered
}

/// Write frames until one is a super-packet, contradicts itself, has other addresses than the first, or is not taken.
///
/// Returns how many were written.
pub fn write(mut write: impl FnMut(&[u8]) -> bool, buffer: &[u8], frames: impl Iterator<Item = (usize, usize)>) -> usize {
    let mut wanted = None;
    let mut written = 0;
    for (start, end) in frames {
        let Some(frame) = buffer.get(start..end).filter(|frame| frame.len() > VNET && frame[1] == 0) else {
            break;
        };
        let packet = &frame[VNET..];
        let found = addresses(packet);
        if found.is_none() || total_length(packet).is_none() || found != *wanted.get_or_insert(found) || !write(frame) {
            break;
        }
        written += 1;
    }
    written
}

/// Source and destination of an IP packet.
pub(crate) fn addresses(packet: &[u8]) -> Option<&[u8]> {
    match packet.first()? >> 4 {
        6 => packet.get(8..40),
        4 => packet.get(12..20),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::Margins;

    const MARGINS: Margins = Margins { before: 16, after: 16 };

    fn frame(source: u8, size: usize) -> Vec<u8> {
        let mut frame = vec![0; VNET + 48 + size];
        frame[0] = NEEDS_CSUM;
        frame[6..8].copy_from_slice(&40u16.to_ne_bytes());
        frame[8..10].copy_from_slice(&6u16.to_ne_bytes());
        frame[VNET] = 0x60;
        put_16(&mut frame, VNET + 4, (8 + size) as u16);
        frame[VNET + 6] = 17;
        frame[VNET + 8..VNET + 40].fill(source);
        frame
    }

    fn reader(frames: Vec<Vec<u8>>) -> impl FnMut(&mut [u8]) -> Read {
        let mut frames = frames.into_iter();
        move |into| match frames.next() {
            None => Read::Drained,
            Some(frame) if frame.is_empty() => Read::Failed,
            Some(frame) => {
                into[..frame.len()].copy_from_slice(&frame);
                Read::Frame(frame.len())
            }
        }
    }

    fn gathered(frames: Vec<Vec<u8>>) -> (Gathered, Vec<u8>) {
        let mut buffer = vec![0xAA; 5 * 128];
        let rows = Rows::new(buffer.len(), 16, 128, (96, 96), 5, MARGINS).unwrap();
        assert_eq!(place(&frame(3, 40), 1280, &mut buffer[rows.text(0)]), Ok(Some(96)));
        let found = gather(reader(frames), &mut [0; 2000], 1280, &mut buffer, &rows, 1);
        (found, buffer)
    }

    #[test]
    fn what_is_alike_becomes_rows_and_what_is_not_waits() {
        let found = |rows, last, waiting| Gathered { rows, last, waiting };
        assert_eq!(gathered(vec![]).0, found(0, 96, None));
        assert_eq!(gathered(vec![frame(3, 40), frame(3, 33)]).0, found(2, 96, None));
        assert_eq!(
            gathered(vec![frame(3, 40), frame(3, 9), frame(3, 40)]).0,
            found(2, 64, Some(0))
        );
        assert_eq!(gathered(vec![frame(3, 40), frame(4, 40)]).0, found(1, 96, Some(VNET + 88)));
        assert_eq!(gathered(vec![frame(3, 49)]).0, found(0, 96, Some(VNET + 97)));
        assert_eq!(gathered(vec![frame(3, 40); 9]).0, found(4, 96, Some(0)));
        assert_eq!(gathered(vec![frame(3, 40), vec![], frame(3, 40)]).0, found(1, 96, Some(0)));
        let mut odd = frame(3, 40);
        odd[8] = 200;
        assert_eq!(gathered(vec![odd]).0, found(0, 96, Some(VNET + 88)));
        let (_, buffer) = gathered(vec![frame(3, 33)]);
        assert_eq!(buffer[144 + 81..144 + 96], [0; 15]);
        assert_eq!(buffer[144 + 96..144 + 112], [0xAA; 16]);
    }

    #[test]
    fn frames_are_written_until_one_is_not_alike() {
        let mut buffer = Vec::new();
        let mut frames = Vec::new();
        let mut add = |frame: Vec<u8>| {
            frames.push((buffer.len(), buffer.len() + frame.len()));
            buffer.extend(frame);
        };
        for (source, kind) in [(3, 0), (3, 0), (3, 4), (4, 0)] {
            let mut frame = frame(source, 40);
            frame[1] = kind;
            add(frame);
        }
        let count = |skip: usize, most: usize| {
            let mut left = most;
            let take = |_: &[u8]| left.checked_sub(1).map(|rest| left = rest).is_some();
            write(take, &buffer, frames[skip..].iter().copied())
        };
        assert_eq!(count(0, 9), 2);
        assert_eq!(count(0, 1), 1);
        assert_eq!(count(2, 9), 0);
        assert_eq!(count(3, 9), 1);
        let outside = [(0, 5), (7, 3), (0, buffer.len() + 1), (usize::MAX, usize::MAX)];
        assert!(outside
            .iter()
            .all(|&frame| write(|_| true, &buffer, [frame].into_iter()) == 0));
    }
}
