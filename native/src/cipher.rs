//! WireGuard data messages (whitepaper, section 5.4.6), sealed and opened in place, row by row.
//!
//! Our copy of a key is zeroized when a call ends. `ring` keeps the key on the stack for the time of the call and does not
//! overwrite it afterwards.

use std::ops::Range;

use ring::aead::{Aad, LessSafeKey, Nonce, UnboundKey, CHACHA20_POLY1305, NONCE_LEN};
use zeroize::Zeroizing;

use crate::layout::{Margins, Refused, Rows};

/// Bytes of a message before its text: type, receiver, counter.
pub const HEADER: usize = 16;
/// Bytes of a message after its text.
pub const TAG: usize = 16;
/// What a message has around its text.
pub const AROUND: Margins = Margins {
    before: HEADER,
    after: TAG,
};

pub(crate) const TRANSPORT: u32 = 4;

/// One key of a session.
pub struct Key(LessSafeKey);

impl Key {
    /// Refused unless it has 32 bytes.
    pub fn new(raw: &[u8]) -> Result<Self, Refused> {
        let copy: Zeroizing<[u8; 32]> = Zeroizing::new(raw.try_into().map_err(|_| Refused("a key has 32 bytes"))?);
        let key = UnboundKey::new(&CHACHA20_POLY1305, &copy[..]).map_err(|_| Refused("a key has 32 bytes"))?;
        Ok(Self(LessSafeKey::new(key)))
    }
}

fn nonce(counter: u64) -> Nonce {
    let mut bytes = [0; NONCE_LEN];
    bytes[4..].copy_from_slice(&counter.to_le_bytes());
    Nonce::assume_unique_for_key(bytes)
}

/// Write header and tag of every row, and encrypt its text: row i under `counter + i`, which the caller never uses again.
pub fn seal(key: &Key, buffer: &mut [u8], rows: &Rows, receiver: u32, counter: u64) -> Result<(), Refused> {
    if counter.checked_add(rows.count() as u64).is_none() {
        return Err(Refused("there are not so many counters"));
    }
    for row in 0..rows.count() {
        seal_row(key, buffer, rows.text(row), receiver, counter + row as u64)?;
    }
    Ok(())
}

/// The same for one row.
pub(crate) fn seal_row(key: &Key, buffer: &mut [u8], text: Range<usize>, receiver: u32, counter: u64) -> Result<(), Refused> {
    let message = &mut buffer[text.start - HEADER..text.end + TAG];
    let (header, rest) = message.split_at_mut(HEADER);
    header[..4].copy_from_slice(&TRANSPORT.to_le_bytes());
    header[4..8].copy_from_slice(&receiver.to_le_bytes());
    header[8..].copy_from_slice(&counter.to_le_bytes());
    let (text, room) = rest.split_at_mut(text.len());
    let tag = key
        .0
        .seal_in_place_separate_tag(nonce(counter), Aad::empty(), text)
        .map_err(|_| Refused("a row is too long"))?;
    room.copy_from_slice(tag.as_ref());
    Ok(())
}

/// What came of opening rows.
pub struct Opened {
    /// The counter of each row; genuine where its tag held.
    pub counters: Vec<u64>,
    /// Whether each row's tag held. The text of the others is erased.
    pub good: Vec<bool>,
}

/// Decrypt the text of every row in place.
pub fn open(key: &Key, buffer: &mut [u8], rows: &Rows) -> Opened {
    let mut opened = Opened {
        counters: Vec::with_capacity(rows.count()),
        good: Vec::with_capacity(rows.count()),
    };
    for row in 0..rows.count() {
        let (counter, good) = open_row(key, buffer, rows.text(row));
        opened.counters.push(counter);
        opened.good.push(good);
    }
    opened
}

/// The counter of one row, and whether its tag held.
pub(crate) fn open_row(key: &Key, buffer: &mut [u8], text: Range<usize>) -> (u64, bool) {
    let mut raw = [0; 8];
    raw.copy_from_slice(&buffer[text.start - 8..text.start]);
    let counter = u64::from_le_bytes(raw);
    let sealed = &mut buffer[text.start..text.end + TAG];
    let good = key.0.open_in_place(nonce(counter), Aad::empty(), sealed).is_ok();
    if !good {
        sealed.fill(0);
    }
    (counter, good)
}

#[cfg(all(test, not(miri)))]
mod tests {
    use super::*;

    #[test]
    fn what_is_sealed_opens_and_what_is_altered_is_erased() {
        let key = Key::new(&[7; 32]).unwrap();
        let mut buffer = vec![0; 3 * 72];
        let rows = Rows::new(buffer.len(), 24, 72, (40, 24), 3, AROUND).unwrap();
        for row in 0..3 {
            buffer[rows.text(row)].fill(row as u8 + 1);
        }
        seal(&key, &mut buffer, &rows, 9, u64::MAX - 10).unwrap();
        buffer[72 + 30] ^= 1;
        let opened = open(&key, &mut buffer, &rows);
        assert_eq!(opened.good, [true, false, true]);
        assert_eq!(opened.counters, [u64::MAX - 10, u64::MAX - 9, u64::MAX - 8]);
        assert!(buffer[rows.text(0)].iter().all(|&byte| byte == 1));
        assert!(buffer[rows.text(1)].iter().all(|&byte| byte == 0));
        assert!(buffer[rows.text(2)].iter().all(|&byte| byte == 3));
        assert!(seal(&key, &mut buffer, &rows, 9, u64::MAX - 2).is_err());
        assert!(Key::new(&[0; 31]).is_err());
    }
}
