//! The command table: what a row is, and the rows that build.rs made of commands.toml.
//!
//! Nothing here knows what a command does. QEMU: `hmp-commands.hx` and what is generated from it.

use super::args::Args;
use super::commands;
use super::session::{Error, Session};

#[cfg(test)]
mod check;

include!(concat!(env!("OUT_DIR"), "/commands.rs"));

/// What executes a command.
pub type Handler = fn(&mut Session, &Args) -> Result<(), Error>;

/// One command, or one item of `info`.
#[derive(Debug)]
pub struct Command {
    /// What is typed.
    pub name: &'static str,
    /// Other names for it.
    pub aliases: &'static [&'static str],
    /// Its arguments in their order.
    pub args: &'static [Arg],
    /// Arguments as `help` shows them.
    pub params: &'static str,
    /// What `help` says.
    pub help: &'static str,
    /// What the manual page says besides.
    pub long: &'static str,
    /// What executes it.
    pub handler: Handler,
    /// Completion of the arguments that are not flags, in their order.
    pub completion: &'static [Completion],
    /// Section of the manual page.
    pub group: &'static str,
    /// Commands within this command (`info`); empty for all others.
    pub items: &'static [Self],
}

/// One argument.
#[derive(Debug)]
pub struct Arg {
    /// The name handlers ask for it by.
    pub key: &'static str,
    /// Its grammar.
    pub kind: Kind,
    /// Whether it may be absent.
    pub presence: Presence,
}

/// Argument grammars; QEMU's letters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `F`: a file name.
    File,
    /// `B`: a block device.
    Block,
    /// `s`: a word.
    Word,
    /// `S`: everything up to the end of the line.
    Rest,
    /// `i`: an expression of 32 bits.
    Int32,
    /// `l`: an expression of 64 bits.
    Int64,
    /// `M`: an expression in MiB.
    Mebibytes,
    /// `o`: a size with an optional suffix, MiB without.
    Size,
    /// `T`: seconds with an optional suffix.
    Seconds,
    /// `b`: `on` or `off`.
    OnOff,
    /// `/`: count, format and size.
    Format,
    /// `-x`.
    Flag(char),
    /// `-x value`.
    FlagValue(char),
}

impl Kind {
    /// The letter, for flags.
    pub fn flag(self) -> Option<char> {
        match self {
            Self::Flag(letter) | Self::FlagValue(letter) => Some(letter),
            _ => None,
        }
    }
}

/// Whether an argument may be absent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// It may not.
    Required,
    /// `?`: absent at the end of the line.
    Optional,
    /// `.`: absent unless a dot comes next.
    AfterDot,
}

/// What an argument completes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Completion {
    /// Nothing.
    None,
    /// Names of commands, then of the items of `info`.
    Command,
    /// Items of `info`.
    Item,
    /// Files.
    File,
    /// Schemes a migration URI may have.
    Uri,
    /// Migration capabilities.
    Capability,
    /// `on` and `off`.
    OnOff,
    /// Migration parameters.
    Parameter,
    /// Values of the parameter named before.
    ParameterValue,
    /// Character devices.
    Chardev,
    /// Character devices that are ring buffers.
    Ringbuf,
    /// Drives.
    Drive,
    /// Snapshots.
    Snapshot,
    /// Log items.
    LogItem,
}

impl Command {
    /// Name and aliases as help and error texts show them: `stop|s`.
    pub fn spelling(&self) -> String {
        let mut spelling = self.name.to_owned();
        for alias in self.aliases {
            spelling.push('|');
            spelling.push_str(alias);
        }
        spelling
    }

    /// Name and aliases.
    pub fn names(&self) -> impl Iterator<Item = &'static str> {
        std::iter::once(self.name).chain(self.aliases.iter().copied())
    }

    /// The arguments that are not flags.
    pub fn positional(&self) -> impl Iterator<Item = &'static Arg> {
        self.args.iter().filter(|arg| arg.kind.flag().is_none())
    }
}

/// The command or item of that name or alias.
pub fn find(commands: &'static [Command], name: &str) -> Option<&'static Command> {
    commands
        .iter()
        .find(|command| command.names().any(|known| known == name))
}

/// Whether QEMU has a command (or, after `info `, an item) of that name which this version lacks.
pub fn is_not_built(name: &str) -> bool {
    match name.strip_prefix("info ") {
        Some(item) => NOT_BUILT_ITEMS.contains(&item),
        None => NOT_BUILT.contains(&name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_by_name_and_alias_only() {
        assert_eq!(
            find(COMMANDS, "?").map(|command| command.name),
            Some("help")
        );
        assert_eq!(
            find(COMMANDS, "q").map(Command::spelling).as_deref(),
            Some("quit|q")
        );
        assert!(find(COMMANDS, "qui").is_none());
        assert!(find(ITEMS, "migrate").is_some());
    }

    #[test]
    fn the_committed_table_is_accepted() {
        let table = check::read(include_str!("../../commands.toml")).expect("a good table");
        assert_eq!(table.commands.len(), COMMANDS.len());
        assert_eq!(table.items.len(), ITEMS.len());
    }

    #[test]
    fn knows_what_is_not_built() {
        assert!(is_not_built("gpa2hpa"));
        assert!(is_not_built("info lapic"));
        assert!(!is_not_built("info gpa2hpa"));
        assert!(!is_not_built("stop"));
    }
}
