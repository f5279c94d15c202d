//! Who is told of what happened.

use std::sync::Mutex;

use super::lock;
use crate::event::Event;

/// Told of every event, on the thread that caused it; must not block.
pub type Listener = Box<dyn Fn(&Event) + Send>;

/// The listeners.
#[derive(Default)]
pub struct Events(Mutex<Vec<Listener>>);

impl Events {
    /// Adds a listener.
    pub fn subscribe(&self, listener: Listener) {
        lock(&self.0).push(listener);
    }

    /// Tells everybody.
    pub fn tell(&self, event: &Event) {
        match event {
            // Even if nobody listens (yet) the operator reads it.
            Event::Notice(text) => log::warn!("{text}"),
            event => log::debug!("{event:?}"),
        }
        lock(&self.0).iter().for_each(|listener| listener(event));
    }
}
