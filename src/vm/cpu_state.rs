//! A vCPU's state as QEMU migrates it: section `cpu` version 12.
//!
//! The struct mirrors the section field by field; [`transfer`] moves it from and to KVM. Fields
//! that only QEMU's own emulator uses are carried along, so that a machine without KVM can pass a
//! guest on unchanged. QEMU: target/i386/machine.c.

mod extended;
mod msr;
mod segment;
mod subsections;
pub(super) mod transfer;

use std::collections::BTreeMap;

pub(super) use self::extended::XsaveLayout;
use self::segment::{FpReg, Hi16ZmmReg, MtrrVar, Segment, XmmReg, YmmhReg, ZmmhReg};
use self::subsections::SUBSECTIONS;
use super::boot::Entry;
use crate::vmstate::{Result, Subsection, Visitor, VmState};

/// The state of one vCPU.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct CpuState {
    /// General registers in the processor's own order: rax rcx rdx rbx rsp rbp rsi rdi r8 to r15.
    pub(super) regs: [u64; 16],
    pub(super) eip: u64,
    pub(super) eflags: u64,
    hflags: u32,
    fpuc: u16,
    fpus: u16,
    fptag: u16,
    fpregs: [FpReg; 8],
    segs: [Segment; 6],
    ldt: Segment,
    tr: Segment,
    gdt: Segment,
    idt: Segment,
    sysenter_cs: u64,
    sysenter_esp: u64,
    sysenter_eip: u64,
    /// CR0, CR2, CR3, CR4.
    cr: [u64; 4],
    dr: [u64; 8],
    a20_mask: i32,
    mxcsr: u32,
    xmm: [XmmReg; 16],
    efer: u64,
    star: u64,
    lstar: u64,
    cstar: u64,
    fmask: u64,
    kernelgsbase: u64,
    smbase: u64,
    pat: u64,
    hflags2: u32,
    vm_hsave: u64,
    svm: Svm,
    mtrr_fixed: [u64; 11],
    mtrr_deftype: u64,
    mtrr_var: [MtrrVar; 8],
    interrupt_injected: i32,
    /// `KVM_MP_STATE_*`.
    pub(super) mp_state: u32,
    tsc: u64,
    exception_nr: i32,
    soft_interrupt: bool,
    nmi_injected: bool,
    nmi_pending: bool,
    has_error_code: bool,
    sipi_vector: u32,
    mcg_cap: u64,
    mcg_status: u64,
    mcg_ctl: u64,
    mce_banks: [[u64; 4]; MCE_BANKS],
    tsc_aux: u64,
    system_time_msr: u64,
    wall_clock_msr: u64,
    xcr0: u64,
    xstate_bv: u64,
    ymmh: [YmmhReg; 16],
    optional: Optional,
}

/// Registers that only QEMU's emulator of nested virtualisation uses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Svm {
    vm_vmcb: u64,
    tsc_offset: u64,
    intercept: u64,
    intercept_cr_read: u16,
    intercept_cr_write: u16,
    intercept_dr_read: u16,
    intercept_dr_write: u16,
    intercept_exceptions: u32,
    v_tpr: u8,
}

/// What travels in subsections.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Optional {
    tsc_khz: i64,
    tsc_deadline: u64,
    tsc_adjust: u64,
    async_pf_en_msr: u64,
    async_pf_int_msr: u64,
    pv_eoi_en_msr: u64,
    steal_time_msr: u64,
    poll_control_msr: u64,
    fpop: u16,
    fpip: u64,
    fpdp: u64,
    misc_enable: u64,
    feature_control: u64,
    xss: u64,
    umwait: u64,
    pkru: u32,
    pkrs: u64,
    spec_ctrl: u64,
    virt_ssbd: u64,
    smi_count: u64,
    mcg_ext_ctl: u64,
    tsx_ctrl: u64,
    pmu: Pmu,
    opmask: [u64; 8],
    zmmh: [ZmmhReg; 16],
    hi16_zmm: [Hi16ZmmReg; 16],
    triple_fault: bool,
    /// Subsections this KVM room has no use for, by name: carried as bytes.
    carried: BTreeMap<&'static str, Vec<u8>>,
}

/// Performance counters.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Pmu {
    /// Fixed control, global control, global status, overflow control.
    control: [u64; 4],
    fixed: [u64; 3],
    counters: [u64; 18],
    selectors: [u64; 18],
}

impl CpuState {
    /// vCPU `index` at reset, as far as no KVM says better.
    pub(super) fn at_reset(index: usize) -> Self {
        let mut state = Self {
            eip: 0xfff0,
            eflags: 2,
            fpuc: 0x37f,
            segs: [Segment::real_mode(0x9300); 6],
            ldt: Segment::real_mode(0x8200),
            tr: Segment::real_mode(0x8b00),
            gdt: Segment::table(0xffff),
            idt: Segment::table(0xffff),
            a20_mask: -1,
            mxcsr: 0x1f80,
            smbase: 0x3_0000,
            pat: 0x0007_0406_0007_0406,
            hflags2: HF2_GIF | HF2_VGIF,
            interrupt_injected: -1,
            mp_state: u32::from(index != 0),
            exception_nr: -1,
            xcr0: 1,
            xstate_bv: XSTATE_LEGACY,
            ..Self::default()
        };
        state.regs[RDX] = 0x0006_0fb1;
        state.segs[CS] = Segment {
            selector: 0xf000,
            base: 0xffff_0000,
            limit: 0xffff,
            flags: 0x9b00,
        };
        state.cr[0] = 0x6000_0010;
        (state.dr[4], state.dr[6]) = (0xffff_0ff0, 0xffff_0ff0);
        (state.dr[5], state.dr[7]) = (0x400, 0x400);
        state.optional.poll_control_msr = POLL_CONTROL_DEFAULT;
        state.optional.misc_enable = MISC_ENABLE_DEFAULT;
        state
    }

    /// A state to load a stream into: this one, without anything that travels in subsections.
    pub(super) fn to_load_into(&self) -> Self {
        Self {
            optional: Self::at_reset(0).optional,
            ..self.clone()
        }
    }

    /// Completes what KVM leaves open when it creates a vCPU, so that it starts as on QEMU.
    pub(super) fn power_on(&mut self, version: u32) {
        self.regs[RDX] = u64::from(version);
        self.optional.misc_enable = MISC_ENABLE_DEFAULT;
    }

    /// Sets what a kernel starts with, out of the state at reset: flat 32-bit protected mode.
    pub(super) fn enter(&mut self, entry: &Entry) {
        self.eip = entry.address;
        self.regs[RAX] = entry.eax;
        self.regs[RBX] = entry.ebx;
        self.regs[RSI] = entry.esi;
        self.eflags = 2;
        self.cr[0] = 0x11;
        self.cr[3] = 0;
        self.efer = 0;
        self.segs = [Segment::flat(entry.selectors.data, 0x00c0_9300); 6];
        self.segs[CS] = Segment::flat(entry.selectors.code, 0x00c0_9b00);
        if let Some(gdt) = &entry.gdt {
            self.gdt = Segment {
                base: gdt.start,
                ..Segment::table((gdt.end - gdt.start - 1) as u32)
            };
        }
        self.tr = Segment {
            limit: 0x67,
            ..Segment::real_mode(0x8b00)
        };
    }

    /// Whether the vCPU rests in HLT.
    pub(super) fn is_halted(&self) -> bool {
        self.mp_state == MP_STATE_HALTED
    }

    /// Whether interrupts wait for the end of the next instruction (after STI or a load of SS).
    pub(super) fn is_in_interrupt_shadow(&self) -> bool {
        self.hflags & HF_INHIBIT_IRQ != 0
    }
}

impl VmState for CpuState {
    const NAME: &'static str = "cpu";
    const VERSION: u32 = 12;
    const MINIMUM: u32 = 11;
    const SUBSECTIONS: &'static [Subsection<Self>] = SUBSECTIONS;

    fn fields(&mut self, v: &mut dyn Visitor, version: u32) -> Result {
        v.array("env.regs", &mut self.regs)?;
        v.number("env.eip", &mut self.eip)?;
        v.number("env.eflags", &mut self.eflags)?;
        v.number("env.hflags", &mut self.hflags)?;
        v.number("env.fpuc", &mut self.fpuc)?;
        v.number("env.fpus_vmstate", &mut self.fpus)?;
        v.ranged("env.fptag_vmstate", &mut self.fptag, 0..=0xff)?;
        v.ranged("env.fpregs_format_vmstate", &mut 0u16, 0..=0)?;
        v.states("env.fpregs", &mut self.fpregs)?;
        v.states("env.segs", &mut self.segs)?;
        v.state("env.ldt", &mut self.ldt)?;
        v.state("env.tr", &mut self.tr)?;
        v.state("env.gdt", &mut self.gdt)?;
        v.state("env.idt", &mut self.idt)?;
        v.narrow("env.sysenter_cs", &mut self.sysenter_cs)?;
        v.number("env.sysenter_esp", &mut self.sysenter_esp)?;
        v.number("env.sysenter_eip", &mut self.sysenter_eip)?;
        v.number("env.cr[0]", &mut self.cr[0])?;
        v.number("env.cr[2]", &mut self.cr[1])?;
        v.number("env.cr[3]", &mut self.cr[2])?;
        v.number("env.cr[4]", &mut self.cr[3])?;
        v.array("env.dr", &mut self.dr)?;
        v.number("env.a20_mask", &mut self.a20_mask)?;
        v.number("env.mxcsr", &mut self.mxcsr)?;
        v.states("env.xmm_regs[0]", &mut self.xmm)?;
        v.number("env.efer", &mut self.efer)?;
        v.number("env.star", &mut self.star)?;
        v.number("env.lstar", &mut self.lstar)?;
        v.number("env.cstar", &mut self.cstar)?;
        v.number("env.fmask", &mut self.fmask)?;
        v.number("env.kernelgsbase", &mut self.kernelgsbase)?;
        v.narrow("env.smbase", &mut self.smbase)?;
        v.number("env.pat", &mut self.pat)?;
        v.number("env.hflags2", &mut self.hflags2)?;
        v.number("env.vm_hsave", &mut self.vm_hsave)?;
        self.svm.fields(v)?;
        v.array("env.mtrr_fixed", &mut self.mtrr_fixed)?;
        v.number("env.mtrr_deftype", &mut self.mtrr_deftype)?;
        v.states("env.mtrr_var", &mut self.mtrr_var)?;
        v.ranged(
            "env.interrupt_injected",
            &mut self.interrupt_injected,
            -1..=255,
        )?;
        v.ranged("env.mp_state", &mut self.mp_state, 0..=4)?;
        v.number("env.tsc", &mut self.tsc)?;
        v.ranged("env.exception_nr", &mut self.exception_nr, -1..=31)?;
        for (name, flag) in [
            ("env.soft_interrupt", &mut self.soft_interrupt),
            ("env.nmi_injected", &mut self.nmi_injected),
            ("env.nmi_pending", &mut self.nmi_pending),
            ("env.has_error_code", &mut self.has_error_code),
        ] {
            let mut byte = u8::from(*flag);
            v.ranged(name, &mut byte, 0..=1)?;
            *flag = byte != 0;
        }
        v.ranged("env.sipi_vector", &mut self.sipi_vector, 0..=0xff)?;
        v.number("env.mcg_cap", &mut self.mcg_cap)?;
        v.number("env.mcg_status", &mut self.mcg_status)?;
        v.number("env.mcg_ctl", &mut self.mcg_ctl)?;
        v.array("env.mce_banks", self.mce_banks.as_flattened_mut())?;
        v.number("env.tsc_aux", &mut self.tsc_aux)?;
        v.number("env.system_time_msr", &mut self.system_time_msr)?;
        v.number("env.wall_clock_msr", &mut self.wall_clock_msr)?;
        if version >= 12 {
            v.number("env.xcr0", &mut self.xcr0)?;
            v.number("env.xstate_bv", &mut self.xstate_bv)?;
            v.states("env.xmm_regs[1]", &mut self.ymmh)?;
        }
        Ok(())
    }

    fn loaded(&mut self) -> std::result::Result<(), String> {
        if self.hflags & (HF_SMM | HF_GUEST) != 0 {
            return Err(format!(
                "env.hflags {:#x} says the vCPU is in system-management or nested guest mode, \
                 which this machine does not have",
                self.hflags
            ));
        }
        if self.xcr0 & 1 == 0 {
            return Err(format!("env.xcr0 is {:#x}, bit 0 must be set", self.xcr0));
        }
        Ok(())
    }
}

impl Svm {
    fn fields(&mut self, v: &mut dyn Visitor) -> Result {
        v.number("env.vm_vmcb", &mut self.vm_vmcb)?;
        v.number("env.tsc_offset", &mut self.tsc_offset)?;
        v.number("env.intercept", &mut self.intercept)?;
        v.number("env.intercept_cr_read", &mut self.intercept_cr_read)?;
        v.number("env.intercept_cr_write", &mut self.intercept_cr_write)?;
        v.number("env.intercept_dr_read", &mut self.intercept_dr_read)?;
        v.number("env.intercept_dr_write", &mut self.intercept_dr_write)?;
        v.number("env.intercept_exceptions", &mut self.intercept_exceptions)?;
        v.number("env.v_tpr", &mut self.v_tpr)
    }
}

/// Indices into [`CpuState::regs`].
const RAX: usize = 0;
const RDX: usize = 2;
const RBX: usize = 3;
const RSI: usize = 6;
/// Index into [`CpuState::segs`], whose order is ES CS SS DS FS GS.
const CS: usize = 1;
/// Machine-check banks in the section, four registers each.
pub(super) const MCE_BANKS: usize = 10;
const MP_STATE_HALTED: u32 = 3;
/// QEMU's internal flags, as far as they mean something with KVM.
const HF_INHIBIT_IRQ: u32 = 1 << 3;
const HF_SMM: u32 = 1 << 19;
const HF_GUEST: u32 = 1 << 21;
const HF2_GIF: u32 = 1 << 0;
const HF2_NMI: u32 = 1 << 2;
const HF2_VGIF: u32 = 1 << 8;
/// Components of the extended state that every state has: x87 and SSE.
const XSTATE_LEGACY: u64 = 3;
/// `KVM_POLL_CONTROL` at reset: the host polls before it lets a vCPU sleep.
const POLL_CONTROL_DEFAULT: u64 = 1;
/// `IA32_MISC_ENABLE` at reset: fast strings.
const MISC_ENABLE_DEFAULT: u64 = 1;

#[cfg(test)]
mod tests;
