//! `-daemonize`: a child that does the work, a parent that waits until it is set up.
//!
//! The child is this program started again, in a session of its own; forking a process that has
//! threads, or may have, is not safe. It inherits stdin from nowhere, and its stdout is the pipe
//! on which it tells that it is ready.

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitStatus, Stdio};

/// The child's name for itself: unlike a variable it is not inherited by the commands of `exec:`.
const NAME: &str = "hmpsh-daemon";

/// What the child writes when it is set up.
const READY: u8 = b'+';

/// Whether this process is the child already.
pub fn is_child() -> bool {
    std::env::args_os().next().is_some_and(|name| name == NAME)
}

/// Starts the child with these arguments (without the program's own name) and waits until it is
/// set up. `None`: it is; otherwise how it ended, after it has said why on our stderr.
///
/// # Errors
/// The program can not be started again.
pub fn start(arguments: impl IntoIterator<Item = OsString>) -> io::Result<Option<ExitStatus>> {
    let mut child = Command::new("/proc/self/exe")
        .args(arguments)
        .arg0(NAME)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut said = Vec::new();
    if let Some(mut output) = child.stdout.take() {
        // What it prints while it starts (the name of a pty) is passed on.
        let mut byte = [0];
        while output.read(&mut byte)? == 1 {
            if byte[0] == READY && said.last().is_none_or(|last| *last == b'\n') {
                io::stdout().write_all(&said)?;
                return Ok(None);
            }
            said.push(byte[0]);
        }
    }
    io::stdout().write_all(&said)?;
    child.wait().map(Some)
}

/// In the child, first: leaves the terminal's session.
///
/// # Errors
/// What `setsid(2)` says.
pub fn detach() -> io::Result<()> {
    rustix::process::setsid()?;
    Ok(())
}

/// In the child, when everything is set up: lets the parent go, and everything it gave us.
///
/// # Errors
/// `/` or `/dev/null` is not there.
pub fn ready() -> io::Result<()> {
    std::env::set_current_dir("/")?;
    let mut output = io::stdout().lock();
    output.write_all(&[READY])?;
    output.flush()?;
    let nowhere = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")?;
    rustix::stdio::dup2_stdin(nowhere.as_fd())?;
    rustix::stdio::dup2_stdout(nowhere.as_fd())?;
    rustix::stdio::dup2_stderr(nowhere.as_fd())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// This test, run again, is the child.
    fn again(name: &str) -> Vec<OsString> {
        let name = format!("cli::daemon::tests::{name}");
        ["--exact", &name, "--test-threads=1", "--nocapture", "-q"]
            .map(OsString::from)
            .to_vec()
    }

    #[test]
    fn the_parent_is_let_go_when_the_child_is_ready() {
        if is_child() {
            detach().unwrap();
            // libtest has begun a line.
            println!();
            ready().unwrap();
            assert_eq!(std::env::current_dir().unwrap().to_str(), Some("/"));
            assert_eq!(io::stdin().read(&mut [0]).unwrap(), 0);
            return;
        }
        let ended = start(again("the_parent_is_let_go_when_the_child_is_ready")).unwrap();
        assert!(ended.is_none(), "{ended:?}");
    }

    #[test]
    fn a_child_that_ends_before_it_is_ready_is_told_of() {
        // There is no such test, so the child has nothing to do.
        let ended = start(again("nothing")).unwrap();
        assert!(ended.unwrap().success());
    }
}
