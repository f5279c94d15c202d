//! What the integration tests share: real processes (hmpsh and stock QEMU) driven over their human
//! monitors, the log of the built-in guest, and the rule for what is skipped where a part of the
//! machine is missing.
#![allow(dead_code, reason = "every test binary uses its own part of this")]

pub(crate) mod beacon;
pub(crate) mod decoder;
pub(crate) mod disk;
pub(crate) mod hmp;
pub(crate) mod journey;
pub(crate) mod kernel;
pub(crate) mod memory;
pub(crate) mod need;
pub(crate) mod pairwise;
pub(crate) mod qcow2;
pub(crate) mod qmp;
pub(crate) mod report;
pub(crate) mod small;
pub(crate) mod ticks;
pub(crate) mod vmm;

use std::time::{Duration, Instant};

/// Asks `question` every few milliseconds until it has an answer; `None` when `patience` is over.
pub(crate) fn poll<T>(patience: Duration, mut question: impl FnMut() -> Option<T>) -> Option<T> {
    let end = Instant::now() + patience;
    loop {
        if let Some(answer) = question() {
            return Some(answer);
        }
        if Instant::now() > end {
            return None;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Without the digits of nodes' names, which are random.
pub(crate) fn without_node_digits(text: &str) -> String {
    let mut parts = text.split("#block");
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |text, part| {
        text + "#block" + part.trim_start_matches(|letter: char| letter.is_ascii_digit())
    })
}
