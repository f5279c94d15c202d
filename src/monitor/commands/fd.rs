//! `getfd`, `closefd`: descriptors for `migrate fd:`.

use crate::monitor::args::Args;
use crate::monitor::session::{Error, Session};

/// `getfd name`.
pub(crate) fn getfd(session: &mut Session, args: &Args) -> Result<(), Error> {
    let name = args.text("fdname")?;
    let Some(fd) = session.next_fd() else {
        return Err(Error::Refused(
            "No file descriptor supplied via SCM_RIGHTS".to_owned(),
        ));
    };
    if name.starts_with(|c: char| c.is_ascii_digit()) {
        let text = "Parameter 'fdname' expects a name not starting with a digit";
        return Err(Error::Refused(text.to_owned()));
    }
    if session.fds.len() >= FD_LIMIT && !session.fds.contains_key(name) {
        return Err(Error::Refused(format!(
            "{FD_LIMIT} file descriptors have names already"
        )));
    }
    session.fds.insert(name.to_owned(), fd);
    Ok(())
}

/// `closefd name`.
pub(crate) fn closefd(session: &mut Session, args: &Args) -> Result<(), Error> {
    let name = args.text("fdname")?;
    match session.fds.remove(name) {
        Some(_) => Ok(()),
        None => Err(Error::Refused(not_found(name))),
    }
}

pub(crate) fn not_found(name: &str) -> String {
    format!("File descriptor named '{name}' not found")
}

/// Descriptors one session can have named.
const FD_LIMIT: usize = 64;
