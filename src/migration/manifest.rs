//! Ours: what is going to be sent, told first, so that a wrong partner is found before the guest
//! has lost a moment.
//!
//! ```text
//! blocks be16 | { name cstr | length be64 }… | sections be16 | { idstr cstr | instance be32 | version be32 }…
//! | disks be16 | { name cstr | length be64 | partial u8 }…
//! | bitmaps be16 | { disk cstr | name cstr | length be64 }…
//! ```
//! Payload of the command MANIFEST (`docs/wire.md`). QEMU has nothing of the kind.

use super::section::put_cstr;
use crate::vm::guest::{Guest, SectionHeader, unknown_section};

/// RAM blocks, device sections, disks and dirty bitmaps of a machine. Disks and bitmaps are those that
/// are going to be sent; a list with nothing in it and nothing behind it is left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    blocks: Vec<(String, u64)>,
    sections: Vec<SectionHeader>,
    disks: Vec<Disk>,
    bitmaps: Vec<Bitmap>,
}

/// A disk that goes along.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// `id=` of its drive.
    pub id: String,
    /// Bytes.
    pub len: u64,
    /// What is only behind its image is not sent.
    pub is_partial: bool,
}

/// A dirty bitmap that goes along.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap {
    /// `id=` of its drive.
    pub drive: String,
    /// Its name.
    pub name: String,
    /// Bytes of the drive.
    pub len: u64,
}

impl Manifest {
    /// Of this machine, without disks and bitmaps.
    pub fn of(guest: &dyn Guest) -> Self {
        let blocks = guest
            .ram()
            .iter()
            .map(|block| (block.name().to_owned(), block.len()));
        Self {
            blocks: blocks.collect(),
            sections: guest.sections(),
            disks: Vec::new(),
            bitmaps: Vec::new(),
        }
    }

    /// With the disks that go with it.
    pub fn with_disks(self, disks: Vec<Disk>) -> Self {
        Self { disks, ..self }
    }

    /// With bitmaps; without, if that is more than a command can have: it is a courtesy.
    pub fn with_bitmaps(mut self, bitmaps: Vec<Bitmap>) -> Self {
        self.bitmaps = bitmaps;
        if self.bytes().len() > usize::from(u16::MAX) {
            self.bitmaps = Vec::new();
        }
        self
    }

    /// The bitmaps.
    pub fn bitmaps(&self) -> &[Bitmap] {
        &self.bitmaps
    }

    /// The disks.
    pub fn disks(&self) -> &[Disk] {
        &self.disks
    }

    /// As payload.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        put_lengths(&self.blocks, &mut bytes);
        bytes.extend((self.sections.len() as u16).to_be_bytes());
        for section in &self.sections {
            put_cstr(&section.idstr, &mut bytes);
            bytes.extend(section.instance.to_be_bytes());
            bytes.extend(section.version.to_be_bytes());
        }
        if !(self.disks.is_empty() && self.bitmaps.is_empty()) {
            bytes.extend((self.disks.len() as u16).to_be_bytes());
        }
        for disk in &self.disks {
            put_cstr(&disk.id, &mut bytes);
            bytes.extend(disk.len.to_be_bytes());
            bytes.push(disk.is_partial.into());
        }
        if !self.bitmaps.is_empty() {
            bytes.extend((self.bitmaps.len() as u16).to_be_bytes());
        }
        for bitmap in &self.bitmaps {
            put_cstr(&bitmap.drive, &mut bytes);
            put_cstr(&bitmap.name, &mut bytes);
            bytes.extend(bitmap.len.to_be_bytes());
        }
        bytes
    }

    /// From a payload; `None` if it is not one to its last byte.
    pub fn parse(payload: &[u8]) -> Option<Self> {
        let mut rest = Rest(payload);
        let blocks = rest.lengths()?;
        let sections = (0..rest.be16()?).map(|_| {
            let (idstr, instance, version) = (rest.cstr()?, rest.be32()?, rest.be32()?);
            Some(SectionHeader {
                idstr,
                instance,
                version,
            })
        });
        let sections = sections.collect::<Option<Vec<_>>>()?;
        let disks = match rest.0.is_empty() {
            true => Vec::new(),
            false => rest.disks()?,
        };
        let bitmaps = match rest.0.is_empty() {
            true => Vec::new(),
            false => rest.bitmaps()?,
        };
        let manifest = Self {
            blocks,
            sections,
            disks,
            bitmaps,
        };
        // There is one way to say a thing.
        (rest.0.is_empty() && manifest.bytes() == payload).then_some(manifest)
    }

    /// Compares what a source announces with this machine. `Err` names the first difference, in
    /// the words that QEMU has for it when it comes to the section in question.
    pub fn check(&self, local: &Self) -> Result<(), String> {
        for (name, length) in &self.blocks {
            let Some((_, own)) = local.blocks.iter().find(|(own, _)| own == name) else {
                let name = name.escape_default();
                return Err(format!(
                    "Unknown ramblock \"{name}\", cannot accept migration"
                ));
            };
            if own != length {
                return Err(format!(
                    "Size mismatch: {name}: {length:#x} != {own:#x}: Invalid argument"
                ));
            }
        }
        for (name, _) in &local.blocks {
            if !self.blocks.iter().any(|(other, _)| other == name) {
                return Err(format!("RAM block '{name}' exists only at the destination"));
            }
        }
        for section in &self.sections {
            let SectionHeader {
                idstr,
                instance,
                version,
            } = section;
            let Some(own) = local.find(section) else {
                return Err(unknown_section(idstr, *instance));
            };
            if *version > own.version {
                let own = own.version;
                return Err(format!(
                    "savevm: unsupported version {version} for '{idstr}' v{own}"
                ));
            }
        }
        match local.sections.iter().find(|own| self.find(own).is_none()) {
            Some(own) => Err(format!(
                "Section '{}' {} exists only at the destination",
                own.idstr, own.instance
            )),
            None => Ok(()),
        }
    }

    fn find(&self, other: &SectionHeader) -> Option<&SectionHeader> {
        let is_same =
            |own: &&SectionHeader| own.idstr == other.idstr && own.instance == other.instance;
        self.sections.iter().find(is_same)
    }
}

fn put_lengths(list: &[(String, u64)], to: &mut Vec<u8>) {
    to.extend((list.len() as u16).to_be_bytes());
    for (name, length) in list {
        put_cstr(name, to);
        to.extend(length.to_be_bytes());
    }
}

struct Rest<'a>(&'a [u8]);

impl Rest<'_> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (array, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*array)
    }

    fn lengths(&mut self) -> Option<Vec<(String, u64)>> {
        let count = self.be16()?;
        (0..count)
            .map(|_| Some((self.cstr()?, self.be64()?)))
            .collect()
    }

    fn disks(&mut self) -> Option<Vec<Disk>> {
        let count = self.be16()?;
        let disks = (0..count).map(|_| {
            let (id, len, [partial]) = (self.cstr()?, self.be64()?, self.array()?);
            let is_partial = match partial {
                0 | 1 => partial == 1,
                _ => return None,
            };
            Some(Disk {
                id,
                len,
                is_partial,
            })
        });
        disks.collect()
    }

    fn bitmaps(&mut self) -> Option<Vec<Bitmap>> {
        let count = self.be16()?;
        let bitmaps = (0..count).map(|_| {
            let (drive, name, len) = (self.cstr()?, self.cstr()?, self.be64()?);
            Some(Bitmap { drive, name, len })
        });
        bitmaps.collect()
    }

    fn be16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    fn be32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    fn be64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    fn cstr(&mut self) -> Option<String> {
        let [length] = self.array()?;
        let (text, rest) = self.0.split_at_checked(usize::from(length))?;
        self.0 = rest;
        String::from_utf8(text.to_vec()).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Manifest {
        let section = |idstr: &str, instance, version| SectionHeader {
            idstr: idstr.to_owned(),
            instance,
            version,
        };
        Manifest {
            blocks: vec![
                ("microvm.ram".to_owned(), 0xc00_0000),
                ("pc.bios".to_owned(), 0x1_0000),
            ],
            sections: vec![section("cpu", 0, 12), section("serial", 0, 3)],
            disks: Vec::new(),
            bitmaps: Vec::new(),
        }
    }

    fn refusal(change: impl FnOnce(&mut Manifest)) -> String {
        let mut local = sample();
        change(&mut local);
        sample().check(&local).expect_err("the machines differ")
    }

    #[test]
    fn equal_machines_agree() {
        assert_eq!(sample().check(&sample()), Ok(()));
    }

    #[test]
    fn differences_are_named() {
        assert_eq!(
            refusal(|local| local.blocks[0].1 = 0xa00_0000),
            "Size mismatch: microvm.ram: 0xc000000 != 0xa000000: Invalid argument"
        );
        assert!(refusal(|local| local.blocks.truncate(1)).starts_with("Unknown ramblock"));
        assert!(
            refusal(|local| local.sections.truncate(1))
                .starts_with("Unknown savevm section or instance 'serial' 0.")
        );
        assert_eq!(
            refusal(|local| local.sections[0].version = 11),
            "savevm: unsupported version 12 for 'cpu' v11"
        );
        assert!(refusal(|local| local.sections[1].instance = 1).contains("'serial' 0"));
        let extra = sample().sections[0].clone();
        let more = refusal(|local| {
            local.sections.push(SectionHeader {
                instance: 1,
                ..extra
            });
        });
        assert_eq!(more, "Section 'cpu' 1 exists only at the destination");
    }

    #[test]
    fn every_truncation_is_refused() {
        let plain = sample().bytes();
        assert_eq!(Manifest::parse(&plain), Some(sample()));
        let sample = Manifest {
            disks: vec![Disk {
                id: "hd0".to_owned(),
                len: 0x10_0000,
                is_partial: true,
            }],
            ..sample()
        };
        let with_disks = sample.bytes();
        assert_eq!(Manifest::parse(&with_disks), Some(sample.clone()));
        let bitmaps = vec![Bitmap {
            drive: "hd0".to_owned(),
            name: "b0".to_owned(),
            len: 0x10_0000,
        }];
        let sample = sample.with_bitmaps(bitmaps);
        let bytes = sample.bytes();
        assert_eq!(Manifest::parse(&bytes), Some(sample));
        for length in 0..bytes.len() {
            let is_whole = length == plain.len() || length == with_disks.len();
            assert_eq!(Manifest::parse(&bytes[..length]).is_some(), is_whole);
        }
    }

    proptest! {
        #[test]
        fn any_payload_is_parsed_without_harm(
            payload in proptest::collection::vec(any::<u8>(), 0..200),
        ) {
            if let Some(manifest) = Manifest::parse(&payload) {
                prop_assert_eq!(manifest.bytes(), payload);
            }
        }
    }
}
