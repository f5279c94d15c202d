//! Channels over a descriptor that was given: with `getfd` over a unix monitor, or inherited.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat, fsync};
use rustix::net::SocketType;
use rustix::net::sockopt::{socket_acceptconn, socket_type};

use super::descriptor::{Descriptor, Kind};
use super::socket::SocketChannel;
use super::{Cancel, Channel, Error, Fault};
use crate::iov::{In, Out};
use crate::socket::connect::tune;

/// What a descriptor is needed for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Use {
    Read,
    Write,
}

/// A given descriptor of a kind a stream can go through.
#[derive(Debug)]
pub(super) struct Given {
    fd: OwnedFd,
    kind: FileType,
    needed: Use,
}

impl Given {
    /// Takes the descriptor of that name out of `fds`. One that is refused is closed: it was
    /// given for this.
    pub(super) fn take(
        name: &str,
        fds: &mut BTreeMap<String, OwnedFd>,
        needed: Use,
    ) -> Result<Self, Error> {
        let fd = fds
            .remove(name)
            .ok_or_else(|| Error::NoSuchFd(name.to_owned()))?;
        let kind = check(&fd, needed).map_err(|why| Error::UnfitFd {
            name: name.to_owned(),
            why,
        })?;
        Ok(Self { fd, kind, needed })
    }

    /// The channel over it.
    pub(super) fn open(self, cancel: &Arc<Cancel>) -> Box<dyn Channel> {
        if self.kind == FileType::Socket {
            tune(std::os::fd::AsFd::as_fd(&self.fd));
            return Box::new(SocketChannel::new(self.fd, cancel));
        }
        let is_regular = self.kind == FileType::RegularFile;
        let wire = Descriptor::new(self.fd, Kind::File, cancel);
        Box::new(OneWay {
            wire,
            is_regular,
            needed: self.needed,
        })
    }
}

/// Makes sure the descriptor can carry a stream in that direction and does not block.
fn check(fd: &OwnedFd, needed: Use) -> Result<FileType, String> {
    let told = |error: rustix::io::Errno| crate::errno::Errno(&error.into()).to_string();
    let kind = FileType::from_raw_mode(fstat(fd).map_err(told)?.st_mode);
    let flags = fcntl_getfl(fd).map_err(told)?;
    match kind {
        FileType::Socket => {
            if socket_type(fd).map_err(told)? != SocketType::STREAM {
                return Err("is not a stream socket".to_owned());
            }
            if socket_acceptconn(fd).map_err(told)? {
                return Err("is a listening socket, not a connected one".to_owned());
            }
        }
        FileType::Fifo | FileType::RegularFile => {
            let mode = flags & OFlags::RWMODE;
            let (unfit, why) = match needed {
                Use::Read => (OFlags::WRONLY, "is open for writing only"),
                Use::Write => (OFlags::RDONLY, "is open for reading only"),
            };
            if mode == unfit || flags.contains(OFlags::PATH) {
                return Err(why.to_owned());
            }
        }
        _ => return Err("is not a socket, a pipe or a regular file".to_owned()),
    }
    rustix::io::ioctl_fionbio(fd, true).map_err(told)?;
    Ok(kind)
}

/// A pipe or a regular file.
#[derive(Debug)]
struct OneWay {
    wire: Descriptor,
    is_regular: bool,
    needed: Use,
}

impl Channel for OneWay {
    fn write(&mut self, pieces: &[Out<'_>], patience: Duration) -> Result<usize, Fault> {
        self.wire.write(pieces, patience)
    }

    fn read(&mut self, rooms: &mut [In<'_>], patience: Duration) -> Result<usize, Fault> {
        self.wire.read(rooms, patience)
    }

    fn is_duplex(&self) -> bool {
        false
    }

    fn settle(&mut self) -> Result<(), Fault> {
        if self.is_regular && self.needed == Use::Write {
            fsync(&self.wire).map_err(|error| self.wire.fault("sync", error.into()))?;
        }
        Ok(())
    }

    fn abandon(&mut self) {}

    fn drain(&mut self, _patience: Duration) -> bool {
        true
    }
}
