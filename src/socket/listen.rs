//! Listening: TCP with QEMU's rules for ports, unix sockets that are private and leave no trace.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{Mode, fchmod};
use rustix::net::SocketFlags;
use socket2::{Domain, Protocol, Socket, Type};

use super::Error;
use super::address::{Inet, describe};
use super::connect::{tune, unix_address};

/// A bound, listening, non-blocking socket. A unix socket's path goes with it.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    local: Local,
}

#[derive(Debug)]
enum Local {
    Tcp(SocketAddr),
    Unix {
        shown: PathBuf,
        path: PathBuf,
        identity: Option<(u64, u64)>,
    },
}

/// How many clients may wait to be accepted.
const BACKLOG: i32 = 16;

/// How long a host's name may take to resolve.
const RESOLVING: Duration = Duration::from_secs(10);

impl Listener {
    /// Listens on the first of the host's addresses that can be bound. Port 0 takes a free port.
    ///
    /// # Errors
    /// [`Error::Resolve`], [`Error::PortInUse`], [`Error::Bind`], [`Error::Listen`].
    pub fn tcp(inet: &Inet) -> Result<Self, Error> {
        let mut in_use = None;
        for address in inet.resolve(true, RESOLVING, None)? {
            let kind = Type::STREAM.nonblocking().cloexec();
            let socket = Socket::new(Domain::for_address(address), kind, Some(Protocol::TCP))
                .map_err(Error::Create)?;
            socket.set_reuse_address(true).map_err(Error::Create)?;
            if address.is_ipv6() {
                socket.set_only_v6(false).map_err(Error::Create)?;
            }
            // With SO_REUSEADDR a taken port may show in listen() only.
            match socket
                .bind(&address.into())
                .and_then(|()| socket.listen(BACKLOG))
            {
                Ok(()) => {
                    let local = socket.local_addr().map_err(Error::Listen)?;
                    let local = local.as_socket().unwrap_or(address);
                    return Ok(Self {
                        socket,
                        local: Local::Tcp(local),
                    });
                }
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => in_use = Some(error),
                Err(error) => return Err(Error::Bind(error)),
            }
        }
        let error = in_use.unwrap_or_else(|| io::Error::from_raw_os_error(libc::EADDRNOTAVAIL));
        Err(Error::PortInUse(error))
    }

    /// Listens on a path that only this user can connect to. A socket nobody listens on any more
    /// is replaced; anything else in the way is left alone.
    ///
    /// # Errors
    /// [`Error::EmptyPath`], [`Error::PathTooLong`], [`Error::BindPath`], [`Error::Listen`].
    pub fn unix(path: &Path) -> Result<Self, Error> {
        let address = unix_address(path)?;
        let failed = |source| Error::BindPath {
            path: path.display().to_string(),
            source,
        };
        if is_stale(path) {
            fs::remove_file(path).map_err(failed)?;
        }
        let kind = Type::STREAM.nonblocking().cloexec();
        let socket = Socket::new(Domain::UNIX, kind, None).map_err(Error::Create)?;
        // Linux makes the path with the socket's own mode: no window in which others could
        // connect, and no process-wide umask to change.
        fchmod(&socket, Mode::RWXU).map_err(|error| failed(error.into()))?;
        socket.bind(&address).map_err(failed)?;
        let local = Local::Unix {
            shown: path.to_owned(),
            // Removed by this name, wherever the process stands then.
            path: std::path::absolute(path).map_err(failed)?,
            identity: identity(path),
        };
        let listener = Self { socket, local };
        listener.socket.listen(BACKLOG).map_err(Error::Listen)?;
        Ok(listener)
    }

    /// The next client, as a non-blocking socket.
    ///
    /// # Errors
    /// `WouldBlock` when nobody waits, and what `accept(2)` says.
    pub fn accept(&self) -> io::Result<OwnedFd> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let client = rustix::net::accept_with(&self.socket, flags)?;
        if matches!(self.local, Local::Tcp(_)) {
            tune(client.as_fd());
        }
        Ok(client)
    }

    /// Where it listens: `tcp:127.0.0.1:4444`, `unix:/path`.
    pub fn address(&self) -> String {
        match &self.local {
            Local::Tcp(address) => describe(*address),
            Local::Unix { shown, .. } => format!("unix:{}", shown.display()),
        }
    }

    /// Whether other machines can connect.
    pub fn is_exposed(&self) -> bool {
        matches!(self.local, Local::Tcp(address) if !address.ip().is_loopback())
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.unlink();
    }
}

impl Listener {
    /// Removes the path of a unix socket, unless it is another's by now.
    pub fn unlink(&self) {
        if let Local::Unix {
            path,
            identity: Some(ours),
            ..
        } = &self.local
            && identity(path) == Some(*ours)
        {
            // Gone already is as good.
            let _ = fs::remove_file(path);
        }
    }
}

/// Whether the path is a socket nobody listens on. A socket of another type asks the kernel
/// without becoming a client: `EPROTOTYPE` if somebody is there, `ECONNREFUSED` if not.
fn is_stale(path: &Path) -> bool {
    let is_socket =
        fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket());
    is_socket
        && unix_address(path).is_ok_and(|address| {
            Socket::new(Domain::UNIX, Type::DGRAM, None)
                .and_then(|probe| probe.connect(&address))
                .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
        })
}

/// What tells our path from a later one of the same name.
fn identity(path: &Path) -> Option<(u64, u64)> {
    fs::symlink_metadata(path)
        .ok()
        .map(|metadata| (metadata.dev(), metadata.ino()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    fn inet(host: &str, port: &str) -> Inet {
        Inet {
            host: host.to_owned(),
            port: port.to_owned(),
        }
    }

    #[test]
    fn port_0_becomes_a_real_port_and_a_taken_port_is_named() {
        let first = Listener::tcp(&inet("127.0.0.1", "0")).unwrap();
        let address = first.address();
        let port = address.strip_prefix("tcp:127.0.0.1:").unwrap();
        assert_ne!(port, "0");
        assert!(!first.is_exposed());
        assert_eq!(
            Listener::tcp(&inet("127.0.0.1", port))
                .unwrap_err()
                .to_string(),
            "Failed to find an available port: Address already in use"
        );
        drop(first);
        Listener::tcp(&inet("127.0.0.1", port)).unwrap();
    }

    #[test]
    fn every_interface_is_exposed_and_a_foreign_address_is_refused() {
        assert!(Listener::tcp(&inet("0", "0")).unwrap().is_exposed());
        assert!(Listener::tcp(&inet("", "0")).unwrap().is_exposed());
        assert_eq!(
            Listener::tcp(&inet("192.0.2.1", "0"))
                .unwrap_err()
                .to_string(),
            "Failed to bind socket: Cannot assign requested address"
        );
    }

    #[test]
    fn a_unix_socket_is_private_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = Listener::unix(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o700);
        assert_eq!(listener.address(), format!("unix:{}", path.display()));
        assert_eq!(
            listener.accept().unwrap_err().kind(),
            io::ErrorKind::WouldBlock
        );
        let _client = UnixStream::connect(&path).unwrap();
        listener.accept().unwrap();
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn a_stale_socket_is_replaced_a_live_one_or_a_file_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        let live = Listener::unix(&path).unwrap();
        let in_use = format!(
            "Failed to bind socket to {}: Address already in use",
            path.display()
        );
        assert_eq!(Listener::unix(&path).unwrap_err().to_string(), in_use);
        // The probe did not come through as a client.
        assert_eq!(live.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(live);
        fs::write(&path, "precious").unwrap();
        assert_eq!(Listener::unix(&path).unwrap_err().to_string(), in_use);
        assert_eq!(fs::read(&path).unwrap(), b"precious");
        assert_eq!(
            Listener::unix(Path::new("/no/dir/x"))
                .unwrap_err()
                .to_string(),
            "Failed to bind socket to /no/dir/x: No such file or directory"
        );
    }

    #[test]
    fn a_path_that_became_someone_elses_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = Listener::unix(&path).unwrap();
        fs::rename(&path, dir.path().join("t")).unwrap();
        fs::write(&path, "precious").unwrap();
        drop(listener);
        assert!(path.exists());
    }
}
