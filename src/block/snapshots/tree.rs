//! What an L1 table leads to, L2 tables and clusters: docs/interop/qcow2.txt in QEMU's sources,
//! "Cluster mapping".

use std::ops::{Range, RangeInclusive};

use super::change::Change;
use super::error::Error;
use super::header::Header;
use super::image::Image;
use super::refcounts::Refcounts;
use super::storage::{self, Storage};
use crate::block::SECTOR;

/// Everything that the L1 table leads to is aligned, in the file and in use, and nothing is there
/// twice, so that a walk has an end.
pub(super) fn check<S: Storage>(
    image: &Image<'_, S>,
    refcounts: &mut Refcounts<'_, S>,
    l1: &[u64],
) -> Result<(), Error> {
    let mut tables: Vec<u64> = l1.iter().map(|entry| entry & OFFSET).collect();
    tables.retain(|offset| *offset != 0);
    tables.sort_unstable();
    if let Some(twice) = tables.windows(2).find(|pair| pair[0] == pair[1]) {
        let text = format!("The L2 table {:#x} is there twice", twice[0]);
        return Err(Error::Corrupt(text));
    }
    for offset in tables {
        image.header.check_aligned(offset, "L2 table")?;
        let end = offset + image.header.cluster_size();
        check_range(image, refcounts, offset..end, "An L2 table")?;
        // As many as there can be take a long time to read.
        if image.storage.is_hole(offset, image.header.cluster_size()) {
            continue;
        }
        let table = read(image, offset)?;
        for (at, range) in hosts(&image.header, &table) {
            if table[at] & COMPRESSED == 0 {
                image.header.check_aligned(range.start, "Cluster")?;
            }
            check_range(image, refcounts, range, "A cluster")?;
        }
    }
    Ok(())
}

/// Everything that the L1 table leads to will be used so much more, or less, often.
pub(super) fn count<S: Storage>(
    change: &mut Change<'_, S>,
    l1: &[u64],
    by: i64,
) -> Result<(), Error> {
    for offset in l1.iter().map(|entry| entry & OFFSET) {
        if offset == 0 {
            continue;
        }
        let table = read(&change.image, offset)?;
        for (_, range) in hosts(&change.image.header, &table) {
            for cluster in clusters(&change.image.header, range) {
                change.refcounts.change(cluster, by)?;
            }
        }
        let table = offset >> change.image.header.cluster_bits;
        change.refcounts.change(table, by)?;
    }
    Ok(())
}

/// Corrects, after all counts have changed, the flags in an L1 table and its L2 tables that tell
/// what is used once and may be written in place. An L2 table that changes gets a new place;
/// `users` L1 tables will name it there, and no longer name the old one.
pub(super) fn flag<S: Storage>(
    change: &mut Change<'_, S>,
    l1: &mut [u64],
    users: i64,
) -> Result<(), Error> {
    let bits = change.image.header.cluster_bits;
    for entry in l1 {
        let mut offset = *entry & OFFSET;
        if offset == 0 {
            *entry = 0;
            continue;
        }
        let before = read(&change.image, offset)?;
        let mut after: Vec<u64> = before.iter().map(|entry| flagged(*entry, 0)).collect();
        for (at, range) in hosts(&change.image.header, &before) {
            if before[at] & COMPRESSED == 0 {
                let count = change.refcounts.get(range.start >> bits)?;
                after[at] = flagged(before[at], count);
            }
        }
        if before != after {
            change.refcounts.change(offset >> bits, -users)?;
            offset = change.place(&storage::bytes(&after), users, "write an L2 table")?;
        }
        let count = change.refcounts.get(offset >> bits)?;
        *entry = flagged(offset, count);
    }
    Ok(())
}

/// The L2 table that stands there.
pub(super) fn read<S: Storage>(image: &Image<'_, S>, offset: u64) -> Result<Vec<u64>, Error> {
    let mut bytes = vec![0; image.header.cluster_size() as usize];
    storage::read(image.storage, &mut bytes, offset, "read an L2 table")?;
    Ok(storage::words(&bytes))
}

/// Which bytes of the file the entries of an L2 table name, with the entries' numbers; in the order
/// of the file, so that each block of reference counts is asked for once.
fn hosts(header: &Header, table: &[u64]) -> Vec<(usize, Range<u64>)> {
    let all = table.iter().enumerate();
    let named = all.filter_map(|(at, entry)| Some((at, host(header, *entry)?)));
    let mut named: Vec<_> = named.collect();
    named.sort_unstable_by_key(|(_, range)| range.start);
    named
}

/// Which bytes of the file an entry of an L2 table names, if it names any.
fn host(header: &Header, entry: u64) -> Option<Range<u64>> {
    if entry & COMPRESSED == 0 {
        let offset = entry & OFFSET;
        return (offset != 0).then(|| offset..offset + header.cluster_size());
    }
    let bits = 62 - (header.cluster_bits - 8);
    let offset = entry & ((1 << bits) - 1);
    let more = entry >> bits & ((1 << (header.cluster_bits - 8)) - 1);
    // Whole sectors, from the one on in which they begin.
    Some(offset..(offset / SECTOR + more + 1) * SECTOR)
}

fn clusters(header: &Header, range: Range<u64>) -> RangeInclusive<u64> {
    range.start >> header.cluster_bits..=(range.end - 1) >> header.cluster_bits
}

/// The last cluster may be in the file only in part, as for QEMU.
fn check_range<S: Storage>(
    image: &Image<'_, S>,
    refcounts: &mut Refcounts<'_, S>,
    range: Range<u64>,
    what: &str,
) -> Result<(), Error> {
    let size = image.header.cluster_size();
    if range.start < size || range.end >= image.len.next_multiple_of(SECTOR) + size {
        let text = format!("{what} at {:#x} is not in the file", range.start);
        return Err(Error::Corrupt(text));
    }
    for cluster in clusters(&image.header, range) {
        refcounts.check_used(cluster, what)?;
    }
    Ok(())
}

fn flagged(entry: u64, count: u64) -> u64 {
    match count {
        1 => entry | COPIED,
        _ => entry & !COPIED,
    }
}

/// The offset in an entry of an L1 table, and of an L2 table if the cluster is not compressed.
pub(super) const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// The cluster is compressed.
pub(super) const COMPRESSED: u64 = 1 << 62;
/// The cluster reads as zero.
pub(super) const ZERO: u64 = 1;
/// It is used once. Meant seriously in the active L1 table only.
const COPIED: u64 = 1 << 63;
