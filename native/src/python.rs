//! The face towards Python: arguments are checked, and everything that is wrong with them is a ValueError.

use pyo3::exceptions::{PyOverflowError, PyValueError};
use pyo3::prelude::*;

use crate::buffers::{Input, Output};
use crate::cipher::{self, Key};
use crate::frames::{self, Offloads};
use crate::layout::{Margins, Refused, Rows};
use crate::split::{split as split_frame, Failure};

/// Raised with each change of what the functions take or give; siderolink uses only the one it was written for.
pub const SEAM: u32 = 1;

pyo3::create_exception!(
    siderolink_native,
    MalformedFrame,
    PyValueError,
    "Raised when a frame contradicts itself."
);

impl From<Refused> for PyErr {
    fn from(refused: Refused) -> Self {
        PyValueError::new_err(refused.0)
    }
}

/// A number that is not negative and fits `T`.
struct Number<T>(T);

impl<'a, 'py, T> FromPyObject<'a, 'py> for Number<T>
where
    T: FromPyObject<'a, 'py, Error = PyErr>,
{
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        match T::extract(object) {
            Ok(value) => Ok(Self(value)),
            Err(error) if error.is_instance_of::<PyOverflowError>(object.py()) => {
                Err(PyValueError::new_err("a number is negative or too large"))
            }
            Err(error) => Err(error),
        }
    }
}

type Size = Number<usize>;

fn key(raw: &Bound<'_, PyAny>) -> PyResult<Key> {
    Ok(Key::new(Input::new(raw)?.bytes())?)
}

/// Seal rows of `buffer` in place: row i begins at i * stride with `headroom` free bytes, then come 16 for the header, the text
/// and 16 for the tag. The texts are those of `source`, row i at i * source_stride, or without one already in place.
#[pyfunction]
#[pyo3(signature = (key_bytes, buffer, stride, headroom, length, last, receiver, counter, count, source=None, source_stride=Number(0)))]
#[allow(clippy::too_many_arguments)]
fn seal_rows(
    key_bytes: &Bound<'_, PyAny>,
    buffer: &Bound<'_, PyAny>,
    stride: Size,
    headroom: Size,
    length: Size,
    last: Size,
    receiver: Number<u32>,
    counter: Number<u64>,
    count: Size,
    source: Option<&Bound<'_, PyAny>>,
    source_stride: Size,
) -> PyResult<()> {
    let key = key(key_bytes)?;
    let source = source.map(Input::new).transpose()?;
    let mut output = match &source {
        Some(source) => Output::apart_from(buffer, source)?,
        None => Output::new(buffer)?,
    };
    let bytes = output.bytes();
    let margins = Margins {
        before: headroom
            .0
            .checked_add(cipher::HEADER)
            .ok_or(Refused("the headroom is too large"))?,
        after: cipher::TAG,
    };
    let lengths = (length.0, last.0);
    let rows = Rows::new(bytes.len(), margins.before, stride.0, lengths, count.0, margins)?;
    if let Some(source) = &source {
        let from = source.bytes();
        let none = Margins { before: 0, after: 0 };
        let texts = Rows::new(from.len(), 0, source_stride.0, lengths, count.0, none)?;
        for row in 0..rows.count() {
            bytes[rows.text(row)].copy_from_slice(&from[texts.text(row)]);
        }
    }
    cipher::seal(&key, bytes, &rows, receiver.0, counter.0)?;
    Ok(())
}

/// Open rows of `buffer` in place: the message of row i begins at start + i * stride, its text 16 bytes later.
///
/// Returns the counters, and None where all tags held or else whether each did. The text of the others is erased.
#[pyfunction]
fn open_rows(
    key_bytes: &Bound<'_, PyAny>,
    buffer: &Bound<'_, PyAny>,
    start: Size,
    stride: Size,
    length: Size,
    last: Size,
    count: Size,
) -> PyResult<(Vec<u64>, Option<Vec<bool>>)> {
    let key = key(key_bytes)?;
    let mut output = Output::new(buffer)?;
    let bytes = output.bytes();
    let text = start
        .0
        .checked_add(cipher::HEADER)
        .ok_or(Refused("the rows leave the buffer"))?;
    let rows = Rows::new(bytes.len(), text, stride.0, (length.0, last.0), count.0, cipher::AROUND)?;
    let opened = cipher::open(&key, bytes, &rows);
    let all_good = opened.good.iter().all(|&good| good);
    Ok((opened.counters, (!all_good).then_some(opened.good)))
}

/// Write the segments of a super-packet as padded rows: `before` free bytes, the packet, `after` free bytes, from `at` on.
///
/// Returns the number of rows, the padded length of each and that of the last; None if they do not fit behind `at`, or if
/// `wanted` is not 0 and not their length. Raises MalformedFrame.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn split(
    frame: &Bound<'_, PyAny>,
    mtu: Size,
    buffer: &Bound<'_, PyAny>,
    at: Size,
    before: Size,
    after: Size,
    wanted: Size,
) -> PyResult<Option<(usize, usize, usize)>> {
    let input = Input::new(frame)?;
    let mut output = Output::apart_from(buffer, &input)?;
    let margins = Margins {
        before: before.0,
        after: after.0,
    };
    match split_frame(input.bytes(), mtu.0, output.bytes(), at.0, margins, wanted.0) {
        Ok(found) => Ok(found.map(|segments| (segments.rows, segments.length, segments.last))),
        Err(Failure::Malformed(why)) => Err(MalformedFrame::new_err(why)),
        Err(Failure::Arguments(refused)) => Err(refused.into()),
    }
}

/// Make frames of opened rows in place: the text of row i begins at start + i * stride, with at least ten bytes before it.
///
/// Returns (start, end, rows) of each frame. Rows that are empty or not `good` are left out.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn find_frames(
    buffer: &Bound<'_, PyAny>,
    start: Size,
    stride: Size,
    length: Size,
    last: Size,
    count: Size,
    good: Option<Vec<bool>>,
    tso: bool,
    uso: bool,
) -> PyResult<Vec<(usize, usize, usize)>> {
    let mut output = Output::new(buffer)?;
    let bytes = output.bytes();
    let rows = Rows::new(bytes.len(), start.0, stride.0, (length.0, last.0), count.0, frames::AROUND)?;
    if good.as_ref().is_some_and(|good| good.len() != rows.count()) {
        return Err(PyValueError::new_err("there are not as many flags as rows"));
    }
    let found = frames::find(bytes, &rows, good.as_deref(), Offloads { tso, uso });
    Ok(found.iter().map(|frame| (frame.start, frame.end, frame.rows)).collect())
}

/// Rows in one call: the optional compiled core of siderolink's WireGuard data plane.
#[pymodule]
fn siderolink_native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("SEAM", SEAM)?;
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add("MalformedFrame", module.py().get_type::<MalformedFrame>())?;
    module.add_function(wrap_pyfunction!(seal_rows, module)?)?;
    module.add_function(wrap_pyfunction!(open_rows, module)?)?;
    module.add_function(wrap_pyfunction!(split, module)?)?;
    module.add_function(wrap_pyfunction!(find_frames, module)?)?;
    Ok(())
}
