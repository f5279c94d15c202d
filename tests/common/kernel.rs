//! A small 64-bit kernel with a PVH entry, as ELF files of both classes. What it does is in
//! `kernel.s`; no tool but the compiler makes it.
//!
//! It says `kernel`, `memory <end>` of the RAM it lies in, `command line <line>`, `cpu 1` when the
//! second vCPU has started, and then for ever beacons `B <n>`, each followed by the second vCPU's
//! timer ticks `C 1 <n>`, and `R <hex>` for a byte that came in on COM1; `FAULT <what>` if something
//! is wrong.
#![expect(unsafe_code, reason = "global_asm! and the symbol it defines")]

use std::arch::global_asm;

global_asm!(include_str!("kernel.s"), options(att_syntax, raw));

// SAFETY: the assembly above defines the symbol: so many bytes that nothing ever writes.
unsafe extern "C" {
    safe static hmpsh_test_kernel: [u8; 0x1000];
}

/// The two layouts of an ELF file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    /// 32 bits.
    Elf32,
    /// 64 bits.
    Elf64,
}

/// The kernel as an ELF file.
pub(crate) fn elf(class: Class) -> Vec<u8> {
    pack(class, &hmpsh_test_kernel)
}

/// An image with its entry at its beginning as an ELF file with a PVH note.
pub(crate) fn pack(class: Class, image: &[u8; 0x1000]) -> Vec<u8> {
    let is_wide = class == Class::Elf64;
    let word = |value: u32| {
        let bytes = u64::from(value).to_le_bytes();
        bytes[..if is_wide { 8 } else { 4 }].to_vec()
    };
    let (header_len, entry_len): (u16, u16) = if is_wide { (64, 56) } else { (52, 32) };
    let mut file = vec![0x7f, b'E', b'L', b'F', if is_wide { 2 } else { 1 }, 1, 1];
    file.resize(16, 0);
    file.extend([2, 0, if is_wide { 62 } else { 3 }, 0, 1, 0, 0, 0]);
    for value in [BASE, u32::from(header_len), 0] {
        file.extend(word(value));
    }
    file.extend([0; 4]);
    for value in [header_len, entry_len, 2, 0, 0, 0] {
        file.extend(value.to_le_bytes());
    }
    for (kind, offset, address, len, memory_len) in [
        (1u32, 0x1000, BASE, image.len() as u32, MEMORY),
        (4, NOTE, 0, 20, 20),
    ] {
        let flags = 7u32.to_le_bytes();
        file.extend(kind.to_le_bytes());
        if is_wide {
            file.extend(flags);
        }
        for value in [offset, address, address, len, memory_len] {
            file.extend(word(value));
        }
        if !is_wide {
            file.extend(flags);
        }
        file.extend(word(4));
    }
    file.resize(NOTE as usize, 0);
    for value in [4, 4, 18, u32::from_le_bytes(*b"Xen\0"), BASE] {
        file.extend(value.to_le_bytes());
    }
    file.resize(0x1000, 0);
    file.extend(image);
    file
}

/// Where the kernel is loaded, and all the memory it uses from there on.
const BASE: u32 = 0x20_0000;
const MEMORY: u32 = 0x5_0000;
/// Offset of the PVH note.
const NOTE: u32 = 0x800;
