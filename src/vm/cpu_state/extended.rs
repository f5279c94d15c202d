//! FPU, SSE and the extended state: between the section's fields and the XSAVE area.
//!
//! The first 576 bytes have one layout everywhere (FXSAVE and the header); where the other
//! components lie is the processor's choice and comes from CPUID leaf 13.

use kvm_bindings::{CpuId, kvm_fpu, kvm_xsave};

use super::segment::{FpReg, FpRegParts, XmmReg, YmmhReg};
use super::{CpuState, XSTATE_LEGACY};

/// Offsets of the extended components in the XSAVE area, by component number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::vm) struct XsaveLayout {
    offsets: [Option<usize>; 10],
}

impl XsaveLayout {
    /// The layout these CPUID leaves describe.
    pub(in crate::vm) fn new(cpuid: &CpuId) -> Self {
        let mut offsets = [None; 10];
        for leaf in cpuid
            .as_slice()
            .iter()
            .filter(|leaf| leaf.function == 0xd && leaf.eax > 0)
        {
            let (offset, size) = (leaf.ebx as usize, leaf.eax as usize);
            if leaf.index >= 2
                && offset + size <= AREA
                && let Some(place) = offsets.get_mut(leaf.index as usize)
            {
                *place = Some(offset);
            }
        }
        Self { offsets }
    }
}

impl CpuState {
    /// Takes over what an XSAVE area holds.
    pub(super) fn read_xsave(&mut self, xsave: &kvm_xsave, layout: &XsaveLayout) {
        let area = Area(xsave.region.map(u32::to_le_bytes).concat());
        let word = |at| {
            area.get::<2>(at)
                .map(u16::from_le_bytes)
                .unwrap_or_default()
        };
        self.fpuc = word(0);
        self.fpus = word(2);
        self.fptag = word(4) & 0xff;
        self.optional.fpop = word(6);
        self.optional.fpip = area.quad(8);
        self.optional.fpdp = area.quad(16);
        self.mxcsr = area
            .get::<4>(24)
            .map(u32::from_le_bytes)
            .unwrap_or_default();
        for (n, reg) in self.fpregs.iter_mut().enumerate() {
            let at = 32 + n * 16;
            *reg = FpReg(FpRegParts {
                mantissa: area.quad(at),
                exponent: word(at + 8),
            });
        }
        for (n, reg) in self.xmm.iter_mut().enumerate() {
            let at = 160 + n * 16;
            *reg = XmmReg {
                low: area.quad(at),
                high: area.quad(at + 8),
            };
        }
        // KVM writes the reset values of components that are in use by nobody: they are as good.
        self.xstate_bv = area.quad(HEADER) | XSTATE_LEGACY;
        let present = |n: usize| layout.offsets[n].filter(|_| area.quad(HEADER) >> n & 1 != 0);
        if let Some(at) = present(YMM) {
            for (n, reg) in self.ymmh.iter_mut().enumerate() {
                *reg = YmmhReg {
                    low: area.quad(at + n * 16),
                    high: area.quad(at + n * 16 + 8),
                };
            }
        }
        if let Some(at) = present(OPMASK) {
            self.optional.opmask = std::array::from_fn(|n| area.quad(at + n * 8));
        }
        if let Some(at) = present(ZMM_HI256) {
            for (n, reg) in self.optional.zmmh.iter_mut().enumerate() {
                reg.0 = std::array::from_fn(|word| area.quad(at + n * 32 + word * 8));
            }
        }
        if let Some(at) = present(HI16_ZMM) {
            for (n, reg) in self.optional.hi16_zmm.iter_mut().enumerate() {
                reg.0 = std::array::from_fn(|word| area.quad(at + n * 64 + word * 8));
            }
        }
        if let Some(at) = present(PKRU) {
            self.optional.pkru = area.quad(at) as u32;
        }
    }

    /// The XSAVE area of this state.
    pub(super) fn to_xsave(&self, layout: &XsaveLayout) -> kvm_xsave {
        let mut bytes = vec![0; AREA];
        let mut area = Area(&mut bytes);
        area.set(0, &self.fpuc.to_le_bytes());
        area.set(2, &self.fpus.to_le_bytes());
        area.set(4, &self.fptag.to_le_bytes());
        area.set(6, &self.optional.fpop.to_le_bytes());
        area.set(8, &self.optional.fpip.to_le_bytes());
        area.set(16, &self.optional.fpdp.to_le_bytes());
        area.set(24, &self.mxcsr.to_le_bytes());
        for (n, FpReg(reg)) in self.fpregs.iter().enumerate() {
            area.set(32 + n * 16, &reg.mantissa.to_le_bytes());
            area.set(32 + n * 16 + 8, &reg.exponent.to_le_bytes());
        }
        for (n, reg) in self.xmm.iter().enumerate() {
            area.words(160 + n * 16, &[reg.low, reg.high]);
        }
        // A component that is marked absent would be reset, whatever its bytes say.
        area.words(HEADER, &[self.xstate_bv | XSTATE_LEGACY]);
        let place = |n: usize| layout.offsets[n];
        if let Some(at) = place(YMM) {
            for (n, reg) in self.ymmh.iter().enumerate() {
                area.words(at + n * 16, &[reg.low, reg.high]);
            }
        }
        if let Some(at) = place(OPMASK) {
            area.words(at, &self.optional.opmask);
        }
        if let Some(at) = place(ZMM_HI256) {
            for (n, reg) in self.optional.zmmh.iter().enumerate() {
                area.words(at + n * 32, &reg.0);
            }
        }
        if let Some(at) = place(HI16_ZMM) {
            for (n, reg) in self.optional.hi16_zmm.iter().enumerate() {
                area.words(at + n * 64, &reg.0);
            }
        }
        if let Some(at) = place(PKRU) {
            area.set(at, &self.optional.pkru.to_le_bytes());
        }
        let mut xsave = kvm_xsave::default();
        for (to, from) in xsave.region.iter_mut().zip(bytes.chunks_exact(4)) {
            *to = u32::from_le_bytes([from[0], from[1], from[2], from[3]]);
        }
        xsave
    }

    /// FPU and SSE as `KVM_GET_FPU` shows them.
    pub(in crate::vm) fn to_fpu(&self) -> kvm_fpu {
        let mut fpu = kvm_fpu {
            fcw: self.fpuc,
            fsw: self.fpus,
            ftwx: self.fptag as u8,
            last_opcode: self.optional.fpop,
            last_ip: self.optional.fpip,
            last_dp: self.optional.fpdp,
            mxcsr: self.mxcsr,
            ..Default::default()
        };
        for (to, FpReg(from)) in fpu.fpr.iter_mut().zip(&self.fpregs) {
            to[..8].copy_from_slice(&from.mantissa.to_le_bytes());
            to[8..10].copy_from_slice(&from.exponent.to_le_bytes());
        }
        for (to, from) in fpu.xmm.iter_mut().zip(&self.xmm) {
            to[..8].copy_from_slice(&from.low.to_le_bytes());
            to[8..].copy_from_slice(&from.high.to_le_bytes());
        }
        fpu
    }
}

/// The XSAVE area as bytes; reads beyond its end are zero, writes are ignored.
struct Area<T>(T);

impl Area<Vec<u8>> {
    fn get<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        self.0.get(at..at + N)?.try_into().ok()
    }

    fn quad(&self, at: usize) -> u64 {
        self.get(at).map(u64::from_le_bytes).unwrap_or_default()
    }
}

impl Area<&mut Vec<u8>> {
    fn set(&mut self, at: usize, bytes: &[u8]) {
        if let Some(place) = self.0.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    }

    fn words(&mut self, at: usize, words: &[u64]) {
        for (n, word) in words.iter().enumerate() {
            self.set(at + n * 8, &word.to_le_bytes());
        }
    }
}

/// Bytes of the area KVM exchanges.
const AREA: usize = 4096;
/// Offset of the word that tells which components are present.
const HEADER: usize = 512;
/// Component numbers.
const YMM: usize = 2;
const OPMASK: usize = 5;
const ZMM_HI256: usize = 6;
const HI16_ZMM: usize = 7;
const PKRU: usize = 9;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn state_survives_the_area() {
        let mut layout = XsaveLayout::default();
        for (n, at) in [
            (YMM, 576),
            (OPMASK, 1088),
            (ZMM_HI256, 1152),
            (HI16_ZMM, 1664),
            (PKRU, 2688),
        ] {
            layout.offsets[n] = Some(at);
        }
        let mut state = CpuState::at_reset(0);
        state.fpus = 0x3800;
        state.fptag = 0x80;
        state.optional.fpop = 0x123;
        state.optional.fpdp = 0x4567;
        state.xstate_bv = 0x2e7;
        for n in 0..16 {
            let word = n as u64 * 0x0101_0101_0101_0101;
            state.xmm[n] = XmmReg {
                low: word,
                high: !word,
            };
            state.ymmh[n] = YmmhReg {
                low: word ^ 5,
                high: word ^ 6,
            };
            state.optional.zmmh[n].0 = [word, 1, 2, 3];
            state.optional.hi16_zmm[n].0 = [word; 8];
        }
        state.fpregs[7] = FpReg(FpRegParts {
            mantissa: 1 << 63,
            exponent: 0x3fff,
        });
        state.optional.opmask = [9; 8];
        state.optional.pkru = 0x5555_5554;
        let mut again = CpuState::at_reset(0);
        again.read_xsave(&state.to_xsave(&layout), &layout);
        assert_eq!(again, state);

        let fpu = state.to_fpu();
        assert_eq!((fpu.fsw, fpu.ftwx, fpu.last_opcode), (0x3800, 0x80, 0x123));
        assert_eq!(fpu.fpr[7][..10], [0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x3f]);
    }

    #[test]
    fn a_state_without_marks_is_not_reset() {
        let state = CpuState {
            xstate_bv: 0,
            mxcsr: 0x1fa0,
            ..CpuState::at_reset(0)
        };
        let mut again = CpuState::at_reset(0);
        again.read_xsave(
            &state.to_xsave(&XsaveLayout::default()),
            &XsaveLayout::default(),
        );
        assert_eq!((again.xstate_bv, again.mxcsr), (3, 0x1fa0));
    }
}
