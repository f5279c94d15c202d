//! Who gets a chardev's input: the receiver, called with no lock held.

use std::sync::{Arc, Mutex, PoisonError};

use super::{Incoming, Receiver};
use crate::poll::Poll;

/// Holds the receiver. While it runs it is taken out, so it may replace itself or use the chardev.
#[derive(Default)]
pub(super) struct Mailbox {
    slot: Mutex<Slot>,
}

#[derive(Default)]
struct Slot {
    receiver: Option<Receiver>,
    /// Counts replacements, so that a replaced receiver is not put back.
    generation: u64,
}

impl Mailbox {
    pub(super) fn set(&self, receiver: Receiver) {
        let old = self.change(|slot| {
            slot.generation += 1;
            slot.receiver.replace(receiver)
        });
        // With no lock held: it may own chardevs.
        drop(old);
    }

    /// Tells the receiver; without one it is lost.
    pub(super) fn deliver(&self, incoming: Incoming) {
        let (taken, generation) = self.change(|slot| (slot.receiver.take(), slot.generation));
        let Some(mut receiver) = taken else {
            return;
        };
        receiver(incoming);
        let left = self.change(|slot| {
            if slot.generation == generation {
                slot.receiver = Some(receiver);
                None
            } else {
                Some(receiver)
            }
        });
        drop(left);
    }

    /// Tells the receiver, soon, that the device is there: for devices that always are.
    pub(super) fn announce(self: &Arc<Self>, poll: &Poll) {
        let mailbox = Arc::downgrade(self);
        poll.defer(Box::new(move || {
            if let Some(mailbox) = mailbox.upgrade() {
                mailbox.deliver(Incoming::Opened);
            }
        }));
    }

    fn change<T>(&self, change: impl FnOnce(&mut Slot) -> T) -> T {
        change(&mut self.slot.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn a_receiver_may_replace_itself_while_it_runs() {
        let mailbox = Arc::new(Mailbox::default());
        let second = Arc::new(AtomicUsize::new(0));
        let (weak, count) = (Arc::downgrade(&mailbox), Arc::clone(&second));
        mailbox.set(Box::new(move |_| {
            let count = Arc::clone(&count);
            let next = Box::new(move |_| {
                count.fetch_add(1, Ordering::SeqCst);
            });
            weak.upgrade().unwrap().set(next);
        }));
        for _ in 0..3 {
            mailbox.deliver(Incoming::Closed);
        }
        assert_eq!(second.load(Ordering::SeqCst), 2);
    }
}
