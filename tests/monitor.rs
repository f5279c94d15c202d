//! Monitors that are no terminals: pipes, unix and tcp sockets, compared byte by byte with what
//! QEMU 7.2 sent (recorded, and live where it is at hand); every command; command lines that are
//! refused.

mod common;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use common::hmp::{Hmp, PROMPT};
use common::need::{Need, qemu, require};
use common::poll;
use common::vmm::Program::{Hmpsh, Qemu7};
use common::vmm::{Setup, Vmm};

/// The other side of a monitor, byte for byte.
struct Wire {
    input: Option<Box<dyn Write>>,
    output: Receiver<Vec<u8>>,
    seen: Vec<u8>,
    /// Closes a socket, which the reader holds open.
    hang_up: Box<dyn Fn()>,
}

impl Drop for Wire {
    fn drop(&mut self) {
        (self.hang_up)();
    }
}

impl Wire {
    fn new(input: impl Write + 'static, mut output: impl Read + Send + 'static) -> Self {
        let (tell, told) = channel();
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = output.read(&mut bytes) {
                if tell.send(bytes[..count].to_vec()).is_err() {
                    return;
                }
            }
        });
        Self {
            input: Some(Box::new(input)),
            output: told,
            seen: Vec::new(),
            hang_up: Box::new(|| ()),
        }
    }

    #[track_caller]
    fn unix(path: &Path) -> Self {
        let socket = poll(PATIENCE, || UnixStream::connect(path).ok()).expect("a unix monitor");
        let other = socket.try_clone().unwrap();
        let mut wire = Self::new(socket.try_clone().unwrap(), socket);
        wire.hang_up = Box::new(move || drop(other.shutdown(Shutdown::Both)));
        wire
    }

    #[track_caller]
    fn tcp(port: u16) -> Self {
        let connect = || TcpStream::connect(("127.0.0.1", port)).ok();
        let socket = poll(PATIENCE, connect).expect("a tcp monitor");
        let other = socket.try_clone().unwrap();
        let mut wire = Self::new(socket.try_clone().unwrap(), socket);
        wire.hang_up = Box::new(move || drop(other.shutdown(Shutdown::Both)));
        wire
    }

    #[track_caller]
    fn send(&mut self, bytes: impl AsRef<[u8]>) {
        let input = self.input.as_mut().expect("not closed");
        input.write_all(bytes.as_ref()).expect("it takes input");
        input.flush().expect("it takes input");
    }

    /// What comes until `is_enough`, or `Err` with what came instead.
    fn receive(
        &mut self,
        patience: Duration,
        is_enough: impl Fn(&[u8]) -> bool,
    ) -> Result<Vec<u8>, Vec<u8>> {
        let end = Instant::now() + patience;
        while !is_enough(&self.seen) {
            let left = end.saturating_duration_since(Instant::now());
            match self.output.recv_timeout(left) {
                Ok(bytes) => self.seen.extend(bytes),
                Err(_) => return Err(std::mem::take(&mut self.seen)),
            }
        }
        Ok(std::mem::take(&mut self.seen))
    }

    /// What comes up to the next prompt and with it, as text.
    #[track_caller]
    fn prompt(&mut self) -> String {
        match self.receive(PATIENCE, |seen| seen.ends_with(PROMPT.as_bytes())) {
            Ok(seen) => text(&seen),
            Err(seen) => panic!("no prompt after {:?}", text(&seen)),
        }
    }

    /// The next `count` bytes, or what came instead in time.
    fn exactly(&mut self, count: usize) -> Vec<u8> {
        self.receive(PATIENCE, |seen| seen.len() >= count)
            .unwrap_or_else(|seen| seen)
    }

    /// What comes in a while.
    fn for_a_while(&mut self, while_: Duration) -> Vec<u8> {
        self.receive(while_, |_| false).unwrap_or_else(|seen| seen)
    }

    /// Sends a line; its answer without the echo, line ends as `\n`.
    #[track_caller]
    fn ask(&mut self, line: &str) -> String {
        self.send(format!("{line}\n"));
        let answer = self.prompt().replace("\r\n", "\n");
        let answer = answer.strip_suffix(PROMPT).unwrap_or(&answer);
        answer
            .split_once('\n')
            .map_or("", |(_, rest)| rest)
            .to_owned()
    }

    /// Whether the other side closes it.
    fn is_closed(&mut self) -> bool {
        let end = Instant::now() + PATIENCE;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match self.output.recv_timeout(left) {
                Ok(bytes) => self.seen.extend(bytes),
                Err(RecvTimeoutError::Disconnected) => return true,
                Err(RecvTimeoutError::Timeout) => return false,
            }
        }
    }
}

/// hmpsh without KVM, with a second monitor on a unix socket of that name in its directory.
struct Machine {
    vmm: Vmm,
    dir: tempfile::TempDir,
}

impl Machine {
    #[track_caller]
    fn start(args: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let monitor = unix_server(&dir.path().join("second"));
        let setup = Setup::new(Hmpsh)
            .accel("none")
            .args(&["-monitor", &monitor]);
        let vmm = setup.args(args).start();
        Self { vmm, dir }
    }

    /// A client of the second monitor.
    #[track_caller]
    fn second(&self) -> Wire {
        Wire::unix(&self.dir.path().join("second"))
    }
}

fn unix_server(path: &Path) -> String {
    format!("unix:{},server=on,wait=off", path.display())
}

/// A port that is free now.
fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

/// hmpsh with its monitor on a pipe.
fn on_a_pipe(args: &[&str]) -> (Child, Wire) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hmpsh"));
    command.args(["-accel", "none"]).args(args);
    piped(command)
}

fn piped(mut command: Command) -> (Child, Wire) {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let wire = Wire::new(child.stdin.take().unwrap(), child.stdout.take().unwrap());
    (child, wire)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn banner() -> String {
    format!(
        "hmpsh {} monitor - type 'help' for more information\r\n(qemu) ",
        env!("CARGO_PKG_VERSION")
    )
}

/// Keys and what came back from QEMU 7.2 over a unix socket.
const KEYS: &str = include_str!("../src/monitor/golden/readline-7.2.txt");

/// Lines and QEMU 7.2's answers, in one session: every argument letter, and what is wrong with it.
const ANSWERS: &str = include_str!("../src/monitor/golden/args.txt");

/// `\e`, `\n`, `\r`, `\t`, `\\` and `\xNN`.
fn unescaped(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match (byte, byte == b'\\') {
            (byte, false) => byte,
            _ => match rest.next() {
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
            },
        });
    }
    bytes
}

/// Recorded input and output in turn.
fn recorded(recording: &str) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut lines = recording.lines();
    let mut pairs = Vec::new();
    while let (Some(input), Some(output)) = (lines.next(), lines.next()) {
        let input = input.strip_prefix("in  ").expect("an input");
        let output = output.strip_prefix("out ").expect("an output");
        pairs.push((unescaped(input), unescaped(output)));
    }
    pairs
}

/// Sends what was recorded and compares what comes back.
#[track_caller]
fn replay(wire: &mut Wire) {
    assert_eq!(wire.prompt(), banner());
    for (input, output) in recorded(KEYS) {
        wire.send(&input);
        let got = wire.exactly(output.len());
        assert_eq!(text(&got), text(&output), "after {:?}", text(&input));
        assert!(got == output, "after {:?}: the bytes differ", text(&input));
    }
}

#[test]
fn a_unix_monitor_echoes_as_qemu() {
    let machine = Machine::start(&[]);
    replay(&mut machine.second());
}

#[test]
fn a_tcp_monitor_echoes_as_qemu() {
    let port = free_port();
    let monitor = format!("tcp:127.0.0.1:{port},server=on,wait=off");
    let _machine = Machine::start(&["-monitor", &monitor]);
    replay(&mut Wire::tcp(port));
}

#[test]
fn a_pipe_echoes_as_qemu_and_its_end_ends_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("second");
    let (mut child, mut wire) = on_a_pipe(&[
        "-monitor",
        "stdio",
        "-monitor",
        &unix_server(&socket),
        "-nodefaults",
    ]);
    replay(&mut wire);
    // Lines beyond the limit of 4095 bytes lose their end, as in QEMU; nothing is dropped here.
    wire.send([b'x'; 5000]);
    wire.send("\n");
    let answer = wire.receive(PATIENCE, |seen| seen.ends_with(b"'\r\n(qemu) "));
    let answer = text(&answer.unwrap_or_else(|seen| panic!("only {} bytes", seen.len())));
    assert!(answer.ends_with(&format!(
        "unknown command: '{}'\r\n(qemu) ",
        "x".repeat(4095)
    )));
    // A line without its end is none, and the end of input does not end the machine.
    wire.send("quit");
    wire.input = None;
    let mut other = Wire::unix(&socket);
    other.prompt();
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(other.ask("info status"), "VM status: paused (prelaunch)\n");
    assert!(child.try_wait().unwrap().is_none());
    other.send("quit\n");
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

/// What a script does that pipes its commands in and reads what comes out.
#[test]
fn a_piped_script_is_executed_to_its_end() {
    let (mut child, mut wire) = on_a_pipe(&["-nodefaults", "-monitor", "stdio"]);
    wire.send("info status\r\nprint/d 6*7\r\nquit\r\n");
    wire.input = None;
    assert!(wire.is_closed());
    let said = text(&wire.seen);
    assert!(said.starts_with(&banner()), "{said:?}");
    // CR and LF are two line ends, as in QEMU.
    assert!(
        said.contains("\r\nVM status: paused (prelaunch)\r\n(qemu) \r\n(qemu) p\x1b[K"),
        "{said:?}"
    );
    assert!(
        said.contains("\r\n42\r\n(qemu) \r\n(qemu) q\x1b[K"),
        "{said:?}"
    );
    assert!(said.ends_with("quit\x1b[K\r\n"), "{said:?}");
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

/// A reader who is slow gets all of it, also what was said last.
#[test]
fn a_slow_reader_of_a_pipe_misses_nothing() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_hmpsh"))
        .args(["-accel", "none", "-nodefaults", "-monitor", "stdio"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    let lines = "help\n".repeat(40);
    input.write_all(lines.as_bytes()).unwrap();
    // By now more was said than a pipe holds.
    std::thread::sleep(Duration::from_millis(500));
    let mut output = Vec::new();
    let mut pipe = child.stdout.take().unwrap();
    input.write_all(b"quit\n").unwrap();
    drop(input);
    pipe.read_to_end(&mut output).unwrap();
    let said = text(&output);
    assert!(said.len() > 1 << 16);
    assert_eq!(said.matches("closefd closefd name --").count(), 40);
    assert!(said.ends_with("quit\x1b[K\r\n"));
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn answers_are_qemus() {
    let machine = Machine::start(&[]);
    let mut wire = machine.second();
    wire.prompt();
    let mut cases = 0;
    for case in ANSWERS.split("> ").skip(1) {
        let (line, expected) = case.split_once('\n').expect("a line");
        let answer = wire.ask(line);
        assert_eq!(without_own(&answer), expected, "{line}");
        cases += 1;
    }
    assert!(cases > 200, "only {cases} cases");
}

/// QEMU prints these texts on its own stdout, where no operator looks.
fn without_own(answer: &str) -> &str {
    let rest = answer
        .strip_prefix("unterminated string\n")
        .or_else(|| answer.strip_prefix("unsupported escape code: '\\q'\n"))
        .or_else(|| answer.strip_prefix("unsupported escape code: '\\t'\n"));
    rest.unwrap_or(answer)
}

/// The same input to a QEMU 7.2 that is here: the same bytes come back.
#[test]
fn a_real_qemu_sends_the_same_bytes() {
    if !require(&[Need::Kvm, Need::Qemu7]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (ours, theirs) = (dir.path().join("ours"), dir.path().join("theirs"));
    let start = |program, path: &Path| {
        let args = ["-S", "-monitor", &unix_server(path)];
        Setup::new(program).args(&args).start()
    };
    let _machines = (start(Hmpsh, &ours), start(Qemu7, &theirs));
    let (mut ours, mut theirs) = (Wire::unix(&ours), Wire::unix(&theirs));
    let (our_banner, their_banner) = (ours.prompt(), theirs.prompt());
    assert_eq!(greeting(&our_banner), greeting(&their_banner));
    for (input, output) in recorded(KEYS) {
        theirs.send(&input);
        ours.send(&input);
        let expected = theirs.exactly(output.len());
        let got = ours.exactly(expected.len());
        assert_eq!(text(&got), text(&expected), "after {:?}", text(&input));
    }
    for line in ANSWERS
        .split("> ")
        .filter_map(|case| Some(case.split_once('\n')?.0))
        .skip(1)
        .chain(ALIKE)
    {
        let (got, expected) = (ours.ask(line), theirs.ask(line));
        assert_eq!(without_own(&got), expected, "{line}");
    }
}

/// A script piped into either gets the same output.
#[test]
fn a_real_qemu_on_a_pipe_sends_the_same_bytes() {
    if !require(&[Need::Qemu7]) {
        return;
    }
    let words = qemu(Need::Qemu7).expect("required");
    let mut stock = Command::new(&words[0]);
    stock.args(&words[1..]).args(["-display", "none"]);
    let said = |mut command: Command, accel: &str, lines: &str| {
        command.args(["-M", "microvm,acpi=off", "-S", "-nodefaults"]);
        command.args(["-accel", accel, "-monitor", "stdio"]);
        let (mut child, mut wire) = piped(command);
        // QEMU looks at its input only when its machine is up.
        let banner = wire.prompt();
        wire.send(lines);
        wire.input = None;
        assert!(wire.is_closed());
        assert_eq!(child.wait().unwrap().code(), Some(0));
        (banner, text(&wire.seen))
    };
    let lines = "info status\r\n\n  stop\nfoo \"bar\"\np 1+1\rhelp quit\ns\x7f\x7fs\nquit\nstop\n";
    let (their_banner, theirs) = said(stock, "tcg", lines);
    let ours = Command::new(env!("CARGO_BIN_EXE_hmpsh"));
    let (our_banner, ours) = said(ours, "none", lines);
    assert_eq!(greeting(&our_banner), greeting(&their_banner));
    assert_eq!(ours, theirs);
}

/// A banner without the program's name and version.
#[track_caller]
fn greeting(banner: &str) -> &str {
    banner.find(" monitor - ").map(|at| &banner[at..]).unwrap()
}

/// Commands whose whole answers are QEMU's too.
const ALIKE: [&str; 27] = [
    "info status",
    "info name",
    "info uuid",
    "info kvm",
    "info registers",
    "info registers -a",
    "x/8xb 0xfffffff0",
    "xp/2xg 0",
    "x/3dw 0x100000",
    "xp/4cb 0xfffffff0",
    "sum 0 4096",
    "sum 0x100000 100",
    "gva2gpa 0x1000",
    "gpa2hva 0x90000000",
    "memory",
    "migrate_cancel",
    "migrate_incoming tcp:127.0.0.1:1",
    "migrate_set_parameter downtime-limit 2000001",
    "migrate_set_parameter max-bandwidth -1",
    "migrate_set_parameter foo 1",
    "migrate_set_parameter downtime-limit x",
    "migrate_set_capability foo on",
    "cpu 7",
    "cpu 0",
    "ringbuf_read foo 1",
    "ringbuf_write foo bar",
    "info history x",
];

#[test]
fn a_session_survives_its_clients() {
    let machine = Machine::start(&[]);
    let mut first = machine.second();
    assert_eq!(first.prompt(), banner());
    assert_eq!(first.ask("print/d 6*7"), "42\n");
    first.send("half a li");
    first.exactly(1);
    // One client at a time: the next one waits, and then starts anew with the history.
    let mut next = machine.second();
    next.send("\x1b[A\n");
    assert_eq!(text(&next.for_a_while(Duration::from_millis(200))), "");
    drop(first);
    let answer = next.receive(PATIENCE, |seen| seen.ends_with(b"\r\n42\r\n(qemu) "));
    let answer = text(&answer.expect("an answer"));
    let recalled = "print/d 6*7\x1b[K\r\n42\r\n(qemu) ";
    assert_eq!(answer, banner() + recalled);
}

#[test]
fn many_lines_may_come_at_once_and_in_pieces() {
    let machine = Machine::start(&[]);
    let mut wire = machine.second();
    wire.prompt();
    wire.send("print/d 1\nprint/d 2\n\n  \nprint/d 3\npri");
    let seen = wire.receive(PATIENCE, |seen| seen.ends_with(b"pri\x1b[K"));
    let seen = text(&seen.expect("the beginning of a line"));
    for answer in [
        "\r\n1\r\n(qemu) ",
        "\r\n2\r\n(qemu) \r\n(qemu) ",
        "\r\n3\r\n(qemu) ",
    ] {
        assert!(seen.contains(answer), "{seen:?}");
    }
    for byte in b"nt/d 4\n" {
        wire.send([*byte]);
    }
    assert!(wire.prompt().ends_with("\r\n4\r\n(qemu) "));
}

/// What no operator sends ends the connection and does nothing else.
#[test]
fn a_browser_is_hung_up_on() {
    let mut machine = Machine::start(&[]);
    for request in [
        "GET / HTTP/1.1\r\nquit\r\n".to_owned(),
        "POST /quit HTTP/1.1\r\nHost: localhost\r\n\r\nquit\r\n".to_owned(),
        "Host: localhost\nquit\n".to_owned(),
    ] {
        let mut wire = machine.second();
        wire.prompt();
        wire.send(&request);
        assert!(wire.is_closed(), "{request}");
        assert!(!text(&wire.seen).contains("unknown command"), "{request}");
    }
    let mut wire = machine.second();
    wire.prompt();
    assert_eq!(wire.ask("info status"), "VM status: paused (prelaunch)\n");
    assert!(machine.vmm.is_alive());
}

/// As in QEMU, where scripts rely on it.
#[test]
fn an_endless_line_is_cut_off_and_the_session_goes_on() {
    let machine = Machine::start(&[]);
    let mut wire = machine.second();
    wire.prompt();
    wire.send(format!("{}\n", "x".repeat(5000)));
    let cut = format!("unknown command: '{}'\r\n(qemu) ", "x".repeat(4095));
    assert!(wire.prompt().ends_with(&cut));
    assert_eq!(wire.ask("info status"), "VM status: paused (prelaunch)\n");
}

/// Takes connections and never says anything.
fn silent_peer() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("tcp:{}", listener.local_addr().unwrap());
    (listener, uri)
}

/// While one monitor waits for a peer that does not answer, another answers at once and cancels.
#[test]
fn a_migration_in_the_foreground_of_a_socket() {
    let mut machine = Machine::start(&[]);
    let (_peer, uri) = silent_peer();
    let mut wire = machine.second();
    wire.prompt();
    let begun = Instant::now();
    wire.send(format!("migrate {uri}\nprint/d 6*7\n"));
    let echo = wire.receive(PATIENCE, |seen| seen.ends_with(b"\x1b[K\r\n"));
    assert!(text(&echo.expect("the echo")).ends_with(&format!("migrate {uri}\x1b[K\r\n")));
    for second in 1..=2 {
        assert_eq!(text(&wire.exactly(14)), "Completed 0 %\r");
        let passed = begun.elapsed().as_secs_f64();
        assert!((passed - f64::from(second)).abs() < 0.5, "{passed} s");
        // Kept as well.
        wire.send("x");
    }
    for command in [
        "info status",
        "info migrate",
        "info migrate_parameters",
        "help",
        "xp/4xw 0",
    ] {
        let begun = Instant::now();
        machine.vmm.command(command);
        let passed = begun.elapsed();
        assert!(passed < Duration::from_millis(200), "{command}: {passed:?}");
    }
    let refused = machine.vmm.command(&format!("migrate {uri}"));
    assert_eq!(refused, "Error: There's a migration process in progress\n");
    let begun = Instant::now();
    machine.vmm.quiet("migrate_cancel");
    let seen = wire.receive(PATIENCE, |seen| {
        seen.ends_with(b"(qemu) x\x1b[K\x1b[Dxx\x1b[K")
    });
    let seen = text(&seen.expect("the prompt comes back"));
    assert!(begun.elapsed() < Duration::from_secs(1));
    let rest = seen.trim_start_matches("Completed 0 %\r");
    assert!(rest.starts_with("\r\n(qemu) p\x1b[K"), "{seen:?}");
    assert!(rest.contains("\r\n42\r\n(qemu) "), "{seen:?}");
    assert_eq!(
        machine.vmm.command("info status"),
        "VM status: paused (prelaunch)\n"
    );
}

/// The migration goes on without the client that began it, and the next client has a prompt at
/// once; what the first had typed ahead is done when the migration has ended.
#[test]
fn a_client_that_leaves_in_a_migration_leaves_a_prompt() {
    let mut machine = Machine::start(&[]);
    let path = machine.dir.path().join("second");
    let (_peer, uri) = silent_peer();
    let mut gone = UnixStream::connect(&path).unwrap();
    gone.write_all(
        format!("migrate {uri}\nmigrate_set_parameter downtime-limit 123\nhalf a li").as_bytes(),
    )
    .unwrap();
    machine.vmm.wait_for("info migrate", "Migration status: ");
    drop(gone);
    let begun = Instant::now();
    let mut next = Wire::unix(&path);
    assert_eq!(next.prompt(), banner());
    assert!(
        begun.elapsed() < Duration::from_millis(500),
        "{:?}",
        begun.elapsed()
    );
    let state = next.ask("info migrate");
    assert!(
        state.contains("Migration status: setup\n") || state.contains("Migration status: active\n"),
        "{state}"
    );
    let parameters = next.ask("info migrate_parameters");
    assert!(
        parameters.contains("downtime-limit: 300 ms\n"),
        "{parameters}"
    );
    next.send("info st");
    next.receive(PATIENCE, |seen| seen.ends_with(b"info st\x1b[K"))
        .expect("the echo");
    machine.vmm.quiet("migrate_cancel");
    machine
        .vmm
        .wait_for("info migrate_parameters", "downtime-limit: 123 ms\n");
    // Nothing of it disturbs who is there now.
    assert_eq!(text(&next.for_a_while(Duration::from_millis(100))), "");
    assert_eq!(next.ask("atus"), "VM status: paused (prelaunch)\n");
}

#[test]
fn a_tcp_client_that_leaves_in_a_migration_is_noticed() {
    let port = free_port();
    let monitor = format!("tcp:127.0.0.1:{port},server=on,wait=off");
    let mut machine = Machine::start(&["-monitor", &monitor]);
    let (_peer, uri) = silent_peer();
    let mut gone = TcpStream::connect(("127.0.0.1", port)).unwrap();
    gone.write_all(format!("migrate {uri}\n").as_bytes())
        .unwrap();
    machine.vmm.wait_for("info migrate", "Migration status: ");
    drop(gone);
    let begun = Instant::now();
    let mut next = Wire::tcp(port);
    assert_eq!(next.prompt(), banner());
    // A peer of tcp is known to be gone when something was sent to it.
    assert!(
        begun.elapsed() < Duration::from_millis(2500),
        "{:?}",
        begun.elapsed()
    );
    let state = next.ask("info migrate");
    assert!(!state.contains("failed"), "{state}");
    next.ask("migrate_cancel");
}

/// `getfd` names what was sent with it, and nothing that somebody else left behind.
#[test]
fn descriptors_nobody_asked_for_are_closed() {
    let mut machine = Machine::start(&[]);
    let (first, second) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
    let hmp = &mut machine.vmm.hmp;
    assert_eq!(hmp.command_with_fd("info name", first.as_fd()), "");
    assert_eq!(hmp.command_with_fd("getfd mine", second.as_fd()), "");
    assert_eq!(hmp.command("migrate fd:mine"), "");
    assert_eq!(first.metadata().unwrap().len(), 0);
    assert!(second.metadata().unwrap().len() > 0);
    let connect = || {
        let path = machine.dir.path().join("second");
        poll(PATIENCE, || Hmp::connect(&path)).expect("a monitor on a socket")
    };
    let mut client = connect();
    assert_eq!(client.command_with_fd("info name", first.as_fd()), "");
    drop(client);
    assert_eq!(
        connect().command("getfd none"),
        "Error: No file descriptor supplied via SCM_RIGHTS\n"
    );
}

#[test]
fn descriptors_come_over_a_unix_monitor() {
    let mut machine = Machine::start(&[]);
    let hmp = &mut machine.vmm.hmp;
    assert_eq!(
        hmp.command("getfd none"),
        "Error: No file descriptor supplied via SCM_RIGHTS\n"
    );
    let file = tempfile::tempfile().unwrap();
    assert_eq!(hmp.command_with_fd("getfd mine", file.as_fd()), "");
    assert_eq!(hmp.command("closefd mine"), "");
    assert_eq!(
        hmp.command("closefd mine"),
        "Error: File descriptor named 'mine' not found\n"
    );
    // Used: what is migrated to it is there, and the name is free.
    let mut copy = file.try_clone().unwrap();
    assert_eq!(hmp.command_with_fd("getfd mine", file.as_fd()), "");
    assert_eq!(hmp.command("migrate fd:mine"), "");
    let state = hmp.command("info migrate");
    assert!(state.contains("Migration status: completed\n"), "{state}");
    let mut stream = Vec::new();
    std::io::Seek::rewind(&mut copy).unwrap();
    copy.read_to_end(&mut stream).unwrap();
    assert!(stream.starts_with(b"QEVM"));
    assert!(hmp.command("closefd mine").starts_with("Error: "));
}

/// Every command there is, and what its answer looks like; `*` stands for anything.
#[test]
fn every_command_answers() {
    let uuid = "00112233-4455-6677-8899-aabbccddeeff";
    let ring = "ringbuf,id=ring,size=64";
    let mut machine = Machine::start(&[
        "-name", "guest", "-uuid", uuid, "-smp", "2", "-chardev", ring,
    ]);
    let dir = machine.dir.path().to_owned();
    let file = |name: &str| dir.join(name).display().to_string();
    let (memory, log) = (file("memory"), file("log"));
    let cases: Vec<(String, String)> = [
        ("?", "*\nquit|q  -- quit the emulator\n*"),
        ("help help", "help|? [cmd] -- show the help\n"),
        ("help log", "*\nmigration *\n*"),
        (
            "info",
            "info block [-n] [-v] [device] -- *\ninfo version  -- *\n",
        ),
        ("info block", ""),
        ("info blockstats", ""),
        ("info snapshots", "No block device supports snapshots\n"),
        ("savevm", "Error: No block device can accept snapshots\n"),
        ("loadvm x", "Error: No block device can accept snapshots\n"),
        ("delvm x", "Error: No block device can accept snapshots\n"),
        (
            "block_resize x 1",
            "Error: Cannot find device='x' nor node-name=''\n",
        ),
        (
            "block_set_io_throttle x 0 0 0 0 0 0",
            "Error: Device 'x' not found\n",
        ),
        ("commit x", "Device 'x' not found\n"),
        ("commit all", ""),
        (
            "drive_add 0 if=none",
            "A block device must be specified for \"file\"\n",
        ),
        ("drive_del x", "Device 'x' not found\n"),
        ("info dirty-bitmaps", ""),
        (
            "block_dirty_bitmap_add foo b0",
            "Error: Cannot find device='foo' nor node-name='foo'\n",
        ),
        (
            "block_dirty_bitmap_add foo b0 4294967296",
            "Error: Parameter 'granularity' expects uint32_t\n",
        ),
        (
            "block_dirty_bitmap_remove foo b0",
            "Error: Node 'foo' not found\n",
        ),
        (
            "block_dirty_bitmap_clear foo b0",
            "Error: Node 'foo' not found\n",
        ),
        (
            "block_dirty_bitmap_enable foo b0",
            "Error: Node 'foo' not found\n",
        ),
        (
            "block_dirty_bitmap_disable foo b0",
            "Error: Node 'foo' not found\n",
        ),
        ("info version", &format!("{}\n", env!("CARGO_PKG_VERSION"))),
        ("info name", "guest\n"),
        ("info uuid", &format!("{uuid}\n")),
        ("info status", "VM status: paused (prelaunch)\n"),
        ("info kvm", "kvm support: disabled\n"),
        ("info cpus", "* CPU #0:*\n  CPU #1:*\n"),
        ("cpu 1", ""),
        ("info cpus", "  CPU #0:*\n* CPU #1:*\n"),
        ("cpu 2", "invalid CPU index\n*"),
        ("cpu 0", ""),
        (
            "info registers",
            "\nCPU#0\nEAX=00000000 *\nEIP=0000fff0 *\nCR0=60000010 *\nXMM*",
        ),
        ("info registers -a", "\nCPU#0\n*\nCPU#1\n*"),
        ("info registers 1", "\nCPU#1\n*"),
        ("info mtree", "address-space: *microvm.ram*pc.bios*"),
        ("info mtree -f", "FlatView #0\n*microvm.ram*pc.bios*"),
        (
            "info ramblock",
            "*Block Name*\n*microvm.ram*0x0000000004000000*\n*pc.bios*0x0000000000010000*",
        ),
        (
            "info memory_size_summary",
            "base memory: 67108864\nplugged memory: 0\n",
        ),
        ("info migrate", "globals:\n*"),
        ("info migrate_parameters", "announce-initial: 50 ms\n*"),
        (
            "info migrate_capabilities",
            "*xbzrle: off\n*return-path: on\n*",
        ),
        ("migrate_set_capability return-path off", ""),
        ("info migrate_capabilities", "*return-path: off\n*"),
        ("migrate_set_capability return-path on", ""),
        ("migrate_set_parameter max-bandwidth 2g", ""),
        (
            "info migrate_parameters",
            "*max-bandwidth: 2147483648 bytes/second\n*",
        ),
        (
            "migrate_incoming tcp:127.0.0.1:0",
            "Error: '-incoming' was not specified on the command line\n",
        ),
        ("migrate_cancel", ""),
        (
            "migrate -r tcp:127.0.0.1:1",
            "Error: Cannot resume if there is no paused migration\n",
        ),
        (
            "getfd a",
            "Error: No file descriptor supplied via SCM_RIGHTS\n",
        ),
        ("closefd a", "Error: File descriptor named 'a' not found\n"),
        (
            "info chardev",
            "ring: filename=ringbuf\n*compat_monitor0: filename=unix:*\n",
        ),
        ("ringbuf_write ring hello", ""),
        ("ringbuf_read ring 100", "hello\n"),
        ("ringbuf_read ring 100", "\n"),
        ("print/x 6*7", "0x2a\n"),
        ("p $pc", "0xfffffff0\n"),
        ("x/2xb 0xfff0", "000000000000fff0: 0x00 0x00\n"),
        ("x/1i 0xfff0", "0x*\n"),
        ("xp/1xw 0xfffffff0", "00000000fffffff0: 0x????????\n"),
        ("sum 0 4096", "00000\n"),
        (&format!("memsave 0 16 \"{memory}\""), ""),
        (&format!("pmemsave 0xffff0000 65536 \"{memory}\""), ""),
        (
            "gpa2hva 0",
            "Host virtual address for 0x0 (microvm.ram) is 0x*\n",
        ),
        ("gva2gpa 0x1234", "gpa: 0x1234\n"),
        ("i/b 0x3fd", "portb[0x03fd] = 0x60\n"),
        ("o/b 0x3ff 0x5a", ""),
        ("i/b 0x3ff", "portb[0x03ff] = 0x5a\n"),
        (&format!("logfile \"{log}\""), ""),
        ("log control", ""),
        ("stop", ""),
        ("log none", ""),
        ("log foo", "Log items (comma separated):\n*"),
        ("system_reset", ""),
        ("cont", "Error: *"),
        ("info history", "*'info history'\n"),
    ]
    .map(|(line, pattern)| (line.to_owned(), pattern.to_owned()))
    .to_vec();
    let mut wrong = Vec::new();
    for (line, pattern) in &cases {
        let answer = machine.vmm.command(line);
        if !matches(pattern.as_bytes(), answer.as_bytes()) {
            wrong.push(format!("{line}: {answer:?} is not {pattern:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(std::fs::metadata(&memory).unwrap().len(), 65536);
    let logged = std::fs::read_to_string(&log).unwrap();
    assert!(logged.contains("hmpsh: stop\n"), "{logged}");
    // Nothing that the table has was forgotten (quit and migrate follow).
    for command in hmpsh::monitor::table::COMMANDS {
        let names = [command.name]
            .into_iter()
            .chain(command.aliases.iter().copied());
        let is_there = names.into_iter().any(|name| {
            let mut used = cases.iter().map(|(line, _)| line.split([' ', '/']).next());
            used.any(|word| word == Some(name))
        });
        assert!(
            is_there || ["migrate", "quit"].contains(&command.name),
            "{}",
            command.name
        );
    }
    for item in hmpsh::monitor::table::ITEMS {
        let line = format!("info {}", item.name);
        assert!(
            cases.iter().any(|(used, _)| used.starts_with(&line)),
            "{line}"
        );
    }
    let saved = file("saved");
    assert_eq!(
        machine.vmm.command(&format!("migrate \"file:{saved}\"")),
        ""
    );
    assert_eq!(
        machine.vmm.command("info status"),
        "VM status: paused (postmigrate)\n"
    );
    assert!(std::fs::read(&saved).unwrap().starts_with(b"QEVM"));
    machine.vmm.hmp.send("quit");
    assert_eq!(machine.vmm.wait_exit().code(), Some(0));
}

/// `*` anything, `?` one byte.
fn matches(pattern: &[u8], text: &[u8]) -> bool {
    match (pattern.split_first(), text.split_first()) {
        (None, None) => true,
        (Some((b'*', rest)), _) => (0..=text.len()).any(|skip| matches(rest, &text[skip..])),
        (Some((b'?', pattern)), Some((_, text))) => matches(pattern, text),
        (Some((wanted, pattern)), Some((byte, text))) => wanted == byte && matches(pattern, text),
        _ => false,
    }
}

#[test]
fn cont_and_stop_work_on_a_guest_that_can_run() {
    if !require(&[Need::Kvm]) {
        return;
    }
    let mut vmm = Setup::new(Hmpsh).append("window=4M").args(&["-S"]).start();
    vmm.wait_status("paused (prelaunch)");
    vmm.quiet("c");
    vmm.wait_status("running");
    vmm.wait_beacons(3);
    vmm.quiet("s");
    vmm.wait_status("paused");
    vmm.quiet("cont");
    vmm.wait_beacons(3);
}

/// Runs to its end without an operator.
fn run(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_hmpsh"))
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

#[test]
fn commands_on_the_command_line_end_with_a_status() {
    let dir = tempfile::tempdir().unwrap();
    let script = dir.path().join("script");
    let path = script.display().to_string();
    let none = ["-accel", "none"];
    let run = |args: &[&str]| {
        let output = run(&[&none, args].concat());
        (
            output.status.code(),
            text(&output.stdout),
            text(&output.stderr),
        )
    };
    let printed = |status: i32, out: &str| (Some(status), out.to_owned(), String::new());
    assert_eq!(
        run(&["-e", "info status", "-e", "print/d 6*7"]),
        printed(0, "VM status: paused (prelaunch)\n42\n")
    );
    // The first error ends it.
    assert_eq!(
        run(&["-e", "foo", "-e", "info status"]),
        printed(1, "unknown command: 'foo'\n")
    );
    // Nobody listens there; a port that is free now may be another test's a moment later.
    let port = 1;
    assert_eq!(
        run(&["-e", &format!("migrate tcp:127.0.0.1:{port}")]),
        printed(
            1,
            &format!("Error: Failed to connect to '127.0.0.1:{port}': Connection refused\n")
        )
    );
    std::fs::write(&script, "# a comment\n\nprint/d 1\nquit\nprint/d 2\n").unwrap();
    assert_eq!(run(&["-script", &path]), printed(0, "1\n"));
    std::fs::write(&script, "print/d 1\nprint/d q\nprint/d 2\n").unwrap();
    let (status, out, _) = run(&["-script", &path]);
    assert_eq!(status, Some(1));
    assert!(out.starts_with("1\n") && !out.ends_with("2\n"), "{out}");
    // A migration is waited for.
    let saved = dir.path().join("saved").display().to_string();
    assert_eq!(
        run(&["-e", &format!("migrate file:{saved}"), "-e", "info status"]),
        printed(0, "VM status: paused (postmigrate)\n")
    );
    assert!(std::fs::metadata(&saved).is_ok());
    // One in the background too, before the program ends.
    let later = dir.path().join("later").display().to_string();
    assert_eq!(
        run(&["-e", &format!("migrate -d file:{later}")]),
        printed(0, "")
    );
    assert!(std::fs::metadata(&later).is_ok());
    assert_eq!(
        run(&["-e", &format!("migrate -d tcp:127.0.0.1:{port}")]),
        printed(
            1,
            &format!("Error: Failed to connect to '127.0.0.1:{port}': Connection refused\n")
        )
    );
}

/// Command lines that are refused: status 1 and one line that says why.
#[test]
fn bad_command_lines_are_refused_in_one_line() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let incoming = format!("tcp:127.0.0.1:{port}");
    let monitor = format!("{incoming},server=on,wait=off");
    let in_use = "Failed to find an available port: Address already in use";
    let cases: &[(&[&str], &str)] = &[
        (&["-foo"], "-foo: invalid option"),
        (&["-m"], "-m: requires an argument"),
        (&["-m", "foo"], "-m foo: Parameter 'size' expects "),
        (&["-m", "1x"], "-m 1x: Parameter 'size' expects "),
        (&["-smp", "17"], "-smp 17: Invalid SMP CPUs 17."),
        (&["-M", "pc"], "-M pc: unsupported machine type: \"pc\""),
        (
            &["-M", "microvm,foo=1"],
            "-M microvm,foo=1: Property 'microvm-machine.foo' not found",
        ),
        (
            &["-M", "microvm,acpi=on"],
            "-M microvm,acpi=on: acpi=on: not built in this version",
        ),
        (
            &["-M", "microvm,acpi=on"],
            "-M microvm,acpi=on: acpi=on: not built in this version",
        ),
        (
            &["-incoming", "foo:bar"],
            "-incoming foo:bar: unknown migration protocol: foo:bar",
        ),
        (
            &["-incoming", "tcp:localhost:99999"],
            "-incoming tcp:localhost:99999: ",
        ),
        (
            &["-incoming", &incoming],
            &format!("-incoming {incoming}: {in_use}"),
        ),
        (
            &["-incoming", "unix:/nowhere/at/all"],
            "-incoming unix:/nowhere/at/all: Failed to bind socket to /nowhere/at/all: No such file or directory",
        ),
        (
            &["-monitor", &monitor],
            &format!("chardev compat_monitor0 ({incoming}): {in_use}"),
        ),
        (
            &["-monitor", "foo"],
            "-monitor foo: 'foo' is not a valid char driver",
        ),
        (
            &["-bios", "/nowhere"],
            "could not load PC BIOS '/nowhere': No such file or directory",
        ),
        (
            &["-kernel", "/nowhere"],
            "could not open kernel file '/nowhere': No such file or directory",
        ),
        (
            &["-script", "/nowhere"],
            "-script /nowhere: No such file or directory",
        ),
        (
            &["-D", "/nowhere/at/all"],
            "-D /nowhere/at/all: No such file or directory",
        ),
        (&["-pidfile", "/nowhere/at/all"], "cannot create PID file: "),
        (&["-d", "foo"], "-d: invalid log item: foo"),
        (&["-cpu", "foo"], "-cpu foo: unable to find CPU model 'foo'"),
        (
            &["-uuid", "x"],
            "-uuid x: failed to parse UUID string: wrong format",
        ),
        (
            &["-accel", "tcg"],
            "-accel tcg: tcg: not built in this version",
        ),
        (&["-vga", "std"], "-vga: not built in this version"),
        (
            &["disk.img"],
            "disk.img: disk images: not built in this version",
        ),
        (
            &["-daemonize", "-monitor", "stdio"],
            "-daemonize: cannot be used with stdio",
        ),
        (
            &["-daemonize", "-bios", "/nowhere"],
            "could not load PC BIOS '/nowhere': No such file or directory",
        ),
        (
            &["-append", "foo=1"],
            "The built-in guest has no parameter 'foo=1' ",
        ),
    ];
    for (args, words) in cases {
        let mut all = args.to_vec();
        if !args.contains(&"-accel") && !args.contains(&"-m") {
            all.splice(0..0, ["-accel", "none"]);
        }
        let output = run(&all);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {said}");
        assert!(
            said.starts_with(&format!("hmpsh: {words}")),
            "{args:?}: {said}"
        );
        assert!(
            said.ends_with('\n') && said.lines().count() == 1,
            "{args:?}: {said}"
        );
        assert_eq!(text(&output.stdout), "", "{args:?}");
    }
}

/// A monitor that is to wait for its client does, and says so.
#[test]
fn a_monitor_may_wait_for_its_client() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("monitor");
    let mut command = Command::new(env!("CARGO_BIN_EXE_hmpsh"));
    command.args(["-accel", "none", "-nodefaults", "-monitor"]);
    command.arg(format!("unix:{},server=on", path.display()));
    let mut child = command.stdin(Stdio::null()).spawn().unwrap();
    let mut session = poll(PATIENCE, || Hmp::connect(&path)).expect("a monitor");
    assert_eq!(
        session.command("info status"),
        "VM status: paused (prelaunch)\n"
    );
    session.send("q");
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert!(!path.exists());
}

const PATIENCE: Duration = Duration::from_secs(10);
