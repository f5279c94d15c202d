//! Reads a whole migration stream offline, as QEMU's own analyzer does: framing and RAM by what is
//! known of them, every device by nothing but the JSON at the stream's end.

use serde_json::Value;

/// What a stream holds.
#[derive(Debug, Default)]
pub(crate) struct Stream {
    /// The machine's type.
    pub(crate) machine: String,
    /// RAM blocks with their lengths, in order.
    pub(crate) blocks: Vec<(String, u64)>,
    /// Pages in full, and pages of one byte.
    pub(crate) pages: [usize; 2],
    /// Device sections, in order.
    pub(crate) devices: Vec<Device>,
}

/// A FULL section.
#[derive(Debug)]
pub(crate) struct Device {
    /// `idstr instance`.
    pub(crate) name: String,
    /// Every leaf: its path, with indices and subsections, and its bytes.
    pub(crate) fields: Vec<(String, Vec<u8>)>,
}

impl Stream {
    /// Decodes all of it; `Err` says what does not fit, and where.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, String> {
        let mut stream = Self::default();
        let mut from = Cursor { bytes, at: 0 };
        stream
            .read(&mut from)
            .map_err(|what| format!("at {:#x}: {what}", from.at))?;
        Ok(stream)
    }

    /// A field's bytes.
    pub(crate) fn field(&self, device: &str, path: &str) -> Option<&[u8]> {
        let device = self.devices.iter().find(|found| found.name == device)?;
        let found = device.fields.iter().find(|(name, _)| name == path)?;
        Some(&found.1)
    }

    fn read(&mut self, from: &mut Cursor) -> Result<(), String> {
        let description = description(from.bytes)?;
        from.expect(b"QEVM\0\0\0\x03")?;
        from.expect(&[CONFIGURATION])?;
        let len = from.u32()? as usize;
        self.machine = String::from_utf8_lossy(from.take(len)?).into_owned();
        let mut devices = array(&description["devices"]).iter();
        let mut ram = None;
        loop {
            match from.u8()? {
                EOF => break,
                COMMAND => {
                    from.take(2)?;
                    let len = from.u16()?;
                    from.take(usize::from(len))?;
                    continue;
                }
                kind @ (START | FULL) => {
                    let id = from.u32()?;
                    let idstr = from.counted()?;
                    let (instance, version) = (from.u32()?, from.u32()?);
                    if kind == START {
                        if (idstr.as_str(), version) != ("ram", 4) {
                            return Err(format!("a live section {idstr} v{version}"));
                        }
                        ram = Some(id);
                        self.ram(from)?;
                    } else {
                        let device = devices.next().ok_or("more sections than described")?;
                        self.device(from, &idstr, instance, version, device)?;
                    }
                    footer(from, id)?;
                }
                PART | END => {
                    let id = from.u32()?;
                    if ram != Some(id) {
                        return Err(format!("a piece of section {id}"));
                    }
                    self.ram(from)?;
                    footer(from, id)?;
                }
                other => return Err(format!("record {other:#x}")),
            }
        }
        from.expect(&[VMDESCRIPTION])?;
        let len = from.u32()? as usize;
        from.take(len)?;
        match (devices.len(), from.bytes.len() - from.at) {
            (0, 0) => Ok(()),
            (more, 0) => Err(format!("{more} sections are described that are not there")),
            (_, left) => Err(format!("{left} bytes behind the end")),
        }
    }

    fn ram(&mut self, from: &mut Cursor) -> Result<(), String> {
        loop {
            let word = from.u64()?;
            let flags = word & 0xfff;
            if flags & MEM_SIZE != 0 {
                let mut left = word & !0xfff;
                while left > 0 {
                    let name = from.counted()?;
                    let len = from.u64()?;
                    left = left
                        .checked_sub(len)
                        .ok_or("blocks longer than their sum")?;
                    self.blocks.push((name, len));
                }
                continue;
            }
            if flags & EOS != 0 {
                return Ok(());
            }
            if flags & CONTINUE == 0 {
                let name = from.counted()?;
                if !self.blocks.iter().any(|(block, _)| *block == name) {
                    return Err(format!("a page of {name}"));
                }
            }
            match flags & !CONTINUE {
                PAGE => {
                    from.take(4096)?;
                    self.pages[0] += 1;
                }
                FILLED => {
                    from.u8()?;
                    self.pages[1] += 1;
                }
                flags => return Err(format!("RAM flags {flags:#x}")),
            }
        }
    }

    fn device(
        &mut self,
        from: &mut Cursor,
        idstr: &str,
        instance: u32,
        version: u32,
        described: &Value,
    ) -> Result<(), String> {
        let told = (
            &described["name"],
            &described["instance_id"],
            &described["version"],
        );
        if told != (&idstr.into(), &instance.into(), &version.into()) {
            return Err(format!(
                "{idstr} {instance} v{version} is described as {told:?}"
            ));
        }
        let mut fields = Vec::new();
        state(from, described, "", &mut fields)?;
        self.devices.push(Device {
            name: format!("{idstr} {instance}"),
            fields,
        });
        Ok(())
    }
}

/// Walks fields, then subsections.
fn state(
    from: &mut Cursor,
    described: &Value,
    path: &str,
    found: &mut Vec<(String, Vec<u8>)>,
) -> Result<(), String> {
    for field in array(&described["fields"]) {
        let name = field["name"].as_str().ok_or("a field without a name")?;
        let size = field["size"].as_u64().ok_or("a field without a size")? as usize;
        let elements = field["array_len"].as_u64();
        for index in 0..elements.unwrap_or(1) {
            let index = elements.map_or(String::new(), |_| format!("[{index}]"));
            let path = format!("{path}{name}{index}");
            let start = from.at;
            match &field["struct"] {
                Value::Null => found.push((path, from.take(size)?.to_vec())),
                inner => state(from, inner, &format!("{path}."), found)?,
            }
            if from.at != start + size {
                return Err(format!("{name} is {} bytes, not {size}", from.at - start));
            }
        }
    }
    for subsection in array(&described["subsections"]) {
        let name = subsection["vmsd_name"].as_str().ok_or("no name")?;
        from.expect(&[SUBSECTION])?;
        let (told, version) = (from.counted()?, from.u32()?);
        if (told.as_str(), &subsection["version"]) != (name, &version.into()) {
            return Err(format!("subsection {told} v{version} instead of {name}"));
        }
        state(from, subsection, &format!("{name}:"), found)?;
    }
    Ok(())
}

fn footer(from: &mut Cursor, id: u32) -> Result<(), String> {
    from.expect(&[FOOTER])?;
    match from.u32()? {
        told if told == id => Ok(()),
        told => Err(format!("the footer of {told}, not of {id}")),
    }
}

/// The JSON behind the last zero byte.
fn description(bytes: &[u8]) -> Result<Value, String> {
    let last = bytes.iter().rposition(|byte| *byte == 0).ok_or("no zero")?;
    let brace = bytes[last..].iter().position(|byte| *byte == b'{');
    let text = &bytes[last + brace.ok_or("no description")?..];
    serde_json::from_slice(text).map_err(|error| format!("description: {error}"))
}

fn array(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], String> {
        let taken = self.bytes.get(self.at..self.at + len);
        let taken = taken.ok_or_else(|| format!("{len} bytes more were expected"))?;
        self.at += len;
        Ok(taken)
    }

    fn expect(&mut self, what: &[u8]) -> Result<(), String> {
        match self.take(what.len())? {
            same if same == what => Ok(()),
            other => Err(format!("{other:02x?} instead of {what:02x?}")),
        }
    }

    fn number<const N: usize>(&mut self) -> Result<[u8; N], String> {
        self.take(N)?.try_into().map_err(|_| "no number".to_owned())
    }

    fn u8(&mut self) -> Result<u8, String> {
        self.number().map(u8::from_be_bytes)
    }

    fn u16(&mut self) -> Result<u16, String> {
        self.number().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Result<u32, String> {
        self.number().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Result<u64, String> {
        self.number().map(u64::from_be_bytes)
    }

    fn counted(&mut self) -> Result<String, String> {
        let len = self.u8()?;
        Ok(String::from_utf8_lossy(self.take(usize::from(len))?).into_owned())
    }
}

const EOF: u8 = 0;
const START: u8 = 1;
const PART: u8 = 2;
const END: u8 = 3;
const FULL: u8 = 4;
const SUBSECTION: u8 = 5;
const VMDESCRIPTION: u8 = 6;
const CONFIGURATION: u8 = 7;
const COMMAND: u8 = 8;
const FOOTER: u8 = 0x7e;

const FILLED: u64 = 0x02;
const MEM_SIZE: u64 = 0x04;
const PAGE: u64 = 0x08;
const EOS: u64 = 0x10;
const CONTINUE: u64 = 0x20;
