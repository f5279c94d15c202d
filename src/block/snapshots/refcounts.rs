//! The reference counts of an image's clusters, changed without touching those in the file:
//! docs/interop/qcow2.txt in QEMU's sources, "Host cluster management".
//!
//! A block of counts that changes gets a place of its own among the clusters that are free in the
//! file as it is, and so does at last the table of blocks. Until the header names that table,
//! nothing has changed; a cluster that becomes free is not used again before.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};

use super::error::Error;
use super::header::{Header, MAX_OFFSET, MAX_REFCOUNT_TABLE};
use super::storage::{self, Storage};

/// The counts as they are and as they will be. Clusters are counted from the file's begin.
pub(super) struct Refcounts<'f, S> {
    storage: &'f S,
    cluster_bits: u32,
    /// The binary logarithm of a count's bits.
    order: u32,
    /// First cluster of the table, and how many it has.
    table: u64,
    table_clusters: u64,
    /// Where the blocks are in the file as it is; 0: all counts are 0.
    old: Vec<u64>,
    /// Where they will be. Those that differ may be written.
    new: Vec<u64>,
    /// Blocks as they will be, those that were needed lately.
    blocks: BTreeMap<usize, Block>,
    /// A block as it is.
    old_block: (u64, Vec<u8>),
    /// All clusters in front of this one are used, or given out.
    next: u64,
}

struct Block {
    bytes: Vec<u8>,
    is_dirty: bool,
}

impl<'f, S: Storage> Refcounts<'f, S> {
    /// Reads the table of an image whose file has `len` bytes.
    pub(super) fn read(storage: &'f S, header: &Header, len: u64) -> Result<Self, Error> {
        let clusters = u64::from(header.refcount_table_clusters);
        let mut bytes = vec![0; (clusters << header.cluster_bits) as usize];
        let offset = header.refcount_table;
        storage::read(storage, &mut bytes, offset, "read the refcount table")?;
        let old = storage::words(&bytes);
        // Each is there once, so that a search among them has an end.
        let mut blocks = BTreeSet::new();
        for block in old.iter().filter(|offset| **offset != 0) {
            header.check_aligned(*block, "Refcount block")?;
            let wrong = match blocks.insert(block) {
                true if *block < len => continue,
                true => "beyond the end of the file",
                false => "is there twice",
            };
            return Err(Error::Corrupt(format!("Refcount block {block:#x} {wrong}")));
        }
        Ok(Self {
            storage,
            cluster_bits: header.cluster_bits,
            order: header.refcount_order,
            table: header.refcount_table >> header.cluster_bits,
            table_clusters: clusters,
            new: old.clone(),
            old,
            blocks: BTreeMap::new(),
            old_block: (0, Vec::new()),
            // The first has the header.
            next: 1,
        })
    }

    /// How often the cluster will be used.
    pub(super) fn get(&mut self, cluster: u64) -> Result<u64, Error> {
        let (block, at) = self.place(cluster);
        if self.new.get(block).is_none_or(|offset| *offset == 0) {
            return Ok(0);
        }
        let order = self.order;
        Ok(count(&self.block(block)?.bytes, order, at))
    }

    /// # Errors
    /// A cluster that is used by `what` counts as free, that is as one that may be written over.
    pub(super) fn check_used(&mut self, cluster: u64, what: &str) -> Result<(), Error> {
        match self.get(cluster)? {
            0 => Err(Error::Corrupt(format!(
                "{what} at {:#x} is in a cluster that counts as free",
                cluster << self.cluster_bits
            ))),
            _ => Ok(()),
        }
    }

    /// The blocks' own clusters and the table's are in use.
    pub(super) fn check(&mut self) -> Result<(), Error> {
        for cluster in self.table..self.table + self.table_clusters {
            self.check_used(cluster, "The refcount table")?;
        }
        for at in 0..self.old.len() {
            if self.old[at] != 0 {
                self.check_used(self.old[at] >> self.cluster_bits, "A refcount block")?;
            }
        }
        Ok(())
    }

    /// The cluster will be used so much more, or less, often.
    pub(super) fn change(&mut self, cluster: u64, by: i64) -> Result<(), Error> {
        // A block that gets another place changes counts itself.
        let mut todo = vec![(cluster, by)];
        while let Some((cluster, by)) = todo.pop() {
            let (block, at) = self.place(cluster);
            self.grow(block)?;
            if self.old[block] == self.new[block] {
                let place = self.find(1)?;
                let bytes = match self.old[block] {
                    0 => {
                        self.make_room()?;
                        vec![0; 1 << self.cluster_bits]
                    }
                    old => {
                        todo.push((old >> self.cluster_bits, -1));
                        std::mem::take(&mut self.block(block)?.bytes)
                    }
                };
                let is_dirty = true;
                self.blocks.insert(block, Block { bytes, is_dirty });
                self.new[block] = place << self.cluster_bits;
                todo.push((place, 1));
            }
            let order = self.order;
            let max = u64::MAX >> (64 - (1 << order));
            let known = self.block(block)?;
            let before = count(&known.bytes, order, at);
            let Some(after) = before.checked_add_signed(by) else {
                return Err(Error::Corrupt(format!(
                    "The cluster at {:#x} is used more often than it counts",
                    cluster << self.cluster_bits
                )));
            };
            if after > max {
                let offset = cluster << self.cluster_bits;
                return Err(Error::Overflow { offset, max });
            }
            set_count(&mut known.bytes, order, at, after);
            known.is_dirty = true;
        }
        Ok(())
    }

    /// Finds so many free clusters in a row, which will be used `times` times each.
    pub(super) fn allocate(&mut self, clusters: u64, times: i64) -> Result<u64, Error> {
        let first = self.find(clusters)?;
        for cluster in first..first + clusters {
            self.change(cluster, times)?;
        }
        Ok(first)
    }

    /// Writes all that has changed to its new places; the header is to name the table, whose offset
    /// and clusters are returned.
    pub(super) fn store(&mut self) -> Result<(u64, u32), Error> {
        for cluster in self.table..self.table + self.table_clusters {
            self.change(cluster, -1)?;
        }
        // The table's place has counts as well, for which the table may have to grow.
        let (table, clusters) = loop {
            let clusters = self.clusters_for_table().max(self.table_clusters);
            let table = self.allocate(clusters, 1)?;
            if self.clusters_for_table() <= clusters {
                break (table, clusters);
            }
            for cluster in table..table + clusters {
                self.change(cluster, -1)?;
            }
        };
        self.write_blocks()?;
        let mut bytes = storage::bytes(&self.new);
        bytes.resize((clusters << self.cluster_bits) as usize, 0);
        let offset = table << self.cluster_bits;
        storage::write(self.storage, &bytes, offset, "write the refcount table")?;
        Ok((offset, clusters as u32))
    }

    fn clusters_for_table(&self) -> u64 {
        (self.new.len() as u64 * 8).div_ceil(1 << self.cluster_bits)
    }

    /// The block that has a cluster's count, and the count's number therein.
    fn place(&self, cluster: u64) -> (usize, usize) {
        let bits = self.cluster_bits + 3 - self.order;
        let at = cluster & ((1 << bits) - 1);
        ((cluster >> bits) as usize, at as usize)
    }

    /// Makes the table so long that it has that block.
    fn grow(&mut self, block: usize) -> Result<(), Error> {
        if block >= (MAX_REFCOUNT_TABLE / 8) as usize {
            return Err(Error::TooLarge("Reference count table"));
        }
        let len = self.old.len().max(block + 1);
        self.old.resize(len, 0);
        self.new.resize(len, 0);
        Ok(())
    }

    /// The first of so many clusters in a row that are free in the file as it is and not given out.
    fn find(&mut self, clusters: u64) -> Result<u64, Error> {
        let mut first = self.next;
        let mut end = first;
        while end - first < clusters {
            end += 1;
            if self.old_count(end - 1)? != 0 {
                first = end;
            }
        }
        if end > MAX_OFFSET >> self.cluster_bits {
            return Err(Error::TooLarge("Image file"));
        }
        self.next = end;
        Ok(first)
    }

    /// How often the cluster is used in the file as it is.
    fn old_count(&mut self, cluster: u64) -> Result<u64, Error> {
        let (block, at) = self.place(cluster);
        let offset = self.old.get(block).copied().unwrap_or(0);
        if offset == 0 {
            return Ok(0);
        }
        let (known, bytes) = &mut self.old_block;
        if *known != offset {
            *known = 0;
            bytes.resize(1 << self.cluster_bits, 0);
            storage::read(self.storage, bytes, offset, "read a refcount block")?;
            *known = offset;
        }
        Ok(count(bytes, self.order, at))
    }

    /// A block that there is, as it will be.
    fn block(&mut self, block: usize) -> Result<&mut Block, Error> {
        if !self.blocks.contains_key(&block) {
            self.make_room()?;
        }
        match self.blocks.entry(block) {
            Entry::Occupied(known) => Ok(known.into_mut()),
            Entry::Vacant(room) => {
                let mut bytes = vec![0; 1 << self.cluster_bits];
                let offset = self.new[block];
                storage::read(self.storage, &mut bytes, offset, "read a refcount block")?;
                let is_dirty = false;
                Ok(room.insert(Block { bytes, is_dirty }))
            }
        }
    }

    fn make_room(&mut self) -> Result<(), Error> {
        if self.blocks.len() >= ((CACHE >> self.cluster_bits) as usize).max(8) {
            self.write_blocks()?;
            self.blocks.clear();
        }
        Ok(())
    }

    fn write_blocks(&mut self) -> Result<(), Error> {
        for (number, block) in &mut self.blocks {
            if block.is_dirty {
                let offset = self.new[*number];
                storage::write(self.storage, &block.bytes, offset, "write a refcount block")?;
                block.is_dirty = false;
            }
        }
        Ok(())
    }
}

/// Count number `at` of a block. Those of less than a byte begin with its lowest bit.
fn count(block: &[u8], order: u32, at: usize) -> u64 {
    if order < 3 {
        let per_byte = 8 >> order;
        let byte = block[at / per_byte] >> ((at % per_byte) << order);
        return u64::from(byte) & ((1 << (1 << order)) - 1);
    }
    let len = 1 << (order - 3);
    let bytes = block[at * len..][..len].iter();
    bytes.fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}

fn set_count(block: &mut [u8], order: u32, at: usize, count: u64) {
    if order < 3 {
        let per_byte = 8 >> order;
        let shift = (at % per_byte) << order;
        let mask = ((1u8 << (1 << order)) - 1) << shift;
        let byte = &mut block[at / per_byte];
        *byte = *byte & !mask | (count as u8) << shift;
        return;
    }
    let len = 1 << (order - 3);
    block[at * len..][..len].copy_from_slice(&count.to_be_bytes()[8 - len..]);
}

/// About how many bytes of blocks are kept in memory: all those of 8 TiB in the usual image. With
/// fewer, what lies all over the file has each of them read again and again.
const CACHE: u64 = 256 << 20;

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::io;

    use super::*;

    /// Clusters that are all in use, and how often they were read.
    struct Full(Cell<u64>);

    impl Storage for Full {
        fn read_at(&self, bytes: &mut [u8], _: u64) -> io::Result<usize> {
            self.0.set(self.0.get() + 1);
            bytes.fill(1);
            Ok(bytes.len())
        }

        fn write_at(&self, _: &[u8], _: u64) -> io::Result<usize> {
            Err(io::ErrorKind::Unsupported.into())
        }

        fn flush(&self) -> io::Result<()> {
            Ok(())
        }

        fn size(&self) -> io::Result<u64> {
            Ok(u64::MAX)
        }

        fn set_size(&self, _: u64) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn blocks_of_a_large_image_are_read_once() {
        let storage = Full(Cell::new(0));
        let (bits, blocks) = (21, 20);
        let places: Vec<u64> = (1..=blocks).map(|place| place << bits).collect();
        let mut refcounts = Refcounts {
            storage: &storage,
            cluster_bits: bits,
            order: 6,
            table: 0,
            table_clusters: 1,
            new: places.clone(),
            old: places,
            blocks: BTreeMap::new(),
            old_block: (0, Vec::new()),
            next: 1,
        };
        // As clusters lie that were written at random.
        for cluster in 0..20 * blocks {
            let block = cluster * 7 % blocks;
            let counts = 1 << (bits + 3 - 6);
            refcounts.check_used(block * counts + cluster, "A").unwrap();
        }
        assert_eq!(storage.0.get(), blocks);
    }

    #[test]
    fn counts_of_every_width_stand_side_by_side() {
        for order in 0..=6 {
            let max = u64::MAX >> (64 - (1u32 << order));
            let mut block = vec![0; 64];
            let counts = 512 >> order;
            for at in (0..counts).step_by(2) {
                set_count(&mut block, order, at, max);
            }
            for at in 0..counts {
                let expected = if at % 2 == 0 { max } else { 0 };
                assert_eq!(count(&block, order, at), expected, "{order} {at}");
            }
            set_count(&mut block, order, 2, 1);
            assert_eq!(count(&block, order, 2), 1);
            assert_eq!(count(&block, order, 4), max);
        }
        // The lowest bits are the first, the bytes of a wider one come highest first.
        let mut block = vec![0; 8];
        set_count(&mut block, 1, 1, 2);
        assert_eq!(block[0], 0b1000);
        set_count(&mut block, 4, 2, 0x1234);
        assert_eq!(block[4..6], [0x12, 0x34]);
    }
}
