//! Instructions for `x/i` and `xp/i`, one to a line.
//!
//! The text is iced-x86's in AT&T notation: QEMU's layout, not always its choice of words.

use iced_x86::{Decoder, DecoderOptions, Formatter, GasFormatter};

/// Bytes of the longest instruction.
pub(super) const LONGEST: usize = 15;

/// The line for the instruction that begins `bytes` at `address`, and its length; `bits` is 16, 32
/// or 64. `bytes` is not empty. What is no instruction counts one byte.
pub(super) fn line(address: u64, bytes: &[u8], bits: u32) -> (String, usize) {
    let mut decoder = Decoder::with_ip(bits, bytes, address, DecoderOptions::NONE);
    let instruction = decoder.decode();
    let (text, length) = if instruction.is_invalid() {
        (format!(".byte    0x{:02x}", bytes[0]), 1)
    } else {
        let mut text = String::new();
        let mut formatter = GasFormatter::new();
        let options = formatter.options_mut();
        options.set_space_after_operand_separator(true);
        options.set_uppercase_hex(false);
        options.set_branch_leading_zeros(false);
        options.set_gas_show_mnemonic_size_suffix(true);
        formatter.format(&instruction, &mut text);
        let (mnemonic, operands) = text.split_once(' ').unwrap_or((&text, ""));
        (format!("{mnemonic:8} {operands}"), instruction.len())
    };
    let hex: String = bytes[..length]
        .iter()
        .map(|byte| format!("{byte:02x} "))
        .collect();
    // Longer than eight bytes: the column gives way, so that a line stays an instruction.
    (
        format!("0x{address:08x}:  {hex:24} {}\n", text.trim_end()),
        length,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines() {
        let bytes = b"\x44\x43\x42\x41\x80\x7f\xff\x00\x5c\x27";
        let (text, length) = line(0x5000, bytes, 64);
        assert_eq!(length, 8);
        assert_eq!(
            text,
            "0x00005000:  44 43 42 41 80 7f ff 00  cmpb     $0, -1(%r15)\n"
        );
        assert_eq!(
            line(0x5008, b"\x5c", 64),
            (
                "0x00005008:  5c                       popq     %rsp\n".to_owned(),
                1
            )
        );
        assert_eq!(
            line(0x5009, b"\x27\0", 64),
            (
                "0x00005009:  27                       .byte    0x27\n".to_owned(),
                1
            )
        );
        assert_eq!(
            line(0x5009, b"\x27", 16).0,
            "0x00005009:  27                       daa\n"
        );
        let (text, _) = line(0xf_08d8, b"\xe9\x8c\xfe\xff\xff", 64);
        assert_eq!(
            text,
            "0x000f08d8:  e9 8c fe ff ff           jmp      0xf0769\n"
        );
        let (_, length) = line(0, b"\x0f", 32);
        assert_eq!(length, 1, "cut short");
    }
}
