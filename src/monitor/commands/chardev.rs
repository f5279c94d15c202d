//! `info chardev`, `ringbuf_read`, `ringbuf_write`.

use crate::control::ChardevInfo;
use crate::monitor::args::Args;
use crate::monitor::session::{Error, Session};

/// `info chardev`.
pub(crate) fn info_chardev(session: &mut Session, _: &Args) -> Result<(), Error> {
    let text = chardevs(&session.control.chardevs());
    session.print(&text);
    Ok(())
}

/// `ringbuf_read device size`.
pub(crate) fn ringbuf_read(session: &mut Session, args: &Args) -> Result<(), Error> {
    let size = usize::try_from(args.int("size")?).unwrap_or(usize::MAX);
    if size == 0 {
        return Err(Error::Refused("size must be greater than zero".to_owned()));
    }
    let bytes = session.control.ringbuf_read(args.text("device")?, size)?;
    session.print_bytes(&escaped(&bytes));
    session.print("\n");
    Ok(())
}

/// `ringbuf_write device data`.
pub(crate) fn ringbuf_write(session: &mut Session, args: &Args) -> Result<(), Error> {
    Ok(session
        .control
        .ringbuf_write(args.text("device")?, args.text("data")?.as_bytes())?)
}

fn chardevs(chardevs: &[ChardevInfo]) -> String {
    chardevs
        .iter()
        .map(|chardev| format!("{}: filename={}\n", chardev.id, chardev.description))
        .collect()
}

/// What a guest wrote may not steer the operator's terminal: control characters are spelled out.
fn escaped(bytes: &[u8]) -> Vec<u8> {
    let mut text = Vec::with_capacity(bytes.len());
    for byte in bytes {
        match byte {
            b'\\' => text.extend_from_slice(br"\\"),
            b'\n' | b'\t' => text.push(*byte),
            0..0x20 | 0x7f => text.extend_from_slice(format!("\\u{byte:04X}").as_bytes()),
            _ => text.push(*byte),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_control_characters() {
        assert_eq!(
            escaped(b"a\\\n\t\x1b[2J\r\0\x7f\xc3\xa9"),
            b"a\\\\\n\t\\u001B[2J\\u000D\\u0000\\u007F\xc3\xa9"
        );
    }

    #[test]
    fn lists() {
        let list = [ChardevInfo {
            id: "serial0".to_owned(),
            description: "ringbuf".to_owned(),
        }];
        assert_eq!(chardevs(&list), "serial0: filename=ringbuf\n");
    }
}
