//! Loading a machine in two phases: decode and check every section, then apply them all.

use super::Machine;
use crate::vm::accel::{State, Update};
use crate::vm::cpu_state::CpuState;
use crate::vm::device::apic::Apic;
use crate::vm::device::foreign;
use crate::vm::device::i8254::Pit;
use crate::vm::device::i8259::{CHIPS, Pic};
use crate::vm::device::ioapic::IoApic;
use crate::vm::device::kvmclock::KvmClock;
use crate::vm::device::rtc::Registers as RtcRegisters;
use crate::vm::device::serial::SerialSection;
use crate::vm::device::serial::uart::Uart;
use crate::vm::device::timer::VirtualClock;
use crate::vm::device::virtio::Disk;
use crate::vm::device::virtio::section::{DiskSection, State as DiskState};
use crate::vm::guest::{DeviceLoader, Error, Guest, SectionHeader, unknown_section};
use crate::vmstate::{self, StateReader, VmState};

/// Sections on their way in.
pub(super) struct Loader<'a> {
    machine: &'a Machine,
    update: Update,
    serial: Option<Uart>,
    rtc: Option<RtcRegisters>,
    /// By disk.
    disks: Vec<Option<DiskState>>,
    /// What a stock source's clock showed when its guest stopped.
    clock: VirtualClock,
    /// What a section leaves out keeps its value at reset.
    at_reset: State,
}

impl<'a> Loader<'a> {
    pub(super) fn new(machine: &'a Machine) -> Self {
        let update = Update {
            cpus: (0..machine.vcpus).map(|_| (None, None)).collect(),
            ..Update::default()
        };
        Self {
            machine,
            update,
            serial: None,
            rtc: None,
            disks: machine.bus.disks.iter().map(|_| None).collect(),
            clock: VirtualClock::default(),
            at_reset: machine.accel.reset_state(),
        }
    }

    /// The disk with that section.
    fn disk(&self, header: &SectionHeader) -> Option<usize> {
        let mut disks = self.machine.bus.disks.iter();
        disks.position(|disk| disk.section() == header.idstr && header.instance == 0)
    }
}

impl DeviceLoader for Loader<'_> {
    fn load(&mut self, header: &SectionHeader, body: &mut dyn StateReader) -> Result<(), Error> {
        let SectionHeader {
            idstr,
            instance,
            version,
        } = header;
        let index = *instance as usize;
        match idstr.as_str() {
            CpuState::NAME if index < self.machine.vcpus => {
                let cpu = self.at_reset.cpus[index].0.to_load_into();
                self.update.cpus[index].0 = Some(decoded(cpu, header, body)?);
            }
            Apic::NAME if index < self.machine.vcpus => {
                let apic = self.at_reset.cpus[index].1.clone();
                self.update.cpus[index].1 = Some(decoded(apic, header, body)?);
            }
            IoApic::NAME if index == 0 => {
                self.update.ioapic = Some(decoded(IoApic::default(), header, body)?);
            }
            KvmClock::NAME if index == 0 => {
                self.update.clock = Some(decoded(KvmClock::incoming(), header, body)?);
            }
            Pic::NAME if index < CHIPS && self.machine.chips.pic => {
                self.update.pics[index] = Some(decoded(Pic::default(), header, body)?);
            }
            Pit::NAME if index == 0 && self.machine.chips.pit => {
                self.update.pit = Some(decoded(Pit::default(), header, body)?);
            }
            VirtualClock::NAME if index == 0 => {
                self.clock = decoded(VirtualClock::default(), header, body)?;
            }
            RtcRegisters::NAME if index == 0 && self.machine.bus.rtc.is_some() => {
                self.rtc = Some(decoded(RtcRegisters::incoming(), header, body)?);
            }
            SerialSection::NAME if index == 0 && self.machine.bus.serial.is_some() => {
                let section = decoded(SerialSection(Uart::incoming()), header, body)?;
                self.serial = Some(section.0);
            }
            _ if let Some(disk) = self.disk(header) => {
                let state = DiskSection(self.machine.bus.disks[disk].reset_state());
                self.disks[disk] = Some(decoded(state, header, body)?.0);
            }
            name => {
                let vcpus = self.machine.vcpus as u32;
                let Some(dropped) = foreign::drop_section(name, *instance, *version, vcpus, body)
                else {
                    return Err(Error::Section(unknown_section(idstr, *instance)));
                };
                dropped.map_err(|error| refused(header, &error))?;
            }
        }
        Ok(())
    }

    fn missing(&self) -> Vec<String> {
        let has = |header: &SectionHeader| {
            let index = header.instance as usize;
            match header.idstr.as_str() {
                CpuState::NAME => self.update.cpus[index].0.is_some(),
                Apic::NAME => self.update.cpus[index].1.is_some(),
                IoApic::NAME => self.update.ioapic.is_some(),
                KvmClock::NAME => self.update.clock.is_some(),
                Pic::NAME => self.update.pics[index].is_some(),
                Pit::NAME => self.update.pit.is_some(),
                RtcRegisters::NAME => self.rtc.is_some(),
                SerialSection::NAME => self.serial.is_some(),
                _ => self
                    .disk(header)
                    .is_some_and(|disk| self.disks[disk].is_some()),
            }
        };
        let all = self.machine.sections();
        let missing = all.iter().filter(|header| !has(header));
        missing
            .map(|header| format!("{} {}", header.idstr, header.instance))
            .collect()
    }

    fn apply(self: Box<Self>) -> Result<(), Error> {
        if self.machine.current_run_state().is_running() {
            return Err(Error::State("a running guest can not be loaded".to_owned()));
        }
        // RAM has arrived by now; what a ring in it says must go with the section.
        let disks = self.machine.bus.disks.iter().zip(self.disks);
        let disks: Vec<_> = disks
            .filter_map(|(disk, state)| Some((disk, state?)))
            .collect();
        for (disk, state) in &disks {
            disk.check(state).map_err(|why| of_disk(disk, &why))?;
        }
        let mut update = self.update;
        if let Some(pit) = &mut update.pit {
            pit.rebase(self.clock.time);
            // QEMU's own PIT holds its line high between interrupts, KVM's pulses it. A line that
            // is high for ever would have no edge, and KVM's PIT would wait for ever for the guest
            // to acknowledge its first interrupt.
            if let [Some(master), _] = &mut update.pics {
                master.last_irr &= !TIMER_LINE;
            }
        }
        self.machine.accel.restore(update)?;
        // After the I/O APIC: restoring a device drives its interrupt line.
        if let (Some(rtc), Some(chip)) = (&self.machine.bus.rtc, self.rtc) {
            rtc.restore(chip);
        }
        if let (Some(serial), Some(uart)) = (&self.machine.bus.serial, self.serial) {
            serial.restore(uart);
        }
        for (disk, state) in disks {
            disk.restore(state).map_err(|why| of_disk(disk, &why))?;
        }
        Ok(())
    }
}

/// The PIT's line at the master PIC.
const TIMER_LINE: u8 = 1 << 0;

/// Decodes a section into `state`.
fn decoded<T: VmState>(
    mut state: T,
    header: &SectionHeader,
    body: &mut dyn StateReader,
) -> Result<T, Error> {
    vmstate::load(&mut state, header.version, body).map_err(|error| refused(header, &error))?;
    Ok(state)
}

/// What is wrong with a disk's section, now that it is compared with RAM.
fn of_disk(disk: &Disk, why: &str) -> Error {
    Error::Section(format!(
        "error while loading state for instance 0x0 of device '{}': {why}",
        disk.section()
    ))
}

/// QEMU's words for a section that can not be loaded, and what is wrong with it.
fn refused(header: &SectionHeader, error: &vmstate::Error) -> Error {
    let SectionHeader {
        idstr, instance, ..
    } = header;
    Error::Section(match error {
        vmstate::Error::TooNew {
            name,
            version,
            local,
        } if name == idstr => {
            format!("savevm: unsupported version {version} for '{idstr}' v{local}")
        }
        error => format!(
            "error while loading state for instance {instance:#x} of device '{idstr}': {error}"
        ),
    })
}
