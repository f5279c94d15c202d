//! Writes the JSON description that ends a stream, in the shape QEMU gives it.
//!
//! Arrays are one entry with `array_len`; `size` is always that of one element. The size of a
//! struct counts its subsections too, as QEMU measures what it has written.

use serde_json::{Map, Value};

use super::{Body, Candidate, Field, Result, Struct, Visitor};

/// Collects a description and the size of what it describes.
pub(super) struct Describer {
    head: Map<String, Value>,
    fields: Vec<Value>,
    subsections: Vec<Value>,
    size: usize,
}

impl Describer {
    pub(super) fn new(vmsd: &str, version: u32) -> Self {
        let mut head = Map::new();
        head.insert("vmsd_name".to_owned(), vmsd.into());
        head.insert("version".to_owned(), version.into());
        Self {
            head,
            fields: Vec::new(),
            subsections: Vec::new(),
            size: 0,
        }
    }

    pub(super) fn into_value(self) -> Value {
        Value::Object(self.into_members())
    }

    fn into_members(mut self) -> Map<String, Value> {
        number_namesakes(&mut self.fields);
        self.head.insert("fields".to_owned(), self.fields.into());
        if !self.subsections.is_empty() {
            self.head
                .insert("subsections".to_owned(), self.subsections.into());
        }
        self.head
    }

    fn push(&mut self, entry: Map<String, Value>, size: usize, array: Option<usize>) {
        let mut entry = entry;
        entry.insert("size".to_owned(), size.into());
        self.fields.push(entry.into());
        self.size += size * array.unwrap_or(1);
    }
}

/// Fields of one name are told apart by an index, as readers of the description expect.
fn number_namesakes(fields: &mut [Value]) {
    let names: Vec<Value> = fields.iter().map(|field| field["name"].clone()).collect();
    for (at, (field, name)) in fields.iter_mut().zip(&names).enumerate() {
        let namesakes = |of: &[Value]| of.iter().filter(|other| *other == name).count();
        if let Some(name) = name.as_str().filter(|_| namesakes(&names) > 1) {
            field["name"] = format!("{name}[{}]", namesakes(&names[..at])).into();
        }
    }
}

fn entry(name: &str, kind: &str, array: Option<usize>) -> Map<String, Value> {
    let mut entry = Map::new();
    entry.insert("name".to_owned(), name.into());
    if let Some(len) = array {
        entry.insert("array_len".to_owned(), len.into());
    }
    entry.insert("type".to_owned(), kind.into());
    entry
}

impl Visitor for Describer {
    fn numbers(&mut self, field: &Field, _: &mut dyn FnMut(usize, Option<u64>) -> u64) -> Result {
        self.push(
            entry(field.name, field.kind, field.array),
            field.size,
            field.array,
        );
        Ok(())
    }

    fn bytes(&mut self, name: &'static str, kind: &'static str, bytes: &mut [u8]) -> Result {
        self.push(entry(name, kind, None), bytes.len(), None);
        Ok(())
    }

    fn structure(&mut self, of: &Struct, body: Body<'_>) -> Result {
        let mut inner = Self::new(of.vmsd, of.version);
        body(0, &mut inner)?;
        let size = inner.size;
        let mut entry = entry(of.name, of.kind, of.array);
        if of.kind == "struct" {
            entry.insert("struct".to_owned(), inner.into_value());
        } else {
            entry.append(&mut inner.into_members());
        }
        self.push(entry, size, of.array);
        Ok(())
    }

    fn subsections(&mut self, _parent: &'static str, all: &[Candidate], body: Body<'_>) -> Result {
        for (index, subsection) in all.iter().enumerate().filter(|(_, s)| s.needed) {
            let mut inner = Self::new(subsection.name, subsection.version);
            body(index, &mut inner)?;
            // Type byte, counted name, version.
            self.size += 1 + 1 + subsection.name.len() + 4 + inner.size;
            self.subsections.push(inner.into_value());
        }
        Ok(())
    }

    fn end(&mut self, _loaded: &mut dyn FnMut() -> std::result::Result<(), String>) -> Result {
        Ok(())
    }
}
