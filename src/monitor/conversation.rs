//! Line editor, interpreter and prompt as one conversation: bytes in, bytes out.
//!
//! Pure of descriptors and timers: the wire feeds it and does what [`Action`] says. Here is decided
//! when the prompt comes, what is kept while a migration runs in the foreground, and what ends a
//! connection. QEMU: `monitor_read`, `monitor_suspend`, `monitor_event`.

use std::io::Write;
use std::os::fd::OwnedFd;

use super::history::History;
use super::interpreter::Interpreter;
use super::progress::Progress;
use super::readline::{Key, Readline};
use super::session::Outcome;
use crate::migration::stats::Status;

/// What the caller has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing but go on.
    None,
    /// Take no more input, tick each second, and say when the migration has ended.
    Suspend,
    /// Say when the migration has ended.
    Await,
    /// Drop the client.
    HangUp,
}

/// One monitor and its other side.
pub struct Conversation<I> {
    interpreter: I,
    readline: Readline,
    output: Box<dyn Write + Send>,
    banner: String,
    state: State,
    /// Input that came before it was known that no more was wanted.
    kept: Vec<u8>,
    /// Lines of a client that left while its migration ran: executed when that has ended, unseen.
    left: Vec<u8>,
    /// Whether somebody is there to read.
    is_open: bool,
    /// Whether the other side is a client that can be dropped.
    has_clients: bool,
}

/// Whether lines are taken.
enum State {
    Prompting,
    /// A migration runs in the foreground.
    Waiting(Progress),
    /// `quit` was said.
    Ended,
}

impl<I: Interpreter> Conversation<I> {
    /// A conversation that nobody has joined. `output` must take bytes as they are; a client that
    /// can be dropped is dropped when it sends what no operator would.
    pub fn new(
        interpreter: I,
        prompt: &str,
        output: Box<dyn Write + Send>,
        has_clients: bool,
    ) -> Self {
        let readline = Readline::new(prompt, interpreter.history().clone());
        Self {
            interpreter,
            readline,
            output,
            banner: banner(),
            state: State::Prompting,
            kept: Vec::new(),
            left: Vec::new(),
            is_open: false,
            has_clients,
        }
    }

    /// What executes the lines.
    pub fn interpreter(&self) -> &I {
        &self.interpreter
    }

    /// Somebody joined.
    pub fn opened(&mut self) {
        self.is_open = true;
        self.readline.reset();
        let mut out = self.banner.replace('\n', "\r\n").into_bytes();
        if let State::Prompting = self.state {
            self.readline.show_prompt(&mut out);
        }
        self.write(&out);
    }

    /// Somebody left; the session stays as it is. A migration that was waited for goes on, and
    /// the next one to join gets a prompt at once.
    pub fn closed(&mut self) {
        self.is_open = false;
        self.readline.reset();
        self.interpreter.disown();
        let kept = std::mem::take(&mut self.kept);
        if let State::Waiting(_) = self.state {
            self.state = State::Prompting;
            let complete = kept.iter().rposition(|byte| matches!(byte, b'\n' | b'\r'));
            let complete = &kept[..complete.map_or(0, |last| last + 1)];
            let room = KEPT_LIMIT.saturating_sub(self.left.len());
            self.left
                .extend_from_slice(&complete[..complete.len().min(room)]);
        }
    }

    /// Executes what a client that left had typed ahead. To be called when a migration has ended,
    /// whether it is waited for or not.
    pub fn catch_up(&mut self) -> Action {
        let left = std::mem::take(&mut self.left);
        let mut readline = Readline::new("", History::default());
        for (index, byte) in left.iter().enumerate() {
            let Key::Line(line) = readline.feed(*byte, &mut Vec::new()) else {
                continue;
            };
            self.interpreter.mute(true);
            let outcome = self.interpreter.execute(&String::from_utf8_lossy(&line));
            self.interpreter.mute(false);
            match outcome {
                Outcome::Done | Outcome::Failed => (),
                Outcome::Suspended => {
                    self.left = left[index + 1..].to_vec();
                    return Action::Await;
                }
                Outcome::Quit => {
                    self.state = State::Ended;
                    return Action::None;
                }
            }
        }
        Action::None
    }

    /// Input.
    pub fn input(&mut self, bytes: &[u8], fds: Vec<OwnedFd>) -> Action {
        self.interpreter.accept(fds);
        if !self.is_open {
            return Action::None;
        }
        if let State::Prompting = self.state {
            self.take(bytes)
        } else {
            self.keep(bytes);
            Action::None
        }
    }

    /// A second of waiting has passed.
    pub fn tick(&mut self) {
        let percent = self.interpreter.migration().percent();
        if let State::Waiting(progress) = &mut self.state {
            let text = progress.tick(percent);
            self.write(text.as_bytes());
        }
    }

    /// Whether no lines are taken because a migration is waited for.
    pub fn is_waiting(&self) -> bool {
        matches!(self.state, State::Waiting(_))
    }

    /// The migration has ended, or needs the operator: the prompt comes back, and input that was
    /// kept is taken.
    pub fn resume(&mut self) -> Action {
        let State::Waiting(progress) = std::mem::replace(&mut self.state, State::Prompting) else {
            return Action::None;
        };
        // The last progress line belongs before the conclusion, and needs to know how it ended.
        let is_completed = self.interpreter.migration().status == Status::Completed;
        let text = progress.end(is_completed).replace('\n', "\r\n");
        self.write(text.as_bytes());
        self.interpreter.conclude();
        let mut out = Vec::new();
        self.readline.show_prompt(&mut out);
        self.write(&out);
        let kept = std::mem::take(&mut self.kept);
        self.take(&kept)
    }

    fn take(&mut self, bytes: &[u8]) -> Action {
        let mut out = Vec::new();
        for (index, byte) in bytes.iter().enumerate() {
            // Each key draws the line anew: a long line is many times its length.
            if out.len() > PIECE {
                self.write(&out);
                out.clear();
            }
            match self.readline.feed(*byte, &mut out) {
                Key::Edited => (),
                Key::Complete => {
                    let line = String::from_utf8_lossy(self.readline.before_cursor()).into_owned();
                    let candidates = self.interpreter.complete(&line);
                    self.readline.complete(&candidates, &mut out);
                }
                Key::Line(line) => {
                    self.write(&out);
                    out.clear();
                    let line = String::from_utf8_lossy(&line).into_owned();
                    if self.has_clients && is_http(&line) {
                        return self.hang_up();
                    }
                    match self.interpreter.execute(&line) {
                        Outcome::Done | Outcome::Failed => self.readline.show_prompt(&mut out),
                        Outcome::Suspended => {
                            self.state = State::Waiting(Progress::default());
                            self.keep(&bytes[index + 1..]);
                            return Action::Suspend;
                        }
                        Outcome::Quit => {
                            self.state = State::Ended;
                            return Action::None;
                        }
                    }
                }
            }
        }
        self.write(&out);
        Action::None
    }

    /// What the client sent before it is gone is not looked at any more.
    fn hang_up(&mut self) -> Action {
        self.closed();
        Action::HangUp
    }

    fn keep(&mut self, bytes: &[u8]) {
        let room = KEPT_LIMIT.saturating_sub(self.kept.len());
        self.kept.extend_from_slice(&bytes[..bytes.len().min(room)]);
    }

    fn write(&mut self, bytes: &[u8]) {
        if self.is_open && !bytes.is_empty() {
            // Whoever does not read has left, and closed() will say so.
            let _ = self.output.write_all(bytes);
        }
    }
}

/// What a monitor says first.
pub fn banner() -> String {
    format!(
        "hmpsh {} monitor - type 'help' for more information\n",
        env!("CARGO_PKG_VERSION")
    )
}

/// Whether a line can only come from something that speaks HTTP: a web page made a browser send
/// its request here, and the next lines would be commands.
fn is_http(line: &str) -> bool {
    HTTP.iter().any(|word| {
        line.get(..word.len())
            .is_some_and(|start| start.eq_ignore_ascii_case(word))
    })
}

/// How requests and their header lines begin.
const HTTP: [&str; 10] = [
    "GET ", "POST ", "PUT ", "HEAD ", "DELETE ", "OPTIONS ", "PATCH ", "CONNECT ", "TRACE ",
    "Host:",
];

/// Bytes of echo gathered before they are written.
const PIECE: usize = 16 * 1024;

/// Bytes of input kept while waiting; more stays with the device, which is told to stop reading.
const KEPT_LIMIT: usize = 64 * 1024;

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::{Arc, Mutex, PoisonError};

    use super::*;
    use crate::migration::stats::{RamStats, Snapshot};
    use crate::monitor::args::{Sticky, tests::answer};
    use crate::monitor::complete::{Candidates, complete, tests::Known};
    use crate::monitor::interpreter::Ended;
    use crate::monitor::readline::LINE_LIMIT;
    use crate::vm::memory::PAGE_SIZE;

    /// What the other side has received.
    #[derive(Clone, Default)]
    struct Seen(Arc<Mutex<Vec<u8>>>);

    impl Seen {
        fn take(&self) -> Vec<u8> {
            std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
        }

        fn text(&self) -> String {
            String::from_utf8_lossy(&self.take()).into_owned()
        }
    }

    impl Write for Seen {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// Answers as a session does where no machine is needed.
    struct Script {
        seen: Seen,
        sticky: Sticky,
        history: History,
        percent: Arc<Mutex<u8>>,
        is_muted: bool,
        executed: Vec<String>,
    }

    impl Interpreter for Script {
        fn execute(&mut self, line: &str) -> Outcome {
            self.executed.push(line.to_owned());
            let words: Vec<_> = line.split_whitespace().collect();
            match words[..] {
                ["migrate", ..] if words.len() > 1 => Outcome::Suspended,
                ["quit"] => Outcome::Quit,
                _ => {
                    let text = answer(line, &mut self.sticky).replace('\n', "\r\n");
                    if !self.is_muted {
                        let _ = self.seen.write(text.as_bytes());
                    }
                    Outcome::Done
                }
            }
        }

        fn mute(&mut self, is_muted: bool) {
            self.is_muted = is_muted;
        }

        fn complete(&self, line: &str) -> Candidates {
            complete(line, &Known)
        }

        fn hint(&self, _: &str) -> Option<String> {
            None
        }

        fn accept(&mut self, _: Vec<OwnedFd>) {}

        fn disown(&mut self) {}

        fn history(&self) -> &History {
            &self.history
        }

        fn migration(&self) -> Snapshot {
            let percent = *self.percent.lock().unwrap_or_else(PoisonError::into_inner);
            let page = PAGE_SIZE as u64;
            let ram = RamStats {
                total: 100 * page,
                normal: u64::from(percent),
                remaining: (100 - u64::from(percent)) * page,
                ..RamStats::default()
            };
            let status = if percent == 100 {
                Status::Completed
            } else {
                Status::Active
            };
            Snapshot {
                status,
                ram: Some(ram),
                ..Snapshot::default()
            }
        }

        fn cancel(&mut self) -> Option<String> {
            None
        }

        fn when_migration_ends(&self, _: Ended) {}

        fn conclude(&mut self) -> bool {
            let is_completed = self.migration().status == Status::Completed;
            if !is_completed {
                let _ = self.seen.write(b"Error: cause\r\n");
            }
            is_completed
        }
    }

    struct Stage {
        conversation: Conversation<Script>,
        seen: Seen,
        percent: Arc<Mutex<u8>>,
    }

    fn stage(has_clients: bool) -> Stage {
        let (seen, percent) = (Seen::default(), Arc::new(Mutex::new(0)));
        let script = Script {
            seen: seen.clone(),
            sticky: Sticky::default(),
            history: History::default(),
            percent: Arc::clone(&percent),
            is_muted: false,
            executed: Vec::new(),
        };
        let mut conversation =
            Conversation::new(script, "(qemu) ", Box::new(seen.clone()), has_clients);
        conversation.opened();
        assert!(
            seen.text()
                .ends_with(" monitor - type 'help' for more information\r\n(qemu) ")
        );
        Stage {
            conversation,
            seen,
            percent,
        }
    }

    impl Stage {
        fn send(&mut self, bytes: &[u8]) -> Action {
            self.conversation.input(bytes, Vec::new())
        }

        fn set_percent(&self, percent: u8) {
            *self.percent.lock().unwrap_or_else(PoisonError::into_inner) = percent;
        }
    }

    /// `\e`, `\n`, `\r`, `\t`, `\\` and `\xNN`.
    fn unescaped(text: &str) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut rest = text.bytes();
        while let Some(byte) = rest.next() {
            if byte != b'\\' {
                bytes.push(byte);
                continue;
            }
            bytes.push(match rest.next() {
                Some(b'e') => 0x1b,
                Some(b'n') => b'\n',
                Some(b'r') => b'\r',
                Some(b't') => b'\t',
                Some(b'\\') => b'\\',
                Some(b'x') => {
                    let digits: String = rest.by_ref().take(2).map(char::from).collect();
                    u8::from_str_radix(&digits, 16).expect("two digits")
                }
                other => panic!("escape {other:?} in {text}"),
            });
        }
        bytes
    }

    fn replay(recording: &str) {
        let mut stage = stage(false);
        let mut lines = recording.lines();
        while let (Some(input), Some(output)) = (lines.next(), lines.next()) {
            let input = input.strip_prefix("in  ").expect("an input");
            let output = unescaped(output.strip_prefix("out ").expect("an output"));
            stage.send(&unescaped(input));
            let got = stage.seen.take();
            assert_eq!(
                String::from_utf8_lossy(&got),
                String::from_utf8_lossy(&output),
                "after {input}"
            );
            assert!(got == output, "after {input}: the bytes differ");
        }
    }

    /// Keys and the bytes that came back, recorded from QEMU over a unix socket.
    #[test]
    fn echoes_as_qemu_7_2() {
        replay(include_str!("golden/readline-7.2.txt"));
    }

    #[test]
    fn echoes_as_qemu_10_0() {
        replay(include_str!("golden/readline-10.0.txt"));
    }

    #[test]
    fn home_and_end_as_terminals_send_them() {
        let mut stage = stage(false);
        stage.send(b"bc\x1b[Ha\x1b[Fd\n");
        assert!(stage.seen.text().contains("unknown command: 'abcd'"));
    }

    #[test]
    fn waits_for_a_migration_and_keeps_what_is_typed() {
        let mut stage = stage(false);
        assert_eq!(stage.send(b"migrate tcp:x\nfoo\n"), Action::Suspend);
        assert!(stage.seen.text().ends_with("migrate tcp:x\x1b[K\r\n"));
        assert_eq!(stage.send(b"ba"), Action::None);
        stage.set_percent(40);
        stage.conversation.tick();
        stage.set_percent(30);
        stage.conversation.tick();
        assert_eq!(stage.seen.text(), "Completed 40 %\rCompleted 40 %\r");
        stage.set_percent(100);
        assert_eq!(stage.conversation.resume(), Action::None);
        let text = stage.seen.text();
        assert!(
            text.starts_with("Completed 100 %\r\r\n(qemu) f\x1b[K"),
            "{text:?}"
        );
        assert!(
            text.ends_with("unknown command: 'foo'\r\n(qemu) b\x1b[K\x1b[Dba\x1b[K"),
            "{text:?}"
        );
    }

    #[test]
    fn a_short_or_failed_migration() {
        let mut stage = stage(false);
        assert_eq!(stage.send(b"migrate tcp:x\n"), Action::Suspend);
        stage.seen.take();
        assert_eq!(stage.conversation.resume(), Action::None);
        assert_eq!(stage.seen.text(), "Error: cause\r\n(qemu) ");
        assert_eq!(stage.conversation.resume(), Action::None);
        assert_eq!(stage.seen.text(), "");
        stage.send(b"migrate tcp:x\nmigrate tcp:y\n");
        stage.seen.take();
        stage.conversation.tick();
        assert_eq!(
            stage.conversation.resume(),
            Action::Suspend,
            "the second was typed ahead"
        );
        assert!(
            stage
                .seen
                .text()
                .starts_with("Completed 0 %\r\r\nError: cause\r\n(qemu) ")
        );
    }

    #[test]
    fn survives_reconnects() {
        let mut stage = stage(true);
        stage.send(b"foo\nhalf a li");
        stage.conversation.closed();
        stage.seen.take();
        stage.send(b"nobody is there\n");
        assert_eq!(stage.seen.text(), "");
        stage.conversation.opened();
        assert!(stage.seen.text().ends_with("information\r\n(qemu) "));
        stage.send(b"\x1b[A");
        assert_eq!(stage.seen.text(), "foo\x1b[K");
    }

    #[test]
    fn a_client_that_leaves_in_a_migration_leaves_a_prompt_and_its_lines() {
        let mut stage = stage(true);
        stage.send(b"migrate tcp:x\n");
        stage.send(b"foo\nmigrate tcp:y\nbar\nhalf a li");
        assert!(stage.conversation.is_waiting());
        stage.conversation.closed();
        stage.seen.take();
        stage.conversation.opened();
        assert!(stage.seen.text().ends_with("information\r\n(qemu) "));
        stage.send(b"ne");
        stage.seen.take();
        stage.conversation.tick();
        assert_eq!(stage.conversation.resume(), Action::None);
        assert_eq!(stage.conversation.catch_up(), Action::Await);
        assert_eq!(stage.conversation.catch_up(), Action::None);
        assert_eq!(stage.conversation.catch_up(), Action::None);
        assert_eq!(stage.seen.text(), "", "nobody is told");
        stage.send(b"w\n");
        assert!(
            stage
                .seen
                .text()
                .ends_with("unknown command: 'new'\r\n(qemu) ")
        );
        assert_eq!(
            stage.conversation.interpreter.executed,
            ["migrate tcp:x", "foo", "migrate tcp:y", "bar", "new"]
        );
    }

    #[test]
    fn quit_shows_no_prompt() {
        let mut stage = stage(false);
        assert_eq!(stage.send(b"quit\nfoo\n"), Action::None);
        stage.send(b"foo\n");
        let text = stage.seen.text();
        assert!(text.ends_with("quit\x1b[K\r\n"), "{text:?}");
    }

    #[test]
    fn drops_clients_that_are_no_operators() {
        for line in ["GET / HTTP/1.1\r\nquit\r\n", "post /x\n", "host: x\n"] {
            let mut stage = stage(true);
            assert_eq!(stage.send(line.as_bytes()), Action::HangUp, "{line}");
            stage.seen.take();
            stage.send(b"foo\n");
            assert_eq!(stage.seen.text(), "");
        }
        let mut pipe = stage(false);
        assert_eq!(pipe.send(b"GET /\n"), Action::None);
        assert!(pipe.seen.text().contains("unknown command: 'GET'"));
    }

    /// As QEMU: what does not fit is not taken, and the session goes on.
    #[test]
    fn a_long_line_is_cut_off() {
        for has_clients in [true, false] {
            let mut stage = stage(has_clients);
            assert_eq!(stage.send(&[b'y'; LINE_LIMIT + 10]), Action::None);
            stage.send(b"\n");
            let text = stage.seen.text();
            assert!(text.ends_with(&format!("'{}'\r\n(qemu) ", "y".repeat(LINE_LIMIT))));
        }
    }
}
