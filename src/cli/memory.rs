//! `-m` and the memory backends of `-object`.

use super::draft::Draft;
use super::keyval::KeyVal;
use crate::config::{BackendKind, MemoryBackend};
use crate::units::{BYTE, MIB, parse_size};

type Answer = Result<(), String>;

/// `-m`. 0 means the default; a size is rounded up to 8 KiB, as QEMU does.
pub(super) fn memory(draft: &mut Draft, value: &str) -> Answer {
    const STEP: u64 = 8192;
    let mut list = KeyVal::parse(value, Some("size"))?;
    let text = list.take("size").unwrap_or_default();
    let size = parse_size(&text, MIB).map_err(|error| error.explain("size", &text))?;
    let too_big = || format!("Value '{text}' is out of range for parameter 'size'");
    let size = size
        .checked_next_multiple_of(STEP)
        .filter(|size| i64::try_from(*size).is_ok());
    draft.memory = Some(size.ok_or_else(too_big)?).filter(|size| *size != 0);
    list.refuse(&["slots", "maxmem"])?;
    list.finish()
}

/// `-object`.
pub(super) fn object(draft: &mut Draft, value: &str) -> Answer {
    let mut list = KeyVal::parse_strict(value, Some("qom-type"))?;
    let missing = |key: &str| format!("Parameter '{key}' is missing");
    let kind = list.take("qom-type").ok_or_else(|| missing("qom-type"))?;
    if !matches!(
        kind.as_str(),
        "memory-backend-ram" | "memory-backend-file" | "memory-backend-memfd"
    ) {
        return Err(if OTHER_OBJECTS.contains(&kind.as_str()) {
            format!("{kind}: not built in this version")
        } else {
            format!("Parameter 'qom-type' does not accept value '{kind}'")
        });
    }
    let id = list.take("id").ok_or_else(|| missing("id"))?;
    check_id(&id)?;
    if draft.backends.iter().any(|backend| backend.id == id) {
        return Err(format!(
            "attempt to add duplicate property '{id}' to object (type 'container')"
        ));
    }
    let size = list.take("size").ok_or_else(|| missing("size"))?;
    let size =
        parse_size(&size, BYTE).map_err(|_| "Parameter 'size' expects a size value".to_owned())?;
    if size == 0 {
        return Err(format!("property 'size' of {kind} doesn't take value '0'"));
    }
    let (kind, shares) = match kind.as_str() {
        "memory-backend-file" => {
            let path = list.take("mem-path").ok_or_else(|| missing("mem-path"))?;
            (BackendKind::File(path.into()), false)
        }
        "memory-backend-memfd" => (BackendKind::Memfd, true),
        _ => (BackendKind::Ram, false),
    };
    let share = list.take_switch("share")?.unwrap_or(shares);
    list.refuse(&[
        "align",
        "discard-data",
        "dump",
        "host-nodes",
        "hugetlb",
        "hugetlbsize",
        "merge",
        "offset",
        "pmem",
        "policy",
        "prealloc",
        "prealloc-context",
        "prealloc-threads",
        "readonly",
        "reserve",
        "rom",
        "seal",
        "x-use-canonical-path-for-ramblock-id",
    ])?;
    list.finish()?;
    draft.backends.push(MemoryBackend {
        id,
        size,
        kind,
        share,
    });
    Ok(())
}

/// Makes sure an id can be told from everything else.
pub(super) fn check_id(id: &str) -> Answer {
    let is_well_formed = id.starts_with(|c: char| c.is_ascii_alphabetic())
        && id
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "-._".contains(c));
    if is_well_formed {
        return Ok(());
    }
    Err("Parameter 'id' expects an identifier\n\
         Identifiers consist of letters, digits, '-', '.', '_', starting with a letter."
        .to_owned())
}

/// Objects of QEMU's that this version does not build.
#[rustfmt::skip]
const OTHER_OBJECTS: [&str; 31] = [
    "authz-list", "authz-list-file", "authz-pam", "authz-simple", "can-bus", "colo-compare",
    "cryptodev-backend", "cryptodev-backend-builtin", "cryptodev-vhost-user", "dbus-vmstate",
    "filter-buffer", "filter-dump", "filter-mirror", "filter-redirector", "filter-replay",
    "filter-rewriter", "input-barrier", "input-linux", "iothread", "main-loop",
    "memory-backend-epc", "memory-backend-shm", "pr-manager-helper", "qtest", "rng-builtin",
    "rng-egd", "rng-random", "secret", "throttle-group", "tls-creds-psk", "tls-creds-x509",
];
