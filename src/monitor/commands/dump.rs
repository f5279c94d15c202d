//! `x`, `xp`, `print`: memory and numbers in the formats of `/fmt`.

mod instruction;

use crate::monitor::args::{Args, Format, Style};
use crate::monitor::session::{Error, Session};

/// `x/fmt addr`.
pub(crate) fn x(session: &mut Session, args: &Args) -> Result<(), Error> {
    let memory = session.control.virtual_memory(session.cpu)?;
    dump(session, args, |address, bytes| {
        memory.read(address, bytes).is_ok()
    })
}

/// `xp/fmt addr`.
pub(crate) fn xp(session: &mut Session, args: &Args) -> Result<(), Error> {
    let control = session.control.clone();
    dump(session, args, |address, bytes| {
        control.read_physical(address, bytes).is_ok()
    })
}

/// `print/fmt expr`.
pub(crate) fn print(session: &mut Session, args: &Args) -> Result<(), Error> {
    let text = number(args.int("val")?, args.format("fmt")?.style);
    session.print(&(text + "\n"));
    Ok(())
}

/// One line at a time until the count is reached or memory can not be read.
fn dump(
    session: &mut Session,
    args: &Args,
    read: impl Fn(u64, &mut [u8]) -> bool,
) -> Result<(), Error> {
    let format = args.format("fmt")?;
    let mut address = args.int("addr")?.cast_unsigned();
    let Some(layout) = Layout::new(format) else {
        return instructions(session, address, format.count, read);
    };
    let mut left = layout.size as u64 * u64::from(format.count);
    if left > MOST {
        return Err(Error::Refused(format!(
            "{left} bytes are more than one command shows ({MOST})"
        )));
    }
    let mut bytes = [0; 16];
    while left > 0 {
        let part = left.min(layout.row as u64);
        // At most the 16 bytes of a row.
        let row = &mut bytes[..part as usize];
        if !read(address, row) {
            session.print(&format!("{address:016x}: Cannot access memory\n"));
            return Ok(());
        }
        let line = layout.line(address, row);
        session.print(&line);
        address = address.wrapping_add(part);
        left -= part;
    }
    Ok(())
}

/// Instructions in the mode the default CPU is in.
fn instructions(
    session: &mut Session,
    mut address: u64,
    count: u32,
    read: impl Fn(u64, &mut [u8]) -> bool,
) -> Result<(), Error> {
    if count > MOST_INSTRUCTIONS {
        let text =
            format!("{count} are more instructions than one command shows ({MOST_INSTRUCTIONS})");
        return Err(Error::Refused(text));
    }
    let sregs = session.control.registers(session.cpu)?.sregs;
    let bits = match (sregs.cs.l, sregs.cs.db) {
        (0, 0) => 16,
        (0, _) => 32,
        _ => 64,
    };
    for _ in 0..count {
        let mut bytes = [0; instruction::LONGEST];
        // Memory may end within the longest instruction, but behind this one.
        let readable = (1..=bytes.len())
            .rev()
            .find(|length| read(address, &mut bytes[..*length]));
        let Some(length) = readable else {
            session.print(&format!("0x{address:08x}: unable to read memory\n"));
            return Ok(());
        };
        let (line, length) = instruction::line(address, &bytes[..length], bits);
        session.print(&line);
        address = address.wrapping_add(length as u64);
    }
    Ok(())
}

/// How a dump is laid out.
struct Layout {
    style: Style,
    /// Bytes that an item counts for.
    size: usize,
    /// Bytes shown as one item: a character is always one.
    item: usize,
    /// Bytes in a line.
    row: usize,
    /// Columns of an item.
    width: usize,
}

impl Layout {
    /// `None` for instructions.
    fn new(format: Format) -> Option<Self> {
        let size = usize::from(format.size?);
        let bits = size * 8;
        let width = match format.style {
            Style::Octal => bits.div_ceil(3),
            Style::Signed | Style::Unsigned => (bits * 10).div_ceil(33),
            Style::Hexadecimal => bits / 4,
            Style::Character => 0,
            Style::Instructions => return None,
        };
        let item = if format.style == Style::Character {
            1
        } else {
            size
        };
        Some(Self {
            style: format.style,
            size,
            item,
            row: if size == 1 { 8 } else { 16 },
            width,
        })
    }

    fn line(&self, address: u64, row: &[u8]) -> String {
        let mut line = format!("{address:016x}:");
        for item in row.chunks(self.item) {
            let value = item
                .iter()
                .rev()
                .fold(0_u64, |value, byte| value << 8 | u64::from(*byte));
            let width = self.width;
            line.push(' ');
            line.push_str(&match self.style {
                Style::Octal => format!("{:>width$}", octal(value)),
                Style::Signed => format!("{:>width$}", value.cast_signed()),
                Style::Unsigned => format!("{value:>width$}"),
                Style::Character => character(value),
                Style::Hexadecimal | Style::Instructions => format!("0x{value:0width$x}"),
            });
        }
        line.push('\n');
        line
    }
}

/// A number as `print` shows it.
pub(crate) fn number(value: i64, style: Style) -> String {
    let unsigned = value.cast_unsigned();
    match style {
        Style::Octal => octal(unsigned),
        Style::Hexadecimal if value == 0 => "0".to_owned(),
        Style::Hexadecimal => format!("{unsigned:#x}"),
        Style::Unsigned => unsigned.to_string(),
        Style::Signed | Style::Instructions => value.to_string(),
        Style::Character => character(unsigned),
    }
}

/// As C's `%#o`: a zero in front, once.
fn octal(value: u64) -> String {
    if value == 0 {
        "0".to_owned()
    } else {
        format!("0{value:o}")
    }
}

/// The lowest 32 bits as a character constant, whatever they are.
fn character(value: u64) -> String {
    let code = value as u32;
    match u8::try_from(code) {
        Ok(b'\'') => r"'\''".to_owned(),
        Ok(b'\\') => r"'\\'".to_owned(),
        Ok(b'\n') => r"'\n'".to_owned(),
        Ok(b'\r') => r"'\r'".to_owned(),
        Ok(byte @ b' '..=b'~') => format!("'{}'", char::from(byte)),
        _ => format!(r"'\x{code:02x}'"),
    }
}

/// Bytes that one command shows at most: it runs on the thread all monitors share.
const MOST: u64 = 1 << 20;

/// Instructions that one command shows at most.
const MOST_INSTRUCTIONS: u32 = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    /// Sixteen bytes of memory and how QEMU 7.2 shows them.
    const MEMORY: [u8; 16] = *b"DCBA\x80\x7f\xff\0\\'\n\r \x7f\t\x1b";

    fn line(style: Style, size: u8, bytes: usize) -> String {
        let layout = Layout::new(Format {
            count: 1,
            style,
            size: Some(size),
        })
        .expect("no disassembly");
        layout.line(0x5000, &MEMORY[..bytes])
    }

    #[test]
    fn rows_as_qemu_lays_them_out() {
        let row = |text: &str| format!("0000000000005000: {text}\n");
        assert_eq!(
            line(Style::Hexadecimal, 1, 8),
            row("0x44 0x43 0x42 0x41 0x80 0x7f 0xff 0x00")
        );
        assert_eq!(line(Style::Hexadecimal, 2, 6), row("0x4344 0x4142 0x7f80"));
        assert_eq!(
            line(Style::Hexadecimal, 4, 16),
            row("0x41424344 0x00ff7f80 0x0d0a275c 0x1b097f20")
        );
        assert_eq!(line(Style::Hexadecimal, 8, 8), row("0x00ff7f8041424344"));
        assert_eq!(
            line(Style::Signed, 4, 16),
            row("1094861636   16744320  218769244  453607200")
        );
        assert_eq!(
            line(Style::Unsigned, 1, 8),
            row(" 68  67  66  65 128 127 255   0")
        );
        assert_eq!(
            line(Style::Octal, 1, 8),
            row("0104 0103 0102 0101 0200 0177 0377   0")
        );
        assert_eq!(
            line(Style::Octal, 4, 16),
            row("010120441504   077677600 01502423534 03302277440")
        );
        assert_eq!(
            line(Style::Unsigned, 8, 16),
            row("   71916307888620356  1948228089448900444")
        );
        assert_eq!(
            line(Style::Character, 4, 16),
            row(
                r"'D' 'C' 'B' 'A' '\x80' '\x7f' '\xff' '\x00' '\\' '\'' '\n' '\r' ' ' '\x7f' '\x09' '\x1b'"
            )
        );
    }
}
