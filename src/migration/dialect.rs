//! What of QEMU's stream the other side expects: the wire properties of `-global migration.…`.
//!
//! QEMU takes these from the machine's version, and a microvm has none. Both sides must be given
//! the same, but for the switchover start: whoever reads it understands it (or, QEMU 7.2, ends).

use super::section;

/// Which records are sent, and expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dialect {
    /// `store-global-state`: the section that says what the guest was doing; without it a guest
    /// runs where it arrives. It also promises the integrity key, so a file without it that has
    /// lost its key is taken for QEMU's.
    pub global_state: bool,
    /// `send-configuration`: the record with the machine's name.
    pub configuration: bool,
    /// `send-section-footer`: a footer behind each section.
    pub footers: bool,
    /// `send-switchover-start`: a command in front of the last memory. QEMU 10.0 sends it unless
    /// told otherwise, QEMU 7.2 dies of it; here it is off unless asked for.
    pub switchover_start: bool,
}

impl Default for Dialect {
    fn default() -> Self {
        Self {
            global_state: true,
            configuration: true,
            footers: true,
            switchover_start: false,
        }
    }
}

impl Dialect {
    /// The properties that can be switched, by QEMU's names in the order of `info migrate`.
    pub fn switches(&mut self) -> [(&'static str, &mut bool); 4] {
        [
            ("store-global-state", &mut self.global_state),
            ("send-configuration", &mut self.configuration),
            ("send-section-footer", &mut self.footers),
            ("send-switchover-start", &mut self.switchover_start),
        ]
    }

    /// Appends a footer, if there are any.
    pub fn put_footer(self, id: u32, to: &mut Vec<u8>) {
        if self.footers {
            section::put_footer(id, to);
        }
    }
}
