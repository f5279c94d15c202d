//! What CPUID tells the guest, for the two CPU models built in.
//!
//! CPUID is not in the migration stream, so `qemu64` answers what QEMU's does under KVM, leaf by
//! leaf (7.2 and 10.0 agree), masked with what the host's KVM supports; `host` shows all of that.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use super::guest::Error;

/// CPU models built in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Model {
    /// The smallest common one; QEMU's default.
    Qemu64,
    /// Everything the host has.
    Host,
}

impl Model {
    /// The model of that name.
    pub(super) fn from_name(name: &str) -> Result<Self, Error> {
        match name {
            "qemu64" => Ok(Self::Qemu64),
            "host" => Ok(Self::Host),
            _ => Err(Error::State(format!("unable to find CPU model '{name}'"))),
        }
    }

    /// The leaves of vCPU `index` of `count`, out of those the host's KVM supports.
    pub(super) fn leaves(
        self,
        supported: &CpuId,
        index: u32,
        count: u32,
        has_tsc_deadline: bool,
    ) -> Vec<kvm_cpuid_entry2> {
        let host = Host(supported.as_slice());
        let topology = Topology { index, count };
        match self {
            Self::Qemu64 => qemu64(&host, &topology),
            Self::Host => whole_host(&host, &topology, has_tsc_deadline),
        }
    }
}

/// The guest's physical address width in bits, out of its CPUID.
pub(super) fn physical_bits(leaves: &[kvm_cpuid_entry2]) -> u32 {
    leaves
        .iter()
        .find(|leaf| leaf.function == 0x8000_0008)
        .map_or(36, |leaf| leaf.eax & 0xff)
}

/// Family, model and stepping as leaf 1 tells them; EDX at reset.
pub(super) fn version(leaves: &[kvm_cpuid_entry2]) -> u32 {
    leaves
        .iter()
        .find(|leaf| leaf.function == 1)
        .map_or(0, |leaf| leaf.eax)
}

/// Features as leaf 1 tells them in EDX.
pub(super) fn features(leaves: &[kvm_cpuid_entry2]) -> u32 {
    leaves
        .iter()
        .find(|leaf| leaf.function == 1)
        .map_or(0, |leaf| leaf.edx)
}

/// All vCPUs are cores of one package.
struct Topology {
    index: u32,
    count: u32,
}

impl Topology {
    /// Bits of an APIC id that tell cores apart.
    fn core_bits(&self) -> u32 {
        self.count.next_power_of_two().trailing_zeros()
    }

    /// Leaf 1 EBX: APIC id, logical processors if there are several, CLFLUSH line.
    fn brand(&self) -> u32 {
        let several = if self.count > 1 { self.count << 16 } else { 0 };
        self.index << 24 | several | 0x0800
    }

    /// What leaf 4 EAX says of sharing; `shared`: all cores share this cache.
    fn sharing(&self, shared: bool) -> u32 {
        let sharers = if shared {
            (1 << self.core_bits()) - 1
        } else {
            0
        };
        (self.count - 1) << 26 | sharers << 14
    }

    /// Leaf 0xb.
    fn extended(&self) -> [kvm_cpuid_entry2; 3] {
        let edx = self.index;
        [
            indexed(0xb, 0, [0, 1, 0x100, edx]),
            indexed(0xb, 1, [self.core_bits(), self.count, 0x201, edx]),
            indexed(0xb, 2, [0, 0, 2, edx]),
        ]
    }
}

/// Supported leaves, looked up.
struct Host<'a>(&'a [kvm_cpuid_entry2]);

impl Host<'_> {
    fn leaf(&self, function: u32, index: u32) -> kvm_cpuid_entry2 {
        let found = self
            .0
            .iter()
            .find(|leaf| leaf.function == function && leaf.index == index);
        found.copied().unwrap_or_default()
    }
}

fn plain(function: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        function,
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    }
}

fn indexed(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        ..plain(function, registers)
    }
}

fn qemu64(host: &Host<'_>, topology: &Topology) -> Vec<kvm_cpuid_entry2> {
    let vendor = host.leaf(0, 0);
    let vendor = [vendor.ebx, vendor.ecx, vendor.edx];
    let [v1, v2, v3] = vendor;
    let features = host.leaf(1, 0);
    let extended = host.leaf(0x8000_0001, 0);
    let several = if topology.count > 1 { FEATURE_HT } else { 0 };
    let edx = QEMU64_EDX & features.edx | several;
    let ecx = QEMU64_ECX & features.ecx | FEATURE_X2APIC | FEATURE_HYPERVISOR;
    let name = |at: usize| {
        let word = |n: usize| {
            let bytes: [u8; 4] = std::array::from_fn(|b| MODEL_NAME[at + n * 4 + b]);
            u32::from_le_bytes(bytes)
        };
        [word(0), word(1), word(2), word(3)]
    };
    let cores = match topology.count {
        1 => 0,
        count => topology.core_bits() << 12 | (count - 1),
    };
    let cache = |index, eax: u32, rest: [u32; 3], shared| {
        let [ebx, ecx, edx] = rest;
        indexed(4, index, [eax | topology.sharing(shared), ebx, ecx, edx])
    };
    let mut leaves = vec![
        plain(
            0x4000_0000,
            [
                0x4000_0001,
                KVM_SIGNATURE[0],
                KVM_SIGNATURE[1],
                KVM_SIGNATURE[2],
            ],
        ),
        plain(
            0x4000_0001,
            [QEMU64_KVM & host.leaf(0x4000_0001, 0).eax, 0, 0, 0],
        ),
        plain(0, [0xd, v1, v2, v3]),
        plain(1, [QEMU64_VERSION, topology.brand(), ecx, edx]),
        plain(2, [1, 0, 0x4d, 0x002c_307d]),
        cache(0, 0x121, [0x01c0_003f, 0x3f, 1], false),
        cache(1, 0x122, [0x01c0_003f, 0x3f, 1], false),
        cache(2, 0x143, [0x03c0_003f, 0xfff, 1], false),
        cache(3, 0x163, [0x03c0_003f, 0x3fff, 6], true),
        indexed(4, 4, [0; 4]),
        plain(5, [0, 0, 3, 0]),
        indexed(7, 0, [0; 4]),
        indexed(0xd, 0, [0; 4]),
        plain(0x8000_0000, [0x8000_000a, v1, v2, v3]),
        plain(
            0x8000_0001,
            [
                QEMU64_VERSION,
                0,
                QEMU64_EXT_ECX & extended.ecx,
                QEMU64_EXT_EDX & extended.edx,
            ],
        ),
        plain(0x8000_0002, name(0)),
        plain(0x8000_0003, name(16)),
        plain(0x8000_0004, name(32)),
        plain(
            0x8000_0005,
            [0x01ff_01ff, 0x01ff_01ff, 0x4002_0140, 0x4002_0140],
        ),
        plain(0x8000_0006, [0, 0x4200_4200, 0x0200_8140, 0x0080_8140]),
        plain(
            0x8000_0008,
            [0x3000 | host.leaf(0x8000_0008, 0).eax & 0xff, 0, cores, 0],
        ),
    ];
    leaves.extend(topology.extended());
    leaves
}

fn whole_host(host: &Host<'_>, topology: &Topology, has_deadline: bool) -> Vec<kvm_cpuid_entry2> {
    let mut leaves: Vec<_> = host
        .0
        .iter()
        .copied()
        .filter(|leaf| !matches!(leaf.function, 0xb | 0x1f))
        .collect();
    for leaf in &mut leaves {
        match leaf.function {
            1 => {
                leaf.ebx = topology.brand();
                leaf.ecx |= FEATURE_X2APIC | FEATURE_HYPERVISOR;
                if has_deadline {
                    leaf.ecx |= FEATURE_TSC_DEADLINE;
                }
                if topology.count > 1 {
                    leaf.edx |= FEATURE_HT;
                }
            }
            4 if leaf.eax & 0x1f != 0 => {
                let shared = leaf.eax >> 5 & 7 == 3;
                leaf.eax = leaf.eax & 0x3fff | topology.sharing(shared);
            }
            0x4000_0000 => leaf.eax = 0x4000_0001,
            _ => {}
        }
    }
    leaves.extend(topology.extended());
    leaves
}

/// Family 15, model 107, stepping 1.
const QEMU64_VERSION: u32 = 0x0006_0fb1;
/// Leaf 1: FPU to PSE-36 without VME, CLFLUSH, MMX, FXSR, SSE, SSE2.
const QEMU64_EDX: u32 = 0x078b_fbfd;
/// Leaf 1: SSE3, CMPXCHG16B.
const QEMU64_ECX: u32 = 0x0000_2001;
/// Leaf 0x80000001: LAHF.
const QEMU64_EXT_ECX: u32 = 0x0000_0001;
/// Leaf 0x80000001: SYSCALL, NX, long mode.
const QEMU64_EXT_EDX: u32 = 0x2010_0800;
/// Leaf 0x40000001: both clocks and their stable bit, no I/O delay, asynchronous page faults,
/// steal time, paravirtual EOI.
const QEMU64_KVM: u32 = 0x0100_007b;
const KVM_SIGNATURE: [u32; 3] = [0x4b4d_564b, 0x564b_4d56, 0x0000_004d];
const MODEL_NAME: &[u8; 48] =
    b"QEMU Virtual CPU version 2.5+\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
const FEATURE_HT: u32 = 1 << 28;
const FEATURE_X2APIC: u32 = 1 << 21;
const FEATURE_TSC_DEADLINE: u32 = 1 << 24;
const FEATURE_HYPERVISOR: u32 = 1 << 31;

#[cfg(test)]
mod tests {
    use super::*;

    fn everything() -> CpuId {
        let all = [u32::MAX; 4];
        let leaves = [
            plain(0, [0x16, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
            plain(1, all),
            plain(0x4000_0000, [0x4000_0001, 1, 2, 3]),
            plain(0x4000_0001, all),
            plain(0x8000_0001, all),
            plain(0x8000_0008, [0x302e, 0, 0, 0]),
        ];
        CpuId::from_entries(&leaves).unwrap()
    }

    fn find(leaves: &[kvm_cpuid_entry2], function: u32, index: u32) -> [u32; 4] {
        let leaf = leaves
            .iter()
            .find(|l| l.function == function && l.index == index)
            .unwrap();
        [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]
    }

    #[test]
    fn qemu64_answers_as_qemu_does() {
        // The values QEMU passes to KVM_SET_CPUID2 for the second of two vCPUs.
        let leaves = Model::Qemu64.leaves(&everything(), 1, 2, true);
        assert_eq!(
            find(&leaves, 1, 0),
            [0x60fb1, 0x0102_0800, 0x8020_2001, 0x178b_fbfd]
        );
        assert_eq!(find(&leaves, 0x4000_0001, 0), [0x0100_007b, 0, 0, 0]);
        assert_eq!(find(&leaves, 4, 0), [0x0400_0121, 0x01c0_003f, 0x3f, 1]);
        assert_eq!(find(&leaves, 4, 3), [0x0400_4163, 0x03c0_003f, 0x3fff, 6]);
        assert_eq!(find(&leaves, 0xb, 0), [0, 1, 0x100, 1]);
        assert_eq!(find(&leaves, 0xb, 1), [1, 2, 0x201, 1]);
        assert_eq!(find(&leaves, 0x8000_0001, 0), [0x60fb1, 0, 1, 0x2010_0800]);
        assert_eq!(
            find(&leaves, 0x8000_0003, 0),
            [0x7265_7620, 0x6e6f_6973, 0x352e_3220, 0x0000_002b]
        );
        assert_eq!(find(&leaves, 0x8000_0008, 0), [0x302e, 0, 0x1001, 0]);
        let alone = Model::Qemu64.leaves(&everything(), 0, 1, true);
        assert_eq!(
            find(&alone, 1, 0),
            [0x60fb1, 0x800, 0x8020_2001, 0x078b_fbfd]
        );
        assert_eq!(find(&alone, 0x8000_0008, 0)[2], 0);
        assert_eq!((physical_bits(&alone), version(&alone)), (46, 0x60fb1));
    }

    #[test]
    fn what_kvm_lacks_is_not_shown() {
        let none = CpuId::from_entries(&[plain(0, [1, 2, 3, 4])]).unwrap();
        let leaves = Model::Qemu64.leaves(&none, 0, 1, true);
        assert_eq!(find(&leaves, 1, 0)[3], 0);
        assert_eq!(find(&leaves, 0x4000_0001, 0), [0; 4]);
    }

    #[test]
    fn host_shows_the_deadline_timer_if_kvm_has_it() {
        let mut leaves = everything();
        leaves.as_mut_slice()[1].ecx = 0;
        let ecx = |has| find(&Model::Host.leaves(&leaves, 0, 1, has), 1, 0)[2];
        assert_eq!(
            ecx(true),
            FEATURE_X2APIC | FEATURE_HYPERVISOR | FEATURE_TSC_DEADLINE
        );
        assert_eq!(ecx(false), FEATURE_X2APIC | FEATURE_HYPERVISOR);
    }

    #[test]
    fn unknown_models_are_refused_in_qemus_words() {
        let error = Model::from_name("Skylake").unwrap_err().to_string();
        assert_eq!(error, "unable to find CPU model 'Skylake'");
    }
}
