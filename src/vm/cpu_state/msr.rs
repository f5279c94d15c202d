//! Which model-specific registers the `cpu` section holds, in QEMU's order of setting them.
//!
//! One walk serves both directions. The TSC deadline is not in it: KVM takes it only after the
//! local APIC's timer is in deadline mode, so [`super::transfer`] writes it last.

use super::CpuState;

pub(super) const TSC_DEADLINE: u32 = 0x6e0;
pub(super) const APIC_BASE: u32 = 0x1b;

impl CpuState {
    /// Calls `visit` for each register with its value here.
    pub(super) fn msrs(&mut self, visit: &mut dyn FnMut(u32, &mut u64)) {
        visit(0x174, &mut self.sysenter_cs);
        visit(0x175, &mut self.sysenter_esp);
        visit(0x176, &mut self.sysenter_eip);
        visit(0x277, &mut self.pat);
        visit(0xc000_0081, &mut self.star);
        visit(0xc001_0117, &mut self.vm_hsave);
        visit(0xc000_0103, &mut self.tsc_aux);
        visit(0x3b, &mut self.optional.tsc_adjust);
        visit(0x1a0, &mut self.optional.misc_enable);
        visit(0x9e, &mut self.smbase);
        visit(0x34, &mut self.optional.smi_count);
        visit(0x3a, &mut self.optional.feature_control);
        visit(0x6e1, &mut self.optional.pkrs);
        visit(0xda0, &mut self.optional.xss);
        visit(0xe1, &mut self.optional.umwait);
        visit(0x48, &mut self.optional.spec_ctrl);
        visit(0x122, &mut self.optional.tsx_ctrl);
        visit(0xc001_011f, &mut self.optional.virt_ssbd);
        visit(0xc000_0083, &mut self.cstar);
        visit(0xc000_0102, &mut self.kernelgsbase);
        visit(0xc000_0084, &mut self.fmask);
        visit(0xc000_0082, &mut self.lstar);
        visit(0x10, &mut self.tsc);
        visit(0x4b56_4d01, &mut self.system_time_msr);
        visit(0x4b56_4d00, &mut self.wall_clock_msr);
        visit(0x4b56_4d06, &mut self.optional.async_pf_int_msr);
        visit(0x4b56_4d02, &mut self.optional.async_pf_en_msr);
        visit(0x4b56_4d04, &mut self.optional.pv_eoi_en_msr);
        visit(0x4b56_4d03, &mut self.optional.steal_time_msr);
        visit(0x4b56_4d05, &mut self.optional.poll_control_msr);
        self.pmu_msrs(visit);
        visit(0x2ff, &mut self.mtrr_deftype);
        let fixed = [0x250, 0x258, 0x259].into_iter().chain(0x268..=0x26f);
        for (index, value) in fixed.zip(&mut self.mtrr_fixed) {
            visit(index, value);
        }
        for (index, range) in (0x200..).step_by(2).zip(&mut self.mtrr_var) {
            visit(index, &mut range.low);
            visit(index + 1, &mut range.high);
        }
        let banks = (self.mcg_cap & 0xff) as usize;
        if banks > 0 {
            visit(0x17a, &mut self.mcg_status);
            visit(0x17b, &mut self.mcg_ctl);
            for (index, value) in
                (0x400..).zip(self.mce_banks.as_flattened_mut().iter_mut().take(banks * 4))
            {
                visit(index, value);
            }
        }
    }

    /// Calls `visit` for every register that could be in the section, the TSC deadline too.
    pub(in crate::vm) fn all_msrs(mcg_cap: u64, visit: &mut dyn FnMut(u32)) {
        Self {
            mcg_cap,
            ..Self::default()
        }
        .msrs(&mut |index, _| visit(index));
        visit(TSC_DEADLINE);
    }

    fn pmu_msrs(&mut self, visit: &mut dyn FnMut(u32, &mut u64)) {
        let pmu = &mut self.optional.pmu;
        for (index, value) in [0x38d, 0x38f, 0x38e, 0x390]
            .into_iter()
            .zip(&mut pmu.control)
        {
            visit(index, value);
        }
        for (index, value) in (0x309..).zip(&mut pmu.fixed) {
            visit(index, value);
        }
        // The section has room for 18, but no KVM has more than 8, and other registers follow.
        for (index, value) in (0xc1..0xc9).zip(&mut pmu.counters) {
            visit(index, value);
        }
        for (index, value) in (0x186..0x18e).zip(&mut pmu.selectors) {
            visit(index, value);
        }
    }

    /// Cuts variable MTRRs to the guest's physical address width: QEMU sets all bits above it.
    pub(super) fn trim_mtrrs(&mut self, physical_bits: u32) {
        let mask = u64::MAX >> (64 - physical_bits.clamp(32, 52));
        for range in &mut self.mtrr_var {
            range.low &= mask;
            range.high &= mask;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_register_is_visited_once() {
        let mut seen = BTreeSet::new();
        let mut state = CpuState {
            mcg_cap: 0x0100_010a,
            ..CpuState::at_reset(0)
        };
        state.msrs(&mut |index, _| assert!(seen.insert(index), "{index:#x} twice"));
        assert!(seen.contains(&0x427) && !seen.contains(&0x428));
        assert!(
            !seen.contains(&0xce),
            "the platform information is no counter"
        );
        state.mcg_cap = 0;
        state.msrs(&mut |index, _| assert!(index != 0x17b && !(0x400..0x500).contains(&index)));
    }

    #[test]
    fn masks_are_trimmed() {
        let mut state = CpuState::at_reset(0);
        state.mtrr_var[0].high = 0x000f_ff00_0000_0800;
        state.trim_mtrrs(40);
        assert_eq!(state.mtrr_var[0].high, 0x0000_0000_0000_0800);
    }
}
