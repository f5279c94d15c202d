//! The capabilities, in one table.

use super::Error;

/// A capability: QEMU's name, its default here, and whether it is built.
struct Row {
    name: &'static str,
    default: bool,
    is_built: bool,
}

const fn not_built(name: &'static str) -> Row {
    Row {
        name,
        default: false,
        is_built: false,
    }
}

const fn built(name: &'static str) -> Row {
    Row {
        name,
        default: false,
        is_built: true,
    }
}

/// In the order of `info migrate_capabilities`.
const TABLE: [Row; 24] = [
    not_built("xbzrle"),
    not_built("rdma-pin-all"),
    not_built("auto-converge"),
    built("zero-blocks"),
    not_built("compress"),
    not_built("events"),
    not_built("postcopy-ram"),
    not_built("x-colo"),
    not_built("release-ram"),
    built("block"),
    // The one default that differs from QEMU's: the source knows how it went at the destination.
    Row {
        name: "return-path",
        default: true,
        is_built: true,
    },
    not_built("pause-before-switchover"),
    not_built("multifd"),
    built("dirty-bitmaps"),
    not_built("postcopy-blocktime"),
    not_built("late-block-activate"),
    not_built("x-ignore-shared"),
    not_built("validate-uuid"),
    not_built("background-snapshot"),
    not_built("zero-copy-send"),
    not_built("postcopy-preempt"),
    not_built("switchover-ack"),
    not_built("dirty-limit"),
    not_built("mapped-ram"),
];

/// Which capabilities are on.
#[derive(Clone, Debug)]
pub(super) struct Capabilities([bool; TABLE.len()]);

impl Default for Capabilities {
    fn default() -> Self {
        Self(TABLE.map(|row| row.default))
    }
}

impl Capabilities {
    pub(super) fn knows(name: &str) -> bool {
        place(name).is_some()
    }

    pub(super) fn set(&mut self, name: &str, on: bool) -> Result<(), Error> {
        let place = place(name).ok_or_else(|| Error::Unknown(name.to_owned()))?;
        let row = &TABLE[place];
        if on && !row.is_built {
            return Err(Error::CapabilityNotBuilt(row.name));
        }
        self.0[place] = on;
        Ok(())
    }

    pub(super) fn is_on(&self, name: &str) -> bool {
        place(name).is_some_and(|place| self.0[place])
    }

    pub(super) fn list(&self) -> Vec<(&'static str, bool)> {
        TABLE.iter().map(|row| row.name).zip(self.0).collect()
    }
}

fn place(name: &str) -> Option<usize> {
    TABLE.iter().position(|row| row.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_built_is_refused_and_can_be_switched_off() {
        let mut capabilities = Capabilities::default();
        for (name, on) in capabilities.list() {
            assert_eq!(on, name == "return-path", "{name}");
            capabilities.set(name, false).unwrap();
        }
        assert_eq!(
            capabilities.set("xbzrle", true).unwrap_err().to_string(),
            "Capability 'xbzrle' is not built in this version"
        );
        assert_eq!(
            capabilities.set("foo", true).unwrap_err().to_string(),
            "invalid parameter value: foo"
        );
        capabilities.set("return-path", true).unwrap();
        assert!(capabilities.is_on("return-path"));
    }

    #[test]
    fn qemus_own_list_is_found_in_order() {
        // `info migrate_capabilities` of 10.0.2 and of 7.2.22.
        let v10 = "xbzrle rdma-pin-all auto-converge zero-blocks events postcopy-ram x-colo \
                   release-ram return-path pause-before-switchover multifd dirty-bitmaps \
                   postcopy-blocktime late-block-activate x-ignore-shared validate-uuid \
                   background-snapshot zero-copy-send postcopy-preempt switchover-ack dirty-limit \
                   mapped-ram";
        let v7 = "xbzrle rdma-pin-all auto-converge zero-blocks compress events postcopy-ram \
                  x-colo release-ram block return-path pause-before-switchover multifd \
                  dirty-bitmaps postcopy-blocktime late-block-activate x-ignore-shared \
                  validate-uuid background-snapshot zero-copy-send postcopy-preempt";
        for version in [v10, v7] {
            let names: Vec<&str> = version.split_whitespace().collect();
            let ours: Vec<&str> = Capabilities::default()
                .list()
                .into_iter()
                .map(|(name, _)| name)
                .filter(|name| names.contains(name))
                .collect();
            assert_eq!(ours, names);
        }
    }
}
