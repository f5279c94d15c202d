//! A kernel that says what it was started with, as a multiboot kernel and as a bzImage. What it
//! says, a line each: `memory LOWER UPPER`, `e820 START LENGTH TYPE`, `line COMMAND-LINE`,
//! `loader NAME`, `module START NAME holds CONTENT`, `mp BYTES`, `cpuid EAX EDX`, `end`.
#![expect(unsafe_code, reason = "global_asm! and the symbol it defines")]

use std::arch::global_asm;

global_asm!(include_str!("report.s"), options(att_syntax, raw));

// SAFETY: the assembly above defines the symbol: so many bytes that nothing ever writes.
unsafe extern "C" {
    safe static hmpsh_report_kernel: [u8; 0x400];
}

/// A flat file with a multiboot header that says where it goes.
pub(crate) fn multiboot() -> Vec<u8> {
    hmpsh_report_kernel.to_vec()
}

/// The smallest bzImage: boot protocol 2.15, one sector of setup code, which would hang.
pub(crate) fn bz_image() -> Vec<u8> {
    let mut file = vec![0; 0x400];
    for (at, bytes) in [
        (0x1f1, &[1][..]),
        (0x1f4, &[0x40]),
        (0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]),
        (0x202, b"HdrS\x0f\x02"),
        (0x211, &[1]),
        (0x214, &[0, 0, 0x10, 0]),
        (0x22c, &[0xff, 0xff, 0xff, 0x7f]),
        (0x230, &[0, 0, 0x10, 0, 1]),
        (0x238, &[0xff, 7]),
        (0x260, &[0, 0x10]),
        // jmp to itself
        (0x26c, &[0xeb, 0xfe]),
    ] {
        file[at..at + bytes.len()].copy_from_slice(bytes);
    }
    file.extend(hmpsh_report_kernel);
    file
}
