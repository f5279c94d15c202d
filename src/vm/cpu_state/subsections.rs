//! The optional parts of the `cpu` section: names, conditions and sizes.
//!
//! Most are one model-specific register. Those that KVM state is never made from here are carried
//! as bytes of the right length: a stream that has them still loads, and a machine without KVM
//! passes them on.

use super::{CpuState, MISC_ENABLE_DEFAULT, POLL_CONTROL_DEFAULT};
use crate::vmstate::{Result, Subsection, Visitor};

/// One register of 64 bits (or 32 on the wire), sent when it differs from its reset value.
macro_rules! register {
    ($name:literal, $field:literal, $member:ident) => {
        register!($name, $field, $member, 0)
    };
    ($name:literal, $field:literal, $member:ident, $reset:expr) => {
        Subsection {
            name: $name,
            version: 1,
            needed: |s: &CpuState| s.optional.$member != $reset,
            fields: |s, v| v.number($field, &mut s.optional.$member),
        }
    };
}

macro_rules! narrow_register {
    ($name:literal, $field:literal, $member:ident) => {
        Subsection {
            name: $name,
            version: 1,
            needed: |s: &CpuState| s.optional.$member != 0,
            fields: |s, v| v.narrow($field, &mut s.optional.$member),
        }
    };
}

/// So many bytes that are only carried.
macro_rules! carried {
    ($name:literal, $len:expr) => {
        Subsection {
            name: $name,
            version: 1,
            needed: |s: &CpuState| s.optional.carried.contains_key($name),
            fields: |s, v| carry(s, v, $name, $len),
        }
    };
}

fn carry(state: &mut CpuState, v: &mut dyn Visitor, name: &'static str, len: usize) -> Result {
    v.buffer(
        name,
        state
            .optional
            .carried
            .entry(name)
            .or_insert_with(|| vec![0; len]),
    )
}

pub(super) const SUBSECTIONS: &[Subsection<CpuState>] = &[
    register!("cpu/async_pf_msr", "env.async_pf_en_msr", async_pf_en_msr),
    register!(
        "cpu/async_pf_int_msr",
        "env.async_pf_int_msr",
        async_pf_int_msr
    ),
    register!("cpu/async_pv_eoi_msr", "env.pv_eoi_en_msr", pv_eoi_en_msr),
    register!("cpu/steal_time_msr", "env.steal_time_msr", steal_time_msr),
    register!(
        "cpu/poll_control_msr",
        "env.poll_control_msr",
        poll_control_msr,
        POLL_CONTROL_DEFAULT
    ),
    Subsection {
        name: "cpu/fpop_ip_dp",
        version: 1,
        needed: |s| s.optional.fpop != 0 || s.optional.fpip != 0 || s.optional.fpdp != 0,
        fields: |s, v| {
            v.number("env.fpop", &mut s.optional.fpop)?;
            v.number("env.fpip", &mut s.optional.fpip)?;
            v.number("env.fpdp", &mut s.optional.fpdp)
        },
    },
    register!("cpu/msr_tsc_adjust", "env.tsc_adjust", tsc_adjust),
    register!("cpu/msr_tscdeadline", "env.tsc_deadline", tsc_deadline),
    register!(
        "cpu/msr_ia32_misc_enable",
        "env.msr_ia32_misc_enable",
        misc_enable,
        MISC_ENABLE_DEFAULT
    ),
    register!(
        "cpu/msr_ia32_feature_control",
        "env.msr_ia32_feature_control",
        feature_control
    ),
    Subsection {
        name: "cpu/msr_architectural_pmu",
        version: 1,
        needed: |s| s.optional.pmu != super::Pmu::default(),
        fields: |s, v| {
            let [fixed, global, status, overflow] = &mut s.optional.pmu.control;
            v.number("env.msr_fixed_ctr_ctrl", fixed)?;
            v.number("env.msr_global_ctrl", global)?;
            v.number("env.msr_global_status", status)?;
            v.number("env.msr_global_ovf_ctrl", overflow)?;
            v.array("env.msr_fixed_counters", &mut s.optional.pmu.fixed)?;
            v.array("env.msr_gp_counters", &mut s.optional.pmu.counters)?;
            v.array("env.msr_gp_evtsel", &mut s.optional.pmu.selectors)
        },
    },
    carried!("cpu/mpx", 4 * 16 + 3 * 8),
    carried!("cpu/msr_hyperv_hypercall", 16),
    carried!("cpu/msr_hyperv_vapic", 8),
    carried!("cpu/msr_hyperv_time", 8),
    carried!("cpu/msr_hyperv_crash", 5 * 8),
    carried!("cpu/msr_hyperv_runtime", 8),
    carried!("cpu/msr_hyperv_synic", 8 + 8 + 8 + 16 * 8),
    carried!("cpu/msr_hyperv_stimer", 4 * 8 + 4 * 8),
    carried!("cpu/msr_hyperv_reenlightenment", 3 * 8),
    Subsection {
        name: "cpu/avx512",
        version: 1,
        needed: |s| {
            let o = &s.optional;
            let is_used = |words: &[u64]| words.iter().any(|word| *word != 0);
            is_used(&o.opmask)
                || o.zmmh.iter().any(|r| is_used(&r.0))
                || o.hi16_zmm.iter().any(|r| is_used(&r.0))
        },
        fields: |s, v| {
            v.array("env.opmask_regs", &mut s.optional.opmask)?;
            v.states("env.xmm_regs[2]", &mut s.optional.zmmh)?;
            v.states("env.xmm_regs[16]", &mut s.optional.hi16_zmm)
        },
    },
    register!("cpu/xss", "env.xss", xss),
    narrow_register!("cpu/umwait", "env.umwait", umwait),
    register!("cpu/pkru", "env.pkru", pkru),
    narrow_register!("cpu/pkrs", "env.pkrs", pkrs),
    register!("cpu/spec_ctrl", "env.spec_ctrl", spec_ctrl),
    register!("cpu/virt_ssbd", "env.virt_ssbd", virt_ssbd),
    register!("cpu/mcg_ext_ctl", "env.mcg_ext_ctl", mcg_ext_ctl),
    carried!("cpu/intel_pt", 8 + 8 + 8 + 8 + 8 + 8 * 8),
    register!("cpu/msr_smi_count", "env.msr_smi_count", smi_count),
    carried!("cpu/svn_npt", 8 + 4),
    carried!("cpu/svm_guest", 4),
    carried!("cpu/amd_tsc_scale_msr", 8),
    Subsection {
        name: "cpu/tsc_khz",
        version: 1,
        needed: |s| s.optional.tsc_khz != 0,
        fields: |s, v| {
            v.ranged(
                "env.tsc_khz",
                &mut s.optional.tsc_khz,
                0..=i64::from(u32::MAX),
            )
        },
    },
    carried!("cpu/exception_info", 3 + 8),
    narrow_register!("cpu/msr_tsx_ctrl", "env.tsx_ctrl", tsx_ctrl),
    carried!("cpu/intel_sgx", 4 * 8),
    carried!("cpu/pdptrs", 4 * 8),
    carried!("cpu/msr_xfd", 2 * 8),
    carried!("cpu/intel_amx_xtile", 64 + 8192),
    carried!("cpu/arch_lbr", 2 * 8 + 32 * 3 * 8),
    Subsection {
        name: "cpu/triple_fault",
        version: 1,
        needed: |s| s.optional.triple_fault,
        fields: |s, v| {
            let mut byte = u8::from(s.optional.triple_fault);
            v.ranged("env.triple_fault_pending", &mut byte, 0..=1)?;
            s.optional.triple_fault = byte != 0;
            Ok(())
        },
    },
    carried!("cpu/msr_hwcr", 8),
];
