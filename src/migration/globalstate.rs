//! The section `globalstate`: what the guest was doing before it was stopped to be moved.
//!
//! ```text
//! length with NUL be32 | name, NUL-padded to 100 bytes
//! ```
//! 10.0 keeps two flags in the padding; 0 is right for them here. QEMU: `migration/global_state.c`.

use serde_json::json;

use super::Error;
use super::stream::Reader;
use crate::vm::guest::{SavedSection, SectionHeader};
use crate::vm::run_state::RunState;

/// Section name.
pub const IDSTR: &str = "globalstate";
/// The only version.
pub const VERSION: u32 = 1;

/// The section for a guest that was in `state`.
pub fn save(state: RunState) -> SavedSection {
    let name = state.name().as_bytes();
    let mut body = (name.len() as u32 + 1).to_be_bytes().to_vec();
    body.extend(name);
    body.resize(4 + ROOM, 0);
    SavedSection {
        header: SectionHeader {
            idstr: IDSTR.to_owned(),
            instance: 0,
            version: VERSION,
        },
        body,
        description: json!({
            "vmsd_name": IDSTR,
            "version": VERSION,
            "fields": [
                {"name": "size", "type": "uint32", "size": 4},
                {"name": "runstate", "type": "buffer", "size": ROOM},
            ],
        }),
    }
}

/// Reads the body.
pub fn load(reader: &mut Reader, version: u32) -> Result<RunState, Error> {
    if version > VERSION {
        let text = format!("savevm: unsupported version {version} for '{IDSTR}' v{VERSION}");
        return Err(Error::Stream(text));
    }
    let length = reader.be32()? as usize;
    let mut room = [0; ROOM];
    reader.exact(&mut room)?;
    let name = room
        .get(..length)
        .and_then(|name| name.split(|byte| *byte == 0).next());
    let name = name.map(String::from_utf8_lossy).unwrap_or_default();
    RunState::from_name(&name).ok_or_else(|| {
        Error::Stream(format!(
            "Unknown received state '{}'",
            name.escape_default()
        ))
    })
}

/// The state to enter after loading a guest that was in `received`.
pub fn entered(received: RunState, autostart: bool) -> RunState {
    match received {
        RunState::Running if autostart => RunState::Running,
        // States on the way to another one: nothing would ever lead out of them here.
        RunState::Running
        | RunState::InMigrate
        | RunState::FinishMigrate
        | RunState::PostMigrate
        | RunState::RestoreVm
        | RunState::SaveVm => RunState::Paused,
        other => other,
    }
}

const ROOM: usize = 100;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migration::memory_channel::Recording;

    fn read(body: &[u8]) -> Result<RunState, String> {
        load(&mut Recording::reader(body), VERSION).map_err(|error| error.to_string())
    }

    #[test]
    fn the_body_is_qemus() {
        let body = save(RunState::Running).body;
        assert_eq!(body.len(), 104);
        assert_eq!(&body[..13], b"\0\0\0\x08running\0\0");
        assert_eq!(read(&body), Ok(RunState::Running));
    }

    #[test]
    fn flags_in_the_padding_do_not_matter() {
        let mut body = save(RunState::Paused).body;
        body[4 + 32] = 1;
        assert_eq!(read(&body), Ok(RunState::Paused));
    }

    #[test]
    fn unknown_words_are_refused() {
        let mut body = save(RunState::Paused).body;
        body[4] = b'q';
        assert_eq!(
            read(&body),
            Err("Unknown received state 'qaused'".to_owned())
        );
        body[..4].copy_from_slice(&u32::MAX.to_be_bytes());
        assert_eq!(read(&body), Err("Unknown received state ''".to_owned()));
    }

    #[test]
    fn only_a_running_guest_that_may_start_starts() {
        assert_eq!(entered(RunState::Running, true), RunState::Running);
        assert_eq!(entered(RunState::Running, false), RunState::Paused);
        assert_eq!(entered(RunState::Shutdown, true), RunState::Shutdown);
        assert_eq!(entered(RunState::PostMigrate, true), RunState::Paused);
    }
}
