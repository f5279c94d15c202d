//! Framing of the main stream: type bytes, section headers and footers, command records. Pure.
//!
//! ```text
//! header  type u8 | section id be32 | (START, FULL:) idstr cstr | instance be32 | version be32
//! footer  7e | section id be32
//! command 08 | number be16 | length be16 | payload
//! ```
//! A `cstr` is a length byte and that many bytes. QEMU: `migration/savevm.c`.

use crate::vm::guest::SectionHeader;

/// `QEVM`.
pub const MAGIC: u32 = 0x5145_564d;
/// The only stream version.
pub const VERSION: u32 = 3;
/// The one before, refused by its own text.
pub const VERSION_OBSOLETE: u32 = 2;

/// End of the stream proper.
pub const EOF: u8 = 0x00;
/// First piece of a live section.
pub const START: u8 = 0x01;
/// Further piece of a live section.
pub const PART: u8 = 0x02;
/// Last piece of a live section.
pub const END: u8 = 0x03;
/// A whole device.
pub const FULL: u8 = 0x04;
/// A subsection, inside bodies only.
pub const SUBSECTION: u8 = 0x05;
/// The JSON text after the end.
pub const VMDESCRIPTION: u8 = 0x06;
/// The machine's name, first of all.
pub const CONFIGURATION: u8 = 0x07;
/// A command record.
pub const COMMAND: u8 = 0x08;
/// After every section body.
pub const FOOTER: u8 = 0x7e;

/// A record of type COMMAND. Numbers from 0x8000 up are ours (`docs/wire.md`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// The destination may answer from now on.
    OpenReturnPath,
    /// Answer with the same number.
    Ping,
    /// Something may follow the guest later; without a payload that can only be dirty bitmaps.
    PostcopyAdvise,
    /// The source is about to stop the guest (10.0).
    SwitchoverStart,
    /// Ours: what is going to be sent.
    Manifest,
    /// Ours: the guest is yours.
    Go,
    /// Ours: the migration is given up; the payload says why.
    Abandon,
}

const COMMANDS: [(Command, u16, &str, Option<u16>); 7] = [
    (Command::OpenReturnPath, 1, "OPEN_RETURN_PATH", Some(0)),
    (Command::Ping, 2, "PING", Some(4)),
    (Command::PostcopyAdvise, 3, "POSTCOPY_ADVISE", None),
    (Command::SwitchoverStart, 11, "SWITCHOVER_START", Some(0)),
    (Command::Manifest, 0x8000, "MANIFEST", None),
    (Command::Go, 0x8001, "GO", Some(0)),
    (Command::Abandon, 0x8002, "ABANDON", None),
];

/// Commands of QEMU's that belong to features this version has not got.
const UNBUILT: [(u16, &str); 7] = [
    (4, "POSTCOPY_LISTEN"),
    (5, "POSTCOPY_RUN"),
    (6, "POSTCOPY_RAM_DISCARD"),
    (7, "PACKAGED"),
    (8, "ENABLE_COLO"),
    (9, "POSTCOPY_RESUME"),
    (10, "RECV_BITMAP"),
];

impl Command {
    /// Number on the wire.
    pub fn number(self) -> u16 {
        COMMANDS
            .iter()
            .find(|row| row.0 == self)
            .map_or(0, |row| row.1)
    }

    /// The command with that number and payload length. `Err` is the text for the operator.
    pub fn from_wire(number: u16, length: u16) -> Result<Self, String> {
        if let Some((_, name)) = UNBUILT.iter().find(|row| row.0 == number) {
            return Err(format!("MIG_CMD {name}: not built in this version"));
        }
        let Some((command, _, name, expected)) = COMMANDS.iter().find(|row| row.1 == number) else {
            return Err(format!("MIG_CMD {number:#x} unknown (len {length:#x})"));
        };
        if *command == Self::PostcopyAdvise {
            return match length {
                0 => Ok(*command),
                16 => Err("RAM postcopy is disabled but have 16 byte advise".to_owned()),
                _ => Err(format!("CMD_POSTCOPY_ADVISE invalid length ({length})")),
            };
        }
        match expected {
            Some(expected) if *expected != length => Err(format!(
                "{name} received with bad length - expecting {expected}, got {length}"
            )),
            _ => Ok(*command),
        }
    }

    /// Appends the whole record. The payload is at most 65535 bytes: the callers' are bounded.
    pub fn put(self, payload: &[u8], to: &mut Vec<u8>) {
        to.push(COMMAND);
        to.extend(self.number().to_be_bytes());
        to.extend((payload.len() as u16).to_be_bytes());
        to.extend(payload);
    }
}

/// Appends a counted string; more than 255 bytes do not fit and are cut (names here are short).
pub fn put_cstr(text: &str, to: &mut Vec<u8>) {
    let bytes = &text.as_bytes()[..text.len().min(255)];
    to.push(bytes.len() as u8);
    to.extend(bytes);
}

/// Appends the header of a START or FULL section.
pub fn put_header(kind: u8, id: u32, header: &SectionHeader, to: &mut Vec<u8>) {
    put_piece(kind, id, to);
    put_cstr(&header.idstr, to);
    to.extend(header.instance.to_be_bytes());
    to.extend(header.version.to_be_bytes());
}

/// Appends the header of a PART or END section.
pub fn put_piece(kind: u8, id: u32, to: &mut Vec<u8>) {
    to.push(kind);
    to.extend(id.to_be_bytes());
}

/// Appends a footer.
pub fn put_footer(id: u32, to: &mut Vec<u8>) {
    put_piece(FOOTER, id, to);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn commands_are_qemus_bytes() {
        let mut bytes = Vec::new();
        Command::OpenReturnPath.put(&[], &mut bytes);
        Command::Ping.put(&1u32.to_be_bytes(), &mut bytes);
        assert_eq!(bytes, [8, 0, 1, 0, 0, 8, 0, 2, 0, 4, 0, 0, 0, 1]);
    }

    #[test]
    fn commands_are_refused_in_qemus_words() {
        assert_eq!(
            Command::from_wire(0x63, 0),
            Err("MIG_CMD 0x63 unknown (len 0x0)".to_owned())
        );
        assert_eq!(
            Command::from_wire(1, 1),
            Err("OPEN_RETURN_PATH received with bad length - expecting 0, got 1".to_owned())
        );
        assert_eq!(
            Command::from_wire(3, 16),
            Err("RAM postcopy is disabled but have 16 byte advise".to_owned())
        );
        assert_eq!(
            Command::from_wire(3, 1),
            Err("CMD_POSTCOPY_ADVISE invalid length (1)".to_owned())
        );
        assert!(Command::from_wire(7, 4).is_err_and(|text| text.contains("PACKAGED")));
    }

    #[test]
    fn header_is_qemus_bytes() {
        let mut bytes = Vec::new();
        let header = SectionHeader {
            idstr: "ram".to_owned(),
            instance: 0,
            version: 4,
        };
        put_header(START, 2, &header, &mut bytes);
        put_footer(2, &mut bytes);
        assert_eq!(
            bytes,
            *b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04\x7e\0\0\0\x02"
        );
    }

    proptest! {
        #[test]
        fn any_number_is_a_command_or_an_error(number: u16, length: u16) {
            if let Ok(command) = Command::from_wire(number, length) {
                prop_assert_eq!(command.number(), number);
            }
        }
    }
}
