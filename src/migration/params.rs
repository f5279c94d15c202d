//! Migration parameters, capabilities and wire properties: what the operator can set.
//!
//! Names, order, defaults, ranges, units and texts are QEMU's (10.0's order; names only 7.2 has
//! stand where 7.2 has them). What is not built is refused, never accepted and ignored.
//! Counterpart: QEMU's `migration/options.c`.

mod capabilities;
mod parameters;

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

pub use parameters::Listing;

use super::dialect::Dialect;
use crate::units::{parse_switch, switch};
use capabilities::Capabilities;
use parameters::Parameters;

/// Why something was not set; the text is QEMU's where QEMU has one.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// No parameter or capability of that name.
    #[error("invalid parameter value: {0}")]
    Unknown(String),
    /// The value is not of the parameter's kind, or out of range.
    #[error("{0}")]
    BadValue(String),
    /// A capability of QEMU's that is not built yet.
    #[error("Capability '{0}' is not built in this version")]
    CapabilityNotBuilt(&'static str),
    /// A value that would ask for something that is not built yet.
    #[error("Parameter '{name}': '{value}' is not built in this version")]
    ValueNotBuilt {
        /// The parameter.
        name: &'static str,
        /// The value.
        value: String,
    },
    /// `-global` with a name nobody knows.
    #[error("can't apply global {driver}.{name}={value}: Property '{driver}.{name}' not found")]
    NoSuchProperty {
        /// Before the dot.
        driver: String,
        /// After it.
        name: String,
        /// The value given.
        value: String,
    },
    /// `-global` with a value the property does not take.
    #[error("can't apply global {driver}.{name}={value}: {why}")]
    BadProperty {
        /// Before the dot.
        driver: String,
        /// After it.
        name: String,
        /// The value given.
        value: String,
        /// What is wrong with it.
        why: String,
    },
}

/// Everything that can be set. Usable from every thread; a reader sees each change at once.
#[derive(Debug, Default)]
pub struct Settings {
    state: Mutex<State>,
}

#[derive(Clone, Debug, Default)]
struct State {
    parameters: Parameters,
    capabilities: Capabilities,
    dialect: Dialect,
    exit_on_error: bool,
}

/// Wire properties with the one value this version has; the first two are shown by `info migrate`.
const FIXED: [(&str, &str); 6] = [
    ("only-migratable", "off"),
    ("clear-bitmap-shift", "18"),
    ("decompress-error-check", "on"),
    ("multifd-clean-tls-termination", "on"),
    ("multifd-flush-after-each-section", "off"),
    ("preempt-pre-7-2", "off"),
];

impl Settings {
    /// Sets a parameter from the text of `migrate_set_parameter`.
    ///
    /// # Errors
    /// [`Error::Unknown`], [`Error::BadValue`], [`Error::ValueNotBuilt`]; nothing is changed then.
    pub fn set_parameter(&self, name: &str, value: &str) -> Result<(), Error> {
        self.lock().parameters.set(name, value)
    }

    /// Switches a capability.
    ///
    /// # Errors
    /// [`Error::Unknown`], [`Error::CapabilityNotBuilt`]; nothing is changed then.
    pub fn set_capability(&self, name: &str, on: bool) -> Result<(), Error> {
        self.lock().capabilities.set(name, on)
    }

    /// Applies `-global DRIVER.NAME=VALUE`: a parameter or a capability (with or without QEMU's
    /// `x-`), a wire property, or one of our own (`hmpsh`).
    ///
    /// # Errors
    /// [`Error::NoSuchProperty`], [`Error::BadProperty`].
    pub fn set_global(&self, driver: &str, name: &str, value: &str) -> Result<(), Error> {
        let given = || (driver.to_owned(), name.to_owned(), value.to_owned());
        let bad = |why: String| {
            let (driver, name, value) = given();
            Error::BadProperty {
                driver,
                name,
                value,
                why,
            }
        };
        let missing = || {
            let (driver, name, value) = given();
            Error::NoSuchProperty {
                driver,
                name,
                value,
            }
        };
        let switched = || {
            parse_switch(value)
                .ok_or_else(|| bad(format!("Parameter '{name}' expects 'on' or 'off'")))
        };
        let mut state = self.lock();
        match (driver, name) {
            ("hmpsh", "exit-on-error") => {
                state.exit_on_error = switched()?;
                return Ok(());
            }
            ("migration", _) => {}
            _ => return Err(missing()),
        }
        let switches = state.dialect.switches();
        if let Some((_, switch)) = switches.into_iter().find(|(known, _)| *known == name) {
            *switch = switched()?;
            return Ok(());
        }
        let plain = name.strip_prefix("x-").unwrap_or(name);
        if let Some((_, fixed)) = FIXED.iter().find(|(known, _)| *known == plain) {
            let is_same = match parse_switch(fixed) {
                Some(_) => switch(switched()?) == *fixed,
                None => value == *fixed,
            };
            return if is_same {
                Ok(())
            } else {
                Err(bad("not built in this version".to_owned()))
            };
        }
        for name in [Some(name), name.strip_prefix("x-")].into_iter().flatten() {
            if Capabilities::knows(name) {
                let set = state.capabilities.set(name, switched()?);
                return set.map_err(|error| bad(error.to_string()));
            }
            if Parameters::knows(name) {
                let set = state.parameters.set_property(name, value);
                return set.map_err(|error| bad(error.to_string()));
            }
        }
        Err(missing())
    }

    /// All parameters, in listing order.
    pub fn parameters(&self) -> Vec<Listing> {
        self.lock().parameters.list()
    }

    /// All capabilities, in listing order.
    pub fn capabilities(&self) -> Vec<(&'static str, bool)> {
        self.lock().capabilities.list()
    }

    /// The lines after `globals:` in `info migrate`.
    pub fn globals(&self) -> Vec<(&'static str, String)> {
        let fixed = |at: usize| (FIXED[at].0, FIXED[at].1.to_owned());
        let mut dialect = self.dialect();
        let [state, rest @ ..] = dialect
            .switches()
            .map(|(name, is_on)| (name, switch(*is_on).to_owned()));
        [vec![state, fixed(0)], rest.to_vec(), vec![fixed(1)]].concat()
    }

    /// What is sent, and expected, on the wire.
    pub fn dialect(&self) -> Dialect {
        self.lock().dialect
    }

    /// `max-bandwidth`, bytes per second; 0: no limit.
    pub fn max_bandwidth(&self) -> u64 {
        self.lock().parameters.number("max-bandwidth")
    }

    /// `avail-switchover-bandwidth`, bytes per second; 0: go by what is measured.
    pub fn avail_switchover_bandwidth(&self) -> u64 {
        self.lock().parameters.number("avail-switchover-bandwidth")
    }

    /// `downtime-limit`, at most 2000 s.
    pub fn downtime_limit(&self) -> Duration {
        Duration::from_millis(self.lock().parameters.number("downtime-limit"))
    }

    /// Capability `return-path`: whether the destination answers, where the transport has a way
    /// back. On by default, unlike QEMU's.
    pub fn return_path(&self) -> bool {
        self.lock().capabilities.is_on("return-path")
    }

    /// Capability `block`: disks go with the guest.
    pub fn block(&self) -> bool {
        self.lock().capabilities.is_on("block")
    }

    /// Parameter `block-incremental`: only what a disk's top image holds goes.
    pub fn block_incremental(&self) -> bool {
        self.lock().parameters.number("block-incremental") != 0
    }

    /// Capability `zero-blocks`: chunks of zeros go to a QEMU as such.
    pub fn zero_blocks(&self) -> bool {
        self.lock().capabilities.is_on("zero-blocks")
    }

    /// Capability `dirty-bitmaps`: bitmaps of the disks go with the guest.
    pub fn dirty_bitmaps(&self) -> bool {
        self.lock().capabilities.is_on("dirty-bitmaps")
    }

    /// `-b` and `-i` switch [`Self::block`] and [`Self::block_incremental`] for one migration.
    pub fn switch_block(&self, block: bool, incremental: bool) {
        let mut state = self.lock();
        let value = if incremental { "on" } else { "off" };
        // Both are built and the values are theirs.
        let _ = state.capabilities.set("block", block);
        let _ = state.parameters.set("block-incremental", value);
    }

    /// `-global hmpsh.exit-on-error`: whether a failed incoming migration ends the program even
    /// where another source could connect. Off by default.
    pub fn exit_on_error(&self) -> bool {
        self.lock().exit_on_error
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn typed_values_follow_what_is_set() {
        let settings = Settings::default();
        assert_eq!(settings.max_bandwidth(), 128 << 20);
        assert_eq!(settings.downtime_limit(), Duration::from_millis(300));
        assert_eq!(settings.avail_switchover_bandwidth(), 0);
        assert!(settings.return_path());
        settings.set_parameter("max-bandwidth", "1G").unwrap();
        settings.set_parameter("downtime-limit", "50").unwrap();
        settings.set_capability("return-path", false).unwrap();
        assert_eq!(settings.max_bandwidth(), 1 << 30);
        assert_eq!(settings.downtime_limit(), Duration::from_millis(50));
        assert!(!settings.return_path());
    }

    #[test]
    fn globals_reach_parameters_capabilities_and_wire_properties() {
        let settings = Settings::default();
        let set = |name: &str, value: &str| settings.set_global("migration", name, value);
        set("x-return-path", "off").unwrap();
        assert!(!settings.return_path());
        // As a property, max-bandwidth counts bytes.
        set("x-max-bandwidth", "1000").unwrap();
        assert_eq!(settings.max_bandwidth(), 1000);
        set("send-switchover-start", "on").unwrap();
        set("send-section-footer", "no").unwrap();
        set("x-clear-bitmap-shift", "18").unwrap();
        set("x-preempt-pre-7-2", "off").unwrap();
        assert_eq!(
            settings
                .globals()
                .iter()
                .map(|(name, value)| format!("{name}={value}"))
                .collect::<Vec<_>>()
                .join(" "),
            "store-global-state=on only-migratable=off send-configuration=on \
             send-section-footer=off send-switchover-start=on clear-bitmap-shift=18"
        );
        settings.set_global("hmpsh", "exit-on-error", "on").unwrap();
        assert!(settings.exit_on_error());
        let text = |driver: &str, name: &str, value: &str| {
            settings
                .set_global(driver, name, value)
                .unwrap_err()
                .to_string()
        };
        for (driver, name, value, why) in [
            (
                "migration",
                "foo",
                "1",
                "Property 'migration.foo' not found",
            ),
            ("hmpsh", "foo", "1", "Property 'hmpsh.foo' not found"),
            (
                "migration",
                "x-multifd",
                "foo",
                "Parameter 'x-multifd' expects 'on' or 'off'",
            ),
            (
                "migration",
                "multifd-channels",
                "foo",
                "Parameter 'multifd-channels' expects uint64",
            ),
            (
                "migration",
                "send-configuration",
                "maybe",
                "Parameter 'send-configuration' expects 'on' or 'off'",
            ),
            (
                "migration",
                "multifd-flush-after-each-section",
                "on",
                "not built in this version",
            ),
            (
                "migration",
                "x-xbzrle",
                "on",
                "Capability 'xbzrle' is not built in this version",
            ),
        ] {
            assert_eq!(
                text(driver, name, value),
                format!("can't apply global {driver}.{name}={value}: {why}")
            );
        }
    }
}
