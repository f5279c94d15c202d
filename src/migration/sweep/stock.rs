//! Something that behaves as a stock QEMU destination does, where that matters: it runs the guest
//! as soon as it has read EOF, and says SHUT afterwards.

use std::time::Duration;

use super::FakeGuest;
use crate::iov::{In, Out};
use crate::migration::Error;
use crate::migration::channel::Channel;
use crate::migration::configuration::{self, Local};
use crate::migration::dirty_bitmap::BitmapLoad;
use crate::migration::globalstate;
use crate::migration::ram::RamLoad;
use crate::migration::return_path::{Message, say};
use crate::migration::section::{COMMAND, END, EOF, FULL, MAGIC, PART, START};
use crate::migration::stream::Reader;
use crate::vm::guest::{Guest, SectionHeader};
use crate::vm::run_state::RunState;

pub(super) fn receive(guest: &FakeGuest, channel: Box<dyn Channel>) -> Result<RunState, Error> {
    let mut reader = Reader::new(channel, Duration::from_secs(30));
    let mut answers = false;
    if let Err(error) = load(guest, &mut reader, &mut answers) {
        if answers {
            let _ = say(reader.channel(), &Message::Shut(1));
        }
        return Err(error);
    }
    let description = discard_description(&mut reader);
    guest.start()?;
    if answers {
        let _ = say(
            reader.channel(),
            &Message::Shut(u32::from(description.is_err())),
        );
    }
    Ok(RunState::Running)
}

fn load(guest: &FakeGuest, reader: &mut Reader, answers: &mut bool) -> Result<(), Error> {
    let mut ram = RamLoad::new(guest.ram());
    let mut bitmaps = BitmapLoad::new(guest.drives());
    let mut loader = guest.loader();
    assert_eq!((reader.be32()?, reader.be32()?), (MAGIC, 3));
    configuration::load(
        reader,
        Local {
            machine: guest.machine_type(),
            uuid: None,
        },
    )?;
    loop {
        match reader.u8()? {
            EOF => break,
            COMMAND => {
                let (number, length) = (reader.be16()?, reader.be16()?);
                match (number, length) {
                    (1, 0) => *answers = true,
                    (3, 0) => {}
                    (2, 4) => {
                        let cookie = reader.be32()?;
                        say(reader.channel(), &Message::Pong(cookie))?;
                    }
                    other => panic!("QEMU does not know command {other:?}"),
                }
                continue;
            }
            kind @ (START | FULL) => {
                let id = reader.be32()?;
                let idstr = reader.cstr()?;
                let (instance, version) = (reader.be32()?, reader.be32()?);
                let header = SectionHeader {
                    idstr,
                    instance,
                    version,
                };
                match &*header.idstr {
                    "ram" => ram.setup(reader, &header, id)?,
                    "dirty-bitmap" => bitmaps.setup(reader, &header, id)?,
                    "globalstate" => {
                        globalstate::load(reader, version)?;
                    }
                    _ => {
                        assert_eq!(kind, FULL);
                        loader.load(&header, reader)?;
                    }
                }
            }
            kind @ (PART | END) => {
                let id = reader.be32()?;
                match bitmaps.is(id) {
                    true => bitmaps.load(reader, kind == END)?,
                    false => ram.load(reader, id, kind == END)?,
                }
            }
            other => panic!("QEMU does not know section type {other}"),
        }
        assert_eq!(reader.u8()?, 0x7e);
        reader.be32()?;
    }
    loader.apply()?;
    bitmaps.enable();
    bitmaps.keep();
    Ok(())
}

fn discard_description(reader: &mut Reader) -> Result<(), Error> {
    assert_eq!(reader.u8()?, 6);
    let mut text = vec![0; reader.be32()? as usize];
    reader.exact(&mut text)
}

/// A QEMU source with `return-path` on: what it sends is `stream`, and it resumes its guest
/// unless it hears SHUT 0.
pub(super) fn send(
    guest: &FakeGuest,
    stream: &[u8],
    mut channel: Box<dyn Channel>,
) -> Result<(), Error> {
    let result = converse(guest, stream, &mut *channel);
    let state = if result.is_ok() {
        RunState::PostMigrate
    } else {
        RunState::Running
    };
    guest.stop(state)?;
    result
}

fn converse(guest: &FakeGuest, stream: &[u8], channel: &mut dyn Channel) -> Result<(), Error> {
    let patience = Duration::from_secs(3600);
    guest.stop(RunState::FinishMigrate)?;
    guest.release_drives(true)?;
    let mut rest = stream;
    while !rest.is_empty() {
        rest = &rest[channel.write(&[Out::from(rest)], patience)?..];
    }
    let mut heard: Vec<u8> = Vec::new();
    let expected = [Message::Pong(1).bytes(), Message::Shut(0).bytes()].concat();
    while heard.len() < expected.len() {
        let mut bytes = [0; 64];
        match channel.read(&mut [In::from(&mut bytes[..])], patience)? {
            0 => return Err(Error::stream("closed")),
            n => heard.extend(&bytes[..n]),
        }
    }
    if heard == expected {
        Ok(())
    } else {
        Err(Error::stream("SHUT 1"))
    }
}
