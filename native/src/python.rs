//! The face towards Python: arguments are checked, and everything that is wrong with them is a ValueError.

use std::io::ErrorKind;

use pyo3::exceptions::{PyOverflowError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyList;

use crate::buffers::{Descriptor, Input, Output};
use crate::cipher::{self, Key};
use crate::frames::{self, Offloads};
use crate::gather::{self, Read};
use crate::layout::{Margins, Refused, Rows};
use crate::split::{split as split_frame, Failure};

/// Raised with each change of what the functions take or give; siderolink uses only the one it was written for.
pub const SEAM: u32 = 2;
/// Frames that one call writes at most.
const MOST_WRITTEN: usize = 64;

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
    let found = split_frame(input.bytes(), mtu.0, output.bytes(), at.0, margins, wanted.0);
    Ok(placed(found)?.map(|segments| (segments.rows, segments.length, segments.last)))
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

/// Write one packet of a frame, padded and with a finished checksum, to `buffer` from `at` on, where it may take `room` bytes.
///
/// Returns the padded length, None if it is longer than the room. Raises MalformedFrame.
#[pyfunction]
fn place(frame: &Bound<'_, PyAny>, mtu: Size, buffer: &Bound<'_, PyAny>, at: Size, room: Size) -> PyResult<Option<usize>> {
    let input = Input::new(frame)?;
    let mut output = Output::apart_from(buffer, &input)?;
    let end = at.0.checked_add(room.0).ok_or(Refused("the room is too large"))?;
    let room = output
        .bytes()
        .get_mut(at.0..end)
        .ok_or(Refused("the room leaves the buffer"))?;
    placed(gather::place(input.bytes(), mtu.0, room))
}

fn placed<T>(found: Result<T, Failure>) -> PyResult<T> {
    found.map_err(|failure| match failure {
        Failure::Malformed(why) => MalformedFrame::new_err(why),
        Failure::Arguments(refused) => refused.into(),
    })
}

/// Read frames from a descriptor that does not block, by the buffer `frame`, into rows of `buffer` from row `filled` on.
///
/// Row i begins at i * stride with `before` free bytes, then come `length` for the text and `after` free ones. Frames are read
/// while they are small packets between the addresses of row 0 that fit, up to `count` rows in all. Returns how many rows were
/// added, the padded length of the last, and None if nothing is waiting any more, else the size of a frame in `frame` that is
/// no row of this batch; 0 for none.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn read_rows(
    descriptor: i32,
    frame: &Bound<'_, PyAny>,
    mtu: Size,
    buffer: &Bound<'_, PyAny>,
    before: Size,
    after: Size,
    length: Size,
    filled: Size,
    count: Size,
) -> PyResult<(usize, usize, Option<usize>)> {
    let file = Descriptor::new(descriptor)?;
    let frame_input = Input::new(frame)?;
    let mut output = Output::apart_from(buffer, &frame_input)?;
    drop(frame_input);
    let mut frame = Output::new(frame)?;
    let margins = Margins {
        before: before.0,
        after: after.0,
    };
    let stride = margins
        .before
        .checked_add(margins.after)
        .and_then(|around| around.checked_add(length.0))
        .ok_or(Refused("the rows overlap"))?;
    if filled.0 == 0 {
        return Err(Refused("there is no first row").into());
    }
    let bytes = output.bytes();
    let rows = Rows::new(bytes.len(), margins.before, stride, (length.0, length.0), count.0, margins)?;
    let read = |into: &mut [u8]| match file.read(into) {
        Ok(0) => Read::Failed,
        Ok(size) => Read::Frame(size),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Read::Drained,
        Err(_) => Read::Failed,
    };
    let found = gather::gather(read, frame.bytes(), mtu.0, bytes, &rows, filled.0);
    Ok((found.rows, found.last, found.waiting))
}

/// Write frames of `buffer`, given as find_frames gives them, from the one of number `first` on to a descriptor.
///
/// It ends before a super-packet, a packet that contradicts itself or has other addresses than the first, and one that the
/// descriptor does not take. Returns how many were written.
#[pyfunction]
fn write_frames(descriptor: i32, buffer: &Bound<'_, PyAny>, frames: &Bound<'_, PyList>, first: Size) -> PyResult<usize> {
    let file = Descriptor::new(descriptor)?;
    // no more than one call's worth is looked at, so that many calls for one list do not look at all of it each time
    let end = first.0.saturating_add(MOST_WRITTEN).min(frames.len());
    let found = (first.0..end)
        .map(|index| frames.get_item(index)?.extract::<(Size, Size, Size)>())
        .collect::<PyResult<Vec<_>>>()?;
    let input = Input::new(buffer)?;
    let places = found.iter().map(|(start, end, _)| (start.0, end.0));
    Ok(gather::write(|frame| file.write(frame), input.bytes(), places))
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
    module.add_function(wrap_pyfunction!(place, module)?)?;
    module.add_function(wrap_pyfunction!(read_rows, module)?)?;
    module.add_function(wrap_pyfunction!(write_frames, module)?)?;
    Ok(())
}
