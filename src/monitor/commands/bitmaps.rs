//! Dirty bitmaps: `block_dirty_bitmap_add` and others, `info dirty-bitmaps`.
//!
//! QEMU has them in QMP only; the names are those with underscores, the errors are QMP's. QEMU:
//! `block/monitor/bitmap-qmp-cmds.c`.

use crate::block::BitmapInfo;
use crate::monitor::args::Args;
use crate::monitor::session::{Error, Session};

/// `block_dirty_bitmap_add [-d] node name [granularity]`.
pub(crate) fn add(session: &mut Session, args: &Args) -> Result<(), Error> {
    let granularity = args
        .int_if_any("granularity")
        .map(u32::try_from)
        .transpose();
    let granularity = granularity
        .map_err(|_| Error::Refused("Parameter 'granularity' expects uint32_t".to_owned()))?;
    let (node, name) = (args.text("node")?, args.text("name")?);
    let is_enabled = !args.flag("disabled");
    Ok(session
        .control
        .add_bitmap(node, name, granularity, is_enabled)?)
}

/// `block_dirty_bitmap_remove node name`.
pub(crate) fn remove(session: &mut Session, args: &Args) -> Result<(), Error> {
    Ok(session
        .control
        .remove_bitmap(args.text("node")?, args.text("name")?)?)
}

/// `block_dirty_bitmap_clear node name`.
pub(crate) fn clear(session: &mut Session, args: &Args) -> Result<(), Error> {
    Ok(session
        .control
        .clear_bitmap(args.text("node")?, args.text("name")?)?)
}

/// `block_dirty_bitmap_enable node name`.
pub(crate) fn enable(session: &mut Session, args: &Args) -> Result<(), Error> {
    Ok(session
        .control
        .enable_bitmap(args.text("node")?, args.text("name")?, true)?)
}

/// `block_dirty_bitmap_disable node name`.
pub(crate) fn disable(session: &mut Session, args: &Args) -> Result<(), Error> {
    Ok(session
        .control
        .enable_bitmap(args.text("node")?, args.text("name")?, false)?)
}

/// `info dirty-bitmaps`.
pub(crate) fn info(session: &mut Session, _: &Args) -> Result<(), Error> {
    let text: String = session.control.bitmaps().iter().map(line).collect();
    session.print(&text);
    Ok(())
}

fn line((drive, info): &(String, BitmapInfo)) -> String {
    let mut text = format!(
        "{drive}: {}: {} bytes dirty, granularity {}",
        info.name.escape_debug(),
        info.dirty,
        info.granularity
    );
    for (word, is_so) in [
        ("recording", info.is_enabled),
        ("busy", info.is_busy),
        ("persistent", info.is_persistent),
    ] {
        if is_so {
            text = format!("{text}, {word}");
        }
    }
    text + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bitmap_is_one_line() {
        let mut info = BitmapInfo {
            name: "b 0\n".to_owned(),
            granularity: 65536,
            dirty: 131_072,
            is_enabled: true,
            is_busy: true,
            is_persistent: true,
        };
        assert_eq!(
            line(&("d0".to_owned(), info.clone())),
            "d0: b 0\\n: 131072 bytes dirty, granularity 65536, recording, busy, persistent\n"
        );
        (info.is_enabled, info.is_busy, info.is_persistent) = (false, false, false);
        assert_eq!(
            line(&("d0".to_owned(), info)),
            "d0: b 0\\n: 131072 bytes dirty, granularity 65536\n"
        );
    }
}
