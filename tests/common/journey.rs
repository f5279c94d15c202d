//! A guest's way from one host to the next.

use std::path::Path;

use super::beacon::wait_beacons;
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

/// The guest goes on at the last of `hosts`, for so many beacons.
#[track_caller]
pub(crate) fn goes_on_for(hosts: &[&Vmm], beacons: u64) {
    let logs: Vec<_> = hosts.iter().map(|host| host.log()).collect();
    let logs: Vec<&Path> = logs.iter().map(|log| log.as_path()).collect();
    wait_beacons(&logs, beacons);
}
