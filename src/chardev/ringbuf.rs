//! Output kept in memory: the newest bytes, as many as the ring holds.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::mailbox::Mailbox;
use super::{Chardev, Error, Receiver, Ringbuf};
use crate::poll::Poll;

struct Ring {
    id: String,
    poll: Poll,
    mailbox: Arc<Mailbox>,
    size: usize,
    bytes: Mutex<VecDeque<u8>>,
}

/// A ring of `size` bytes, a power of two.
pub(super) fn open(id: String, size: usize, poll: &Poll) -> Result<Arc<dyn Chardev>, Error> {
    if !size.is_power_of_two() {
        return Err(Error::RingbufSize);
    }
    Ok(Arc::new(Ring {
        id,
        poll: poll.clone(),
        mailbox: Arc::default(),
        size,
        bytes: Mutex::default(),
    }))
}

impl Ring {
    fn lock(&self) -> MutexGuard<'_, VecDeque<u8>> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, bytes: &[u8]) {
        let newest = &bytes[bytes.len().saturating_sub(self.size)..];
        let mut ring = self.lock();
        let surplus = (ring.len() + newest.len()).saturating_sub(self.size);
        ring.drain(..surplus);
        ring.extend(newest);
    }
}

impl Chardev for Ring {
    fn id(&self) -> &str {
        &self.id
    }

    fn description(&self) -> String {
        "ringbuf".to_owned()
    }

    fn write(&self, bytes: &[u8]) {
        self.add(bytes);
    }

    fn receive(&self, receiver: Receiver) {
        self.mailbox.set(receiver);
        self.mailbox.announce(&self.poll);
    }

    fn set_readable(&self, _readable: bool) {}

    fn ringbuf(&self) -> Option<&dyn Ringbuf> {
        Some(self)
    }
}

impl Ringbuf for Ring {
    fn read(&self, size: usize) -> Vec<u8> {
        let mut ring = self.lock();
        let count = size.min(ring.len());
        ring.drain(..count).collect()
    }

    fn write(&self, bytes: &[u8]) {
        self.add(bytes);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ring(size: usize) -> Arc<dyn Chardev> {
        open("r".to_owned(), size, &Poll::new().unwrap()).unwrap()
    }

    #[test]
    fn sizes_are_powers_of_two() {
        for size in [0, 3, 1000] {
            let refused = open("r".to_owned(), size, &Poll::new().unwrap())
                .err()
                .unwrap();
            assert_eq!(
                refused.to_string(),
                "size of ringbuf chardev must be power of two"
            );
        }
        assert_eq!(ring(1).description(), "ringbuf");
    }

    proptest! {
        #[test]
        fn it_keeps_the_newest_bytes(
            writes in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..40), 0..20),
            take in 0usize..40,
        ) {
            let device = ring(16);
            let mut model: Vec<u8> = Vec::new();
            for write in &writes {
                device.write(write);
                model.extend(write);
            }
            let newest = &model[model.len().saturating_sub(16)..];
            let ringbuf = device.ringbuf().unwrap();
            let first = ringbuf.read(take);
            prop_assert_eq!(&first[..], &newest[..take.min(newest.len())]);
            prop_assert_eq!(&ringbuf.read(100)[..], &newest[first.len()..]);
            prop_assert!(ringbuf.read(1).is_empty());
        }
    }
}
