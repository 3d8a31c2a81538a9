//! The face towards Python: arguments are checked, and everything that is wrong with them is a ValueError.

use std::io::ErrorKind;

use pyo3::exceptions::{PyOverflowError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList};

use crate::buffers::{Around, Descriptor, Input, Output};
use crate::cipher::{self, Key};
use crate::frames::{self, Offloads};
use crate::gather::{self, Read};
use crate::layout::{Margins, Refused, Rows};
use crate::many::{self, Receive, Row};
use crate::split::{split as split_frame, Failure};

/// Raised with each change of what the functions take or give; siderolink uses only the one it was written for.
pub const SEAM: u32 = 4;
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
    let found = gather::gather(|into| read_frame(&file, into), frame.bytes(), mtu.0, bytes, &rows, filled.0);
    Ok((found.rows, found.last, found.waiting))
}

fn read_frame(file: &Descriptor, into: &mut [u8]) -> Read {
    match file.read(into) {
        Ok(0) => Read::Failed,
        Ok(size) => Read::Frame(size),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Read::Drained,
        Err(_) => Read::Failed,
    }
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

fn row(key_bytes: &Bound<'_, PyBytes>, start: usize, length: usize) -> PyResult<Row> {
    let end = start.checked_add(length).ok_or(Refused("the rows leave the buffer"))?;
    Ok(Row {
        key: Key::new(key_bytes.as_bytes())?,
        text: start..end,
    })
}

/// Whether a socket has nothing to give or to take now.
fn is_busy(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

type Opened<'py> = (u32, Option<u64>, Option<Addresses<'py>>, usize, usize);
type Came<'py> = (Bound<'py, PyBytes>, usize, usize, usize, Option<Opened<'py>>);
type Addresses<'py> = (Bound<'py, PyBytes>, Bound<'py, PyBytes>);

/// Source and destination, which lie one behind the other.
fn addresses<'py>(python: Python<'py>, pair: &[u8]) -> Addresses<'py> {
    let (source, destination) = pair.split_at(pair.len() / 2);
    (PyBytes::new(python, source), PyBytes::new(python, destination))
}

/// Receive datagrams of a UDP socket that does not block into `buffer`, one behind the other, up to `most` times, and up to
/// `others` times what is no single data message. It ends where less than 64 KiB are left. Neighbours of one sender and one
/// length are one batch. A data message by itself is opened in place with the key that `keys` has for its receiver index.
///
/// Returns for each batch the sender (its sockaddr and in_pktinfo or in6_pktinfo), start, size, the length of each datagram in
/// it but the last, and what was opened: see native/README.md; and whether there was an error.
#[pyfunction]
fn receive_many<'py>(
    descriptor: i32,
    buffer: &Bound<'py, PyAny>,
    most: Size,
    others: Size,
    keys: &Bound<'py, PyDict>,
) -> PyResult<(Vec<Came<'py>>, bool)> {
    let python = buffer.py();
    let file = Descriptor::new(descriptor)?;
    let mut output = Output::new(buffer)?;
    let mut around = Around::default();
    let receive = |into: &mut [u8]| match file.receive(into, &mut around) {
        Ok((size, name, controls)) => {
            let (segment, local) = many::controls(controls);
            let mut sender = [0; 64];
            let length = usize::min(name.len() + local.len(), sender.len());
            for (to, from) in sender.iter_mut().zip(name.iter().chain(local)) {
                *to = *from;
            }
            Receive::Datagrams(size, segment.unwrap_or(size), (sender, length))
        }
        Err(error) if is_busy(&error) => Receive::Drained,
        Err(_) => Receive::Failed,
    };
    let (found, has_failed) = many::receive(receive, output.bytes(), most.0, others.0);
    let found = many::join(found);
    // a lookup could run Python code, so no slice of the buffer is in use meanwhile
    let known = found
        .iter()
        .map(|came| Ok(came.receiver.map(|receiver| keys.get_item(receiver)).transpose()?.flatten()))
        .collect::<PyResult<Vec<_>>>()?;
    let mut rows = Vec::new();
    for (came, key) in found.iter().zip(&known) {
        if let Some(key) = key {
            let length = came.size - cipher::HEADER - cipher::TAG;
            rows.push(row(key.cast::<PyBytes>()?, came.start + cipher::HEADER, length)?);
        }
    }
    let bytes = output.bytes();
    let mut texts = many::open(bytes, &rows)?.into_iter();
    let mut batches = Vec::with_capacity(found.len());
    for (came, key) in found.iter().zip(&known) {
        let text = key.as_ref().and_then(|_| texts.next());
        let opened = came.receiver.zip(text).map(|(receiver, text)| {
            let addresses = text.addresses.map(|place| addresses(python, &bytes[place]));
            (receiver, text.counter, addresses, came.start + cipher::HEADER, text.end)
        });
        let (sender, length) = &came.sender;
        batches.push((
            PyBytes::new(python, &sender[..*length]),
            came.start,
            came.size,
            came.stride,
            opened,
        ));
    }
    Ok((batches, has_failed))
}

type ToSeal<'py> = (Bound<'py, PyBytes>, Size, Size, Number<u32>, Number<u64>);

/// Seal texts of many sessions in place: `rows` are key, start, length, receiver and counter of each, one behind the other, with
/// 16 free bytes before and after each.
#[pyfunction]
fn seal_many<'py>(buffer: &Bound<'py, PyAny>, rows: Vec<ToSeal<'py>>) -> PyResult<()> {
    let rows = rows.iter().map(to_seal).collect::<PyResult<Vec<_>>>()?;
    let mut output = Output::new(buffer)?;
    Ok(many::seal(output.bytes(), &rows)?)
}

fn to_seal((key, start, length, receiver, counter): &ToSeal<'_>) -> PyResult<(Row, u32, u64)> {
    Ok((row(key, start.0, length.0)?, receiver.0, counter.0))
}

type Frame<'py> = (Option<Addresses<'py>>, usize, usize, usize);

/// Read up to `most` frames from a descriptor that does not block, and finish each where it is sealed: see native/README.md.
///
/// Returns for each source and destination, start, size and padded length of the packet, 0 for one that is no small packet, with
/// which it ends; and whether there was an error.
#[pyfunction]
fn read_many<'py>(descriptor: i32, buffer: &Bound<'py, PyAny>, mtu: Size, most: Size) -> PyResult<(Vec<Frame<'py>>, bool)> {
    let python = buffer.py();
    let file = Descriptor::new(descriptor)?;
    let mut output = Output::new(buffer)?;
    let bytes = output.bytes();
    let (found, has_failed) = many::read(|into| read_frame(&file, into), bytes, mtu.0, cipher::AROUND, most.0)?;
    let found = found
        .into_iter()
        .map(|frame| {
            let addresses = frame.addresses.map(|pair| addresses(python, &pair));
            (addresses, frame.start, frame.size, frame.length)
        })
        .collect();
    Ok((found, has_failed))
}

/// Write packets, given by start and end, to a descriptor, each with the virtio_net_hdr before it, until one is not taken.
/// Returns how many were.
#[pyfunction]
fn write_many(descriptor: i32, buffer: &Bound<'_, PyAny>, packets: Vec<(Size, Size)>) -> PyResult<usize> {
    let file = Descriptor::new(descriptor)?;
    let input = Input::new(buffer)?;
    let places = packets.iter().map(|(start, end)| (start.0, end.0));
    Ok(many::write(|frame| file.write(frame), input.bytes(), places)?)
}

type ToSend<'py> = (ToSeal<'py>, (Bound<'py, PyBytes>, Bound<'py, PyBytes>));

/// Seal texts as `seal_many` does, and send each, by a socket that does not block, to a sockaddr with control messages.
///
/// Returns how many were tried before the socket was full, and which of these were not sent.
#[pyfunction]
fn send_many(descriptor: i32, buffer: &Bound<'_, PyAny>, texts: Vec<ToSend<'_>>) -> PyResult<(usize, Vec<usize>)> {
    let file = Descriptor::new(descriptor)?;
    let rows = texts.iter().map(|(text, _)| to_seal(text)).collect::<PyResult<Vec<_>>>()?;
    let mut output = Output::new(buffer)?;
    let bytes = output.bytes();
    many::seal(bytes, &rows)?;
    let mut failed = Vec::new();
    for (index, ((row, ..), (_, (name, control)))) in rows.iter().zip(&texts).enumerate() {
        match file.send(&bytes[row.message()], name.as_bytes(), control.as_bytes()) {
            Ok(_) => {}
            Err(error) if is_busy(&error) => return Ok((index, failed)),
            Err(_) => failed.push(index),
        }
    }
    Ok((texts.len(), failed))
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
    module.add_function(wrap_pyfunction!(receive_many, module)?)?;
    module.add_function(wrap_pyfunction!(seal_many, module)?)?;
    module.add_function(wrap_pyfunction!(read_many, module)?)?;
    module.add_function(wrap_pyfunction!(write_many, module)?)?;
    module.add_function(wrap_pyfunction!(send_many, module)?)?;
    Ok(())
}
