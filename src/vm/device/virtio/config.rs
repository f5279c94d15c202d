//! The disk's configuration as the guest reads it: 57 bytes, laid out by virtio 1.0 §5.2.4 and
//! filled as QEMU fills it.

/// Bytes.
pub(super) const LEN: usize = 57;
/// Where the guest switches the cache on and off.
pub(super) const WCE: usize = 0x20;

/// Most sectors one request may discard or make zero.
pub(super) const MAX_RUN: u32 = 0x3f_ffff;

/// Heads and sectors per track of every disk.
const HEADS: u64 = 16;
const TRACK: u64 = 63;
/// Fewest and most cylinders.
const CYLINDERS: (u64, u64) = (2, 16383);
const BLOCK_SIZE: u32 = 512;
/// Entries of a queue at reset; two of them are never a request's data.
pub(super) const ENTRIES: u32 = 256;

/// The bytes, for a disk of `sectors`.
pub(super) fn bytes(sectors: u64, has_cache: bool) -> [u8; LEN] {
    let mut bytes = [0; LEN];
    let cylinders = (sectors / (HEADS * TRACK)).clamp(CYLINDERS.0, CYLINDERS.1);
    let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
    put(0x00, &sectors.to_le_bytes());
    put(0x0c, &(ENTRIES - 2).to_le_bytes());
    put(0x10, &(cylinders as u16).to_le_bytes());
    put(0x12, &[HEADS as u8, TRACK as u8]);
    put(0x14, &BLOCK_SIZE.to_le_bytes());
    put(WCE, &[u8::from(has_cache)]);
    // Queues.
    put(0x22, &1u16.to_le_bytes());
    // Discard: most sectors, segments, alignment.
    put(0x24, &MAX_RUN.to_le_bytes());
    put(0x28, &1u32.to_le_bytes());
    put(0x2c, &1u32.to_le_bytes());
    // Making zero: most sectors, segments, whether it may discard.
    put(0x30, &MAX_RUN.to_le_bytes());
    put(0x34, &1u32.to_le_bytes());
    put(0x38, &[1]);
    bytes
}

/// What an access of `size` bytes finds: all ones if it reaches beyond the end.
pub(super) fn read(bytes: &[u8], at: u64, size: usize) -> u32 {
    let at = at as usize;
    let mut word = [0; 4];
    match bytes.get(at..at + size) {
        Some(found) => word[..size].copy_from_slice(found),
        None => word = [0xff; 4],
    }
    u32::from_le_bytes(word)
}

/// The length that the guest was shown last, and how often it has become another one: what the
/// register ConfigGeneration says. It is not on the wire, as QEMU's is not.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Generation {
    sectors: Option<u64>,
    number: u32,
}

impl Generation {
    /// The generation, now that the disk has so many sectors.
    pub(super) fn of(&mut self, sectors: u64) -> u32 {
        let was = self.sectors.replace(sectors);
        if was.is_some_and(|was| was != sectors) {
            self.number = self.number.wrapping_add(1);
        }
        self.number
    }
}
