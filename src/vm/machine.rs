//! The KVM machine of QEMU's `microvm` kind.
//!
//! This file builds a machine and answers questions about it; `power` runs, stops and resets it,
//! `sections` saves it and `loader` loads it.

mod disks;
mod drives;
mod loader;
mod power;
mod sections;

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, OnceLock, RwLock, Weak};

use self::disks::Attached;
use self::power::Reports;
use super::accel::{self, Accel};
use super::backend;
use super::boot::Program;
use super::cpuid::Model;
use super::device::bus::{Bus, IrqLine};
use super::device::rtc::{self, Rtc};
use super::device::serial::{self, Serial};
use super::device::virtio::{SLOT_BYTES, SLOTS, SLOTS_BASE, Slots};
use super::device::{apic, i8254, i8259, ioapic};
use super::dirty::MachineLog;
use super::guest::Error;
use super::map::Map;
use super::memory::{Backing, RamBlock};
use super::paging::Paging;
use super::run_state::RunState;
use super::vcpu::Reporter;
use super::virtual_memory::VirtualMemory;
use crate::block::Drive;
use crate::chardev::Chardev;
use crate::config::{Chips, MachineConfig};
use crate::event::Event;

/// Told of asynchronous machine events, on the thread that caused them; must not block, and must
/// not run, stop or reset the machine.
pub type EventSink = Arc<dyn Fn(Event) + Send + Sync>;

/// One virtual machine: memory, vCPUs, devices.
pub struct Machine {
    // vCPUs end first: they use what follows.
    accel: Accel,
    map: Arc<Map>,
    drives: RwLock<Vec<Arc<Drive>>>,
    attached: Vec<Attached>,
    log: MachineLog,
    bus: Arc<Bus>,
    program: Program,
    vcpus: usize,
    chips: Chips,
    events: EventSink,
    /// Held by whoever changes between running and not running.
    lifecycle: Mutex<()>,
    run_state: Mutex<RunState>,
    reports: Arc<Reports>,
    reboots: AtomicBool,
}

/// A range of guest-physical space, for `info mtree`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapEntry {
    /// First address.
    pub start: u64,
    /// Last address, included.
    pub end: u64,
    /// QEMU's name of the region (`microvm.ram`, `ioapic`, `serial`, …).
    pub name: String,
    /// `ram`, `rom` or `i/o`.
    pub kind: &'static str,
    /// Offset in the RAM block shown there, for RAM.
    pub offset: Option<u64>,
    /// In the I/O port space instead of memory.
    pub is_port: bool,
}

/// General, segment, control and debug registers and the FPU of one vCPU, as KVM has them.
#[derive(Clone, Debug, Default)]
pub struct Registers {
    /// General registers.
    pub regs: kvm_bindings::kvm_regs,
    /// Segment and control registers.
    pub sregs: kvm_bindings::kvm_sregs,
    /// FPU and SSE.
    pub fpu: kvm_bindings::kvm_fpu,
    /// Debug registers.
    pub debug: kvm_bindings::kvm_debugregs,
    /// Whether the vCPU rests in HLT.
    pub halted: bool,
    /// Whether interrupts wait for the end of the next instruction.
    pub inhibited: bool,
}

impl Machine {
    /// Builds a machine at reset, in run state `prelaunch` (`inmigrate` with `incoming`). `serial`
    /// is COM1's chardev. With `incoming`, firmware and kernel are not loaded: the stream brings
    /// them (a later reset loads them), and images are not locked: the source has them. The guest does
    /// not run.
    pub fn new(
        config: &MachineConfig,
        serial: Option<Arc<dyn Chardev>>,
        events: EventSink,
        incoming: bool,
    ) -> Result<Arc<Self>, Error> {
        let open = || disks::open_drives(config);
        Self::build(config, open, serial, events, incoming)
    }

    /// As [`Self::new`] with `incoming`, of drives that are open. A disk gets the one that says that
    /// it is the disk's.
    pub fn with_drives(
        config: &MachineConfig,
        drives: Vec<Arc<Drive>>,
        serial: Option<Arc<dyn Chardev>>,
        events: EventSink,
    ) -> Result<Arc<Self>, Error> {
        Self::build(config, || Ok(drives), serial, events, true)
    }

    fn build(
        config: &MachineConfig,
        open: impl FnOnce() -> Result<Vec<Arc<Drive>>, Error>,
        serial: Option<Arc<dyn Chardev>>,
        events: EventSink,
        incoming: bool,
    ) -> Result<Arc<Self>, Error> {
        let model = Model::from_name(&config.cpu)?;
        let vcpus = config.vcpus;
        if !(1..=VCPUS_MAX).contains(&vcpus) {
            return Err(Error::State(format!(
                "Invalid SMP CPUs {vcpus}. The max CPUs supported by machine 'microvm' is \
                 {VCPUS_MAX}"
            )));
        }
        let program = Program::open(config)?;
        let firmware = backend::block("pc.bios", program.firmware_size(), Backing::Anonymous)?;
        let map =
            Map::new(backend::main_block(config)?, firmware).map_err(|source| Error::System {
                what: "could not lay out guest memory".to_owned(),
                source,
            })?;
        let map = Arc::new(map);
        let itself = Arc::new(OnceLock::new());
        let reports = Arc::new(Reports::default());
        let kvm = accel::open(config.accel)?;
        let drives = open()?;
        let attached = disks::attached(config, &drives)?;
        if !incoming {
            disks::claim_at_start(&attached)?;
        }
        let parts = Parts {
            config,
            attached: &attached,
            map: &map,
            vcpus,
            model,
            chips: config.chips,
            itself: &itself,
            reports: &reports,
        };
        let (accel, vm, bus) = match kvm {
            Some(kvm) => parts.with_kvm(kvm, serial)?,
            None => parts.without_kvm(serial)?,
        };
        let run_state = if incoming {
            RunState::InMigrate
        } else {
            RunState::Prelaunch
        };
        let machine = Arc::new(Self {
            accel,
            log: MachineLog::new(Arc::clone(&map), vm),
            map,
            drives: RwLock::new(drives),
            attached,
            bus,
            program,
            vcpus: usize::from(vcpus),
            chips: config.chips,
            events,
            lifecycle: Mutex::default(),
            run_state: Mutex::new(run_state),
            reports,
            reboots: AtomicBool::new(true),
        });
        // Empty until now, and only this thread has it.
        let _ = itself.set(Arc::downgrade(&machine));
        if !incoming {
            machine.boot()?;
        }
        Ok(machine)
    }

    /// Whether KVM runs the guest (`-accel kvm`) or nothing does.
    pub fn has_kvm(&self) -> bool {
        self.accel.kvm().is_some()
    }

    /// Nanoseconds that the guest has run by its own clock.
    ///
    /// # Errors
    /// KVM does not say.
    pub fn clock(&self) -> Result<u64, Error> {
        Ok(self.accel.capture()?.clock.clock)
    }

    /// Takes input from its chardevs again, which another machine may have had meanwhile.
    pub fn listen(&self) {
        if let Some(serial) = &self.bus.serial {
            serial.listen();
        }
    }

    /// Number of vCPUs.
    pub fn vcpus(&self) -> usize {
        self.vcpus
    }

    /// Thread id of a vCPU, 0 without KVM.
    pub fn vcpu_thread(&self, cpu: usize) -> i32 {
        self.accel.kvm().map_or(0, |kvm| kvm.thread_id(cpu))
    }

    /// Registers of a vCPU; a running guest is interrupted for it.
    pub fn registers(&self, cpu: usize) -> Result<Registers, Error> {
        let (state, apic) = self.accel.vcpu(cpu)?;
        Ok(Registers {
            regs: state.to_regs(),
            sregs: state.to_sregs(&apic),
            fpu: state.to_fpu(),
            debug: state.to_debug(),
            halted: state.is_halted(),
            inhibited: state.is_in_interrupt_shadow(),
        })
    }

    /// Reads guest-physical memory; `Err` holds the first address that is no RAM.
    pub fn read_physical(&self, address: u64, to: &mut [u8]) -> Result<(), u64> {
        self.map.read(address, to)
    }

    /// Memory as that vCPU sees it; a running guest is interrupted for its registers.
    pub fn virtual_memory(self: &Arc<Self>, cpu: usize) -> Result<VirtualMemory, Error> {
        let sregs = self.registers(cpu)?.sregs;
        let paging = Paging {
            cr0: sregs.cr0,
            cr3: sregs.cr3,
            cr4: sregs.cr4,
            efer: sregs.efer,
        };
        Ok(VirtualMemory::new(Arc::clone(self), paging))
    }

    /// Host address of guest-physical RAM, and the RAM block and offset it belongs to.
    pub fn host_address(&self, address: u64) -> Option<(usize, Arc<RamBlock>, u64)> {
        self.map.find(address)
    }

    /// Reads an I/O port of `size` 1, 2 or 4 bytes as a vCPU would.
    pub fn read_port(&self, port: u16, size: u8) -> u32 {
        let mut bytes = [0; 4];
        let size = usize::from(size).clamp(1, 4);
        self.bus.input(port, size, &mut bytes[..size]);
        u32::from_le_bytes(bytes)
    }

    /// Writes an I/O port of `size` 1, 2 or 4 bytes as a vCPU would.
    pub fn write_port(&self, port: u16, size: u8, value: u32) {
        let size = usize::from(size).clamp(1, 4);
        self.bus.output(port, size, &value.to_le_bytes()[..size]);
    }

    /// Guest-physical and port space, in order of address.
    pub fn map(&self) -> Vec<MapEntry> {
        let device = |start, len, name: &str, is_port| MapEntry {
            start,
            end: start + len - 1,
            name: name.to_owned(),
            kind: "i/o",
            offset: None,
            is_port,
        };
        let mut entries: Vec<_> = self
            .map
            .windows()
            .iter()
            .map(|window| MapEntry {
                start: window.guest,
                end: window.guest + window.len - 1,
                name: self.map.blocks()[window.block].name().to_owned(),
                kind: "ram",
                offset: Some(window.offset),
                is_port: false,
            })
            .collect();
        entries.push(device(ioapic::BASE, ioapic::SIZE, "ioapic", false));
        entries.push(device(apic::BASE, apic::SIZE, "kvm-apic-msi", false));
        for slot in 0..SLOTS as u64 {
            let base = SLOTS_BASE + slot * SLOT_BYTES;
            entries.push(device(base, SLOT_BYTES, "virtio-mmio", false));
        }
        if self.chips.pic {
            let pics = i8259::PORTS.map(|port| device(port.into(), 2, "pic", true));
            let levels = i8259::ELCR_PORTS.map(|port| device(port.into(), 1, "elcr", true));
            entries.extend(pics.into_iter().chain(levels));
        }
        if self.chips.pit {
            entries.push(device(i8254::PORT.into(), i8254::PORTS, "pit", true));
        }
        if self.bus.rtc.is_some() {
            entries.push(device(rtc::PORT.into(), rtc::PORTS.into(), "rtc", true));
        }
        if self.bus.serial.is_some() {
            let ports = serial::PORTS.into();
            entries.push(device(serial::PORT.into(), ports, "serial", true));
        }
        entries.sort_by_key(|entry| (entry.is_port, entry.start));
        entries
    }
}

/// What the two ways of building a machine share.
struct Parts<'a> {
    config: &'a MachineConfig,
    attached: &'a [Attached],
    map: &'a Arc<Map>,
    vcpus: u8,
    model: Model,
    chips: Chips,
    itself: &'a Arc<OnceLock<Weak<Machine>>>,
    reports: &'a Arc<Reports>,
}

/// Accelerator, its virtual machine, and the devices.
type Built = (Accel, Option<accel::SharedVm>, Arc<Bus>);

impl Parts<'_> {
    fn with_kvm(
        &self,
        kvm: kvm_ioctls::Kvm,
        chardev: Option<Arc<dyn Chardev>>,
    ) -> Result<Built, Error> {
        let bare = accel::Bare::new(kvm, self.map, self.chips)?;
        let vm = Arc::clone(bare.vm());
        let bus = self.bus(chardev, Some(&vm), &|irq| {
            let vm = Arc::clone(&vm);
            Box::new(move |level| {
                if let Err(error) = vm.fd().set_irq_line(irq, level) {
                    log::error!("KVM_IRQ_LINE {irq}: {error}");
                }
            })
        })?;
        let kvm = bare.populate(self.model, u32::from(self.vcpus), &bus, &self.reporter())?;
        Ok((Accel::Kvm(Box::new(kvm)), Some(vm), bus))
    }

    fn without_kvm(&self, chardev: Option<Arc<dyn Chardev>>) -> Result<Built, Error> {
        let bus = self.bus(chardev, None, &|_| Box::new(|_| ()))?;
        let accel = Accel::absent(usize::from(self.vcpus), self.chips);
        Ok((accel, None, bus))
    }

    /// Who is told what vCPUs and disks report.
    fn reporter(&self) -> Reporter {
        let (itself, reports) = (Arc::clone(self.itself), Arc::clone(self.reports));
        Arc::new(move |report| power::accept(&reports, itself.get(), report))
    }

    /// The devices, each with the interrupt line that `line` makes of a number.
    fn bus(
        &self,
        chardev: Option<Arc<dyn Chardev>>,
        vm: Option<&accel::SharedVm>,
        line: &dyn Fn(u32) -> IrqLine,
    ) -> Result<Arc<Bus>, Error> {
        let disks = disks::make(
            self.config,
            self.attached,
            self.map,
            vm,
            line,
            &self.reporter(),
        )?;
        let [low_ram, high_ram] = self.map.ram();
        let rtc = || {
            Rtc::new(low_ram, high_ram, line(rtc::IRQ)).map_err(|source| Error::System {
                what: "mc146818rtc".to_owned(),
                source,
            })
        };
        Ok(Arc::new(Bus {
            serial: chardev.map(|chardev| Serial::new(chardev, line(serial::IRQ))),
            rtc: self.chips.rtc.then(rtc).transpose()?,
            slots: Slots::new(&disks, self.config.interface),
            disks,
        }))
    }
}

/// Most vCPUs of a machine.
const VCPUS_MAX: u8 = 16;

#[cfg(test)]
mod tests;
