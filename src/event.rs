//! What happened, for whoever wants to tell the operator.

/// An asynchronous event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The guest stopped.
    Stop,
    /// The guest runs (again).
    Resume,
    /// The guest was reset.
    Reset,
    /// The program is about to end; the text says why.
    Shutdown(String),
    /// The migration entered another status (QEMU's word).
    Migration(&'static str),
    /// Something the operator should read, one line.
    Notice(String),
}
