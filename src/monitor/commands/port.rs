//! `i` and `o`: ports of the machine.

use crate::monitor::args::{Args, Format};
use crate::monitor::session::{Error, Session};

/// `i/fmt addr[.index]`.
pub(crate) fn read(session: &mut Session, args: &Args) -> Result<(), Error> {
    let mut port = port(args)?;
    if let Some(index) = args.int_if_any("index") {
        session.control.write_port(port, 1, (index & 0xff) as u32);
        port = port.wrapping_add(1);
    }
    let (size, letter, digits) = width(args.format("fmt")?);
    let value = session.control.read_port(port, size);
    session.print(&format!(
        "port{letter}[0x{port:04x}] = 0x{value:0digits$x}\n"
    ));
    Ok(())
}

/// `o/fmt addr value`.
pub(crate) fn write(session: &mut Session, args: &Args) -> Result<(), Error> {
    let (size, ..) = width(args.format("fmt")?);
    // The grammar refuses values beyond 32 bits.
    let value = (args.int("val")? & 0xffff_ffff) as u32;
    session.control.write_port(port(args)?, size, value);
    Ok(())
}

fn port(args: &Args) -> Result<u16, Error> {
    Ok((args.int("addr")? & 0xffff) as u16)
}

/// Bytes of the access, its letter, and the digits shown: a port has no 8 bytes, so that size
/// reads one and keeps its digits, as in QEMU.
fn width(format: Format) -> (u8, char, usize) {
    let digits = usize::from(format.size.unwrap_or(1)) * 2;
    match format.size {
        Some(2) => (2, 'w', digits),
        Some(4) => (4, 'l', digits),
        _ => (1, 'b', digits),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::monitor::args::Style;

    #[test]
    fn widths() {
        let of = |size| {
            width(Format {
                count: 1,
                style: Style::Hexadecimal,
                size,
            })
        };
        assert_eq!(of(Some(1)), (1, 'b', 2));
        assert_eq!(of(Some(2)), (2, 'w', 4));
        assert_eq!(of(Some(4)), (4, 'l', 8));
        assert_eq!(of(Some(8)), (1, 'b', 16));
        assert_eq!(of(None), (1, 'b', 2));
    }
}
