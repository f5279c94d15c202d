//! Registers of a vCPU as `info registers` lays them out and as expressions name them.
//!
//! Pure text from what KVM reports. QEMU: `target/i386/cpu-dump.c` and `target/i386/monitor.c`.

use std::fmt::Write as _;

use kvm_bindings::kvm_segment;

use crate::vm::machine::Registers;

/// The value of `$name`: QEMU's names, and those of 64-bit code, which it does not know.
pub fn value(registers: &Registers, name: &str) -> Option<i64> {
    let regs = &registers.regs;
    let wide = match name {
        "eax" | "rax" => regs.rax,
        "ebx" | "rbx" => regs.rbx,
        "ecx" | "rcx" => regs.rcx,
        "edx" | "rdx" => regs.rdx,
        "esi" | "rsi" => regs.rsi,
        "edi" | "rdi" => regs.rdi,
        "ebp" | "rbp" | "fp" => regs.rbp,
        "esp" | "rsp" | "sp" => regs.rsp,
        "r8" => regs.r8,
        "r9" => regs.r9,
        "r10" => regs.r10,
        "r11" => regs.r11,
        "r12" => regs.r12,
        "r13" => regs.r13,
        "r14" => regs.r14,
        "r15" => regs.r15,
        "eflags" | "rflags" => regs.rflags,
        "eip" | "rip" => regs.rip,
        "pc" => registers.sregs.cs.base.wrapping_add(regs.rip),
        _ => return segment_value(registers, name),
    };
    Some(wide.cast_signed())
}

fn segment_value(registers: &Registers, name: &str) -> Option<i64> {
    let (name, part) = name.split_once('.').unwrap_or((name, "selector"));
    let segments = segments(registers);
    let (_, segment) = segments
        .iter()
        .find(|(known, _)| known.trim_end().eq_ignore_ascii_case(name))?;
    if name.bytes().any(|byte| byte.is_ascii_uppercase()) {
        return None;
    }
    match part {
        "selector" => Some(segment.selector.into()),
        "base" => Some(segment.base.cast_signed()),
        "limit" => Some(segment.limit.cast_signed().into()),
        _ => None,
    }
}

/// What `info registers` shows for one vCPU, after its heading.
pub fn dump(registers: &Registers) -> String {
    let mut text = String::new();
    // Writing to a String can not fail.
    let _ = write(&mut text, registers);
    text
}

fn write(text: &mut String, registers: &Registers) -> std::fmt::Result {
    let (regs, sregs) = (&registers.regs, &registers.sregs);
    let is_long = sregs.efer & EFER_LMA != 0 && sregs.cs.l != 0;
    let cpl = sregs.ss.dpl;
    if is_long {
        let rows = [
            [
                ("RAX", regs.rax),
                ("RBX", regs.rbx),
                ("RCX", regs.rcx),
                ("RDX", regs.rdx),
            ],
            [
                ("RSI", regs.rsi),
                ("RDI", regs.rdi),
                ("RBP", regs.rbp),
                ("RSP", regs.rsp),
            ],
            [
                ("R8 ", regs.r8),
                ("R9 ", regs.r9),
                ("R10", regs.r10),
                ("R11", regs.r11),
            ],
            [
                ("R12", regs.r12),
                ("R13", regs.r13),
                ("R14", regs.r14),
                ("R15", regs.r15),
            ],
        ];
        for row in rows {
            let row = row.map(|(name, value)| format!("{name}={value:016x}"));
            writeln!(text, "{}", row.join(" "))?;
        }
        write!(text, "RIP={:016x} RFL={:08x} ", regs.rip, regs.rflags)?;
    } else {
        let rows = [
            [
                ("EAX", regs.rax),
                ("EBX", regs.rbx),
                ("ECX", regs.rcx),
                ("EDX", regs.rdx),
            ],
            [
                ("ESI", regs.rsi),
                ("EDI", regs.rdi),
                ("EBP", regs.rbp),
                ("ESP", regs.rsp),
            ],
        ];
        for row in rows {
            let row = row.map(|(name, value)| format!("{name}={:08x}", low(value)));
            writeln!(text, "{}", row.join(" "))?;
        }
        write!(
            text,
            "EIP={:08x} EFL={:08x} ",
            low(regs.rip),
            low(regs.rflags)
        )?;
    }
    let flags: String = FLAGS
        .iter()
        .map(|(bit, letter)| if regs.rflags & bit != 0 { *letter } else { '-' })
        .collect();
    writeln!(
        text,
        "[{flags}] CPL={cpl} II={} A20=1 SMM=0 HLT={}",
        u8::from(registers.inhibited),
        u8::from(registers.halted)
    )?;
    for (name, segment) in segments(registers) {
        segment_line(text, registers, name, segment)?;
    }
    segment_line(text, registers, "LDT", &sregs.ldt)?;
    segment_line(text, registers, "TR ", &sregs.tr)?;
    let has_long = sregs.efer & EFER_LMA != 0;
    for (name, table) in [("GDT", &sregs.gdt), ("IDT", &sregs.idt)] {
        if has_long {
            writeln!(text, "{name}=     {:016x} {:08x}", table.base, table.limit)?;
        } else {
            writeln!(
                text,
                "{name}=     {:08x} {:08x}",
                low(table.base),
                table.limit
            )?;
        }
    }
    let (cr0, cr4) = (low(sregs.cr0), low(sregs.cr4));
    if has_long {
        writeln!(
            text,
            "CR0={cr0:08x} CR2={:016x} CR3={:016x} CR4={cr4:08x}",
            sregs.cr2, sregs.cr3
        )?;
    } else {
        let (cr2, cr3) = (low(sregs.cr2), low(sregs.cr3));
        writeln!(
            text,
            "CR0={cr0:08x} CR2={cr2:08x} CR3={cr3:08x} CR4={cr4:08x}"
        )?;
    }
    for (index, value) in registers.debug.db.iter().enumerate() {
        write!(text, "DR{index}={value:016x} ")?;
    }
    writeln!(
        text,
        "\nDR6={:016x} DR7={:016x}",
        registers.debug.dr6, registers.debug.dr7
    )?;
    writeln!(text, "EFER={:016x}", sregs.efer)?;
    floating(text, registers, is_long)
}

fn floating(text: &mut String, registers: &Registers, is_long: bool) -> std::fmt::Result {
    let fpu = &registers.fpu;
    let top = fpu.fsw >> 11 & 7;
    writeln!(
        text,
        "FCW={:04x} FSW={:04x} [ST={top}] FTW={:02x} MXCSR={:08x}",
        fpu.fcw, fpu.fsw, fpu.ftwx, fpu.mxcsr
    )?;
    for (index, register) in fpu.fpr.iter().enumerate() {
        let mantissa = little_endian(&register[..8]);
        let exponent = little_endian(&register[8..10]);
        let end = if index % 2 == 1 { '\n' } else { ' ' };
        write!(text, "FPR{index}={mantissa:016x} {exponent:04x}{end}")?;
    }
    let shown = if is_long { 16 } else { 8 };
    for (index, register) in fpu.xmm.iter().take(shown).enumerate() {
        let (low, high) = (little_endian(&register[..8]), little_endian(&register[8..]));
        let end = if index % 2 == 1 { '\n' } else { ' ' };
        write!(text, "XMM{index:02}={high:016x} {low:016x}{end}")?;
    }
    Ok(())
}

/// Selector, base, limit, flags; in protected mode what the descriptor means, too.
fn segment_line(
    text: &mut String,
    registers: &Registers,
    name: &str,
    segment: &kvm_segment,
) -> std::fmt::Result {
    let flags = descriptor(segment);
    write!(text, "{name}={:04x} ", segment.selector)?;
    if registers.sregs.efer & EFER_LMA != 0 && registers.sregs.cs.l != 0 {
        write!(
            text,
            "{:016x} {:08x} {flags:08x}",
            segment.base, segment.limit
        )?;
    } else {
        write!(
            text,
            "{:08x} {:08x} {flags:08x}",
            low(segment.base),
            segment.limit
        )?;
    }
    if registers.sregs.cr0 & CR0_PE != 0 && segment.present != 0 {
        write!(
            text,
            " {}",
            meaning(segment, registers.sregs.efer & EFER_LMA != 0)
        )?;
    }
    writeln!(text)
}

/// `DPL=0 CS64 [-RA]` and the like.
fn meaning(segment: &kvm_segment, has_long: bool) -> String {
    let dpl = segment.dpl;
    if segment.s == 0 {
        let names = if has_long { SYSTEM_64 } else { SYSTEM_32 };
        let name = names
            .get(usize::from(segment.type_))
            .copied()
            .unwrap_or("Reserved");
        return format!("DPL={dpl} {name}");
    }
    let letter = |bit: u8, set: char| if segment.type_ & bit != 0 { set } else { '-' };
    if segment.type_ & 8 != 0 {
        let name = match (segment.l, segment.db) {
            (0, 0) => "CS16",
            (0, _) => "CS32",
            _ => "CS64",
        };
        format!(
            "DPL={dpl} {name} [{}{}{}]",
            letter(4, 'C'),
            letter(2, 'R'),
            letter(1, 'A')
        )
    } else {
        let name = if segment.db != 0 || has_long {
            "DS  "
        } else {
            "DS16"
        };
        format!(
            "DPL={dpl} {name} [{}{}{}]",
            letter(4, 'E'),
            letter(2, 'W'),
            letter(1, 'A')
        )
    }
}

/// The descriptor's attribute bits at the places they have in its second word.
fn descriptor(segment: &kvm_segment) -> u32 {
    if segment.unusable != 0 {
        return 0;
    }
    let bits = [
        (segment.type_, 8),
        (segment.s, 12),
        (segment.dpl, 13),
        (segment.present, 15),
        (segment.avl, 20),
        (segment.l, 21),
        (segment.db, 22),
        (segment.g, 23),
    ];
    bits.iter().fold(0, |flags, (value, place)| {
        flags | u32::from(*value) << place
    })
}

fn segments(registers: &Registers) -> [(&'static str, &kvm_segment); 6] {
    let sregs = &registers.sregs;
    [
        ("ES ", &sregs.es),
        ("CS ", &sregs.cs),
        ("SS ", &sregs.ss),
        ("DS ", &sregs.ds),
        ("FS ", &sregs.fs),
        ("GS ", &sregs.gs),
    ]
}

fn low(value: u64) -> u32 {
    (value & 0xffff_ffff) as u32
}

fn little_endian(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .rev()
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}

const CR0_PE: u64 = 1;
const EFER_LMA: u64 = 1 << 10;

/// Flags of RFLAGS in the order they are shown.
const FLAGS: [(u64, char); 7] = [
    (1 << 10, 'D'),
    (1 << 11, 'O'),
    (1 << 7, 'S'),
    (1 << 6, 'Z'),
    (1 << 4, 'A'),
    (1 << 2, 'P'),
    (1, 'C'),
];

/// System descriptors outside long mode, by type.
const SYSTEM_32: [&str; 16] = [
    "Reserved",
    "TSS16-avl",
    "LDT",
    "TSS16-busy",
    "CallGate16",
    "TaskGate",
    "IntGate16",
    "TrapGate16",
    "Reserved",
    "TSS32-avl",
    "Reserved",
    "TSS32-busy",
    "CallGate32",
    "Reserved",
    "IntGate32",
    "TrapGate32",
];

/// System descriptors in long mode, by type.
const SYSTEM_64: [&str; 16] = [
    "<hiword>",
    "Reserved",
    "LDT",
    "Reserved",
    "Reserved",
    "Reserved",
    "Reserved",
    "Reserved",
    "Reserved",
    "TSS64-avl",
    "Reserved",
    "TSS64-busy",
    "CallGate64",
    "Reserved",
    "IntGate64",
    "TrapGate64",
];

#[cfg(test)]
mod tests {
    use super::*;

    /// A vCPU at reset, then with the segments of flat protected mode if asked for.
    fn cpu(is_protected: bool) -> Registers {
        let mut registers = Registers::default();
        let data = kvm_segment {
            limit: 0xffff,
            type_: 3,
            s: 1,
            present: 1,
            ..Default::default()
        };
        let sregs = &mut registers.sregs;
        for segment in [
            &mut sregs.es,
            &mut sregs.ss,
            &mut sregs.ds,
            &mut sregs.fs,
            &mut sregs.gs,
        ] {
            *segment = data;
        }
        sregs.cs = kvm_segment {
            selector: 0xf000,
            base: 0xffff_0000,
            type_: 11,
            ..data
        };
        sregs.ldt = kvm_segment {
            type_: 2,
            s: 0,
            ..data
        };
        sregs.tr = kvm_segment {
            type_: 11,
            s: 0,
            ..data
        };
        sregs.gdt.limit = 0xffff;
        sregs.idt.limit = 0xffff;
        sregs.cr0 = 0x6000_0010;
        registers.regs.rip = 0xfff0;
        registers.regs.rflags = 2;
        registers.regs.rdx = 0x6_0fb1;
        registers.debug.dr6 = 0xffff_0ff0;
        registers.debug.dr7 = 0x400;
        registers.fpu.fcw = 0x37f;
        registers.fpu.mxcsr = 0x1f80;
        if is_protected {
            let sregs = &mut registers.sregs;
            sregs.cr0 = 0x6000_0011;
            let flat = kvm_segment {
                selector: 0x10,
                limit: 0xffff_ffff,
                g: 1,
                db: 1,
                ..data
            };
            (sregs.es, sregs.ss, sregs.ds) = (flat, flat, flat);
            sregs.fs = kvm_segment {
                selector: 0x18,
                limit: 0x1234,
                dpl: 3,
                ..data
            };
            sregs.cs = kvm_segment {
                selector: 8,
                type_: 11,
                ..flat
            };
            sregs.gdt.limit = 0x27;
            registers.halted = true;
        }
        registers
    }

    #[test]
    fn real_mode_as_qemu_prints_it() {
        assert_eq!(dump(&cpu(false)), include_str!("golden/registers-real.txt"));
    }

    #[test]
    fn protected_mode_as_qemu_prints_it() {
        let mut registers = cpu(true);
        registers.sregs.gdt.base = 0xffff_0128;
        registers.regs.rax = 0x6000_0018;
        registers.regs.rbx = 0x1234_5678;
        registers.regs.rsp = 0x7000;
        registers.regs.rip = 0xffff_0037;
        registers.regs.rflags = 0x407;
        assert_eq!(
            dump(&registers),
            include_str!("golden/registers-protected.txt")
        );
    }

    #[test]
    fn long_mode_as_qemu_prints_it() {
        let mut registers = cpu(true);
        let sregs = &mut registers.sregs;
        sregs.gdt.base = 0xffff_0120;
        sregs.cr0 = 0xe000_0011;
        sregs.cr3 = 0x1000;
        sregs.cr4 = 0x20;
        sregs.efer = 0x500;
        sregs.cs = kvm_segment {
            selector: 0x20,
            l: 1,
            db: 0,
            ..sregs.cs
        };
        let regs = &mut registers.regs;
        regs.rax = 0x1122_3344_5566_7788;
        regs.rcx = 0xc000_0080;
        regs.rdx = 0;
        regs.rsp = 0x8000;
        regs.r8 = 0x99aa_bbcc_ddee_ff00;
        regs.r15 = 0xfedc_ba98_7654_3210;
        regs.rip = 0xffff_011a;
        regs.rflags = 0x86;
        assert_eq!(dump(&registers), include_str!("golden/registers-long.txt"));
        assert_eq!(value(&registers, "r15"), Some(-0x0123_4567_89ab_cdf0));
    }

    #[test]
    fn names() {
        let registers = cpu(true);
        assert_eq!(value(&registers, "cs.limit"), Some(-1));
        assert_eq!(value(&registers, "fs"), Some(0x18));
        assert_eq!(value(&registers, "fs.limit"), Some(0x1234));
        assert_eq!(value(&registers, "pc"), value(&registers, "eip"));
        for unknown in ["EAX", "CS", "cs.foo", "", "xmm0", "cs.base.x"] {
            assert_eq!(value(&registers, unknown), None, "{unknown}");
        }
    }
}
