//! Run states, as QEMU names them on the wire, in `info status` and in QMP.

/// What the machine is doing, or why it is not running.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunState {
    /// Stopped by a debugger.
    Debug,
    /// Waiting for, or loading, an incoming migration.
    InMigrate,
    /// KVM gave up on the guest.
    InternalError,
    /// A disk request failed and the policy was to stop.
    IoError,
    /// Stopped by the operator.
    Paused,
    /// Stopped here because it went elsewhere.
    PostMigrate,
    /// Never started (`-S`).
    Prelaunch,
    /// Stopped for the last phase of a migration.
    FinishMigrate,
    /// Loading a snapshot.
    RestoreVm,
    /// Running.
    Running,
    /// Saving a snapshot.
    SaveVm,
    /// The guest powered itself off.
    Shutdown,
    /// Suspended by the guest.
    Suspended,
    /// The watchdog fired.
    Watchdog,
    /// The guest reported a panic.
    GuestPanicked,
    /// Checkpointing.
    Colo,
}

const NAMES: [(RunState, &str); 16] = [
    (RunState::Debug, "debug"),
    (RunState::InMigrate, "inmigrate"),
    (RunState::InternalError, "internal-error"),
    (RunState::IoError, "io-error"),
    (RunState::Paused, "paused"),
    (RunState::PostMigrate, "postmigrate"),
    (RunState::Prelaunch, "prelaunch"),
    (RunState::FinishMigrate, "finish-migrate"),
    (RunState::RestoreVm, "restore-vm"),
    (RunState::Running, "running"),
    (RunState::SaveVm, "save-vm"),
    (RunState::Shutdown, "shutdown"),
    (RunState::Suspended, "suspended"),
    (RunState::Watchdog, "watchdog"),
    (RunState::GuestPanicked, "guest-panicked"),
    (RunState::Colo, "colo"),
];

impl RunState {
    /// QEMU's name.
    pub fn name(self) -> &'static str {
        NAMES
            .iter()
            .find(|(state, _)| *state == self)
            .map_or("", |(_, name)| name)
    }

    /// The state of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        NAMES
            .iter()
            .find(|(_, known)| *known == name)
            .map(|(state, _)| *state)
    }

    /// Whether guest instructions are being executed.
    pub fn is_running(self) -> bool {
        self == Self::Running
    }
}
