//! The bytes of Python objects, as slices, and file descriptors. All `unsafe` of this crate is here.
//!
//! What makes it sound:
//! - A `PyBuffer` holds the object's export: while it lives, the object can neither be freed nor change its size.
//! - It is only made of contiguous bytes (format "B"), and an `Output` only of writable ones.
//! - A call holds the GIL from its first look at a buffer to its last, and runs no Python code while it has a slice. So no other
//!   Python code reads or writes the bytes meanwhile. Native code that lets go of the GIL while it uses a buffer must not share it
//!   with these calls; the engine guarantees that.
//! - A call that takes two buffers refuses them where they overlap.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Read, Write};
use std::mem::{size_of_val, zeroed, ManuallyDrop};
use std::os::fd::{AsRawFd, FromRawFd};

use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{PyBufferError, PyValueError};
use pyo3::prelude::*;

/// Bytes that are only read.
pub struct Input(PyBuffer<u8>);

/// Bytes that are written.
pub struct Output(PyBuffer<u8>);

fn get(object: &Bound<'_, PyAny>) -> PyResult<PyBuffer<u8>> {
    let buffer = PyBuffer::<u8>::get(object).map_err(|error| {
        if error.is_instance_of::<PyBufferError>(object.py()) {
            PyValueError::new_err("a buffer is not made of bytes")
        } else {
            error
        }
    })?;
    if buffer.is_c_contiguous() {
        Ok(buffer)
    } else {
        Err(PyValueError::new_err("a buffer is not contiguous"))
    }
}

fn range(buffer: &PyBuffer<u8>) -> (usize, usize) {
    let start = buffer.buf_ptr() as usize;
    (start, start + buffer.len_bytes())
}

impl Input {
    /// Raises ValueError or TypeError for what is no contiguous buffer of bytes.
    pub fn new(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        get(object).map(Self)
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        if self.0.len_bytes() == 0 {
            return &[];
        }
        // SAFETY: see above; the pointer is the export's own and not null, since there are bytes.
        unsafe { std::slice::from_raw_parts(self.0.buf_ptr().cast::<u8>(), self.0.len_bytes()) }
    }
}

impl Output {
    /// Raises ValueError or TypeError for what is no contiguous and writable buffer of bytes.
    pub fn new(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        let buffer = get(object)?;
        if buffer.readonly() {
            return Err(PyValueError::new_err("a buffer that is to be written is read-only"));
        }
        Ok(Self(buffer))
    }

    /// The same, and ValueError where it shares bytes with `input`.
    pub fn apart_from(object: &Bound<'_, PyAny>, input: &Input) -> PyResult<Self> {
        let output = Self::new(object)?;
        let ((start, end), (other_start, other_end)) = (range(&output.0), range(&input.0));
        if start < other_end && other_start < end {
            return Err(PyValueError::new_err("the buffers overlap"));
        }
        Ok(output)
    }

    /// The bytes.
    pub fn bytes(&mut self) -> &mut [u8] {
        if self.0.len_bytes() == 0 {
            return &mut [];
        }
        // SAFETY: see above; the borrow of `self` keeps this the only slice that this call has of these bytes.
        unsafe { std::slice::from_raw_parts_mut(self.0.buf_ptr().cast::<u8>(), self.0.len_bytes()) }
    }
}

/// A file descriptor of the caller's, which stays open whatever becomes of this.
pub struct Descriptor(ManuallyDrop<File>);

impl Descriptor {
    /// Raises ValueError for a number that cannot be one.
    pub fn new(number: i32) -> PyResult<Self> {
        if number < 0 {
            return Err(PyValueError::new_err("a descriptor is not negative"));
        }
        // SAFETY: it is not negative, and never closed from here. One that the caller has closed is an error of read and write.
        Ok(Self(ManuallyDrop::new(unsafe { File::from_raw_fd(number) })))
    }

    /// Read once.
    pub fn read(&self, into: &mut [u8]) -> io::Result<usize> {
        (&*self.0).read(into)
    }

    /// Write all in one call; false if it was not taken.
    pub fn write(&self, bytes: &[u8]) -> bool {
        (&*self.0).write(bytes).is_ok_and(|size| size == bytes.len())
    }

    /// Receive one message of a socket: its size, the sender's address (a sockaddr) and the control messages.
    pub fn receive<'a>(&self, into: &mut [u8], room: &'a mut Around) -> io::Result<(usize, &'a [u8], &'a [u8])> {
        let mut part = libc::iovec {
            iov_base: into.as_mut_ptr().cast(),
            iov_len: into.len(),
        };
        // SAFETY: all zeros is a msghdr without anything.
        let mut header: libc::msghdr = unsafe { zeroed() };
        header.msg_name = room.name.as_mut_ptr().cast();
        header.msg_namelen = size_of_val(&room.name) as _;
        header.msg_iov = &mut part;
        header.msg_iovlen = 1;
        header.msg_control = room.control.as_mut_ptr().cast();
        header.msg_controllen = size_of_val(&room.control) as _;
        // SAFETY: each pointer is that of a slice or array which is borrowed mutably here, with its own length in bytes.
        let size = unsafe { libc::recvmsg(self.0.as_raw_fd(), &mut header, 0) };
        let size = usize::try_from(size).map_err(|_| io::Error::last_os_error())?;
        let name = usize::min(header.msg_namelen as usize, size_of_val(&room.name));
        let control = usize::min(header.msg_controllen as usize, size_of_val(&room.control));
        Ok((
            size.min(into.len()),
            bytes_of(&room.name, name),
            bytes_of(&room.control, control),
        ))
    }

    /// Send one message by a socket to the address `name` (a sockaddr), with control messages as Linux takes them, or none.
    pub fn send(&self, bytes: &[u8], name: &[u8], control: &[u8]) -> io::Result<usize> {
        let mut part = libc::iovec {
            iov_base: bytes.as_ptr().cast_mut().cast(),
            iov_len: bytes.len(),
        };
        // SAFETY: all zeros is a msghdr without anything.
        let mut header: libc::msghdr = unsafe { zeroed() };
        header.msg_name = name.as_ptr().cast_mut().cast();
        header.msg_namelen = name.len() as _;
        header.msg_iov = &mut part;
        header.msg_iovlen = 1;
        if !control.is_empty() {
            header.msg_control = control.as_ptr().cast_mut().cast();
            header.msg_controllen = control.len() as _;
        }
        // SAFETY: each pointer is that of a slice with its own length. The kernel copies from them, aligned or not, checks what
        // it finds there, and writes nothing.
        let size = unsafe { libc::sendmsg(self.0.as_raw_fd(), &header, libc::MSG_NOSIGNAL) };
        usize::try_from(size).map_err(|_| io::Error::last_os_error())
    }
}

/// Room for what comes with a datagram.
#[derive(Default)]
pub struct Around {
    name: [u64; 16],
    control: [u64; 32],
}

/// The first `size` bytes of some numbers, as they are in memory.
fn bytes_of(numbers: &[u64], size: usize) -> &[u8] {
    assert!(size <= size_of_val(numbers));
    // SAFETY: these bytes are initialised and within the slice, and bytes need no alignment.
    unsafe { std::slice::from_raw_parts(numbers.as_ptr().cast(), size) }
}
