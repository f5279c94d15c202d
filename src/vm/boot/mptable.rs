//! The MP configuration table: which processors there are and how interrupts get to them, where
//! there is no ACPI to say so.
//!
//! Byte for byte what QEMU's firmware for the microvm (qboot, `mptable.c`) leaves in the EBDA.
//! Intel MultiProcessor Specification 1.4, chapter 4.

use super::e820::EBDA;

/// What the table says of processors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::vm) struct Processors {
    /// How many, 1 to 16; APIC ids are 0 and so on.
    pub(in crate::vm) count: u8,
    /// CPUID leaf 1 EAX.
    pub(in crate::vm) signature: u32,
    /// CPUID leaf 1 EDX.
    pub(in crate::vm) features: u32,
}

/// The floating pointer and, right behind it, the table it points to; for address [`EBDA`].
pub(super) fn bytes(processors: &Processors) -> Vec<u8> {
    let io_apic = processors.count + 1;
    let mut entries = Vec::new();
    for id in 0..processors.count {
        let flags = if id == 0 { ENABLED | BOOT } else { ENABLED };
        entries.extend([PROCESSOR, id, APIC_VERSION, flags]);
        entries.extend(processors.signature.to_le_bytes());
        entries.extend(processors.features.to_le_bytes());
        entries.extend([0; 8]);
    }
    entries.extend([BUS, ISA_BUS]);
    entries.extend(b"ISA   ");
    entries.extend([IO_APIC, io_apic, APIC_VERSION, ENABLED]);
    entries.extend(IO_APIC_BASE.to_le_bytes());
    // The timer's line 0 is at pin 2; the cascade, whose line that would be, has none.
    for line in (0..16).filter(|line| *line != TIMER_PIN) {
        let pin = if line == 0 { TIMER_PIN } else { line };
        entries.extend([INTERRUPT, INT, 0, 0, ISA_BUS, line, io_apic, pin]);
    }
    entries.extend([LOCAL_INTERRUPT, EXT_INT, 0, 0, ISA_BUS, 0, 0, 0]);
    entries.extend([LOCAL_INTERRUPT, NMI, 0, 0, ISA_BUS, 0, ALL, 1]);

    let mut table = b"PCMP".to_vec();
    table.extend((HEADER_LEN + entries.len() as u16).to_le_bytes());
    table.extend([SPECIFICATION, 0]);
    table.extend(b"QBOOT   000000000000");
    // No OEM table. qboot leaves the number of entries 0, and kernels go by the length.
    table.extend([0; 8]);
    table.extend(APIC_BASE.to_le_bytes());
    table.extend([0; 4]);
    table.extend(entries);
    balance(&mut table, 7);

    let mut bytes = b"_MP_".to_vec();
    bytes.extend((EBDA as u32 + POINTER_LEN).to_le_bytes());
    // Length in paragraphs, specification, checksum; then the features: a table, no IMCR.
    bytes.extend([1, SPECIFICATION, 0, 0, 0, 0, 0, 0]);
    balance(&mut bytes, 10);
    bytes.extend(table);
    bytes
}

/// Sets the checksum at `at`: all bytes add up to 0.
fn balance(bytes: &mut [u8], at: usize) {
    let sum = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    bytes[at] = bytes[at].wrapping_sub(sum);
}

const POINTER_LEN: u32 = 16;
const HEADER_LEN: u16 = 44;
/// 1.4.
const SPECIFICATION: u8 = 4;
const APIC_VERSION: u8 = 0x14;
const APIC_BASE: u32 = 0xfee0_0000;
const IO_APIC_BASE: u32 = 0xfec0_0000;
/// Types of entries.
const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IO_APIC: u8 = 2;
const INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;
/// Flags of a processor.
const ENABLED: u8 = 1;
const BOOT: u8 = 2;
/// Types of interrupts.
const INT: u8 = 0;
const NMI: u8 = 1;
const EXT_INT: u8 = 3;
/// The only bus.
const ISA_BUS: u8 = 0;
/// Destination: all local APICs.
const ALL: u8 = 0xff;
/// The I/O APIC's pin for line 0.
const TIMER_PIN: u8 = 2;

#[cfg(test)]
mod tests {
    use super::*;

    /// What was in the memory of QEMU 7.2 (`-smp 2`, the CPUID values of that machine).
    #[rustfmt::skip]
    const QEMU: [u8; 252] = [
        0x5f, 0x4d, 0x50, 0x5f, 0x10, 0xfc, 0x09, 0x00, 0x01, 0x04, 0x8b, 0x00, 0x00, 0x00, 0x00, 0x00,
        0x50, 0x43, 0x4d, 0x50, 0xec, 0x00, 0x04, 0x72, 0x51, 0x42, 0x4f, 0x4f, 0x54, 0x20, 0x20, 0x20,
        0x30, 0x30, 0x30, 0x30, 0x30, 0x30, 0x30, 0x30, 0x30, 0x30, 0x30, 0x30, 0x00, 0x00, 0x00, 0x00,
        0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0xe0, 0xfe, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x14, 0x03,
        0xb1, 0x0f, 0x06, 0x00, 0xff, 0xfb, 0x8b, 0x1f, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
        0x00, 0x01, 0x14, 0x01, 0xb1, 0x0f, 0x06, 0x00, 0xff, 0xfb, 0x8b, 0x1f, 0x00, 0x00, 0x00, 0x00,
        0x00, 0x00, 0x00, 0x00, 0x01, 0x00, 0x49, 0x53, 0x41, 0x20, 0x20, 0x20, 0x02, 0x03, 0x14, 0x01,
        0x00, 0x00, 0xc0, 0xfe, 0x03, 0x00, 0x00, 0x00, 0x00, 0x00, 0x03, 0x02, 0x03, 0x00, 0x00, 0x00,
        0x00, 0x01, 0x03, 0x01, 0x03, 0x00, 0x00, 0x00, 0x00, 0x03, 0x03, 0x03, 0x03, 0x00, 0x00, 0x00,
        0x00, 0x04, 0x03, 0x04, 0x03, 0x00, 0x00, 0x00, 0x00, 0x05, 0x03, 0x05, 0x03, 0x00, 0x00, 0x00,
        0x00, 0x06, 0x03, 0x06, 0x03, 0x00, 0x00, 0x00, 0x00, 0x07, 0x03, 0x07, 0x03, 0x00, 0x00, 0x00,
        0x00, 0x08, 0x03, 0x08, 0x03, 0x00, 0x00, 0x00, 0x00, 0x09, 0x03, 0x09, 0x03, 0x00, 0x00, 0x00,
        0x00, 0x0a, 0x03, 0x0a, 0x03, 0x00, 0x00, 0x00, 0x00, 0x0b, 0x03, 0x0b, 0x03, 0x00, 0x00, 0x00,
        0x00, 0x0c, 0x03, 0x0c, 0x03, 0x00, 0x00, 0x00, 0x00, 0x0d, 0x03, 0x0d, 0x03, 0x00, 0x00, 0x00,
        0x00, 0x0e, 0x03, 0x0e, 0x03, 0x00, 0x00, 0x00, 0x00, 0x0f, 0x03, 0x0f, 0x04, 0x03, 0x00, 0x00,
        0x00, 0x00, 0x00, 0x00, 0x04, 0x01, 0x00, 0x00, 0x00, 0x00, 0xff, 0x01,
    ];

    #[test]
    fn the_bytes_of_qemu() {
        let processors = Processors {
            count: 2,
            signature: 0x0006_0fb1,
            features: 0x1f8b_fbff,
        };
        assert_eq!(bytes(&processors), QEMU);
    }

    #[test]
    fn any_number_of_processors_adds_up() {
        for count in 1..=16 {
            let processors = Processors {
                count,
                signature: u32::MAX,
                features: 0x0789_abcd,
            };
            let bytes = bytes(&processors);
            let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
            assert_eq!((sum(&bytes[..16]), sum(&bytes[16..])), (0, 0));
            let len = u16::from_le_bytes([bytes[20], bytes[21]]);
            assert_eq!(usize::from(len) + 16, bytes.len());
            assert!(bytes.len() <= 1024, "longer than the EBDA");
        }
    }
}
