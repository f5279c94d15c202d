//! The matrix: a running guest moves between hmpsh and stock QEMU 7.2 and 10.0, in both directions,
//! in machines of many shapes. One line per cell; the table in the README is made of them.
//!
//! `cargo test --test matrix` runs an array in which every pair of values occurs (`cargo test` alone
//! does not: it takes minutes), `… -- --full` every combination, `… -- WORDS` the cells whose line
//! has those words in it. With `HMPSH_BLESS=1` the README's table is written, otherwise compared.

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;
use std::time::Duration;

use common::beacon::Beacons;
use common::kernel::{Class, elf};
use common::need::require;
use common::pairwise::{every, pairwise};
use common::poll;
use common::vmm::Program::{self, Hmpsh, Qemu7, Qemu10};
use common::vmm::{Setup, Vmm};

/// What is moved where, and how.
#[derive(Clone, Copy)]
struct Cell {
    route: [Program; 2],
    transport: &'static str,
    /// PIC and PIT.
    chips: bool,
    irqchip: &'static str,
    vcpus: u32,
    serial: bool,
    memory_mib: u64,
    /// The PVH kernel, or the built-in guest as flat firmware.
    is_kernel: bool,
}

const ROUTES: [[Program; 2]; 4] = [
    [Qemu7, Hmpsh],
    [Hmpsh, Qemu7],
    [Qemu10, Hmpsh],
    [Hmpsh, Qemu10],
];
const TRANSPORTS: [&str; 4] = ["tcp", "unix", "exec", "file"];
const IRQCHIPS: [&str; 2] = ["split", "on"];
const MEMORY_MIB: [u64; 3] = [64, 256, 5 << 10];
/// Values of each factor, in the order of [`Cell::new`].
const FACTORS: [usize; 8] = [
    ROUTES.len(),
    TRANSPORTS.len(),
    2,
    IRQCHIPS.len(),
    2,
    2,
    MEMORY_MIB.len(),
    2,
];

impl Cell {
    fn new(row: &[usize]) -> Self {
        Self {
            route: ROUTES[row[0]],
            transport: TRANSPORTS[row[1]],
            chips: row[2] == 0,
            irqchip: IRQCHIPS[row[3]],
            vcpus: row[4] as u32 + 1,
            serial: row[5] == 0,
            memory_mib: MEMORY_MIB[row[6]],
            is_kernel: row[7] == 1,
        }
    }

    /// QEMU has `file:` since 8.2.
    fn is_possible(row: &[usize]) -> bool {
        let cell = Self::new(row);
        cell.transport != "file" || !cell.route.contains(&Qemu7)
    }

    /// Its columns.
    fn show(&self) -> String {
        let [from, to] = self.route.map(name);
        let chips = if self.chips {
            ""
        } else {
            ",pic=off,pit=off,rtc=off"
        };
        let serial = if self.serial { "yes" } else { "none" };
        let memory = match self.memory_mib {
            mib @ ..1024 => format!("{mib} MiB"),
            mib => format!("{} GiB", mib >> 10),
        };
        let guest = if self.is_kernel { "PVH" } else { "flat" };
        let (transport, irqchip, vcpus) = (self.transport, self.irqchip, self.vcpus);
        format!(
            "{from} | {to} | {transport} | `acpi=off{chips}` | {irqchip} | {vcpus} | {serial} | \
             {memory} | {guest}"
        )
    }

    fn setup(&self, program: Program, kernel: &Path) -> Setup {
        let mut setup = Setup::new(program)
            .irqchip(self.irqchip)
            .vcpus(self.vcpus)
            .memory_mib(self.memory_mib);
        if self.chips {
            setup = setup.default_chips();
        }
        if !self.serial {
            setup = setup.serial("none");
        }
        if self.is_kernel {
            let line = if self.vcpus == 1 { "alone" } else { "two" };
            return setup.kernel(kernel).append(line);
        }
        // The memory above 4 GiB, where there is some; code, stacks and tables are below.
        let base = if self.memory_mib > 4096 {
            "base=4G"
        } else {
            ""
        };
        setup.append("window=2M").append(base)
    }

    /// Moves the guest; returns what the source says of its downtime.
    fn run(&self, kernel: &Path) -> String {
        let [from, to] = self.route;
        let mut source = self.setup(from, kernel).start();
        self.wait_alive(&mut source, &[]);
        let file = source.path("stream");
        let file = file.display();
        let (outgoing, incoming) = match self.transport {
            "tcp" => (String::new(), "tcp:127.0.0.1:0".to_owned()),
            "unix" => (format!("unix:{file}"), format!("unix:{file}")),
            "exec" => (format!("\"exec:cat > {file}\""), format!("exec:cat {file}")),
            _ => (format!("file:{file}"), format!("file:{file}")),
        };
        let dest = || self.setup(to, kernel).incoming(&incoming).start();
        let (mut dest, told) = match self.transport {
            "tcp" => {
                let mut dest = dest();
                let port = dest.port();
                let told = hand_over(&mut source, &format!("tcp:127.0.0.1:{port}"));
                (dest, told)
            }
            "unix" => {
                let dest = dest();
                (dest, hand_over(&mut source, &outgoing))
            }
            _ => {
                let told = hand_over(&mut source, &outgoing);
                (dest(), told)
            }
        };
        dest.wait_status("running");
        let last = self.pulse(&mut source);
        let first = self.pulse(&mut dest);
        assert!(
            last.iter().zip(&first).all(|(last, first)| last <= first),
            "it went back"
        );
        self.wait_alive(&mut dest, &[&source]);
        let downtime = told
            .lines()
            .find_map(|line| line.strip_prefix("downtime: "));
        downtime.unwrap_or("no downtime was told").to_owned()
    }

    /// Waits until the guest has been seen to check all of its memory, each vCPU at work. `before`
    /// are the hosts it lived on.
    fn wait_alive(&self, host: &mut Vmm, before: &[&Vmm]) {
        let mut start = None;
        let mut now = Vec::new();
        let lives = poll(Duration::from_secs(60), || {
            now = self.pulse(host);
            let start = start.get_or_insert_with(|| now.clone());
            let enough = if self.is_kernel { 16 } else { 2 };
            now.iter()
                .zip(start)
                .enumerate()
                // The second vCPU's are always ticks.
                .all(|(cpu, (now, start))| *now >= *start + if cpu == 0 { enough } else { 5 })
                .then_some(())
        });
        assert!(lives.is_some(), "{start:?}, then {now:?}; {}", host.said());
        if self.serial {
            let mut log = Vec::new();
            for host in before.iter().copied().chain([&*host]) {
                log.extend(std::fs::read(host.log()).expect("a log"));
            }
            let life = self.life(&log).unwrap_or_else(|wrong| panic!("{wrong}"));
            assert!(life.last > 0, "it said nothing");
        }
    }

    /// Numbers that grow while the guest lives and finds nothing wrong, one of each vCPU.
    fn pulse(&self, host: &mut Vmm) -> Vec<u64> {
        let ticks = if self.is_kernel {
            KERNEL_TICKS
        } else {
            FLAT_TICKS
        };
        if !self.is_kernel {
            assert!(
                host.word(FLAT_FAULT) & 0xff00 == 0,
                "the guest found a fault"
            );
        }
        let mut pulse = vec![if self.is_kernel {
            host.word(ticks[0])
        } else {
            // How often the first page of the window was checked and written again.
            let base = if self.memory_mib > 4096 {
                1 << 32
            } else {
                1 << 20
            };
            host.word(base) >> 24
        }];
        if self.vcpus == 2 {
            pulse.push(host.word(ticks[1]));
        }
        pulse
    }

    /// What all hosts saw on COM1 reads as one life.
    fn life(&self, log: &[u8]) -> Result<Beacons, String> {
        if !self.is_kernel {
            return Beacons::parse(log);
        }
        let memory = (self.memory_mib << 20).min(3 << 30);
        let (line, cpu) = if self.vcpus == 1 {
            ("alone", "")
        } else {
            ("two", "cpu 1\n")
        };
        let header = format!("kernel\nmemory {memory}\ncommand line {line}\n{cpu}");
        let text = String::from_utf8_lossy(log);
        match text.strip_prefix(&header) {
            Some(rest) => Beacons::parse(format!("hmpsh guest kernel\n{rest}").as_bytes()),
            None => Err(format!("another header: {text}")),
        }
    }
}

/// A byte that is 1 when the built-in guest has found a fault, in the second byte of this word.
const FLAT_FAULT: u64 = 0x600;
/// Timer ticks of the two vCPUs.
const FLAT_TICKS: [u64; 2] = [0x8018, 0x8118];
const KERNEL_TICKS: [u64; 2] = [0x20_8000, 0x20_8008];

fn name(program: Program) -> &'static str {
    match program {
        Hmpsh => "hmpsh",
        Qemu7 => "QEMU 7.2",
        Qemu10 => "QEMU 10.0",
    }
}

/// Migrates, sees the guest gone and returns what the source says of it.
fn hand_over(source: &mut Vmm, uri: &str) -> String {
    let printed = source.command(&format!("migrate -d {uri}"));
    // QEMU reads all of 5 GiB, on a busy machine for a while.
    let mut told = String::new();
    let ended = poll(Duration::from_secs(60), || {
        told = source.command("info migrate");
        let has_ended = ["completed", "failed"].map(|end| format!("status: {end}"));
        has_ended.iter().any(|end| told.contains(end)).then_some(())
    });
    assert!(
        ended.is_some() && told.contains("Migration status: completed"),
        "migrate {uri}: {printed}{told}{}",
        source.said()
    );
    source.wait_status("paused (postmigrate)");
    told
}

/// Runs the cells, two at a time, and returns the rows of the table; `Err` if one failed.
fn run(cells: &[Cell]) -> Result<Vec<String>, usize> {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let kernel = dir.path().join("kernel");
    std::fs::write(&kernel, elf(Class::Elf64)).expect("room for the kernel");
    let next = Mutex::new(cells.iter().enumerate());
    let rows = Mutex::new(vec![String::new(); cells.len()]);
    let failed = Mutex::new(0);
    let work = || {
        loop {
            let Some((number, cell)) = next.lock().expect("no panic").next() else {
                return;
            };
            let columns = cell.show();
            let result = catch_unwind(AssertUnwindSafe(|| cell.run(&kernel)));
            let (verdict, downtime) = match result {
                Ok(downtime) => ("ok", downtime),
                Err(_) => {
                    *failed.lock().expect("no panic") += 1;
                    ("FAILED", String::new())
                }
            };
            let row = format!("| {columns} | {verdict} | {downtime} |");
            println!("{:>4}/{} {row}", number + 1, cells.len());
            rows.lock().expect("no panic")[number] = row;
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(work);
        scope.spawn(work);
    });
    match failed.into_inner().expect("no panic") {
        0 => Ok(rows.into_inner().expect("no panic")),
        failed => Err(failed),
    }
}

/// Writes the rows into the README, or sees that they stand there, whatever the downtime was.
fn document(rows: &[String]) -> bool {
    let readme = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("README.md");
    let text = std::fs::read_to_string(&readme).expect("a README");
    let (head, rest) = text.split_once(BEGIN).expect("where the matrix begins");
    let (table, tail) = rest.split_once(END).expect("where the matrix ends");
    if std::env::var_os("HMPSH_BLESS").is_some() {
        let rows: String = rows.iter().map(|row| format!("{row}\n")).collect();
        let text = format!("{head}{BEGIN}{HEADER}{rows}{END}{tail}");
        return std::fs::write(&readme, text).is_ok();
    }
    let what = |row: &str| row.rsplitn(3, '|').nth(2).map(str::to_owned);
    let told: Vec<_> = table
        .lines()
        .skip(HEADER.lines().count())
        .map(what)
        .collect();
    let seen: Vec<_> = rows.iter().map(|row| what(row)).collect();
    told == seen
}

/// Cells for each change.
const CELLS: usize = 48;

const BEGIN: &str = "<!-- cargo test --test matrix -->\n";
const END: &str = "<!-- end -->";
const HEADER: &str = "\
| from | to | over | `-M microvm,…` | irqchip | vCPUs | serial | memory | guest | result | downtime |
|---|---|---|---|---|---|---|---|---|---|---|
";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let (options, words): (Vec<_>, Vec<_>) = words.into_iter().partition(|w| w.starts_with('-'));
    if !ROUTES
        .as_flattened()
        .iter()
        .all(|program| require(program.needs()))
    {
        return ExitCode::SUCCESS;
    }
    let full = options.iter().any(|option| option == "--full");
    let rows = if full {
        every(&FACTORS, Cell::is_possible)
    } else {
        pairwise(&FACTORS, CELLS, Cell::is_possible)
    };
    let cells: Vec<Cell> = rows.iter().map(|row| Cell::new(row)).collect();
    let wanted = |cell: &Cell| words.iter().all(|word| cell.show().contains(word.as_str()));
    let cells: Vec<Cell> = cells.into_iter().filter(wanted).collect();
    match run(&cells) {
        Err(failed) => {
            println!("matrix: {failed} of {} cells failed", cells.len());
            ExitCode::FAILURE
        }
        Ok(rows) if !full && words.is_empty() && !document(&rows) => {
            println!("matrix: the README has another table; HMPSH_BLESS=1 writes this one");
            ExitCode::FAILURE
        }
        Ok(rows) => {
            println!("matrix: {} of {} cells ok", rows.len(), rows.len());
            ExitCode::SUCCESS
        }
    }
}
