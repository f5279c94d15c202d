//! How fast a guest moves, and its disk is: `cargo bench [-- [--quick] [--rounds N] [--only PART]]`.
//!
//! Contenders, in turn within each round: hmpsh (the release binary), QEMU 7.2 and 10.0 where they
//! are found (`HMPSH_QEMU7`, `HMPSH_QEMU10`), and the bare limit: a sender and a receiver of the
//! same page format and nothing else, `writev` of header and borrowed page, `readv` that guesses
//! that the next pages are consecutive, straight into anonymous huge-page memory. The others are
//! two processes with KVM and move over tcp loopback, with a bandwidth limit out of reach.
//!
//! How memory gets its content: the guest is never started (`-S`), and the benchmark writes into
//! the process's RAM from outside, through `/proc/PID/mem` at the address that `gpa2hva` tells.
//! It works alike for every contender, leaves all memory anonymous, and needs no guest program
//! that takes minutes on hosts that interpret guests. In the same way the memory of a destination
//! is touched beforehand (warm) or not (fresh), and compared afterwards.
//!
//! A time is from the `migrate` command until the source says `completed` and the destination has
//! left `inmigrate`, seen from outside. One round is thrown away; figures are medians.

mod bare;
#[path = "../../tests/common/mod.rs"]
mod common;
mod disk;
mod io;

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use common::need::require;
use common::vmm::{Program, Setup, Vmm};
use hmpsh::vm::memory::PAGE_SIZE;

fn main() -> ExitCode {
    let order = match Order::parse(std::env::args().skip(1)) {
        Ok(order) => order,
        Err(usage) => {
            eprintln!("{usage}");
            return ExitCode::from(2);
        }
    };
    let programs: Vec<Program> = [Program::Hmpsh, Program::Qemu7, Program::Qemu10]
        .into_iter()
        .filter(|program| require(program.needs()))
        .collect();
    if programs.is_empty() {
        return ExitCode::SUCCESS;
    }
    let size = |bytes: u64| format!("{} MiB", bytes >> 20);
    println!("{} rounds, one more thrown away; medians\n", order.rounds);

    for (name, is_warm, goal) in [
        ("warm", true, "1.5 times QEMU, 0.8 of the bare limit"),
        ("fresh", false, "3 times QEMU"),
    ] {
        if !order.includes(name) {
            continue;
        }
        println!(
            "{} of incompressible memory, destination {name}; to reach: {goal}",
            size(order.full)
        );
        let times = rounds(order.rounds, programs.len() + 1, |contender| {
            programs.get(contender).map_or_else(
                || bare::run(order.full, is_warm),
                |program| move_full(*program, order.full, is_warm),
            )
        });
        let gigabytes = order.full as f64 / 1e9;
        report(&programs, &times, |sample| {
            format!(
                "{:6.2} GB/s {:6.2} GB per processor second",
                gigabytes / sample.time.as_secs_f64(),
                gigabytes / sample.processor.as_secs_f64(),
            )
        });
    }

    if order.includes("untouched") {
        println!(
            "{} that were never touched; to reach: 5 times QEMU",
            size(order.untouched)
        );
        let times = rounds(order.rounds, programs.len(), |contender| {
            move_untouched(programs[contender], order.untouched)
        });
        report(&programs, &times, milliseconds);
    }
    if order.includes("disk") {
        println!(
            "{} of disk with 64 MiB of memory (-b); to reach: 2 times QEMU 7.2, 0.7 of a copy",
            size(order.disk)
        );
        let images = disk::Images::new(order.disk);
        // QEMU 10.0 has none.
        let sending: Vec<Program> = programs
            .iter()
            .copied()
            .filter(|program| *program != Program::Qemu10)
            .collect();
        let times = rounds(order.rounds, sending.len() + 1, |contender| {
            match sending.get(contender) {
                Some(program) => images.move_over(*program),
                None => images.copy(),
            }
        });
        let gigabytes = order.disk as f64 / 1e9;
        report(&sending, &times, |sample| {
            format!("{:6.2} GB/s", gigabytes / sample.time.as_secs_f64())
        });
    }
    if order.includes("io") {
        io(&order, &programs);
    }
    if order.includes("downtime") {
        println!("Downtime of a running guest (16 MiB rewritten all the time); to reach: QEMU's");
        let times = rounds(order.rounds, programs.len(), |contender| {
            downtime(programs[contender])
        });
        report(&programs, &times, milliseconds);
    }
    if !order.includes("prompt") || prompt(&programs) || !order.is_quick {
        return ExitCode::SUCCESS;
    }
    eprintln!("hmpsh needs more at the prompt than it may");
    ExitCode::FAILURE
}

/// What a guest gets from its disk.
fn io(order: &Order, programs: &[Program]) {
    let image = disk::image(order.io);
    for way in io::WAYS {
        let size = order.io >> 20;
        println!(
            "A guest {}, 8 at once, on {size} MiB in the host's cache; to reach: QEMU's",
            way.name()
        );
        let times = rounds(order.rounds, programs.len(), |contender| {
            way.run(programs[contender], &image)
        });
        report(programs, &times, |sample| {
            format!(
                "{:8.1} MB/s {:6.2} GB per processor second",
                1e3 / sample.time.as_secs_f64(),
                1.0 / sample.processor.as_secs_f64(),
            )
        });
    }
}

/// Whether hmpsh is at its prompt in time and with as little memory as it should. The two figures
/// hold on any host and so decide whether a quick run succeeds.
fn prompt(programs: &[Program]) -> bool {
    println!("From start to prompt; to reach: {START_LIMIT:?}");
    let times = rounds(STARTS, programs.len(), |contender| {
        start(programs[contender])
    });
    report(programs, &times, milliseconds);
    let time = median(times[0].iter().map(|sample| sample.time).collect());

    println!("Memory at the prompt (PSS without guest memory); to reach: {MEMORY_LIMIT} KiB");
    let sizes: Vec<u64> = programs
        .iter()
        .map(|program| median((0..STARTS).map(|_| own_memory(*program)).collect()))
        .collect();
    for (program, size) in programs.iter().zip(&sizes) {
        println!("  {:10} {:8.1} MiB", name(*program), *size as f64 / 1024.0);
    }
    time < START_LIMIT && sizes[0] < MEMORY_LIMIT
}

/// What to do, from the command line.
struct Order {
    /// Only this part.
    only: Option<String>,
    is_quick: bool,
    rounds: usize,
    full: u64,
    untouched: u64,
    disk: u64,
    io: u64,
}

impl Order {
    fn includes(&self, part: &str) -> bool {
        self.only.as_ref().is_none_or(|only| only == part)
    }

    fn parse(mut args: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut order = Self {
            only: None,
            is_quick: false,
            rounds: 0,
            full: 2 << 30,
            untouched: 8 << 30,
            disk: 1 << 30,
            io: 256 << 20,
        };
        let mut default_rounds = 9;
        while let Some(arg) = args.next() {
            match arg.as_str() {
                // Cargo says so.
                "--bench" => {}
                "--quick" => {
                    (order.full, order.untouched) = (256 << 20, 2 << 30);
                    (order.disk, order.io) = (256 << 20, 64 << 20);
                    default_rounds = 3;
                    order.is_quick = true;
                }
                "--only" => {
                    let part = args.next().filter(|part| PARTS.contains(&&**part));
                    order.only = Some(part.ok_or(format!("--only expects one of {PARTS:?}"))?);
                }
                "--rounds" => {
                    let number = args.next().and_then(|text| text.parse().ok());
                    order.rounds = number
                        .filter(|n| *n > 0)
                        .ok_or("--rounds expects a number from 1 on")?;
                }
                _ => {
                    return Err(format!(
                        "'{arg}'? It knows --quick, --rounds N and --only PART"
                    ));
                }
            }
        }
        if order.rounds == 0 {
            order.rounds = default_rounds;
        }
        Ok(order)
    }
}

const PARTS: [&str; 7] = [
    "warm",
    "fresh",
    "untouched",
    "disk",
    "io",
    "downtime",
    "prompt",
];

/// What a run took.
#[derive(Clone, Copy)]
struct Sample {
    time: Duration,
    /// Processor time of all that took part; it tells the same however busy the host is.
    processor: Duration,
}

impl Sample {
    /// Where only time matters.
    fn of(time: Duration) -> Self {
        let processor = Duration::ZERO;
        Self { time, processor }
    }
}

/// Runs every contender once a round, one round more than asked for, and returns the times of each
/// without the first.
fn rounds(
    rounds: usize,
    contenders: usize,
    mut run: impl FnMut(usize) -> Sample,
) -> Vec<Vec<Sample>> {
    let mut times = vec![Vec::new(); contenders];
    for round in 0..=rounds {
        for (contender, times) in times.iter_mut().enumerate() {
            let time = run(contender);
            if round > 0 {
                times.push(time);
            }
        }
    }
    times
}

/// One line per contender: its median, its range, and its time in hmpsh's.
fn report(programs: &[Program], samples: &[Vec<Sample>], figure: impl Fn(Sample) -> String) {
    let medians: Vec<Sample> = samples
        .iter()
        .map(|samples| Sample {
            time: median(samples.iter().map(|sample| sample.time).collect()),
            processor: median(samples.iter().map(|sample| sample.processor).collect()),
        })
        .collect();
    for (contender, sample) in medians.iter().enumerate() {
        let name = programs
            .get(contender)
            .map_or("bare limit", |program| name(*program));
        let spread = || samples[contender].iter().map(|sample| sample.time);
        let ratio = sample.time.as_secs_f64() / medians[0].time.as_secs_f64();
        println!(
            "  {name:10} {}  {ratio:6.2} times hmpsh's time  ({:.1?} to {:.1?})",
            figure(*sample),
            spread().min().unwrap_or_default(),
            spread().max().unwrap_or_default(),
        );
    }
    println!();
}

fn milliseconds(sample: Sample) -> String {
    format!("{:8.1} ms", sample.time.as_secs_f64() * 1e3)
}

fn median<T: Ord + Copy>(mut values: Vec<T>) -> T {
    values.sort_unstable();
    values[values.len() / 2]
}

fn name(program: Program) -> &'static str {
    match program {
        Program::Hmpsh => "hmpsh",
        Program::Qemu7 => "QEMU 7.2",
        Program::Qemu10 => "QEMU 10.0",
    }
}

/// A source that never ran.
fn idle(program: Program, bytes: u64) -> Vmm {
    let mut vm = Setup::new(program)
        .memory_mib(bytes >> 20)
        .args(&["-S"])
        .start();
    vm.quiet("migrate_set_parameter max-bandwidth 100g");
    vm
}

fn incoming(program: Program, bytes: u64) -> Vmm {
    let setup = Setup::new(program).memory_mib(bytes >> 20).args(&["-S"]);
    setup.incoming("tcp:127.0.0.1:0").start()
}

fn move_full(program: Program, bytes: u64, is_warm: bool) -> Sample {
    let mut source = idle(program, bytes);
    let memory = Ram::of(&mut source, bytes);
    memory.each_chunk(|at, chunk| {
        fill(at, chunk);
        memory.write(at, chunk);
    });
    let mut dest = incoming(program, bytes);
    let arrived = Ram::of(&mut dest, bytes);
    if is_warm {
        arrived.each_chunk(|at, chunk| arrived.write(at, chunk));
    }
    let time = move_over(&mut source, &mut dest);
    let mut expected = vec![0; CHUNK];
    arrived.each_chunk(|at, chunk| {
        fill(at, &mut expected);
        arrived.read(at, chunk);
        assert!(
            chunk == expected,
            "{}: memory differs at {at:#x}",
            name(program)
        );
    });
    time
}

fn move_untouched(program: Program, bytes: u64) -> Sample {
    let mut source = idle(program, bytes);
    let mut dest = incoming(program, bytes);
    let time = move_over(&mut source, &mut dest);
    let arrived = Ram::of(&mut dest, bytes);
    let mut page = [0; PAGE_SIZE];
    for at in (0..bytes).step_by(16 << 20) {
        arrived.read(at, &mut page);
        assert!(
            page == [0; PAGE_SIZE],
            "{}: memory differs at {at:#x}",
            name(program)
        );
    }
    time
}

fn move_over(source: &mut Vmm, dest: &mut Vmm) -> Sample {
    let port = dest.port();
    let before = source.cpu_time() + dest.cpu_time();
    let start = Instant::now();
    source.quiet(&format!("migrate -d tcp:127.0.0.1:{port}"));
    watch(source, "info migrate", |state| {
        assert!(!state.contains("Migration status: failed"), "{state}");
        state.contains("Migration status: completed")
    });
    watch(dest, "info status", |state| !state.contains("inmigrate"));
    let time = start.elapsed();
    let processor = source.cpu_time() + dest.cpu_time() - before;
    Sample { time, processor }
}

/// Asks every one to five milliseconds, depending on how long it takes: often enough for the
/// figures, too seldom to slow anyone down.
fn watch(vm: &mut Vmm, line: &str, is_done: impl Fn(&str) -> bool) {
    let start = Instant::now();
    while !is_done(&vm.command(line)) {
        assert!(
            start.elapsed() < LONGEST,
            "'{line}' never ends: {}",
            vm.said()
        );
        let pause = start.elapsed() / 64;
        std::thread::sleep(pause.clamp(Duration::from_millis(1), Duration::from_millis(5)));
    }
}

/// From when the source was last seen running to when the destination first was. What a source
/// tells is no measure: QEMU's ends when the last byte has left, before anything is loaded.
fn downtime(program: Program) -> Sample {
    let mut source = Setup::new(program).memory_mib(128).start();
    source.wait_beacons(3);
    let mut dest = Setup::new(program)
        .memory_mib(128)
        .incoming("tcp:127.0.0.1:0")
        .start();
    let port = dest.port();
    source.quiet(&format!("migrate -d tcp:127.0.0.1:{port}"));
    let (stopped, started) = std::thread::scope(|threads| {
        let stopped = threads.spawn(|| {
            let mut seen = Instant::now();
            closely(&mut source, |state| {
                if state.contains("VM status: running") {
                    seen = Instant::now();
                }
                state.contains("postmigrate")
            });
            seen
        });
        closely(&mut dest, |state| state.contains("VM status: running"));
        let started = Instant::now();
        (stopped.join().expect("the source can be watched"), started)
    });
    common::beacon::wait_beacons(&[&source.log(), &dest.log()], 3);
    Sample::of(started.saturating_duration_since(stopped))
}

/// Asks for the status several times a millisecond.
fn closely(vm: &mut Vmm, mut is_done: impl FnMut(&str) -> bool) {
    let start = Instant::now();
    while !is_done(&vm.command("info status")) {
        assert!(start.elapsed() < LONGEST, "{}", vm.said());
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// From `exec` to the prompt on stdout.
fn start(program: Program) -> Sample {
    let (words, extra) = match program {
        Program::Hmpsh => (vec![env!("CARGO_BIN_EXE_hmpsh").to_owned()], vec![]),
        Program::Qemu7 => (stock(common::need::Need::Qemu7), vec!["-nodefaults"]),
        Program::Qemu10 => (stock(common::need::Need::Qemu10), vec!["-nodefaults"]),
    };
    let start = Instant::now();
    let mut child = Command::new(&words[0])
        .args(&words[1..])
        .args([
            "-accel", "kvm", "-cpu", "qemu64", "-M", MACHINE, "-m", "128M", "-S",
        ])
        .args(["-display", "none", "-monitor", "stdio"])
        .args(extra)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("the program can be started");
    let mut printed = Vec::new();
    let output = child.stdout.as_mut().expect("a pipe");
    while !printed.ends_with(common::hmp::PROMPT.as_bytes()) {
        let mut byte = [0];
        output.read_exact(&mut byte).expect("a prompt");
        printed.push(byte[0]);
    }
    let time = start.elapsed();
    let _ = child.kill();
    let _ = child.wait();
    Sample::of(time)
}

fn stock(need: common::need::Need) -> Vec<String> {
    common::need::qemu(need).expect("it was found").to_vec()
}

/// KiB of the process that are not guest memory.
fn own_memory(program: Program) -> u64 {
    let mut vm = Setup::new(program).memory_mib(128).start();
    let guest = [host_address(&mut vm, 0), host_address(&mut vm, 0xffff_0000)];
    let maps = std::fs::read_to_string(format!("/proc/{}/smaps", vm.pid())).expect("smaps");
    let mut total = 0;
    let mut is_guest = false;
    for line in maps.lines() {
        let range = line
            .split(' ')
            .next()
            .and_then(|range| range.split_once('-'));
        let range =
            range.map(|(from, to)| (u64::from_str_radix(from, 16), u64::from_str_radix(to, 16)));
        if let Some((Ok(from), Ok(to))) = range {
            is_guest = guest.iter().any(|address| (from..to).contains(address));
        } else if let Some(size) = line.strip_prefix("Pss:").filter(|_| !is_guest) {
            total += size
                .trim()
                .trim_end_matches(" kB")
                .parse::<u64>()
                .expect("kB");
        }
    }
    total
}

fn host_address(vm: &mut Vmm, guest: u64) -> u64 {
    let told = vm.command(&format!("gpa2hva {guest:#x}"));
    let address = told
        .trim()
        .rsplit_once("0x")
        .and_then(|(_, hex)| u64::from_str_radix(hex, 16).ok());
    address.unwrap_or_else(|| panic!("no address in '{told}'"))
}

/// A process's guest RAM below 3 GiB, from outside.
struct Ram {
    memory: File,
    start: u64,
    bytes: u64,
}

impl Ram {
    fn of(vm: &mut Vmm, bytes: u64) -> Self {
        let path = format!("/proc/{}/mem", vm.pid());
        let memory = File::options()
            .read(true)
            .write(true)
            .open(path)
            .expect("a child's memory");
        Self {
            memory,
            start: host_address(vm, 0),
            bytes,
        }
    }

    fn read(&self, at: u64, to: &mut [u8]) {
        self.memory
            .read_exact_at(to, self.start + at)
            .expect("guest RAM can be read");
    }

    fn write(&self, at: u64, from: &[u8]) {
        self.memory
            .write_all_at(from, self.start + at)
            .expect("guest RAM can be written");
    }

    /// Calls `each` for every chunk of this memory with room that is all zero at first.
    fn each_chunk(&self, mut each: impl FnMut(u64, &mut [u8])) {
        let mut chunk = vec![0; CHUNK];
        for at in (0..self.bytes).step_by(CHUNK) {
            each(at, &mut chunk);
        }
    }
}

/// What stands at `at`: bytes that no compressor shortens, the same in every round.
fn fill(at: u64, chunk: &mut [u8]) {
    let mut state = at ^ 0x9e37_79b9_7f4a_7c15;
    for word in chunk.chunks_exact_mut(8) {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word.copy_from_slice(&(mixed ^ (mixed >> 31)).to_le_bytes());
    }
}

const MACHINE: &str = "microvm,acpi=off,pic=off,pit=off,rtc=off";
const CHUNK: usize = 1 << 20;
/// Runs of what is not a migration.
const STARTS: usize = 10;
const START_LIMIT: Duration = Duration::from_millis(50);
/// KiB.
const MEMORY_LIMIT: u64 = 15 << 10;
/// What no migration here takes.
const LONGEST: Duration = Duration::from_secs(300);
