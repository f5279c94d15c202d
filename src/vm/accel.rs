//! What executes the guest: KVM, or nothing.
//!
//! Both keep the same state: vCPUs with their local APICs, the I/O APIC, the paravirtual clock.
//! Without KVM it is plain data, which can be loaded, looked at and saved again.

mod kvm_accel;

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::KVM_API_VERSION;
use kvm_ioctls::Kvm;

pub(super) use self::kvm_accel::{Bare, KvmAccel};
use super::cpu_state::CpuState;
use super::device::apic::Apic;
use super::device::i8254::Pit;
use super::device::i8259::{CHIPS, Pic};
use super::device::ioapic::IoApic;
use super::device::kvmclock::KvmClock;
use super::guest::Error;
use crate::config::{Accel as Wanted, Chips};

/// State of everything but COM1.
#[derive(Clone, Debug)]
pub(super) struct State {
    /// vCPUs, each with its local APIC.
    pub(super) cpus: Vec<(CpuState, Apic)>,
    /// The I/O APIC.
    pub(super) ioapic: IoApic,
    /// Master and slave PIC, if the machine has them.
    pub(super) pics: Option<[Pic; CHIPS]>,
    /// The PIT, if the machine has one.
    pub(super) pit: Option<Pit>,
    /// The paravirtual clock.
    pub(super) clock: KvmClock,
}

/// New state for some of it; what is `None` stays as it is.
#[derive(Debug, Default)]
pub(super) struct Update {
    /// By vCPU.
    pub(super) cpus: Vec<(Option<CpuState>, Option<Apic>)>,
    /// The I/O APIC.
    pub(super) ioapic: Option<IoApic>,
    /// Master and slave PIC.
    pub(super) pics: [Option<Pic>; CHIPS],
    /// The PIT.
    pub(super) pit: Option<Pit>,
    /// The paravirtual clock.
    pub(super) clock: Option<KvmClock>,
}

/// What executes the guest.
pub(super) enum Accel {
    /// KVM does.
    Kvm(Box<KvmAccel>),
    /// Nothing does.
    Absent(Box<Mutex<State>>),
}

impl State {
    /// A machine of `vcpus` at reset, as far as no KVM says better.
    pub(super) fn at_reset(vcpus: usize, chips: Chips) -> Self {
        let cpus = (0..vcpus)
            .map(|n| (CpuState::at_reset(n), Apic::at_reset(n)))
            .collect();
        Self {
            cpus,
            ioapic: IoApic::default(),
            pics: chips.pic.then(Default::default),
            pit: chips.pit.then(Pit::default),
            clock: KvmClock::at(0),
        }
    }

    /// All of it as an update, but for the clock: a reset does not turn time back.
    pub(super) fn into_reset(self) -> Update {
        Update {
            cpus: self
                .cpus
                .into_iter()
                .map(|(cpu, apic)| (Some(cpu), Some(apic)))
                .collect(),
            ioapic: Some(self.ioapic),
            pics: self.pics.map_or([None, None], |pics| pics.map(Some)),
            pit: self.pit,
            clock: None,
        }
    }

    fn apply(&mut self, update: Update) {
        for ((cpu, apic), (new_cpu, new_apic)) in self.cpus.iter_mut().zip(update.cpus) {
            if let Some(new) = new_cpu {
                *cpu = new;
            }
            if let Some(new) = new_apic {
                *apic = new;
            }
        }
        if let Some(new) = update.ioapic {
            self.ioapic = new;
        }
        for (pic, new) in self.pics.iter_mut().flatten().zip(update.pics) {
            if let Some(new) = new {
                *pic = new;
            }
        }
        if let Some(new) = update.pit {
            self.pit = Some(new);
        }
        if let Some(new) = update.clock {
            self.clock = new;
        }
    }
}

impl Accel {
    /// Nothing, at reset.
    pub(super) fn absent(vcpus: usize, chips: Chips) -> Self {
        Self::Absent(Box::new(Mutex::new(State::at_reset(vcpus, chips))))
    }

    /// KVM, if there is any.
    pub(super) fn kvm(&self) -> Option<&KvmAccel> {
        match self {
            Self::Kvm(kvm) => Some(kvm),
            Self::Absent(_) => None,
        }
    }

    /// Family, model and stepping, and features of its vCPUs: CPUID leaf 1 EAX and EDX. Without
    /// KVM those of QEMU's `qemu64`.
    pub(super) fn processor(&self) -> (u32, u32) {
        self.kvm()
            .map_or((0x0006_0fb1, 0x178b_fbff), KvmAccel::processor)
    }

    /// State of a guest at rest.
    pub(super) fn capture(&self) -> Result<State, Error> {
        match self {
            Self::Kvm(kvm) => kvm.capture(),
            Self::Absent(state) => Ok(lock(state).clone()),
        }
    }

    /// State of a machine at reset.
    pub(super) fn reset_state(&self) -> State {
        match self {
            Self::Kvm(kvm) => kvm.reset_state(),
            Self::Absent(state) => {
                let state = lock(state);
                let chips = Chips {
                    pic: state.pics.is_some(),
                    pit: state.pit.is_some(),
                    ..Chips::default()
                };
                State::at_reset(state.cpus.len(), chips)
            }
        }
    }

    /// Gives a guest at rest new state.
    pub(super) fn restore(&self, update: Update) -> Result<(), Error> {
        match self {
            Self::Kvm(kvm) => kvm.restore(update),
            Self::Absent(state) => {
                lock(state).apply(update);
                Ok(())
            }
        }
    }

    /// One vCPU; a running guest is interrupted for it.
    pub(super) fn vcpu(&self, index: usize) -> Result<(CpuState, Apic), Error> {
        match self {
            Self::Kvm(kvm) => kvm.vcpu(index),
            Self::Absent(state) => lock(state)
                .cpus
                .get(index)
                .cloned()
                .ok_or_else(|| no_vcpu(index)),
        }
    }
}

fn no_vcpu(index: usize) -> Error {
    Error::State(format!("there is no vCPU {index}"))
}

/// Opens KVM, unless `-accel none` says not to. Without `-accel` a host that has none gets a
/// machine that can not run, and a line that says why.
pub(super) fn open(wanted: Option<Wanted>) -> Result<Option<Kvm>, Error> {
    if wanted == Some(Wanted::None) {
        return Ok(None);
    }
    match Kvm::new().map_err(io::Error::from).and_then(checked) {
        Ok(kvm) => Ok(Some(kvm)),
        Err(source) if wanted.is_some() => Err(Error::System {
            what: "Could not access KVM kernel module".to_owned(),
            source,
        }),
        Err(error) => {
            log::warn!(
                "Could not access KVM kernel module: {}; \
                 using -accel none, the guest stays paused",
                crate::errno::Errno(&error)
            );
            Ok(None)
        }
    }
}

/// Whatever is at KVM's place may be something else.
fn checked(kvm: Kvm) -> io::Result<Kvm> {
    if kvm.get_api_version() == KVM_API_VERSION as i32 {
        Ok(kvm)
    } else {
        Err(io::Error::other("kvm version not supported"))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Shared by machine and dirty log.
pub(super) type SharedVm = Arc<super::kvm::Vm>;
