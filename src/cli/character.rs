//! `-chardev`, `-serial`, `-monitor` and `-mon`: where bytes come from and go to.

use super::draft::{Draft, Place};
use super::keyval::KeyVal;
use super::memory::check_id;
use crate::config::{ChardevConfig, ChardevKind};
use crate::socket::address::Inet;
use crate::units::{BYTE, parse_size};

type Answer = Result<(), String>;

/// A ring whose size is not given.
const RING: usize = 64 << 10;

/// Backends of QEMU's that this version does not build.
#[rustfmt::skip]
const OTHER_BACKENDS: [&str; 17] = [
    "braille", "console", "dbus", "hub", "msmouse", "mux", "parallel", "parport", "pipe",
    "qemu-vdagent", "serial", "spiceport", "spicevmc", "testdev", "tty", "udp", "vc",
];

/// Backend options of QEMU's that this version does not build.
#[rustfmt::skip]
const OTHER_KEYS: [&str; 19] = [
    "abstract", "append", "fd", "input-path", "ipv4", "ipv6", "logappend", "logfile", "mptcp",
    "mux", "reconnect", "reconnect-ms", "signal", "telnet", "tight", "tls-authz", "tls-creds",
    "tn3270", "websocket",
];

/// `-chardev`.
pub(super) fn chardev(draft: &mut Draft, value: &str) -> Answer {
    let mut list = KeyVal::parse(value, Some("backend"))?;
    let id = list.take("id");
    if let Some(id) = &id {
        check_id(id)?;
    }
    let backend = list.take("backend").ok_or("chardev: \"backend\" missing")?;
    let id = id.ok_or("chardev: no id specified")?;
    list.refuse(&OTHER_KEYS)?;
    let kind = backend_kind(&backend, &mut list)?;
    list.finish()?;
    if draft.chardevs.iter().any(|chardev| chardev.id == id) {
        return Err(format!("Duplicate ID '{id}' for chardev"));
    }
    if kind == ChardevKind::Stdio
        && draft
            .chardevs
            .iter()
            .any(|chardev| chardev.kind == ChardevKind::Stdio)
    {
        return Err("cannot use stdio by multiple character devices".to_owned());
    }
    draft.chardevs.push(ChardevConfig { id, kind });
    Ok(())
}

fn backend_kind(backend: &str, list: &mut KeyVal) -> Result<ChardevKind, String> {
    Ok(match backend {
        "null" => ChardevKind::Null,
        "stdio" => ChardevKind::Stdio,
        "pty" => ChardevKind::Pty,
        "file" => ChardevKind::File(
            list.take("path")
                .ok_or("chardev: file: no filename given")?
                .into(),
        ),
        "ringbuf" | "memory" => {
            let size = list.take("size").map_or(Ok(RING as u64), |text| {
                parse_size(&text, BYTE).map_err(|error| error.explain("size", &text))
            })?;
            let size = usize::try_from(size)
                .ok()
                .filter(|size| size.is_power_of_two());
            ChardevKind::Ringbuf {
                size: size.ok_or("size of ringbuf chardev must be power of two")?,
            }
        }
        "socket" => socket(list)?,
        other if OTHER_BACKENDS.contains(&other) => {
            return Err(format!("{other}: not built in this version"));
        }
        other => return Err(format!("'{other}' is not a valid char driver name")),
    })
}

fn socket(list: &mut KeyVal) -> Result<ChardevKind, String> {
    let address = match (list.take("path"), list.take("host")) {
        (Some(_), Some(_)) => {
            return Err("None or one of 'path', 'fd' or 'host' option required.".to_owned());
        }
        (Some(path), None) => Address::Unix(path),
        (None, Some(host)) => {
            let port = list.take("port").ok_or("chardev: socket: no port given")?;
            Address::Tcp(Inet { host, port })
        }
        (None, None) => return Err("chardev: socket: no path and no host given".to_owned()),
    };
    link(address, list)
}

enum Address {
    Unix(String),
    Tcp(Inet),
}

/// What sockets have in common: `server`, `wait`.
fn link(address: Address, list: &mut KeyVal) -> Result<ChardevKind, String> {
    let server = list.take_switch("server")?.unwrap_or(false);
    let wait = list.take_switch("wait")?;
    if wait.is_some() && !server {
        return Err("'wait' option is incompatible with socket in client connect mode".to_owned());
    }
    let wait = server && wait.unwrap_or(true);
    match address {
        Address::Unix(path) => {
            // QEMU takes both for TCP only; without effect here, where it is always so.
            Ok(ChardevKind::Unix {
                path: path.into(),
                server,
                wait,
            })
        }
        Address::Tcp(Inet { host, port }) => {
            let delays = list.take_switch("delay")?.unwrap_or(false);
            if delays || list.take_switch("nodelay")? == Some(false) {
                return Err("delay=on: not built in this version".to_owned());
            }
            list.refuse(&["to"])?;
            Ok(ChardevKind::Tcp {
                host,
                port,
                server,
                wait,
            })
        }
    }
}

/// The short form that `-serial` and `-monitor` take; `None` is `none`.
fn place(text: &str) -> Result<Option<Place>, String> {
    let scheme = text.split([':', ',']).next().unwrap_or(text);
    let after = text.get(scheme.len() + 1..).unwrap_or("");
    let has_address = text[scheme.len()..].starts_with(':');
    let own = |kind| Ok(Some(Place::Own(kind)));
    match scheme {
        "none" if !has_address => Ok(None),
        "null" if !has_address => own(ChardevKind::Null),
        "stdio" if !has_address => own(ChardevKind::Stdio),
        "pty" if !has_address => own(ChardevKind::Pty),
        "ringbuf" if !has_address => own(ChardevKind::Ringbuf { size: RING }),
        "chardev" if has_address => Ok(Some(Place::Chardev(after.to_owned()))),
        "file" if has_address => own(ChardevKind::File(after.into())),
        "unix" if has_address => {
            let mut list = KeyVal::parse(after, Some("path"))?;
            list.refuse(&OTHER_KEYS)?;
            let path = list.take("path").filter(|path| !path.is_empty());
            let path = path.ok_or("invalid Unix socket address")?;
            let kind = link(Address::Unix(path), &mut list)?;
            list.finish()?;
            own(kind)
        }
        "tcp" if has_address => {
            let (inet, options) = Inet::parse_prefix(after).map_err(|error| error.to_string())?;
            let mut list = KeyVal::parse(options.unwrap_or(""), None)?;
            list.refuse(&OTHER_KEYS)?;
            let kind = link(Address::Tcp(inet), &mut list)?;
            list.finish()?;
            own(kind)
        }
        "mon" | "telnet" | "websocket" | "tn3270" | "con" => {
            Err(format!("{scheme}: not built in this version"))
        }
        other if OTHER_BACKENDS.contains(&other) || other.starts_with("/dev/") => {
            Err(format!("{other}: not built in this version"))
        }
        _ => Err(format!("'{text}' is not a valid char driver")),
    }
}

/// `-serial`.
pub(super) fn serial(draft: &mut Draft, value: &str) -> Answer {
    draft.serials.push(place(value)?);
    Ok(())
}

/// `-monitor`.
pub(super) fn monitor(draft: &mut Draft, value: &str) -> Answer {
    draft.has_monitor_option = true;
    if let Some(place) = place(value)? {
        draft.monitors.push((draft.option.clone(), place));
    }
    Ok(())
}

/// `-mon`.
pub(super) fn mon(draft: &mut Draft, value: &str) -> Answer {
    let mut list = KeyVal::parse(value, Some("chardev"))?;
    match list.take("mode").as_deref() {
        None | Some("readline") => {}
        Some("control") => return Err("mode=control: not built in this version".to_owned()),
        Some(mode) => return Err(format!("Parameter 'mode' does not accept value '{mode}'")),
    }
    if list.take_switch("pretty")? == Some(true) {
        return Err("'pretty' is not compatible with HMP monitors".to_owned());
    }
    let id = list.take("chardev");
    list.finish()?;
    let id = id.ok_or("Parameter 'chardev' is missing")?;
    draft.has_monitor_option = true;
    draft
        .monitors
        .push((draft.option.clone(), Place::Chardev(id)));
    Ok(())
}
