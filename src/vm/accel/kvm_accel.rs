//! KVM as the accelerator: the virtual machine, its vCPU threads, its interrupt controllers.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kvm_bindings::{
    CpuId, KVM_CAP_X86_TRIPLE_FAULT_EVENT, KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_MAX_CPUID_ENTRIES, KvmIrqRouting,
    kvm_clock_data, kvm_enable_cap, kvm_irq_routing_entry, kvm_irq_routing_irqchip, kvm_pit_config,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd};

use super::{SharedVm, State, Update, lock, no_vcpu};
use crate::config::Chips;
use crate::vm::cpu_state::transfer::{self, Features};
use crate::vm::cpu_state::{CpuState, MCE_BANKS, XsaveLayout};
use crate::vm::cpuid::{self, Host, Model};
use crate::vm::device::apic::Apic;
use crate::vm::device::bus::Bus;
use crate::vm::device::i8254::Pit;
use crate::vm::device::i8259::{self, CHIPS, Pic};
use crate::vm::device::ioapic::PINS;
use crate::vm::device::kvmclock::KvmClock;
use crate::vm::guest::Error;
use crate::vm::kvm::{self, Vm};
use crate::vm::map::Map;
use crate::vm::vcpu::{Reporter, Vcpu};

/// KVM and what it runs.
pub(in crate::vm) struct KvmAccel {
    // Threads end before the virtual machine does.
    vcpus: Vec<Vcpu>,
    vm: SharedVm,
    features: Arc<Features>,
    at_reset: State,
    /// CPUID leaf 1 EAX and EDX.
    processor: (u32, u32),
    chips: Chips,
    /// The guest's clock while the guest rests.
    clock: Mutex<Option<KvmClock>>,
    /// The PIT while the guest rests, if the machine has one.
    pit: Mutex<Option<Pit>>,
}

/// A virtual machine without vCPUs yet: its devices need it before the vCPUs need them.
pub(in crate::vm) struct Bare {
    kvm: Kvm,
    vm: SharedVm,
    chips: Chips,
}

impl Bare {
    /// A virtual machine with the memory of `map`, interrupt controllers and those chips.
    pub(in crate::vm) fn new(kvm: Kvm, map: &Map, chips: Chips) -> Result<Self, Error> {
        let fd = call("KVM_CREATE_VM", kvm.create_vm())?;
        call(
            "KVM_SET_IDENTITY_MAP_ADDR",
            fd.set_identity_map_address(IDENTITY_MAP),
        )?;
        call("KVM_SET_TSS_ADDR", fd.set_tss_address(TSS))?;
        call("KVM_CREATE_IRQCHIP", fd.create_irq_chip())?;
        call(
            "KVM_SET_GSI_ROUTING",
            fd.set_gsi_routing(&routing(chips.pic)?),
        )?;
        if chips.pit {
            call("KVM_CREATE_PIT2", fd.create_pit2(kvm_pit_config::default()))?;
        }
        let vm = Vm::new(fd);
        for index in 0..map.windows().len() {
            let (slot, block) = map.slot(index);
            vm.set_slot(&slot, block, false)
                .map_err(|source| Error::System {
                    what: format!("KVM_SET_USER_MEMORY_REGION ({slot:x?})"),
                    source,
                })?;
        }
        Ok(Self {
            kvm,
            vm: Arc::new(vm),
            chips,
        })
    }

    /// The virtual machine.
    pub(in crate::vm) fn vm(&self) -> &SharedVm {
        &self.vm
    }

    /// Adds `count` vCPUs of that model, at rest and at reset.
    pub(in crate::vm) fn populate(
        self,
        model: Model,
        count: u32,
        bus: &Arc<Bus>,
        reporter: &Reporter,
    ) -> Result<KvmAccel, Error> {
        let Self { kvm, vm, chips } = self;
        let supported = call(
            "KVM_GET_SUPPORTED_CPUID",
            kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES),
        )?;
        let host = Host {
            supported: supported.as_slice(),
            name: cpuid::processor_name(),
            has_deadline: kvm.check_extension(Cap::TscDeadlineTimer),
            is_split: !chips.irqchip_on,
        };
        let mcg_cap = mcg_cap(&kvm);
        let mut fds = Vec::new();
        for index in 0..count {
            let leaves = model.leaves(&host, index, count);
            fds.push((create_vcpu(&vm, index, &leaves, mcg_cap)?, leaves));
        }
        let mut triple_fault = kvm_enable_cap {
            cap: KVM_CAP_X86_TRIPLE_FAULT_EVENT,
            ..Default::default()
        };
        triple_fault.args[0] = 1;
        let triple_fault = vm.fd().enable_cap(&triple_fault).is_ok();
        let features = match fds.first() {
            Some((vcpu, leaves)) => Features {
                triple_fault,
                ..features(&kvm, vcpu, leaves, mcg_cap, &supported)?
            },
            None => return Err(Error::State("a machine needs a vCPU".to_owned())),
        };
        let features = Arc::new(features);
        let mut at_reset = State::at_reset(0, chips);
        at_reset.ioapic = get_ioapic(&vm)?;
        let processor = fds.first().map_or((0, 0), |(_, leaves)| {
            (cpuid::version(leaves), cpuid::features(leaves))
        });
        let mut vcpus = Vec::new();
        for (index, (vcpu, leaves)) in fds.into_iter().enumerate() {
            let (mut state, mut apic) = transfer::read(&vcpu, &features)?;
            state.power_on(cpuid::version(&leaves));
            apic.power_on();
            transfer::write(&vcpu, &features, &mut state, &apic)?;
            at_reset.cpus.push((state, apic));
            vcpus.push(Vcpu::spawn(
                index,
                vcpu,
                Arc::clone(bus),
                Arc::clone(reporter),
            )?);
        }
        Ok(KvmAccel {
            vcpus,
            vm,
            features,
            at_reset,
            processor,
            chips,
            clock: Mutex::default(),
            pit: Mutex::new(chips.pit.then(Pit::default)),
        })
    }
}

impl KvmAccel {
    /// CPUID leaf 1 EAX and EDX of its vCPUs.
    pub(in crate::vm) fn processor(&self) -> (u32, u32) {
        self.processor
    }

    /// Runs the guest: its clock goes on from where it stopped.
    pub(in crate::vm) fn start(&self) -> Result<(), Error> {
        if let Some(clock) = lock(&self.clock).take() {
            let data = kvm_clock_data {
                clock: clock.clock,
                ..Default::default()
            };
            call("KVM_SET_CLOCK", self.vm.fd().set_clock(&data))?;
            for vcpu in &self.vcpus {
                // Tells the guest's watchdog of the pause; a guest without the clock has none.
                vcpu.with(|fd| {
                    if let Err(error) = fd.kvmclock_ctrl()
                        && error.errno() != rustix::io::Errno::INVAL.raw_os_error()
                    {
                        log::warn!("KVM_KVMCLOCK_CTRL: {error}");
                    }
                    Ok(())
                })?;
            }
        }
        if let Some(pit) = lock(&self.pit).take() {
            self.write_pit(&pit)?;
        }
        for vcpu in &self.vcpus {
            vcpu.resume();
        }
        Ok(())
    }

    /// Brings every vCPU to rest, and the guest's clock and timer.
    pub(in crate::vm) fn stop(&self) -> Result<(), Error> {
        let ran: Vec<_> = self.vcpus.iter().filter(|vcpu| vcpu.pause()).collect();
        for vcpu in &self.vcpus {
            vcpu.wait();
        }
        leave_interrupt_shadows(ran);
        let mut clock = lock(&self.clock);
        if clock.is_none() {
            *clock = Some(self.read_clock()?);
        }
        let mut pit = lock(&self.pit);
        if self.chips.pit && pit.is_none() {
            let read = self.read_pit()?;
            // Or it would go on interrupting.
            self.write_pit(&read.silenced())?;
            *pit = Some(read);
        }
        Ok(())
    }

    /// See [`super::Accel::capture`].
    pub(super) fn capture(&self) -> Result<State, Error> {
        let cpus = (0..self.vcpus.len())
            .map(|n| self.vcpu(n))
            .collect::<Result<_, _>>()?;
        let clock = match &*lock(&self.clock) {
            Some(clock) => clock.clone(),
            None => self.read_clock()?,
        };
        Ok(State {
            cpus,
            ioapic: get_ioapic(&self.vm)?,
            pics: self.read_pics()?,
            pit: lock(&self.pit).clone(),
            clock,
        })
    }

    /// See [`super::Accel::reset_state`].
    pub(super) fn reset_state(&self) -> State {
        self.at_reset.clone()
    }

    /// See [`super::Accel::restore`]. QEMU's order: all local APICs, the I/O APIC, the clock, the
    /// PIC, then all vCPUs.
    pub(super) fn restore(&self, update: Update) -> Result<(), Error> {
        let Update {
            mut cpus,
            ioapic,
            pics,
            pit,
            clock,
        } = update;
        for (vcpu, (_, apic)) in self.vcpus.iter().zip(&cpus) {
            if let Some(apic) = apic.clone() {
                vcpu.with(move |fd| transfer::write_apic(fd, &apic))?;
            }
        }
        if let Some(ioapic) = ioapic {
            self.vm
                .set_ioapic(&ioapic)
                .map_err(|source| Error::System {
                    what: "ioapic: KVM_SET_IRQCHIP".to_owned(),
                    source,
                })?;
        }
        if let Some(new) = clock {
            *lock(&self.clock) = Some(new);
        }
        if let Some(new) = pit {
            *lock(&self.pit) = Some(new);
        }
        for (index, pic) in pics.iter().enumerate() {
            if let Some(pic) = pic {
                self.vm
                    .set_pic(index, pic)
                    .map_err(|source| Error::System {
                        what: format!("i8259 {index}: KVM_SET_IRQCHIP"),
                        source,
                    })?;
            }
        }
        let mut lost = BTreeSet::new();
        for (vcpu, (cpu, apic)) in self.vcpus.iter().zip(cpus.drain(..)) {
            if let Some(mut cpu) = cpu {
                let features = Arc::clone(&self.features);
                lost.extend(vcpu.with(move |fd| {
                    let apic = match apic {
                        Some(apic) => apic,
                        None => transfer::read(fd, &features)?.1,
                    };
                    transfer::write(fd, &features, &mut cpu, &apic)
                })?);
            }
        }
        if !lost.is_empty() {
            let names: Vec<String> = lost.into_iter().collect();
            log::warn!(
                "This host's KVM has no place for {} of the guest's processors; dropped",
                names.join(", ")
            );
        }
        Ok(())
    }

    /// See [`super::Accel::vcpu`].
    pub(super) fn vcpu(&self, index: usize) -> Result<(CpuState, Apic), Error> {
        let vcpu = self.vcpus.get(index).ok_or_else(|| no_vcpu(index))?;
        let features = Arc::clone(&self.features);
        vcpu.with(move |fd| transfer::read(fd, &features))
    }

    /// Kernel id of a vCPU's thread, 0 if there is no such vCPU.
    pub(in crate::vm) fn thread_id(&self, index: usize) -> i32 {
        self.vcpus.get(index).map_or(0, Vcpu::thread_id)
    }

    fn read_pics(&self) -> Result<Option<[Pic; CHIPS]>, Error> {
        let read = |index| {
            self.vm.pic(index).map_err(|source| Error::System {
                what: format!("i8259 {index}: KVM_GET_IRQCHIP"),
                source,
            })
        };
        Ok(if self.chips.pic {
            Some([read(0)?, read(1)?])
        } else {
            None
        })
    }

    fn read_pit(&self) -> Result<Pit, Error> {
        let state = call("KVM_GET_PIT2", self.vm.fd().get_pit2())?;
        Ok(Pit::from_kvm(&state, monotonic()))
    }

    fn write_pit(&self, pit: &Pit) -> Result<(), Error> {
        let state = pit.to_kvm(monotonic());
        call("i8254: KVM_SET_PIT2", self.vm.fd().set_pit2(&state))
    }

    fn read_clock(&self) -> Result<KvmClock, Error> {
        call("KVM_GET_CLOCK", self.vm.fd().get_clock()).map(|data| KvmClock::at(data.clock))
    }
}

/// Lets a vCPU that came to rest in an interrupt shadow, between STI and the instruction after it,
/// run on for a moment. QEMU's stream has the shadow, but QEMU does not hand it to KVM: a guest
/// saved between STI and HLT would take its wake-up before the HLT, and sleep for ever.
fn leave_interrupt_shadows(mut stopped: Vec<&Vcpu>) {
    for _ in 0..SHADOW_TRIES {
        // A vCPU that can not be asked says so when its state is read.
        stopped.retain(|vcpu| vcpu.with(|fd| transfer::in_shadow(fd)).unwrap_or(false));
        if stopped.is_empty() {
            return;
        }
        stopped.iter().for_each(|vcpu| vcpu.resume());
        std::thread::sleep(SHADOW_MOMENT);
        stopped.retain(|vcpu| {
            let ran = vcpu.pause();
            vcpu.wait();
            ran
        });
    }
}

/// The host's monotonic clock, nanoseconds: what KVM counts the PIT's time by.
fn monotonic() -> i64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec * 1_000_000_000 + now.tv_nsec
}

fn create_vcpu(
    vm: &Vm,
    index: u32,
    leaves: &[kvm_bindings::kvm_cpuid_entry2],
    mcg_cap: u64,
) -> Result<VcpuFd, Error> {
    let vcpu = call("KVM_CREATE_VCPU", vm.fd().create_vcpu(u64::from(index)))?;
    let cpuid = CpuId::from_entries(leaves)
        .map_err(|error| Error::State(format!("too many CPUID leaves: {error:?}")))?;
    call("KVM_SET_CPUID2", vcpu.set_cpuid2(&cpuid))?;
    if mcg_cap != 0 {
        kvm::setup_mce(&vcpu, mcg_cap).map_err(|source| Error::System {
            what: "KVM_X86_SETUP_MCE".to_owned(),
            source,
        })?;
    }
    Ok(vcpu)
}

/// Looks what of the section's registers this KVM has. Some that it has are in no list: those are
/// tried.
fn features(
    kvm: &Kvm,
    vcpu: &VcpuFd,
    leaves: &[kvm_bindings::kvm_cpuid_entry2],
    mcg_cap: u64,
    supported: &CpuId,
) -> Result<Features, Error> {
    let listed: BTreeSet<u32> = call("KVM_GET_MSR_INDEX_LIST", kvm.get_msr_index_list())?
        .as_slice()
        .iter()
        .copied()
        .collect();
    let mut msrs = BTreeSet::new();
    CpuState::all_msrs(mcg_cap, &mut |index| {
        let is_unlisted_kind = matches!(index, 0x17a | 0x17b | 0x200..=0x2ff | 0x400..=0x47f);
        if listed.contains(&index) || is_unlisted_kind {
            msrs.insert(index);
        }
    });
    msrs.retain(|index| transfer::has_msr(vcpu, *index));
    Ok(Features {
        msrs,
        xsave: XsaveLayout::new(supported),
        physical_bits: cpuid::physical_bits(leaves),
        mcg_cap,
        triple_fault: false,
    })
}

/// QEMU's machine-check capabilities as far as KVM has them; none if it has fewer banks.
fn mcg_cap(kvm: &Kvm) -> u64 {
    let supported = kvm::supported_mce(kvm).unwrap_or(0);
    if supported & 0xff < MCE_BANKS as u64 {
        return 0;
    }
    supported & (MCG_CTL | MCG_SER) | MCE_BANKS as u64
}

fn get_ioapic(vm: &Vm) -> Result<crate::vm::device::ioapic::IoApic, Error> {
    vm.ioapic().map_err(|source| Error::System {
        what: "KVM_GET_IRQCHIP".to_owned(),
        source,
    })
}

/// Where interrupt lines go: to the I/O APIC, line 0, the timer's, to its pin 2, as QEMU and PCs
/// have it. The first sixteen go to the PIC as well if the machine has one (KVM always does).
fn routing(has_pic: bool) -> Result<KvmIrqRouting, Error> {
    let mut entries = Vec::new();
    for line in 0..PINS as u32 {
        if has_pic && line < (CHIPS * i8259::PINS) as u32 {
            let (chip, pins) = match line {
                0..8 => (KVM_IRQCHIP_PIC_MASTER, 0),
                _ => (KVM_IRQCHIP_PIC_SLAVE, i8259::PINS as u32),
            };
            entries.push(route(line, chip, line - pins));
        }
        match line {
            0 => entries.push(route(line, KVM_IRQCHIP_IOAPIC, TIMER_PIN)),
            TIMER_PIN => {}
            _ => entries.push(route(line, KVM_IRQCHIP_IOAPIC, line)),
        }
    }
    KvmIrqRouting::from_entries(&entries)
        .map_err(|error| Error::State(format!("too many interrupt routes: {error:?}")))
}

fn route(line: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi: line,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        ..Default::default()
    };
    entry.u.irqchip = kvm_irq_routing_irqchip { irqchip, pin };
    entry
}

fn call<T>(what: &str, result: Result<T, kvm_ioctls::Error>) -> Result<T, Error> {
    result.map_err(|error| Error::System {
        what: what.to_owned(),
        source: error.into(),
    })
}

/// The I/O APIC's pin for line 0.
const TIMER_PIN: u32 = 2;
/// Where KVM keeps its own pages, as QEMU places them.
const IDENTITY_MAP: u64 = 0xfeff_c000;
const TSS: usize = 0xfeff_d000;
/// How long, and how often, a vCPU is let run on to leave an interrupt shadow.
const SHADOW_MOMENT: Duration = Duration::from_micros(50);
const SHADOW_TRIES: u32 = 32;
/// Machine-check capabilities: a control register, software recovery.
const MCG_CTL: u64 = 1 << 8;
const MCG_SER: u64 = 1 << 24;
