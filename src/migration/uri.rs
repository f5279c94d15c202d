//! Where a migration goes to or comes from: `tcp:`, `unix:`, `exec:`, `fd:` and `file:` URIs.
//!
//! Reads the text only; nothing is resolved, opened or run here. Texts are QEMU 10.0's.

use std::path::PathBuf;
use std::str::FromStr;

use nom::branch::alt;
use nom::bytes::complete::tag;
use nom::combinator::rest;
use nom::sequence::pair;
use nom::{IResult, Parser};

use crate::socket;
use crate::socket::address::Inet;
use crate::units::{BYTE, SizeError, parse_size};

/// A migration address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Uri {
    /// `tcp:host:port`.
    Tcp(Inet),
    /// `unix:path`.
    Unix(PathBuf),
    /// `exec:command`, run by `/bin/sh -c`.
    Exec(String),
    /// `fd:name`, a name given with `getfd` or the number of an inherited descriptor.
    Fd(String),
    /// `file:path[,offset=N]`.
    File {
        /// Everything before the last `,offset=`.
        path: PathBuf,
        /// First byte of the stream; `None` when not written out.
        offset: Option<u64>,
    },
}

/// Why a text is no migration address.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No known scheme.
    #[error("unknown migration protocol: {0}")]
    Unknown(String),
    /// A scheme of QEMU's that is not built yet.
    #[error("{0}: not built in this version")]
    NotBuilt(&'static str),
    /// A bad `host:port`, or a `unix:` without a path.
    #[error(transparent)]
    Socket(#[from] socket::Error),
    /// `fd:` without a name.
    #[error("invalid file descriptor address")]
    EmptyFd,
    /// `exec:` without a command.
    #[error("invalid command: exec: needs one")]
    EmptyCommand,
    /// The offset is no size.
    #[error("file URI has bad offset {text}: {}", bad_offset(*.why))]
    Offset {
        /// What stands after `offset=`.
        text: String,
        /// What is wrong with it.
        why: SizeError,
    },
}

impl FromStr for Uri {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let (_, (scheme, address)) =
            scheme_and_address(text).map_err(|_| Error::Unknown(text.to_owned()))?;
        match scheme {
            "tcp:" => Ok(Self::Tcp(Inet::parse(address)?)),
            "unix:" if address.is_empty() => Err(socket::Error::EmptyPath.into()),
            "unix:" => Ok(Self::Unix(address.into())),
            "exec:" if address.trim().is_empty() => Err(Error::EmptyCommand),
            "exec:" => Ok(Self::Exec(address.to_owned())),
            "fd:" if address.is_empty() => Err(Error::EmptyFd),
            "fd:" => Ok(Self::Fd(address.to_owned())),
            "file:" => file(address),
            "rdma:" => Err(Error::NotBuilt("rdma")),
            _ => Err(Error::NotBuilt("vsock")),
        }
    }
}

fn scheme_and_address(text: &str) -> IResult<&str, (&str, &str)> {
    let scheme = alt((
        tag("tcp:"),
        tag("unix:"),
        tag("exec:"),
        tag("fd:"),
        tag("file:"),
        tag("rdma:"),
        tag("vsock:"),
    ));
    pair(scheme, rest).parse(text)
}

fn file(address: &str) -> Result<Uri, Error> {
    let Some((path, offset)) = address.rsplit_once(",offset=") else {
        return Ok(Uri::File {
            path: address.into(),
            offset: None,
        });
    };
    let bad = |why| Error::Offset {
        text: offset.to_owned(),
        why,
    };
    let number = parse_size(offset, BYTE).map_err(bad)?;
    if i64::try_from(number).is_err() {
        return Err(bad(SizeError::OutOfRange));
    }
    Ok(Uri::File {
        path: path.into(),
        offset: Some(number),
    })
}

fn bad_offset(why: SizeError) -> &'static str {
    match why {
        SizeError::Invalid => "Invalid argument",
        SizeError::OutOfRange => "Numerical result out of range",
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_scheme_is_read() {
        let inet = |host: &str, port: &str| Inet {
            host: host.into(),
            port: port.into(),
        };
        let parse = |text: &str| text.parse::<Uri>().unwrap();
        assert_eq!(
            parse("tcp:localhost:4444"),
            Uri::Tcp(inet("localhost", "4444"))
        );
        assert_eq!(parse("tcp:[::1]:4444"), Uri::Tcp(inet("::1", "4444")));
        assert_eq!(parse("tcp:0:4444"), Uri::Tcp(inet("0", "4444")));
        assert_eq!(parse("unix:/tmp/s:1"), Uri::Unix("/tmp/s:1".into()));
        assert_eq!(parse("exec:cat > /tmp/x"), Uri::Exec("cat > /tmp/x".into()));
        assert_eq!(parse("fd:mig"), Uri::Fd("mig".into()));
        assert_eq!(
            parse("file:/x"),
            Uri::File {
                path: "/x".into(),
                offset: None
            }
        );
        let at = |path: &str, offset| Uri::File {
            path: path.into(),
            offset: Some(offset),
        };
        assert_eq!(parse("file:/x,offset=0x1000"), at("/x", 4096));
        assert_eq!(parse("file:/x,offset=0"), at("/x", 0));
        assert_eq!(parse("file:/x,y=1,offset=1M"), at("/x,y=1", 1 << 20));
        assert_eq!(
            parse("file:/x,bar=1"),
            Uri::File {
                path: "/x,bar=1".into(),
                offset: None
            }
        );
    }

    #[test]
    fn what_is_wrong_is_said_in_qemus_words() {
        for (uri, text) in [
            ("foo:bar", "unknown migration protocol: foo:bar"),
            ("tcp", "unknown migration protocol: tcp"),
            ("", "unknown migration protocol: "),
            ("tcp:", "error parsing address ''"),
            ("tcp:foo", "error parsing address 'foo'"),
            ("tcp:[::1:1", "error parsing IPv6 address '[::1:1'"),
            (
                "tcp:localhost:99999",
                "error parsing address 'localhost:99999': port 99999 is not in the range of 0 to 65535",
            ),
            ("unix:", "invalid Unix socket address"),
            ("fd:", "invalid file descriptor address"),
            (
                "file:/x,offset=x",
                "file URI has bad offset x: Invalid argument",
            ),
            (
                "file:/x,offset=-1",
                "file URI has bad offset -1: Numerical result out of range",
            ),
            (
                "file:/x,offset=8E",
                "file URI has bad offset 8E: Numerical result out of range",
            ),
            ("rdma:h:1", "rdma: not built in this version"),
            ("vsock:1:2", "vsock: not built in this version"),
            ("exec: ", "invalid command: exec: needs one"),
        ] {
            assert_eq!(uri.parse::<Uri>().unwrap_err().to_string(), text, "{uri}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_answered(text in "((tcp|unix|exec|fd|file|rdma|vsock):)?.{0,40}") {
            let _ = text.parse::<Uri>();
        }
    }
}
