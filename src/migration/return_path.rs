//! The way back: what the destination says on the same connection.
//!
//! ```text
//! type be16 | length be16 | payload (at most 512 bytes)
//! ```
//! Types 1 to 7 are QEMU's (`migration/savevm.c`, `migrate_send_rp_message`), from 0x8000 up they
//! are ours and are spoken only after both sides have recognised each other (`docs/wire.md`).

use std::time::Duration;

use super::Error;
use super::channel::{Channel, Fault};
use super::clock::Clock;
use crate::iov::{In, Out};

/// Cookie of the source's first PING. A stock QEMU sends it back.
pub const HAIL: u32 = 0x686d_7073;
/// What hmpsh answers instead.
pub const REPLY: u32 = 0x6873_6831;
/// Cookie of the PING that asks a stock destination whether it has loaded everything so far.
pub const CHECK: u32 = 2;
/// Cookie of the PING that asks any destination whether it has read everything so far.
pub const SOUNDING: u32 = 3;

/// A message of the destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// The last word; 0 is success.
    Shut(u32),
    /// Answer to a PING.
    Pong(u32),
    /// No device of the destination has objections to the switchover.
    SwitchoverAck,
    /// Ours: the manifest fits this machine.
    Accepted,
    /// Ours: everything is there, checked, and in the guest.
    Loaded,
    /// Ours: the guest is here now.
    Running,
    /// Ours: why SHUT will say 1.
    Reason(String),
}

impl Message {
    /// The whole message. A reason is cut to what fits.
    pub fn bytes(&self) -> Vec<u8> {
        let (kind, payload) = match self {
            Self::Shut(value) => (1, value.to_be_bytes().to_vec()),
            Self::Pong(value) => (2, value.to_be_bytes().to_vec()),
            Self::SwitchoverAck => (7, Vec::new()),
            Self::Accepted => (0x8000, Vec::new()),
            Self::Loaded => (0x8001, Vec::new()),
            Self::Running => (0x8002, Vec::new()),
            Self::Reason(text) => (0x8003, text.as_bytes()[..text.len().min(LONGEST)].to_vec()),
        };
        let mut bytes = u16::to_be_bytes(kind).to_vec();
        bytes.extend((payload.len() as u16).to_be_bytes());
        bytes.extend(payload);
        bytes
    }

    fn parse(kind: u16, payload: &[u8]) -> Result<Self, Error> {
        let number = || payload.try_into().ok().map(u32::from_be_bytes);
        let message = match (kind, payload.len()) {
            (1, _) => number().map(Self::Shut),
            (2, _) => number().map(Self::Pong),
            (7, 0) => Some(Self::SwitchoverAck),
            (0x8000, 0) => Some(Self::Accepted),
            (0x8001, 0) => Some(Self::Loaded),
            (0x8002, 0) => Some(Self::Running),
            (0x8003, _) => {
                let text = String::from_utf8_lossy(payload);
                Some(Self::Reason(
                    text.chars().filter(|c| !c.is_control()).collect(),
                ))
            }
            _ => None,
        };
        message.ok_or_else(|| {
            let length = payload.len();
            Error::stream(format!(
                "Return path message {kind:#x} with {length} bytes makes no sense here"
            ))
        })
    }
}

/// Says something to the source.
pub fn say(channel: &mut dyn Channel, message: &Message) -> Result<(), Fault> {
    let bytes = message.bytes();
    let mut rest = &bytes[..];
    while !rest.is_empty() {
        let n = channel.write(&[Out::from(rest)], PATIENCE)?;
        rest = &rest[n..];
    }
    Ok(())
}

/// The source's ear.
#[derive(Default)]
pub struct ReturnPath {
    heard: Vec<u8>,
}

impl ReturnPath {
    /// The next message if one has arrived.
    pub fn poll(&mut self, channel: &mut dyn Channel) -> Result<Option<Message>, Error> {
        loop {
            if let Some(message) = self.take()? {
                return Ok(Some(message));
            }
            match self.hear(channel, Duration::ZERO) {
                Ok(()) => {}
                Err(Fault::TimedOut) => return Ok(None),
                Err(fault) => return Err(fault.into()),
            }
        }
    }

    /// The next message; [`Fault::TimedOut`] after `patience` without one.
    pub fn wait(
        &mut self,
        channel: &mut dyn Channel,
        clock: &dyn Clock,
        patience: Duration,
    ) -> Result<Message, Error> {
        let until = clock.now().saturating_add(patience);
        loop {
            if let Some(message) = self.take()? {
                return Ok(message);
            }
            let left = until.saturating_sub(clock.now());
            if left.is_zero() {
                return Err(Fault::TimedOut.into());
            }
            self.hear(channel, left)?;
        }
    }

    /// After the connection broke: the reason, if the destination had told one.
    pub fn last_words(&mut self, channel: &mut dyn Channel) -> Option<Error> {
        // Every turn takes bytes from a connection that is over, so this ends.
        for _ in 0..LONGEST {
            match self.poll(channel) {
                Ok(Some(message)) => {
                    if let Some(error) = objection(&message) {
                        return Some(error);
                    }
                }
                Ok(None) | Err(_) => return None,
            }
        }
        None
    }

    fn take(&mut self) -> Result<Option<Message>, Error> {
        let Some((head, rest)) = self.heard.split_first_chunk::<4>() else {
            return Ok(None);
        };
        let kind = u16::from_be_bytes([head[0], head[1]]);
        let length = usize::from(u16::from_be_bytes([head[2], head[3]]));
        if length > LONGEST {
            let text = format!(
                "What answers there is no migration destination: return path message {kind:#x} \
                 of {length} bytes"
            );
            return Err(Error::Stream(text));
        }
        let Some(payload) = rest.get(..length) else {
            return Ok(None);
        };
        let message = Message::parse(kind, payload);
        self.heard.drain(..4 + length);
        message.map(Some)
    }

    fn hear(&mut self, channel: &mut dyn Channel, patience: Duration) -> Result<(), Fault> {
        let mut bytes = [0; LONGEST];
        match channel.read(&mut [In::from(&mut bytes[..])], patience)? {
            0 => Err(Fault::Failed(CLOSED.to_owned())),
            n => {
                self.heard.extend(&bytes[..n]);
                Ok(())
            }
        }
    }
}

/// The error that a message means when it comes instead of the one awaited, if it means one.
pub fn objection(message: &Message) -> Option<Error> {
    match message {
        Message::Reason(text) => Some(Error::Peer(format!("The destination refused: {text}"))),
        Message::Shut(0) => Some(Error::Peer(
            "The destination ended the migration too early".to_owned(),
        )),
        Message::Shut(value) => Some(Error::Peer(format!("Sibling indicated error {value}"))),
        _ => None,
    }
}

/// Why a destination is gone that said nothing.
pub const CLOSED: &str = "The destination closed the connection and did not say why";
/// Longest payload.
const LONGEST: usize = 512;
/// How long a short message may take to get out.
const PATIENCE: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(bytes: &[u8]) -> Vec<Message> {
        let mut path = ReturnPath {
            heard: bytes.to_vec(),
        };
        let mut messages = Vec::new();
        while let Ok(Some(message)) = path.take() {
            messages.push(message);
        }
        messages
    }

    #[test]
    fn messages_are_the_documented_bytes() {
        assert_eq!(Message::Pong(1).bytes(), [0, 2, 0, 4, 0, 0, 0, 1]);
        assert_eq!(Message::Shut(0).bytes(), [0, 1, 0, 4, 0, 0, 0, 0]);
        assert_eq!(Message::Loaded.bytes(), [0x80, 1, 0, 0]);
    }

    #[test]
    fn messages_survive() {
        let all = [
            Message::Shut(1),
            Message::Pong(REPLY),
            Message::SwitchoverAck,
            Message::Accepted,
            Message::Loaded,
            Message::Running,
            Message::Reason("no".to_owned()),
        ];
        let bytes: Vec<u8> = all.iter().flat_map(Message::bytes).collect();
        assert_eq!(parse(&bytes), all);
    }

    #[test]
    fn reasons_are_cut_and_harmless() {
        let long = Message::Reason("x\u{1b}".repeat(600)).bytes();
        assert_eq!(long.len(), 4 + LONGEST);
        assert_eq!(parse(&long), [Message::Reason("x".repeat(256))]);
    }

    proptest! {
        #[test]
        fn any_bytes_are_heard_without_harm(bytes in proptest::collection::vec(any::<u8>(), 0..99)) {
            parse(&bytes);
        }
    }
}
