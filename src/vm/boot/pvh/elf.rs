//! A kernel for tests: the smallest file a PVH loader takes.

/// A 64-bit ELF file with `code` and 2 MiB of zeros behind it at 1 MiB, and, if wanted, a PVH note
/// that names 0x100010 as its entry.
pub(in crate::vm) fn elf(code: &[u8], with_note: bool) -> Vec<u8> {
    let mut file = vec![0; 0x1000];
    file[..8].copy_from_slice(b"\x7fELF\x02\x01\x01\0");
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(16, &2u16.to_le_bytes());
    put(18, &62u16.to_le_bytes());
    put(24, &0x10_0000u64.to_le_bytes());
    put(32, &64u64.to_le_bytes());
    put(54, &56u16.to_le_bytes());
    put(56, &2u16.to_le_bytes());
    let segment = |kind: u32, offset: u64, address: u64, len: u64, zeros: u64| {
        let mut header = Vec::new();
        header.extend_from_slice(&kind.to_le_bytes());
        header.extend_from_slice(&5u32.to_le_bytes());
        for word in [offset, address, address, len, len + zeros, 4] {
            header.extend_from_slice(&word.to_le_bytes());
        }
        header
    };
    put(
        64,
        &segment(1, 0x1000, 0x10_0000, code.len() as u64, 2 << 20),
    );
    if with_note {
        put(120, &segment(4, 0x800, 0, 20, 0));
        put(0x800, b"\x04\0\0\0\x04\0\0\0\x12\0\0\0Xen\0");
        put(0x810, &0x10_0010u32.to_le_bytes());
    }
    file.extend_from_slice(code);
    file
}
