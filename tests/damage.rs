//! Damaged and boundless streams, hundreds of them, sent to one destination: it refuses each, takes
//! no more memory than its guest's and 64 MiB, listens on, and takes the right one at the end.

mod common;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use common::beacon::wait_beacons;
use common::need::{Need, require};
use common::vmm::Program::Hmpsh;
use common::vmm::{Setup, Vmm};

const MEMORY_MIB: u64 = 16;

fn setup() -> Setup {
    Setup::new(Hmpsh)
        .memory_mib(MEMORY_MIB)
        .machine(",pic=on,pit=on,rtc=on")
        .append("window=4K")
}

/// A guest that we saved, and the stream's bounds: EOF and everything behind it.
struct Saved {
    source: Vmm,
    stream: Vec<u8>,
    eof: usize,
}

fn saved() -> Saved {
    let mut source = setup().start();
    source.wait_beacons(5);
    let file = source.path("saved");
    source.quiet(&format!("migrate file:{}", file.display()));
    source.wait_migration("completed");
    let stream = std::fs::read(file).unwrap();
    let text = b"\x00\x06";
    let json = stream
        .windows(3)
        .rposition(|three| three == b"{\"c")
        .unwrap();
    let eof = json - 6;
    assert_eq!(&stream[eof..eof + 2], text);
    Saved {
        source,
        stream,
        eof,
    }
}

/// Sends what `write` writes, and waits until the destination has closed its end.
fn send(port: u16, write: impl FnOnce(&mut TcpStream) -> std::io::Result<()>) {
    let mut connection = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let patience = Some(Duration::from_secs(20));
    connection.set_read_timeout(patience).unwrap();
    connection.set_write_timeout(patience).unwrap();
    // It may be refused before all of it is sent.
    let _ = write(&mut connection).and_then(|()| connection.shutdown(Shutdown::Write));
    match connection.read_to_end(&mut Vec::new()) {
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
        Err(error) => panic!("the destination neither refuses nor reads: {error}"),
    }
}

fn repeat(connection: &mut TcpStream, piece: &[u8], mib: usize) -> std::io::Result<()> {
    let many = piece.repeat((1 << 20) / piece.len());
    (0..mib).try_for_each(|_| connection.write_all(&many))
}

#[test]
fn no_damaged_stream_takes_memory() {
    if !require(&[Need::Kvm]) {
        return;
    }
    let Saved {
        source,
        stream,
        eof,
    } = saved();
    let mut dest = setup().incoming("tcp:127.0.0.1:0").start();
    let port = dest.port();
    // Lengths and counts are big-endian: the highest bits come first. Pages are left out, there is
    // nothing to be counted in them.
    let first = b"\x05timer";
    let devices = stream.windows(6).position(|here| here == first);
    let cpu = stream.windows(4).position(|here| here == b"\x03cpu");
    let devices = devices.unwrap_or(usize::MAX).min(cpu.unwrap()) - 5;
    let every = std::env::var_os("HMPSH_EVERY_BIT").is_some();
    let step = if every { 3 } else { 29 };
    let places: Vec<usize> = (0..0x60).chain((devices..eof).step_by(step)).collect();
    for &at in &places {
        let mut damaged = stream.clone();
        damaged[at] ^= 0x80;
        send(port, |to| to.write_all(&damaged));
    }
    for length in (0..places.len()).step_by(9) {
        send(port, |to| to.write_all(&stream[..places[length]]));
    }
    // A description, a list of RAM blocks, and sections without end.
    send(port, |to| {
        to.write_all(&stream[..=eof])?;
        to.write_all(b"\x06\xff\xff\xff\xff")?;
        repeat(to, b"{\"hmpsh-integrity\": ", 256)
    });
    send(port, |to| {
        let name = stream.windows(4).position(|here| here == b"\x03ram");
        let list = name.unwrap() + 4 + 8;
        to.write_all(&stream[..list])?;
        to.write_all(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xf0, 4])?;
        let block = [&b"\x0bmicrovm.ram"[..], &(MEMORY_MIB << 20).to_be_bytes()].concat();
        repeat(to, &block, 64)
    });
    send(port, |to| {
        to.write_all(&stream[..devices])?;
        repeat(to, &stream[devices..eof], 64)
    });
    send(port, |to| {
        to.write_all(&stream[..8 + 1 + 4 + 7])?;
        // OPEN_RETURN_PATH, again and again.
        repeat(to, b"\x08\0\x01\0\0", 64)
    });
    let peak = dest.peak_mib();
    println!("{} streams, at most {peak} MiB", places.len() * 10 / 9 + 4);
    assert!(peak < MEMORY_MIB + 64, "{peak} MiB");
    // Each was told.
    let said = dest.said();
    let told = said.lines().filter(|line| line.contains("byte"));
    assert!(told.count() >= places.len(), "{said}");
    assert!(dest.is_alive());
    send(port, |to| to.write_all(&stream));
    dest.wait_status("running");
    wait_beacons(&[&source.log(), &dest.log()], 3);
}
