//! The process's own stdin and stdout, when they are no terminal: pipe, file or socket.
//!
//! Their mode is shared with whoever started us and is not touched. A terminal is driven by the
//! monitor's shell instead.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use super::mailbox::Mailbox;
use super::stream::{Input, Stream};
use super::{Chardev, Error, Receiver};
use crate::poll::Poll;

struct Stdio {
    id: String,
    poll: Poll,
    mailbox: Arc<Mailbox>,
    stream: Stream,
}

/// Opens it. The end of input is told once; output goes on.
pub(super) fn open(id: String, poll: &Poll) -> Result<Arc<dyn Chardev>, Error> {
    let input = io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .map_err(Error::Stdio)?;
    let output = io::stdout()
        .as_fd()
        .try_clone_to_owned()
        .map_err(Error::Stdio)?;
    let mailbox = Arc::new(Mailbox::default());
    let told = Arc::clone(&mailbox);
    let told = Box::new(move |incoming| told.deliver(incoming));
    let stream = Stream::new(Arc::new(input), Arc::new(output), Input::Plain, poll, told)
        .map_err(Error::Stdio)?;
    Ok(Arc::new(Stdio {
        id,
        poll: poll.clone(),
        mailbox,
        stream,
    }))
}

impl Chardev for Stdio {
    fn id(&self) -> &str {
        &self.id
    }

    fn description(&self) -> String {
        "stdio".to_owned()
    }

    fn write(&self, bytes: &[u8]) {
        self.stream.write(bytes);
    }

    fn receive(&self, receiver: Receiver) {
        self.mailbox.set(receiver);
        self.mailbox.announce(&self.poll);
        self.stream.set_readable(true);
    }

    fn close(&self) {
        self.stream.flush();
    }

    fn set_readable(&self, readable: bool) {
        self.stream.set_readable(readable);
    }
}
