//! Holds the house in shape: the floors, the rooms where `unsafe` may live, the sizes of files.
//!
//! It reads the sources, so that a breach fails a test with file and line, not a reviewer's eye.

use std::fs;
use std::path::{Path, PathBuf};

/// Top-level modules by floor; a module may name only those of lower floors, and itself.
const FLOORS: [(u8, &[&str]); 6] = [
    (6, &["cli", "demo", "monitor", "program"]),
    (5, &["control", "event_loop"]),
    (4, &["migration"]),
    (3, &["vm"]),
    (2, &["block", "chardev", "logger", "poll", "socket"]),
    (
        1,
        &[
            "calendar", "config", "errno", "event", "iov", "units", "vmstate",
        ],
    ),
];

/// Modules of one floor that may name each other, one way only.
const NEIGHBOURS: [(&str, &str); 5] = [
    // `drive_add` reads what `-drive` reads.
    ("monitor", "cli"),
    ("chardev", "poll"),
    ("chardev", "socket"),
    ("program", "monitor"),
    ("program", "cli"),
];

/// Files where `unsafe` may stand. Each says why at its top.
const UNSAFE_ROOMS: [&str; 8] = [
    "src/event_loop/signal.rs",
    "src/iov.rs",
    "src/migration/channel/inherited.rs",
    "src/migration/channel/outq.rs",
    "src/vm/boot/builtin.rs",
    "src/vm/kvm.rs",
    "src/vm/memory.rs",
    "src/vm/memory/hash.rs",
];

/// Most lines a file may have without its tests, and most the median may have.
const LONGEST: usize = 600;
const MEDIAN: usize = 300;

struct Source {
    path: String,
    /// The text up to the file's tests.
    code: String,
}

#[test]
fn modules_use_only_the_floors_below() {
    let mut breaches = Vec::new();
    for source in sources() {
        let Some(room) = room_of(&source.path) else {
            continue;
        };
        let floor = floor_of(room).unwrap_or_else(|| panic!("{room} stands on no floor"));
        for (number, line) in source.code.lines().enumerate() {
            for used in names_after(strip_comment(line), "crate::") {
                let Some(other) = floor_of(used) else {
                    continue;
                };
                let is_neighbour = NEIGHBOURS.contains(&(room, used));
                if used != room && other >= floor && !is_neighbour {
                    breaches.push(format!(
                        "{}:{}: {room} uses {used}",
                        source.path,
                        number + 1
                    ));
                }
            }
        }
    }
    assert!(breaches.is_empty(), "{}", breaches.join("\n"));
}

#[test]
fn every_module_of_the_library_stands_on_a_floor() {
    let library = fs::read_to_string(root().join("src/lib.rs")).unwrap();
    let modules: Vec<&str> = library
        .lines()
        .filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';'))
        .collect();
    assert!(modules.len() > 10, "lib.rs is the map of all modules");
    for module in modules {
        assert!(floor_of(module).is_some(), "{module} stands on no floor");
    }
}

#[test]
fn unsafe_stays_in_its_rooms() {
    let mut seen = 0;
    for source in sources() {
        let is_room = UNSAFE_ROOMS.contains(&source.path.as_str());
        for (number, line) in source.code.lines().enumerate() {
            let code = strip_comment(line);
            let is_unsafe = ["unsafe {", "unsafe fn", "unsafe impl", "unsafe extern"]
                .iter()
                .any(|word| code.contains(word));
            let is_opened =
                code.contains("expect(unsafe_code") || code.contains("allow(unsafe_code");
            assert!(
                is_room || !(is_unsafe || is_opened),
                "{}:{}: unsafe outside its rooms",
                source.path,
                number + 1
            );
            seen += usize::from(is_unsafe);
        }
    }
    assert!(seen > 0, "the test no longer sees any unsafe block");
}

#[test]
fn files_stay_small() {
    let mut sizes: Vec<(usize, String)> = sources()
        .into_iter()
        .map(|source| (source.code.lines().count(), source.path))
        .collect();
    sizes.sort();
    let (longest, path) = sizes.last().unwrap();
    assert!(
        *longest <= LONGEST,
        "{path} has {longest} lines without its tests"
    );
    let (median, _) = &sizes[sizes.len() / 2];
    assert!(*median <= MEDIAN, "the median file has {median} lines");
}

#[test]
fn nothing_is_left_unfinished() {
    for source in sources() {
        for word in ["todo!(", "unimplemented!(", "FIXME", "XXX"] {
            assert!(!source.code.contains(word), "{} holds {word}", source.path);
        }
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn sources() -> Vec<Source> {
    let mut found = Vec::new();
    collect(&root().join("src"), &mut found);
    assert!(found.len() > 20, "src was not found");
    found
}

fn collect(folder: &Path, found: &mut Vec<Source>) {
    let mut entries: Vec<PathBuf> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    entries.sort();
    for path in entries {
        if path.is_dir() {
            collect(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            let relative = path
                .strip_prefix(root())
                .unwrap()
                .to_str()
                .unwrap()
                .to_owned();
            if is_test_file(&relative) {
                continue;
            }
            let code = text
                .split("#[cfg(test)]\nmod tests")
                .next()
                .unwrap_or("")
                .to_owned();
            found.push(Source {
                path: relative,
                code,
            });
        }
    }
}

/// Files that are compiled for tests only.
fn is_test_file(path: &str) -> bool {
    path.ends_with("/tests.rs") || path.contains("/tests/") || path.contains("/fake")
}

/// `src/vm/device/serial.rs` is in room `vm`; `main.rs` and `lib.rs` are above all floors.
fn room_of(path: &str) -> Option<&str> {
    let inner = path.strip_prefix("src/")?;
    let room = inner.split('/').next()?.trim_end_matches(".rs");
    (room != "main" && room != "lib").then_some(room)
}

fn floor_of(module: &str) -> Option<u8> {
    FLOORS
        .iter()
        .find(|(_, modules)| modules.contains(&module))
        .map(|(floor, _)| *floor)
}

fn strip_comment(line: &str) -> &str {
    line.split("//").next().unwrap_or("")
}

/// The identifiers that follow each `prefix` in the line, also those of `prefix{a, b}`.
fn names_after<'a>(line: &'a str, prefix: &str) -> Vec<&'a str> {
    let identifier = |text: &'a str| {
        text.split(|c: char| !c.is_alphanumeric() && c != '_')
            .next()
            .unwrap_or("")
    };
    line.match_indices(prefix)
        .flat_map(|(at, _)| {
            let rest = &line[at + prefix.len()..];
            match rest.strip_prefix('{') {
                Some(list) => list
                    .split(',')
                    .map(|item| identifier(item.trim()))
                    .collect(),
                None => vec![identifier(rest)],
            }
        })
        .collect()
}
