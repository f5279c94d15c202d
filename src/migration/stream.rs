//! The main stream as bytes: a writer that gathers and a reader with a buffer.
//!
//! Both count and hash what passes. The writer sends pages out of guest memory between the headers
//! it has buffered; the reader shows pages in its buffer. QEMU's `QEMUFile`.

mod reader;
mod writer;

pub use reader::Reader;
pub use writer::{TICK, Writer};
