//! One virtual machine in a process of its own, hmpsh or stock QEMU, with the built-in guest in
//! it: a monitor on a unix socket, COM1 in a file, everything in a directory that goes with it.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use super::hmp::{Hmp, PATIENCE};
use super::need::{Need, qemu, require};
use super::{beacon, poll};

/// Which program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Program {
    /// The one this project builds.
    Hmpsh,
    /// QEMU 7.2.
    Qemu7,
    /// QEMU 10.0.
    Qemu10,
}

impl Program {
    /// What a test with this program needs; KVM in any case.
    pub(crate) fn needs(self) -> &'static [Need] {
        match self {
            Self::Hmpsh => &[Need::Kvm],
            Self::Qemu7 => &[Need::Kvm, Need::Qemu7],
            Self::Qemu10 => &[Need::Kvm, Need::Qemu10],
        }
    }
}

/// What the machine boots.
#[derive(Debug)]
enum Boot {
    Builtin,
    Kernel(PathBuf),
    Bios(PathBuf),
}

/// A command line to be.
#[derive(Debug)]
pub(crate) struct Setup {
    program: Program,
    accel: &'static str,
    cpu: &'static str,
    memory_mib: u64,
    vcpus: u32,
    irqchip: &'static str,
    chips: &'static str,
    machine: String,
    append: String,
    boot: Boot,
    serial: Option<String>,
    args: Vec<String>,
    stdin: Option<OwnedFd>,
}

impl Setup {
    /// A running machine with 64 MiB and one vCPU.
    pub(crate) fn new(program: Program) -> Self {
        Self {
            program,
            accel: "kvm",
            cpu: "qemu64",
            memory_mib: 64,
            vcpus: 1,
            irqchip: "on",
            chips: ",pic=off,pit=off,rtc=off",
            machine: String::new(),
            append: String::new(),
            boot: Boot::Builtin,
            serial: None,
            args: Vec::new(),
            stdin: None,
        }
    }

    /// `-accel`, `kvm` or `none`.
    pub(crate) fn accel(mut self, accel: &'static str) -> Self {
        self.accel = accel;
        self
    }

    /// `-cpu host`. (KVM without hardware has an MSR that QEMU can not read then.)
    pub(crate) fn host_cpu(mut self) -> Self {
        self.cpu = match self.program {
            Program::Hmpsh => "host",
            _ => "host,-arch-capabilities",
        };
        self
    }

    /// `-m`.
    pub(crate) fn memory_mib(mut self, mib: u64) -> Self {
        self.memory_mib = mib;
        self
    }

    /// `-smp`, and that many vCPUs at work in the guest.
    pub(crate) fn vcpus(mut self, vcpus: u32) -> Self {
        self.vcpus = vcpus;
        self
    }

    /// `kernel-irqchip=`, `on` or `split`.
    pub(crate) fn irqchip(mut self, kind: &'static str) -> Self {
        self.irqchip = kind;
        self
    }

    /// PIC and PIT, as a microvm has them when nothing is said.
    pub(crate) fn default_chips(mut self) -> Self {
        self.chips = "";
        self
    }

    /// Further properties of `-M`, each with a comma in front.
    pub(crate) fn machine(mut self, properties: &str) -> Self {
        self.machine += properties;
        self
    }

    /// Parameters of the built-in guest.
    pub(crate) fn append(mut self, parameters: &str) -> Self {
        self.append = format!("{} {parameters}", self.append);
        self
    }

    /// A kernel instead of the built-in guest; [`Self::append`] is its command line.
    pub(crate) fn kernel(mut self, file: &Path) -> Self {
        self.boot = Boot::Kernel(file.to_owned());
        self
    }

    /// A firmware image instead of the built-in guest.
    pub(crate) fn bios(mut self, file: &Path) -> Self {
        self.boot = Boot::Bios(file.to_owned());
        self
    }

    /// `-incoming`.
    pub(crate) fn incoming(self, uri: &str) -> Self {
        self.args(&["-incoming", uri])
    }

    /// COM1 somewhere else than in a file; the log of the guest stays empty then.
    pub(crate) fn serial(mut self, chardev: &str) -> Self {
        self.serial = Some(chardev.to_owned());
        self
    }

    /// Further options.
    pub(crate) fn args(mut self, args: &[&str]) -> Self {
        self.args.extend(args.iter().map(|arg| (*arg).to_owned()));
        self
    }

    /// What the process inherits as descriptor 0.
    pub(crate) fn stdin(mut self, fd: OwnedFd) -> Self {
        self.stdin = Some(fd);
        self
    }

    /// Starts the process and waits for its first prompt.
    #[track_caller]
    pub(crate) fn start(self) -> Vmm {
        self.try_start()
            .unwrap_or_else(|(status, said)| panic!("ended with {status}: {said}"))
    }

    /// Starts the process; `Err` with its exit status and what it said if it ends instead of
    /// showing a prompt.
    #[track_caller]
    pub(crate) fn try_start(self) -> Result<Vmm, (ExitStatus, String)> {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let at = |name: &str| dir.path().join(name);
        let mut command = match self.program {
            Program::Hmpsh => Command::new(env!("CARGO_BIN_EXE_hmpsh")),
            Program::Qemu7 => stock(Need::Qemu7),
            Program::Qemu10 => stock(Need::Qemu10),
        };
        command.args(["-accel", self.accel, "-cpu", self.cpu]);
        command.arg("-M").arg(format!(
            "microvm,acpi=off{},kernel-irqchip={}{}",
            self.chips, self.irqchip, self.machine
        ));
        command.arg("-m").arg(format!("{}M", self.memory_mib));
        command.arg("-smp").arg(self.vcpus.to_string());
        command.args(["-nodefaults", "-display", "none"]);
        let append = format!("{} smp={}", self.append, self.vcpus);
        if let Boot::Kernel(file) = &self.boot {
            command.arg("-kernel").arg(file);
            command.arg("-append").arg(self.append.trim());
            if self.program != Program::Hmpsh {
                // The firmware both versions have; it is as long as the block hmpsh announces.
                command.args(["-bios", "qboot.rom"]);
            }
        } else if let Boot::Bios(file) = &self.boot {
            command.arg("-bios").arg(file);
        } else if self.program == Program::Hmpsh {
            command.arg("-append").arg(append);
        } else {
            let image = hmpsh::vm::boot::builtin::image(&append, self.memory_mib << 20);
            std::fs::write(at("bios"), image.expect("sane parameters"))
                .expect("room for the image");
            command.arg("-bios").arg(at("bios"));
        }
        let log = format!("file:{}", at("serial").display());
        File::create(at("serial")).expect("room for the log");
        command.arg("-serial").arg(self.serial.unwrap_or(log));
        command.arg("-monitor").arg(format!(
            "unix:{},server=on,wait=off",
            at("monitor").display()
        ));
        command.args(&self.args);
        let said = || {
            File::options()
                .create(true)
                .append(true)
                .open(at("said"))
                .expect("a file")
        };
        command.stdin(self.stdin.map_or_else(Stdio::null, Stdio::from));
        command.stdout(said()).stderr(said());
        let mut child = command.spawn().expect("the program can be started");
        let socket = at("monitor");
        let started = poll(PATIENCE, || {
            match child.try_wait().expect("a child to wait for") {
                Some(status) => Some(Err(status)),
                None => Hmp::connect(&socket).map(Ok),
            }
        });
        match started {
            Some(Ok(hmp)) => Ok(Vmm { child, hmp, dir }),
            Some(Err(status)) => Err((status, read(&at("said")))),
            None => {
                let _ = child.kill();
                let _ = child.wait();
                panic!("no monitor: {}", read(&at("said")))
            }
        }
    }
}

/// A running process; killed when dropped.
#[derive(Debug)]
pub(crate) struct Vmm {
    child: Child,
    /// Its monitor.
    pub(crate) hmp: Hmp,
    dir: TempDir,
}

impl Vmm {
    /// A path in the machine's own directory.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The guest's log.
    pub(crate) fn log(&self) -> PathBuf {
        self.path("serial")
    }

    /// What the process wrote on stdout and stderr.
    pub(crate) fn said(&self) -> String {
        read(&self.path("said"))
    }

    /// Runs a monitor command.
    #[track_caller]
    pub(crate) fn command(&mut self, line: &str) -> String {
        self.hmp.command(line)
    }

    /// Runs a monitor command that has nothing to say.
    #[track_caller]
    pub(crate) fn quiet(&mut self, line: &str) {
        let printed = self.command(line);
        assert_eq!(
            printed,
            "",
            "'{line}' should print nothing; {}",
            self.said()
        );
    }

    /// Ends it, and waits for its end.
    #[track_caller]
    pub(crate) fn quit(&mut self) {
        self.hmp.send("quit");
        let ended = poll(PATIENCE, || self.child.try_wait().ok().flatten());
        assert!(ended.is_some(), "it does not end; {}", self.said());
    }

    /// A second session on another monitor (`-monitor` in the arguments).
    pub(crate) fn session(&self, socket: &Path) -> Hmp {
        poll(PATIENCE, || Hmp::connect(socket)).expect("a second monitor")
    }

    /// Waits until `info status` says `VM status: {status}`.
    #[track_caller]
    pub(crate) fn wait_status(&mut self, status: &str) {
        self.wait_for("info status", &format!("VM status: {status}\n"));
    }

    /// Waits until `info migrate` says `Migration status: {status}` and returns all it says.
    #[track_caller]
    pub(crate) fn wait_migration(&mut self, status: &str) -> String {
        self.wait_for("info migrate", &format!("Migration status: {status}"))
    }

    /// Repeats a command until its answer contains `words`, and returns that answer.
    #[track_caller]
    pub(crate) fn wait_for(&mut self, line: &str, words: &str) -> String {
        let mut last = String::new();
        let found = poll(PATIENCE, || {
            last = self.hmp.command(line);
            last.contains(words).then_some(())
        });
        assert!(
            found.is_some(),
            "'{line}' never said '{words}' but '{last}'; {}",
            self.said()
        );
        last
    }

    /// Waits until the process has printed `words`.
    #[track_caller]
    pub(crate) fn wait_said(&self, words: &str) {
        let found = poll(PATIENCE, || self.said().contains(words).then_some(()));
        assert!(
            found.is_some(),
            "it never said '{words}' but '{}'",
            self.said()
        );
    }

    /// Waits for `more` beacons; see [`beacon::wait_beacons`].
    #[track_caller]
    pub(crate) fn wait_beacons(&self, more: u64) -> beacon::Beacons {
        beacon::wait_beacons(&[&self.log()], more)
    }

    /// A figure of `info blockstats`, of the first disk.
    #[track_caller]
    pub(crate) fn blockstats(&mut self, name: &str) -> u64 {
        let text = self.command("info blockstats");
        let mut words = text.split_whitespace();
        let value = words.find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
        value
            .and_then(|value| value.parse().ok())
            .unwrap_or_else(|| panic!("no {name} in '{text}'"))
    }

    /// The port an incoming tcp migration listens on, asked for as port 0.
    #[track_caller]
    pub(crate) fn port(&mut self) -> u16 {
        let text = self.wait_for("info migrate", "socket address: [");
        let address = text
            .lines()
            .find(|line| line.trim_start().starts_with("tcp:"));
        let port = address.and_then(|line| line.rsplit(':').next()?.trim().parse().ok());
        port.unwrap_or_else(|| panic!("no port in '{text}'"))
    }

    /// All of guest RAM below 3 GiB as the monitor saves it; the guest should be stopped.
    #[track_caller]
    pub(crate) fn memory(&mut self, bytes: u64) -> Vec<u8> {
        let file = self.path("memory");
        self.quiet(&format!("pmemsave 0 {bytes:#x} \"{}\"", file.display()));
        let memory = std::fs::read(&file).expect("what pmemsave wrote");
        assert_eq!(memory.len() as u64, bytes);
        memory
    }

    /// Eight bytes of guest-physical memory.
    #[track_caller]
    pub(crate) fn word(&mut self, address: u64) -> u64 {
        let printed = self.command(&format!("xp /1gx {address:#x}"));
        let word = printed.rsplit("0x").next().map(str::trim_end);
        word.and_then(|word| u64::from_str_radix(word, 16).ok())
            .unwrap_or_else(|| panic!("no word in '{printed}'"))
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The most memory that the process ever had at once, in MiB.
    pub(crate) fn peak_mib(&self) -> u64 {
        let status = read(Path::new(&format!("/proc/{}/status", self.pid())));
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = line.unwrap().trim().trim_end_matches(" kB");
        kib.parse::<u64>().unwrap() >> 10
    }

    /// Processor time of all threads so far.
    pub(crate) fn cpu_time(&self) -> Duration {
        let stat = read(Path::new(&format!("/proc/{}/stat", self.child.id())));
        let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
        let ticks: u64 = fields
            .split_whitespace()
            .skip(11)
            .take(2)
            .map(|field| field.parse::<u64>().expect("ticks"))
            .sum();
        // The kernel reports hundredths of a second whatever its own tick is.
        Duration::from_millis(ticks * 10)
    }

    /// Sends the process a signal.
    pub(crate) fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.child.id() as i32).expect("a process id");
        kill_process(pid, signal).expect("a signal can be sent to a child");
        if signal == Signal::STOP {
            // Each thread stops by itself, on a busy host a little later.
            let stopped = poll(PATIENCE, || self.is_stopped().then_some(()));
            assert!(stopped.is_some(), "it did not stop; {}", self.said());
        }
    }

    /// Whether every thread is stopped.
    fn is_stopped(&self) -> bool {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.child.id()));
        tasks.expect("a running child").flatten().all(|task| {
            let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            stat.rsplit(')')
                .next()
                .is_some_and(|rest| rest.trim_start().starts_with('T'))
        })
    }

    /// Waits for the process to end by itself.
    #[track_caller]
    pub(crate) fn wait_exit(&mut self) -> ExitStatus {
        let exit = poll(PATIENCE, || {
            self.child.try_wait().expect("a child to wait for")
        });
        exit.unwrap_or_else(|| panic!("it did not end; {}", self.said()))
    }

    /// Whether the process lives.
    pub(crate) fn is_alive(&mut self) -> bool {
        self.child
            .try_wait()
            .expect("a child to wait for")
            .is_none()
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn stock(need: Need) -> Command {
    let words = qemu(need).expect("the test required it");
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]);
    command
}

fn read(path: &Path) -> String {
    String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned()
}

/// A firmware image that runs `code` in real mode.
pub(crate) fn firmware(code: &[u8]) -> tempfile::NamedTempFile {
    let mut bytes = vec![0; 0x10000];
    bytes[..code.len()].copy_from_slice(code);
    // Jumps to the image's first byte.
    bytes[0xfff0..0xfff5].copy_from_slice(&[0xea, 0, 0, 0, 0xf0]);
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    file
}

/// Whether all programs are there.
pub(crate) fn have(programs: &[Program]) -> bool {
    programs.iter().all(|program| require(program.needs()))
}
