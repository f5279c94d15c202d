//! The header of a qcow2 file: docs/interop/qcow2.txt in QEMU's sources, "Header".

use super::error::Error;
use super::storage::{self, Storage};
use crate::block::SECTOR;

/// What the header says, as far as it concerns snapshots. Offsets are in bytes.
#[derive(Clone, Debug)]
pub(super) struct Header {
    pub(super) version: u32,
    pub(super) cluster_bits: u32,
    /// Of the disk, in bytes.
    pub(super) size: u64,
    pub(super) l1_len: u32,
    pub(super) l1: u64,
    pub(super) refcount_table: u64,
    pub(super) refcount_table_clusters: u32,
    pub(super) refcount_order: u32,
    pub(super) snapshots: u32,
    pub(super) snapshot_table: u64,
    /// Incompatible and compatible features.
    features: [u64; 2],
}

/// What a header says of an image as such.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Bytes of a cluster.
    pub cluster_size: u64,
    /// Version 3, what QEMU calls 1.1; else 2, which it calls 0.10.
    pub is_version_3: bool,
    /// Compressed clusters are zstd's, not zlib's.
    pub is_zstd: bool,
    /// Reference counts may be written late.
    pub is_lazy: bool,
    /// Bits of a reference count.
    pub refcount_bits: u32,
}

impl Header {
    /// Reads it, and refuses what the other functions could not handle.
    pub(super) fn read(storage: &impl Storage) -> Result<Self, Error> {
        let mut bytes = [0; V3_LEN];
        storage::read(storage, &mut bytes, 0, "read the image's header")?;
        let word = |at: usize| {
            let bytes = bytes[at..at + 4].iter();
            bytes.fold(0, |word: u32, byte| word << 8 | u32::from(*byte))
        };
        let long = |at: usize| u64::from(word(at)) << 32 | u64::from(word(at + 4));
        if word(0) != MAGIC {
            return Err(Error::Format);
        }
        let version = word(4);
        let (features, refcount_order) = match version {
            2 => ([0; 2], 4),
            3 => ([long(72), long(80)], word(96)),
            _ => return Err(Error::Version(version)),
        };
        let header = Self {
            version,
            cluster_bits: word(20),
            size: long(24),
            l1_len: word(36),
            l1: long(40),
            refcount_table: long(48),
            refcount_table_clusters: word(56),
            refcount_order,
            snapshots: word(60),
            snapshot_table: long(64),
            features,
        };
        header.check_features(word(32))?;
        header.check_tables()?;
        Ok(header)
    }

    /// What is worth telling of the image.
    pub(super) fn facts(&self) -> Facts {
        Facts {
            cluster_size: self.cluster_size(),
            is_version_3: self.version >= 3,
            is_zstd: self.features[0] & KNOWN != 0,
            is_lazy: self.features[1] & LAZY != 0,
            refcount_bits: 1 << self.refcount_order,
        }
    }

    /// Makes it the file's: the one write by which a change of snapshots comes into force. All of
    /// it is in one sector, which a disk writes wholly or not at all.
    pub(super) fn write(&self, storage: &impl Storage) -> Result<(), Error> {
        let mut bytes = Vec::with_capacity(V3_LEN - CHANGES_AT as usize);
        bytes.extend(self.size.to_be_bytes());
        // No encryption.
        bytes.extend(0u32.to_be_bytes());
        bytes.extend(self.l1_len.to_be_bytes());
        bytes.extend(self.l1.to_be_bytes());
        bytes.extend(self.refcount_table.to_be_bytes());
        bytes.extend(self.refcount_table_clusters.to_be_bytes());
        bytes.extend(self.snapshots.to_be_bytes());
        bytes.extend(self.snapshot_table.to_be_bytes());
        if self.version >= 3 {
            bytes.extend(self.features.iter().flat_map(|word| word.to_be_bytes()));
            // Autoclear features, of which we know none: bitmaps no longer tell what has changed.
            bytes.extend(0u64.to_be_bytes());
        }
        storage::write(storage, &bytes, CHANGES_AT, "write the image's header")
    }

    /// The disk's size without a last sector in part, which is how QEMU takes it.
    pub(super) fn whole_sectors(&self) -> u64 {
        self.size / SECTOR * SECTOR
    }

    /// Bytes of a cluster.
    pub(super) fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Clusters that so many bytes take.
    pub(super) fn clusters(&self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster_size())
    }

    /// Entries of an L2 table.
    pub(super) fn l2_entries(&self) -> u64 {
        self.cluster_size() / 8
    }

    /// Entries in an L1 table for a disk, or a VM state, of so many bytes.
    ///
    /// # Errors
    /// More than an L1 table may have.
    pub(super) fn l1_entries(&self, bytes: u64) -> Result<usize, Error> {
        let entries = bytes.div_ceil(self.l2_entries() << self.cluster_bits);
        check_l1_len(entries)?;
        Ok(entries as usize)
    }

    /// # Errors
    /// `entries` of 8 bytes at `offset` are no L1 table that QEMU would take for one.
    pub(super) fn check_l1(&self, offset: u64, entries: u32) -> Result<(), Error> {
        check_l1_len(u64::from(entries))?;
        if entries > 0 && offset == 0 {
            let text = "An L1 table is where the header is";
            return Err(Error::Corrupt(text.to_owned()));
        }
        self.check_aligned(offset, "L1 table")
    }

    /// # Errors
    /// `offset` is in the middle of a cluster or beyond what a file can have.
    pub(super) fn check_aligned(&self, offset: u64, what: &str) -> Result<(), Error> {
        match offset & (self.cluster_size() - 1) == 0 && offset < MAX_OFFSET {
            true => Ok(()),
            false => Err(Error::Corrupt(format!("{what} offset {offset:#x} invalid"))),
        }
    }

    /// # Errors
    /// The disk can not get another size: in a version 2 a snapshot need not know its own.
    pub(super) fn check_resize(&self) -> Result<(), Error> {
        match self.version {
            2 if self.snapshots > 0 => Err(Error::Resize),
            _ => Ok(()),
        }
    }

    fn check_features(&self, encryption: u32) -> Result<(), Error> {
        if encryption != 0 {
            return Err(Error::Encryption);
        }
        let [incompatible, _] = self.features;
        if incompatible & !KNOWN == 0 {
            return Ok(());
        }
        let name = |bit: u32| match INCOMPATIBLE.iter().find(|(known, _)| *known == bit) {
            Some((_, name)) => (*name).to_owned(),
            None => format!("Unknown incompatible feature: {:x}", 1u64 << bit),
        };
        let bits = (0..64).filter(|bit| incompatible & !KNOWN & 1 << bit != 0);
        let names: Vec<String> = bits.map(name).collect();
        Err(Error::Feature(names.join(", ")))
    }

    fn check_tables(&self) -> Result<(), Error> {
        let corrupt = |text: String| Err(Error::Corrupt(text));
        if !(9..=21).contains(&self.cluster_bits) {
            return corrupt(format!("Cluster size 2^{} invalid", self.cluster_bits));
        }
        if self.refcount_order > 6 {
            return corrupt("Reference count entry width too large".to_owned());
        }
        self.check_l1(self.l1, self.l1_len)?;
        if (self.l1_len as usize) < self.l1_entries(self.size)? {
            return corrupt("L1 table is too small".to_owned());
        }
        if self.refcount_table_clusters == 0 {
            return corrupt("It has no reference count table".to_owned());
        }
        let bytes = u64::from(self.refcount_table_clusters) << self.cluster_bits;
        if bytes > MAX_REFCOUNT_TABLE {
            return Err(Error::TooLarge("Reference count table"));
        }
        self.check_aligned(self.refcount_table, "Reference count table")?;
        if self.snapshots > MAX_SNAPSHOTS {
            return Err(Error::TooLarge("Snapshot table"));
        }
        self.check_aligned(self.snapshot_table, "Snapshot table")
    }
}

/// # Errors
/// An L1 table can not have so many entries.
pub(super) fn check_l1_len(entries: u64) -> Result<(), Error> {
    match entries <= MAX_L1_LEN {
        true => Ok(()),
        false => Err(Error::TooLarge("L1 table")),
    }
}

/// Most snapshots of an image, QEMU's limit.
pub(super) const MAX_SNAPSHOTS: u32 = 65536;
/// Most bytes of the table of reference counts, QEMU's limit.
pub(super) const MAX_REFCOUNT_TABLE: u64 = 8 << 20;
/// No cluster begins here or behind.
pub(super) const MAX_OFFSET: u64 = 1 << 56;

/// Compatible feature: reference counts may be written late.
const LAZY: u64 = 1;
/// Most entries of an L1 table: QEMU's 32 MiB.
const MAX_L1_LEN: u64 = (32 << 20) / 8;
/// `QFI\xfb`.
const MAGIC: u32 = 0x5146_49fb;
/// Bytes of what every version 3 has.
const V3_LEN: usize = 104;
/// Where the part begins that changes: the disk's size. It ends before the reference count order.
const CHANGES_AT: u64 = 24;
/// The incompatible feature that concerns nobody who does not uncompress: another compression.
const KNOWN: u64 = 1 << 3;
/// Those that do, by the names that QEMU gives them.
const INCOMPATIBLE: [(u32, &str); 4] = [
    (0, "dirty bit"),
    (1, "corrupt bit"),
    (2, "external data file"),
    (4, "extended L2 entries"),
];
