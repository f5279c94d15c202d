//! Disks on their way in. Chunks are written as they come; what came is kept in mind, because a
//! QEMU 7.2 may say that it has sent everything when it has not.

use std::sync::Arc;

use super::target::{Piece, Target};
use super::{IDSTR, Record, VERSION};
use crate::block::{CHUNK, Drive};
use crate::errno::Errno;
use crate::migration::Error;
use crate::migration::manifest;
use crate::migration::stats::DiskStats;
use crate::migration::stream::Reader;
use crate::vm::guest::SectionHeader;

/// The live section `block`.
pub struct BlockLoad {
    targets: Vec<Target>,
    section_id: Option<u32>,
    is_complete: bool,
    /// Whether the source has said which disks come, and whether there are any.
    announced: Option<bool>,
    /// What is wrong if the source is not hmpsh.
    doubt: Option<String>,
    /// What the source said last in front of the end.
    percent: u64,
    chunk: Vec<u8>,
    /// What came, and the length of the disks it is for; none before the section. What is still to
    /// come is not known.
    pub stats: Option<DiskStats>,
}

impl BlockLoad {
    /// Ready for a section that fills some of these drives.
    pub fn new(drives: Vec<Arc<Drive>>) -> Self {
        // Another one may have the name of one that was taken out.
        let drives = drives.into_iter().filter(|drive| !drive.is_deleted());
        Self {
            targets: drives.map(Target::new).collect(),
            section_id: None,
            is_complete: false,
            announced: None,
            doubt: None,
            percent: 0,
            chunk: Vec::new(),
            stats: None,
        }
    }

    /// The source is hmpsh, and will send these disks. Their images are locked from here on.
    ///
    /// # Errors
    /// One of them can not be taken in; the text says why.
    pub fn announce(&mut self, disks: &[manifest::Disk]) -> Result<(), String> {
        self.announced = Some(!disks.is_empty());
        disks.iter().try_for_each(|disk| {
            let id = disk.id.as_str();
            let mut targets = self.targets.iter_mut();
            let target = targets.find(|target| target.drive().id() == id);
            let target = target.ok_or_else(|| {
                let id = id.escape_default();
                format!(
                    "Disk '{id}' exists only at the source; -b and -i need a -drive of the same id"
                )
            })?;
            target.announce(disk)
        })
    }

    /// START: its header has been read.
    pub fn setup(
        &mut self,
        reader: &mut Reader,
        header: &SectionHeader,
        id: u32,
    ) -> Result<(), Error> {
        let version = header.version;
        if version > VERSION {
            let text = format!("savevm: unsupported version {version} for '{IDSTR}' v{VERSION}");
            return Err(Error::Stream(text));
        }
        if self.section_id.replace(id).is_some() {
            return Err(Error::stream("Section 'block' was started twice"));
        }
        self.chunk = vec![0; CHUNK as usize];
        self.stats = Some(DiskStats::default());
        self.records(reader, false)
    }

    /// Whether PARTs and ENDs with that id are this section's.
    pub fn is(&self, id: u32) -> bool {
        self.section_id == Some(id)
    }

    /// PART or END.
    pub fn load(&mut self, reader: &mut Reader, is_end: bool) -> Result<(), Error> {
        if self.is_complete {
            return Err(Error::stream("Section 'block' goes on after its end"));
        }
        let before = self.percent;
        self.records(reader, is_end)?;
        if is_end {
            self.is_complete = true;
            self.chunk = Vec::new();
            self.targets.iter().try_for_each(Target::settle)?;
            self.check_announced()?;
            // The end says 100 in any case.
            if self.announced.is_none() && before < 100 {
                self.doubt = gaps(&self.targets, Target::gap_in_doubt);
            }
        }
        Ok(())
    }

    /// What is missing of the section, for the operator.
    pub fn missing(&self) -> Option<&'static str> {
        let is_expected = self.section_id.is_some() || self.announced == Some(true);
        (is_expected && !self.is_complete).then_some("end of section 'block'")
    }

    /// Looks at the disks once it is known whether a source that has announced nothing is hmpsh. One
    /// that is has left out only what it was to leave out, and means what it sends.
    ///
    /// # Errors
    /// A disk has not come whole, or does not fit.
    pub fn check(&self, is_hmpsh: bool) -> Result<(), Error> {
        if is_hmpsh {
            let cut = self.targets.iter().find_map(Target::cut);
            return cut.map_or(Ok(()), |text| Err(Error::Stream(text)));
        }
        match &self.doubt {
            None => Ok(()),
            Some(gaps) => Err(Error::Stream(format!(
                "The source has ended before it had sent the disks: {gaps}. QEMU 7.2 does that when \
                 what is left of RAM is little; with `migrate_set_parameter downtime-limit 0` and \
                 max-bandwidth 100g it does not"
            ))),
        }
    }

    /// The guest is about to run here: the drives are as all others are. What is returned is to be
    /// made safe.
    pub fn finish(&mut self) -> Vec<Arc<Drive>> {
        let filled = self.targets.iter().filter(|target| target.is_filled());
        let drives = filled.map(|target| Arc::clone(target.drive())).collect();
        self.targets.iter_mut().for_each(Target::leave);
        drives
    }

    fn check_announced(&self) -> Result<(), Error> {
        match gaps(&self.targets, Target::gap_announced) {
            None => Ok(()),
            Some(gaps) => Err(Error::Stream(format!(
                "The source has ended before it had sent the disks: {gaps}"
            ))),
        }
    }

    fn records(&mut self, reader: &mut Reader, is_end: bool) -> Result<(), Error> {
        reader.set_ahead(0);
        let result = self.chunks(reader, is_end);
        reader.set_ahead(usize::MAX);
        result
    }

    fn chunks(&mut self, reader: &mut Reader, is_end: bool) -> Result<(), Error> {
        loop {
            let (sector, is_bytes) = match Record::parse(reader.be64()?).map_err(Error::Stream)? {
                Record::Eos => return Ok(()),
                Record::Progress(percent) => {
                    self.percent = percent;
                    continue;
                }
                Record::Chunk(sector) => (sector, true),
                Record::Zero(sector) => (sector, false),
            };
            let index = self.find(&reader.cstr()?)?;
            if is_bytes {
                reader.bulk(&mut self.chunk)?;
            }
            let piece = Piece {
                sector,
                is_zero: !is_bytes || super::is_zero(&self.chunk),
                bytes: &mut self.chunk,
                is_end,
            };
            let target = &mut self.targets[index];
            let is_known = target.has_some();
            let len = target.write(piece)?;
            if let Some(stats) = &mut self.stats {
                stats.transferred += len;
                if !is_known {
                    stats.total += target.drive().len();
                }
            }
        }
    }

    fn find(&self, name: &str) -> Result<usize, Error> {
        let mut targets = self.targets.iter();
        let found = targets.position(|target| target.drive().id() == name);
        found.ok_or_else(|| {
            let name = name.escape_default();
            Error::Stream(format!("Error unknown block device {name}"))
        })
    }
}

/// What is missing of all of them.
fn gaps(targets: &[Target], gap: impl Fn(&Target) -> Option<String>) -> Option<String> {
    let gaps: Vec<String> = targets.iter().filter_map(gap).collect();
    (!gaps.is_empty()).then(|| gaps.join(", "))
}

/// Brings what was written to the disks themselves, in the background: the guest, which may have been
/// told at the source that it is safe, does not wait for that. (QEMU leaves it to the host.)
pub fn sync(drives: Vec<Arc<Drive>>) {
    let sync = move || {
        let is_wanted =
            |drive: &Arc<Drive>| !drive.policy().cache.ignores_flushes && !drive.is_deleted();
        for drive in drives.into_iter().filter(is_wanted) {
            // Past the drive: it is not the guest who asks.
            if let Err(error) = drive.image().flush() {
                let (id, why) = (drive.id(), Errno(&error));
                log::error!("What has come of disk '{id}' may not be safe: {why}");
            }
        }
    };
    let thread = std::thread::Builder::new().name("sync".to_owned());
    if let Err(error) = thread.spawn(sync) {
        log::error!("Failed to start a thread: {error}");
    }
}
