//! Every scheme over real descriptors: there, back, cut, cancelled, full.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::Instant;

use super::*;

const PATIENCE: Duration = Duration::from_secs(10);

fn cancel() -> Arc<Cancel> {
    Arc::new(Cancel::new().unwrap())
}

fn none() -> BTreeMap<String, OwnedFd> {
    BTreeMap::new()
}

fn open(uri: &str, fds: &mut BTreeMap<String, OwnedFd>) -> Result<Box<dyn Channel>, Error> {
    prepare(&uri.parse::<Uri>().unwrap(), fds)?.connect(&cancel())
}

fn incoming(uri: &str) -> Result<Box<dyn Listener>, Error> {
    listen(&uri.parse::<Uri>().unwrap(), &mut none(), &cancel())
}

fn refusal<T>(answer: Result<T, Error>) -> String {
    answer.err().expect("should have been refused").to_string()
}

fn write_all(channel: &mut dyn Channel, mut bytes: &[u8]) -> Result<(), Fault> {
    while !bytes.is_empty() {
        let count = channel.write(&[Out::from(bytes)], PATIENCE)?;
        bytes = &bytes[count..];
    }
    Ok(())
}

fn read_all(channel: &mut dyn Channel) -> Result<Vec<u8>, Fault> {
    let mut all = Vec::new();
    loop {
        let mut room = [0; 65536];
        match channel.read(&mut [In::from(&mut room[..])], PATIENCE)? {
            0 => return Ok(all),
            count => all.extend_from_slice(&room[..count]),
        }
    }
}

/// What the source does after the last byte.
fn finish(channel: &mut dyn Channel) -> Result<(), Fault> {
    channel.settle()?;
    channel.commit()
}

fn stream(length: usize) -> Vec<u8> {
    (0..length).map(|i| (i * 7 + i / 251) as u8).collect()
}

/// Both ends of an incoming URI and the outgoing URI that reaches it.
fn pair(uri: &str) -> (Box<dyn Channel>, Box<dyn Channel>) {
    let mut listener = incoming(uri).unwrap();
    assert!(listener.can_repeat());
    let address = listener.address().unwrap();
    let mut out = open(&address, &mut none()).unwrap();
    let back = speak(&mut *out, &mut *listener);
    (out, back)
}

/// A client is taken for one when it has sent eight bytes.
fn speak(out: &mut dyn Channel, listener: &mut dyn Listener) -> Box<dyn Channel> {
    write_all(out, b"magic...").unwrap();
    let mut back = listener.accept().unwrap();
    let mut word = [0; 8];
    assert_eq!(
        back.read(&mut [In::from(&mut word[..])], PATIENCE).unwrap(),
        8
    );
    back
}

#[test]
fn silent_clients_keep_nobody_out() {
    let mut listener = incoming("tcp:127.0.0.1:0").unwrap();
    let address = listener.address().unwrap();
    let address = address.strip_prefix("tcp:").unwrap();
    let mut clients: Vec<TcpStream> = (0..4)
        .map(|_| TcpStream::connect(address).unwrap())
        .collect();
    // Half a word is none.
    clients[3].write_all(b"QEVM").unwrap();
    clients[1].write_all(b"QEVM\0\0\0\x03").unwrap();
    let start = Instant::now();
    let mut back = listener.accept().unwrap();
    assert!(start.elapsed() < Duration::from_secs(2));
    let mut word = [0; 9];
    let count = back.read(&mut [In::from(&mut word[..])], PATIENCE).unwrap();
    assert_eq!(&word[..count], b"QEVM\0\0\0\x03");
    // The others are neither forgotten nor waited for for ever.
    clients[2].write_all(b"GET / HTTP/1.1").unwrap();
    listener.accept().unwrap();
    let accepted = thread::spawn(move || listener.accept().is_ok());
    for index in [0, 3] {
        let end = clients[index].read(&mut word);
        // What it had sent and nobody read makes the end a reset.
        assert!(matches!(end, Ok(0) | Err(_)), "client {index} is dropped");
    }
    assert!(start.elapsed() < Duration::from_secs(8));
    TcpStream::connect(address)
        .unwrap()
        .write_all(b"z")
        .unwrap();
    assert!(accepted.join().unwrap());
}

fn there_and_back(uri: &str) {
    let (mut out, mut back) = pair(uri);
    assert!(out.is_duplex() && back.is_duplex());
    let sent = stream(3 << 20);
    let expected = sent.clone();
    let sender = thread::spawn(move || {
        write_all(&mut *out, &sent).unwrap();
        let mut answer = [0; 2];
        assert_eq!(
            out.read(&mut [In::from(&mut answer[..])], PATIENCE)
                .unwrap(),
            2
        );
        assert_eq!(&answer, b"ok");
        assert!(out.drain(PATIENCE));
        finish(&mut *out).unwrap();
    });
    let mut got = Vec::new();
    let mut room = vec![0; 1 << 16];
    while got.len() < expected.len() {
        let (left, right) = room.split_at_mut(1000);
        let mut rooms = [In::from(left), In::from(right)];
        let count = back.read(&mut rooms, PATIENCE).unwrap();
        assert_ne!(count, 0);
        got.extend_from_slice(&room[..count]);
    }
    assert!(got == expected);
    write_all(&mut *back, b"ok").unwrap();
    sender.join().unwrap();
    assert_eq!(
        back.read(&mut [In::from(&mut room[..])], PATIENCE).unwrap(),
        0
    );
}

#[test]
fn tcp_carries_bytes_both_ways() {
    there_and_back("tcp:127.0.0.1:0");
}

#[test]
fn unix_carries_bytes_both_ways_and_leaves_no_path() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    there_and_back(&format!("unix:{}", path.display()));
    assert!(!path.exists());
}

#[test]
fn a_listener_takes_a_second_source() {
    let mut listener = incoming("tcp:127.0.0.1:0").unwrap();
    let address = listener.address().unwrap();
    for _ in 0..2 {
        let mut out = open(&address, &mut none()).unwrap();
        let mut back = speak(&mut *out, &mut *listener);
        write_all(&mut *out, b"x").unwrap();
        out.abandon();
        assert_eq!(read_all(&mut *back).unwrap(), b"x");
    }
}

#[test]
fn a_cut_is_an_error_with_its_cause() {
    let (mut out, back) = pair("tcp:127.0.0.1:0");
    drop(back);
    let error = loop {
        match out.write(&[Out::from(&[0; 4096][..])], PATIENCE) {
            Ok(_) => {}
            Err(error) => break error.to_string(),
        }
    };
    let reasons = ["Connection reset by peer", "Broken pipe"];
    let text = error.strip_prefix("Unable to write to socket: ").unwrap();
    assert!(reasons.contains(&text), "{error}");
}

#[test]
fn waits_end_by_time() {
    let (mut out, mut back) = pair("tcp:127.0.0.1:0");
    let mut room = [0; 16];
    let zero = Duration::ZERO;
    assert!(matches!(
        back.read(&mut [In::from(&mut room[..])], zero),
        Err(Fault::TimedOut)
    ));
    let start = Instant::now();
    let brief = Duration::from_millis(50);
    assert!(matches!(
        back.read(&mut [In::from(&mut room[..])], brief),
        Err(Fault::TimedOut)
    ));
    assert!(start.elapsed() >= brief);
    let block = vec![0; 1 << 20];
    let ended = loop {
        match out.write(&[Out::from(&block[..])], brief) {
            Ok(_) => {}
            Err(fault) => break fault,
        }
    };
    assert!(matches!(ended, Fault::TimedOut));
    assert!(!out.drain(brief), "the peer has not read");
}

#[test]
fn cancelling_ends_every_wait_soon() {
    let stop = cancel();
    let mut listener = listen(
        &"tcp:127.0.0.1:0".parse::<Uri>().unwrap(),
        &mut none(),
        &stop,
    )
    .unwrap();
    let address = listener.address().unwrap().parse::<Uri>().unwrap();
    let connect = |uri: &Uri| prepare(uri, &mut none()).unwrap().connect(&stop).unwrap();
    let mut reader = connect(&address);
    let _silent = speak(&mut *reader, &mut *listener);
    let mut deaf = connect(&address);
    let mut writer = speak(&mut *deaf, &mut *listener);
    let mut command = connect(&"exec:sleep 60".parse::<Uri>().unwrap());
    let waits: Vec<thread::JoinHandle<Fault>> = vec![
        thread::spawn(move || {
            reader
                .read(&mut [In::from(&mut [0; 9][..])], PATIENCE)
                .unwrap_err()
        }),
        thread::spawn(move || write_all(&mut *writer, &vec![0; 64 << 20]).unwrap_err()),
        thread::spawn(move || listener.accept().err().unwrap()),
        thread::spawn(move || finish(&mut *command).unwrap_err()),
    ];
    thread::sleep(Duration::from_millis(100));
    let start = Instant::now();
    stop.cancel();
    for wait in waits {
        assert!(matches!(wait.join().unwrap(), Fault::Cancelled));
    }
    assert!(
        start.elapsed() < Duration::from_millis(100),
        "{:?}",
        start.elapsed()
    );
    assert!(matches!(
        prepare(&address, &mut none()).unwrap().connect(&stop),
        Err(Error::Cancelled)
    ));
}

#[test]
fn sockets_fail_in_qemus_words() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("tcp:{}", taken.local_addr().unwrap());
    assert_eq!(
        refusal(incoming(&uri)),
        "Failed to find an available port: Address already in use"
    );
    drop(taken);
    let address = uri.strip_prefix("tcp:").unwrap();
    assert_eq!(
        refusal(open(&uri, &mut none())),
        format!("Failed to connect to '{address}': Connection refused")
    );
    assert_eq!(
        refusal(open("unix:/no/dir", &mut none())),
        "Failed to connect to '/no/dir': No such file or directory"
    );
    assert_eq!(
        refusal(incoming("unix:/no/dir/x")),
        "Failed to bind socket to /no/dir/x: No such file or directory"
    );
}

#[test]
fn given_descriptors_are_taken_out_and_checked() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (read_end, write_end) = std::io::pipe().unwrap();
    let listening = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut fds = none();
    fds.insert("sock".into(), ours.into());
    fds.insert("in".into(), read_end.into());
    fds.insert("listening".into(), listening.into());
    fds.insert("dir".into(), fs::File::open("/").unwrap().into());
    fds.insert(
        "event".into(),
        rustix::event::eventfd(0, EventfdFlags::empty()).unwrap(),
    );
    fds.insert(
        "udp".into(),
        std::net::UdpSocket::bind("127.0.0.1:0").unwrap().into(),
    );
    assert_eq!(
        refusal(open("fd:mig", &mut fds)),
        "File descriptor named 'mig' has not been found"
    );
    for (name, why) in [
        ("in", "is open for reading only"),
        ("listening", "is a listening socket, not a connected one"),
        ("dir", "is not a socket, a pipe or a regular file"),
        ("event", "is not a socket, a pipe or a regular file"),
        ("udp", "is not a stream socket"),
    ] {
        assert_eq!(
            refusal(open(&format!("fd:{name}"), &mut fds)),
            format!("fd:{name}: {why}")
        );
        assert!(!fds.contains_key(name));
    }
    drop(write_end);
    let mut channel = open("fd:sock", &mut fds).unwrap();
    assert!(fds.is_empty() && channel.is_duplex());
    write_all(&mut *channel, b"hello").unwrap();
    let mut got = [0; 5];
    (&theirs).read_exact(&mut got).unwrap();
    assert_eq!(&got, b"hello");
    // Write-only incoming.
    let (_read_end, write_end) = std::io::pipe().unwrap();
    fds.insert("out".into(), write_end.into());
    let uri = "fd:out".parse::<Uri>().unwrap();
    assert_eq!(
        refusal(listen(&uri, &mut fds, &cancel())),
        "fd:out: is open for writing only"
    );
}

#[test]
fn a_pipe_goes_one_way_and_brings_one_stream() {
    let (read_end, write_end) = std::io::pipe().unwrap();
    let mut fds = none();
    fds.insert("out".into(), write_end.into());
    fds.insert("in".into(), read_end.into());
    let mut listener = listen(&"fd:in".parse::<Uri>().unwrap(), &mut fds, &cancel()).unwrap();
    assert!(!listener.can_repeat());
    assert_eq!(listener.address(), None);
    let mut out = open("fd:out", &mut fds).unwrap();
    assert!(!out.is_duplex());
    let sent = stream(1 << 20);
    let expected = sent.clone();
    let sender = thread::spawn(move || {
        write_all(&mut *out, &sent).unwrap();
        finish(&mut *out).unwrap();
    });
    let mut back = listener.accept().unwrap();
    assert!(read_all(&mut *back).unwrap() == expected);
    sender.join().unwrap();
    assert!(matches!(listener.accept(), Err(Fault::Failed(_))));
}

#[test]
fn a_command_takes_the_stream_and_its_status_counts() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("saved");
    let sent = stream(1 << 20);
    let mut channel = open(&format!("exec:cat > {}", path.display()), &mut none()).unwrap();
    write_all(&mut *channel, &sent).unwrap();
    finish(&mut *channel).unwrap();
    assert!(fs::read(&path).unwrap() == sent);

    let mut channel = open("exec:cat > /dev/null; exit 7", &mut none()).unwrap();
    write_all(&mut *channel, &sent).unwrap();
    assert_eq!(
        finish(&mut *channel).unwrap_err().to_string(),
        "command exited with status 7"
    );

    let mut channel = open("exec:cat > /dev/null; kill -9 $$", &mut none()).unwrap();
    write_all(&mut *channel, &sent).unwrap();
    assert_eq!(
        finish(&mut *channel).unwrap_err().to_string(),
        "command killed by signal 9"
    );

    let mut channel = open("exec:exit 3", &mut none()).unwrap();
    assert_eq!(
        write_all(&mut *channel, &sent).unwrap_err().to_string(),
        "Unable to write to command: Broken pipe (command exited with status 3)"
    );
}

#[test]
fn a_command_brings_the_stream() {
    let mut listener = incoming("exec:head -c 300000 /dev/zero").unwrap();
    let mut channel = listener.accept().unwrap();
    assert!(read_all(&mut *channel).unwrap() == vec![0; 300_000]);
    let mut channel = incoming("exec:printf abc; exit 4")
        .unwrap()
        .accept()
        .unwrap();
    assert_eq!(
        read_all(&mut *channel).unwrap_err().to_string(),
        "Unable to read from command: command exited with status 4"
    );
}

#[test]
fn an_abandoned_command_is_killed_with_its_children() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pids");
    let command = format!("exec:sleep 600 & echo $! $$ > {}; wait", path.display());
    let mut channel = open(&command, &mut none()).unwrap();
    let pids = loop {
        match fs::read_to_string(&path) {
            Ok(pids) if pids.ends_with('\n') => break pids,
            _ => thread::sleep(Duration::from_millis(5)),
        }
    };
    channel.abandon();
    for pid in pids.split_whitespace() {
        let start = Instant::now();
        while is_alive(pid) {
            assert!(start.elapsed() < PATIENCE, "{pid} is still there");
            thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Whether the process runs (a zombie waits for init only).
fn is_alive(pid: &str) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
        !stat
            .rsplit(')')
            .next()
            .unwrap_or("")
            .trim_start()
            .starts_with('Z')
    })
}

#[test]
fn a_command_inherits_nothing_of_ours() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("fds");
    let _held = TcpListener::bind("127.0.0.1:0").unwrap();
    let (_out, _back) = pair("tcp:127.0.0.1:0");
    let list = format!(
        "exec:ls -l /proc/$$/fd > {}; cat > /dev/null",
        path.display()
    );
    let mut channel = open(&list, &mut none()).unwrap();
    finish(&mut *channel).unwrap();
    let listing = fs::read_to_string(&path).unwrap();
    assert!(
        !listing.contains("socket:") && !listing.contains("eventfd"),
        "{listing}"
    );
}

fn leftovers(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_file_appears_whole_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vm");
    let uri = format!("file:{}", path.display());
    let sent = stream(1 << 20);
    let mut channel = open(&uri, &mut none()).unwrap();
    write_all(&mut *channel, &sent).unwrap();
    assert!(!path.exists());
    finish(&mut *channel).unwrap();
    drop(channel);
    assert!(fs::read(&path).unwrap() == sent);
    assert_eq!(
        fs::metadata(&path).unwrap().permissions().mode() & 0o777,
        0o600
    );

    // A failed second attempt leaves the first one's file.
    for abandons in [true, false] {
        let mut channel = open(&uri, &mut none()).unwrap();
        write_all(&mut *channel, b"half").unwrap();
        if abandons {
            channel.abandon();
        }
        drop(channel);
        assert!(fs::read(&path).unwrap() == sent);
        assert_eq!(leftovers(dir.path()), ["vm"]);
    }
    // Prepared and never connected.
    drop(prepare(&uri.parse::<Uri>().unwrap(), &mut none()).unwrap());
    assert_eq!(leftovers(dir.path()), ["vm"]);

    let mut back = incoming(&uri).unwrap().accept().unwrap();
    assert!(read_all(&mut *back).unwrap() == sent);
}

#[test]
fn a_file_with_an_offset_is_written_in_place_and_cut_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vm");
    let uri = format!("file:{},offset=8", path.display());

    let mut channel = open(&uri, &mut none()).unwrap();
    write_all(&mut *channel, b"half").unwrap();
    channel.abandon();
    assert!(!path.exists(), "it was not there before");

    fs::write(&path, b"headerrr and an old stream").unwrap();
    let mut channel = open(&uri, &mut none()).unwrap();
    write_all(&mut *channel, b"stream").unwrap();
    finish(&mut *channel).unwrap();
    drop(channel);
    assert_eq!(fs::read(&path).unwrap(), b"headerrrstream");

    let mut back = incoming(&uri).unwrap().accept().unwrap();
    assert_eq!(read_all(&mut *back).unwrap(), b"stream");

    let mut channel = open(&uri, &mut none()).unwrap();
    write_all(&mut *channel, b"half").unwrap();
    drop(channel);
    assert_eq!(fs::read(&path).unwrap(), b"headerrr");

    fs::write(&path, b"abc").unwrap();
    drop(open(&uri, &mut none()).unwrap());
    assert_eq!(fs::read(&path).unwrap(), b"abc");
    assert_eq!(
        refusal(incoming(&uri)),
        format!(
            "'{}': offset 8 is beyond its end, it has 3 bytes",
            path.display()
        )
    );
}

#[test]
fn files_fail_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let link = dir.path().join("link");
    std::os::unix::fs::symlink("/etc/passwd", &link).unwrap();
    let out = |uri: &str| refusal(open(uri, &mut none()));
    assert_eq!(
        out("file:/no/dir/x"),
        "Could not create '/no/dir/x': No such file or directory"
    );
    assert_eq!(
        out("file:"),
        "Could not create '': No such file or directory"
    );
    assert_eq!(out("file:/tmp"), "Could not create '/tmp': Is a directory");
    assert_eq!(
        out(&format!("file:{}", link.display())),
        format!(
            "'{}': is a symbolic link; name the file itself",
            link.display()
        )
    );
    assert!(out("file:/proc/self/mem").starts_with("Could not create '/proc/self/mem': "));
    assert_eq!(
        out("file:/proc/self/mem,offset=4096"),
        "'/proc/self/mem': is not a file to save to"
    );
    assert_eq!(
        refusal(incoming("file:/no/dir")),
        "Could not open '/no/dir': No such file or directory"
    );
    assert_eq!(
        refusal(incoming("file:/tmp")),
        "Could not open '/tmp': Is a directory"
    );
}

#[test]
fn a_full_device_is_named() {
    let mut channel = open("file:/dev/full", &mut none()).unwrap();
    assert_eq!(
        write_all(&mut *channel, b"x").unwrap_err().to_string(),
        "Unable to write to file: No space left on device"
    );
    let mut channel = open("exec:cat > /dev/full 2> /dev/null", &mut none()).unwrap();
    let error = write_all(&mut *channel, &vec![0; 1 << 20])
        .and_then(|()| finish(&mut *channel))
        .unwrap_err()
        .to_string();
    assert!(error.ends_with("command exited with status 1)"), "{error}");
}

#[test]
fn a_fifo_waits_for_its_writer() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("fifo");
    let status = std::process::Command::new("mkfifo")
        .arg(&path)
        .status()
        .unwrap();
    assert!(status.success());
    let uri = format!("file:{}", path.display());
    let mut back = incoming(&uri).unwrap().accept().unwrap();
    let brief = Duration::from_millis(20);
    let mut room = [0; 4];
    assert!(matches!(
        back.read(&mut [In::from(&mut room[..])], brief),
        Err(Fault::TimedOut)
    ));
    let writer = thread::spawn(move || {
        let mut channel = open(&uri, &mut none()).unwrap();
        write_all(&mut *channel, b"abc").unwrap();
        finish(&mut *channel).unwrap();
    });
    assert_eq!(read_all(&mut *back).unwrap(), b"abc");
    writer.join().unwrap();
}

#[test]
fn nothing_is_left_open() {
    // Alone in a process of its own: neighbours open and close descriptors all the time.
    if std::env::var_os("HMPSH_TEST_LEAK").is_none() {
        let name = "migration::channel::tests::nothing_is_left_open";
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name, "--test-threads=1"])
            .env("HMPSH_TEST_LEAK", "1")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success() && said.contains("1 passed"),
            "{said}"
        );
        return;
    }
    let count = || fs::read_dir("/proc/self/fd").unwrap().count();
    let round = || {
        there_and_back("tcp:127.0.0.1:0");
        let dir = tempfile::tempdir().unwrap();
        let file = format!("file:{}", dir.path().join("vm").display());
        drop(open(&file, &mut none()).unwrap());
        let mut command = open("exec:cat > /dev/null", &mut none()).unwrap();
        finish(&mut *command).unwrap();
        drop(open("exec:sleep 600", &mut none()).unwrap());
        refusal(open("tcp:localhost:1", &mut none()));
        refusal(incoming("unix:/no/dir/x"));
    };
    round();
    let before = count();
    for _ in 0..20 {
        round();
    }
    assert_eq!(count(), before);
}

#[test]
fn a_raw_tcp_reader_gets_what_was_written() {
    // What `nc -l > file` at the other side sees.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("tcp:{}", listener.local_addr().unwrap());
    let reader = thread::spawn(move || {
        let (mut client, _): (TcpStream, _) = listener.accept().unwrap();
        let mut all = Vec::new();
        client.read_to_end(&mut all).unwrap();
        client.write_all(b"").unwrap();
        all
    });
    let mut channel = open(&uri, &mut none()).unwrap();
    let pieces = [Out::from(&b"head"[..]), Out::from(&b"page"[..])];
    assert_eq!(channel.write(&pieces, PATIENCE).unwrap(), 8);
    assert!(channel.drain(PATIENCE));
    drop(channel);
    assert_eq!(reader.join().unwrap(), b"headpage");
    assert!(cancel().event().as_fd().try_clone_to_owned().is_ok());
}
