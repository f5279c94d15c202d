//! The configuration section: the machine's name and, perhaps, what must be equal on both sides.
//!
//! ```text
//! 07 | length be32 | machine type | subsections: { 05 | name cstr | version be32 = 1 | body }…
//! ```
//! Written without subsections: none of the capabilities that would bring one is built. All three
//! that exist are read. QEMU: `vmstate_configuration`.

use super::Error;
use super::section::{CONFIGURATION, SUBSECTION};
use super::stream::Reader;
use crate::vmstate::StateReader;

/// What this machine has to be compared with.
#[derive(Clone, Copy, Debug)]
pub struct Local<'a> {
    /// Machine type.
    pub machine: &'a str,
    /// `-uuid`.
    pub uuid: Option<[u8; 16]>,
}

/// Appends the section.
pub fn put(machine: &str, to: &mut Vec<u8>) {
    to.push(CONFIGURATION);
    to.extend((machine.len() as u32).to_be_bytes());
    to.extend(machine.as_bytes());
}

/// Reads the section, type byte included, and compares.
pub fn load(reader: &mut Reader, local: Local<'_>) -> Result<(), Error> {
    if reader.u8()? != CONFIGURATION {
        return Err(Error::stream("Configuration section missing"));
    }
    machine(reader, local.machine)?;
    loop {
        match reader.peek(1) {
            Ok([SUBSECTION]) => {}
            Ok(_) => return Ok(()),
            Err(error) => return Err(fault(reader, &error)),
        }
        reader.u8()?;
        let name = reader.cstr()?;
        let version = reader.be32()?;
        if version != 1 {
            let name = name.escape_default();
            return Err(Error::Stream(format!(
                "{name}: unsupported version {version}"
            )));
        }
        match &*name {
            "configuration/target-page-bits" => page_bits(reader)?,
            "configuration/capabilities" => capabilities(reader)?,
            "configuration/uuid" => uuid(reader, local.uuid)?,
            _ => {
                let text = format!("Unknown subsection '{}'", name.escape_default());
                return Err(Error::Stream(text));
            }
        }
    }
}

fn machine(reader: &mut Reader, local: &str) -> Result<(), Error> {
    let length = reader.be32()? as usize;
    if length > LONGEST_NAME {
        let text = format!("Machine type received has {length} bytes and local is '{local}'");
        return Err(Error::Stream(text));
    }
    let mut name = vec![0; length];
    reader.exact(&mut name)?;
    if name != local.as_bytes() {
        let text = format!(
            "Machine type received is '{}' and local is '{local}'",
            name.escape_ascii()
        );
        return Err(Error::Stream(text));
    }
    Ok(())
}

fn page_bits(reader: &mut Reader) -> Result<(), Error> {
    let bits = reader.be32()?;
    if bits == PAGE_BITS {
        return Ok(());
    }
    Err(Error::Stream(format!(
        "Received TARGET_PAGE_BITS is {bits} but local is {PAGE_BITS}"
    )))
}

fn capabilities(reader: &mut Reader) -> Result<(), Error> {
    let count = reader.be32()?;
    if count > MOST_CAPABILITIES {
        return Err(Error::Stream(format!(
            "Received {count} migration capabilities"
        )));
    }
    // Nothing that is compared in this way is built, so whatever is on there is off here.
    match count {
        0 => Ok(()),
        _ => {
            let name = reader.cstr()?;
            let name = name.escape_default();
            Err(Error::Stream(format!(
                "Capability {name} is off, but received capability is on"
            )))
        }
    }
}

fn uuid(reader: &mut Reader, local: Option<[u8; 16]>) -> Result<(), Error> {
    let mut received = [0; 16];
    reader.exact(&mut received)?;
    match local {
        Some(local) if local != received => Err(Error::Stream(format!(
            "UUID received is {} and local is {}",
            uuid_text(&received),
            uuid_text(&local)
        ))),
        Some(_) => Ok(()),
        None => {
            log::warn!(
                "UUID is received {}, but local uuid isn't set",
                uuid_text(&received)
            );
            Ok(())
        }
    }
}

fn uuid_text(uuid: &[u8; 16]) -> String {
    let hex = |bytes: &[u8]| {
        bytes
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect::<String>()
    };
    [
        &uuid[..4],
        &uuid[4..6],
        &uuid[6..8],
        &uuid[8..10],
        &uuid[10..],
    ]
    .map(hex)
    .join("-")
}

fn fault(reader: &mut Reader, error: &std::io::Error) -> Error {
    reader
        .take_fault()
        .unwrap_or_else(|| Error::stream(error.to_string()))
}

const PAGE_BITS: u32 = 12;
const LONGEST_NAME: usize = 255;
const MOST_CAPABILITIES: u32 = 64;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migration::memory_channel::Recording;

    const LOCAL: Local<'_> = Local {
        machine: "microvm",
        uuid: Some([0x11; 16]),
    };

    fn read(bytes: &[u8]) -> Result<(), String> {
        load(&mut Recording::reader(bytes), LOCAL).map_err(|error| error.to_string())
    }

    fn with(subsection: &str, body: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        put("microvm", &mut bytes);
        bytes.push(SUBSECTION);
        crate::migration::section::put_cstr(subsection, &mut bytes);
        bytes.extend(1u32.to_be_bytes());
        bytes.extend(body);
        bytes
    }

    #[test]
    fn own_name_is_accepted_and_written_as_qemu_does() {
        let mut bytes = Vec::new();
        put("microvm", &mut bytes);
        assert_eq!(bytes, *b"\x07\0\0\0\x07microvm");
        assert_eq!(read(&bytes), Ok(()));
    }

    #[test]
    fn other_machines_are_named() {
        assert_eq!(
            read(b"\x07\0\0\0\x02pc"),
            Err("Machine type received is 'pc' and local is 'microvm'".to_owned())
        );
        assert!(read(b"\x07\xff\xff\xff\xf0").is_err_and(|text| text.contains("4294967280")));
        assert_eq!(
            read(b"\x01"),
            Err("Configuration section missing".to_owned())
        );
    }

    #[test]
    fn subsections_are_compared() {
        let bits = |bits: u32| with("configuration/target-page-bits", &bits.to_be_bytes());
        assert_eq!(read(&bits(12)), Ok(()));
        assert!(read(&bits(16)).is_err_and(|text| text.contains("is 16 but local is 12")));
        let capability = with(
            "configuration/capabilities",
            b"\0\0\0\x01\x0fx-ignore-shared",
        );
        assert_eq!(
            read(&capability),
            Err("Capability x-ignore-shared is off, but received capability is on".to_owned())
        );
        assert_eq!(read(&with("configuration/capabilities", &[0; 4])), Ok(()));
        assert_eq!(read(&with("configuration/uuid", &[0x11; 16])), Ok(()));
        assert_eq!(
            read(&with("configuration/uuid", &[0x22; 16])),
            Err(
                "UUID received is 22222222-2222-2222-2222-222222222222 and local is \
                 11111111-1111-1111-1111-111111111111"
                    .to_owned()
            )
        );
        assert!(read(&with("configuration/other", &[])).is_err());
    }
}
