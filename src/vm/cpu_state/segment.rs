//! The small structs inside the `cpu` section: segments, FPU and vector registers, MTRR ranges.

use kvm_bindings::{kvm_dtable, kvm_segment};

use crate::vmstate::{Result, Visitor, VmState};

/// A segment register with its hidden part; `flags` is the upper half of a descriptor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) selector: u32,
    pub(super) base: u64,
    pub(super) limit: u32,
    pub(super) flags: u32,
}

impl Segment {
    /// A segment at reset with these attributes.
    pub(super) fn real_mode(flags: u32) -> Self {
        Self {
            limit: 0xffff,
            flags,
            ..Self::default()
        }
    }

    /// A segment over all 4 GiB.
    pub(super) fn flat(selector: u32, flags: u32) -> Self {
        Self {
            selector,
            limit: u32::MAX,
            flags,
            ..Self::default()
        }
    }

    /// A descriptor table at address 0.
    pub(super) fn table(limit: u32) -> Self {
        Self {
            limit,
            ..Self::default()
        }
    }

    /// Out of KVM's form. `clear_dpl`: real mode, where the privilege level means nothing.
    pub(super) fn from_kvm(kvm: &kvm_segment, clear_dpl: bool) -> Self {
        let bit = |value: u8, at: u32| u32::from(value & 1) << at;
        let dpl = if clear_dpl { 0 } else { u32::from(kvm.dpl & 3) };
        let present = kvm.present & u8::from(kvm.unusable == 0);
        Self {
            selector: u32::from(kvm.selector),
            base: kvm.base,
            limit: kvm.limit,
            flags: u32::from(kvm.type_ & 0xf) << TYPE
                | bit(kvm.s, S)
                | dpl << DPL
                | bit(present, P)
                | bit(kvm.avl, AVL)
                | bit(kvm.l, L)
                | bit(kvm.db, DB)
                | bit(kvm.g, G),
        }
    }

    /// Into KVM's form.
    pub(super) fn to_kvm(self, clear_dpl: bool) -> kvm_segment {
        let bit = |at: u32| (self.flags >> at & 1) as u8;
        kvm_segment {
            base: self.base,
            limit: self.limit,
            selector: self.selector as u16,
            type_: (self.flags >> TYPE & 0xf) as u8,
            present: bit(P),
            dpl: if clear_dpl {
                0
            } else {
                (self.flags >> DPL & 3) as u8
            },
            db: bit(DB),
            s: bit(S),
            l: bit(L),
            g: bit(G),
            avl: bit(AVL),
            unusable: 1 - bit(P),
            padding: 0,
        }
    }

    /// Into KVM's form while the guest is in virtual-8086 mode, which fixes all attributes.
    pub(super) fn to_kvm_v86(self) -> kvm_segment {
        kvm_segment {
            base: self.base,
            limit: self.limit,
            selector: self.selector as u16,
            type_: 3,
            present: 1,
            dpl: 3,
            s: 1,
            ..Default::default()
        }
    }

    /// A descriptor table out of KVM's form.
    pub(super) fn from_table(kvm: &kvm_dtable) -> Self {
        Self {
            base: kvm.base,
            limit: u32::from(kvm.limit),
            ..Self::default()
        }
    }

    /// A descriptor table into KVM's form.
    pub(super) fn to_table(self) -> kvm_dtable {
        kvm_dtable {
            base: self.base,
            limit: self.limit as u16,
            padding: [0; 3],
        }
    }
}

impl VmState for Segment {
    const NAME: &'static str = "segment";
    const VERSION: u32 = 1;

    fn fields(&mut self, v: &mut dyn Visitor, _version: u32) -> Result {
        v.number("selector", &mut self.selector)?;
        v.number("base", &mut self.base)?;
        v.number("limit", &mut self.limit)?;
        v.number("flags", &mut self.flags)
    }
}

/// An x87 register: mantissa, then sign and exponent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct FpReg(pub(super) FpRegParts);

/// The two parts of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct FpRegParts {
    pub(super) mantissa: u64,
    pub(super) exponent: u16,
}

impl VmState for FpReg {
    const NAME: &'static str = "fpreg";
    const VERSION: u32 = 0;

    fn fields(&mut self, v: &mut dyn Visitor, _version: u32) -> Result {
        v.temporary(&mut self.0)
    }
}

impl VmState for FpRegParts {
    const NAME: &'static str = "fpreg_tmp";
    const VERSION: u32 = 0;

    fn fields(&mut self, v: &mut dyn Visitor, _version: u32) -> Result {
        v.number("tmp_mant", &mut self.mantissa)?;
        v.number("tmp_exp", &mut self.exponent)
    }
}

/// A register of two words, with the names QEMU gives them.
macro_rules! pair {
    ($(#[$doc:meta])* $type:ident, $name:literal, $low:literal, $high:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub(super) struct $type {
            pub(super) low: u64,
            pub(super) high: u64,
        }

        impl VmState for $type {
            const NAME: &'static str = $name;
            const VERSION: u32 = 1;

            fn fields(&mut self, v: &mut dyn Visitor, _version: u32) -> Result {
                v.number($low, &mut self.low)?;
                v.number($high, &mut self.high)
            }
        }
    };
}

pair!(
    /// An SSE register.
    XmmReg, "xmm_reg", "_q_ZMMReg[0]", "_q_ZMMReg[1]"
);
pair!(
    /// The upper half of an AVX register.
    YmmhReg, "ymmh_reg", "_q_ZMMReg[2]", "_q_ZMMReg[3]"
);
pair!(
    /// A variable-range MTRR: base and mask.
    MtrrVar, "mtrr_var", "base", "mask"
);

/// Bits 256 to 511 of an AVX-512 register.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct ZmmhReg(pub(super) [u64; 4]);

impl VmState for ZmmhReg {
    const NAME: &'static str = "zmmh_reg";
    const VERSION: u32 = 1;

    fn fields(&mut self, v: &mut dyn Visitor, _version: u32) -> Result {
        let names = [
            "_q_ZMMReg[4]",
            "_q_ZMMReg[5]",
            "_q_ZMMReg[6]",
            "_q_ZMMReg[7]",
        ];
        names
            .into_iter()
            .zip(&mut self.0)
            .try_for_each(|(name, word)| v.number(name, word))
    }
}

/// One of the AVX-512 registers 16 to 31.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Hi16ZmmReg(pub(super) [u64; 8]);

impl VmState for Hi16ZmmReg {
    const NAME: &'static str = "hi16_zmm_reg";
    const VERSION: u32 = 1;

    fn fields(&mut self, v: &mut dyn Visitor, _version: u32) -> Result {
        let names = [
            "_q_ZMMReg[0]",
            "_q_ZMMReg[1]",
            "_q_ZMMReg[2]",
            "_q_ZMMReg[3]",
            "_q_ZMMReg[4]",
            "_q_ZMMReg[5]",
            "_q_ZMMReg[6]",
            "_q_ZMMReg[7]",
        ];
        names
            .into_iter()
            .zip(&mut self.0)
            .try_for_each(|(name, word)| v.number(name, word))
    }
}

/// Places of the attributes in [`Segment::flags`].
const TYPE: u32 = 8;
const S: u32 = 12;
const DPL: u32 = 13;
const P: u32 = 15;
const AVL: u32 = 20;
const L: u32 = 21;
const DB: u32 = 22;
const G: u32 = 23;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_present_segment_survives_kvm(selector in any::<u16>(), base in any::<u64>(),
                                          limit in any::<u32>(), flags in any::<u32>()) {
            let flags = flags & 0x00f0_ff00 | 1 << P;
            let segment = Segment { selector: selector.into(), base, limit, flags };
            prop_assert_eq!(Segment::from_kvm(&segment.to_kvm(false), false), segment);
        }
    }

    #[test]
    fn seen_attributes() {
        let code = Segment {
            selector: 0xf000,
            base: 0xffff_0000,
            limit: 0xffff,
            flags: 0x9b00,
        };
        let kvm = code.to_kvm(true);
        assert_eq!(
            (kvm.type_, kvm.s, kvm.present, kvm.unusable),
            (0xb, 1, 1, 0)
        );
        let long = Segment::flat(8, 0x00a0_9b00).to_kvm(false);
        assert_eq!((long.l, long.db, long.g), (1, 0, 1));
        assert_eq!(Segment::default().to_kvm(false).unusable, 1);
        let v86 = Segment::real_mode(0).to_kvm_v86();
        assert_eq!((v86.dpl, v86.type_, v86.present), (3, 3, 1));
    }
}
