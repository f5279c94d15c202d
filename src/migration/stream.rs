//! The main stream as bytes: a writer that gathers and a reader that scatters.
//!
//! Both count and hash what passes, and neither copies a page if it can help it: the writer sends
//! pages out of guest memory between the headers it has buffered, the reader lets the next pages
//! fall into guest memory while it still only guesses that they are the next. QEMU's `QEMUFile`.

mod reader;
mod writer;

pub use reader::Reader;
pub use writer::Writer;
