//! A guest's way from one host to the next.

use super::vmm::{Setup, Vmm};

/// Starts `to` as a destination, migrates `from`'s guest there over tcp and sees it gone here and
/// arrived there, running or (`-S`) paused.
#[track_caller]
pub(crate) fn moved(from: &mut Vmm, to: Setup) -> Vmm {
    let mut dest = to.incoming("tcp:127.0.0.1:0").start();
    let port = dest.port();
    from.command(&format!("migrate tcp:127.0.0.1:{port}"));
    // QEMU's prompt may be back while the devices are still on their way.
    from.wait_migration("completed");
    from.wait_status("paused (postmigrate)");
    let arrived = super::poll(super::hmp::PATIENCE, || {
        let status = dest.command("info status");
        (!status.contains("inmigrate")).then_some(())
    });
    assert!(arrived.is_some(), "it did not arrive; {}", dest.said());
    dest
}
