//! A change of an image's snapshots, which happens wholly or not at all.
//!
//! Every table that changes is written to clusters that are free in the image as it is: L1 and L2
//! tables, the snapshot table, blocks of reference counts and their table. Then a flush, then one
//! write to the header, which names all of the new ones at once, and a flush again. Whatever fails
//! before that write, the host's power included, leaves the image as it was; only the file may be
//! longer. After it the image is as it should be, and what the old tables took counts as free.
//! (QEMU changes reference counts and flags in place and may leave clusters that count too high.)

use super::error::{Error, to};
use super::image::Image;
use super::refcounts::Refcounts;
use super::storage::{self, Storage};
use super::table;

pub(super) struct Change<'f, S: Storage> {
    pub(super) image: Image<'f, S>,
    pub(super) refcounts: Refcounts<'f, S>,
    /// The header may name what was written.
    is_published: bool,
}

impl<'f, S: Storage> Change<'f, S> {
    pub(super) fn begin(image: Image<'f, S>) -> Result<Self, Error> {
        Ok(Self {
            refcounts: image.refcounts()?,
            image,
            is_published: false,
        })
    }

    /// Writes that to free clusters that will be used `users` times. Returns where; of nothing 0.
    pub(super) fn place(
        &mut self,
        bytes: &[u8],
        users: i64,
        what: &'static str,
    ) -> Result<u64, Error> {
        let clusters = self.image.header.clusters(bytes.len() as u64);
        if clusters == 0 {
            return Ok(0);
        }
        let first = self.refcounts.allocate(clusters, users)?;
        let offset = first << self.image.header.cluster_bits;
        storage::write(self.image.storage, bytes, offset, what)?;
        // Whole clusters, so that none ends behind the file's end.
        let end = (first + clusters) << self.image.header.cluster_bits;
        let rest = offset + bytes.len() as u64;
        let zeros = vec![0; (end - rest) as usize];
        storage::write(self.image.storage, &zeros, rest, what)?;
        Ok(offset)
    }

    /// The clusters of so many bytes there will be used once less.
    pub(super) fn free(&mut self, offset: u64, bytes: u64) -> Result<(), Error> {
        for cluster in self.image.clusters(offset, bytes) {
            self.refcounts.change(cluster, -1)?;
        }
        Ok(())
    }

    /// Replaces the active L1 table.
    pub(super) fn activate(&mut self, l1: &[u64]) -> Result<(), Error> {
        let header = &self.image.header;
        self.free(header.l1, u64::from(header.l1_len) * 8)?;
        let offset = self.place(&storage::bytes(l1), 1, "write the L1 table")?;
        self.image.header.l1 = offset;
        self.image.header.l1_len = l1.len() as u32;
        Ok(())
    }

    /// Replaces the snapshot table by one of the snapshots that there are now.
    pub(super) fn tabulate(&mut self) -> Result<(), Error> {
        let bytes = table::encode(&self.image.snapshots)?;
        self.free(self.image.header.snapshot_table, self.image.table_len)?;
        let offset = self.place(&bytes, 1, "write the snapshot table")?;
        self.image.header.snapshot_table = offset;
        self.image.header.snapshots = self.image.snapshots.len() as u32;
        Ok(())
    }

    /// Brings it into force.
    pub(super) fn publish(mut self) -> Result<(), Error> {
        let (table, clusters) = self.refcounts.store()?;
        self.image.header.refcount_table = table;
        self.image.header.refcount_table_clusters = clusters;
        let storage = self.image.storage;
        to("flush the new tables", storage.flush())?;
        self.is_published = true;
        self.image.header.write(storage)?;
        to("flush the image's header", storage.flush())
    }
}

impl<S: Storage> Drop for Change<'_, S> {
    fn drop(&mut self) {
        if !self.is_published
            && self
                .image
                .storage
                .size()
                .is_ok_and(|size| size > self.image.len)
        {
            // If not, the file stays longer than need be.
            let _ = self.image.storage.set_size(self.image.len);
        }
    }
}
