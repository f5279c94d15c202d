//! `-e` and `-script`: monitor commands without an operator.
//!
//! One session executes them in order and prints to standard output; a migration in the
//! foreground is waited for, one in the background (`migrate -d`) before the program ends. The
//! first that fails ends the program with status 1, the last that succeeds with 0.

use std::io;
use std::sync::mpsc;

use super::history::History;
use super::session::{Outcome, Session};
use crate::control::{Error, Shared};
use crate::errno::Errno;
use crate::migration::stats::Status;

/// Starts executing the commands that the command line named, on a thread of their own.
///
/// # Errors
/// The script can not be read, or there is no thread to be had.
pub fn start(control: &Shared) -> Result<(), Error> {
    let config = control.config();
    let mut lines = config.commands.clone();
    if let Some(path) = &config.script {
        let text = std::fs::read_to_string(path)
            .map_err(|error| Error(format!("-script {}: {}", path.display(), Errno(&error))))?;
        lines.extend(text.lines().map(str::to_owned));
    }
    let control = control.clone();
    std::thread::Builder::new()
        .name("script".to_owned())
        .spawn(move || {
            let mut session =
                Session::new(control.clone(), Box::new(io::stdout()), History::default());
            let mut is_away = false;
            let ended = lines
                .iter()
                .try_for_each(|line| execute(&mut session, line, &mut is_away))
                .and_then(|()| see_off(&mut session, is_away));
            match ended {
                Ok(()) | Err(End::Quit) => control.quit(),
                Err(End::Failed) => control.quit_with(1),
            }
        })
        .map_err(|error| Error(format!("Failed to start the script's thread: {error}")))?;
    Ok(())
}

/// Why no further line is executed.
enum End {
    /// `quit` was said.
    Quit,
    /// A command did not do what it was told to, and has said why.
    Failed,
}

/// `is_away`: a migration was sent into the background. It would end with the program, and if it has
/// failed already nobody has been told.
fn execute(session: &mut Session, line: &str, is_away: &mut bool) -> Result<(), End> {
    let is_comment = line.trim_start().starts_with('#');
    if is_comment {
        return Ok(());
    }
    match session.execute(line) {
        Outcome::Done => {
            *is_away |= line.split_whitespace().next() == Some("migrate");
            Ok(())
        }
        Outcome::Quit => Err(End::Quit),
        Outcome::Failed => Err(End::Failed),
        Outcome::Suspended => {
            *is_away = false;
            wait(session)
        }
    }
}

/// Waits for what was sent away; that the script itself has cancelled it is no failure.
fn see_off(session: &mut Session, is_away: bool) -> Result<(), End> {
    match is_away.then(|| wait(session)) {
        Some(Err(_)) if session.control().migration().status == Status::Cancelled => Ok(()),
        Some(ended) => ended,
        None => Ok(()),
    }
}

fn wait(session: &mut Session) -> Result<(), End> {
    let (tell, told) = mpsc::channel();
    session.control().when_migration_ends(Box::new(move || {
        // Who waits for it is right below, or has given up with the program.
        let _ = tell.send(());
    }));
    let _ = told.recv();
    if session.conclude() {
        Ok(())
    } else {
        Err(End::Failed)
    }
}
