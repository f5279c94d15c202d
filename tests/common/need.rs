//! What a test needs of the machine it runs on, and what happens where that is missing: the test
//! says so and is skipped, unless `HMPSH_REQUIRE` (a comma-separated list) names the part.

use std::fs::OpenOptions;
use std::io::Write;
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;

/// A part that not every machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// `/dev/kvm`, readable and writable.
    Kvm,
    /// QEMU 7.2: command line in `HMPSH_QEMU7`, else `qemu-system-x86_64` in `PATH`.
    Qemu7,
    /// QEMU 10.0: command line in `HMPSH_QEMU10`.
    Qemu10,
    /// QEMU's `qemu-img` of any version, path in `HMPSH_QEMU_IMG` or else in `PATH`; `qemu-io`
    /// beside it.
    QemuImg,
    /// IPv6 on the loopback interface.
    Ipv6,
    /// Root's rights.
    Root,
}

impl Need {
    fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Qemu7 => "qemu7",
            Self::Qemu10 => "qemu10",
            Self::QemuImg => "qemu-img",
            Self::Ipv6 => "ipv6",
            Self::Root => "root",
        }
    }

    /// Why the part is missing, if it is.
    fn missing(self) -> Option<String> {
        match self {
            Self::Kvm => OpenOptions::new()
                .read(true)
                .write(true)
                .open("/dev/kvm")
                .err()
                .map(|error| format!("no KVM (/dev/kvm: {error})")),
            Self::Qemu7 => qemu(self)
                .is_none()
                .then(|| "no QEMU 7.2 (HMPSH_QEMU7)".to_owned()),
            Self::Qemu10 => qemu(self)
                .is_none()
                .then(|| "no QEMU 10.0 (HMPSH_QEMU10)".to_owned()),
            Self::QemuImg => ["qemu-img", "qemu-io"]
                .iter()
                .any(|name| Command::new(tool(name)).arg("--version").output().is_err())
                .then(|| "no qemu-img with qemu-io (HMPSH_QEMU_IMG)".to_owned()),
            Self::Root => {
                (!rustix::process::geteuid().is_root()).then(|| "only root may do that".to_owned())
            }
            Self::Ipv6 => TcpListener::bind("[::1]:0")
                .err()
                .map(|error| format!("no IPv6 ([::1]: {error})")),
        }
    }
}

/// Whether everything in `needs` is there. If not, tells why the calling test is skipped, past
/// libtest, which hides the output of tests that pass; a part that `HMPSH_REQUIRE` names must be
/// there.
pub(crate) fn require(needs: &[Need]) -> bool {
    let required = std::env::var("HMPSH_REQUIRE").unwrap_or_default();
    for need in needs {
        let Some(why) = need.missing() else { continue };
        assert!(
            !required.split(',').any(|name| name.trim() == need.name()),
            "HMPSH_REQUIRE names {}, but: {why}",
            need.name()
        );
        skipped(&why);
        return false;
    }
    true
}

/// Tells why the calling test does not do its work, past libtest.
pub(crate) fn skipped(why: &str) {
    let test = std::thread::current().name().unwrap_or("test").to_owned();
    // What libtest hides is what the macros print. In one piece, other tests print too.
    let line = format!("{test}: skipped: {why}\n");
    let _ = std::io::stderr().write_all(line.as_bytes());
}

/// The path of `qemu-img`, or of what else is beside it.
pub(crate) fn tool(name: &str) -> PathBuf {
    let known = std::env::var_os("HMPSH_QEMU_IMG").unwrap_or_else(|| "qemu-img".into());
    PathBuf::from(known).with_file_name(name)
}

/// The command line of that QEMU, program first, if there is one of the right version.
pub(crate) fn qemu(need: Need) -> Option<&'static [String]> {
    static QEMU7: OnceLock<Option<Vec<String>>> = OnceLock::new();
    static QEMU10: OnceLock<Option<Vec<String>>> = OnceLock::new();
    match need {
        Need::Kvm | Need::QemuImg | Need::Ipv6 | Need::Root => None,
        Need::Qemu7 => QEMU7
            .get_or_init(|| find("HMPSH_QEMU7", Some("qemu-system-x86_64"), "version 7.2"))
            .as_deref(),
        Need::Qemu10 => QEMU10
            .get_or_init(|| find("HMPSH_QEMU10", None, "version 10.0"))
            .as_deref(),
    }
}

fn find(variable: &str, default: Option<&str>, version: &str) -> Option<Vec<String>> {
    let line = std::env::var(variable)
        .ok()
        .or_else(|| default.map(str::to_owned))?;
    let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
    let output = Command::new(words.first()?)
        .arg("--version")
        .output()
        .ok()?;
    String::from_utf8_lossy(&output.stdout)
        .contains(version)
        .then_some(words)
}
