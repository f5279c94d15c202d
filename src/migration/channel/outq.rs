//! How much of what was written to a TCP socket its peer has not acknowledged.
//!
//! One of the rooms where `unsafe` may live: no safe wrapper of `SIOCOUTQ` is at hand.
#![expect(unsafe_code, reason = "ioctl(SIOCOUTQ) has no safe wrapper")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Bytes in the send queue, sent or not, that were not acknowledged (`SIOCOUTQ`).
///
/// # Errors
/// What `ioctl(2)` says, for what is no TCP socket above all.
pub(super) fn unacknowledged(socket: BorrowedFd<'_>) -> io::Result<usize> {
    let mut count: libc::c_int = 0;
    // SAFETY: SIOCOUTQ (TIOCOUTQ's number) stores one int through the pointer, which is valid for
    // the call.
    let answer = unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut count) };
    if answer < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(usize::try_from(count).unwrap_or(0))
    }
}
