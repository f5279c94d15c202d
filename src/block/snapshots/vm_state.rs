//! The VM state of a snapshot, read piece by piece from behind the disk's end.

use std::io::{self, Read};

use xxhash_rust::xxh3::Xxh3;

use super::error::Error;
use super::image::Image;
use super::storage::{self, Storage};
use super::table::State;
use super::tree::{self, COMPRESSED, OFFSET, ZERO};

/// The bytes of a snapshot's VM state. If it has a hash, the end comes only after it was found to
/// be right; instead there is an error.
pub struct VmState<'f, S> {
    image: Image<'f, S>,
    /// The part of the snapshot's L1 table that is for the state.
    tables: Vec<u64>,
    /// The L2 table in use, and which one it is.
    table: Vec<u64>,
    number: Option<u64>,
    at: u64,
    state: State,
    hash: Box<Xxh3>,
}

impl<'f, S: Storage> VmState<'f, S> {
    /// `None`: the snapshot is of disks only.
    pub(super) fn open(image: Image<'f, S>, snapshot: usize) -> Result<Option<Self>, Error> {
        let snapshot = &image.snapshots[snapshot];
        let Some(state) = snapshot.state() else {
            return Ok(None);
        };
        let l1 = image.l1(snapshot.l1, snapshot.l1_len)?;
        let (_, tables) = image.split(snapshot, l1)?;
        // All there, so that an absurd length is not one of endless zeros.
        let needed = image.header.l1_entries(state.len)?;
        let are_there = |tables: &[u64]| tables.iter().all(|entry| entry & OFFSET != 0);
        if !tables.get(..needed).is_some_and(are_there) {
            return Err(Error::Corrupt(format!(
                "Snapshot '{}' has no room for its VM state",
                snapshot.id()
            )));
        }
        Ok(Some(Self {
            image,
            tables,
            table: Vec::new(),
            number: None,
            at: 0,
            state,
            hash: Box::new(Xxh3::new()),
        }))
    }

    /// Bytes of the whole state.
    pub fn len(&self) -> u64 {
        self.state.len
    }

    /// Always false: without a state there is no reader of it.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Reads what is left, for its errors.
    pub(super) fn check(mut self) -> Result<(), Error> {
        let mut bytes = vec![0; 256 << 10];
        while self.fill(&mut bytes)? > 0 {}
        Ok(())
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<usize, Error> {
        if bytes.is_empty() {
            return Ok(0);
        }
        if self.at == self.state.len {
            return match self.state.hash {
                Some(hash) if hash != self.hash.digest() => Err(Error::Corrupt(
                    "The VM state is not what was saved".to_owned(),
                )),
                _ => Ok(0),
            };
        }
        let bits = self.image.header.cluster_bits;
        let cluster = self.at >> bits;
        let within = self.at & (self.image.header.cluster_size() - 1);
        let rest = (self.image.header.cluster_size() - within).min(self.state.len - self.at);
        let len = rest.min(bytes.len() as u64) as usize;
        let bytes = &mut bytes[..len];
        match self.entry(cluster)? {
            entry if entry & COMPRESSED != 0 => {
                return Err(Error::Feature("compressed VM state".to_owned()));
            }
            entry if entry & ZERO != 0 || entry & OFFSET == 0 => bytes.fill(0),
            entry => {
                let offset = (entry & OFFSET) + within;
                storage::read(self.image.storage, bytes, offset, "read the VM state")?;
            }
        }
        if self.state.hash.is_some() {
            self.hash.update(bytes);
        }
        self.at += len as u64;
        Ok(len)
    }

    fn entry(&mut self, cluster: u64) -> Result<u64, Error> {
        let entries = self.image.header.l2_entries();
        let number = cluster / entries;
        if self.number != Some(number) {
            let offset = self.tables[number as usize] & OFFSET;
            self.table = match offset {
                0 => vec![0; entries as usize],
                _ => {
                    self.image.header.check_aligned(offset, "L2 table")?;
                    tree::read(&self.image, offset)?
                }
            };
            self.number = Some(number);
        }
        Ok(self.table[(cluster % entries) as usize])
    }
}

impl<S: Storage> Read for VmState<'_, S> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        Ok(self.fill(bytes)?)
    }
}
