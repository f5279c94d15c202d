//! Everything between configuration and EOF: sections, their footers, and commands.

use super::{Arrival, Source};
use crate::migration::Error;
use crate::migration::block;
use crate::migration::dirty_bitmap;
use crate::migration::globalstate;
use crate::migration::integrity::PROMISE;
use crate::migration::manifest::Manifest;
use crate::migration::ram;
use crate::migration::return_path::{HAIL, Message, REPLY, say};
use crate::migration::section::{COMMAND, Command, END, EOF, FOOTER, FULL, PART, START};
use crate::migration::stats::Status;
use crate::vm::guest::{SectionHeader, unknown_section};

impl Arrival<'_> {
    /// Reads up to and including EOF.
    pub(super) fn sections(&mut self) -> Result<(), Error> {
        loop {
            let from = self.reader.position();
            match self.reader.u8()? {
                EOF => {
                    self.place.enter("the end".to_owned(), from);
                    self.place.leave();
                    return Ok(());
                }
                START => self.start(from)?,
                PART => self.piece(from, false)?,
                END => self.piece(from, true)?,
                FULL => self.device(from)?,
                COMMAND => match self.command()? {
                    Command::Go => return Err(Error::stream("GO came before the end")),
                    _ => continue,
                },
                other => {
                    return Err(Error::Stream(format!(
                        "Unknown savevm section type {other}"
                    )));
                }
            }
            self.show(Status::Active, None);
        }
    }

    fn start(&mut self, from: u64) -> Result<(), Error> {
        let (id, header) = self.header_of_section(from)?;
        match (&*header.idstr, header.instance) {
            (ram::IDSTR, 0) => self.ram.setup(&mut self.reader, &header, id)?,
            (block::IDSTR, 0) => self.block.setup(&mut self.reader, &header, id)?,
            (dirty_bitmap::IDSTR, 0) => self.bitmaps.setup(&mut self.reader, &header, id)?,
            (idstr, instance) => return Err(Error::Stream(unknown_section(idstr, instance))),
        }
        self.footer(&header.idstr, id)?;
        self.mark();
        Ok(())
    }

    fn piece(&mut self, from: u64, is_end: bool) -> Result<(), Error> {
        let id = self.reader.be32()?;
        let idstr = match id {
            id if self.block.is(id) => block::IDSTR,
            id if self.bitmaps.is(id) => dirty_bitmap::IDSTR,
            _ => ram::IDSTR,
        };
        self.place.enter(named(idstr, 0), from);
        match idstr {
            block::IDSTR => self.block.load(&mut self.reader, is_end)?,
            dirty_bitmap::IDSTR => self.bitmaps.load(&mut self.reader, is_end)?,
            _ => self.ram.load(&mut self.reader, id, is_end)?,
        }
        self.footer(idstr, id)?;
        match is_end {
            true => self.mark(),
            false => self.place.leave(),
        }
        Ok(())
    }

    fn device(&mut self, from: u64) -> Result<(), Error> {
        let (id, header) = self.header_of_section(from)?;
        if !self.seen.insert((header.idstr.clone(), header.instance)) {
            let name = header.idstr.escape_default();
            let text = format!("Section '{name}' {} came twice", header.instance);
            return Err(Error::Stream(text));
        }
        if (&*header.idstr, header.instance) == (globalstate::IDSTR, 0) {
            self.state = Some(globalstate::load(&mut self.reader, header.version)?);
            self.is_promised = id == PROMISE;
        } else if let Some(loader) = &mut self.loader {
            let result = loader.load(&header, &mut self.reader);
            // What the device saw as a failed read has a better name here.
            if let Some(fault) = self.reader.take_fault() {
                return Err(fault);
            }
            result?;
        }
        self.footer(&header.idstr, id)?;
        self.mark();
        Ok(())
    }

    fn header_of_section(&mut self, from: u64) -> Result<(u32, SectionHeader), Error> {
        let id = self.reader.be32()?;
        let idstr = self.reader.cstr()?;
        let instance = self.reader.be32()?;
        self.place.enter(named(&idstr, instance), from);
        let version = self.reader.be32()?;
        Ok((
            id,
            SectionHeader {
                idstr,
                instance,
                version,
            },
        ))
    }

    fn footer(&mut self, name: &str, id: u32) -> Result<(), Error> {
        if !self.order.dialect.footers {
            return Ok(());
        }
        if self.reader.u8()? != FOOTER {
            return Err(Error::Stream(format!("Missing section footer for {name}")));
        }
        match self.reader.be32()? {
            found if found == id => Ok(()),
            found => Err(Error::Stream(format!(
                "Mismatched section id in footer for {name} - read {found:#x} expected {id:#x}"
            ))),
        }
    }

    /// Reads and obeys a command whose type byte has been read.
    pub(super) fn command(&mut self) -> Result<Command, Error> {
        let (number, length) = (self.reader.be16()?, self.reader.be16()?);
        let command = Command::from_wire(number, length).map_err(Error::Stream)?;
        let is_ours = !matches!(
            command,
            Command::OpenReturnPath
                | Command::Ping
                | Command::PostcopyAdvise
                | Command::SwitchoverStart
        );
        if is_ours && self.source != Source::Hmpsh {
            return Err(Error::Stream(format!(
                "MIG_CMD {number:#x} unknown (len {length:#x})"
            )));
        }
        match command {
            Command::OpenReturnPath => {
                if self.source == Source::Unknown && self.reader.channel().is_duplex() {
                    self.source = Source::Listening;
                }
            }
            Command::Ping => self.ping()?,
            Command::PostcopyAdvise => {
                if std::mem::replace(&mut self.is_advised, true) {
                    let text = "CMD_POSTCOPY_ADVISE in wrong postcopy state (1)";
                    return Err(Error::stream(text));
                }
            }
            Command::SwitchoverStart | Command::Go => {}
            Command::Manifest => self.manifest(length)?,
            Command::Abandon => {
                let text = self.payload(length)?;
                let text = String::from_utf8_lossy(&text).escape_debug().to_string();
                return Err(Error::Peer(format!("The source gave up: {text}")));
            }
        }
        Ok(command)
    }

    fn ping(&mut self) -> Result<(), Error> {
        let cookie = self.reader.be32()?;
        if self.source == Source::Unknown {
            let text = format!("CMD_PING ({cookie:#x}) received with no return path");
            return Err(Error::Stream(text));
        }
        let answer = if cookie == HAIL { REPLY } else { cookie };
        say(self.reader.channel(), &Message::Pong(answer))?;
        if cookie == HAIL {
            self.source = Source::Hmpsh;
            self.bitmaps.is_strict = true;
        }
        Ok(())
    }

    fn manifest(&mut self, length: u16) -> Result<(), Error> {
        let payload = self.payload(length)?;
        let announced = Manifest::parse(&payload)
            .ok_or_else(|| Error::stream("The source's manifest makes no sense"))?;
        announced
            .check(&Manifest::of(self.order.guest))
            .map_err(Error::Stream)?;
        self.block
            .announce(announced.disks())
            .map_err(Error::Stream)?;
        for bitmap in announced.bitmaps() {
            dirty_bitmap::check(&self.order.guest.drives(), bitmap).map_err(Error::Stream)?;
        }
        Ok(say(self.reader.channel(), &Message::Accepted)?)
    }

    /// At most 64 KiB.
    fn payload(&mut self, length: u16) -> Result<Vec<u8>, Error> {
        let mut payload = vec![0; usize::from(length)];
        self.reader.exact(&mut payload)?;
        Ok(payload)
    }
}

fn named(idstr: &str, instance: u32) -> String {
    format!("section '{}' {instance}", idstr.escape_default())
}
