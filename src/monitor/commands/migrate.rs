//! The verbs of migration, and its parameters and capabilities.

use crate::control::{MigrateOptions, ParameterInfo};
use crate::monitor::args::Args;
use crate::monitor::session::{Error, Next, Session};

/// `migrate [-d] [-b] [-i] [-r] uri`.
pub(crate) fn migrate(session: &mut Session, args: &Args) -> Result<(), Error> {
    let options = MigrateOptions {
        block: args.flag("blk"),
        incremental: args.flag("inc"),
        resume: args.flag("resume"),
        uri: args.text("uri")?.to_owned(),
    };
    session.control.migrate(&options, &mut session.fds)?;
    if !args.flag("detach") {
        session.next = Next::Wait;
    }
    Ok(())
}

/// `migrate_cancel`: silent, unless it is too late.
pub(crate) fn cancel(session: &mut Session, _: &Args) -> Result<(), Error> {
    match session.control.migrate_cancel() {
        None => Ok(()),
        Some(line) => Err(Error::Text(line)),
    }
}

/// `migrate_incoming uri`.
pub(crate) fn incoming(session: &mut Session, args: &Args) -> Result<(), Error> {
    Ok(session
        .control
        .migrate_incoming(args.text("uri")?, &mut session.fds)?)
}

/// `migrate_set_capability capability state`.
pub(crate) fn set_capability(session: &mut Session, args: &Args) -> Result<(), Error> {
    Ok(session
        .control
        .set_capability(args.text("capability")?, args.flag("state"))?)
}

/// `migrate_set_parameter parameter value`.
pub(crate) fn set_parameter(session: &mut Session, args: &Args) -> Result<(), Error> {
    Ok(session
        .control
        .set_parameter(args.text("parameter")?, args.text("value")?)?)
}

/// `info migrate_capabilities`.
pub(crate) fn info_capabilities(session: &mut Session, _: &Args) -> Result<(), Error> {
    let text = capabilities(&session.control.capabilities());
    session.print(&text);
    Ok(())
}

/// `info migrate_parameters`.
pub(crate) fn info_parameters(session: &mut Session, _: &Args) -> Result<(), Error> {
    let text = parameters(&session.control.parameters());
    session.print(&text);
    Ok(())
}

fn capabilities(capabilities: &[(&'static str, bool)]) -> String {
    let state = |on| if on { "on" } else { "off" };
    capabilities
        .iter()
        .map(|(name, on)| format!("{name}: {}\n", state(*on)))
        .collect()
}

fn parameters(parameters: &[ParameterInfo]) -> String {
    parameters
        .iter()
        .filter(|parameter| parameter.is_listed)
        .map(|parameter| format!("{}: {}\n", parameter.name, parameter.value))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists() {
        assert_eq!(
            capabilities(&[("xbzrle", false), ("events", true)]),
            "xbzrle: off\nevents: on\n"
        );
        let list = [
            ("downtime-limit", "300 ms", true),
            ("multifd-zlib-level", "1", false),
        ]
        .map(|(name, value, is_listed)| ParameterInfo {
            name,
            value: value.to_owned(),
            is_listed,
            words: &[],
        });
        assert_eq!(parameters(&list), "downtime-limit: 300 ms\n");
    }
}
