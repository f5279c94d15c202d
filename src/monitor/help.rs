//! What `help` says, from the table alone.
//!
//! QEMU: `help_cmd` in `monitor/hmp.c`.

use super::args::words;
use super::table::{self, Command};

/// Lines for every command: the answer to `help` without an argument.
pub fn all() -> String {
    list("", table::COMMANDS)
}

/// Lines for every item of a command: the answer to `help info` and to `info` alone.
pub fn items(command: &Command) -> String {
    list(&format!("{} ", command.name), command.items)
}

/// The answer to `help WORDS`; an error text if there is no such command. Words after a command
/// that has no items do not matter.
pub fn topic(text: &str) -> Result<String, String> {
    let mut commands = table::COMMANDS;
    let mut prefix = String::new();
    let Some(words) = words(text) else {
        return Err("unterminated string".to_owned());
    };
    for word in words {
        let Some(command) = table::find(commands, &word) else {
            return Err(format!("unknown command: '{prefix}{word}'"));
        };
        if command.items.is_empty() {
            return Ok(line(&prefix, command));
        }
        prefix.push_str(&word);
        prefix.push(' ');
        commands = command.items;
    }
    Ok(list(&prefix, commands))
}

fn list(prefix: &str, commands: &[Command]) -> String {
    commands
        .iter()
        .map(|command| line(prefix, command))
        .collect()
}

fn line(prefix: &str, command: &Command) -> String {
    format!(
        "{prefix}{} {} -- {}\n",
        command.spelling(),
        command.params,
        command.help
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn topics() {
        assert_eq!(
            topic("quit").as_deref(),
            Ok("quit|q  -- quit the emulator\n")
        );
        assert_eq!(
            topic("q x").as_deref(),
            Ok("quit|q  -- quit the emulator\n")
        );
        assert_eq!(
            topic(" info  status extra").as_deref(),
            Ok("info status  -- show the current VM status (running|paused)\n")
        );
        assert_eq!(topic("foo bar"), Err("unknown command: 'foo'".to_owned()));
        assert_eq!(
            topic("info foo bar"),
            Err("unknown command: 'info foo'".to_owned())
        );
        assert_eq!(topic("").ok(), Some(all()));
        let info = table::find(table::COMMANDS, "info").expect("info");
        assert_eq!(topic("info").ok(), Some(items(info)));
    }

    /// Recorded from QEMU 7.2: one answer for each command and item, but for what is ours.
    #[test]
    fn lines_as_qemu_prints_them() {
        let ours = ["help", "info", "log", "cont", "version", "dirty-bitmaps"];
        let is_ours = |name: &str| ours.contains(&name) || name.starts_with("block_dirty_bitmap_");
        let (mut got, mut count) = (String::new(), 0);
        let all = [("", table::COMMANDS), ("info ", table::ITEMS)];
        for (prefix, commands) in all {
            for command in commands.iter().filter(|command| !is_ours(command.name)) {
                got.push_str(&line(prefix, command));
                count += 1;
            }
        }
        let recorded: String = include_str!("golden/help.txt").to_owned();
        assert_eq!(got, recorded);
        assert!(count > 35);
    }

    #[test]
    fn every_command_has_its_line() {
        let text = all();
        for command in table::COMMANDS {
            assert!(
                text.contains(&format!("{} ", command.spelling())),
                "{}",
                command.name
            );
        }
        assert!(
            text.lines()
                .next()
                .is_some_and(|line| line.starts_with("block_dirty_bitmap_add "))
        );
    }
}
