//! `help`, and `info` without an item.

use crate::monitor::args::{Args, words};
use crate::monitor::help;
use crate::monitor::session::{Error, Session};
use crate::monitor::table;

/// `help [cmd]`.
pub(crate) fn help(session: &mut Session, args: &Args) -> Result<(), Error> {
    let text = match args.text_if_any("name") {
        None => help::all(),
        Some(topic) => match words(topic) {
            Some(words) if words == ["log"] => log_items(session.control.log_items()),
            _ => help::topic(topic).map_err(Error::Text)?,
        },
    };
    session.print(&text);
    Ok(())
}

/// `info`: what can be shown. With an item, the item's own handler is called instead.
pub(crate) fn info(session: &mut Session, _: &Args) -> Result<(), Error> {
    if let Some(command) = table::find(table::COMMANDS, "info") {
        session.print(&help::items(command));
    }
    Ok(())
}

/// What `help log` shows.
pub(crate) fn log_items(items: &[(&str, &str)]) -> String {
    let mut text = "Log items (comma separated):\n".to_owned();
    text.push_str(&format!("{:<15} {}\n", "none", "remove all logs"));
    for (name, meaning) in items.iter().filter(|(name, _)| *name != "none") {
        text.push_str(&format!("{name:<15} {meaning}\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_log_items() {
        assert_eq!(
            log_items(&[("none", "x"), ("migration", "phases of migrations")]),
            "Log items (comma separated):\nnone            remove all logs\n\
             migration       phases of migrations\n"
        );
    }
}
