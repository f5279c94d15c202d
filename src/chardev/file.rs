//! Output to a file; there is never input.

use std::fs::OpenOptions;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use super::mailbox::Mailbox;
use super::output::Output;
use super::{Chardev, Error, Receiver};
use crate::poll::Poll;

struct File {
    id: String,
    poll: Poll,
    mailbox: Arc<Mailbox>,
    output: Mutex<Output>,
}

/// Opens the file and empties it, as QEMU does.
pub(super) fn open(id: String, path: &Path, poll: &Poll) -> Result<Arc<dyn Chardev>, Error> {
    let failed = |source| Error::Open {
        path: path.display().to_string(),
        source,
    };
    let file: OwnedFd = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
        .map_err(failed)?
        .into();
    let output = Mutex::new(Output::new(Arc::new(file)).map_err(failed)?);
    Ok(Arc::new(File {
        id,
        poll: poll.clone(),
        mailbox: Arc::default(),
        output,
    }))
}

impl Chardev for File {
    fn id(&self) -> &str {
        &self.id
    }

    fn description(&self) -> String {
        "file".to_owned()
    }

    fn write(&self, bytes: &[u8]) {
        self.output
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .write(bytes);
    }

    fn receive(&self, receiver: Receiver) {
        self.mailbox.set(receiver);
        self.mailbox.announce(&self.poll);
    }

    fn set_readable(&self, _readable: bool) {}
}
