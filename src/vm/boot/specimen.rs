//! A kernel for tests: the smallest file a PVH loader takes.

/// Which of the two layouts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::vm) enum Class {
    /// 32 bits.
    Elf32,
    /// 64 bits.
    Elf64,
}

/// An ELF file with `code` and 2 MiB of zeros behind it at 1 MiB, and, if wanted, a PVH note that
/// names 0x100010 as its entry. The notes are at 0x800, the code at 0x1000.
pub(in crate::vm) fn elf(class: Class, code: &[u8], with_note: bool) -> Vec<u8> {
    let is_wide = class == Class::Elf64;
    let word = |value: u64| {
        let bytes = value.to_le_bytes();
        bytes[..if is_wide { 8 } else { 4 }].to_vec()
    };
    let (header_len, entry_len) = if is_wide { (64, 56) } else { (52, 32) };
    let segment = |kind: u32, offset, address, len, zeros| {
        let mut header = kind.to_le_bytes().to_vec();
        let flags = 5u32.to_le_bytes();
        if is_wide {
            header.extend(flags);
        }
        for value in [offset, address, address, len, len + zeros] {
            header.extend(word(value));
        }
        if !is_wide {
            header.extend(flags);
        }
        header.extend(word(4));
        header
    };
    let mut file = b"\x7fELF\x00\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    file[4] = if is_wide { 2 } else { 1 };
    file.extend([2, 0, if is_wide { 62 } else { 3 }, 0, 1, 0, 0, 0]);
    for value in [0x10_0000, header_len, 0] {
        file.extend(word(value));
    }
    file.extend([0; 4]);
    for value in [header_len as u16, entry_len, 2, 0, 0, 0] {
        file.extend(value.to_le_bytes());
    }
    file.extend(segment(1, 0x1000, 0x10_0000, code.len() as u64, 2 << 20));
    if with_note {
        file.extend(segment(4, 0x800, 0, 20, 0));
    }
    file.resize(0x1000, 0);
    file[0x800..0x810].copy_from_slice(b"\x04\0\0\0\x04\0\0\0\x12\0\0\0Xen\0");
    file[0x810..0x814].copy_from_slice(&0x10_0010u32.to_le_bytes());
    file.extend_from_slice(code);
    file
}
