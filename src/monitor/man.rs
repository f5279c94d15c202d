//! The manual page hmpsh-monitor(7), rendered from the command table.
//!
//! `man/hmpsh-monitor.7` holds what this yields; a test compares them, and rewrites the file when
//! HMPSH_BLESS is set. Only man(7) macros are used.

use super::table::{self, Command};

/// The whole page.
pub fn render() -> String {
    let mut page = HEAD.replace("VERSION", env!("CARGO_PKG_VERSION"));
    page.push_str(".SH COMMANDS\n");
    let mut groups: Vec<&str> = Vec::new();
    for command in table::COMMANDS {
        if !groups.contains(&command.group) {
            groups.push(command.group);
        }
    }
    groups.sort_unstable_by_key(|group| GROUPS.iter().position(|known| known == group));
    for group in groups {
        page.push_str(&format!(".SS {}\n", escaped(group)));
        for command in table::COMMANDS
            .iter()
            .filter(|command| command.group == group)
        {
            entry(&mut page, "", command);
        }
    }
    page.push_str(".SH ITEMS OF INFO\n");
    for item in table::ITEMS {
        entry(&mut page, "info ", item);
    }
    page.push_str(TAIL);
    page
}

fn entry(page: &mut String, prefix: &str, command: &Command) {
    let spelling = escaped(&format!("{prefix}{}", command.spelling()));
    // QEMU repeats the name of some commands before their arguments.
    let params = command
        .params
        .strip_prefix(command.name)
        .unwrap_or(command.params)
        .trim_start();
    if params.is_empty() {
        page.push_str(&format!(".TP\n.B {spelling}\n"));
    } else {
        page.push_str(&format!(
            ".TP\n.BI \"{spelling}\" \" {}\"\n",
            escaped(params)
        ));
    }
    let help = command
        .help
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ");
    let (first, rest) = help.split_at(help.chars().next().map_or(0, char::len_utf8));
    let help = first.to_uppercase() + rest.trim_end_matches('.');
    page.push_str(&format!("{}.\n", escaped(&help)));
    for sentence in command.long.split_inclusive(". ") {
        page.push_str(&format!("{}\n", escaped(sentence.trim())));
    }
}

/// Text as man(7) takes it: nothing in it is a request, a dash is a dash.
fn escaped(text: &str) -> String {
    let text = text
        .replace('\\', "\\e")
        .replace('-', "\\-")
        .replace('"', "\\(dq");
    if text.starts_with(['.', '\'']) {
        format!("\\&{text}")
    } else {
        text
    }
}

/// Sections in the order of the page.
const GROUPS: [&str; 7] = [
    "General",
    "Running",
    "Migration",
    "Inspection",
    "Disks",
    "Character devices",
    "Logging",
];

const HEAD: &str = r#".\" Generated from commands.toml. Do not edit: HMPSH_BLESS=1 cargo test rewrites it.
.TH HMPSH\-MONITOR 7 2026-11-20 "hmpsh VERSION"
.SH NAME
hmpsh\-monitor \- the human monitor of hmpsh
.SH DESCRIPTION
.BR hmpsh (1)
is talked to through monitors: a prompt, a command, an answer.
Commands, their arguments and their answers are those of QEMU's human monitor.
A monitor stands on a terminal, a pipe, a file or a socket; several can be open at a time, each
with its own history, default CPU and named file descriptors.
.SH COMMAND LINES
A line is the name of a command and its arguments, separated by blanks.
Names are not abbreviated.
A word in double quotes can hold blanks and the escapes
.BR \en ,
.BR \er ,
.BR \e\e ,
.B \e'
and
.BR \e\(dq .
Flags come first, each as a word of its own and in the order in which
.B help
shows them.
.PP
Numbers are expressions: decimal, octal with a leading 0, hexadecimal with 0x, characters such as
.BR 'a' ,
registers such as
.BR $rip ,
parentheses, the signs
.BR + ,
.B \-
and
.BR ~ ,
and the operators
.B * / %
(tightest),
.B & | ^
and
.B + \-
(loosest).
.PP
.I /fmt
follows the name of a command: a count, one of
.B x d u o c i
for the notation and one of
.B b h w g
for 1, 2, 4 or 8 bytes.
"#;

const TAIL: &str = r#".SH KEYS
On pipes, files and sockets the line editor knows the arrow keys, Home, End, Delete, Backspace,
Tab (completion) and
.B ^A ^E ^D ^L ^N ^P ^U
and
.BR ^W .
A line holds at most 4095 bytes; 64 lines of history are kept.
A longer line, or one that begins like an HTTP request, ends the connection of a socket.
.PP
On a terminal
.B ^C
clears the line; during a migration it cancels it, and
.B ^Z
goes on without waiting for it.
.B ^D
and the end of input leave the virtual machine running.
.SH SEE ALSO
.BR hmpsh (1)
"#;

#[cfg(test)]
mod tests {
    use super::*;
    use std::{env, fs, path::Path};

    #[test]
    fn the_committed_page_is_the_tables() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("man/hmpsh-monitor.7");
        let page = render();
        if env::var_os("HMPSH_BLESS").is_some() {
            fs::write(&path, &page).expect("man/ can be written");
        }
        let committed = fs::read_to_string(&path).expect("man/hmpsh-monitor.7 is there");
        assert!(
            committed == page,
            "man/hmpsh-monitor.7 is stale: HMPSH_BLESS=1 cargo test man"
        );
    }

    #[test]
    fn every_group_has_its_place() {
        for command in table::COMMANDS {
            assert!(GROUPS.contains(&command.group), "{}", command.group);
        }
    }
}
