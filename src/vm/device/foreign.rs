//! Sections that QEMU sends and this machine has no device for: decoded, and dropped.
//!
//! Whether a guest minds depends on the section: bookkeeping of QEMU's own is dropped silently, a
//! device the guest may have used (interrupt controller, timer chip, clock chip) with a warning.

use super::i8254::Pit;
use super::i8259::{CHIPS, Pic};
use crate::vmstate::{Result, StateReader, Subsection, Visitor, VmState, load};

/// Decodes and drops the section of that name, instance and version. `None`: not one of these.
pub(crate) fn drop_section(
    idstr: &str,
    instance: u32,
    version: u32,
    vcpus: u32,
    body: &mut dyn StateReader,
) -> Option<Result> {
    let known = SECTIONS.iter().find(|s| s.name == idstr)?;
    let instances = if known.per_vcpu {
        vcpus
    } else {
        known.instances
    };
    if instance >= instances {
        return None;
    }
    if known.warn {
        log::warn!("dropping section '{idstr}' {instance}: this machine has no such device");
    } else {
        log::debug!("dropping section '{idstr}' {instance}");
    }
    Some((known.load)(version, body))
}

/// One section that is dropped.
struct Section {
    name: &'static str,
    instances: u32,
    per_vcpu: bool,
    /// Whether a guest could miss the device.
    warn: bool,
    load: fn(u32, &mut dyn StateReader) -> Result,
}

impl Section {
    const fn new<T: VmState + Default>() -> Self {
        Self {
            name: T::NAME,
            instances: 1,
            per_vcpu: false,
            warn: false,
            load: |version, body| load(&mut T::default(), version, body),
        }
    }
}

const SECTIONS: [Section; 6] = [
    Section::new::<FwCfg>(),
    Section {
        per_vcpu: true,
        ..Section::new::<CpuCommon>()
    },
    Section::new::<TprOpt>(),
    Section {
        instances: CHIPS as u32,
        warn: true,
        ..Section::new::<Pic>()
    },
    Section {
        warn: true,
        ..Section::new::<Pit>()
    },
    Section {
        warn: true,
        ..Section::new::<RtcSection>()
    },
];

/// A state of which only the length is known here.
macro_rules! opaque {
    ($type:ident, $name:literal, $version:literal, $len:literal $(, $sub:literal $sub_version:literal $sub_len:literal)*) => {
        #[derive(Default)]
        struct $type;

        impl VmState for $type {
            const NAME: &'static str = $name;
            const VERSION: u32 = $version;
            const SUBSECTIONS: &'static [Subsection<Self>] = &[$(Subsection {
                name: $sub,
                version: $sub_version,
                needed: |_| false,
                fields: |_, v| v.unused($sub_len),
            }),*];

            fn fields(&mut self, v: &mut dyn Visitor, _version: u32) -> Result {
                v.unused($len)
            }
        }
    };
}

opaque!(FwCfg, "fw_cfg", 2, 6, "fw_cfg/dma" 0 8, "fw_cfg/acpi_mr" 1 24);
opaque!(TprOpt, "kvm-tpr-opt", 1, 144);
opaque!(RtcSection, "mc146818rtc", 3, 245, "mc146818rtc/irq_reinject_on_ack_count" 1 2);

/// QEMU's own view of a vCPU. With KVM the section `cpu` says all of it.
#[derive(Default)]
struct CpuCommon {
    crashed: bool,
}

impl VmState for CpuCommon {
    const NAME: &'static str = "cpu_common";
    const VERSION: u32 = 1;
    const SUBSECTIONS: &'static [Subsection<Self>] = &[
        Subsection {
            name: "cpu_common/exception_index",
            version: 1,
            needed: |_| false,
            fields: |_, v| v.unused(4),
        },
        Subsection {
            name: "cpu_common/crash_occurred",
            version: 1,
            needed: |_| false,
            fields: |s, v| v.number("crash_occurred", &mut s.crashed),
        },
    ];

    fn fields(&mut self, v: &mut dyn Visitor, _version: u32) -> Result {
        v.ranged("halted", &mut 0, 0..=1u32)?;
        v.unused(4)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmstate::Error;

    fn dropped(name: &str, instance: u32, version: u32, body: &[u8]) -> Option<(Result, usize)> {
        let mut from = body;
        let result = drop_section(name, instance, version, 2, &mut from)?;
        Some((result, from.len()))
    }

    #[test]
    fn each_is_read_to_its_end() {
        let sizes = [
            ("fw_cfg", 2, 6),
            ("cpu_common", 1, 8),
            ("kvm-tpr-opt", 1, 144),
            ("i8259", 1, 16),
            ("i8254", 3, 108),
            ("mc146818rtc", 3, 245),
        ];
        for (name, version, size) in sizes {
            let (result, rest) = dropped(name, 0, version, &vec![0; size + 3]).unwrap();
            assert!(result.is_ok(), "{name}");
            assert_eq!(rest, 3, "{name}");
            assert!(
                dropped(name, 0, version, &vec![0; size - 1])
                    .unwrap()
                    .0
                    .is_err(),
                "{name}"
            );
            assert!(
                dropped(name, 0, version + 1, &vec![0; size])
                    .unwrap()
                    .0
                    .is_err(),
                "{name}"
            );
        }
    }

    #[test]
    fn instances_are_bounded() {
        assert!(dropped("cpu_common", 1, 1, &[0; 8]).is_some());
        assert!(dropped("cpu_common", 2, 1, &[0; 8]).is_none());
        assert!(dropped("i8259", 2, 1, &[0; 16]).is_none());
        assert!(dropped("hpet", 0, 1, &[0; 16]).is_none());
    }

    #[test]
    fn subsections_are_known_by_name() {
        let dma = b"\0\0\0\0\0\0\x05\x0afw_cfg/dma\0\0\0\0\0\0\0\0\0\0\0\0".to_vec();
        assert!(matches!(dropped("fw_cfg", 0, 2, &dma), Some((Ok(()), 0))));
        let other = b"\0\0\0\0\0\0\x05\x0afw_cfg/dmb\0\0\0\0\0\0\0\0\0\0\0\0".to_vec();
        let error = dropped("fw_cfg", 0, 2, &other).unwrap().0.unwrap_err();
        assert!(matches!(error, Error::UnknownSubsection { .. }));
    }
}
