//! Every device over real descriptors, with a registry turned by hand.

use std::fs;
use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Mutex, mpsc};
use std::time::{Duration, Instant};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::output::BOUND;
use super::*;

/// A registry, a device on it, and what its receiver was told.
struct Bench {
    poll: Poll,
    device: Arc<dyn Chardev>,
    told: mpsc::Receiver<Incoming>,
}

fn config(id: &str, kind: ChardevKind) -> ChardevConfig {
    ChardevConfig {
        id: id.to_owned(),
        kind,
    }
}

fn unix(path: &Path, server: bool) -> ChardevKind {
    ChardevKind::Unix {
        path: path.to_owned(),
        server,
        wait: false,
    }
}

fn tcp(port: &str, server: bool) -> ChardevKind {
    ChardevKind::Tcp {
        host: "127.0.0.1".into(),
        port: port.into(),
        server,
        wait: false,
    }
}

impl Bench {
    fn new(kind: ChardevKind) -> Self {
        let poll = Poll::new().unwrap();
        let device = open(&config("x", kind), &poll, &|| false).unwrap();
        let (tell, told) = mpsc::channel();
        device.receive(Box::new(move |incoming| tell.send(incoming).unwrap()));
        Self { poll, device, told }
    }

    fn next(&self) -> Incoming {
        let start = Instant::now();
        loop {
            match self.told.try_recv() {
                Ok(incoming) => return incoming,
                Err(_) if start.elapsed() > Duration::from_secs(10) => panic!("nothing came"),
                Err(_) => self.poll.turn(Some(Duration::from_millis(10))).unwrap(),
            }
        }
    }

    fn opened(&self) {
        assert!(matches!(self.next(), Incoming::Opened));
    }

    fn closed(&self) {
        assert!(matches!(self.next(), Incoming::Closed));
    }

    fn bytes(&self, expected: &[u8]) {
        let mut all = Vec::new();
        while all.len() < expected.len() {
            match self.next() {
                Incoming::Bytes(bytes, _) => all.extend(bytes),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(all, expected);
    }

    fn silence(&self) {
        for _ in 0..4 {
            self.poll.turn(Some(Duration::from_millis(10))).unwrap();
        }
        assert!(self.told.try_recv().is_err());
    }
}

fn expect(client: &mut impl Read, expected: &[u8]) {
    let mut got = vec![0; expected.len()];
    client.read_exact(&mut got).unwrap();
    assert_eq!(got, expected);
}

#[test]
fn a_unix_server_serves_one_client_after_the_other() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m");
    let bench = Bench::new(unix(&path, true));
    assert_eq!(
        bench.device.description(),
        format!("disconnected:unix:{},server=on", path.display())
    );
    bench.device.write(b"lost");
    let mut first = UnixStream::connect(&path).unwrap();
    let mut second = UnixStream::connect(&path).unwrap();
    bench.opened();
    assert_eq!(
        bench.device.description(),
        format!("unix:{},server=on", path.display())
    );
    first.write_all(b"info status\n").unwrap();
    second.write_all(b"early").unwrap();
    bench.bytes(b"info status\n");
    bench.device.write(b"running");
    expect(&mut first, b"running");
    bench.silence();
    drop(first);
    bench.closed();
    bench.opened();
    bench.bytes(b"early");
    bench.device.write(b"hello");
    expect(&mut second, b"hello");
    drop(bench);
    assert!(!path.exists());
    assert_eq!(second.read(&mut [0; 1]).unwrap(), 0);
}

#[test]
fn descriptors_come_with_their_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m");
    let bench = Bench::new(unix(&path, true));
    let client = UnixStream::connect(&path).unwrap();
    let (reader, mut writer) = std::io::pipe().unwrap();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let rights = [reader.as_fd()];
    assert!(control.push(SendAncillaryMessage::ScmRights(&rights)));
    let line = [IoSlice::new(b"getfd mig\n")];
    sendmsg(&client, &line, &mut control, SendFlags::empty()).unwrap();
    bench.opened();
    let Incoming::Bytes(bytes, mut descriptors) = bench.next() else {
        panic!()
    };
    assert_eq!(
        (bytes.as_slice(), descriptors.len()),
        (&b"getfd mig\n"[..], 1)
    );
    writer.write_all(b"abc").unwrap();
    let mut given = fs::File::from(descriptors.remove(0));
    expect(&mut given, b"abc");
    let flags = rustix::io::fcntl_getfd(&given).unwrap();
    assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
}

#[test]
fn a_suspended_reader_leaves_input_where_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m");
    let bench = Bench::new(unix(&path, true));
    let mut client = UnixStream::connect(&path).unwrap();
    bench.opened();
    bench.device.set_readable(false);
    client.write_all(b"typed ahead").unwrap();
    bench.silence();
    bench.device.set_readable(true);
    bench.bytes(b"typed ahead");
}

#[test]
fn output_for_a_client_that_does_not_read_is_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m");
    let bench = Bench::new(unix(&path, true));
    let mut client = UnixStream::connect(&path).unwrap();
    bench.opened();
    for _ in 0..BOUND / 65536 * 2 {
        bench.device.write(&[b'x'; 65536]);
    }
    client
        .set_read_timeout(Some(Duration::from_millis(500)))
        .unwrap();
    let mut total = 0;
    let mut room = vec![0; 1 << 16];
    while let Ok(count) = client.read(&mut room) {
        total += count;
        bench.poll.turn(Some(Duration::ZERO)).unwrap();
        bench.poll.turn(Some(Duration::ZERO)).unwrap();
    }
    assert!((BOUND..BOUND + (2 << 20)).contains(&total), "{total}");
}

#[test]
fn a_tcp_server_names_its_port_and_its_client() {
    let bench = Bench::new(tcp("0", true));
    let waiting = bench.device.description();
    let address = waiting
        .strip_prefix("disconnected:tcp:")
        .unwrap()
        .strip_suffix(",server=on")
        .unwrap();
    let mut client = TcpStream::connect(address).unwrap();
    bench.opened();
    let own = client.local_addr().unwrap();
    assert_eq!(
        bench.device.description(),
        format!("tcp:{address},server=on <-> {own}")
    );
    client.write_all(b"x").unwrap();
    bench.bytes(b"x");
    drop(client);
    bench.closed();
    assert_eq!(bench.device.description(), waiting);
}

#[test]
fn a_client_is_connected_at_once_and_opened_when_somebody_cares() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    let bench = Bench::new(tcp(&port, false));
    let (mut peer, theirs) = listener.accept().unwrap();
    bench.opened();
    assert_eq!(
        bench.device.description(),
        format!("tcp:{theirs} <-> 127.0.0.1:{port}")
    );
    bench.device.write(b"hello");
    expect(&mut peer, b"hello");
    drop(peer);
    bench.closed();
    assert_eq!(
        bench.device.description(),
        format!("disconnected:tcp:127.0.0.1:{port}")
    );
    bench.silence();
}

#[test]
fn a_server_that_waits_has_its_client_when_it_is_open() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m");
    let kind = ChardevKind::Unix {
        path: path.clone(),
        server: true,
        wait: true,
    };
    let poll = Poll::new().unwrap();
    let refused = open(&config("x", kind.clone()), &poll, &|| true)
        .err()
        .unwrap();
    assert!(matches!(refused, Error::Interrupted));
    assert!(!path.exists());
    let there = path.clone();
    let client = std::thread::spawn(move || {
        loop {
            if let Ok(client) = UnixStream::connect(&there) {
                return client;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    });
    let bench = Bench::new(kind);
    let mut client = client.join().unwrap();
    assert_eq!(
        bench.device.description(),
        format!("unix:{},server=on", path.display())
    );
    bench.opened();
    bench.silence();
    client.write_all(b"x").unwrap();
    bench.bytes(b"x");
}

#[test]
fn what_can_not_be_opened_is_named() {
    let poll = Poll::new().unwrap();
    let refused = |kind| {
        open(&config("x", kind), &poll, &|| false)
            .err()
            .unwrap()
            .to_string()
    };
    assert_eq!(
        refused(unix(Path::new("/no/dir/x"), true)),
        "Failed to bind socket to /no/dir/x: No such file or directory"
    );
    assert_eq!(
        refused(unix(Path::new("/no/dir/x"), false)),
        "Failed to connect to '/no/dir/x': No such file or directory"
    );
    assert_eq!(
        refused(ChardevKind::File("/no/dir".into())),
        "Could not open '/no/dir': No such file or directory"
    );
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("live");
    let _live = UnixListener::bind(&path).unwrap();
    assert_eq!(
        refused(unix(&path, true)),
        format!(
            "Failed to bind socket to {}: Address already in use",
            path.display()
        )
    );
}

#[test]
fn a_file_takes_output_and_is_emptied_first() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    fs::write(&path, "old").unwrap();
    let bench = Bench::new(ChardevKind::File(path.clone()));
    bench.opened();
    bench.device.write(b"new");
    assert_eq!(fs::read(&path).unwrap(), b"new");
    assert_eq!(bench.device.description(), "file");
}

#[test]
fn null_is_there_and_says_nothing() {
    let bench = Bench::new(ChardevKind::Null);
    bench.opened();
    bench.device.write(b"x");
    bench.silence();
    assert_eq!(bench.device.description(), "null");
    assert!(bench.device.ringbuf().is_none());
}

#[test]
fn a_pty_opens_and_closes_with_its_other_side() {
    let bench = Bench::new(ChardevKind::Pty);
    let description = bench.device.description();
    let name = description.strip_prefix("pty:").unwrap().to_owned();
    for round in [&b"one"[..], b"two"] {
        bench.silence();
        let mut other = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(&name)
            .unwrap();
        bench.opened();
        other.write_all(round).unwrap();
        bench.bytes(round);
        bench.device.write(b"(qemu) ");
        expect(&mut other, b"(qemu) ");
        drop(other);
        bench.closed();
    }
}

#[test]
fn stdio_reads_a_pipe_to_its_end_and_writes_on() {
    // Stdin and stdout are the process's, so it is another process.
    if std::env::var_os("HMPSH_TEST_STDIO").is_some() {
        let bench = Bench::new(ChardevKind::Stdio);
        assert_eq!(bench.device.description(), "stdio");
        bench.opened();
        bench.bytes(b"info status\n");
        bench.closed();
        bench.device.write(b"<still here>");
        return;
    }
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "chardev::tests::stdio_reads_a_pipe_to_its_end_and_writes_on",
        ])
        .args(["--test-threads=1", "--nocapture"])
        .env("HMPSH_TEST_STDIO", "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(b"info status\n")
        .unwrap();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && said.contains("<still here>"),
        "{said}"
    );
}

#[test]
fn a_receiver_may_use_the_device_it_hears() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m");
    let poll = Poll::new().unwrap();
    let device = open(&config("x", unix(&path, true)), &poll, &|| false).unwrap();
    let echo = Arc::new(Mutex::new(Arc::downgrade(&device)));
    device.receive(Box::new(move |incoming| {
        let device = echo.lock().unwrap().upgrade().unwrap();
        match incoming {
            Incoming::Opened => device.write(b"banner"),
            Incoming::Bytes(bytes, _) => {
                device.set_readable(true);
                device.write(&bytes);
            }
            Incoming::Closed => assert!(device.description().starts_with("disconnected:")),
        }
    }));
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(b"echo").unwrap();
    for _ in 0..6 {
        poll.turn(Some(Duration::from_millis(10))).unwrap();
    }
    expect(&mut client, b"bannerecho");
    drop(client);
    poll.turn(Some(Duration::from_millis(10))).unwrap();
    assert!(device.description().starts_with("disconnected:"));
}
