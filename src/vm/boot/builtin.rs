//! The built-in guest: a firmware image that checks its own memory, and a disk, for ever.
//!
//! It is booted when neither `-bios` nor `-kernel` is given, and it is the first test of every
//! migration: each page of a window of memory carries a sequence number, its page number and a
//! hash of both, in three places; the guest walks the window, checks a page before it rewrites
//! it, and tells on COM1 how it fares. With `disk=` it does the same to sectors of a legacy
//! virtio-blk, or only keeps it busy. This file parses its `-append` and patches the image; what
//! runs is `builtin/guest.s` and `builtin/disk.s`. It touches no machine: the caller puts the image
//! where firmware belongs (QEMU's `-bios` loader does the same). `unsafe` is here for the assembly
//! alone.
//!
//! What the guest says, one line each:
//!
//! | line | meaning |
//! |---|---|
//! | `hmpsh guest window=… base=… rate=… smp=…` | it booted (bytes, address, pages per second); with a disk also `disk=… request=… depth=…` |
//! | `B <n>` | beacon, 1, 2, 3 and so on, about ten a second |
//! | `D <requests> <sectors>` | with `disk=`, after a beacon: what the disk has answered so far |
//! | `C <vcpu> <n>` | with `smp=`, after a beacon: another vCPU's ticks so far |
//! | `R <hex>` | this byte came in on COM1 |
//! | `FAULT page <n> offset <n> expected <word> <hash> found <word> <hash>` | memory is wrong; it stops |
//! | `FAULT sector <n> offset <n> expected <word> <hash> found <word> <hash>` | the disk is wrong; it stops |
//! | `FAULT disk status <status> sector <n>` | a request at that sector failed; it stops |
//! | `FAULT disk answers <n>` | a request (its first descriptor) that is not under way; it stops |
//! | `FAULT disk not found`, `… has no queue`, `… too small` | no disk for it; it stops |
//! | `FAULT trap …`, `FAULT cpu …` | an exception, a vCPU that does not start; it stops |
#![expect(unsafe_code, reason = "global_asm! and the symbol it defines")]

use std::arch::global_asm;
use std::ops::Range;

/// Length of the image in bytes; it goes where its end is the end of the first 4 GiB.
pub const IMAGE_SIZE: usize = 0x10000;

/// Why an `-append` makes no sense to the built-in guest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Not `key=value`, or no key of ours.
    #[error(
        "The built-in guest has no parameter '{0}' (it knows window=, rate=, base=, smp=, disk=, \
         request=, depth=)"
    )]
    Unknown(String),
    /// A key that says how, but not what.
    #[error("Parameter '{0}' of the built-in guest needs disk=")]
    NoDisk(&'static str),
    /// A key that was given before.
    #[error("Parameter '{0}' of the built-in guest is given twice")]
    Twice(String),
    /// A value that is no number, or one out of range.
    #[error("Parameter '{name}' of the built-in guest expects {expected}, not '{value}'")]
    Value {
        /// The key.
        name: &'static str,
        /// What was given.
        value: String,
        /// What would have been right.
        expected: &'static str,
    },
    /// A window that is not all in guest RAM.
    #[error(
        "The built-in guest's window of {window} bytes at {base:#x} is not inside guest RAM \
         (-m {ram} bytes: 0x100000 to {low:#x}{})",
        if *.high > HIGH_RAM { format!(", 0x100000000 to {high:#x}") } else { String::new() }
    )]
    OutsideRam {
        /// `window=`, bytes.
        window: u64,
        /// `base=`.
        base: u64,
        /// All of guest RAM, bytes.
        ram: u64,
        /// End of RAM below 4 GiB.
        low: u64,
        /// End of RAM above 4 GiB.
        high: u64,
    },
}

/// The image of a built-in guest set up by `append`, blank-separated:
///
/// * `window=SIZE` the memory it walks, whole pages, at most 64 GiB; default 16 MiB, less in a
///   small machine
/// * `base=SIZE` where the window starts, page-aligned, at or above 1 MiB (the default)
/// * `rate=N` pages rewritten per second, 1 to 10000000; default 2000. However high it is, the
///   guest rests in HLT for at least half of the time.
/// * `smp=N` vCPUs that share the window, 1 (the default) to 16; further ones are left alone
/// * `disk=1` checks the first sectors of the legacy virtio-blk in the highest slot, a few with each
///   tick; `disk=read` and `disk=write` go through all of it as fast as the disk answers
/// * `request=SIZE` bytes of a request to the disk, whole sectors, at most 512K; default 4K
/// * `depth=N` requests under way at once, 1 to 16, with `disk=1` together at most 512K; default 4
///
/// `ram_bytes` is the size of guest RAM, laid out as `microvm` does: 3 GiB from 0, the rest from
/// 4 GiB.
pub fn image(append: &str, ram_bytes: u64) -> Result<Vec<u8>, Error> {
    let workload = Workload::parse(append, ram_bytes)?;
    let mut image = hmpsh_guest_image.to_vec();
    let words = workload.parameters();
    for (word, place) in words.iter().zip(image.chunks_exact_mut(8)) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    let banner = workload.banner();
    image[size_of_val(&words)..][..banner.len()].copy_from_slice(banner.as_bytes());
    Ok(image)
}

/// What the guest is told to do.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Workload {
    window: u64,
    base: u64,
    rate: u64,
    vcpus: u64,
    disk: Option<Disk>,
}

/// What it is told to do with a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Disk {
    work: Work,
    request: u64,
    depth: u64,
}

/// Kinds of work for a disk, with their numbers in the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    Check = 1,
    Read = 2,
    Write = 3,
}

impl Workload {
    fn parse(append: &str, ram: u64) -> Result<Self, Error> {
        let [mut window, mut base, mut rate, mut smp] = [None; 4];
        let [mut disk, mut request, mut depth] = [None; 3];
        for word in append.split_whitespace() {
            let (key, value) = word.split_once('=').unwrap_or((word, ""));
            let slot = match key {
                "window" => &mut window,
                "base" => &mut base,
                "rate" => &mut rate,
                "smp" => &mut smp,
                "disk" => &mut disk,
                "request" => &mut request,
                "depth" => &mut depth,
                _ => return Err(Error::Unknown(word.to_owned())),
            };
            if slot.replace(value).is_some() {
                return Err(Error::Twice(key.to_owned()));
            }
        }
        let vcpus = number("smp", smp, "1 to 16", |n| (1..=16).contains(n), plain)?.unwrap_or(1);
        let rate = number(
            "rate",
            rate,
            "1 to 10000000 pages per second",
            |n| RATES.contains(n),
            plain,
        )?
        .unwrap_or(DEFAULT_RATE);
        let base = number(
            "base",
            base,
            "a page-aligned address of 1M or more",
            |n| n.is_multiple_of(PAGE) && *n >= FIRST_MIB,
            size,
        )?
        .unwrap_or(FIRST_MIB);
        let low = FIRST_MIB..ram.min(LOW_RAM);
        let high = HIGH_RAM..HIGH_RAM + ram.saturating_sub(LOW_RAM);
        let window = number(
            "window",
            window,
            "whole pages, at least one per vCPU, at most 64G",
            |n| n.is_multiple_of(PAGE) && (vcpus * PAGE..=MAX_WINDOW).contains(n),
            size,
        )?
        .unwrap_or_else(|| default_window(base, &low, &high));
        let is_inside = |ram: &Range<u64>| {
            window > 0
                && ram.contains(&base)
                && base.checked_add(window).is_some_and(|end| end <= ram.end)
        };
        if vcpus * PAGE > window || !(is_inside(&low) || is_inside(&high)) {
            return Err(Error::OutsideRam {
                window,
                base,
                ram,
                low: low.end,
                high: high.end,
            });
        }
        Ok(Self {
            window,
            base,
            rate,
            vcpus,
            disk: Disk::parse(disk, request, depth)?,
        })
    }

    /// The words at the start of the image: base, pages, pages per tick, nanoseconds per tick,
    /// ticks per beacon, vCPUs, work for the disk, bytes of a request, requests under way.
    fn parameters(&self) -> [u64; 9] {
        let rate = (self.rate / self.vcpus).max(1);
        let batch = (rate / TICKS_PER_SECOND).max(1);
        let period = batch * NANOSECONDS / rate;
        let beacon = (NANOSECONDS / BEACONS_PER_SECOND / period).max(1);
        [
            self.base,
            self.window / PAGE,
            batch,
            period,
            beacon,
            self.vcpus,
            self.disk.map_or(0, |disk| disk.work as u64),
            self.disk.map_or(0, |disk| disk.request),
            self.disk.map_or(0, |disk| disk.depth),
        ]
    }

    /// The first line the guest prints; the image has room for it and a NUL.
    fn banner(&self) -> String {
        let Self {
            window,
            base,
            rate,
            vcpus,
            disk,
        } = self;
        let disk = disk.map_or_else(String::new, |disk| disk.banner());
        format!("hmpsh guest window={window} base={base} rate={rate} smp={vcpus}{disk}")
    }
}

impl Disk {
    fn parse(
        disk: Option<&str>,
        request: Option<&str>,
        depth: Option<&str>,
    ) -> Result<Option<Self>, Error> {
        let Some(disk) = disk else {
            let unused = [("request", request), ("depth", depth)];
            return match unused.iter().find(|(_, value)| value.is_some()) {
                Some((name, _)) => Err(Error::NoDisk(name)),
                None => Ok(None),
            };
        };
        let known = WORDS.iter().find(|(word, _)| *word == disk);
        let (_, work) = known.ok_or_else(|| Error::Value {
            name: "disk",
            value: disk.to_owned(),
            expected: "1, read or write",
        })?;
        let depth = number("depth", depth, "1 to 16", |n| DEPTHS.contains(n), plain)?
            .unwrap_or(DEFAULT_DEPTH);
        let most = match work {
            Work::Check => BUFFERS / depth,
            Work::Read | Work::Write => BUFFERS,
        };
        let request = number(
            "request",
            request,
            "whole sectors, at least one, at most 512K (with disk=1 divided by depth=)",
            |n| n.is_multiple_of(SECTOR) && (SECTOR..=most).contains(n),
            size,
        )?
        .unwrap_or(DEFAULT_REQUEST);
        Ok(Some(Self {
            work: *work,
            request,
            depth,
        }))
    }

    /// Its part of the guest's first line.
    fn banner(&self) -> String {
        let Self {
            work,
            request,
            depth,
        } = self;
        let word = WORDS.iter().find(|(_, of)| of == work);
        let word = word.map_or("", |(word, _)| word);
        format!(" disk={word} request={request} depth={depth}")
    }
}

/// As much of the default window as there is RAM at `base`, 0 if there is none.
fn default_window(base: u64, low: &Range<u64>, high: &Range<u64>) -> u64 {
    let ram = if low.contains(&base) { low } else { high };
    match ram.end.saturating_sub(base) {
        // It does not fit anywhere, and the refusal should say what was wanted.
        0 => DEFAULT_WINDOW,
        room => room.min(DEFAULT_WINDOW) / PAGE * PAGE,
    }
}

/// The value of parameter `name`, if it was given.
fn number(
    name: &'static str,
    value: Option<&str>,
    expected: &'static str,
    is_sane: impl Fn(&u64) -> bool,
    parse: impl Fn(&str) -> Option<u64>,
) -> Result<Option<u64>, Error> {
    value
        .map(|text| {
            parse(text).filter(is_sane).ok_or_else(|| Error::Value {
                name,
                value: text.to_owned(),
                expected,
            })
        })
        .transpose()
}

fn plain(text: &str) -> Option<u64> {
    text.bytes()
        .all(|byte| byte.is_ascii_digit())
        .then(|| text.parse().ok())?
}

/// A decimal or `0x` number of bytes, or a decimal one with the suffix K, M, G or T.
fn size(text: &str) -> Option<u64> {
    if let Some(digits) = text.strip_prefix("0x") {
        let is_hex = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
        return is_hex.then(|| u64::from_str_radix(digits, 16).ok())?;
    }
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match &text[digits.len()..] {
        "" => 0,
        "k" | "K" => 10,
        "m" | "M" => 20,
        "g" | "G" => 30,
        "t" | "T" => 40,
        _ => return None,
    };
    plain(digits)?.checked_mul(1 << shift)
}

const PAGE: u64 = 4096;
const FIRST_MIB: u64 = 1 << 20;
const LOW_RAM: u64 = 3 << 30;
const HIGH_RAM: u64 = 4 << 30;
const DEFAULT_WINDOW: u64 = 16 << 20;
/// A page number has 24 bits in a record, and page directories for 64 GiB fit below 1 MiB.
const MAX_WINDOW: u64 = 64 << 30;
/// 8 MB/s, about a quarter of what a host that interprets guests can do.
const DEFAULT_RATE: u64 = 2000;
const RATES: std::ops::RangeInclusive<u64> = 1..=10_000_000;
const WORDS: [(&str, Work); 3] = [
    ("1", Work::Check),
    ("read", Work::Read),
    ("write", Work::Write),
];
const SECTOR: u64 = 512;
const DEFAULT_REQUEST: u64 = 4 << 10;
const DEFAULT_DEPTH: u64 = 4;
const DEPTHS: std::ops::RangeInclusive<u64> = 1..=16;
/// Memory for what is read and written, below 1 MiB.
const BUFFERS: u64 = 512 << 10;
const TICKS_PER_SECOND: u64 = 100;
const BEACONS_PER_SECOND: u64 = 10;
const NANOSECONDS: u64 = 1_000_000_000;

global_asm!(
    include_str!("builtin/guest.s"),
    include_str!("builtin/disk.s"),
    include_str!("builtin/end.s"),
    options(att_syntax, raw)
);

// SAFETY: the assembly above defines the symbol: IMAGE_SIZE bytes that nothing ever writes.
unsafe extern "C" {
    safe static hmpsh_guest_image: [u8; IMAGE_SIZE];
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const M: u64 = 1 << 20;
    const G: u64 = 1 << 30;

    fn workload(append: &str, ram: u64) -> Workload {
        Workload::parse(append, ram).unwrap()
    }

    fn refusal(append: &str, ram: u64) -> String {
        image(append, ram).unwrap_err().to_string()
    }

    #[test]
    fn without_parameters_it_walks_16_mib_at_1_mib() {
        let expected = Workload {
            window: 16 * M,
            base: M,
            rate: 2000,
            vcpus: 1,
            disk: None,
        };
        assert_eq!(workload("", 128 * M), expected);
    }

    #[test]
    fn the_default_window_shrinks_with_the_machine() {
        assert_eq!(workload("", 8 * M).window, 7 * M);
        assert_eq!(workload("base=4G", 3 * G + 5 * M).window, 5 * M);
        assert!(refusal("", M).contains("not inside guest RAM"));
    }

    #[test]
    fn all_parameters_are_taken() {
        assert_eq!(
            workload(" window=64M  rate=500 base=5G smp=2 ", 6 * G),
            Workload {
                window: 64 * M,
                base: 5 * G,
                rate: 500,
                vcpus: 2,
                disk: None,
            }
        );
        assert_eq!(workload("base=0x200000 window=8192", 16 * M).window, 8192);
    }

    #[test]
    fn a_disk_is_checked_read_or_written() {
        let disk = |append| workload(append, 64 * M).disk;
        for (append, expected) in [
            ("disk=1", (Work::Check, 4096, 4)),
            ("disk=read request=64K depth=8", (Work::Read, 65536, 8)),
            (
                "depth=16 disk=write request=512K",
                (Work::Write, 524_288, 16),
            ),
            ("disk=1 depth=16 request=512", (Work::Check, 512, 16)),
        ] {
            let (work, request, depth) = expected;
            let expected = Disk {
                work,
                request,
                depth,
            };
            assert_eq!(disk(append), Some(expected), "{append}");
        }
    }

    #[test]
    fn nonsense_is_refused_with_its_name() {
        for (append, words) in [
            ("console=ttyS0", "no parameter 'console=ttyS0'"),
            (
                "window",
                "'window' of the built-in guest expects whole pages",
            ),
            ("window=64X", "not '64X'"),
            ("window=1", "whole pages"),
            ("window=0", "at least one"),
            ("window=-1M", "not '-1M'"),
            ("window=99999999999999999999", "whole pages"),
            ("window=16777216T", "whole pages"),
            ("window=128G", "at most 64G"),
            ("window=4K smp=2", "at least one per vCPU"),
            ("rate=0", "1 to 10000000"),
            ("rate=+5", "not '+5'"),
            ("rate=", "not ''"),
            ("base=0", "1M or more"),
            ("base=1234567", "page-aligned"),
            ("smp=17", "1 to 16"),
            (
                "disk",
                "'disk' of the built-in guest expects 1, read or write",
            ),
            ("disk=0", "not '0'"),
            ("disk=1 depth=17", "1 to 16"),
            ("disk=1 depth=0", "1 to 16"),
            ("disk=1 request=1000", "whole sectors"),
            ("disk=1 request=0", "at least one"),
            ("disk=1 request=64K depth=9", "at most 512K"),
            ("disk=read request=1M", "at most 512K"),
            ("depth=2", "'depth' of the built-in guest needs disk="),
            (
                "window=1M request=4K",
                "'request' of the built-in guest needs",
            ),
            (
                "disk=1 disk=read",
                "'disk' of the built-in guest is given twice",
            ),
            (
                "rate=1 rate=2",
                "'rate' of the built-in guest is given twice",
            ),
        ] {
            let text = refusal(append, 256 * G);
            assert!(text.contains(words), "{append}: {text}");
        }
    }

    #[test]
    fn a_window_outside_ram_is_refused_with_the_map() {
        assert!(refusal("window=128M", 128 * M).contains("0x100000 to 0x8000000)"));
        assert!(refusal("base=3G", 8 * G).contains("to 0xc0000000, 0x100000000 to 0x240000000)"));
        assert!(refusal("base=2G window=2G", 8 * G).contains("not inside"));
        assert!(refusal("base=0xfffffffffffff000", 8 * G).contains("not inside"));
        assert!(image("base=4G window=5G", 8 * G).is_ok());
    }

    #[test]
    fn the_image_starts_at_the_reset_vector_and_carries_its_parameters() {
        let append = "window=1M base=2M rate=1000 smp=2 disk=read depth=2";
        let image = image(append, 64 * M).unwrap();
        assert_eq!(image.len(), IMAGE_SIZE);
        // ljmp $0xf000, …: the reset vector and what a start-up IPI reaches are the same.
        assert_eq!(image[0xfff0], 0xea);
        assert_eq!(image[0xfff3..0xfff5], [0x00, 0xf0]);
        assert_eq!(image[0xfff0..0xfff5], image[0x1000..0x1005]);
        let word = |n: usize| u64::from_le_bytes(image[n * 8..][..8].try_into().unwrap());
        assert_eq!(
            [0, 1, 2, 3, 4, 5, 6, 7, 8].map(word),
            [2 * M, 256, 5, 10_000_000, 10, 2, 2, 4096, 2]
        );
        let banner = b"hmpsh guest window=1048576 base=2097152 rate=1000 smp=2 \
                       disk=read request=4096 depth=2\0";
        assert_eq!(image[72..][..banner.len()], *banner);
    }

    proptest! {
        #[test]
        fn every_text_is_taken_or_refused(append in "[a-z0-9=MGTx \u{e9}]{0,40}", ram: u64) {
            let _ = Workload::parse(&append, ram.min(1 << 52));
        }

        #[test]
        fn a_tick_and_a_beacon_are_as_often_as_asked(rate in RATES, vcpus in 1u64..=16) {
            let told = Workload { window: 16 * M, base: M, rate, vcpus, disk: None }.parameters();
            let [_, _, batch, period, beacon, ..] = told;
            let per_vcpu = (rate / vcpus).max(1);
            let pages_per_second = batch as f64 * 1e9 / period as f64;
            prop_assert!((pages_per_second / per_vcpu as f64 - 1.0).abs() < 1e-3);
            prop_assert!(period <= NANOSECONDS && u32::try_from(period).is_ok());
            let between = beacon * period;
            prop_assert!(between <= NANOSECONDS / BEACONS_PER_SECOND || beacon == 1);
        }

        #[test]
        fn the_banner_fits(window in 0..=MAX_WINDOW, base: u64, rate in RATES, vcpus in 1u64..=16) {
            let disk = Disk { work: Work::Write, request: BUFFERS, depth: *DEPTHS.end() };
            let workload = Workload { window, base, rate, vcpus, disk: Some(disk) };
            prop_assert!(workload.banner().len() < 0x200 - 72);
        }
    }
}
