//! Reads what the built-in guest said, on one side or, joined, on several sides of migrations.
//!
//! A guest prints every byte exactly once, wherever it runs, so the logs of its hosts, put one
//! after the other, must read like the log of a guest that never moved: booted once, beacons
//! 1, 2, 3 and so on without a gap, no fault.

use std::path::Path;
use std::time::Duration;

use super::poll;

/// What a log says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Beacons {
    /// The last beacon, 0 if there was none.
    pub(crate) last: u64,
    /// Ticks of other vCPUs, the last figure of each.
    pub(crate) ticks: Vec<(u64, u64)>,
    /// Requests that the disk has answered.
    pub(crate) requests: u64,
    /// Bytes that were answered.
    pub(crate) answers: Vec<u8>,
}

impl Beacons {
    /// Reads one guest's log; `Err` tells what is wrong with it. The last line may be incomplete.
    pub(crate) fn parse(log: &[u8]) -> Result<Self, String> {
        let text = std::str::from_utf8(log).map_err(|error| format!("not text: {error}"))?;
        let complete = text.rfind('\n').map_or("", |end| &text[..=end]);
        let mut beacons = Self::default();
        for (number, line) in complete.lines().enumerate() {
            let wrong = |what: &str| Err(format!("line {}: {what}: '{line}'", number + 1));
            let mut words = line.split(' ');
            match (words.next(), words.next(), words.next()) {
                (Some("hmpsh"), Some("guest"), Some(_)) if number == 0 => {}
                // The kernel of kernel.s says more.
                (Some("kernel"), None, None) if number == 0 => {}
                (Some("memory"), ..) if number == 1 => {}
                (Some("command"), Some("line"), _) if number == 2 => {}
                (Some("cpu"), Some("1"), None) if number == 3 => {}
                (Some("hmpsh"), ..) => return wrong("it booted again"),
                _ if number == 0 => return wrong("it should have booted first"),
                (Some("B"), Some(count), None) => {
                    if count.parse() != Ok(beacons.last + 1) {
                        return wrong(&format!("beacon {} should be next", beacons.last + 1));
                    }
                    beacons.last += 1;
                }
                (Some("C"), Some(vcpu), Some(ticks)) => {
                    let (Ok(vcpu), Ok(ticks)) = (vcpu.parse::<u64>(), ticks.parse::<u64>()) else {
                        return wrong("no vCPU's ticks");
                    };
                    match beacons.ticks.iter_mut().find(|(of, _)| *of == vcpu) {
                        Some((_, before)) if *before > ticks => return wrong("ticks went back"),
                        Some((_, before)) => *before = ticks,
                        None => beacons.ticks.push((vcpu, ticks)),
                    }
                }
                (Some("D"), Some(requests), Some(_)) => match requests.parse() {
                    Ok(requests) if requests >= beacons.requests => beacons.requests = requests,
                    _ => return wrong("the disk's requests went back"),
                },
                (Some("R"), Some(byte), None) => match u8::from_str_radix(byte, 16) {
                    Ok(byte) => beacons.answers.push(byte),
                    Err(_) => return wrong("no byte"),
                },
                (Some("FAULT"), ..) => return wrong("the guest found a fault"),
                _ => return wrong("the guest says no such thing"),
            }
        }
        Ok(beacons)
    }

    /// Reads the logs of the hosts a guest lived on, in order.
    pub(crate) fn read(logs: &[&Path]) -> Result<Self, String> {
        let mut joined = Vec::new();
        for log in logs {
            joined
                .extend(std::fs::read(log).map_err(|error| format!("{}: {error}", log.display()))?);
        }
        Self::parse(&joined)
    }

    /// Like [`Self::read`], and the log must be right.
    #[track_caller]
    pub(crate) fn check(logs: &[&Path]) -> Self {
        Self::read(logs).unwrap_or_else(|wrong| panic!("{wrong}\n{}", tails(logs)))
    }
}

/// Waits until `more` beacons came after those there are now; the log must be right all the time.
#[track_caller]
pub(crate) fn wait_beacons(logs: &[&Path], more: u64) -> Beacons {
    wait_more(logs, more, |beacons| beacons.last)
}

/// Waits until the disk has answered `more` requests after those it has answered now.
#[track_caller]
pub(crate) fn wait_requests(logs: &[&Path], more: u64) -> Beacons {
    wait_more(logs, more, |beacons| beacons.requests)
}

#[track_caller]
fn wait_more(logs: &[&Path], more: u64, count: impl Fn(&Beacons) -> u64) -> Beacons {
    let start = count(&Beacons::check(logs));
    poll(Duration::from_secs(20), || {
        Some(Beacons::check(logs)).filter(|now| count(now) >= start + more)
    })
    .unwrap_or_else(|| panic!("no {more} more after {start}\n{}", tails(logs)))
}

/// Waits until a guest has found a fault, and returns what it says of it.
#[track_caller]
pub(crate) fn wait_fault(log: &Path) -> String {
    let fault = poll(Duration::from_secs(20), || fault(log));
    fault.unwrap_or_else(|| panic!("no fault\n{}", tails(&[log])))
}

/// What a guest says of the fault that it has found, if it has.
pub(crate) fn fault(log: &Path) -> Option<String> {
    let log = std::fs::read_to_string(log).ok()?;
    let (_, fault) = log.split_once("FAULT")?;
    let fault = fault.strip_suffix('\n')?;
    Some(format!("FAULT{fault}"))
}

/// The end of each log, for a failure's text.
fn tails(logs: &[&Path]) -> String {
    let mut text = String::new();
    for log in logs {
        let bytes = std::fs::read(log).unwrap_or_default();
        let tail = &bytes[bytes.len().saturating_sub(200)..];
        text += &format!("{}: …{}\n", log.display(), String::from_utf8_lossy(tail));
    }
    text
}
