//! Reads the bytes of a description, checking every value against its range.
//!
//! Subsections are dispatched by name, in whatever order they come. A name that does not begin
//! with the parent's belongs to an outer level and is left alone.

use std::io;

use super::saver::SUBSECTION;
use super::{Body, Candidate, Error, Field, Result, StateReader, Struct, Visitor, check_version};

/// Reads one section.
pub(super) struct Loader<'a> {
    from: &'a mut dyn StateReader,
    /// Section, structs and subsections being read, outermost first.
    path: Vec<&'static str>,
}

impl<'a> Loader<'a> {
    pub(super) fn new(section: &'static str, from: &'a mut dyn StateReader) -> Self {
        Self {
            from,
            path: vec![section],
        }
    }

    fn section(&self) -> String {
        self.path.join(".")
    }

    fn read(&mut self, field: &str, to: &mut [u8]) -> Result {
        self.from
            .read(to)
            .map_err(|source| self.failed(field, source))
    }

    fn failed(&self, field: &str, source: io::Error) -> Error {
        Error::Read {
            section: self.section(),
            field: field.to_owned(),
            source,
        }
    }

    /// Name of the subsection of `parent` that comes next, if one does.
    fn next_subsection(&mut self, parent: &str) -> Result<Option<Vec<u8>>> {
        // QEMU asks for the first byte alone: behind a section there may be nothing else.
        let head = self.peek(2)?;
        if head.first() != Some(&SUBSECTION) {
            return Ok(None);
        }
        let len = head.get(1).map_or(0, |len| usize::from(*len));
        let all = len.saturating_add(2).min(256);
        let bytes = self.peek(all)?;
        let name = bytes.get(2..).unwrap_or_default();
        let parent = parent.as_bytes();
        if bytes.len() == all {
            let ours = name.len() > parent.len() && name.starts_with(parent);
            return Ok(ours.then(|| name.to_vec()));
        }
        // The stream ends here. A struct may be followed by such a byte, a section may not.
        let common = name.len().min(parent.len());
        if name[..common] == parent[..common] && (common > 0 || self.path.len() == 1) {
            self.read("subsections", &mut vec![0; all])?;
        }
        Ok(None)
    }

    /// A copy of the next `n` bytes, or of fewer at the end.
    fn peek(&mut self, n: usize) -> Result<Vec<u8>> {
        let bytes = self.from.peek(n).map(<[u8]>::to_vec);
        bytes.map_err(|source| self.failed("subsections", source))
    }
}

impl Visitor for Loader<'_> {
    fn numbers(&mut self, field: &Field, at: &mut dyn FnMut(usize, Option<u64>) -> u64) -> Result {
        for index in 0..field.array.unwrap_or(1) {
            let mut word = [0; 8];
            let unused = word.len() - field.size;
            self.read(field.name, &mut word[unused..])?;
            if field.signed && word[unused] & 0x80 != 0 {
                word[..unused].fill(0xff);
            }
            let bits = u64::from_be_bytes(word);
            if !field.admits(bits) {
                let (low, high) = field.legal;
                return Err(Error::Value {
                    section: self.section(),
                    field: match field.array {
                        Some(_) => format!("{}[{index}]", field.name),
                        None => field.name.to_owned(),
                    },
                    value: field.show(bits),
                    legal: if low == high {
                        field.show(low)
                    } else {
                        format!("{} to {}", field.show(low), field.show(high))
                    },
                });
            }
            at(index, Some(bits));
        }
        Ok(())
    }

    fn bytes(&mut self, name: &'static str, _kind: &'static str, bytes: &mut [u8]) -> Result {
        self.read(name, bytes)
    }

    fn structure(&mut self, of: &Struct, body: Body<'_>) -> Result {
        self.path.push(of.name);
        for index in 0..of.array.unwrap_or(1) {
            body(index, self)?;
        }
        self.path.pop();
        Ok(())
    }

    fn subsections(&mut self, parent: &'static str, all: &[Candidate], body: Body<'_>) -> Result {
        while let Some(name) = self.next_subsection(parent)? {
            let mut skipped = vec![0; name.len() + 2];
            self.read("subsections", &mut skipped)?;
            let found = all
                .iter()
                .enumerate()
                .find(|(_, s)| s.name.as_bytes() == name);
            let Some((index, subsection)) = found else {
                return Err(Error::UnknownSubsection {
                    section: self.section(),
                    subsection: name.escape_ascii().to_string(),
                });
            };
            let mut version = [0; 4];
            self.read(subsection.name, &mut version)?;
            let version = u32::from_be_bytes(version);
            check_version(
                subsection.name,
                version,
                subsection.version,
                subsection.version,
            )?;
            self.path.push(subsection.name);
            body(index, self)?;
            self.path.pop();
        }
        Ok(())
    }

    fn end(&mut self, loaded: &mut dyn FnMut() -> std::result::Result<(), String>) -> Result {
        loaded().map_err(|what| Error::Inconsistent {
            section: self.section(),
            what,
        })
    }
}
