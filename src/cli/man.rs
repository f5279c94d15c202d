//! The option table as a reader sees it: `-help` and the man page `hmpsh.1`.

use std::fmt::Write;

use super::table::{OPTIONS, Row};

/// What `-help` prints.
pub(super) fn help() -> String {
    let mut text = format!(
        "hmpsh version {}\n\
         usage: hmpsh [options]\n       hmpsh demo\n\n",
        env!("CARGO_PKG_VERSION")
    );
    for row in OPTIONS {
        let left = synopsis(row);
        // A String takes everything.
        let _ = if left.len() < COLUMN {
            writeln!(text, "{left:COLUMN$}{}", row.help)
        } else {
            writeln!(text, "{left}\n{:COLUMN$}{}", "", row.help)
        };
    }
    text.push_str(
        "\ndemo moves a guest between two hmpsh on this machine and explains it.\n\
         Options are spelled as QEMU's; --option is the same as -option.\n",
    );
    text
}

/// Where the explanations of `-help` begin.
const COLUMN: usize = 24;

/// `-machine or -M microvm…`.
fn synopsis(row: &Row) -> String {
    let names: Vec<String> = row.names.iter().map(|name| format!("-{name}")).collect();
    let names = names.join(" or ");
    match row.argument {
        Some(argument) => format!("{names} {argument}"),
        None => names,
    }
}

/// The man page, in roff.
#[cfg(test)]
fn page() -> String {
    let mut page = String::from(HEAD);
    for row in OPTIONS {
        let names: Vec<String> = row
            .names
            .iter()
            .map(|name| format!("\\fB\\-{}\\fR", roff(name)))
            .collect();
        let argument = row.argument.map_or(String::new(), |argument| {
            format!(" \\fI{}\\fR", roff(argument))
        });
        let _ = writeln!(page, ".TP\n{}{argument}", names.join(", "));
        let _ = writeln!(page, "{}.", roff(&capital(row.help)));
        if !row.text.is_empty() {
            let _ = writeln!(page, "{}", roff(row.text));
        }
    }
    page + TAIL
}

#[cfg(test)]
fn capital(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or(String::new(), |first| {
        first.to_uppercase().chain(letters).collect()
    })
}

/// Text that roff leaves alone.
#[cfg(test)]
fn roff(text: &str) -> String {
    let text = text
        .replace('\\', "\\e")
        .replace('-', "\\-")
        .replace('\'', "\\(aq");
    if text.starts_with('.') {
        format!("\\&{text}")
    } else {
        text
    }
}

#[cfg(test)]
const HEAD: &str = r#".\" Written by the test of src/cli/man.rs from the option table; do not edit.
.TH HMPSH 1 2026-11-20 "hmpsh" "User Commands"
.SH NAME
hmpsh \- a human monitor with a KVM machine and live migration that QEMU understands
.SH SYNOPSIS
.B hmpsh
.RI [ options ]
.br
.B hmpsh demo
.SH DESCRIPTION
.B hmpsh
runs one virtual machine of QEMU's
.I microvm
kind under KVM and lets an operator talk to it through QEMU's human monitor protocol.
A running guest can be moved to another
.B hmpsh
or to a stock QEMU, and back, over tcp, unix sockets, commands, descriptors and files.
.PP
.B hmpsh demo
does that between two processes on this machine and explains what it shows.
.PP
Options are spelled as QEMU's.
.BI \-\- option
is the same as
.BI \- option\fR.
What QEMU has and this version has not is refused by name.
Sizes take the suffixes B, K, M, G, T, P and E, and fractions.
.SH OPTIONS
"#;

#[cfg(test)]
const TAIL: &str = r#".SH EXIT STATUS
.TP
.B 0
The program ended because it was asked to: by
.BR quit ,
by a signal, or by the guest; every command of
.B \-e
and
.B \-script
succeeded; \-help or \-version was given; with
.B \-daemonize
the machine is set up.
.TP
.B 1
Everything else: a bad option, a machine that can not be built, an address that can not be bound,
a command of
.B \-e
or
.B \-script
that failed, an incoming migration that failed where no second one can come.
.SH FILES
.TP
.I $XDG_STATE_HOME/hmpsh/history
What was typed at the terminal's prompt
.RI ( ~/.local/state/hmpsh/history
without the variable).
.TP
.I /dev/kvm
Runs the guest.
.TP
.IR DIR /.hmpsh\- PID \- N .part
A migration to
.BI file: DIR/NAME
while it is under way; it gets its name when it is complete.
.SH ENVIRONMENT
.TP
.B XDG_STATE_HOME
Where the history is kept.
.SH EXAMPLES
Run the built\-in guest with a prompt:
.PP
.RS
hmpsh
.RE
.PP
Wait for a guest on port 4444, and from another prompt send it there:
.PP
.RS
hmpsh \-incoming tcp:0:4444
.br
(qemu) migrate tcp:localhost:4444
.RE
.PP
Save a paused machine to a file and load it again:
.PP
.RS
(qemu) migrate file:/var/tmp/vm
.br
hmpsh \-incoming file:/var/tmp/vm
.RE
.PP
A monitor for scripts on a unix socket:
.PP
.RS
hmpsh \-monitor unix:/run/vm.sock,server,nowait \-daemonize \-pidfile /run/vm.pid
.RE
.SH SEE ALSO
.BR hmpsh\-monitor (7),
.BR qemu (1)
"#;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_man_page_is_what_the_table_yields() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/man/hmpsh.1");
        let page = page();
        if std::env::var_os("HMPSH_BLESS").is_some() {
            std::fs::write(path, &page).unwrap();
        }
        let committed = std::fs::read_to_string(path).unwrap_or_default();
        assert!(
            committed == page,
            "man/hmpsh.1 differs: run this test with HMPSH_BLESS=1"
        );
    }

    #[test]
    fn help_names_every_option_in_eighty_columns() {
        let help = help();
        for row in OPTIONS {
            assert!(help.contains(&synopsis(row)), "{}", row.names[0]);
        }
        for line in help.lines() {
            assert!(line.len() <= 80, "{line}");
        }
    }

    #[test]
    fn roff_text_is_not_taken_for_requests() {
        assert_eq!(roff(".x -y 'z' \\"), "\\&.x \\-y \\(aqz\\(aq \\e");
    }
}
