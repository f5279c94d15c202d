//! The line editor of monitors that are no terminals of ours: pipes, files, sockets.
//!
//! Every key redraws the line in the bytes that QEMU's editor uses, since scripts read them as
//! echo. Bytes in, bytes out; it knows nothing of commands. Beyond 7.2 it has 10.0's ^N ^P ^U,
//! and takes ESC[H and ESC[F for Home and End, which is what terminals send. QEMU:
//! `util/readline.c`.

use super::complete::Candidates;
use super::history::History;

/// The state of one line being edited.
pub struct Readline {
    prompt: String,
    history: History,
    /// Index into the history while one of its lines is shown.
    recalled: Option<usize>,
    line: Vec<u8>,
    cursor: usize,
    /// What the other side sees, and where it sees the cursor.
    shown: Vec<u8>,
    shown_cursor: usize,
    escape: Escape,
}

/// What a byte led to.
#[derive(Debug, PartialEq, Eq)]
pub enum Key {
    /// The line changed, or nothing did.
    Edited,
    /// The line is complete; the editor is empty again.
    Line(Vec<u8>),
    /// Candidates are wanted for [`Readline::before_cursor`].
    Complete,
}

/// Progress through an escape sequence.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Escape {
    None,
    Started,
    /// `ESC [` and the number so far.
    Control(u32),
    /// `ESC O`.
    Single,
}

impl Readline {
    /// An empty line.
    pub fn new(prompt: &str, history: History) -> Self {
        Self {
            prompt: prompt.to_owned(),
            history,
            recalled: None,
            line: Vec::new(),
            cursor: 0,
            shown: Vec::new(),
            shown_cursor: 0,
            escape: Escape::None,
        }
    }

    /// Takes one byte of input; what the other side is to see is added to `out`.
    pub fn feed(&mut self, byte: u8, out: &mut Vec<u8>) -> Key {
        let key = match self.escape {
            Escape::None => self.key(byte, out),
            Escape::Started => {
                self.escape = match byte {
                    b'[' => Escape::Control(0),
                    b'O' => Escape::Single,
                    _ => Escape::None,
                };
                Key::Edited
            }
            Escape::Control(number) => {
                self.control(byte, number);
                Key::Edited
            }
            Escape::Single => {
                match byte {
                    b'H' => self.cursor = 0,
                    b'F' => self.cursor = self.line.len(),
                    _ => (),
                }
                self.escape = Escape::None;
                Key::Edited
            }
        };
        if key == Key::Edited {
            self.redraw(out);
        }
        key
    }

    /// Shows the prompt, and the line typed so far behind it.
    pub fn show_prompt(&mut self, out: &mut Vec<u8>) {
        out.extend_from_slice(self.prompt.as_bytes());
        self.shown.clear();
        self.shown_cursor = 0;
        self.escape = Escape::None;
        self.redraw(out);
    }

    /// Forgets the line being edited, as when a client went away; the history stays.
    pub fn reset(&mut self) {
        self.line.clear();
        self.cursor = 0;
        self.shown.clear();
        self.shown_cursor = 0;
        self.recalled = None;
        self.escape = Escape::None;
    }

    /// The line up to the cursor.
    pub fn before_cursor(&self) -> &[u8] {
        &self.line[..self.cursor]
    }

    /// Number of bytes in the line.
    pub fn len(&self) -> usize {
        self.line.len()
    }

    /// Whether nothing is typed.
    pub fn is_empty(&self) -> bool {
        self.line.is_empty()
    }

    /// Answers [`Key::Complete`]: one candidate is inserted, several are listed and their common
    /// beginning is inserted.
    pub fn complete(&mut self, candidates: &Candidates, out: &mut Vec<u8>) {
        let words = &candidates.words;
        if let Some(first) = words.first() {
            let common = words.iter().skip(1).fold(first.len(), |common, word| {
                let same = first
                    .bytes()
                    .zip(word.bytes())
                    .take_while(|(one, other)| one == other);
                common.min(same.count())
            });
            // The common beginning may end within a character: that is how bytes are edited here.
            for byte in first.as_bytes().iter().take(common).skip(candidates.typed) {
                self.insert(*byte);
            }
            if words.len() > 1 {
                columns(words, out);
                self.show_prompt(out);
            } else if !first.is_empty() && !first.ends_with(['/', ':']) {
                self.insert(b' ');
            }
        }
        self.redraw(out);
    }

    fn key(&mut self, byte: u8, out: &mut Vec<u8>) -> Key {
        match byte {
            CTRL_A => self.cursor = 0,
            CTRL_D => self.delete(),
            CTRL_E => self.cursor = self.line.len(),
            b'\t' => return Key::Complete,
            b'\n' | b'\r' => {
                let line = std::mem::take(&mut self.line);
                self.history.add(&String::from_utf8_lossy(&line));
                self.reset();
                out.extend_from_slice(b"\r\n");
                return Key::Line(line);
            }
            CTRL_L => {
                out.extend_from_slice(b"\x1b[2J\x1b[1;1H");
                self.show_prompt(out);
            }
            CTRL_N => self.newer(),
            CTRL_P => self.older(),
            CTRL_U => {
                self.line.drain(..self.cursor);
                self.cursor = 0;
            }
            CTRL_W => self.delete_word(),
            ESC => self.escape = Escape::Started,
            BACKSPACE | DELETE if self.cursor > 0 => {
                self.cursor -= 1;
                self.delete();
            }
            CSI => self.escape = Escape::Control(0),
            b' '..DELETE | 128.. => self.insert(byte),
            _ => (),
        }
        Key::Edited
    }

    fn control(&mut self, byte: u8, number: u32) {
        self.escape = Escape::None;
        match byte {
            b'A' => self.older(),
            b'B' | b'E' => self.newer(),
            b'C' => self.cursor = self.line.len().min(self.cursor + 1),
            b'D' => self.cursor = self.cursor.saturating_sub(1),
            b'H' => self.cursor = 0,
            b'F' => self.cursor = self.line.len(),
            b'0'..=b'9' => {
                let digit = u32::from(byte - b'0');
                self.escape = Escape::Control(number.saturating_mul(10).saturating_add(digit));
            }
            b'~' => match number {
                1 => self.cursor = 0,
                3 => self.delete(),
                4 => self.cursor = self.line.len(),
                _ => (),
            },
            _ => (),
        }
    }

    fn insert(&mut self, byte: u8) {
        if self.line.len() < LINE_LIMIT {
            self.line.insert(self.cursor, byte);
            self.cursor += 1;
        }
    }

    fn delete(&mut self) {
        if self.cursor < self.line.len() {
            self.line.remove(self.cursor);
        }
    }

    /// Deletes the blanks before the cursor and the word before them.
    fn delete_word(&mut self) {
        let before = &self.line[..self.cursor];
        let end = before
            .iter()
            .rposition(|byte| !is_space(*byte))
            .unwrap_or(0);
        let start = before[..end]
            .iter()
            .rposition(|byte| is_space(*byte))
            .map_or(0, |at| at + 1);
        self.line.drain(start..self.cursor);
        self.cursor = start;
    }

    fn older(&mut self) {
        let newest = self.history.len();
        if let Some(index) = self.recalled.unwrap_or(newest).min(newest).checked_sub(1) {
            self.recall(index);
        }
    }

    fn newer(&mut self) {
        if let Some(index) = self.recalled {
            if index + 1 < self.history.len() {
                self.recall(index + 1);
            } else {
                self.recalled = None;
                self.line.clear();
                self.cursor = 0;
            }
        }
    }

    fn recall(&mut self, index: usize) {
        if let Some(line) = self.history.line(index) {
            self.recalled = Some(index);
            self.line = line.into_bytes();
            self.cursor = self.line.len();
        }
    }

    /// Brings what the other side sees in line with what is: back to the start of the line, all of
    /// it again, and the cursor to its place.
    fn redraw(&mut self, out: &mut Vec<u8>) {
        if self.line != self.shown {
            repeat(out, LEFT, self.shown_cursor);
            out.extend_from_slice(&self.line);
            out.extend_from_slice(b"\x1b[K");
            self.shown.clone_from(&self.line);
            self.shown_cursor = self.line.len();
        }
        repeat(out, LEFT, self.shown_cursor.saturating_sub(self.cursor));
        repeat(out, RIGHT, self.cursor.saturating_sub(self.shown_cursor));
        self.shown_cursor = self.cursor;
    }
}

/// Lists words in columns on 80 columns.
fn columns(words: &[String], out: &mut Vec<u8>) {
    out.extend_from_slice(b"\r\n");
    let longest = words.iter().map(String::len).max().unwrap_or(0);
    let width = (longest + 2).clamp(10, SCREEN);
    for row in words.chunks(SCREEN / width) {
        for word in row {
            out.extend_from_slice(format!("{word:width$}").as_bytes());
        }
        out.extend_from_slice(b"\r\n");
    }
}

fn repeat(out: &mut Vec<u8>, what: &[u8], times: usize) {
    for _ in 0..times {
        out.extend_from_slice(what);
    }
}

fn is_space(byte: u8) -> bool {
    byte.is_ascii_whitespace() || byte == 0x0b
}

/// Bytes a line can hold; what is typed beyond is dropped.
pub const LINE_LIMIT: usize = 4095;

const SCREEN: usize = 80;
const LEFT: &[u8] = b"\x1b[D";
const RIGHT: &[u8] = b"\x1b[C";
const CTRL_A: u8 = 1;
const CTRL_D: u8 = 4;
const CTRL_E: u8 = 5;
const BACKSPACE: u8 = 8;
const CTRL_L: u8 = 12;
const CTRL_N: u8 = 14;
const CTRL_P: u8 = 16;
const CTRL_U: u8 = 21;
const CTRL_W: u8 = 23;
const ESC: u8 = 27;
const DELETE: u8 = 127;
const CSI: u8 = 155;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// One line of a terminal, and nothing but what the editor sends to it.
    #[derive(Default)]
    struct Screen {
        cells: Vec<u8>,
        cursor: usize,
    }

    impl Screen {
        fn show(&mut self, mut bytes: &[u8]) {
            while let Some((first, rest)) = bytes.split_first() {
                bytes = rest;
                if *first != ESC {
                    match self.cells.get_mut(self.cursor) {
                        Some(cell) => *cell = *first,
                        None => self.cells.push(*first),
                    }
                    self.cursor += 1;
                    continue;
                }
                let (sequence, rest) = bytes.split_at(2);
                match sequence {
                    b"[D" => self.cursor -= 1,
                    b"[C" => self.cursor += 1,
                    b"[K" => self.cells.truncate(self.cursor),
                    other => panic!("unknown sequence {other:?}"),
                }
                bytes = rest;
            }
        }
    }

    /// Keys that edit, and bytes that are none.
    fn keys() -> impl Strategy<Value = Vec<u8>> {
        let key = prop_oneof![
            prop::sample::select(vec![
                b"\x1b[D".to_vec(),
                b"\x1b[C".to_vec(),
                b"\x1b[A".to_vec(),
                b"\x1b[B".to_vec(),
                b"\x1b[H".to_vec(),
                b"\x1b[F".to_vec(),
                b"\x1b[3~".to_vec(),
                b"\x1bOH".to_vec(),
                b"\x01".to_vec(),
                b"\x04".to_vec(),
                b"\x05".to_vec(),
                b"\x08".to_vec(),
                b"\x0e".to_vec(),
                b"\x10".to_vec(),
                b"\x15".to_vec(),
                b"\x17".to_vec(),
                b" ".to_vec(),
                b"ab c".to_vec(),
                b"\n".to_vec(),
            ]),
            any::<u8>().prop_map(|byte| vec![byte]),
        ];
        prop::collection::vec(key, 0..60).prop_map(|keys| keys.concat())
    }

    proptest! {
        /// After every key, what the other side sees is the line, and the cursor is where it is.
        #[test]
        fn the_other_side_sees_the_line(keys in keys()) {
            let mut readline = Readline::new("", History::default());
            let mut screen = Screen::default();
            for byte in keys {
                if byte == b'\t' || byte == CTRL_L {
                    continue;
                }
                let mut out = Vec::new();
                match readline.feed(byte, &mut out) {
                    Key::Line(_) => {
                        prop_assert!(out.ends_with(b"\r\n"));
                        screen = Screen::default();
                    }
                    _ => screen.show(&out),
                }
                prop_assert_eq!(&screen.cells, &readline.line);
                prop_assert_eq!(screen.cursor, readline.cursor);
            }
        }
    }

    #[test]
    fn lists_candidates_in_columns() {
        let mut readline = Readline::new("> ", History::default());
        let mut out = Vec::new();
        for byte in b"x wor" {
            readline.feed(*byte, &mut out);
        }
        out.clear();
        let words = ["world", "worlds"].map(str::to_owned).into();
        readline.complete(&Candidates { typed: 3, words }, &mut out);
        assert_eq!(
            String::from_utf8_lossy(&out),
            "\r\nworld     worlds    \r\n> x world\x1b[K"
        );
        assert_eq!(readline.before_cursor(), b"x world");
        out.clear();
        readline.complete(
            &Candidates {
                typed: 5,
                words: vec!["world/".to_owned()],
            },
            &mut out,
        );
        assert_eq!(readline.before_cursor(), b"x world/");
    }
}
