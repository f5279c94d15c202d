//! `hmpsh demo`: a live migration between two processes on this machine, explained.
//!
//! It does nothing that an operator could not: it starts hmpsh twice with a monitor on a unix
//! socket, types the commands and shows the answers. What it claims, it has read from them.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const PROMPT: &str = "(qemu) ";
/// No step of the demo takes longer; a step that does has failed.
const PATIENCE: Duration = Duration::from_secs(8);

/// Runs the demonstration; the error says which step failed.
pub fn run(out: &mut dyn Write) -> io::Result<()> {
    let folder = Folder::new()?;
    let started = Instant::now();

    say(
        out,
        "A machine with a guest that checks its own memory starts here, the source.",
    )?;
    let mut source = Side::start(&folder, "source", &[])?;
    let before = source.beacon(out, 3)?;

    say(
        out,
        "A second, empty one waits for it: hmpsh -incoming tcp:127.0.0.1:0",
    )?;
    let mut destination = Side::start(&folder, "destination", &["-incoming", "tcp:127.0.0.1:0"])?;
    let address = destination.listening()?;
    destination.show(out, "info status")?;

    say(
        out,
        "The source is told to move its guest there while it runs.",
    )?;
    let moving = Instant::now();
    source.show(out, &format!("migrate {address}"))?;
    let took = moving.elapsed();
    let statistics = source.ask("info migrate")?;
    expect(&statistics, "Migration status: completed")?;

    say(
        out,
        "The prompt is back: the guest has left, and runs at the destination.",
    )?;
    expect(
        &source.show(out, "info status")?,
        "VM status: paused (postmigrate)",
    )?;
    expect(&destination.show(out, "info status")?, "VM status: running")?;
    let after = destination.beacon(out, 3)?;
    if after <= before {
        return Err(io::Error::other(format!(
            "the guest went from {before} back to {after}"
        )));
    }

    let figure = |name: &str| line_of(&statistics, name).unwrap_or("not known").to_owned();
    say(out, "What it took:")?;
    writeln!(
        out,
        "  total {:?} for the prompt, downtime {}",
        took,
        figure("downtime: ")
    )?;
    writeln!(
        out,
        "  {} of {} of memory on the wire: pages never used are not sent, {} zero, {} sent whole",
        figure("transferred ram: "),
        figure("total ram: "),
        figure("duplicate: "),
        figure("normal: ")
    )?;
    writeln!(
        out,
        "  the guest counted from {before} (source) to {after} (destination), without a fault"
    )?;
    say(
        out,
        &format!(
            "Done in {:.1} s. Try it yourself: README.md.",
            started.elapsed().as_secs_f32()
        ),
    )
}

/// One of the two processes, and a client on its monitor.
struct Side {
    name: &'static str,
    child: Child,
    monitor: UnixStream,
    /// What the guest has printed so far.
    console: String,
}

impl Side {
    fn start(folder: &Folder, name: &'static str, options: &[&str]) -> io::Result<Self> {
        let socket = folder.0.join(format!("{name}.monitor"));
        let mut child = Command::new(std::env::current_exe()?)
            .arg("-monitor")
            .arg(format!("unix:{},server,nowait", socket.display()))
            .args(options)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()?;
        match connect(&socket, &mut child) {
            Ok(monitor) => {
                monitor.set_read_timeout(Some(PATIENCE))?;
                let mut side = Self {
                    name,
                    child,
                    monitor,
                    console: String::new(),
                };
                side.answer()?;
                Ok(side)
            }
            Err(error) => {
                // It may have ended by itself; either way it must not outlive the demo.
                let _ = child.kill();
                let _ = child.wait();
                Err(error)
            }
        }
    }

    /// Types a command and shows both it and the answer, as the operator would see them.
    fn show(&mut self, out: &mut dyn Write, command: &str) -> io::Result<String> {
        let answer = self.ask(command)?;
        writeln!(out, "  {:<11} {PROMPT}{command}", self.name)?;
        for line in answer.lines().filter(|line| !line.is_empty()) {
            writeln!(out, "  {:<11} {line}", "")?;
        }
        Ok(answer)
    }

    fn ask(&mut self, command: &str) -> io::Result<String> {
        self.monitor.write_all(format!("{command}\n").as_bytes())?;
        let text = self.answer()?;
        // The first line is the echo.
        Ok(text
            .split_once("\r\n")
            .map_or(String::new(), |(_, rest)| rest.replace('\r', "\n")))
    }

    /// Everything up to the next prompt.
    fn answer(&mut self) -> io::Result<String> {
        let mut text = Vec::new();
        let mut buffer = [0; 4096];
        while !text.ends_with(PROMPT.as_bytes()) {
            match self.monitor.read(&mut buffer)? {
                0 => return Err(io::Error::other(format!("the {} ended", self.name))),
                n => text.extend_from_slice(&buffer[..n]),
            }
        }
        text.truncate(text.len() - PROMPT.len());
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    /// Waits until the guest has counted `steps` times more, shows that, and returns the count.
    fn beacon(&mut self, out: &mut dyn Write, steps: usize) -> io::Result<u64> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let news = self.ask("ringbuf_read serial0 65536")?;
            self.console.push_str(&news);
            if let Some(fault) = line_of(&self.console, "FAULT") {
                return Err(io::Error::other(format!("the guest reports FAULT{fault}")));
            }
            let counts: Vec<u64> = self.console.lines().filter_map(count_of).collect();
            if counts.len() >= steps {
                let shown: Vec<String> = counts[counts.len() - steps..]
                    .iter()
                    .map(|n| format!("B {n}"))
                    .collect();
                writeln!(
                    out,
                    "  {:<11} the guest says: {}",
                    self.name,
                    shown.join(", ")
                )?;
                return Ok(counts[counts.len() - 1]);
            }
            if Instant::now() > deadline {
                return Err(io::Error::other(format!(
                    "the guest is silent at the {}",
                    self.name
                )));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// The address the destination listens on.
    fn listening(&mut self) -> io::Result<String> {
        let text = self.ask("info migrate")?;
        text.lines()
            .map(str::trim)
            .find(|line| line.starts_with("tcp:"))
            .map(str::to_owned)
            .ok_or_else(|| io::Error::other("the destination does not listen"))
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        // The demo's machines end with it, whatever state they are in.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A private folder for the sockets, removed at the end.
struct Folder(PathBuf);

impl Folder {
    fn new() -> io::Result<Self> {
        use std::os::unix::fs::DirBuilderExt;
        let path = std::env::temp_dir().join(format!("hmpsh-demo-{}", std::process::id()));
        std::fs::DirBuilder::new().mode(0o700).create(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // Left-over sockets in a temporary folder harm nobody.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn connect(socket: &Path, child: &mut Child) -> io::Result<UnixStream> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return Ok(stream),
            Err(error) if Instant::now() > deadline => return Err(error),
            Err(_) => {}
        }
        if let Some(status) = child.try_wait()? {
            return Err(io::Error::other(format!(
                "hmpsh ended at its start: {status}"
            )));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn say(out: &mut dyn Write, text: &str) -> io::Result<()> {
    writeln!(out, "\n{text}")
}

fn expect(text: &str, wanted: &str) -> io::Result<()> {
    if text.contains(wanted) {
        return Ok(());
    }
    Err(io::Error::other(format!(
        "expected '{wanted}', read: {}",
        text.trim()
    )))
}

/// What follows `name` on the line that starts with it.
fn line_of<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines()
        .find_map(|line| line.strip_prefix(name))
        .map(str::trim)
}

/// The count of a beacon line, `B <n>`.
fn count_of(line: &str) -> Option<u64> {
    line.trim().strip_prefix("B ")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beacons_are_counted_and_other_lines_are_not() {
        assert_eq!(count_of("B 17\r"), Some(17));
        assert_eq!(count_of("FAULT page 3"), None);
        assert_eq!(count_of("B x"), None);
    }

    #[test]
    fn a_figure_is_read_from_its_line() {
        let text = "total time: 5 ms\ndowntime: 3 ms\n";
        assert_eq!(line_of(text, "downtime: "), Some("3 ms"));
        assert_eq!(line_of(text, "setup: "), None);
    }
}
