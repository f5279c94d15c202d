//! Writes the bytes of a description.

use super::{Body, Candidate, Field, Result, Struct, Visitor};

/// Marks a subsection on the wire.
pub(super) const SUBSECTION: u8 = 0x05;

/// Collects a body.
#[derive(Default)]
pub(super) struct Saver {
    bytes: Vec<u8>,
}

impl Saver {
    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }
}

impl Visitor for Saver {
    fn numbers(&mut self, field: &Field, at: &mut dyn FnMut(usize, Option<u64>) -> u64) -> Result {
        for index in 0..field.array.unwrap_or(1) {
            let word = at(index, None).to_be_bytes();
            self.bytes
                .extend_from_slice(&word[word.len() - field.size..]);
        }
        Ok(())
    }

    fn bytes(&mut self, _name: &'static str, _kind: &'static str, bytes: &mut [u8]) -> Result {
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }

    fn structure(&mut self, of: &Struct, body: Body<'_>) -> Result {
        for index in 0..of.array.unwrap_or(1) {
            body(index, self)?;
        }
        Ok(())
    }

    fn subsections(&mut self, _parent: &'static str, all: &[Candidate], body: Body<'_>) -> Result {
        for (index, subsection) in all.iter().enumerate().filter(|(_, s)| s.needed) {
            self.bytes.push(SUBSECTION);
            // Names are literals of this program, none near 255 bytes.
            self.bytes.push(subsection.name.len() as u8);
            self.bytes.extend_from_slice(subsection.name.as_bytes());
            self.bytes
                .extend_from_slice(&subsection.version.to_be_bytes());
            body(index, self)?;
        }
        Ok(())
    }

    fn end(&mut self, _loaded: &mut dyn FnMut() -> std::result::Result<(), String>) -> Result {
        Ok(())
    }
}
