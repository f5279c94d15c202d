//! Device sections of a real QEMU, and our descriptions beside its own.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

use super::*;
use crate::vm::guest::SectionHeader;

/// Bytes that a description says a section has.
pub(super) fn described_size(object: &Value) -> u64 {
    let fields = object["fields"].as_array().unwrap().iter();
    let plain: u64 = fields
        .map(|f| f["size"].as_u64().unwrap() * f["array_len"].as_u64().unwrap_or(1))
        .sum();
    let subsections = object["subsections"]
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default();
    let optional: u64 = subsections
        .iter()
        .map(|s| 6 + s["vmsd_name"].as_str().unwrap().len() as u64 + described_size(s))
        .sum();
    plain + optional
}

/// Switches COM1's FIFOs and two of its interrupts on, sets MSRs 0x3b, 0x4b564d06, 4, 3, 5, 1, 0
/// and 2, prints `O`, and loops.
#[rustfmt::skip]
const REGISTERS: &[u8] = &[
    0xba, 0xfa, 0x03, 0xb0, 0x01, 0xee, 0xba, 0xf9, 0x03, 0xb0, 0x03, 0xee, 0x66, 0xb9, 0x3b, 0x00,
    0x00, 0x00, 0x66, 0xb8, 0x00, 0x10, 0x00, 0x00, 0x66, 0x31, 0xd2, 0x0f, 0x30, 0x66, 0xb9, 0x06,
    0x4d, 0x56, 0x4b, 0x66, 0xb8, 0xf3, 0x00, 0x00, 0x00, 0x66, 0x31, 0xd2, 0x0f, 0x30, 0x66, 0xb9,
    0x04, 0x4d, 0x56, 0x4b, 0x66, 0xb8, 0x01, 0x30, 0x00, 0x00, 0x66, 0x31, 0xd2, 0x0f, 0x30, 0x66,
    0xb9, 0x03, 0x4d, 0x56, 0x4b, 0x66, 0xb8, 0x01, 0x40, 0x00, 0x00, 0x66, 0x31, 0xd2, 0x0f, 0x30,
    0x66, 0xb9, 0x05, 0x4d, 0x56, 0x4b, 0x66, 0xb8, 0x00, 0x00, 0x00, 0x00, 0x66, 0x31, 0xd2, 0x0f,
    0x30, 0x66, 0xb9, 0x01, 0x4d, 0x56, 0x4b, 0x66, 0xb8, 0x01, 0x50, 0x00, 0x00, 0x66, 0x31, 0xd2,
    0x0f, 0x30, 0x66, 0xb9, 0x00, 0x4d, 0x56, 0x4b, 0x66, 0xb8, 0x00, 0x60, 0x00, 0x00, 0x66, 0x31,
    0xd2, 0x0f, 0x30, 0x66, 0xb9, 0x02, 0x4d, 0x56, 0x4b, 0x66, 0xb8, 0x09, 0x70, 0x00, 0x00, 0x66,
    0x31, 0xd2, 0x0f, 0x30, 0xba, 0xf8, 0x03, 0xb0, 0x4f, 0xee, 0xeb, 0xfe,
];

/// A device section of a stream.
struct Captured {
    header: SectionHeader,
    body: Vec<u8>,
    description: Value,
}

/// A stopped guest's stream out of QEMU, after `hello` was typed on its serial line; `None` (and
/// said so) where there is no such QEMU.
fn capture(qemu: &str, default: Option<&str>, machine: &str, bios: &Path) -> Option<Vec<u8>> {
    let variable = format!("HMPSH_{}", qemu.to_uppercase());
    let Some(command) = std::env::var(&variable).ok().or(default.map(str::to_owned)) else {
        skipped(qemu, &format!("{variable} is not set"));
        return None;
    };
    let dir = tempfile::tempdir().unwrap();
    let (stream, line) = (dir.path().join("stream"), dir.path().join("line"));
    let serial = format!("unix:{},server=on,wait=off", line.display());
    let mut words = command.split_whitespace();
    let spawned = Command::new(words.next().unwrap())
        .args(words)
        .args([
            "-M",
            machine,
            "-m",
            "16",
            "-smp",
            "2",
            "-nodefaults",
            "-display",
            "none",
        ])
        .args([
            "-serial", &serial, "-monitor", "stdio", "-accel", "kvm", "-bios",
        ])
        .arg(bios)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let Ok(mut child) = spawned else {
        skipped(qemu, &format!("{command} can not be started"));
        return None;
    };
    let mut monitor = child.stdin.take().unwrap();
    let start = Instant::now();
    let mut terminal = loop {
        match UnixStream::connect(&line) {
            Ok(stream) => break stream,
            Err(error) => assert!(start.elapsed() < PATIENCE, "{command}: {error}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    // Time for the guest to set up its chips, and for QEMU to take the input.
    std::thread::sleep(Duration::from_millis(400));
    terminal.write_all(b"hello").unwrap();
    std::thread::sleep(Duration::from_millis(300));
    let migrate = format!("stop\nmigrate \"exec:cat > {}\"\nquit\n", stream.display());
    monitor.write_all(migrate.as_bytes()).unwrap();
    drop(monitor);
    assert!(child.wait().unwrap().success(), "{command}");
    Some(std::fs::read(stream).unwrap())
}

/// The device sections of a whole stream, cut by the description at its end.
fn device_sections(stream: &[u8]) -> Vec<Captured> {
    let json = (0..stream.len())
        .rev()
        .filter(|at| stream[*at..].starts_with(b"\0\x06"))
        .find_map(|at| serde_json::from_slice::<Value>(stream.get(at + 6..)?).ok())
        .unwrap();
    let mut sections = Vec::new();
    let mut from = 0;
    for description in json["devices"].as_array().unwrap() {
        let idstr = description["name"].as_str().unwrap();
        let instance = description["instance_id"].as_u64().unwrap() as u32;
        // The head of a full section, whatever its id: length and name, instance.
        let mut head = vec![idstr.len() as u8];
        head.extend_from_slice(idstr.as_bytes());
        head.extend_from_slice(&instance.to_be_bytes());
        let at = (from..stream.len())
            .find(|at| *at > 5 && stream[*at - 5] == 4 && stream[*at..].starts_with(&head))
            .unwrap();
        let id = &stream[at - 4..at];
        let start = at + head.len() + 4;
        let version = u32::from_be_bytes(stream[start - 4..start].try_into().unwrap());
        let end = start + described_size(description) as usize;
        assert_eq!(stream[end], 0x7e, "footer of {idstr}");
        assert_eq!(&stream[end + 1..end + 5], id);
        from = end;
        sections.push(Captured {
            header: SectionHeader {
                idstr: idstr.to_owned(),
                instance,
                version,
            },
            body: stream[start..end].to_vec(),
            description: description.clone(),
        });
    }
    sections
}

fn loads_and_is_described_alike(
    qemu: &str,
    default: Option<&str>,
    options: &str,
    chips: Chips,
    code: &[u8],
) {
    if !has_kvm() {
        return;
    }
    let bios = image(code);
    let Some(stream) = capture(qemu, default, options, bios.path()) else {
        return;
    };
    let captured = device_sections(&stream);
    let config = MachineConfig {
        vcpus: 2,
        chips,
        ..config(bios.path().to_owned())
    };
    let bench = Bench::new(&config, true);
    let mut loader = bench.machine.loader();
    for Captured { header, body, .. } in captured.iter().filter(|c| c.header.idstr != "globalstate")
    {
        let mut rest = &body[..];
        loader.load(header, &mut rest).unwrap();
        assert!(rest.is_empty(), "{} {}", header.idstr, header.instance);
    }
    assert_eq!(loader.missing(), Vec::<String>::new());
    loader.apply().unwrap();
    let registers = bench.machine.registers(0).unwrap();
    assert_eq!(registers.sregs.cs.base, 0xf0000);
    assert!(registers.regs.rip < code.len() as u64);

    let saved = bench.machine.save_devices().unwrap();
    for ours in &saved {
        let theirs = captured.iter().find(|c| c.header == ours.header).unwrap();
        for (name, member) in ours.description.as_object().unwrap() {
            assert_eq!(
                member, &theirs.description[name],
                "{} {name}",
                ours.header.idstr
            );
        }
        let name = ours.header.idstr.as_str();
        let (mut ours, mut theirs) = (ours.body.clone(), theirs.body.clone());
        match name {
            // The time stamp counter goes on, and of two chips with equal meaning bytes differ.
            "cpu" => continue,
            // QEMU's own clock, of no use elsewhere.
            "apic" => theirs[157..165].fill(0),
            // The timer's line, which QEMU's own PIT holds high, is taken for low.
            "i8259" => theirs[0] &= !1,
            // Times count from the stop.
            "i8254" => {
                ours[28..36].copy_from_slice(&theirs[28..36]);
                for bytes in [&mut ours, &mut theirs] {
                    for at in [20, 28, 52, 60, 84, 92, 100] {
                        bytes[at..at + 8].fill(0);
                    }
                }
            }
            // The time of day goes on.
            "mc146818rtc" => ours[..10].copy_from_slice(&theirs[..10]),
            _ => {}
        }
        assert_eq!(ours, theirs, "{name}");
    }
}

#[test]
fn qemu_7_sections_load_and_ours_are_described_alike() {
    let options = "microvm,acpi=off,pic=off,pit=off,rtc=off";
    loads_and_is_described_alike("qemu7", QEMU_7, options, NO_CHIP, COUNTER);
}

#[test]
fn qemu_7_sections_of_chips_we_lack_are_dropped() {
    let options = "microvm,acpi=off,pic=on,pit=on,rtc=on";
    loads_and_is_described_alike("qemu7", QEMU_7, options, NO_CHIP, COUNTER);
}

#[test]
fn qemu_sections_of_every_chip_load_and_ours_are_described_alike() {
    let options = "microvm,acpi=off,pic=on,pit=on,rtc=on";
    loads_and_is_described_alike("qemu7", QEMU_7, options, EVERY_CHIP, COUNTER);
    loads_and_is_described_alike("qemu10", None, options, EVERY_CHIP, COUNTER);
}

#[test]
fn qemu_10_sections_load_and_ours_are_described_alike() {
    let options = "microvm,acpi=off,pic=off,pit=off,rtc=off,kernel-irqchip=on";
    for code in [COUNTER, REGISTERS] {
        loads_and_is_described_alike("qemu10", None, options, NO_CHIP, code);
    }
}

#[test]
fn qemu_7_subsections_load_and_ours_are_described_alike() {
    // In KVM as ours is: QEMU's own I/O APIC forgets an edge on a masked pin.
    let options = "microvm,acpi=off,pic=off,pit=off,rtc=off,kernel-irqchip=on";
    loads_and_is_described_alike("qemu7", QEMU_7, options, NO_CHIP, REGISTERS);
}

const QEMU_7: Option<&str> = Some("qemu-system-x86_64");
