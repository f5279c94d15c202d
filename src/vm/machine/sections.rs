//! Saving a machine: the [`Guest`] seam, and the sections in stream order.

use std::sync::Arc;

use super::Machine;
use super::disks;
use super::loader::Loader;
use crate::block::Drive;
use crate::vm::cpu_state::CpuState;
use crate::vm::device::apic::Apic;
use crate::vm::device::i8254::Pit;
use crate::vm::device::i8259::{CHIPS, Pic};
use crate::vm::device::ioapic::IoApic;
use crate::vm::device::kvmclock::KvmClock;
use crate::vm::device::rtc::Registers as RtcRegisters;
use crate::vm::device::serial::SerialSection;
use crate::vm::device::virtio::Disk;
use crate::vm::device::virtio::section::DiskSection;
use crate::vm::dirty::DirtyLog;
use crate::vm::guest::{DeviceLoader, Error, Guest, SavedSection, SectionHeader};
use crate::vm::memory::RamBlock;
use crate::vm::run_state::RunState;
use crate::vmstate::{self, VmState};

impl Guest for Machine {
    fn machine_type(&self) -> &str {
        "microvm"
    }

    fn ram(&self) -> &[Arc<RamBlock>] {
        self.map.blocks()
    }

    fn dirty_log(&self) -> &dyn DirtyLog {
        &self.log
    }

    fn drives(&self) -> Vec<Arc<Drive>> {
        self.all_drives()
    }

    fn claim_drives(&self) -> Result<(), Error> {
        disks::claim(&self.attached)
    }

    fn release_drives(&self, flush: bool) -> Result<(), Error> {
        disks::release(&self.attached, flush)
    }

    fn run_state(&self) -> RunState {
        self.current_run_state()
    }

    fn stop(&self, state: RunState) -> Result<RunState, Error> {
        self.stop_guest(state)
    }

    fn start(&self) -> Result<(), Error> {
        self.start_guest()
    }

    fn save_devices(&self) -> Result<Vec<SavedSection>, Error> {
        if self.current_run_state().is_running() {
            return Err(Error::State("a running guest can not be saved".to_owned()));
        }
        let mut state = self.accel.capture()?;
        let mut sections = Vec::new();
        for (index, (cpu, apic)) in state.cpus.iter_mut().enumerate() {
            sections.push(saved(cpu, index)?);
            sections.push(saved(apic, index)?);
        }
        sections.push(saved(&mut state.ioapic, 0)?);
        sections.push(saved(&mut state.clock, 0)?);
        for (index, pic) in state.pics.iter_mut().flatten().enumerate() {
            sections.push(saved(pic, index)?);
        }
        if let Some(pit) = &mut state.pit {
            sections.push(saved(pit, 0)?);
        }
        if let Some(rtc) = &self.bus.rtc {
            sections.push(saved(&mut rtc.state(), 0)?);
        }
        if let Some(serial) = &self.bus.serial {
            sections.push(saved(&mut SerialSection(serial.state()), 0)?);
        }
        for disk in &self.bus.disks {
            sections.push(SavedSection {
                header: disk_header(disk),
                ..saved(&mut DiskSection(disk.state()), 0)?
            });
        }
        Ok(sections)
    }

    fn sections(&self) -> Vec<SectionHeader> {
        let mut headers = Vec::new();
        for index in 0..self.vcpus {
            headers.push(header::<CpuState>(index));
            headers.push(header::<Apic>(index));
        }
        headers.push(header::<IoApic>(0));
        headers.push(header::<KvmClock>(0));
        if self.chips.pic {
            headers.extend((0..CHIPS).map(header::<Pic>));
        }
        if self.chips.pit {
            headers.push(header::<Pit>(0));
        }
        if self.bus.rtc.is_some() {
            headers.push(header::<RtcRegisters>(0));
        }
        if self.bus.serial.is_some() {
            headers.push(header::<SerialSection>(0));
        }
        headers.extend(self.bus.disks.iter().map(|disk| disk_header(disk)));
        headers
    }

    fn loader(&self) -> Box<dyn DeviceLoader + '_> {
        Box::new(Loader::new(self))
    }
}

fn header<T: VmState>(instance: usize) -> SectionHeader {
    SectionHeader {
        idstr: T::NAME.to_owned(),
        instance: instance as u32,
        version: T::VERSION,
    }
}

/// A disk's section is named after its slot.
fn disk_header(disk: &Disk) -> SectionHeader {
    SectionHeader {
        idstr: disk.section(),
        ..header::<DiskSection>(0)
    }
}

fn saved<T: VmState>(state: &mut T, instance: usize) -> Result<SavedSection, Error> {
    let failed = |error: vmstate::Error| Error::Section(error.to_string());
    Ok(SavedSection {
        header: header::<T>(instance),
        description: vmstate::describe(state).map_err(failed)?,
        body: vmstate::save(state).map_err(failed)?,
    })
}
