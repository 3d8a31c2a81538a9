//! Internet checksums (RFC 1071). Sums are kept modulo 65,535, in big-endian words.

/// What sums are reduced by.
pub const MODULUS: u32 = 65_535;

/// The sum of the big-endian words of `data` modulo 65,535; an odd last byte is padded with zero.
pub fn word_sum(data: &[u8]) -> u32 {
    // Words may be wider and of the other byte order: both only exchange the two bytes of the result.
    let mut lanes = [0u64; 8];
    let mut chunks = data.chunks_exact(32);
    for chunk in &mut chunks {
        for (lane, word) in lanes.iter_mut().zip(chunk.chunks_exact(4)) {
            *lane += u64::from(u32::from_le_bytes([word[0], word[1], word[2], word[3]]));
        }
    }
    let mut sum: u64 = lanes.iter().sum();
    let mut words = chunks.remainder().chunks_exact(2);
    for word in &mut words {
        sum += u64::from(u16::from_le_bytes([word[0], word[1]]));
    }
    if let [odd] = words.remainder() {
        sum += u64::from(*odd);
    }
    let little = (sum % u64::from(MODULUS)) as u16;
    u32::from(little.swap_bytes())
}

/// The checksum that belongs to a sum of words.
pub fn complement(sum: u32) -> u16 {
    ((MODULUS - sum % MODULUS) % MODULUS) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    fn obvious(data: &[u8]) -> u32 {
        let mut sum = 0u64;
        for word in data.chunks(2) {
            sum += u64::from(word[0]) << 8 | u64::from(*word.get(1).unwrap_or(&0));
        }
        (sum % 65_535) as u32
    }

    #[test]
    fn equals_the_obvious_sum() {
        let data: Vec<u8> = (0..if cfg!(miri) { 70u32 } else { 700 })
            .map(|number| (number * 37 + number / 7) as u8)
            .collect();
        for start in 0..9 {
            for end in start..data.len() {
                assert_eq!(word_sum(&data[start..end]), obvious(&data[start..end]));
            }
        }
        assert_eq!(word_sum(&[0xFF; 1000]), 0);
        assert_eq!(complement(0), 0);
        assert_eq!(complement(1), 65_534);
    }
}
