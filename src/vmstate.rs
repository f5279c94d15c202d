//! A device describes its fields once; saver, loader and JSON describer read that one description.
//!
//! A device implements [`VmState`]: its name, its version, a walk over its fields in wire order,
//! and a table of optional subsections. [`save`], [`load`] and [`describe`] are three visitors of
//! the same walk, so bytes and description can not disagree. Every field has a legal range; a
//! stream whose value lies outside is refused before anything is applied. QEMU's VMStateDescription.

mod describer;
mod loader;
mod number;
mod saver;

use std::io;
use std::ops::RangeInclusive;

use serde_json::Value;

pub use self::number::Number;

/// Where a section's body is read from: bytes in order, with a look ahead for subsections.
pub trait StateReader {
    /// Fills `to` or fails.
    fn read(&mut self, to: &mut [u8]) -> io::Result<()>;

    /// The next `n` bytes (at most 256) without consuming them; fewer at the end of the stream.
    fn peek(&mut self, n: usize) -> io::Result<&[u8]>;
}

/// A body that is in memory already.
impl StateReader for &[u8] {
    fn read(&mut self, to: &mut [u8]) -> io::Result<()> {
        io::Read::read_exact(self, to)
    }

    fn peek(&mut self, n: usize) -> io::Result<&[u8]> {
        Ok(&self[..n.min(self.len())])
    }
}

/// Why a section was refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The stream ended or failed inside the section.
    #[error("{section}: field '{field}': {source}")]
    Read {
        /// Section, with the path of structs and subsections inside it.
        section: String,
        /// The field that was being read.
        field: String,
        /// Why.
        source: io::Error,
    },
    /// A value this device can not have.
    #[error("{section}: field '{field}' is {value}, legal is {legal}")]
    Value {
        /// Section, with the path of structs and subsections inside it.
        section: String,
        /// The field.
        field: String,
        /// What the stream said.
        value: String,
        /// What would have been legal.
        legal: String,
    },
    /// The values are legal one by one, not together.
    #[error("{section}: {what}")]
    Inconsistent {
        /// Section, with the path of structs and subsections inside it.
        section: String,
        /// What does not fit.
        what: String,
    },
    /// The section comes from a program newer than this one.
    #[error("{name}: incoming version_id {version} is too new for local version_id {local}")]
    TooNew {
        /// The description's name.
        name: String,
        /// Version in the stream.
        version: u32,
        /// Newest version known here.
        local: u32,
    },
    /// The section comes from a program older than this one can read.
    #[error(
        "{name}: incoming version_id {version} is too old for local minimum version_id  {minimum}"
    )]
    TooOld {
        /// The description's name.
        name: String,
        /// Version in the stream.
        version: u32,
        /// Oldest version readable here.
        minimum: u32,
    },
    /// A subsection nobody here knows; its length is unknown, so the stream can not go on.
    #[error("VM subsection '{subsection}' in '{section}' does not exist")]
    UnknownSubsection {
        /// Where it was found.
        section: String,
        /// Its name.
        subsection: String,
    },
}

/// Result of a walk.
pub type Result<T = ()> = std::result::Result<T, Error>;

/// State with a description.
pub trait VmState: Sized + 'static {
    /// QEMU's name of the description (`cpu`, `segment`, …).
    const NAME: &'static str;
    /// Version written.
    const VERSION: u32;
    /// Oldest version read.
    const MINIMUM: u32 = Self::VERSION;
    /// What may follow the plain fields.
    const SUBSECTIONS: &'static [Subsection<Self>] = &[];

    /// Walks the plain fields in wire order. `version` is the one on the wire: fields that came
    /// later than it are left out.
    fn fields(&mut self, v: &mut dyn Visitor, version: u32) -> Result;

    /// Called after everything was loaded: checks what no single range can, and derives what is
    /// not on the wire. The text names what does not fit.
    fn loaded(&mut self) -> std::result::Result<(), String> {
        Ok(())
    }
}

/// An optional part of some state `T`.
pub struct Subsection<T> {
    /// Full name, parent and all (`cpu/tsc_khz`).
    pub name: &'static str,
    /// Its version; older ones are not read.
    pub version: u32,
    /// Whether it has to be sent.
    pub needed: fn(&T) -> bool,
    /// Its fields.
    pub fields: fn(&mut T, &mut dyn Visitor) -> Result,
}

/// A field as the wire and the description show it.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// QEMU's name.
    pub name: &'static str,
    /// QEMU's type word (`uint64`, `timer`, …).
    pub kind: &'static str,
    /// Bytes on the wire, 1 to 8.
    pub size: usize,
    /// Elements, if it is an array.
    pub array: Option<usize>,
    /// Whether values are signed (for error texts and ranges).
    pub signed: bool,
    /// Smallest and largest legal value; compared as signed numbers if `signed`.
    pub legal: (u64, u64),
}

/// A struct inside a section.
#[derive(Clone, Copy, Debug)]
pub struct Struct {
    /// Name of the field that holds it.
    pub name: &'static str,
    /// `struct`, or `tmp` for the pieces QEMU shows without a struct around them.
    pub kind: &'static str,
    /// Elements, if it is an array of structs.
    pub array: Option<usize>,
    /// The struct's description.
    pub vmsd: &'static str,
    /// The description's version.
    pub version: u32,
}

/// Walks one element of a struct field; the index counts array elements.
pub type Body<'a> = &'a mut dyn FnMut(usize, &mut dyn Visitor) -> Result;

/// Name, version and need of one subsection.
#[derive(Clone, Copy, Debug)]
pub struct Candidate {
    name: &'static str,
    version: u32,
    needed: bool,
}

/// One way to walk a description. Devices use the methods of `dyn Visitor` below.
pub trait Visitor {
    /// Numbers of one field, one element or an array: big-endian words of `field.size` bytes.
    /// `at` reads (`None`) or writes (`Some`) the element of that index.
    fn numbers(&mut self, field: &Field, at: &mut dyn FnMut(usize, Option<u64>) -> u64) -> Result;

    /// Raw bytes of a fixed length.
    fn bytes(&mut self, name: &'static str, kind: &'static str, bytes: &mut [u8]) -> Result;

    /// A struct, or an array of them.
    fn structure(&mut self, of: &Struct, body: Body<'_>) -> Result;

    /// Subsections of `parent`: walks those that are needed (or, loading, those that come, in
    /// whatever order they come) by their index.
    fn subsections(&mut self, parent: &'static str, all: &[Candidate], body: Body<'_>) -> Result;

    /// Ends the walk over some state; a loader lets it check itself.
    fn end(&mut self, loaded: &mut dyn FnMut() -> std::result::Result<(), String>) -> Result;
}

impl dyn Visitor + '_ {
    /// A number, with every value of its type legal.
    pub fn number<T: Number>(&mut self, name: &'static str, value: &mut T) -> Result {
        self.ranged(name, value, T::MIN..=T::MAX)
    }

    /// A number within a range.
    pub fn ranged<T: Number>(
        &mut self,
        name: &'static str,
        value: &mut T,
        legal: RangeInclusive<T>,
    ) -> Result {
        let field = Field {
            legal: (legal.start().to_bits(), legal.end().to_bits()),
            ..Field::of::<T>(name)
        };
        self.numbers(&field, &mut |_, new| access(value, new))
    }

    /// A fixed array of numbers.
    pub fn array<T: Number>(&mut self, name: &'static str, values: &mut [T]) -> Result {
        let field = Field {
            array: Some(values.len()),
            ..Field::of::<T>(name)
        };
        self.numbers(&field, &mut |index, new| {
            values.get_mut(index).map_or(0, |v| access(v, new))
        })
    }

    /// A number that is wider here than on the wire (a 64-bit MSR that QEMU keeps in 32 bits).
    pub fn narrow(&mut self, name: &'static str, value: &mut u64) -> Result {
        self.numbers(&Field::of::<u32>(name), &mut |_, new| access(value, new))
    }

    /// A timer: the expiry time in nanoseconds of QEMU's clock, -1 when it is not armed.
    pub fn timer(&mut self, name: &'static str, value: &mut i64) -> Result {
        let field = Field {
            kind: "timer",
            ..Field::of::<i64>(name)
        };
        self.numbers(&field, &mut |_, new| access(value, new))
    }

    /// `len` bytes without meaning: zeros written, anything read.
    pub fn unused(&mut self, len: usize) -> Result {
        self.bytes("unused", "unused_buffer", &mut vec![0; len])
    }

    /// A buffer of fixed length.
    pub fn buffer(&mut self, name: &'static str, bytes: &mut [u8]) -> Result {
        self.bytes(name, "buffer", bytes)
    }

    /// A struct.
    pub fn state<T: VmState>(&mut self, name: &'static str, state: &mut T) -> Result {
        let of = Struct::of::<T>(name, None);
        self.structure(&of, &mut |_, v| walk(state, v, T::VERSION))
    }

    /// A struct that QEMU builds only for the stream; its description has no `struct` around it.
    pub fn temporary<T: VmState>(&mut self, state: &mut T) -> Result {
        let of = Struct {
            kind: "tmp",
            ..Struct::of::<T>("tmp", None)
        };
        self.structure(&of, &mut |_, v| walk(state, v, T::VERSION))
    }

    /// A fixed array of structs.
    pub fn states<T: VmState>(&mut self, name: &'static str, states: &mut [T]) -> Result {
        let of = Struct::of::<T>(name, Some(states.len()));
        self.structure(&of, &mut |index, v| match states.get_mut(index) {
            Some(state) => walk(state, v, T::VERSION),
            None => Ok(()),
        })
    }
}

impl Field {
    fn of<T: Number>(name: &'static str) -> Self {
        Self {
            name,
            kind: T::KIND,
            size: T::SIZE,
            array: None,
            signed: T::SIGNED,
            legal: (T::MIN.to_bits(), T::MAX.to_bits()),
        }
    }

    fn admits(&self, bits: u64) -> bool {
        let (low, high) = self.legal;
        if self.signed {
            (low.cast_signed()..=high.cast_signed()).contains(&bits.cast_signed())
        } else {
            (low..=high).contains(&bits)
        }
    }

    fn show(&self, bits: u64) -> String {
        if self.signed {
            bits.cast_signed().to_string()
        } else {
            format!("{bits:#x}")
        }
    }
}

impl Struct {
    fn of<T: VmState>(name: &'static str, array: Option<usize>) -> Self {
        Self {
            name,
            kind: "struct",
            array,
            vmsd: T::NAME,
            version: T::VERSION,
        }
    }
}

/// Bytes of a section's body.
///
/// # Errors
/// None that a device causes; the walk's signature is shared with loading.
pub fn save<T: VmState>(state: &mut T) -> Result<Vec<u8>> {
    let mut saver = saver::Saver::default();
    walk(state, &mut saver, T::VERSION)?;
    Ok(saver.into_bytes())
}

/// Reads a section's body of that version into `state`; what the stream leaves out stays as it is.
///
/// # Errors
/// The first thing that does not fit; `state` is then partly changed and of no use.
pub fn load<T: VmState>(state: &mut T, version: u32, from: &mut dyn StateReader) -> Result {
    check_version(T::NAME, version, T::VERSION, T::MINIMUM)?;
    walk(state, &mut loader::Loader::new(T::NAME, from), version)
}

/// The members `vmsd_name`, `version`, `fields`, `subsections` of the trailing JSON, exactly for
/// what [`save`] writes now.
///
/// # Errors
/// As for [`save`].
pub fn describe<T: VmState>(state: &mut T) -> Result<Value> {
    let mut describer = describer::Describer::new(T::NAME, T::VERSION);
    walk(state, &mut describer, T::VERSION)?;
    Ok(describer.into_value())
}

/// Walks fields, then subsections, then lets the state check itself.
fn walk<T: VmState>(state: &mut T, v: &mut dyn Visitor, version: u32) -> Result {
    state.fields(v, version)?;
    let all: Vec<Candidate> = T::SUBSECTIONS
        .iter()
        .map(|s| Candidate {
            name: s.name,
            version: s.version,
            needed: (s.needed)(state),
        })
        .collect();
    if !all.is_empty() {
        v.subsections(
            T::NAME,
            &all,
            &mut |index, v| match T::SUBSECTIONS.get(index) {
                Some(subsection) => (subsection.fields)(state, v),
                None => Ok(()),
            },
        )?;
    }
    v.end(&mut || state.loaded())
}

fn check_version(name: &str, version: u32, local: u32, minimum: u32) -> Result {
    if version > local {
        return Err(Error::TooNew {
            name: name.to_owned(),
            version,
            local,
        });
    }
    if version < minimum {
        return Err(Error::TooOld {
            name: name.to_owned(),
            version,
            minimum,
        });
    }
    Ok(())
}

fn access<T: Number>(value: &mut T, new: Option<u64>) -> u64 {
    if let Some(bits) = new {
        *value = T::from_bits(bits);
    }
    value.to_bits()
}

#[cfg(test)]
mod tests;
