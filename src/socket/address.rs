//! `host:port` as QEMU reads it, and the socket addresses behind it.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::mpsc;
use std::time::Duration;

use nom::Parser;
use nom::bytes::complete::{take_till, take_till1, take_while1};
use nom::character::complete::char;
use nom::sequence::{delimited, terminated};
use rustix::event::PollFlags;

use super::{Error, Waited, wait};

/// A host and a port, not resolved yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inet {
    /// Name or address, without brackets; empty: every interface.
    pub host: String,
    /// Number or service name.
    pub port: String,
}

impl fmt::Display for Inet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

impl Inet {
    /// Reads `host:port`, `:port` or `[v6]:port`, and gives back what follows the first comma.
    ///
    /// # Errors
    /// [`Error::Address`], [`Error::Ipv6Address`], [`Error::Port`].
    pub fn parse_prefix(text: &str) -> Result<(Self, Option<&str>), Error> {
        let in_brackets = delimited(char('['), take_while1(is_ipv6), char(']'));
        let bare = take_till(|c| c == ':');
        let port = || take_till1::<_, _, nom::error::Error<&str>>(|c| c == ',');
        let (options, (host, port)) = if text.starts_with('[') {
            (terminated(in_brackets, char(':')), port())
                .parse(text)
                .map_err(|_| Error::Ipv6Address(text.to_owned()))?
        } else {
            (terminated(bare, char(':')), port())
                .parse(text)
                .map_err(|_| Error::Address(text.to_owned()))?
        };
        let is_number = port.bytes().all(|byte| byte.is_ascii_digit());
        if is_number && port.parse::<u16>().is_err() {
            return Err(Error::Port {
                address: text.to_owned(),
                port: port.to_owned(),
            });
        }
        let inet = Self {
            host: host.to_owned(),
            port: port.to_owned(),
        };
        Ok((inet, options.strip_prefix(',')))
    }

    /// Reads an address with nothing after it.
    ///
    /// # Errors
    /// As [`Self::parse_prefix`], and [`Error::AddressOption`].
    pub fn parse(text: &str) -> Result<Self, Error> {
        match Self::parse_prefix(text)? {
            (inet, None) => Ok(inet),
            (_, Some(options)) => Err(Error::AddressOption(options.to_owned())),
        }
    }

    /// Every socket address of the host, in the resolver's order; never empty. An empty host is
    /// every IPv4 interface if `passive`, an error otherwise. Waits for the resolver at most
    /// `patience`.
    ///
    /// # Errors
    /// [`Error::Resolve`], [`Error::Interrupted`].
    pub fn resolve(
        &self,
        passive: bool,
        patience: Duration,
        interrupt: Option<BorrowedFd<'_>>,
    ) -> Result<Vec<SocketAddr>, Error> {
        let failed = |why: &str| Error::Resolve {
            address: self.to_string(),
            why: why.to_owned(),
        };
        let port = match self.port.parse() {
            Ok(port) => port,
            Err(_) => service(&self.port)
                .ok_or_else(|| failed("Servname not supported for ai_socktype"))?,
        };
        if self.host.is_empty() {
            return if passive {
                Ok(vec![SocketAddr::from((Ipv4Addr::UNSPECIFIED, port))])
            } else {
                Err(failed("Name or service not known"))
            };
        }
        if let Ok(address) = self.host.parse::<IpAddr>() {
            return Ok(vec![SocketAddr::new(address, port)]);
        }
        let found = look_up(self.host.clone(), port, patience, interrupt)
            .map_err(|error| failed(&error.to_string()))?
            .ok_or(Error::Interrupted)?;
        match found {
            Ok(addresses) if addresses.is_empty() => Err(failed("Name or service not known")),
            Ok(addresses) => Ok(addresses),
            Err(error) => {
                let text = error.to_string();
                Err(failed(
                    text.rsplit_once(": ").map_or(text.as_str(), |(_, why)| why),
                ))
            }
        }
    }
}

/// How QEMU writes a socket's own address: `tcp:127.0.0.1:4444` (IPv6 without brackets).
pub fn describe(address: SocketAddr) -> String {
    format!("tcp:{}:{}", address.ip(), address.port())
}

/// The resolver has no time-out and can not be interrupted, so it works on a thread of its own
/// that is left behind when the caller has no time left. `None`: interrupted.
fn look_up(
    host: String,
    port: u16,
    patience: Duration,
    interrupt: Option<BorrowedFd<'_>>,
) -> io::Result<Option<io::Result<Vec<SocketAddr>>>> {
    let (tell, told) = mpsc::channel();
    let (ended, end) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    std::thread::Builder::new()
        .name("resolver".to_owned())
        .spawn(move || {
            let addresses = (host.as_str(), port)
                .to_socket_addrs()
                .map(Iterator::collect);
            // Nobody listens any more: the caller's time was over.
            let _ = tell.send(addresses);
            drop(end);
        })?;
    Ok(
        match wait(ended.as_fd(), PollFlags::IN, patience, interrupt)? {
            Waited::Ready => Some(
                told.recv()
                    .unwrap_or_else(|gone| Err(io::Error::other(gone))),
            ),
            Waited::TimedOut => Some(Err(io::Error::other(
                "Temporary failure in name resolution",
            ))),
            Waited::Interrupted => None,
        },
    )
}

/// The TCP port of a service name in `/etc/services`.
fn service(name: &str) -> Option<u16> {
    let table = std::fs::read_to_string("/etc/services").ok()?;
    table.lines().find_map(|line| service_line(line, name))
}

fn service_line(line: &str, name: &str) -> Option<u16> {
    let (line, _comment) = line.split_once('#').unwrap_or((line, ""));
    let mut words = line.split_ascii_whitespace();
    let official = words.next()?;
    let port = words.next()?.strip_suffix("/tcp")?;
    let is_it = official == name || words.any(|alias| alias == name);
    is_it.then(|| port.parse().ok()).flatten()
}

fn is_ipv6(c: char) -> bool {
    c != ']' && (c.is_ascii_alphanumeric() || ":.%_-".contains(c))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn inet(host: &str, port: &str) -> Inet {
        Inet {
            host: host.to_owned(),
            port: port.to_owned(),
        }
    }

    #[test]
    fn addresses_are_read_as_qemu_reads_them() {
        assert_eq!(
            Inet::parse("localhost:4444").unwrap(),
            inet("localhost", "4444")
        );
        assert_eq!(Inet::parse("[::1]:4444").unwrap(), inet("::1", "4444"));
        assert_eq!(Inet::parse(":4444").unwrap(), inet("", "4444"));
        assert_eq!(Inet::parse("h:http").unwrap(), inet("h", "http"));
        let (it, options) = Inet::parse_prefix("h:1,server=on,wait=off").unwrap();
        assert_eq!((it, options), (inet("h", "1"), Some("server=on,wait=off")));
    }

    #[test]
    fn bad_addresses_are_named() {
        let text = |address: &str| Inet::parse(address).unwrap_err().to_string();
        assert_eq!(text("foo"), "error parsing address 'foo'");
        assert_eq!(text(""), "error parsing address ''");
        assert_eq!(text("127.0.0.1:"), "error parsing address '127.0.0.1:'");
        assert_eq!(text("[::1:1"), "error parsing IPv6 address '[::1:1'");
        assert_eq!(
            text("localhost:99999"),
            "error parsing address 'localhost:99999': port 99999 is not in the range of 0 to 65535"
        );
        assert_eq!(
            text("h:1,to=5"),
            "address option 'to=5': not built in this version"
        );
    }

    #[test]
    fn resolving_names_the_address_that_failed() {
        let patience = Duration::from_secs(5);
        let resolve = |host, port, passive| inet(host, port).resolve(passive, patience, None);
        assert_eq!(
            resolve("", "5", true).unwrap(),
            ["0.0.0.0:5".parse().unwrap()]
        );
        assert_eq!(
            resolve("0", "5", true).unwrap(),
            ["0.0.0.0:5".parse().unwrap()]
        );
        assert_eq!(
            resolve("::1", "5", false).unwrap(),
            ["[::1]:5".parse().unwrap()]
        );
        assert_eq!(
            resolve("", "5", false).unwrap_err().to_string(),
            "address resolution failed for :5: Name or service not known"
        );
        assert_eq!(
            resolve("localhost", "nosuchsvc", false)
                .unwrap_err()
                .to_string(),
            "address resolution failed for localhost:nosuchsvc: Servname not supported for ai_socktype"
        );
        let local = resolve("localhost", "5", false).unwrap();
        assert!(
            local.iter().all(|address| address.ip().is_loopback()),
            "{local:?}"
        );
    }

    #[test]
    fn services_are_found_by_name_and_alias() {
        let line = "http\t\t80/tcp\t\twww\t# WorldWideWeb";
        assert_eq!(service_line(line, "http"), Some(80));
        assert_eq!(service_line(line, "www"), Some(80));
        assert_eq!(service_line(line, "WorldWideWeb"), None);
        assert_eq!(service_line("domain 53/udp", "domain"), None);
        assert_eq!(service_line("# http 80/tcp", "http"), None);
    }

    proptest! {
        #[test]
        fn any_text_is_answered(text in ".{0,40}") {
            let _ = Inet::parse_prefix(&text);
        }

        #[test]
        fn what_is_written_is_read_back(host in "[a-z0-9.-]{0,20}", port in 0u16..) {
            let it = inet(&host, &port.to_string());
            prop_assert_eq!(Inet::parse(&it.to_string()).unwrap(), it);
        }
    }
}
