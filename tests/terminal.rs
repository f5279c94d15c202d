//! The shell on a real terminal: prompt, editing, history, completion, a migration in the
//! foreground, and the terminal as it was when the program has ended, however it ended.

mod common;

use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::beacon::wait_beacons;
use common::hmp::{Hmp, PROMPT};
use common::need::{require, skipped};
use common::poll;
use common::vmm::Program::Hmpsh;
use common::vmm::Setup;
use hmpsh::migration::stats::Snapshot;
use hmpsh::monitor::complete::Candidates;
use hmpsh::monitor::history::History;
use hmpsh::monitor::interpreter::{Ended, Interpreter};
use hmpsh::monitor::session::Outcome;
use hmpsh::monitor::shell::Shell;
use rexpect::process::{Signal as TerminalSignal, WaitStatus};
use rexpect::session::{PtySession, spawn_command};
use rustix::process::{Pid, Signal, kill_process};
use rustix::termios::{LocalModes, Termios, tcgetattr};
use tempfile::TempDir;

/// A program on a terminal of its own.
struct Terminal {
    session: PtySession,
    _dir: TempDir,
}

impl Terminal {
    /// hmpsh without a running guest, at its first prompt.
    #[track_caller]
    fn start(args: &[&str]) -> Self {
        let mut terminal = Self::spawn(hmpsh(&["-accel", "none"]).args(args));
        terminal.prompt();
        terminal
    }

    /// Starts a program; its state directory goes with the terminal, unless it has one.
    #[track_caller]
    fn spawn(command: &mut Command) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let has_state = command.get_envs().any(|(name, _)| name == "XDG_STATE_HOME");
        if !has_state {
            command.env("XDG_STATE_HOME", dir.path());
        }
        let mut own = Command::new(command.get_program());
        own.args(command.get_args());
        own.env("TERM", "xterm").env("NO_COLOR", "1");
        for (name, value) in command.get_envs() {
            own.env(name, value.unwrap_or_default());
        }
        let patience = u64::try_from(PATIENCE.as_millis()).unwrap();
        let session = spawn_command(own, Some(patience)).expect("a terminal");
        Self { session, _dir: dir }
    }

    /// Waits for `words` and returns what came before them.
    #[track_caller]
    fn wait(&mut self, words: &str) -> String {
        match self.session.exp_string(words) {
            Ok(before) => before,
            Err(error) => panic!("waiting for {words:?}: {error:?}"),
        }
    }

    /// Waits for the prompt; what was printed before it, line ends as `\n`.
    #[track_caller]
    fn prompt(&mut self) -> String {
        let text = self.wait(PROMPT);
        text.replace("\r\n", "\n")
            .trim_end_matches("\r\x1b[K")
            .to_owned()
    }

    /// Types.
    #[track_caller]
    fn keys(&mut self, keys: &str) {
        self.session.send(keys).expect("the terminal takes keys");
        self.session.flush().expect("the terminal takes keys");
    }

    /// Types what need not be text.
    #[track_caller]
    fn bytes(&mut self, bytes: &[u8]) {
        let master = self.session.process().get_file_handle().unwrap();
        rustix::io::write(master, bytes).expect("the terminal takes bytes");
    }

    /// Types a line and returns the answer.
    #[track_caller]
    fn ask(&mut self, line: &str) -> String {
        self.keys(&format!("{line}\r"));
        self.wait("\r\n");
        self.prompt()
    }

    /// What the terminal is set to.
    fn settings(&self) -> Termios {
        let master = self.session.process().get_file_handle().unwrap();
        tcgetattr(master).unwrap()
    }

    /// Ends the program and sees that it ends well.
    #[track_caller]
    fn quit(mut self) {
        self.keys("quit\r");
        self.session.exp_eof().expect("it ends");
        let status = self.session.process().wait().unwrap();
        assert!(matches!(status, WaitStatus::Exited(_, 0)), "{status:?}");
    }
}

fn hmpsh(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hmpsh"));
    command.args(args);
    command
}

/// A unix socket as `-monitor` wants it.
fn socket(path: &Path) -> String {
    format!("unix:{},server=on,wait=off", path.display())
}

/// A session there, once it is there.
#[track_caller]
fn connect(path: &Path) -> Hmp {
    poll(PATIENCE, || Hmp::connect(path)).expect("a monitor on a socket")
}

#[test]
fn greets_at_once_and_answers() {
    let begun = Instant::now();
    let mut terminal = Terminal::spawn(&mut hmpsh(&["-accel", "none"]));
    let banner = terminal.prompt();
    assert!(begun.elapsed() < Duration::from_secs(1));
    assert_eq!(
        banner,
        format!(
            "hmpsh {} monitor - type 'help' for more information\n",
            env!("CARGO_PKG_VERSION")
        )
    );
    assert_eq!(
        terminal.ask("info status"),
        "VM status: paused (prelaunch)\n"
    );
    assert_eq!(terminal.ask("foo"), "unknown command: 'foo'\n");
    assert_eq!(terminal.ask(""), "");
    terminal.quit();
}

#[test]
fn remembers_lines_from_run_to_run() {
    let state = tempfile::tempdir().unwrap();
    let start = || {
        let mut terminal =
            Terminal::spawn(hmpsh(&["-accel", "none"]).env("XDG_STATE_HOME", state.path()));
        terminal.prompt();
        terminal
    };
    let mut first = start();
    assert_eq!(first.ask("print 6*7"), "0x2a\n");
    assert_eq!(first.ask("info status"), "VM status: paused (prelaunch)\n");
    assert_eq!(first.ask("\x1b[A\x1b[A"), "0x2a\n");
    assert_eq!(
        first.ask("info history"),
        "0: 'info status'\n1: 'print 6*7'\n2: 'info history'\n"
    );
    // Killed: what was typed is kept nevertheless.
    let killed = first.session.process_mut().kill(TerminalSignal::SIGKILL);
    assert!(killed.is_ok(), "{killed:?}");
    let mut second = start();
    assert_eq!(second.ask("\x1b[A\x1b[A"), "0x2a\n");
    second.quit();
}

#[test]
fn completes_names_and_values() {
    let mut terminal = Terminal::start(&[]);
    // One candidate each: inserted, with a blank.
    assert_eq!(
        terminal.ask("migrate_set_cap\txb\ton"),
        "Error: Capability 'xbzrle' is not built in this version\n"
    );
    terminal.keys("migrate_set_parameter downt\t");
    terminal.wait("downtime-limit ");
    assert_eq!(terminal.ask("450"), "");
    let parameters = terminal.ask("info migrate_par\t");
    assert!(
        parameters.contains("downtime-limit: 450 ms\n"),
        "{parameters}"
    );
    // Values, which QEMU does not complete.
    terminal.keys("migrate_set_parameter multifd-compression z\t\t");
    terminal.wait("zlib");
    terminal.wait("zstd");
    terminal.keys("\x03");
    terminal.prompt();
    // Several: two TABs list them.
    terminal.keys("info m\t\t");
    for item in [
        "memory_size_summary",
        "migrate_capabilities",
        "mtree",
        "migrate_parameters",
    ] {
        terminal.wait(item);
    }
    terminal.wait("(qemu) info m");
    terminal.keys("\x03");
    terminal.prompt();
    terminal.quit();
}

#[test]
fn what_is_no_utf8_costs_its_line_only() {
    let mut terminal = Terminal::start(&[]);
    terminal.bytes(b"info \xff");
    terminal.wait("hmpsh: what was typed is not UTF-8");
    terminal.prompt();
    assert_eq!(terminal.ask("info name"), "");
    terminal.quit();
}

/// What is pasted or typed before the prompt is there is not lost, not even behind a ^C.
#[test]
fn lines_may_come_at_once() {
    let mut terminal = Terminal::start(&[]);
    terminal.keys("print/d 40+1\rprint/d 40+2\rprint/d 99\x03print/d 40+3\rinfo na");
    for answer in ["\n41\r\n", "\n42\r\n", "\n43\r\n", "info na"] {
        let before = terminal.wait(answer);
        assert!(!before.contains("\n99\r\n"), "{before:?}");
    }
    assert_eq!(terminal.ask("me"), "");
    terminal.quit();
}

/// What scripts wait for stands there in one piece, and nothing hides in it.
#[test]
fn hints_leave_the_prompt_alone() {
    let mut terminal = Terminal::spawn(hmpsh(&["-accel", "none"]).env("NO_COLOR", ""));
    let greeting = terminal.wait(PROMPT);
    assert!(!greeting.contains("\x1b[?"), "{greeting:?}");
    terminal.keys("inf");
    let drawn = terminal.wait("(qemu) inf\x1b[2mo\x1b[0m");
    assert!(!drawn.contains("\x1b[?"), "{drawn:?}");
    // A hint is no text: what is executed is what was typed.
    assert_eq!(terminal.ask(""), "unknown command: 'inf'\n");
    terminal.keys("migrate ");
    terminal.wait("[-d] [-b] [-i] [-r] uri");
    assert!(terminal.ask("").starts_with("migrate: string expected\n"));
    terminal.quit();
}

/// A terminal that can do nothing still is one to work with.
#[test]
fn a_dumb_terminal_will_do() {
    let mut terminal = Terminal::spawn(hmpsh(&["-accel", "none"]).env("TERM", "dumb"));
    terminal.prompt();
    terminal.keys("info status\r");
    assert_eq!(terminal.prompt(), "VM status: paused (prelaunch)\n");
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    terminal.keys(&format!("migrate tcp:{}\r", silent.local_addr().unwrap()));
    terminal.wait("Completed 0 %");
    terminal.keys("\x03");
    terminal.prompt();
    terminal.keys("info migrate\r");
    let state = terminal.prompt();
    assert!(state.contains("Migration status: cancelled\n"), "{state}");
    terminal.keys("quit\r");
    terminal.session.exp_eof().expect("it ends");
}

#[test]
fn interrupt_and_end_of_input_end_nothing() {
    let mut terminal = Terminal::start(&[]);
    terminal.keys("info sta");
    terminal.wait("info sta");
    terminal.keys("\x03");
    terminal.wait("\r\n");
    assert_eq!(terminal.prompt(), "");
    for _ in 0..3 {
        terminal.keys("\x03");
        terminal.wait("\r\n");
        assert_eq!(terminal.prompt(), "Type quit to end the VM\n");
    }
    // Neither ends it nor puts it to sleep nor leaves anything on the line.
    terminal.keys("\x04\x04\x1a");
    assert_eq!(
        terminal.ask("info status"),
        "VM status: paused (prelaunch)\n"
    );
    // In the middle of a line ^D deletes.
    let to_the_number = "\x1b[C".repeat(8);
    assert_eq!(
        terminal.ask(&format!("print/d 43\x01{to_the_number}\x04")),
        "3\n"
    );
    terminal.quit();
}

#[test]
fn the_terminal_and_a_socket_are_two_monitors_of_one_machine() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("monitor");
    let mut terminal = Terminal::start(&["-monitor", "stdio", "-monitor", &socket(&path)]);
    let mut other = connect(&path);
    assert_eq!(terminal.ask("migrate_set_parameter downtime-limit 77"), "");
    let parameters = other.command("info migrate_parameters");
    assert!(
        parameters.contains("downtime-limit: 77 ms\n"),
        "{parameters}"
    );
    // Each has its own history.
    assert_eq!(
        other.command("info history"),
        "0: 'info migrate_parameters'\n1: 'info history'\n"
    );
    let chardevs = terminal.ask("info chardev");
    assert!(
        chardevs.contains("compat_monitor0: filename=stdio\n")
            && chardevs.contains(&format!(
                "compat_monitor1: filename=unix:{},server=on\n",
                path.display()
            )),
        "{chardevs}"
    );
    other.send("quit");
    terminal.session.exp_eof().expect("it ends");
}

/// What happens meanwhile is told above the line that is being typed.
#[test]
fn notices_stand_above_the_prompt() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("monitor");
    let mut terminal = Terminal::start(&["-monitor", "stdio", "-monitor", &socket(&path)]);
    let mut other = connect(&path);
    other.command("log control");
    terminal.keys("info st");
    terminal.wait("info st");
    assert_eq!(other.command("stop"), "");
    terminal.wait("hmpsh: stop\r\n");
    let between = terminal.wait("(qemu) info st");
    assert!(!between.contains("stop"), "{between:?}");
    assert_eq!(terminal.ask("atus"), "VM status: paused (prelaunch)\n");
    // Above the progress of a migration as well, on lines of their own.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    terminal.keys(&format!("migrate tcp:{}\r", silent.local_addr().unwrap()));
    terminal.wait("Completed 0 %");
    assert_eq!(other.command("stop"), "");
    let between = terminal.wait("hmpsh: stop\r\n");
    assert!(between.ends_with("\x1b[2K"), "{between:?}");
    terminal.wait("Completed 0 %");
    terminal.keys("\x03");
    terminal.prompt();
    terminal.quit();
}

/// hmpsh on a terminal with a guest in it whose memory takes seconds to send, and its log.
fn source() -> (Terminal, PathBuf, PathBuf) {
    let dir = tempfile::tempdir().unwrap().keep();
    let (log, monitor) = (dir.join("serial"), dir.join("monitor"));
    std::fs::File::create(&log).unwrap();
    let mut command = hmpsh(&["-cpu", "qemu64", "-m", "64M", "-monitor", "stdio"]);
    command.args(["-M", "microvm,acpi=off,pic=off,pit=off"]);
    command.args(["-append", "window=4M smp=1", "-monitor", &socket(&monitor)]);
    command
        .arg("-serial")
        .arg(format!("file:{}", log.display()));
    let mut terminal = Terminal::spawn(&mut command);
    terminal.prompt();
    wait_beacons(&[&log], 25);
    assert_eq!(terminal.ask("migrate_set_parameter max-bandwidth 1M"), "");
    (terminal, log, monitor)
}

/// All percentages in a text.
#[track_caller]
fn percentages(text: &str) -> Vec<u32> {
    let told = text.split("Completed ").skip(1);
    told.map(|rest| {
        let number = rest.split_once(" %").expect("a percentage").0;
        number.parse().expect("a number")
    })
    .collect()
}

#[test]
fn a_migration_in_the_foreground_tells_how_far_it_is() {
    if !require(Hmpsh.needs()) {
        return;
    }
    let (mut terminal, log, _) = source();
    assert_eq!(terminal.ask("stop"), "");
    let mut dest = Setup::new(Hmpsh)
        .append("window=4M")
        .incoming("tcp:127.0.0.1:0")
        .start();
    let port = dest.port();
    terminal.keys(&format!("migrate tcp:127.0.0.1:{port}\r"));
    terminal.wait("\r\n");
    let mut told = terminal.wait("MiB remaining");
    // Kept: a line, and the beginning of another with a slip that is corrected.
    terminal.keys("info status\rinfo nax\x7f");
    told += &terminal.wait(PROMPT);
    let answer = terminal.wait("info na");
    let percentages = percentages(&told);
    let (last, before) = percentages.split_last().expect("percentages");
    assert!(
        percentages.len() >= 3 && percentages.is_sorted() && percentages[0] < *last,
        "{told:?}"
    );
    assert!(*last == 100 && before.iter().any(|n| *n < 100), "{told:?}");
    assert!(
        answer.contains("VM status: paused (postmigrate)\r\n"),
        "{answer:?}"
    );
    assert_eq!(terminal.ask("me"), "");
    dest.wait_status("paused");
    dest.quiet("cont");
    wait_beacons(&[&log, &dest.log()], 5);
    let refused = terminal.ask("cont");
    assert!(refused.contains("cont -f"), "{refused}");
    terminal.quit();
}

#[test]
fn a_migration_in_the_foreground_can_be_cancelled_and_left() {
    if !require(Hmpsh.needs()) {
        return;
    }
    let (mut terminal, log, monitor) = source();
    let mut other = connect(&monitor);
    // Takes connections and never answers.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let migrate = format!("migrate tcp:{}\r", silent.local_addr().unwrap());
    terminal.keys(&migrate);
    terminal.wait("Completed 0 %");
    let begun = Instant::now();
    terminal.keys("info name\r\x03");
    let told = terminal.wait(PROMPT);
    assert!(
        begun.elapsed() < Duration::from_secs(1),
        "{:?}",
        begun.elapsed()
    );
    assert!(!told.contains("100 %"), "{told:?}");
    terminal.wait("info name\r\n");
    terminal.prompt();
    assert_eq!(terminal.ask("info status"), "VM status: running\n");
    let state = terminal.ask("info migrate");
    assert!(state.contains("Migration status: cancelled\n"), "{state}");
    wait_beacons(&[&log], 5);
    // And once more, without waiting.
    terminal.keys(&migrate);
    terminal.wait("Completed 0 %");
    terminal.keys("\x1a");
    terminal.wait("Migration continues in the background\r\n");
    terminal.prompt();
    let refused = terminal.ask(migrate.trim());
    assert!(
        refused.contains("There's a migration process in progress"),
        "{refused}"
    );
    terminal.keys("info st");
    terminal.wait("info st");
    assert_eq!(other.command("migrate_cancel"), "");
    terminal.wait("Migration cancelled\r\n");
    terminal.wait("(qemu) info st");
    assert_eq!(terminal.ask("atus"), "VM status: running\n");
    wait_beacons(&[&log], 5);
    terminal.quit();
}

/// What was said about a migration that failed.
#[test]
fn a_migration_in_the_foreground_that_fails_says_why() {
    let mut terminal = Terminal::start(&[]);
    let port = TcpListener::bind("127.0.0.1:0")
        .and_then(|listener| listener.local_addr())
        .unwrap()
        .port();
    assert_eq!(
        terminal.ask(&format!("migrate tcp:127.0.0.1:{port}")),
        format!("Error: Failed to connect to '127.0.0.1:{port}': Connection refused\n")
    );
    assert_eq!(
        terminal.ask("info status"),
        "VM status: paused (prelaunch)\n"
    );
    terminal.quit();
}

/// Runs a program from a shell on a terminal, ends it with `end`, and asks the shell how the
/// terminal was before and after.
#[track_caller]
fn left_as_it_was(program: &str, end: impl FnOnce(&mut Terminal)) -> String {
    let mut terminal = Terminal::spawn(Command::new("sh").env("PS1", "ready> "));
    terminal.wait("ready> ");
    terminal.keys("stty echo\r");
    terminal.wait("ready> ");
    let ask = |terminal: &mut Terminal| {
        terminal.keys("stty -g; stty -a\r");
        terminal.wait("\r\n");
        terminal.wait("ready> ")
    };
    let before = ask(&mut terminal);
    assert!(
        before.contains(" icanon ") && before.contains(" echo "),
        "{before}"
    );
    terminal.keys(&format!("{program}\r"));
    terminal.wait(PROMPT);
    let settled = poll(PATIENCE, || {
        let modes = terminal.settings().local_modes;
        (!modes.intersects(LocalModes::ECHO | LocalModes::ICANON)).then_some(())
    });
    assert!(settled.is_some(), "the shell should have the terminal");
    end(&mut terminal);
    let said = terminal.wait("ready> ");
    assert_eq!(ask(&mut terminal), before, "after {said:?}");
    terminal.keys("exit\r");
    terminal.session.exp_eof().expect("the shell ends");
    said
}

/// The same for hmpsh itself.
#[track_caller]
fn hmpsh_leaves_it_as_it_was(end: impl FnOnce(&mut Terminal, Pid, &mut Hmp)) -> String {
    let dir = tempfile::tempdir().unwrap();
    let (pidfile, monitor) = (dir.path().join("pid"), dir.path().join("monitor"));
    let program = format!(
        "{} -accel none -monitor stdio -monitor {} -pidfile {}",
        env!("CARGO_BIN_EXE_hmpsh"),
        socket(&monitor),
        pidfile.display()
    );
    let said = left_as_it_was(&program, |terminal| {
        let text = std::fs::read_to_string(&pidfile).unwrap();
        let pid = Pid::from_raw(text.trim().parse().unwrap()).unwrap();
        end(terminal, pid, &mut connect(&monitor));
    });
    assert!(!pidfile.exists() && !monitor.exists());
    said
}

#[test]
fn a_signal_leaves_the_terminal_as_it_was() {
    let said = hmpsh_leaves_it_as_it_was(|_, pid, _| kill_process(pid, Signal::TERM).unwrap());
    assert!(
        said.contains("hmpsh: terminating on signal 15 from pid "),
        "{said:?}"
    );
    let said = hmpsh_leaves_it_as_it_was(|terminal, pid, _| {
        // Nothing hints at what no command begins with.
        terminal.keys("zz half a li");
        terminal.wait("zz half a li");
        kill_process(pid, Signal::HUP).unwrap();
    });
    assert!(
        said.contains("hmpsh: terminating on signal 1 from pid "),
        "{said:?}"
    );
}

#[test]
fn sigquit_is_no_way_around_that() {
    hmpsh_leaves_it_as_it_was(|_, pid, _| kill_process(pid, Signal::QUIT).unwrap());
}

#[test]
fn quit_leaves_the_terminal_as_it_was() {
    hmpsh_leaves_it_as_it_was(|terminal, _, _| terminal.keys("quit\r"));
    hmpsh_leaves_it_as_it_was(|_, _, other| other.send("quit"));
}

#[test]
fn a_signal_in_a_migration_leaves_the_terminal_as_it_was() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let migrate = format!("migrate tcp:{}\r", silent.local_addr().unwrap());
    hmpsh_leaves_it_as_it_was(|terminal, pid, _| {
        terminal.keys(&migrate);
        terminal.wait("Completed 0 %");
        kill_process(pid, Signal::TERM).unwrap();
    });
}

/// The real shell around a command that panics.
#[test]
fn a_panic_leaves_the_terminal_as_it_was() {
    if std::env::var_os("HMPSH_TEST_PANIC").is_some() {
        Shell::new(Panics::default(), PROMPT).unwrap().run();
        return;
    }
    let program = format!(
        "HMPSH_TEST_PANIC=1 {} --exact a_panic_leaves_the_terminal_as_it_was --nocapture",
        std::env::current_exe().unwrap().display()
    );
    let said = left_as_it_was(&program, |terminal| terminal.keys("anything\r"));
    assert!(said.contains("no command survives this"), "{said:?}");
}

#[derive(Default)]
struct Panics(History);

impl Interpreter for Panics {
    fn execute(&mut self, _: &str) -> Outcome {
        panic!("no command survives this")
    }

    fn mute(&mut self, _: bool) {}

    fn complete(&self, _: &str) -> Candidates {
        Candidates::default()
    }

    fn hint(&self, _: &str) -> Option<String> {
        None
    }

    fn accept(&mut self, _: Vec<OwnedFd>) {}

    fn disown(&mut self) {}

    fn history(&self) -> &History {
        &self.0
    }

    fn migration(&self) -> Snapshot {
        Snapshot::default()
    }

    fn cancel(&mut self) -> Option<String> {
        None
    }

    fn when_migration_ends(&self, _: Ended) {}

    fn conclude(&mut self) -> bool {
        true
    }
}

/// The serial port may have the terminal instead of a monitor; then ^C ends the program.
#[test]
fn a_terminal_without_a_monitor() {
    if !require(Hmpsh.needs()) {
        return;
    }
    let mut terminal = Terminal::spawn(&mut hmpsh(&["-monitor", "none", "-serial", "stdio"]));
    terminal.wait("hmpsh guest");
    terminal.wait("B 3\r\n");
    terminal.keys("\x03");
    terminal.session.exp_eof().expect("it ends");
    let status = terminal.session.process().wait().unwrap();
    assert!(matches!(status, WaitStatus::Exited(_, 0)), "{status:?}");
}

#[test]
fn a_daemon_leaves_its_number_and_a_monitor() {
    let dir = tempfile::tempdir().unwrap();
    let (pidfile, monitor) = (dir.path().join("pid"), dir.path().join("monitor"));
    let status = hmpsh(&["-accel", "none", "-daemonize", "-pidfile", "pid"])
        .args(["-monitor", &socket(Path::new("monitor"))])
        .current_dir(dir.path())
        .stdin(Stdio::null())
        .status()
        .unwrap();
    assert_eq!(status.code(), Some(0));
    // Everything is set up when the parent is let go.
    let mut session = Hmp::connect(&monitor).expect("a monitor");
    let pid: u32 = std::fs::read_to_string(&pidfile)
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    let process = PathBuf::from(format!("/proc/{pid}"));
    assert_eq!(
        std::fs::read_link(process.join("cwd")).unwrap(),
        Path::new("/")
    );
    assert_eq!(
        session.command("info status"),
        "VM status: paused (prelaunch)\n"
    );
    // A second one with the same number is refused.
    let second = hmpsh(&["-accel", "none", "-monitor", "none", "-pidfile"])
        .arg(&pidfile)
        .output()
        .unwrap();
    assert_eq!(second.status.code(), Some(1));
    session.send("quit");
    let is_gone = poll(PATIENCE, || (!process.exists()).then_some(()));
    assert!(is_gone.is_some());
    assert!(!pidfile.exists() && !monitor.exists());
}

/// Where KVM is missing the machine is there, paused, and one line says why.
#[test]
fn without_kvm_the_guest_stays_paused_and_one_line_says_why() {
    let hide = "mount -t tmpfs none /dev && exec \"$0\" \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--map-root-user", "--mount", "sh", "-c", hide]);
    if !Path::new("/dev/kvm").exists() {
        command = Command::new("env");
    } else if !Command::new("unshare")
        .args(["--map-root-user", "--mount", "sh", "-c", hide, "true"])
        .output()
        .is_ok_and(|output| output.status.success())
    {
        return skipped("/dev/kvm can not be hidden (unshare, mount)");
    }
    let output = command
        .arg(env!("CARGO_BIN_EXE_hmpsh"))
        .args(["-e", "info status", "-e", "info kvm"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "VM status: paused (prelaunch)\nkvm support: disabled\n",
        "{said}"
    );
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(
        said.starts_with("hmpsh: ") && said.contains("KVM") && said.contains("paused"),
        "{said}"
    );
}

const PATIENCE: Duration = Duration::from_secs(20);
