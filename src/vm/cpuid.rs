//! What CPUID tells the guest, for the two CPU models built in.
//!
//! CPUID is not in the migration stream, so both answer what QEMU's do under KVM, leaf by leaf.
//! `qemu64` is masked with what the host's KVM supports; `host` shows all of that as far as QEMU
//! passes it on. Where 7.2 and 10.0 differ, a guest sees the fewer features, so that it can move to
//! either: no asynchronous page faults as #VMEXIT (7.2), no machine-check recovery in 0x80000007
//! (7.2), CMP_LEGACY in 0x80000001 only if the processor has it (10.0). `tests/nested` compares all
//! leaves.

use std::arch::x86_64::__cpuid;

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

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

    /// The leaves of vCPU `index` of `count` on that host.
    pub(super) fn leaves(self, host: &Host<'_>, index: u32, count: u32) -> Vec<kvm_cpuid_entry2> {
        let topology = Topology { index, count };
        let mut leaves = match self {
            Self::Qemu64 => qemu64(host, &topology),
            Self::Host => whole_host(host, &topology),
        };
        leaves.extend(host.same_everywhere(&topology));
        leaves
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

    /// Leaf 0x80000008 ECX.
    fn cores(&self) -> u32 {
        match self.count {
            1 => 0,
            count => self.core_bits() << 12 | (count - 1),
        }
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

/// What a model is made from.
pub(super) struct Host<'a> {
    /// The leaves its KVM supports.
    pub(super) supported: &'a [kvm_cpuid_entry2],
    /// The processor's name, as it tells it itself: KVM does not pass it on.
    pub(super) name: [u32; 12],
    /// Whether KVM's LAPIC timer knows the TSC-deadline mode.
    pub(super) has_deadline: bool,
    /// Whether the guest is told of `kernel-irqchip=split`.
    pub(super) is_split: bool,
}

/// The name this processor gives itself.
pub(super) fn processor_name() -> [u32; 12] {
    let mut name = [0; 12];
    if __cpuid(0x8000_0000).eax >= 0x8000_0004 {
        for (function, words) in (0x8000_0002..).zip(name.as_chunks_mut::<4>().0) {
            let leaf = __cpuid(function);
            *words = [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx];
        }
    }
    name
}

impl Host<'_> {
    fn leaf(&self, function: u32, index: u32) -> kvm_cpuid_entry2 {
        let found = self
            .supported
            .iter()
            .find(|leaf| leaf.function == function && leaf.index == index);
        found.copied().unwrap_or_default()
    }

    /// The three registers of the vendor's name.
    fn vendor(&self) -> [u32; 3] {
        let leaf = self.leaf(0, 0);
        [leaf.ebx, leaf.ecx, leaf.edx]
    }

    fn is_amd(&self) -> bool {
        self.vendor() == AMD
    }

    /// The leaves that are the same for every model: topology, QEMU's caches, MONITOR, KVM.
    fn same_everywhere(&self, topology: &Topology) -> Vec<kvm_cpuid_entry2> {
        let [name_b, name_c, name_d] = KVM_SIGNATURE;
        let mut leaves = vec![
            plain(0x4000_0000, [0x4000_0001, name_b, name_c, name_d]),
            plain(5, [0, 0, 3, 0]),
            plain(
                0x8000_0005,
                [0x01ff_01ff, 0x01ff_01ff, 0x4002_0140, 0x4002_0140],
            ),
            plain(0x8000_0006, [0, 0x4200_4200, 0x0200_8140, 0x0080_8140]),
        ];
        leaves.extend(topology.extended());
        // An AMD processor has no such leaves.
        if !self.is_amd() {
            let cache = |index, eax: u32, rest: [u32; 3], shared| {
                let [ebx, ecx, edx] = rest;
                indexed(4, index, [eax | topology.sharing(shared), ebx, ecx, edx])
            };
            leaves.extend([
                plain(2, [1, 0, 0x4d, 0x002c_307d]),
                cache(0, 0x121, [0x01c0_003f, 0x3f, 1], false),
                cache(1, 0x122, [0x01c0_003f, 0x3f, 1], false),
                cache(2, 0x143, [0x03c0_003f, 0xfff, 1], false),
                cache(3, 0x163, [0x03c0_003f, 0x3fff, 6], true),
            ]);
        }
        leaves
    }

    /// Leaf 0x40000001: of those features the ones KVM has. QEMU adds one with `split`.
    fn paravirtual(&self, features: u32) -> kvm_cpuid_entry2 {
        let split = if self.is_split {
            KVM_MSI_EXT_DEST_ID
        } else {
            0
        };
        let eax = features & self.leaf(0x4000_0001, 0).eax | split;
        plain(0x4000_0001, [eax, 0, 0, 0])
    }
}

/// The leaves that hold the processor's name.
fn name_leaves(name: [u32; 12]) -> impl Iterator<Item = kvm_cpuid_entry2> {
    let words = name.as_chunks::<4>().0.to_vec();
    (0x8000_0002..)
        .zip(words)
        .map(|(function, words)| plain(function, words))
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
    let [v1, v2, v3] = host.vendor();
    let features = host.leaf(1, 0);
    let extended = host.leaf(0x8000_0001, 0);
    let several = if topology.count > 1 { FEATURE_HT } else { 0 };
    let edx = QEMU64_EDX & features.edx | several;
    let ecx = QEMU64_ECX & features.ecx | FEATURE_X2APIC | FEATURE_HYPERVISOR;
    // An AMD processor repeats features of leaf 1.
    let repeated = if host.is_amd() { edx & AMD_ALIASES } else { 0 };
    let cores = if topology.count > 1 && host.vendor() != INTEL {
        FEATURE_CMP_LEGACY
    } else {
        0
    };
    let name = std::array::from_fn(|n| {
        let bytes: [u8; 4] = std::array::from_fn(|byte| MODEL_NAME[n * 4 + byte]);
        u32::from_le_bytes(bytes)
    });
    let mut leaves = vec![
        host.paravirtual(QEMU64_KVM),
        plain(0, [0xd, v1, v2, v3]),
        plain(1, [QEMU64_VERSION, topology.brand(), ecx, edx]),
        indexed(7, 0, [0; 4]),
        plain(0x8000_0000, [0x8000_000a, v1, v2, v3]),
        plain(
            0x8000_0001,
            [
                QEMU64_VERSION,
                0,
                (QEMU64_EXT_ECX | cores) & extended.ecx,
                QEMU64_EXT_EDX & extended.edx | repeated,
            ],
        ),
        plain(
            0x8000_0008,
            [
                0x3000 | host.leaf(0x8000_0008, 0).eax & 0xff,
                0,
                topology.cores(),
                0,
            ],
        ),
    ];
    leaves.extend(name_leaves(name));
    leaves
}

/// What KVM supports, and of that what QEMU passes on to a guest that shall be able to move.
fn whole_host(host: &Host<'_>, topology: &Topology) -> Vec<kvm_cpuid_entry2> {
    let [v1, v2, v3] = host.vendor();
    let version = host.leaf(1, 0).eax;
    let mut leaves = vec![host.paravirtual(HOST_KVM)];
    leaves.extend(name_leaves(host.name));
    for leaf in host.supported {
        let mut leaf = *leaf;
        match leaf.function {
            1 => {
                leaf.ebx = topology.brand();
                leaf.ecx |= FEATURE_X2APIC | FEATURE_HYPERVISOR;
                if host.has_deadline {
                    leaf.ecx |= FEATURE_TSC_DEADLINE;
                }
                if topology.count > 1 {
                    leaf.edx |= FEATURE_HT;
                }
            }
            // SGX needs memory that this machine has not; traces have MSRs that do not move.
            7 if leaf.index == 0 => {
                leaf.ebx &= !(FEATURE_SGX | FEATURE_INTEL_PT);
                leaf.ecx &= !FEATURE_SGX_LC;
            }
            // KVM keeps it up to date only where there are compacted areas.
            0xd if leaf.index == 1 => leaf.ebx = compacted_size(host),
            0x8000_0000 => (leaf.ebx, leaf.ecx, leaf.edx) = (v1, v2, v3),
            // It takes consistent caches and topology, and is nothing to enable blindly.
            0x8000_0001 => (leaf.eax, leaf.ecx) = (version, leaf.ecx & !FEATURE_TOPOEXT),
            // An invariant TSC holds on one host only.
            0x8000_0007 => {
                leaf.ebx = 0;
                leaf.edx &= !FEATURE_INVARIANT_TSC;
            }
            0x8000_0008 => (leaf.eax, leaf.ecx) = (leaf.eax & 0xffff, topology.cores()),
            0x8000_000a if leaf.eax != 0 => leaf.ebx = NESTED_ASIDS,
            0 | 6 | 7 | 0xa | 0xd | 0x1d | 0x1e => {}
            // QEMU makes its own, or shows none.
            _ => continue,
        }
        leaves.push(leaf);
    }
    leaves
}

/// Bytes of an XSAVE area with all that KVM supports, compacted.
fn compacted_size(host: &Host<'_>) -> u32 {
    let user = host.leaf(0xd, 0);
    let supervisor = host.leaf(0xd, 1);
    let low = user.eax | supervisor.ecx;
    let high = user.edx | supervisor.edx;
    let components = u64::from(high) << 32 | u64::from(low);
    (2..63)
        .filter(|index| components >> index & 1 != 0)
        .map(|index| host.leaf(0xd, index))
        .fold(XSAVE_LEGACY, |end, component| {
            let is_aligned = component.ecx & 2 != 0;
            let start = if is_aligned {
                end.next_multiple_of(64)
            } else {
                end
            };
            start + component.eax
        })
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
/// Leaf 0x40000001: all that QEMU 7.2 has a name for.
const HOST_KVM: u32 = 0x0100_7aff;
/// Leaf 0x40000001: more than 255 vCPUs can be reached by messages.
const KVM_MSI_EXT_DEST_ID: u32 = 1 << 15;
/// The vendor `AuthenticAMD`, as EBX, ECX, EDX.
const AMD: [u32; 3] = [0x6874_7541, 0x444d_4163, 0x6974_6e65];
/// The vendor `GenuineIntel`.
const INTEL: [u32; 3] = [0x756e_6547, 0x6c65_746e, 0x4965_6e69];
/// Leaf 1 EDX: what leaf 0x80000001 of an AMD processor repeats.
const AMD_ALIASES: u32 = 0x0183_f3ff;
/// Leaf 0x8000000a EBX.
const NESTED_ASIDS: u32 = 16;
/// Bytes of an XSAVE area's legacy region and header.
const XSAVE_LEGACY: u32 = 576;
const KVM_SIGNATURE: [u32; 3] = [0x4b4d_564b, 0x564b_4d56, 0x0000_004d];
const MODEL_NAME: &[u8; 48] =
    b"QEMU Virtual CPU version 2.5+\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
const FEATURE_HT: u32 = 1 << 28;
const FEATURE_X2APIC: u32 = 1 << 21;
const FEATURE_TSC_DEADLINE: u32 = 1 << 24;
const FEATURE_HYPERVISOR: u32 = 1 << 31;
/// Leaf 7 EBX.
const FEATURE_SGX: u32 = 1 << 2;
/// Leaf 7 EBX.
const FEATURE_INTEL_PT: u32 = 1 << 25;
/// Leaf 7 ECX.
const FEATURE_SGX_LC: u32 = 1 << 30;
/// Leaf 0x80000001 ECX.
const FEATURE_CMP_LEGACY: u32 = 1 << 1;
/// Leaf 0x80000001 ECX.
const FEATURE_TOPOEXT: u32 = 1 << 22;
/// Leaf 0x80000007 EDX.
const FEATURE_INVARIANT_TSC: u32 = 1 << 8;

#[cfg(test)]
mod tests {
    use super::*;

    /// A processor of that vendor whose KVM supports everything.
    fn everything([ebx, ecx, edx]: [u32; 3]) -> Vec<kvm_cpuid_entry2> {
        let all = [u32::MAX; 4];
        vec![
            plain(0, [0xd, ebx, ecx, edx]),
            plain(1, all),
            indexed(4, 0, all),
            indexed(7, 0, all),
            indexed(0xd, 0, [0x207, 0x240, 0xa88, 0]),
            indexed(0xd, 1, [5, 0, 0, 0]),
            indexed(0xd, 2, [0x100, 0x240, 0, 0]),
            indexed(0xd, 9, [8, 0xa80, 0, 0]),
            plain(0x4000_0000, [0x4000_0001, 1, 2, 3]),
            plain(0x4000_0001, all),
            plain(0x8000_0000, [0x8000_000a, 0, 0, 0]),
            plain(0x8000_0001, all),
            plain(0x8000_0007, all),
            plain(0x8000_0008, [0x302e, 0, 0, 0]),
            plain(0x8000_000a, [1, 8, 0, 0x21]),
            plain(0x8000_001e, all),
        ]
    }

    fn host(supported: &[kvm_cpuid_entry2]) -> Host<'_> {
        Host {
            supported,
            name: std::array::from_fn(|n| n as u32),
            has_deadline: true,
            is_split: false,
        }
    }

    /// A leaf; zeros if there is none, as the guest sees it.
    fn find(leaves: &[kvm_cpuid_entry2], function: u32, index: u32) -> [u32; 4] {
        let leaf = Host {
            name: [0; 12],
            ..host(leaves)
        }
        .leaf(function, index);
        [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]
    }

    #[test]
    fn qemu64_answers_as_qemu_does() {
        // The values QEMU passes to KVM_SET_CPUID2 for the second of two vCPUs.
        let supported = everything(INTEL);
        let leaves = Model::Qemu64.leaves(&host(&supported), 1, 2);
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
        let alone = Model::Qemu64.leaves(&host(&supported), 0, 1);
        assert_eq!(
            find(&alone, 1, 0),
            [0x60fb1, 0x800, 0x8020_2001, 0x078b_fbfd]
        );
        assert_eq!(find(&alone, 0x8000_0008, 0)[2], 0);
        assert_eq!((physical_bits(&alone), version(&alone)), (46, 0x60fb1));
    }

    #[test]
    fn an_amd_processor_shows_other_caches_and_repeats_features() {
        let supported = everything(AMD);
        for model in [Model::Qemu64, Model::Host] {
            let leaves = model.leaves(&host(&supported), 0, 2);
            assert_eq!(find(&leaves, 2, 0), [0; 4]);
            assert_eq!(find(&leaves, 4, 0), [0; 4]);
            assert_eq!(find(&leaves, 0x8000_0005, 0)[0], 0x01ff_01ff);
        }
        let leaves = Model::Qemu64.leaves(&host(&supported), 0, 1);
        assert_eq!(find(&leaves, 0x8000_0001, 0), [0x60fb1, 0, 1, 0x2193_fbfd]);
        assert_eq!(find(&leaves, 0x8000_000a, 0), [0; 4]);
        let two = Model::Qemu64.leaves(&host(&supported), 0, 2);
        assert_eq!(find(&two, 0x8000_0001, 0)[2], 3);
        let leaves = Model::Host.leaves(&host(&supported), 0, 1);
        assert_eq!(find(&leaves, 0x8000_000a, 0), [1, 16, 0, 0x21]);
    }

    #[test]
    fn host_shows_what_qemu_passes_on() {
        let supported = everything(INTEL);
        let leaves = Model::Host.leaves(&host(&supported), 0, 2);
        assert_eq!(find(&leaves, 4, 0), [0x0400_0121, 0x01c0_003f, 0x3f, 1]);
        assert_eq!(find(&leaves, 5, 0), [0, 0, 3, 0]);
        assert_eq!(find(&leaves, 0xd, 1), [5, 0x348, 0, 0]);
        assert_eq!(find(&leaves, 0x4000_0001, 0), [0x0100_7aff, 0, 0, 0]);
        assert_eq!(find(&leaves, 0x8000_0000, 0)[1..], INTEL);
        assert_eq!(find(&leaves, 0x8000_0001, 0)[2], !FEATURE_TOPOEXT);
        assert_eq!(find(&leaves, 0x8000_0003, 0), [4, 5, 6, 7]);
        assert_eq!(find(&leaves, 0x8000_0007, 0)[3], !FEATURE_INVARIANT_TSC);
        assert_eq!(find(&leaves, 0x8000_0008, 0), [0x302e, 0, 0x1001, 0]);
        assert_eq!(find(&leaves, 0x8000_001e, 0), [0; 4]);
    }

    #[test]
    fn what_kvm_lacks_is_not_shown() {
        let none = [plain(0, [1, 2, 3, 4])];
        let leaves = Model::Qemu64.leaves(&host(&none), 0, 1);
        assert_eq!(find(&leaves, 1, 0)[3], 0);
        assert_eq!(find(&leaves, 0x4000_0001, 0), [0; 4]);
    }

    #[test]
    fn a_split_irqchip_shows() {
        let supported = everything(INTEL);
        for model in [Model::Qemu64, Model::Host] {
            let split = Host {
                is_split: true,
                ..host(&supported)
            };
            let eax = find(&model.leaves(&split, 0, 1), 0x4000_0001, 0)[0];
            assert_ne!(eax & KVM_MSI_EXT_DEST_ID, 0);
        }
    }

    #[test]
    fn host_shows_the_deadline_timer_if_kvm_has_it() {
        let mut supported = everything(INTEL);
        supported[1].ecx = 0;
        let ecx = |has_deadline| {
            let host = Host {
                has_deadline,
                ..host(&supported)
            };
            find(&Model::Host.leaves(&host, 0, 1), 1, 0)[2]
        };
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
