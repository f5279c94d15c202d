//! Connecting, non-blocking, within a time.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, TcpKeepalive, Type};

use super::address::Inet;
use super::{Error, Waited, wait};

/// Connects to a host, trying each of its addresses in turn; all of it takes at most `patience`.
/// The socket is non-blocking, sends at once and keeps itself alive.
///
/// # Errors
/// [`Error::Resolve`], [`Error::Connect`] with the last address's reason, [`Error::Interrupted`].
pub fn tcp(
    inet: &Inet,
    patience: Duration,
    interrupt: Option<BorrowedFd<'_>>,
) -> Result<OwnedFd, Error> {
    let end = Instant::now() + patience;
    let addresses = inet.resolve(false, patience, interrupt)?;
    let mut reason = io::Error::from_raw_os_error(libc::EADDRNOTAVAIL);
    for (tried, address) in addresses.iter().enumerate() {
        // An address that swallows packets must leave time for the ones after it.
        let untried = (addresses.len() - tried) as u32;
        let share = end.saturating_duration_since(Instant::now()) / untried;
        match tcp_address(*address, share, interrupt) {
            Ok(Some(socket)) => {
                tune(socket.as_fd());
                return Ok(socket);
            }
            Ok(None) => return Err(Error::Interrupted),
            Err(error) => reason = error,
        }
    }
    Err(Error::Connect {
        address: inet.to_string(),
        source: reason,
    })
}

/// Connects to a unix socket. A full backlog is waited for, at most `patience`.
///
/// # Errors
/// [`Error::EmptyPath`], [`Error::PathTooLong`], [`Error::Connect`], [`Error::Interrupted`].
pub fn unix(
    path: &Path,
    patience: Duration,
    interrupt: Option<BorrowedFd<'_>>,
) -> Result<OwnedFd, Error> {
    let address = unix_address(path)?;
    let failed = |source| Error::Connect {
        address: path.display().to_string(),
        source,
    };
    let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking().cloexec(), None)
        .map_err(Error::Create)?;
    let end = Instant::now() + patience;
    loop {
        match socket.connect(&address) {
            Ok(()) => return Ok(socket.into()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < end => {
                // No event tells that the backlog has room: look again.
                let pause = Duration::from_millis(20);
                match wait(socket.as_fd(), PollFlags::empty(), pause, interrupt).map_err(failed)? {
                    Waited::Interrupted => return Err(Error::Interrupted),
                    Waited::Ready => std::thread::sleep(pause),
                    Waited::TimedOut => {}
                }
            }
            Err(error) => return Err(failed(error)),
        }
    }
}

/// Makes a connected TCP socket send at once and notice a peer that vanished. A socket of another
/// kind is left as it is.
pub fn tune(socket: BorrowedFd<'_>) {
    let socket = SockRef::from(&socket);
    let keepalive = TcpKeepalive::new()
        .with_time(Duration::from_secs(30))
        .with_interval(Duration::from_secs(10))
        .with_retries(3);
    // Neither is needed for correctness.
    let _ = socket.set_tcp_nodelay(true);
    let _ = socket.set_tcp_keepalive(&keepalive);
}

/// The address of a path.
///
/// # Errors
/// [`Error::EmptyPath`], [`Error::PathTooLong`].
pub(super) fn unix_address(path: &Path) -> Result<SockAddr, Error> {
    if path.as_os_str().is_empty() {
        return Err(Error::EmptyPath);
    }
    SockAddr::unix(path).map_err(|_| Error::PathTooLong(path.display().to_string()))
}

/// `None`: interrupted.
fn tcp_address(
    address: SocketAddr,
    patience: Duration,
    interrupt: Option<BorrowedFd<'_>>,
) -> io::Result<Option<OwnedFd>> {
    let kind = Type::STREAM.nonblocking().cloexec();
    let socket = Socket::new(Domain::for_address(address), kind, Some(Protocol::TCP))?;
    match socket.connect(&address.into()) {
        Ok(()) => return Ok(Some(socket.into())),
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {}
        Err(error) => return Err(error),
    }
    match wait(socket.as_fd(), PollFlags::OUT, patience, interrupt)? {
        Waited::Interrupted => Ok(None),
        Waited::TimedOut => Err(io::Error::from_raw_os_error(libc::ETIMEDOUT)),
        Waited::Ready => match socket.take_error()? {
            None => Ok(Some(socket.into())),
            Some(error) => Err(error),
        },
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(5);

    #[test]
    fn every_address_of_a_name_is_tried() {
        // "localhost" may be ::1 first; only 127.0.0.1 listens.
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port().to_string();
        let inet = Inet {
            host: "localhost".to_owned(),
            port,
        };
        let socket = tcp(&inet, PATIENCE, None).unwrap();
        assert!(SockRef::from(&socket).tcp_nodelay().unwrap());
        assert!(SockRef::from(&socket).keepalive().unwrap());
        assert!(SockRef::from(&socket).nonblocking().unwrap());
    }

    #[test]
    fn a_refusal_is_told_in_qemus_words() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port().to_string();
        drop(listener);
        let inet = Inet {
            host: "127.0.0.1".to_owned(),
            port: port.clone(),
        };
        assert_eq!(
            tcp(&inet, PATIENCE, None).unwrap_err().to_string(),
            format!("Failed to connect to '127.0.0.1:{port}': Connection refused")
        );
    }

    #[test]
    fn a_listener_that_accepts_nobody_is_given_up() {
        // With the backlog full, Linux drops further handshakes.
        let full = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        full.bind(&"127.0.0.1:0".parse::<SocketAddr>().unwrap().into())
            .unwrap();
        full.listen(0).unwrap();
        let address = full.local_addr().unwrap().as_socket().unwrap();
        let _first = std::net::TcpStream::connect(address).unwrap();
        let (stop, raise) = rustix::pipe::pipe().unwrap();
        let inet = Inet {
            host: "127.0.0.1".to_owned(),
            port: address.port().to_string(),
        };
        let start = Instant::now();
        let error = tcp(&inet, Duration::from_millis(100), Some(stop.as_fd())).unwrap_err();
        assert!(
            error.to_string().ends_with("': Connection timed out"),
            "{error}"
        );
        assert!(start.elapsed() < Duration::from_secs(2));
        let interrupter = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            drop(raise);
        });
        let start = Instant::now();
        assert!(matches!(
            tcp(&inet, PATIENCE, Some(stop.as_fd())),
            Err(Error::Interrupted)
        ));
        assert!(start.elapsed() < Duration::from_millis(150));
        interrupter.join().unwrap();
    }

    #[test]
    fn unix_paths_fail_by_name() {
        let text = |path: &str| {
            unix(Path::new(path), PATIENCE, None)
                .unwrap_err()
                .to_string()
        };
        assert_eq!(
            text("/no/dir"),
            "Failed to connect to '/no/dir': No such file or directory"
        );
        assert_eq!(
            text("/tmp"),
            "Failed to connect to '/tmp': Connection refused"
        );
        assert_eq!(text(""), "invalid Unix socket address");
        let long = format!("/tmp/{}", "x".repeat(110));
        assert_eq!(
            text(&long),
            format!("UNIX socket path '{long}' is too long")
        );
    }
}
