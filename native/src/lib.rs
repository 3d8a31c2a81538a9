//! Rows in one call: the optional compiled core of siderolink's WireGuard data plane.
//!
//! The protocol stays in Python. What is here works on batches of equally long packets, as rows of one buffer: cut a
//! super-packet into them, seal them, open them, and make super-packets of them again. Each function has a twin in pure Python.

#[cfg(feature = "python")]
mod buffers;
pub mod checksum;
pub mod cipher;
pub mod frames;
pub mod gather;
pub mod headers;
pub mod layout;
pub mod many;
#[cfg(feature = "python")]
mod python;
pub mod split;
