//! Moves a vCPU's state from and to KVM, in the one order that works.
//!
//! Reading: events and MP state first, because reading the latter may change CS:RIP. Writing:
//! the local APIC before everything, the TSC deadline after it (KVM drops a deadline while the
//! timer is not in deadline mode). The vCPU must be at rest with its pending I/O completed. A
//! value that KVM refuses is an error that names it. QEMU: target/i386/kvm/kvm.c.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use kvm_bindings::{
    KVM_MP_STATE_RUNNABLE, KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_SHADOW,
    KVM_VCPUEVENT_VALID_SIPI_VECTOR, KVM_VCPUEVENT_VALID_TRIPLE_FAULT, KVM_X86_SHADOW_INT_STI,
    Msrs, kvm_debugregs, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events,
    kvm_xcrs,
};
use kvm_ioctls::VcpuFd;

use super::msr::{APIC_BASE, TSC_DEADLINE};
use super::segment::Segment;
use super::{CpuState, HF_INHIBIT_IRQ, HF2_GIF, HF2_NMI, HF2_VGIF, XsaveLayout};
use crate::vm::device::apic::Apic;
use crate::vm::guest::Error;
use crate::vm::kvm;

/// What this host's KVM has, as far as a vCPU's state depends on it.
#[derive(Clone, Debug, Default)]
pub(in crate::vm) struct Features {
    /// Model-specific registers that can be read and written.
    pub(in crate::vm) msrs: BTreeSet<u32>,
    /// Places in the XSAVE area.
    pub(in crate::vm) xsave: XsaveLayout,
    /// The guest's physical address width, bits.
    pub(in crate::vm) physical_bits: u32,
    /// Machine-check capabilities of each vCPU.
    pub(in crate::vm) mcg_cap: u64,
    /// Whether a pending triple fault is part of the events.
    pub(in crate::vm) triple_fault: bool,
}

/// Reads everything that is migrated of a vCPU.
pub(in crate::vm) fn read(vcpu: &VcpuFd, features: &Features) -> Result<(CpuState, Apic), Error> {
    let mut state = CpuState {
        a20_mask: -1,
        ..CpuState::default()
    };
    state.read_events(&call("KVM_GET_VCPU_EVENTS", vcpu.get_vcpu_events())?);
    state.mp_state = call("KVM_GET_MP_STATE", vcpu.get_mp_state())?.mp_state;
    state.read_regs(&call("KVM_GET_REGS", vcpu.get_regs())?);
    state.read_xsave(&call("KVM_GET_XSAVE", vcpu.get_xsave())?, &features.xsave);
    let xcrs = call("KVM_GET_XCRS", vcpu.get_xcrs())?;
    state.xcr0 = xcrs.xcrs.iter().find(|x| x.xcr == 0).map_or(1, |x| x.value) | 1;
    let sregs = call("KVM_GET_SREGS", vcpu.get_sregs())?;
    state.read_sregs(&sregs);
    state.mcg_cap = features.mcg_cap;
    state.optional.poll_control_msr = super::POLL_CONTROL_DEFAULT;
    state.optional.misc_enable = super::MISC_ENABLE_DEFAULT;
    state.read_msrs(vcpu, features)?;
    state.optional.tsc_khz = vcpu.get_tsc_khz().map(i64::from).unwrap_or(0);
    let apic = Apic::from_kvm(&call("KVM_GET_LAPIC", vcpu.get_lapic())?, sregs.apic_base);
    state.read_debug(&call("KVM_GET_DEBUGREGS", vcpu.get_debug_regs())?);
    Ok((state, apic))
}

/// Whether the vCPU is about to run an instruction that no interrupt may precede.
pub(in crate::vm) fn in_shadow(vcpu: &VcpuFd) -> Result<bool, Error> {
    let events = call("KVM_GET_VCPU_EVENTS", vcpu.get_vcpu_events())?;
    let mp_state = call("KVM_GET_MP_STATE", vcpu.get_mp_state())?.mp_state;
    Ok(events.interrupt.shadow != 0 && mp_state == KVM_MP_STATE_RUNNABLE)
}

/// Writes a local APIC: base first (it decides the mode), then the registers.
pub(in crate::vm) fn write_apic(vcpu: &VcpuFd, apic: &Apic) -> Result<(), Error> {
    set_msr(vcpu, APIC_BASE, u64::from(apic.apicbase))?;
    let what = || "apic: KVM_SET_LAPIC".to_owned();
    vcpu.set_lapic(&apic.to_kvm())
        .map_err(|error| system(what(), error))
}

/// Writes a vCPU's state. `apic` is what [`write_apic`] was given: its base and task priority
/// are special registers too. Returns what of the state this host's KVM has no place for.
pub(in crate::vm) fn write(
    vcpu: &VcpuFd,
    features: &Features,
    state: &mut CpuState,
    apic: &Apic,
) -> Result<Vec<String>, Error> {
    state.trim_mtrrs(features.physical_bits);
    set(
        "KVM_SET_SREGS",
        vcpu.set_sregs(&state.to_sregs(apic)),
        || {
            format!(
                "cr0 {:#x} cr4 {:#x} efer {:#x}",
                state.cr[0], state.cr[3], state.efer
            )
        },
    )?;
    state.write_tsc_khz(vcpu);
    set("KVM_SET_REGS", vcpu.set_regs(&state.to_regs()), || {
        format!("eip {:#x}", state.eip)
    })?;
    set(
        "KVM_SET_XSAVE",
        kvm::set_xsave(vcpu, &state.to_xsave(&features.xsave)),
        || format!("xstate_bv {:#x} mxcsr {:#x}", state.xstate_bv, state.mxcsr),
    )?;
    let mut xcrs = kvm_xcrs {
        nr_xcrs: 1,
        ..Default::default()
    };
    xcrs.xcrs[0].value = state.xcr0;
    set("KVM_SET_XCRS", vcpu.set_xcrs(&xcrs), || {
        format!("xcr0 {:#x}", state.xcr0)
    })?;
    state.write_msrs(vcpu, features)?;
    set(
        "KVM_SET_VCPU_EVENTS",
        vcpu.set_vcpu_events(&state.to_events(features)),
        || {
            format!(
                "exception {} interrupt {}",
                state.exception_nr, state.interrupt_injected
            )
        },
    )?;
    let mp_state = kvm_mp_state {
        mp_state: state.mp_state,
    };
    set("KVM_SET_MP_STATE", vcpu.set_mp_state(mp_state), || {
        format!("{}", state.mp_state)
    })?;
    if features.msrs.contains(&TSC_DEADLINE) {
        set_msr(vcpu, TSC_DEADLINE, state.optional.tsc_deadline)?;
    }
    set(
        "KVM_SET_DEBUGREGS",
        vcpu.set_debug_regs(&state.to_debug()),
        || format!("dr6 {:#x} dr7 {:#x}", state.dr[6], state.dr[7]),
    )?;
    Ok(state.lost(features))
}

impl CpuState {
    fn read_regs(&mut self, r: &kvm_regs) {
        self.regs = [
            r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11,
            r.r12, r.r13, r.r14, r.r15,
        ];
        self.eip = r.rip;
        self.eflags = r.rflags;
    }

    /// General registers as KVM orders them.
    pub(in crate::vm) fn to_regs(&self) -> kvm_regs {
        let [
            rax,
            rcx,
            rdx,
            rbx,
            rsp,
            rbp,
            rsi,
            rdi,
            r8,
            r9,
            r10,
            r11,
            r12,
            r13,
            r14,
            r15,
        ] = self.regs;
        #[rustfmt::skip]
        let regs = kvm_regs {
            rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15,
            rip: self.eip,
            rflags: self.eflags,
        };
        regs
    }

    fn read_sregs(&mut self, s: &kvm_sregs) {
        // Real mode has no privilege levels; old KVMs showed some.
        let is_real = s.cr0 & 1 == 0;
        self.segs =
            [&s.es, &s.cs, &s.ss, &s.ds, &s.fs, &s.gs].map(|x| Segment::from_kvm(x, is_real));
        self.ldt = Segment::from_kvm(&s.ldt, false);
        self.tr = Segment::from_kvm(&s.tr, false);
        self.gdt = Segment::from_table(&s.gdt);
        self.idt = Segment::from_table(&s.idt);
        self.cr = [s.cr0, s.cr2, s.cr3, s.cr4];
        self.efer = s.efer;
    }

    /// Segment and control registers as KVM has them.
    pub(in crate::vm) fn to_sregs(&self, apic: &Apic) -> kvm_sregs {
        let is_real = self.cr[0] & 1 == 0;
        let is_v86 = self.eflags & EFLAGS_VM != 0;
        let [es, cs, ss, ds, fs, gs] = self.segs.map(|x| {
            if is_v86 {
                x.to_kvm_v86()
            } else {
                x.to_kvm(is_real)
            }
        });
        kvm_sregs {
            cs,
            ds,
            es,
            fs,
            gs,
            ss,
            tr: self.tr.to_kvm(false),
            ldt: self.ldt.to_kvm(false),
            gdt: self.gdt.to_table(),
            idt: self.idt.to_table(),
            cr0: self.cr[0],
            cr2: self.cr[1],
            cr3: self.cr[2],
            cr4: self.cr[3],
            cr8: u64::from(apic.tpr >> 4),
            efer: self.efer,
            apic_base: u64::from(apic.apicbase),
            interrupt_bitmap: [0; 4],
        }
    }

    fn read_debug(&mut self, d: &kvm_debugregs) {
        self.dr[..4].copy_from_slice(&d.db);
        (self.dr[4], self.dr[6]) = (d.dr6, d.dr6);
        (self.dr[5], self.dr[7]) = (d.dr7, d.dr7);
    }

    /// Debug registers as KVM has them.
    pub(in crate::vm) fn to_debug(&self) -> kvm_debugregs {
        let [a, b, c, d, _, _, dr6, dr7] = self.dr;
        kvm_debugregs {
            db: [a, b, c, d],
            dr6,
            dr7,
            ..Default::default()
        }
    }

    fn read_events(&mut self, e: &kvm_vcpu_events) {
        let number = |injected: u8, nr: u8| if injected != 0 { i32::from(nr) } else { -1 };
        self.exception_nr = number(e.exception.injected, e.exception.nr);
        self.has_error_code = e.exception.has_error_code != 0;
        self.interrupt_injected = number(e.interrupt.injected, e.interrupt.nr);
        self.soft_interrupt = e.interrupt.soft != 0;
        self.nmi_injected = e.nmi.injected != 0;
        self.nmi_pending = e.nmi.pending != 0;
        self.sipi_vector = e.sipi_vector & 0xff;
        self.hflags = if e.interrupt.shadow != 0 {
            HF_INHIBIT_IRQ
        } else {
            0
        };
        self.hflags2 = HF2_GIF | HF2_VGIF | if e.nmi.masked != 0 { HF2_NMI } else { 0 };
        self.optional.triple_fault = e.triple_fault.pending != 0;
    }

    fn to_events(&self, features: &Features) -> kvm_vcpu_events {
        let mut e = kvm_vcpu_events::default();
        if let Ok(nr) = u8::try_from(self.exception_nr) {
            (e.exception.injected, e.exception.nr) = (1, nr);
            e.exception.has_error_code = u8::from(self.has_error_code);
        }
        if let Ok(nr) = u8::try_from(self.interrupt_injected) {
            (e.interrupt.injected, e.interrupt.nr) = (1, nr);
            e.interrupt.soft = u8::from(self.soft_interrupt);
        }
        if self.hflags & HF_INHIBIT_IRQ != 0 {
            e.interrupt.shadow = KVM_X86_SHADOW_INT_STI as u8;
        }
        e.nmi.injected = u8::from(self.nmi_injected);
        e.nmi.pending = u8::from(self.nmi_pending);
        e.nmi.masked = u8::from(self.hflags2 & HF2_NMI != 0);
        e.flags = KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW;
        if self.mp_state == MP_STATE_SIPI_RECEIVED {
            e.sipi_vector = self.sipi_vector;
            e.flags |= KVM_VCPUEVENT_VALID_SIPI_VECTOR;
        }
        if features.triple_fault {
            e.triple_fault.pending = u8::from(self.optional.triple_fault);
            e.flags |= KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
        }
        e
    }

    fn write_tsc_khz(&self, vcpu: &VcpuFd) {
        let Some(khz) = u32::try_from(self.optional.tsc_khz)
            .ok()
            .filter(|khz| *khz != 0)
        else {
            return;
        };
        let here = vcpu.get_tsc_khz().unwrap_or(0);
        if here != khz && vcpu.set_tsc_khz(khz).is_err() {
            log::warn!(
                "TSC frequency mismatch between VM ({khz} kHz) and host ({here} kHz), \
                 and TSC scaling unavailable"
            );
        }
    }

    fn read_msrs(&mut self, vcpu: &VcpuFd, features: &Features) -> Result<(), Error> {
        let mut wanted = Vec::new();
        self.msrs(&mut |index, _| wanted.push(index));
        wanted.push(TSC_DEADLINE);
        wanted.retain(|index| features.msrs.contains(index));
        let entries: Vec<_> = wanted
            .iter()
            .map(|index| kvm_msr_entry {
                index: *index,
                ..Default::default()
            })
            .collect();
        let mut msrs = fam(&entries)?;
        let count = call("KVM_GET_MSRS", vcpu.get_msrs(&mut msrs))?;
        if let Some(index) = wanted.get(count) {
            return Err(refused(format!(
                "KVM_GET_MSRS: MSR {index:#x} can not be read"
            )));
        }
        let find = |index| {
            msrs.as_slice()
                .iter()
                .find(|e| e.index == index)
                .map(|e| e.data)
        };
        self.msrs(&mut |index, value| *value = find(index).unwrap_or(*value));
        self.optional.tsc_deadline = find(TSC_DEADLINE).unwrap_or(0);
        Ok(())
    }

    fn write_msrs(&mut self, vcpu: &VcpuFd, features: &Features) -> Result<(), Error> {
        let mut entries = Vec::new();
        self.msrs(&mut |index, value| {
            if features.msrs.contains(&index) {
                entries.push(kvm_msr_entry {
                    index,
                    data: *value,
                    ..Default::default()
                });
            }
        });
        let count = call("KVM_SET_MSRS", vcpu.set_msrs(&fam(&entries)?))?;
        match entries.get(count) {
            None => Ok(()),
            Some(entry) => {
                let (index, value) = (entry.index, entry.data);
                Err(refused(format!(
                    "cpu: KVM refused value {value:#x} for MSR {index:#x}"
                )))
            }
        }
    }
}

impl CpuState {
    /// Names what differs from its value at reset and has no place in a KVM with these features:
    /// subsections that are only carried, and model-specific registers.
    fn lost(&mut self, features: &Features) -> Vec<String> {
        let carried = self.optional.carried.iter();
        let mut lost: Vec<String> = carried
            .filter(|(_, bytes)| bytes.iter().any(|byte| *byte != 0))
            .map(|(name, _)| (*name).to_owned())
            .collect();
        let mut at_reset = BTreeMap::new();
        Self {
            mcg_cap: self.mcg_cap,
            ..Self::at_reset(0)
        }
        .msrs(&mut |index, value| {
            at_reset.insert(index, *value);
        });
        self.msrs(&mut |index, value| {
            let is_at_reset = *value == 0 || at_reset.get(&index) == Some(value);
            if !is_at_reset && !features.msrs.contains(&index) {
                lost.push(format!("MSR {index:#x}"));
            }
        });
        if self.optional.tsc_deadline != 0 && !features.msrs.contains(&TSC_DEADLINE) {
            lost.push(format!("MSR {TSC_DEADLINE:#x}"));
        }
        lost
    }
}

/// Whether a register can be read on this host.
pub(in crate::vm) fn has_msr(vcpu: &VcpuFd, index: u32) -> bool {
    let entry = kvm_msr_entry {
        index,
        ..Default::default()
    };
    fam(&[entry]).is_ok_and(|mut msrs| vcpu.get_msrs(&mut msrs).is_ok_and(|count| count == 1))
}

fn set_msr(vcpu: &VcpuFd, index: u32, value: u64) -> Result<(), Error> {
    let entry = kvm_msr_entry {
        index,
        data: value,
        ..Default::default()
    };
    match call("KVM_SET_MSRS", vcpu.set_msrs(&fam(&[entry])?))? {
        1 => Ok(()),
        _ => Err(refused(format!(
            "cpu: KVM refused value {value:#x} for MSR {index:#x}"
        ))),
    }
}

fn fam(entries: &[kvm_msr_entry]) -> Result<Msrs, Error> {
    Msrs::from_entries(entries).map_err(|error| refused(format!("too many MSRs: {error:?}")))
}

fn refused(what: String) -> Error {
    Error::Section(what)
}

fn system(what: String, error: impl Into<io::Error>) -> Error {
    Error::System {
        what,
        source: error.into(),
    }
}

fn call<T, E: Into<io::Error>>(what: &str, result: Result<T, E>) -> Result<T, Error> {
    result.map_err(|error| system(what.to_owned(), error))
}

/// An error of a setter names the values that are likely to blame.
fn set<E: Into<io::Error>>(
    what: &str,
    result: Result<(), E>,
    values: impl FnOnce() -> String,
) -> Result<(), Error> {
    result.map_err(|error| system(format!("cpu: {what} ({})", values()), error))
}

const EFLAGS_VM: u64 = 1 << 17;
const MP_STATE_SIPI_RECEIVED: u32 = 4;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_no_place_is_named_unless_it_is_as_at_reset() {
        let mut features = Features {
            msrs: [0x10, 0x174].into(),
            ..Features::default()
        };
        let mut state = CpuState::at_reset(0);
        assert_eq!(state.lost(&features), [""; 0]);
        state.tsc = 5;
        state.sysenter_cs = 8;
        state.tsc_aux = 1;
        state.optional.tsc_deadline = 9;
        let carried = &mut state.optional.carried;
        carried.insert("cpu/mpx", vec![0; 88]);
        carried.insert("cpu/pdptrs", [vec![0; 31], vec![1]].concat());
        let lost = ["cpu/pdptrs", "MSR 0xc0000103", "MSR 0x6e0"];
        assert_eq!(state.lost(&features), lost);
        features.msrs.extend([0xc000_0103, TSC_DEADLINE]);
        assert_eq!(state.lost(&features), ["cpu/pdptrs"]);
    }
}
