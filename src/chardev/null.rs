//! Swallows output, never has input.

use std::sync::Arc;

use super::mailbox::Mailbox;
use super::{Chardev, Receiver};
use crate::poll::Poll;

struct Null {
    id: String,
    poll: Poll,
    mailbox: Arc<Mailbox>,
}

pub(super) fn open(id: String, poll: &Poll) -> Arc<dyn Chardev> {
    Arc::new(Null {
        id,
        poll: poll.clone(),
        mailbox: Arc::default(),
    })
}

impl Chardev for Null {
    fn id(&self) -> &str {
        &self.id
    }

    fn description(&self) -> String {
        "null".to_owned()
    }

    fn write(&self, _bytes: &[u8]) {}

    fn receive(&self, receiver: Receiver) {
        self.mailbox.set(receiver);
        self.mailbox.announce(&self.poll);
    }

    fn set_readable(&self, _readable: bool) {}
}
