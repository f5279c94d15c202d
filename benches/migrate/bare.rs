//! The limit: nothing but pages and their headers, from huge-page memory into huge-page memory.

use std::io::Read;
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::time::Instant;

use hmpsh::iov::{self, In, Out};
use hmpsh::vm::memory::{Backing, PAGE_SIZE, RamBlock};
use rustix::net::sockopt::set_tcp_congestion;
use rustix::time::{ClockId, clock_gettime};

use crate::{CHUNK, Sample, fill};

/// Moves `bytes` and compares them.
pub(crate) fn run(bytes: u64, is_warm: bool) -> Sample {
    let block = |name| RamBlock::new(name, bytes, Backing::Anonymous).expect("memory");
    let source = block("source");
    let mut chunk = vec![0; CHUNK];
    for at in (0..bytes).step_by(CHUNK) {
        fill(at, &mut chunk);
        for (page, content) in chunk.chunks_exact(PAGE_SIZE).enumerate() {
            let index = at as usize / PAGE_SIZE + page;
            source
                .page(index)
                .write(content.try_into().expect("a page"));
        }
    }
    let dest = block("dest");
    if is_warm {
        for page in 0..dest.pages() {
            dest.page(page).write(&[0; PAGE_SIZE]);
        }
    }
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let outgoing =
        TcpStream::connect(listener.local_addr().expect("an address")).expect("loopback");
    let (incoming, _) = listener.accept().expect("loopback");
    // What the system has set may pace.
    set_tcp_congestion(&outgoing, "reno").expect("a part of every kernel");
    let before = clock_gettime(ClockId::ProcessCPUTime);
    let start = Instant::now();
    std::thread::scope(|threads| {
        threads.spawn(|| send(&source, &outgoing));
        receive(&dest, &incoming);
    });
    let time = start.elapsed();
    let processor = clock_gettime(ClockId::ProcessCPUTime) - before;
    for page in 0..source.pages() {
        assert!(
            source.page(page).hash(0) == dest.page(page).hash(0),
            "page {page} differs"
        );
    }
    let processor = processor.try_into().expect("time goes on");
    Sample { time, processor }
}

fn send(block: &RamBlock, to: &TcpStream) {
    for first in (0..block.pages()).step_by(BATCH) {
        let count = BATCH.min(block.pages() - first);
        let headers: [[u8; 8]; BATCH] = std::array::from_fn(|i| header(first + i));
        let mut pieces: Vec<Out<'_>> = Vec::with_capacity(2 * BATCH);
        for (i, header) in headers[..count].iter().enumerate() {
            pieces.extend([Out::from(&header[..]), block.page(first + i).out()]);
        }
        let mut rest = &mut pieces[..];
        while !rest.is_empty() {
            let mut sent = iov::write(to.as_fd(), rest).expect("loopback");
            let whole = rest.iter().take_while(|piece| {
                let fits = sent >= piece.len();
                sent -= if fits { piece.len() } else { 0 };
                fits
            });
            let whole = whole.count();
            rest = &mut rest[whole..];
            if let Some(first) = rest.first_mut() {
                *first = first.skip(sent);
            }
        }
    }
}

fn receive(block: &RamBlock, mut from: &TcpStream) {
    let mut headers = [[0; 8]; BATCH];
    let mut next = 0;
    while next < block.pages() {
        let count = BATCH.min(block.pages() - next);
        let mut rooms: Vec<In<'_>> = Vec::with_capacity(2 * BATCH);
        for (i, header) in headers[..count].iter_mut().enumerate() {
            rooms.extend([In::from(&mut header[..]), block.page(next + i).room()]);
        }
        let got = iov::read(from.as_fd(), &mut rooms).expect("loopback");
        assert!(got > 0, "the sender went away");
        let (whole, part) = (got / RECORD, got % RECORD);
        if part > 0 {
            // The rest of the record that came in part.
            let header = &mut headers[whole];
            from.read_exact(&mut header[part.min(8)..])
                .expect("loopback");
            let mut content = [0; PAGE_SIZE];
            let page = block.page(next + whole);
            page.read(&mut content);
            from.read_exact(&mut content[part.saturating_sub(8)..])
                .expect("loopback");
            page.write(&content);
        }
        let arrived = whole + usize::from(part > 0);
        for (i, found) in headers[..arrived].iter().enumerate() {
            assert!(*found == header(next + i), "page {} was not next", next + i);
        }
        next += arrived;
    }
}

/// The record word of a page in the block of the page before it.
fn header(page: usize) -> [u8; 8] {
    const PAGE: u64 = 0x08;
    const CONTINUE: u64 = 0x20;
    ((page * PAGE_SIZE) as u64 | PAGE | CONTINUE).to_be_bytes()
}

const RECORD: usize = 8 + PAGE_SIZE;
/// Pages per system call.
const BATCH: usize = 128;
