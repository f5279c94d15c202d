//! `log`, `logfile`.

use super::help::log_items;
use crate::monitor::args::Args;
use crate::monitor::session::{Error, Session};

/// `log item1[,...]`: an unknown item is answered with the list, as is `help`.
pub(crate) fn log(session: &mut Session, args: &Args) -> Result<(), Error> {
    let items = args.text("items")?;
    let known = session.control.log_items();
    let is_known = |item: &str| item == "none" || known.iter().any(|(name, _)| *name == item);
    match items.split(',').find(|item| !is_known(item)) {
        None => Ok(session.control.log(items)?),
        Some("help" | "?") => {
            session.print(&log_items(known));
            Ok(())
        }
        Some(_) => Err(Error::Text(log_items(known).trim_end().to_owned())),
    }
}

/// `logfile filename`.
pub(crate) fn logfile(session: &mut Session, args: &Args) -> Result<(), Error> {
    // Not a refusal of the command but the text QEMU has for it, without a prefix.
    session
        .control
        .logfile(args.text("filename")?)
        .map_err(|error| Error::Text(error.to_string()))
}
