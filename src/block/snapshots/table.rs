//! The snapshot table: docs/interop/qcow2.txt in QEMU's sources, "Snapshots".
//!
//! ```text
//! L1 offset 8 | L1 entries 4 | ID length 2 | name length 2 | seconds 4 | nanoseconds 4 | VM clock
//! 8 | VM state size 4 | extra length 4 | extra: VM state size 8, disk size 8, icount 8, unknown
//! | ID | name | padding to 8 bytes
//! ```
//!
//! What QEMU does not know of the extra data it keeps. There we have the VM state's length and
//! hash, so that QEMU takes the snapshot for one of disks only: it could not load that state.

use std::borrow::Cow;

use super::error::Error;
use super::header::Header;
use super::storage::{self, Storage};

/// A snapshot as its entry in the table describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    pub(super) id: Vec<u8>,
    pub(super) name: Vec<u8>,
    /// When it was taken, in seconds since 1970.
    pub seconds: u32,
    /// And nanoseconds.
    pub nanoseconds: u32,
    /// Nanoseconds that the guest had run by its own clock.
    pub vm_clock: u64,
    /// Bytes of the VM state that a QEMU has saved; 0: none.
    pub vm_state_size: u64,
    /// Bytes of the disk.
    pub disk_size: u64,
    /// Instructions that a recorded guest had executed.
    pub icount: Option<u64>,
    /// The part of the extra data that QEMU does not know.
    pub unknown: Vec<u8>,
    pub(super) l1: u64,
    pub(super) l1_len: u32,
}

/// The VM state that belongs to a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    /// Bytes of it, never 0.
    pub len: u64,
    /// XXH3-64 of them, if the state is of hmpsh and not of QEMU.
    pub hash: Option<u64>,
}

impl Snapshot {
    /// Its ID, a number as a rule.
    pub fn id(&self) -> Cow<'_, str> {
        String::from_utf8_lossy(&self.id)
    }

    /// Its name, what QEMU calls its tag.
    pub fn name(&self) -> Cow<'_, str> {
        String::from_utf8_lossy(&self.name)
    }

    /// Its VM state, if it is not one of disks only.
    pub fn state(&self) -> Option<State> {
        if self.vm_state_size > 0 {
            return Some(State {
                len: self.vm_state_size,
                hash: None,
            });
        }
        let ours = self.unknown.strip_prefix(MARK)?;
        let word = |at: usize| Some(u64::from_be_bytes(*ours.get(at..)?.first_chunk()?));
        Some(State {
            len: word(0).filter(|len| *len > 0)?,
            hash: Some(word(8)?),
        })
    }

    /// Notes a state of ours.
    pub(super) fn note(&mut self, len: u64, hash: u64) {
        self.unknown = [MARK, &len.to_be_bytes(), &hash.to_be_bytes()].concat();
    }

    fn encode(&self, table: &mut Vec<u8>) {
        let small = u32::try_from(self.vm_state_size).unwrap_or(0);
        table.extend(self.l1.to_be_bytes());
        table.extend(self.l1_len.to_be_bytes());
        table.extend((self.id.len() as u16).to_be_bytes());
        table.extend((self.name.len() as u16).to_be_bytes());
        table.extend(self.seconds.to_be_bytes());
        table.extend(self.nanoseconds.to_be_bytes());
        table.extend(self.vm_clock.to_be_bytes());
        table.extend(small.to_be_bytes());
        table.extend(((STANDARD + self.unknown.len()) as u32).to_be_bytes());
        table.extend(self.vm_state_size.to_be_bytes());
        table.extend(self.disk_size.to_be_bytes());
        table.extend(self.icount.unwrap_or(u64::MAX).to_be_bytes());
        table.extend(&self.unknown);
        table.extend(&self.id);
        table.extend(&self.name);
        table.resize(table.len().next_multiple_of(8), 0);
    }
}

/// The table of these snapshots.
///
/// # Errors
/// It would be larger than QEMU reads.
pub(super) fn encode(snapshots: &[Snapshot]) -> Result<Vec<u8>, Error> {
    let mut table = Vec::new();
    for snapshot in snapshots {
        snapshot.encode(&mut table);
        if table.len() > MAX_LEN {
            return Err(Error::TooLarge("Snapshot table"));
        }
    }
    Ok(table)
}

/// The image's snapshots, and how many bytes their table has.
pub(super) fn read(
    storage: &impl Storage,
    header: &Header,
    len: u64,
) -> Result<(Vec<Snapshot>, u64), Error> {
    let mut reader = Reader {
        storage,
        base: header.snapshot_table,
        at: 0,
        len,
    };
    let mut snapshots = Vec::new();
    for _ in 0..header.snapshots {
        reader.at = reader.at.next_multiple_of(8);
        snapshots.push(reader.snapshot(header)?);
    }
    Ok((snapshots, reader.at))
}

struct Reader<'f, S> {
    storage: &'f S,
    /// Where the table begins in the file.
    base: u64,
    at: u64,
    /// Of the file.
    len: u64,
}

impl<S: Storage> Reader<'_, S> {
    fn snapshot(&mut self, header: &Header) -> Result<Snapshot, Error> {
        let fixed = self.bytes(FIXED)?;
        let number = |at: usize, len: usize| {
            let bytes = fixed[at..at + len].iter();
            bytes.fold(0, |sum, byte| sum << 8 | u64::from(*byte))
        };
        let extra_len = number(36, 4);
        if extra_len > MAX_EXTRA {
            return Err(Error::TooLarge("Extra metadata in the snapshot table"));
        }
        let extra = self.bytes(extra_len)?;
        // A field counts if all of it is there.
        let field = |at: usize| Some(u64::from_be_bytes(*extra.get(at..)?.first_chunk()?));
        Ok(Snapshot {
            id: self.bytes(number(12, 2))?,
            name: self.bytes(number(14, 2))?,
            seconds: number(16, 4) as u32,
            nanoseconds: number(20, 4) as u32,
            vm_clock: number(24, 8),
            vm_state_size: field(0).unwrap_or(number(32, 4)),
            disk_size: field(8).unwrap_or(header.size),
            icount: field(16).filter(|count| *count != u64::MAX),
            unknown: extra.get(STANDARD..).unwrap_or_default().to_vec(),
            l1: number(0, 8),
            l1_len: number(8, 4) as u32,
        })
    }

    fn bytes(&mut self, len: u64) -> Result<Vec<u8>, Error> {
        let (begin, end) = (self.base + self.at, self.at + len);
        if end > MAX_LEN as u64 {
            return Err(Error::TooLarge("Snapshot table"));
        }
        if self.base + end > self.len {
            let text = "The snapshot table reaches beyond the end of the file";
            return Err(Error::Corrupt(text.to_owned()));
        }
        self.at = end;
        let mut bytes = vec![0; len as usize];
        storage::read(self.storage, &mut bytes, begin, "read the snapshot table")?;
        Ok(bytes)
    }
}

/// Bytes of an entry in front of its extra data.
const FIXED: u64 = 40;
/// Bytes of the extra data that QEMU knows.
const STANDARD: usize = 24;
/// Most bytes of extra data, QEMU's limit.
const MAX_EXTRA: u64 = 1024;
/// Most bytes of a table, QEMU's limit.
const MAX_LEN: usize = 1024 * 65536;
/// What our extra data begin with. The length and the hash follow, 8 bytes each.
const MARK: &[u8] = b"hmpshVM1";
