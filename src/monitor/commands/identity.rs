//! `info name`, `info uuid`, `info version`, `info kvm`, `info history`.

use crate::monitor::args::Args;
use crate::monitor::session::{Error, Session};

/// `info name`: nothing if the machine has none.
pub(crate) fn info_name(session: &mut Session, _: &Args) -> Result<(), Error> {
    if let Some(name) = session.control.name() {
        let line = format!("{name}\n");
        session.print(&line);
    }
    Ok(())
}

/// `info uuid`.
pub(crate) fn info_uuid(session: &mut Session, _: &Args) -> Result<(), Error> {
    session.print(&uuid(session.control.uuid().unwrap_or_default()));
    Ok(())
}

/// `info version`.
pub(crate) fn info_version(session: &mut Session, _: &Args) -> Result<(), Error> {
    session.print(&format!("{}\n", env!("CARGO_PKG_VERSION")));
    Ok(())
}

/// `info kvm`.
pub(crate) fn info_kvm(session: &mut Session, _: &Args) -> Result<(), Error> {
    let state = if session.control.has_kvm() {
        "enabled"
    } else {
        "disabled"
    };
    session.print(&format!("kvm support: {state}\n"));
    Ok(())
}

/// `info history`.
pub(crate) fn info_history(session: &mut Session, _: &Args) -> Result<(), Error> {
    let history = session.history().clone();
    for (index, line) in (0..history.len()).filter_map(|index| Some((index, history.line(index)?)))
    {
        session.print(&format!("{index}: '{line}'\n"));
    }
    Ok(())
}

fn uuid(bytes: [u8; 16]) -> String {
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let parts = [
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..],
    ];
    parts.join("-") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuids() {
        let bytes = std::array::from_fn(|index| index as u8);
        assert_eq!(uuid(bytes), "00010203-0405-0607-0809-0a0b0c0d0e0f\n");
    }
}
