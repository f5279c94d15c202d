//! Floor 3: the guest. A KVM machine of QEMU's `microvm` kind behind the [`guest::Guest`] seam.

mod accel;
mod backend;
pub mod boot;
mod cpu_state;
mod cpuid;
mod device;
pub mod dirty;
pub mod guest;
mod kvm;
pub mod machine;
mod map;
pub mod memory;
mod page_bits;
mod paging;
pub mod run_state;
mod vcpu;
pub mod virtual_memory;
