//! What the terminal's shell shows in advance, behind the cursor.

use super::complete::{Context, complete};
use super::expr::is_blank;
use super::table::{self, Command};

/// The rest of the only word that could stand here, or what arguments a command takes whose name
/// has just been typed.
pub fn hint(line: &str, context: &dyn Context) -> Option<String> {
    if line.trim_start_matches(is_blank).is_empty() {
        return None;
    }
    if !line.ends_with(is_blank) {
        let candidates = complete(line, context);
        return match &candidates.words[..] {
            [only] if only.len() > candidates.typed => {
                only.get(candidates.typed..).map(str::to_owned)
            }
            _ => None,
        };
    }
    let command = named(line)?;
    (!command.params.is_empty()).then(|| command.params.to_owned())
}

/// The command whose name, and nothing else, is on the line.
fn named(line: &str) -> Option<&'static Command> {
    let mut words = line.split(is_blank).filter(|word| !word.is_empty());
    let command = table::find(table::COMMANDS, words.next()?)?;
    match words.next() {
        None => Some(command),
        Some(item) if words.next().is_none() => table::find(command.items, item),
        Some(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::monitor::complete::tests::Known;

    #[test]
    fn hints() {
        let at = |line| hint(line, &Known);
        assert_eq!(at(""), None);
        assert_eq!(at("inf").as_deref(), Some("o"));
        assert_eq!(at("migrate_set_capability xb").as_deref(), Some("zrle"));
        assert_eq!(at("mig"), None);
        assert_eq!(at("migrate ").as_deref(), Some("[-d] [-b] [-i] [-r] uri"));
        assert_eq!(at("migrate -d "), None);
        assert_eq!(at("info registers ").as_deref(), Some("[-a|vcpu]"));
        assert_eq!(at("stop "), None);
        assert_eq!(at("foo "), None);
    }
}
