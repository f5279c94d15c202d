//! Completion: what could come at the cursor, from the table and from what a context knows.
//!
//! A function of the line up to the cursor; it changes nothing and asks a machine only through
//! [`Context`]. QEMU: `monitor_find_completion`; flags, URI schemes, parameter values and log
//! items are completed here and not there.

use super::args::words;
use super::expr::is_blank;
use super::table::{self, Command, Completion, Kind};

/// What completion has to ask of others.
pub trait Context {
    /// Names of the migration capabilities.
    fn capabilities(&self) -> Vec<String>;
    /// Names of the migration parameters.
    fn parameters(&self) -> Vec<String>;
    /// Values the parameter of that name can take, if they can be listed.
    fn parameter_values(&self, name: &str) -> Vec<String>;
    /// Ids of the character devices, and whether each is a ring buffer.
    fn chardevs(&self) -> Vec<(String, bool)>;
    /// Ids of the drives.
    fn drives(&self) -> Vec<String>;
    /// Names of the snapshots that every disk has.
    fn snapshots(&self) -> Vec<String>;
    /// Names of the log items.
    fn log_items(&self) -> Vec<String>;
    /// Names in a directory (empty: the current one), and whether each is a directory itself.
    fn directory(&self, path: &str) -> Vec<(String, bool)>;
}

/// What could stand at the cursor.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Candidates {
    /// Bytes of the last word that are typed already; every candidate begins with them.
    pub typed: usize,
    /// Whole words, sorted, none twice, at most 256.
    pub words: Vec<String>,
}

/// Finds the candidates for the end of `line`, which is the line up to the cursor.
pub fn complete(line: &str, context: &dyn Context) -> Candidates {
    let Some(mut typed) = words(line) else {
        return Candidates::default();
    };
    let last = match typed.pop() {
        Some(last) if !line.ends_with(is_blank) => last,
        whole => {
            typed.extend(whole);
            String::new()
        }
    };
    let mut found = command_or_argument(table::COMMANDS, &typed, &last, context);
    found.retain(|word| word.starts_with(&last));
    found.sort();
    found.dedup();
    found.truncate(LIMIT);
    Candidates {
        typed: last.len(),
        words: found,
    }
}

fn command_or_argument(
    commands: &'static [Command],
    before: &[String],
    last: &str,
    context: &dyn Context,
) -> Vec<String> {
    let Some((name, arguments)) = before.split_first() else {
        return commands
            .iter()
            .flat_map(Command::names)
            .map(str::to_owned)
            .collect();
    };
    match table::find(commands, name) {
        None => Vec::new(),
        Some(command) if !command.items.is_empty() => {
            command_or_argument(command.items, arguments, last, context)
        }
        Some(command) => argument(command, arguments, last, context),
    }
}

fn argument(
    command: &'static Command,
    before: &[String],
    last: &str,
    context: &dyn Context,
) -> Vec<String> {
    let mut flags = command
        .args
        .iter()
        .filter(|arg| arg.kind.flag().is_some())
        .peekable();
    let mut rest = before;
    while let Some((word, after)) = rest.split_first() {
        let letter = word
            .strip_prefix('-')
            .and_then(|letters| letters.chars().next());
        let Some(flag) = letter.and_then(|_| flags.find(|arg| arg.kind.flag() == letter)) else {
            break;
        };
        rest = match flag.kind {
            Kind::FlagValue(_) => after.get(1..).unwrap_or_default(),
            _ => after,
        };
    }
    if rest.is_empty() && last.starts_with('-') {
        return flags
            .filter_map(|arg| arg.kind.flag())
            .map(|flag| format!("-{flag}"))
            .collect();
    }
    match command.completion.get(rest.len()) {
        Some(Completion::Command) => subject(before, last, context),
        // Help walks the table as deep as it is, with one argument only.
        None if command.completion == [Completion::Command] => subject(before, last, context),
        Some(completion) => candidates(
            *completion,
            rest.last().map_or("", String::as_str),
            last,
            context,
        ),
        None => Vec::new(),
    }
}

/// What `help` can be asked about.
fn subject(before: &[String], last: &str, context: &dyn Context) -> Vec<String> {
    match before {
        [] => command_or_argument(table::COMMANDS, &[], last, context),
        [name] => match table::find(table::COMMANDS, name) {
            Some(command) if !command.items.is_empty() => {
                command_or_argument(command.items, &[], last, context)
            }
            _ => Vec::new(),
        },
        _ => Vec::new(),
    }
}

fn candidates(
    completion: Completion,
    previous: &str,
    last: &str,
    context: &dyn Context,
) -> Vec<String> {
    let fixed = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
    match completion {
        Completion::None | Completion::Command => Vec::new(),
        Completion::Item => table::ITEMS
            .iter()
            .map(|item| item.name.to_owned())
            .collect(),
        Completion::File => files(last, context),
        Completion::Uri => fixed(&SCHEMES),
        Completion::Capability => context.capabilities(),
        Completion::OnOff => fixed(&["off", "on"]),
        Completion::Parameter => context.parameters(),
        Completion::ParameterValue => context.parameter_values(previous),
        Completion::Chardev => context.chardevs().into_iter().map(|(id, _)| id).collect(),
        Completion::Ringbuf => context
            .chardevs()
            .into_iter()
            .filter(|(_, is)| *is)
            .map(|(id, _)| id)
            .collect(),
        Completion::Drive => context.drives(),
        Completion::Snapshot => context.snapshots(),
        Completion::LogItem => {
            let done = last.rfind(',').map_or("", |comma| &last[..=comma]);
            context
                .log_items()
                .into_iter()
                .map(|item| format!("{done}{item}"))
                .collect()
        }
    }
}

fn files(path: &str, context: &dyn Context) -> Vec<String> {
    let directory = path.rfind('/').map_or("", |slash| &path[..=slash]);
    context
        .directory(directory)
        .into_iter()
        .map(|(name, is_directory)| {
            format!("{directory}{name}{}", if is_directory { "/" } else { "" })
        })
        .collect()
}

/// Schemes of migration URIs.
const SCHEMES: [&str; 5] = ["exec:", "fd:", "file:", "tcp:", "unix:"];

/// Candidates at most.
const LIMIT: usize = 256;

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A context as a machine could have it.
    pub(crate) struct Known;

    impl Context for Known {
        fn capabilities(&self) -> Vec<String> {
            vec!["xbzrle".to_owned(), "events".to_owned()]
        }
        fn parameters(&self) -> Vec<String> {
            ["multifd-channels", "multifd-compression", "max-bandwidth"]
                .map(str::to_owned)
                .into()
        }
        fn parameter_values(&self, name: &str) -> Vec<String> {
            match name {
                "multifd-compression" => ["none", "zlib", "zstd"].map(str::to_owned).into(),
                _ => Vec::new(),
            }
        }
        fn chardevs(&self) -> Vec<(String, bool)> {
            vec![
                ("serial0".to_owned(), true),
                ("compat_monitor0".to_owned(), false),
            ]
        }
        fn drives(&self) -> Vec<String> {
            vec!["hd0".to_owned()]
        }
        fn snapshots(&self) -> Vec<String> {
            vec!["tuesday".to_owned()]
        }
        fn log_items(&self) -> Vec<String> {
            vec!["none".to_owned(), "migration".to_owned()]
        }
        fn directory(&self, path: &str) -> Vec<(String, bool)> {
            match path {
                "/" => vec![("etc".to_owned(), true)],
                "/etc/" => vec![("hostname".to_owned(), false), ("hosts".to_owned(), false)],
                "" => vec![("disk".to_owned(), false)],
                _ => Vec::new(),
            }
        }
    }

    fn at(line: &str) -> Vec<String> {
        complete(line, &Known).words
    }

    #[test]
    fn names_of_commands_and_items() {
        assert_eq!(at("inf"), ["info"]);
        assert_eq!(at("q"), ["q", "quit"]);
        assert_eq!(at("  ring"), ["ringbuf_read", "ringbuf_write"]);
        assert_eq!(at("info  sta"), ["status"]);
        assert_eq!(
            at("info mig"),
            ["migrate", "migrate_capabilities", "migrate_parameters"]
        );
        assert_eq!(at("help inf"), ["info"]);
        assert_eq!(at("help info sta"), ["status"]);
        assert_eq!(at("? quit x"), Vec::<String>::new());
        assert_eq!(at("foo "), Vec::<String>::new());
        assert_eq!(
            at("").len(),
            table::COMMANDS.iter().flat_map(Command::names).count()
        );
        assert_eq!(complete("info sta", &Known).typed, 3);
        assert_eq!(complete("info ", &Known).typed, 0);
    }

    #[test]
    fn arguments() {
        assert_eq!(at("migrate_set_capability xb"), ["xbzrle"]);
        assert_eq!(at("migrate_set_capability xbzrle "), ["off", "on"]);
        assert_eq!(
            at("migrate_set_capability xbzrle on "),
            Vec::<String>::new()
        );
        assert_eq!(
            at("migrate_set_parameter multifd-compression z"),
            ["zlib", "zstd"]
        );
        assert_eq!(at("migrate_set_parameter ma"), ["max-bandwidth"]);
        assert_eq!(at("ringbuf_read "), ["serial0"]);
        assert_eq!(at("log none,mi"), ["none,migration"]);
        assert_eq!(at("logfile /e"), ["/etc/"]);
        assert_eq!(at("logfile /etc/host"), ["/etc/hostname", "/etc/hosts"]);
        assert_eq!(at("pmemsave 0 16 d"), ["disk"]);
        assert_eq!(at("logfile \"/e"), Vec::<String>::new());
    }

    #[test]
    fn flags_and_schemes() {
        assert_eq!(at("migrate -"), ["-b", "-d", "-i", "-r"]);
        assert_eq!(at("migrate -b -"), ["-i", "-r"]);
        assert_eq!(at("migrate -d t"), ["tcp:"]);
        assert_eq!(at("migrate "), SCHEMES);
        assert_eq!(at("migrate tcp:x -"), Vec::<String>::new());
        assert_eq!(at("info registers -"), ["-a"]);
        assert_eq!(at("cont -"), ["-f"]);
    }
}
