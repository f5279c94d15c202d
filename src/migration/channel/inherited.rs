//! Descriptors the program was started with, for `-incoming fd:N`.
//!
//! One of the rooms where `unsafe` may live: ownership of a bare number has to begin somewhere.
//! What makes it sound: `exec(2)` closes every descriptor with the close-on-exec flag, so what we
//! inherited has it clear; everything this program opens itself has it set. Taking sets it too,
//! so nothing is taken twice and nothing leaks into the children of `exec:`.
#![expect(unsafe_code, reason = "an inherited descriptor is a bare number")]

use std::collections::BTreeMap;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};

/// Takes over every inherited descriptor from 3 on, each under its number as a name. Call it
/// first thing: descriptors nobody claims would reach the children of `exec:`.
pub fn claim() -> BTreeMap<String, OwnedFd> {
    let Ok(listing) = std::fs::read_dir("/proc/self/fd") else {
        return BTreeMap::new();
    };
    let numbers: Vec<RawFd> = listing
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    numbers
        .into_iter()
        .filter(|number| *number > 2)
        .filter_map(|number| take(number).map(|fd| (number.to_string(), fd)))
        .collect()
}

/// Takes over standard input as well, under the name `0`; nothing is left there. For a program
/// that does not read it.
///
/// # Errors
/// There is no standard input, or no `/dev/null`.
pub fn claim_stdin() -> std::io::Result<OwnedFd> {
    let nowhere = std::fs::File::open("/dev/null")?;
    let stdin = rustix::stdio::stdin().try_clone_to_owned()?;
    rustix::stdio::dup2_stdin(&nowhere)?;
    Ok(stdin)
}

fn take(number: RawFd) -> Option<OwnedFd> {
    // SAFETY: only the descriptor's flags are read; a number that is not open fails with EBADF.
    let seen = unsafe { BorrowedFd::borrow_raw(number) };
    let flags = fcntl_getfd(seen).ok()?;
    if flags.contains(FdFlags::CLOEXEC) {
        return None;
    }
    fcntl_setfd(seen, flags | FdFlags::CLOEXEC).ok()?;
    // SAFETY: the flag was clear, so the descriptor came through exec(2) and no value in this
    // program owns it; now the flag is set, so it will not be taken again.
    Some(unsafe { OwnedFd::from_raw_fd(number) })
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn what_was_inherited_is_claimed_once_and_nothing_else() {
        // Alone in a process of its own: neighbours in this one open descriptors carelessly.
        if std::env::var_os("HMPSH_TEST_CLAIM").is_some() {
            let own = std::fs::File::open("/dev/null").unwrap();
            let claimed = claim();
            assert!(claimed.contains_key("7"), "{claimed:?}");
            use std::os::fd::AsRawFd;
            assert!(
                !claimed.contains_key(&own.as_raw_fd().to_string()),
                "{claimed:?}"
            );
            assert!(claim().is_empty());
            assert_eq!(rustix::io::read(&claimed["7"], &mut [0; 4]).unwrap(), 3);
            return;
        }
        let name = "migration::channel::inherited::tests::\
                    what_was_inherited_is_claimed_once_and_nothing_else";
        let status = Command::new("/bin/sh")
            .args([
                "-c",
                "printf abc | exec \"$0\" --exact \"$1\" --test-threads=1 7<&0 </dev/null",
            ])
            .arg(std::env::current_exe().unwrap())
            .arg(name)
            .env("HMPSH_TEST_CLAIM", "1")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&status.stdout);
        assert!(
            status.status.success() && said.contains("1 passed"),
            "{said}"
        );
    }
}
