//! `stop`, `cont`, `system_reset`, `quit`, `info status`.

use crate::monitor::args::Args;
use crate::monitor::session::{Error, Next, Session};
use crate::vm::run_state::RunState;

/// `stop`.
pub(crate) fn stop(session: &mut Session, _: &Args) -> Result<(), Error> {
    Ok(session.control.stop()?)
}

/// `cont [-f]`.
pub(crate) fn cont(session: &mut Session, args: &Args) -> Result<(), Error> {
    Ok(session.control.cont(args.flag("force"))?)
}

/// `system_reset`.
pub(crate) fn system_reset(session: &mut Session, _: &Args) -> Result<(), Error> {
    Ok(session.control.system_reset()?)
}

/// `quit`.
pub(crate) fn quit(session: &mut Session, _: &Args) -> Result<(), Error> {
    session.control.quit();
    session.next = Next::Quit;
    Ok(())
}

/// `info status`.
pub(crate) fn info_status(session: &mut Session, _: &Args) -> Result<(), Error> {
    session.print(&status(session.control.run_state()));
    Ok(())
}

/// What `info status` shows.
fn status(state: RunState) -> String {
    match state {
        RunState::Running => "VM status: running\n".to_owned(),
        RunState::Paused => "VM status: paused\n".to_owned(),
        other => format!("VM status: paused ({})\n", other.name()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_why_it_is_paused() {
        assert_eq!(status(RunState::Running), "VM status: running\n");
        assert_eq!(status(RunState::Paused), "VM status: paused\n");
        assert_eq!(
            status(RunState::PostMigrate),
            "VM status: paused (postmigrate)\n"
        );
        assert_eq!(
            status(RunState::Prelaunch),
            "VM status: paused (prelaunch)\n"
        );
    }
}
