//! Which pages changed: KVM's log and the VMM's own writes, and the rule that no bit is lost.
//!
//! Reading KVM's log clears it, and device emulation never shows in it. So there is one place
//! that unites both and that takes bits back: a migration that fails after reading the log has
//! consumed knowledge that the next attempt needs. `sync` drains, `give_back` restores.

mod machine_log;

pub(super) use self::machine_log::MachineLog;

/// Receives dirty bits, 64 pages at a time.
pub trait DirtySink {
    /// Pages `word * 64 ..` of RAM block number `block` (index into the guest's block list);
    /// bit 0 is the first page. Called only with `bits != 0`, possibly twice for one word.
    fn dirty(&mut self, block: usize, word: usize, bits: u64);
}

/// The guest's dirty log as the engine uses it.
pub trait DirtyLog {
    /// Switches logging on. The first `sync` after it yields every page that may differ from
    /// zero: populated pages of anonymous memory and of a memfd, all pages of others, and all that
    /// was given back.
    fn start(&self) -> Result<(), super::guest::Error>;

    /// Moves into `sink` every page dirtied since the last `sync`, by vCPUs or by the VMM.
    fn sync(&self, sink: &mut dyn DirtySink) -> Result<(), super::guest::Error>;

    /// Takes back bits that a failed or cancelled migration had drained.
    fn give_back(&self, block: usize, word: usize, bits: u64);

    /// Switches logging off; what was given back stays known.
    fn stop(&self);
}
