//! Options about the program rather than the machine.

use super::draft::Draft;
use super::keyval::KeyVal;
use super::man;
use crate::config::{Global, Incoming, Interface};
use crate::migration::params::{self, Settings};
use crate::migration::uri::Uri;
use crate::units::parse_switch;

type Answer = Result<(), String>;

/// `-help`.
pub(super) fn help(draft: &mut Draft, _value: &str) -> Answer {
    draft.print = Some(man::help());
    Ok(())
}

/// `-version`.
pub(super) fn version(draft: &mut Draft, _value: &str) -> Answer {
    draft.print = Some(format!("hmpsh version {}\n", env!("CARGO_PKG_VERSION")));
    Ok(())
}

/// `-name`.
pub(super) fn name(draft: &mut Draft, value: &str) -> Answer {
    let mut list = KeyVal::parse(value, Some("guest"))?;
    draft.name = list.take("guest");
    // Our threads always have names.
    list.take_switch("debug-threads")?;
    list.refuse(&["process"])?;
    list.finish()
}

/// `-uuid`.
pub(super) fn uuid(draft: &mut Draft, value: &str) -> Answer {
    draft.uuid = Some(parse_uuid(value).ok_or("failed to parse UUID string: wrong format")?);
    Ok(())
}

fn parse_uuid(text: &str) -> Option<[u8; 16]> {
    let groups: Vec<&str> = text.split('-').collect();
    let lengths: Vec<usize> = groups.iter().map(|group| group.len()).collect();
    if lengths != [8, 4, 4, 4, 12] || !text.is_ascii() {
        return None;
    }
    let digits = groups.concat();
    let mut uuid = [0; 16];
    for (byte, place) in uuid.iter_mut().zip((0..).step_by(2)) {
        let pair = &digits[place..place + 2];
        // from_str_radix would take a sign.
        if !pair.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return None;
        }
        *byte = u8::from_str_radix(pair, 16).ok()?;
    }
    Some(uuid)
}

/// `-S`.
pub(super) fn start_paused(draft: &mut Draft, _value: &str) -> Answer {
    draft.start_paused = true;
    Ok(())
}

/// `-no-reboot`.
pub(super) fn no_reboot(draft: &mut Draft, _value: &str) -> Answer {
    draft.no_reboot = true;
    Ok(())
}

/// `-nodefaults`.
pub(super) fn no_defaults(draft: &mut Draft, _value: &str) -> Answer {
    draft.no_defaults = true;
    Ok(())
}

/// `-daemonize`.
pub(super) fn daemonize(draft: &mut Draft, _value: &str) -> Answer {
    draft.daemonize = true;
    Ok(())
}

/// `-nographic`, `-no-user-config`: there are no graphics and no configuration files to begin with.
pub(super) fn nothing_to_do(_draft: &mut Draft, _value: &str) -> Answer {
    Ok(())
}

/// `-display`.
pub(super) fn display(_draft: &mut Draft, value: &str) -> Answer {
    let mut list = KeyVal::parse(value, Some("type"))?;
    let kind = list.take("type").unwrap_or_default();
    match kind.as_str() {
        "none" => {}
        "cocoa" | "curses" | "dbus" | "default" | "egl-headless" | "gtk" | "sdl" | "spice-app"
        | "vnc" => return Err(format!("{kind}: not built in this version")),
        _ => return Err(format!("Parameter 'type' does not accept value '{kind}'")),
    }
    match list.rest().next() {
        Some((key, _)) => Err(format!("Parameter '{key}' is unexpected")),
        None => Ok(()),
    }
}

/// `-sandbox`.
pub(super) fn sandbox(_draft: &mut Draft, value: &str) -> Answer {
    let mut list = KeyVal::parse(value, Some("enable"))?;
    if list.take_switch("enable")? == Some(true) {
        log::warn!("-sandbox {value}: there is no sandbox in this version");
    }
    for key in ["obsolete", "elevateprivileges", "spawn", "resourcecontrol"] {
        list.take(key);
    }
    list.finish()
}

/// `-pidfile`.
pub(super) fn pidfile(draft: &mut Draft, value: &str) -> Answer {
    draft.pidfile = Some(value.into());
    Ok(())
}

/// `-D`.
pub(super) fn log_file(draft: &mut Draft, value: &str) -> Answer {
    draft.log_file = Some(value.into());
    Ok(())
}

/// `-d`.
pub(super) fn log_items(draft: &mut Draft, value: &str) -> Answer {
    let items = value.split(',').filter(|item| !item.is_empty());
    draft.log_items.extend(items.map(str::to_owned));
    Ok(())
}

/// `-trace`: our trace points are the log's, switched by item.
pub(super) fn trace(draft: &mut Draft, value: &str) -> Answer {
    let mut list = KeyVal::parse(value, Some("enable"))?;
    list.refuse(&["events", "file"])?;
    let pattern = list.take("enable").unwrap_or_default();
    list.finish()?;
    let item = pattern.trim_end_matches('*').trim_end_matches('_');
    draft.log_items.push(if item.is_empty() {
        "all".to_owned()
    } else {
        item.to_owned()
    });
    Ok(())
}

/// `-incoming`.
pub(super) fn incoming(draft: &mut Draft, value: &str) -> Answer {
    if value != "defer" {
        value.parse::<Uri>().map_err(|error| error.to_string())?;
    }
    draft.incoming = Some(match value {
        "defer" => Incoming::Defer,
        uri => Incoming::Uri(uri.to_owned()),
    });
    Ok(())
}

/// `-global`, in either of QEMU's forms.
pub(super) fn global(draft: &mut Draft, value: &str) -> Answer {
    let global = short_global(value).map_or_else(|| long_global(value), Ok)?;
    match global.driver.as_str() {
        "migration" | "hmpsh" => {}
        "virtio-mmio" => return slots(draft, global),
        other => return Err(format!("{other}: not built in this version")),
    }
    // A trial: what can not be set is refused before anything is started.
    Settings::default()
        .set_global(&global.driver, &global.name, &global.value)
        .map_err(|error| error.to_string())?;
    draft.globals.push(global);
    Ok(())
}

/// Properties of all slots.
fn slots(draft: &mut Draft, global: Global) -> Answer {
    let Global {
        driver,
        name,
        value,
    } = global;
    let known = ["force-legacy", "format_transport_address", "ioeventfd"];
    if !known.contains(&name.as_str()) {
        let error = params::Error::NoSuchProperty {
            driver,
            name,
            value,
        };
        return Err(error.to_string());
    }
    let Some(is_on) = parse_switch(&value) else {
        let error = params::Error::BadProperty {
            why: format!("Parameter '{name}' expects 'on' or 'off'"),
            driver,
            name,
            value,
        };
        return Err(error.to_string());
    };
    if name != "force-legacy" {
        return match is_on {
            true => Ok(()),
            false => Err(format!(
                "{driver}.{name}={value}: not built in this version"
            )),
        };
    }
    draft.interface = match is_on {
        true => Interface::Legacy,
        false => Interface::Modern,
    };
    Ok(())
}

fn short_global(text: &str) -> Option<Global> {
    let (property, value) = text.split_once('=')?;
    let (driver, name) = property.split_once('.')?;
    let is_plain = !driver.is_empty() && !name.is_empty() && !property.contains(',');
    is_plain.then(|| Global {
        driver: driver.into(),
        name: name.into(),
        value: value.into(),
    })
}

fn long_global(text: &str) -> Result<Global, String> {
    let mut list = KeyVal::parse(text, None)?;
    let (driver, name, value) = (
        list.take("driver"),
        list.take("property"),
        list.take("value"),
    );
    list.finish()?;
    let missing = |key: &str| format!("Parameter '{key}' is missing");
    Ok(Global {
        driver: driver.ok_or_else(|| missing("driver"))?,
        name: name.ok_or_else(|| missing("property"))?,
        value: value.ok_or_else(|| missing("value"))?,
    })
}

/// `-e`.
pub(super) fn command(draft: &mut Draft, value: &str) -> Answer {
    draft.commands.push(value.to_owned());
    Ok(())
}

/// `-script`.
pub(super) fn script(draft: &mut Draft, value: &str) -> Answer {
    draft.script = Some(value.into());
    Ok(())
}

/// `-prompt`.
pub(super) fn prompt(draft: &mut Draft, value: &str) -> Answer {
    draft.prompt = Some(value.to_owned());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuids_have_five_groups_of_digits() {
        let uuid = parse_uuid("00112233-4455-6677-8899-AaBbCcDdEeFf").unwrap();
        assert_eq!(uuid[..4], [0, 0x11, 0x22, 0x33]);
        assert_eq!(uuid[12..], [0xcc, 0xdd, 0xee, 0xff]);
        for text in [
            "",
            "0",
            "foo",
            "0011223344556677-8899-aabb-ccdd-eeff",
            "+0112233-4455-6677-8899-aabbccddeeff",
        ] {
            assert_eq!(parse_uuid(text), None, "{text}");
        }
    }
}
