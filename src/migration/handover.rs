//! Who the peer is, and the instant from which the guest is no longer ours to resume.
//!
//! Between two hmpsh: LOADED, then GO, then RUNNING. The source may resume the guest until the
//! first byte of GO is out and never by itself after it; the destination runs it only after GO.
//! A stock QEMU runs the guest once it has read EOF, so there the EOF byte is GO and SHUT is
//! RUNNING. What lies between is the ambiguous window: a source that loses its peer there stays
//! paused and says so.

use std::sync::atomic::{AtomicU8, Ordering};

use super::channel::Cancel;

/// What is known about the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// hmpsh, with the hand-over in three messages.
    Hmpsh,
    /// A QEMU that answers PING and says SHUT at the end.
    Stock,
    /// It could answer but was not asked to (return path off).
    Silent,
    /// The transport has no way back (file, exec, pipe).
    OneWay,
}

/// Decides once and for all between the operator's cancel and the engine's hand-over.
#[derive(Debug, Default)]
pub struct PointOfNoReturn(AtomicU8);

impl PointOfNoReturn {
    /// Neither has happened.
    pub fn new() -> Self {
        Self::default()
    }

    /// The operator's side: cancels, unless the hand-over has begun. `false` means too late;
    /// `cancel` is then left alone, for the rest of the hand-over must not be interrupted.
    pub fn cancel(&self, cancel: &Cancel) -> bool {
        if self.decide(CANCELLED) {
            cancel.cancel();
            true
        } else {
            false
        }
    }

    /// The engine's side: begins the hand-over, unless it was cancelled.
    pub fn pass(&self) -> bool {
        self.decide(PASSED)
    }

    /// After a hand-over that came to nothing at a destination that listens on: it can be
    /// cancelled again. A cancel stays.
    pub fn reopen(&self) {
        let _ = self
            .0
            .compare_exchange(PASSED, OPEN, Ordering::SeqCst, Ordering::SeqCst);
    }

    /// Whether it is too late to cancel.
    pub fn is_passed(&self) -> bool {
        self.0.load(Ordering::SeqCst) == PASSED
    }

    fn decide(&self, for_what: u8) -> bool {
        match self
            .0
            .compare_exchange(OPEN, for_what, Ordering::SeqCst, Ordering::SeqCst)
        {
            Ok(_) => true,
            Err(decided) => decided == for_what,
        }
    }
}

const OPEN: u8 = 0;
const PASSED: u8 = 1;
const CANCELLED: u8 = 2;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_comes_first_wins() {
        let cancel = Cancel::new().unwrap();
        let point = PointOfNoReturn::new();
        assert!(point.pass());
        assert!(!point.cancel(&cancel));
        assert!(!cancel.is_cancelled());
        assert!(point.is_passed());
        point.reopen();
        assert!(point.cancel(&cancel));
        point.reopen();
        assert!(!point.pass(), "a cancel stays");

        let cancel = Cancel::new().unwrap();

        let point = PointOfNoReturn::new();
        assert!(point.cancel(&cancel));
        assert!(point.cancel(&cancel));
        assert!(cancel.is_cancelled());
        assert!(!point.pass());
        assert!(!point.is_passed());
    }
}
