//! The local APIC: emulated by KVM; here its state on the wire.
//!
//! QEMU's section `apic` version 3, one instance per vCPU. The current timer count is not in it:
//! a periodic or one-shot timer starts a full period anew after every migration, as with QEMU.

use kvm_bindings::kvm_lapic_state;

use crate::vmstate::{Result, Visitor, VmState};

/// First address of the local APICs' window (and of message-signalled interrupts).
pub(crate) const BASE: u64 = 0xfee0_0000;
/// Bytes of the window.
pub(crate) const SIZE: u64 = 0x10_0000;

/// What is migrated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Apic {
    /// MSR 0x1b as far as QEMU keeps it: address and enable bits.
    pub(crate) apicbase: u32,
    id: u8,
    arb_id: u8,
    /// Task priority; CR8 is its upper half.
    pub(crate) tpr: u8,
    spurious_vec: u32,
    log_dest: u8,
    dest_mode: u8,
    isr: [u32; 8],
    tmr: [u32; 8],
    irr: [u32; 8],
    lvt: [u32; 6],
    esr: u32,
    icr: [u32; 2],
    divide_conf: u32,
    count_shift: i32,
    initial_count: u32,
    initial_count_load_time: i64,
    next_time: i64,
    timer_expiry: i64,
}

impl Apic {
    /// The APIC of vCPU `index` at reset.
    pub(crate) fn at_reset(index: usize) -> Self {
        let is_boot_cpu = index == 0;
        Self {
            apicbase: 0xfee0_0800 | if is_boot_cpu { 0x100 } else { 0 },
            id: index as u8,
            arb_id: 0,
            tpr: 0,
            spurious_vec: 0xff,
            log_dest: 0,
            dest_mode: 0xf,
            isr: [0; 8],
            tmr: [0; 8],
            irr: [0; 8],
            lvt: [MASKED; 6],
            esr: 0,
            icr: [0; 2],
            divide_conf: 0,
            count_shift: 1,
            initial_count: 0,
            initial_count_load_time: 0,
            next_time: 0,
            timer_expiry: -1,
        }
    }

    /// Makes KVM's reset state QEMU's: all interrupts masked, a PIC's at LINT0 too.
    pub(crate) fn power_on(&mut self) {
        self.lvt = [MASKED; 6];
    }

    /// State out of KVM's register page and APIC base.
    pub(crate) fn from_kvm(page: &kvm_lapic_state, apic_base: u64) -> Self {
        let reg = |at: usize| register(page, at);
        let vector = |at: usize| std::array::from_fn(|n| reg(at + n * 0x10));
        let divide_conf = reg(0x3e0);
        let divider = (divide_conf & 3) | ((divide_conf >> 1) & 4);
        Self {
            apicbase: apic_base as u32,
            id: (reg(0x20) >> 24) as u8,
            arb_id: (reg(0x90) >> 24) as u8,
            tpr: reg(0x80) as u8,
            spurious_vec: reg(0xf0),
            log_dest: (reg(0xd0) >> 24) as u8,
            dest_mode: (reg(0xe0) >> 28) as u8,
            isr: vector(0x100),
            tmr: vector(0x180),
            irr: vector(0x200),
            lvt: LVT.map(reg),
            esr: reg(0x280),
            icr: [reg(0x300), reg(0x310)],
            divide_conf,
            count_shift: ((divider + 1) & 7).cast_signed(),
            initial_count: reg(0x380),
            initial_count_load_time: 0,
            next_time: 0,
            timer_expiry: -1,
        }
    }

    /// KVM's register page. Registers that are not migrated are zero.
    pub(crate) fn to_kvm(&self) -> kvm_lapic_state {
        let mut page = kvm_lapic_state::default();
        let mut set = |at: usize, value: u32| {
            for (to, from) in page.regs[at..].iter_mut().zip(value.to_le_bytes()) {
                *to = from as _;
            }
        };
        set(0x20, u32::from(self.id) << 24);
        set(0x80, u32::from(self.tpr));
        set(0xd0, u32::from(self.log_dest) << 24);
        set(0xe0, u32::from(self.dest_mode) << 28 | 0x0fff_ffff);
        set(0xf0, self.spurious_vec);
        for n in 0..8 {
            set(0x100 + n * 0x10, self.isr[n]);
            set(0x180 + n * 0x10, self.tmr[n]);
            set(0x200 + n * 0x10, self.irr[n]);
        }
        set(0x280, self.esr);
        set(0x300, self.icr[0]);
        set(0x310, self.icr[1]);
        for (at, value) in LVT.into_iter().zip(self.lvt) {
            set(at, value);
        }
        set(0x380, self.initial_count);
        set(0x3e0, self.divide_conf);
        page
    }
}

impl VmState for Apic {
    const NAME: &'static str = "apic";
    const VERSION: u32 = 3;

    fn fields(&mut self, v: &mut dyn Visitor, _version: u32) -> Result {
        v.number("apicbase", &mut self.apicbase)?;
        v.number("id", &mut self.id)?;
        v.number("arb_id", &mut self.arb_id)?;
        v.number("tpr", &mut self.tpr)?;
        v.number("spurious_vec", &mut self.spurious_vec)?;
        v.number("log_dest", &mut self.log_dest)?;
        v.ranged("dest_mode", &mut self.dest_mode, 0..=0xf)?;
        v.array("isr", &mut self.isr)?;
        v.array("tmr", &mut self.tmr)?;
        v.array("irr", &mut self.irr)?;
        v.array("lvt", &mut self.lvt)?;
        v.number("esr", &mut self.esr)?;
        v.array("icr", &mut self.icr)?;
        v.number("divide_conf", &mut self.divide_conf)?;
        v.number("count_shift", &mut self.count_shift)?;
        v.number("initial_count", &mut self.initial_count)?;
        v.number("initial_count_load_time", &mut self.initial_count_load_time)?;
        v.number("next_time", &mut self.next_time)?;
        v.number("timer_expiry", &mut self.timer_expiry)
    }
}

/// The 32-bit register at that offset of the page.
fn register(page: &kvm_lapic_state, at: usize) -> u32 {
    let mut word = [0; 4];
    for (to, from) in word.iter_mut().zip(&page.regs[at..]) {
        *to = *from as u8;
    }
    u32::from_le_bytes(word)
}

/// Offsets of the local vector table: timer, thermal, performance, LINT0, LINT1, error.
const LVT: [usize; 6] = [0x320, 0x330, 0x340, 0x350, 0x360, 0x370];
const MASKED: u32 = 1 << 16;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmstate::{load, save};

    #[test]
    fn a_page_survives_both_conversions() {
        let mut page = kvm_lapic_state::default();
        for at in (0x20..0x400).step_by(0x10) {
            page.regs[at] = (at >> 4) as _;
            page.regs[at + 3] = 0x15;
        }
        let apic = Apic::from_kvm(&page, 0xfee0_0900);
        let again = Apic::from_kvm(&apic.to_kvm(), 0xfee0_0900);
        assert_eq!(again, Apic { arb_id: 0, ..apic });
    }

    #[test]
    fn reset_state_is_181_bytes_and_loads() {
        let mut apic = Apic::at_reset(3);
        let bytes = save(&mut apic).unwrap();
        assert_eq!(bytes.len(), 181);
        let mut again = Apic::at_reset(0);
        load(&mut again, 3, &mut &bytes[..]).unwrap();
        assert_eq!(again, apic);
    }
}
