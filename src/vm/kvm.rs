//! What of KVM the kvm-ioctls crate leaves to its user: memory slots, the dirty log without an
//! allocation, exits with their I/O width, and the kick that brings a vCPU out of the guest.
//!
//! This file is one of the rooms where `unsafe` may live. It holds no policy.
#![expect(
    unsafe_code,
    reason = "memory slots, unions of kvm_run, signal handler"
)]

use std::cell::Cell;
use std::io;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_MEM_LOG_DIRTY_PAGES,
    KVMIO, kvm_dirty_log, kvm_irqchip, kvm_pic_state, kvm_run, kvm_userspace_memory_region,
    kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};
use vmm_sys_util::{ioctl_ior_nr, ioctl_iow_nr};

use super::device::i8259::{CHIPS, ELCR_MASKS, Pic};
use super::device::ioapic::{BASE as IOAPIC_BASE, IoApic};
use super::memory::RamBlock;

ioctl_iow_nr!(KVM_GET_DIRTY_LOG, KVMIO, 0x42, kvm_dirty_log);
ioctl_iow_nr!(KVM_X86_SETUP_MCE, KVMIO, 0x9c, u64);
ioctl_ior_nr!(KVM_X86_GET_MCE_CAP_SUPPORTED, KVMIO, 0x9d, u64);

const _: () = assert!(size_of::<kvm_dirty_log>() == 16);

/// A virtual machine and the memory it has been given.
pub(super) struct Vm {
    // Declared, and so dropped, before the memory it uses.
    fd: VmFd,
    blocks: Mutex<Vec<Arc<RamBlock>>>,
}

/// A memory slot: where part of a RAM block appears in guest-physical space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Slot {
    /// Slot number.
    pub(super) number: u32,
    /// First guest-physical address, page aligned.
    pub(super) guest: u64,
    /// Offset in the block, page aligned.
    pub(super) offset: u64,
    /// Bytes, whole pages.
    pub(super) len: u64,
}

impl Vm {
    /// Wraps a fresh virtual machine.
    pub(super) fn new(fd: VmFd) -> Self {
        Self {
            fd,
            blocks: Mutex::default(),
        }
    }

    /// The safe part of the interface.
    pub(super) fn fd(&self) -> &VmFd {
        &self.fd
    }

    /// Creates a slot, or switches the dirty log of an existing one.
    pub(super) fn set_slot(&self, slot: &Slot, block: &Arc<RamBlock>, log: bool) -> io::Result<()> {
        let is_inside = slot
            .offset
            .checked_add(slot.len)
            .is_some_and(|end| end <= block.len());
        if !is_inside {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut blocks = self.blocks.lock().unwrap_or_else(PoisonError::into_inner);
        if !blocks.iter().any(|known| Arc::ptr_eq(known, block)) {
            blocks.push(Arc::clone(block));
        }
        let region = kvm_userspace_memory_region {
            slot: slot.number,
            flags: if log { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
            guest_phys_addr: slot.guest,
            memory_size: slot.len,
            userspace_addr: block.host() as u64 + slot.offset,
        };
        // SAFETY: the range lies inside the block's mapping (checked above), and the block is kept
        // for as long as the virtual machine.
        unsafe { self.fd.set_user_memory_region(region) }.map_err(io::Error::from)
    }

    /// Reads and clears the dirty log of a slot of `pages` pages, one bit per page.
    pub(super) fn dirty_log(&self, slot: u32, pages: usize, to: &mut [u64]) -> io::Result<()> {
        if to.len() < pages.div_ceil(64) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut log = kvm_dirty_log {
            slot,
            ..Default::default()
        };
        log.__bindgen_anon_1.dirty_bitmap = to.as_mut_ptr().cast();
        // SAFETY: KVM writes one bit per page of the slot, rounded up to 64; `to` has room for
        // that as long as the slot has the size it was created with, which the caller passes.
        match unsafe { ioctl_with_ref(&self.fd, KVM_GET_DIRTY_LOG(), &log) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// State of the I/O APIC.
    pub(super) fn ioapic(&self) -> io::Result<IoApic> {
        let mut chip = kvm_irqchip {
            chip_id: KVM_IRQCHIP_IOAPIC,
            ..Default::default()
        };
        self.fd.get_irqchip(&mut chip)?;
        // SAFETY: for this chip KVM fills the ioapic member, which is plain integers.
        let state = unsafe { chip.chip.ioapic };
        let mut ioapic = IoApic {
            id: state.id as u8,
            ioregsel: state.ioregsel as u8,
            irr: state.irr,
            ..IoApic::default()
        };
        for (to, from) in ioapic.redirection.iter_mut().zip(&state.redirtbl) {
            // SAFETY: both members of the union are eight bytes of plain integers.
            *to = unsafe { from.bits };
        }
        Ok(ioapic)
    }

    /// Replaces the state of the I/O APIC.
    pub(super) fn set_ioapic(&self, ioapic: &IoApic) -> io::Result<()> {
        let mut state = kvm_bindings::kvm_ioapic_state {
            base_address: IOAPIC_BASE,
            ioregsel: u32::from(ioapic.ioregsel),
            id: u32::from(ioapic.id),
            irr: ioapic.irr,
            ..Default::default()
        };
        for (to, from) in state.redirtbl.iter_mut().zip(ioapic.redirection) {
            to.bits = from;
        }
        let mut chip = kvm_irqchip {
            chip_id: KVM_IRQCHIP_IOAPIC,
            ..Default::default()
        };
        chip.chip.ioapic = state;
        self.fd.set_irqchip(&chip).map_err(io::Error::from)
    }

    /// State of one of the two PIC chips, 0 the master.
    pub(super) fn pic(&self, index: usize) -> io::Result<Pic> {
        let mut chip = kvm_irqchip {
            chip_id: PIC_IDS[index],
            ..Default::default()
        };
        self.fd.get_irqchip(&mut chip)?;
        // SAFETY: for these chips KVM fills the pic member, which is plain integers.
        let state = unsafe { chip.chip.pic };
        Ok(Pic {
            last_irr: state.last_irr,
            irr: state.irr,
            imr: state.imr,
            isr: state.isr,
            priority_add: state.priority_add,
            irq_base: state.irq_base,
            read_reg_select: state.read_reg_select,
            poll: state.poll,
            special_mask: state.special_mask,
            init_state: state.init_state,
            auto_eoi: state.auto_eoi,
            rotate_on_auto_eoi: state.rotate_on_auto_eoi,
            special_fully_nested_mode: state.special_fully_nested_mode,
            init4: state.init4,
            elcr: state.elcr,
        })
    }

    /// Replaces the state of one of the two PIC chips.
    pub(super) fn set_pic(&self, index: usize, pic: &Pic) -> io::Result<()> {
        let mut chip = kvm_irqchip {
            chip_id: PIC_IDS[index],
            ..Default::default()
        };
        chip.chip.pic = kvm_pic_state {
            last_irr: pic.last_irr,
            irr: pic.irr,
            imr: pic.imr,
            isr: pic.isr,
            priority_add: pic.priority_add,
            irq_base: pic.irq_base,
            read_reg_select: pic.read_reg_select,
            poll: pic.poll,
            special_mask: pic.special_mask,
            init_state: pic.init_state,
            auto_eoi: pic.auto_eoi,
            rotate_on_auto_eoi: pic.rotate_on_auto_eoi,
            special_fully_nested_mode: pic.special_fully_nested_mode,
            init4: pic.init4,
            elcr: pic.elcr,
            elcr_mask: ELCR_MASKS[index],
        };
        self.fd.set_irqchip(&chip).map_err(io::Error::from)
    }
}

/// Chip ids of master and slave.
const PIC_IDS: [u32; CHIPS] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE];

/// Machine-check capabilities KVM can offer.
pub(super) fn supported_mce(kvm: &Kvm) -> io::Result<u64> {
    let mut capabilities = 0;
    // SAFETY: the ioctl writes one u64.
    match unsafe { ioctl_with_mut_ref(kvm, KVM_X86_GET_MCE_CAP_SUPPORTED(), &mut capabilities) } {
        0 => Ok(capabilities),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Gives a vCPU machine-check banks.
pub(super) fn setup_mce(vcpu: &VcpuFd, capabilities: u64) -> io::Result<()> {
    // SAFETY: the ioctl reads one u64.
    match unsafe { ioctl_with_ref(vcpu, KVM_X86_SETUP_MCE(), &capabilities) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Replaces FPU, SSE and extended state.
pub(super) fn set_xsave(vcpu: &VcpuFd, xsave: &kvm_xsave) -> io::Result<()> {
    // SAFETY: no dynamically enabled feature makes KVM read beyond the 4096 bytes: this program
    // never asks for one (arch_prctl).
    unsafe { vcpu.set_xsave(xsave) }.map_err(io::Error::from)
}

/// Why a vCPU came out of the guest.
#[derive(Debug)]
pub(super) enum Exit<'a> {
    /// Port input; fill `data`, units of `size` bytes.
    In {
        port: u16,
        size: usize,
        data: &'a mut [u8],
    },
    /// Port output, units of `size` bytes.
    Out {
        port: u16,
        size: usize,
        data: &'a [u8],
    },
    /// Read of memory that is not RAM; fill `data`.
    MmioRead { address: u64, data: &'a mut [u8] },
    /// Write to memory that is not RAM.
    MmioWrite { address: u64, data: &'a [u8] },
    /// Kicked, or interrupted by a signal.
    Interrupted,
    /// The guest shut down (triple fault).
    Shutdown,
    /// KVM can not go on; the text says what it knows.
    Failed(String),
}

/// Runs the guest until it needs us.
pub(super) fn run(vcpu: &mut VcpuFd) -> Exit<'_> {
    enum Io {
        In(u16, *mut u8, usize),
        Out(u16, *const u8, usize),
    }
    let io = match vcpu.run() {
        Ok(VcpuExit::IoIn(port, data)) => Io::In(port, data.as_mut_ptr(), data.len()),
        Ok(VcpuExit::IoOut(port, data)) => Io::Out(port, data.as_ptr(), data.len()),
        Ok(VcpuExit::MmioRead(address, data)) => {
            let (data, len) = (data.as_mut_ptr(), data.len());
            // SAFETY: the slice lies in the vCPU's shared page, which lives as long as `vcpu`,
            // borrowed mutably by the result. Rebuilt because the borrow checker would otherwise
            // hold it in every arm.
            let data = unsafe { std::slice::from_raw_parts_mut(data, len) };
            return Exit::MmioRead { address, data };
        }
        Ok(VcpuExit::MmioWrite(address, data)) => {
            let (data, len) = (data.as_ptr(), data.len());
            // SAFETY: as for MmioRead.
            let data = unsafe { std::slice::from_raw_parts(data, len) };
            return Exit::MmioWrite { address, data };
        }
        Ok(VcpuExit::Hlt | VcpuExit::Intr | VcpuExit::IrqWindowOpen) => return Exit::Interrupted,
        Ok(VcpuExit::Shutdown) => return Exit::Shutdown,
        Ok(VcpuExit::InternalError) => return Exit::Failed(internal_error(vcpu.get_kvm_run())),
        Ok(other) => return Exit::Failed(format!("KVM: unexpected exit: {other:?}")),
        Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
            return Exit::Interrupted;
        }
        Err(error) => return Exit::Failed(format!("KVM_RUN: {error}")),
    };
    let page = vcpu.get_kvm_run();
    // SAFETY: the exit was an I/O exit, for which KVM fills this member of the union.
    let size = unsafe { page.__bindgen_anon_1.io.size };
    let size = usize::from(size).max(1);
    // SAFETY: the slices lie in the vCPU's shared page, see MmioRead.
    unsafe {
        match io {
            Io::In(port, data, len) => Exit::In {
                port,
                size,
                data: std::slice::from_raw_parts_mut(data, len),
            },
            Io::Out(port, data, len) => Exit::Out {
                port,
                size,
                data: std::slice::from_raw_parts(data, len),
            },
        }
    }
}

fn internal_error(run: &mut kvm_run) -> String {
    // SAFETY: for an internal error KVM fills this member of the union, all plain integers.
    let suberror = unsafe { run.__bindgen_anon_1.internal.suberror };
    format!("KVM internal error. Suberror: {suberror}")
}

thread_local! {
    /// The shared page of the vCPU that this thread runs.
    static RUN: Cell<*mut kvm_run> = const { Cell::new(std::ptr::null_mut()) };
}

/// The right of this thread to be kicked out of its vCPU; dropping it ends that.
pub(super) struct Kickable {
    _private: (),
}

impl Kickable {
    /// From now on [`kick`] makes `vcpu`'s present or next `KVM_RUN` on this thread return. The
    /// value must be dropped before `vcpu` is, on this same thread.
    pub(super) fn new(vcpu: &mut VcpuFd) -> io::Result<Self> {
        install_handler()?;
        RUN.with(|run| run.set(vcpu.get_kvm_run()));
        Ok(Self { _private: () })
    }
}

impl Drop for Kickable {
    fn drop(&mut self) {
        RUN.with(|run| run.set(std::ptr::null_mut()));
    }
}

/// Kicks the vCPU that `thread` runs. The signal may come at any instant: it sets the flag that
/// KVM looks at before it enters the guest, and it interrupts a guest that runs already.
pub(super) fn kick<T>(thread: &JoinHandle<T>) {
    if let Err(error) = thread.kill(SIGRTMIN()) {
        // The thread has ended: nothing is left to be kicked.
        log::debug!("kick: {error}");
    }
}

fn install_handler() -> io::Result<()> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    let install = || register_signal_handler(SIGRTMIN(), on_kick).map_err(|error| error.errno());
    INSTALLED
        .get_or_init(install)
        .map_err(io::Error::from_raw_os_error)
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // A const-initialised Cell without a destructor: reading it is one load, safe in a handler.
    let run = RUN.with(Cell::get);
    if !run.is_null() {
        // SAFETY: not null only while this very thread holds a Kickable, during which the vCPU
        // and its shared page live. One byte, written volatile: KVM reads it.
        unsafe { (&raw mut (*run).immediate_exit).write_volatile(1) };
    }
}
