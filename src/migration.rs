//! Floor 4: the live-migration engine.
//!
//! Two scripts, `source` and `dest`, over a `channel::Channel`, moving what a `vm::guest::Guest`
//! shows. Each is a short function that lists its phases; the rooms
//! below hold one thing each. QEMU's `migration/` directory; the formats are described in QEMU's
//! own documentation, what is added to them in `docs/wire.md`.
//!
//! The rule that everything here serves: at every instant at most one side runs the guest.

pub mod block;
pub mod channel;
pub mod clock;
pub mod configuration;
pub mod description;
pub mod dest;
pub mod dialect;
pub mod dirty_bitmap;
pub mod globalstate;
pub mod handover;
pub mod integrity;
pub mod manifest;
pub mod params;
pub mod progress;
pub mod ram;
pub mod return_path;
pub mod section;
pub mod source;
pub mod stats;
pub mod stream;
pub mod switchover;
pub mod throttle;
pub mod uri;

#[cfg(test)]
mod fake;
#[cfg(test)]
mod memory_channel;
#[cfg(test)]
mod sweep;

use crate::vm::guest;

/// Why a migration ended without success, worded for the operator.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The transport failed, ran out of time, or the operator cancelled.
    #[error(transparent)]
    Channel(#[from] channel::Fault),
    /// The guest here could not do what was asked.
    #[error(transparent)]
    Guest(#[from] guest::Error),
    /// What arrived is not what has to come there.
    #[error("{0}")]
    Stream(String),
    /// The other side gave up; its reason.
    #[error("{0}")]
    Peer(String),
    /// The end of an outgoing migration as the board tells it: cause and what became of the guest.
    #[error("{0}")]
    Ended(String),
}

impl Error {
    /// Whether the operator wanted it so.
    pub fn is_cancel(&self) -> bool {
        matches!(self, Self::Channel(channel::Fault::Cancelled))
    }

    /// An [`Error::Stream`].
    pub fn stream(text: impl Into<String>) -> Self {
        Self::Stream(text.into())
    }
}
