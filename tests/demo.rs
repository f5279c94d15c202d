//! `hmpsh demo`: one command, one machine, under ten seconds.

mod common;

use std::process::Command;
use std::time::{Duration, Instant};

use common::need::{Need, require};

#[test]
fn the_demo_moves_a_guest_and_says_what_it_did() {
    if !require(&[Need::Kvm]) {
        return;
    }
    let started = Instant::now();
    let output = Command::new(env!("CARGO_BIN_EXE_hmpsh"))
        .arg("demo")
        .output()
        .expect("the program starts");
    let took = started.elapsed();
    let said = String::from_utf8_lossy(&output.stdout);
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}{complaint}");
    assert!(took < Duration::from_secs(10), "it took {took:?}");
    for line in [
        "VM status: paused (inmigrate)",
        "VM status: paused (postmigrate)",
        "VM status: running",
        "without a fault",
    ] {
        assert!(said.contains(line), "no '{line}' in:\n{said}");
    }
}
