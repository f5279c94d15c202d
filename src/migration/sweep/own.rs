//! A saved stream of a whole machine of ours, damaged: it is refused with the place of the damage, or
//! brings the same guest.

use super::cuts::eof_offset;
use super::golden::{arrives, bits, machine, receive, some, state};
use super::*;
use crate::config::Accel;
use crate::vm::guest::SavedSection;
use crate::vm::machine::Machine;

/// The guest of the golden stream, sent by us, and what it is made of.
struct Own {
    stream: Vec<u8>,
    saved: Vec<SavedSection>,
    /// Where the first page begins, where the devices' sections begin, where EOF is.
    bounds: [usize; 3],
}

impl Own {
    fn new() -> Self {
        let source = receive();
        let saved = source.save_devices().unwrap();
        let (channel, output) = Recording::to();
        let link = Link::new(Faults::default());
        let limits = || Setting::new(Kind::Silent).limits;
        let outgoing = Outgoing {
            guest: &*source,
            limits: &limits,
            block: None,
            bitmaps: false,
            return_path: false,
            is_patient: false,
            dialect: Dialect::default(),
            board: &Board::default(),
            clock: &HostClock::new(),
            started: Duration::ZERO,
            cancel: &link.cancel,
            point: &link.point,
        };
        outgoing.run(channel).unwrap();
        let stream = output.lock().unwrap().clone();
        let find = |what: &[u8]| stream.windows(what.len()).position(|found| found == what);
        let ram_start = find(b"\x03ram").unwrap();
        let device = &source.sections()[0].idstr;
        let device = find(&[&[device.len() as u8], device.as_bytes()].concat());
        // The block list is short; type and id stand in front of a name.
        let bounds = [
            ram_start + 80,
            device.unwrap() - 5,
            eof_offset(&stream) as usize,
        ];
        Self {
            stream,
            saved,
            bounds,
        }
    }

    fn is_same(&self, machine: &Machine) -> bool {
        state(&self.saved) == state(&machine.save_devices().unwrap())
    }

    /// Every section's name, and where it begins.
    fn sections(&self) -> Vec<(String, usize)> {
        let mut from = self.bounds[1];
        let mut found = Vec::new();
        let names = machine(Accel::None).sections();
        let names = names.iter().map(|header| (&*header.idstr, header.instance));
        for (idstr, instance) in names.chain([("globalstate", 0)]) {
            let head = [
                &[idstr.len() as u8],
                idstr.as_bytes(),
                &instance.to_be_bytes(),
            ]
            .concat();
            let rest = &self.stream[from..];
            let at = rest.windows(head.len()).position(|here| here == head);
            from += at.unwrap();
            found.push((format!("section '{idstr}' {instance}"), from - 5));
        }
        found
    }
}

const REPEATED: [&str; 2] = ["goes on after its end", "came twice"];

/// The numbers that the text gives as offsets.
fn offsets(text: &str) -> Vec<usize> {
    let place = text.rsplit(" (").next().unwrap();
    let words = place.split([' ', ',', ')']);
    let hex = |word: &str| usize::from_str_radix(word.strip_prefix("0x")?, 16).ok();
    words.filter_map(hex).collect()
}

#[test]
fn no_flipped_bit_is_refused_without_its_place() {
    let own = Own::new();
    let sections = own.sections();
    let mut stream = own.stream.clone();
    let mut by_hash = 0;
    let [page, devices, eof] = own.bounds;
    for at in (0..page).chain(some(devices..eof, 3)) {
        let section = sections.iter().rev().find(|(_, from)| *from <= at);
        for bit in bits(at) {
            stream[at] ^= 1 << bit;
            let told = match arrives(Accel::None, &stream) {
                Ok(machine) => {
                    let same = own.is_same(&machine);
                    panic!("byte {at:#x} bit {bit} was believed; same state: {same}");
                }
                Err(told) => told,
            };
            stream[at] ^= 1 << bit;
            let why = format!("byte {at:#x} bit {bit}: {told}");
            if told == "Not a migration stream" {
                assert!(at < 4, "{why}");
                continue;
            }
            match (told.contains("(after "), &offsets(&told)[..]) {
                // What comes next is not known yet.
                (true, [read]) => assert!((read.saturating_sub(32)..*read).contains(&at), "{why}"),
                // What took another's place is known when that one comes.
                (false, [_, to]) if REPEATED.iter().any(|text| told.contains(text)) => {
                    assert!(at < *to, "{why}");
                }
                // The name of a subsection is looked at before it is read.
                (false, [from, to]) => assert!((*from..*to + 64).contains(&at), "{why}"),
                _ => panic!("{why}"),
            }
            if told.contains("hash differs") {
                let name = section.map_or("header", |(name, _)| name);
                let is_ram = at < page && told.contains("section 'ram' 0");
                assert!(told.contains(name) || is_ram, "{why}");
                by_hash += 1;
            }
        }
    }
    assert!(by_hash > (eof - devices) / 6, "{by_hash}");
}

/// Where the stream ends is where it was cut, and the text says in which section.
#[test]
fn every_cut_is_told_with_its_place() {
    let own = Own::new();
    let sections = own.sections();
    let [page, devices, _] = own.bounds;
    for at in (4..page).chain(some(devices..own.stream.len(), 11)) {
        let told = arrives(Accel::None, &own.stream[..at]).err().unwrap();
        let why = format!("cut at {at:#x}: {told}");
        assert_eq!(offsets(&told).last(), Some(&at), "{why}");
        // From behind a section's own name on.
        let section = sections.iter().rev().find(|(_, from)| *from + 64 <= at);
        if let Some((name, _)) = section.filter(|_| at <= own.bounds[2]) {
            let next = sections
                .iter()
                .any(|(_, from)| (at - 64..=at).contains(from));
            assert!(next || told.contains(name), "{why}");
        }
    }
}

#[test]
fn a_damaged_description_does_not_change_the_guest() {
    let own = Own::new();
    let mut stream = own.stream.clone();
    for at in some(own.bounds[2] + 1..stream.len(), 11) {
        stream[at] ^= 1 << (at % 8);
        match arrives(Accel::None, &stream) {
            Ok(machine) => assert!(own.is_same(&machine), "byte {at:#x}"),
            // The hash itself was hit.
            Err(told) if told.starts_with("Guest memory was corrupted") => {}
            Err(told) => assert!(!offsets(&told).is_empty(), "{told}"),
        }
        stream[at] ^= 1 << (at % 8);
    }
}
