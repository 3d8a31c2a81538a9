//! Index arithmetic: rows of one stride in a buffer, checked once so that every row is within it.

use std::ops::Range;

/// Why arguments were refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refused(pub &'static str);

/// Where rows of text are: row i begins at `start + i * stride`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rows {
    start: usize,
    stride: usize,
    length: usize,
    last: usize,
    count: usize,
}

/// What belongs to each row besides its text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Margins {
    /// Bytes before the text.
    pub before: usize,
    /// Bytes after the text.
    pub after: usize,
}

impl Rows {
    /// `count` rows with a text of `length` bytes, the last one of `last`, in a buffer of `size` bytes; the first text is at `start`.
    ///
    /// Refused unless all rows with their margins lie in the buffer, and none reaches into the next.
    pub fn new(
        size: usize,
        start: usize,
        stride: usize,
        (length, last): (usize, usize),
        count: usize,
        margins: Margins,
    ) -> Result<Self, Refused> {
        if count == 0 {
            return Err(Refused("there are no rows"));
        }
        if last > length {
            return Err(Refused("the last row is longer than the others"));
        }
        if start < margins.before {
            return Err(Refused("the first row begins before the buffer"));
        }
        let width = margins
            .before
            .checked_add(length)
            .and_then(|width| width.checked_add(margins.after));
        if count > 1 && width.is_none_or(|width| width > stride) {
            return Err(Refused("the rows overlap"));
        }
        let end = (count - 1)
            .checked_mul(stride)
            .and_then(|end| end.checked_add(start))
            .and_then(|end| end.checked_add(last))
            .and_then(|end| end.checked_add(margins.after));
        if end.is_none_or(|end| end > size) {
            return Err(Refused("the rows leave the buffer"));
        }
        Ok(Self {
            start,
            stride,
            length,
            last,
            count,
        })
    }

    /// The number of rows.
    pub fn count(&self) -> usize {
        self.count
    }

    /// The bytes of text in a row.
    pub fn size(&self, row: usize) -> usize {
        if row + 1 == self.count {
            self.last
        } else {
            self.length
        }
    }

    /// Where a row's text is.
    pub fn text(&self, row: usize) -> Range<usize> {
        debug_assert!(row < self.count);
        let at = self.start + row * self.stride;
        at..at + self.size(row)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEALED: Margins = Margins { before: 16, after: 16 };

    #[test]
    fn every_accepted_row_is_within_the_buffer_and_apart_from_the_next() {
        let sizes: &[usize] = if cfg!(miri) {
            &[0, 48, 100]
        } else {
            &[0, 1, 15, 16, 17, 32, 48, 80, 100]
        };
        for &size in sizes {
            for start in [0, 15, 16, 17, 40] {
                for stride in [0, 16, 32, 33, 48, usize::MAX] {
                    for (length, last) in [(0, 0), (1, 0), (1, 1), (16, 3), (2, 3), (usize::MAX, 0)] {
                        for count in [0, 1, 2, 3, usize::MAX] {
                            check(size, start, stride, (length, last), count);
                        }
                    }
                }
            }
        }
    }

    fn check(size: usize, start: usize, stride: usize, lengths: (usize, usize), count: usize) {
        let Ok(rows) = Rows::new(size, start, stride, lengths, count, SEALED) else {
            return;
        };
        let mut free = 0;
        for row in 0..rows.count().min(4) {
            let text = rows.text(row);
            assert!(text.start - 16 >= free, "rows overlap");
            free = text.end + 16;
            assert!(free <= size, "a row leaves the buffer");
        }
    }

    #[test]
    fn bounds_are_exact() {
        assert!(Rows::new(48, 16, 0, (16, 16), 1, SEALED).is_ok());
        assert!(Rows::new(47, 16, 0, (16, 16), 1, SEALED).is_err());
        assert!(Rows::new(96, 16, 48, (16, 16), 2, SEALED).is_ok());
        assert!(Rows::new(96, 16, 47, (16, 16), 2, SEALED).is_err());
        assert!(Rows::new(95, 16, 48, (16, 15), 2, SEALED).is_ok());
        assert!(Rows::new(95, 16, 48, (16, 16), 2, SEALED).is_err());
    }
}
