//! Named dirty bitmaps of a drive: which parts of the disk were written to since somebody began to
//! look. A backup, say, copies what is dirty and clears the bitmap.
//!
//! One bit stands for a granule of a power of two bytes. Bitmaps live in memory only. QEMU:
//! `block/dirty-bitmap.c`, `util/hbitmap.c`; the texts are QMP's.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::SECTOR;

/// Why a bitmap can not be had, in QMP's words.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BitmapError {
    /// It would have no name.
    #[error("Bitmap name cannot be empty")]
    Unnamed,
    /// Its name would have more than 1023 bytes.
    #[error("Bitmap name too long: {0}")]
    TooLong(String),
    /// Granules of such a length there are not.
    #[error("Granularity must be power of 2 and at least 512")]
    Granularity,
    /// There is one of that name.
    #[error("Bitmap already exists: {0}")]
    Exists(String),
    /// There is none of that name.
    #[error("Dirty bitmap '{0}' not found")]
    Missing(String),
    /// There is no memory for its bits.
    #[error("Bitmap '{name}' would need {bytes} bytes of memory, which can not be had")]
    NoMemory {
        /// Its name.
        name: String,
        /// How many it would need.
        bytes: u64,
    },
    /// A migration has it.
    #[error("Bitmap '{0}' is currently in use by another operation and cannot be used")]
    Busy(String),
}

/// A bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap {
    name: String,
    granularity: u32,
    /// Bytes of the disk.
    len: u64,
    words: Vec<u64>,
    /// How many bits are set.
    count: u64,
    /// Writes are noted.
    pub is_enabled: bool,
    /// A migration has it: nobody else changes it.
    pub is_busy: bool,
    /// Its owner wants it to be in the image when the program ends. It came so from a QEMU, which
    /// stores it if it gets back there; here it is only remembered.
    pub is_persistent: bool,
}

impl Bitmap {
    /// Of a disk of `len` bytes: enabled, and nothing is dirty.
    ///
    /// # Errors
    /// The name or the granularity is none, or there is no memory for it.
    pub fn new(name: &str, granularity: u32, len: u64) -> Result<Self, BitmapError> {
        if name.is_empty() {
            return Err(BitmapError::Unnamed);
        }
        if u64::from(granularity) < SECTOR || !granularity.is_power_of_two() {
            return Err(BitmapError::Granularity);
        }
        if name.len() > LONGEST_NAME {
            return Err(BitmapError::TooLong(name.to_owned()));
        }
        let mut bitmap = Self {
            name: name.to_owned(),
            granularity,
            len,
            words: Vec::new(),
            count: 0,
            is_enabled: true,
            is_busy: false,
            is_persistent: false,
        };
        bitmap.words = zeros(bitmap.granules().div_ceil(64)).ok_or_else(|| {
            let (name, bytes) = (name.to_owned(), Self::bytes(granularity, len));
            BitmapError::NoMemory { name, bytes }
        })?;
        Ok(bitmap)
    }

    /// Bytes of memory that the bits take, for a granularity that is none, too.
    pub fn bytes(granularity: u32, len: u64) -> u64 {
        len.div_ceil(u64::from(granularity).max(1)).div_ceil(64) * 8
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes of a granule.
    pub fn granularity(&self) -> u32 {
        self.granularity
    }

    /// Bytes of the disk.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether the disk has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// How many granules the disk has; the last one may end behind it.
    pub fn granules(&self) -> u64 {
        self.len.div_ceil(u64::from(self.granularity))
    }

    /// Bytes of all granules that are dirty.
    pub fn dirty(&self) -> u64 {
        self.count * u64::from(self.granularity)
    }

    /// The bits: granule 0 is bit 0 of the first word.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Puts other bits in the place of those from word `first` on. False, and nothing is changed, if
    /// some stand for nothing on the disk.
    pub fn load(&mut self, first: usize, words: &[u64]) -> bool {
        let last = self.words.len().checked_sub(1);
        let tail = self.tail();
        let rest = self.words.get_mut(first..);
        let Some(to) = rest.and_then(|rest| rest.get_mut(..words.len())) else {
            return false;
        };
        let is_last = !words.is_empty() && last == Some(first + words.len() - 1);
        if is_last && words.last().is_some_and(|word| word & !tail != 0) {
            return false;
        }
        self.count = self.count + ones(words) - ones(to);
        to.copy_from_slice(words);
        true
    }

    /// Nothing is dirty any more.
    pub fn clear(&mut self) {
        self.words.fill(0);
        self.count = 0;
    }

    /// Bytes that were written.
    fn mark(&mut self, offset: u64, len: u64) {
        let end = offset.saturating_add(len).min(self.len);
        if !self.is_enabled || offset >= end {
            return;
        }
        let granularity = u64::from(self.granularity);
        let (first, last) = (offset / granularity, (end - 1) / granularity);
        for word in first / 64..=last / 64 {
            let from = first.saturating_sub(word * 64).min(63);
            let to = (last - word * 64).min(63);
            let bits = (u64::MAX << from) & (u64::MAX >> (63 - to));
            let slot = &mut self.words[word as usize];
            self.count += u64::from((bits & !*slot).count_ones());
            *slot |= bits;
        }
    }

    /// The disk is `len` bytes long now. What is new is clean.
    fn resize(&mut self, len: u64) {
        self.len = len;
        self.words.resize(self.granules().div_ceil(64) as usize, 0);
        let tail = self.tail();
        if let Some(last) = self.words.last_mut() {
            *last &= tail;
        }
        self.count = ones(&self.words);
    }

    /// The bits of the last word that stand for something.
    fn tail(&self) -> u64 {
        match self.granules() % 64 {
            0 => u64::MAX,
            used => (1 << used) - 1,
        }
    }
}

/// So many words, which take room once they are written to; none if there is not so much memory. A
/// vector that can not be had ends the process, and one that is only asked for does not: so it is asked
/// for first.
fn zeros(count: u64) -> Option<Vec<u64>> {
    let count = usize::try_from(count).ok()?;
    Vec::<u64>::new().try_reserve_exact(count).ok()?;
    Some(vec![0; count])
}

fn ones(words: &[u64]) -> u64 {
    words.iter().map(|word| u64::from(word.count_ones())).sum()
}

/// What there is to know about a bitmap but its bits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapInfo {
    /// Its name.
    pub name: String,
    /// Bytes of a granule.
    pub granularity: u32,
    /// Bytes of all granules that are dirty.
    pub dirty: u64,
    /// Writes are noted.
    pub is_enabled: bool,
    /// A migration has it.
    pub is_busy: bool,
    /// See [`Bitmap::is_persistent`].
    pub is_persistent: bool,
}

impl BitmapInfo {
    fn of(bitmap: &Bitmap) -> Self {
        Self {
            name: bitmap.name.clone(),
            granularity: bitmap.granularity,
            dirty: bitmap.dirty(),
            is_enabled: bitmap.is_enabled,
            is_busy: bitmap.is_busy,
            is_persistent: bitmap.is_persistent,
        }
    }
}

/// All bitmaps of a drive, the newest first.
#[derive(Default)]
pub struct Bitmaps {
    /// Whether there is one: without, a write takes no lock.
    is_any: AtomicBool,
    list: Mutex<Vec<Bitmap>>,
}

impl Bitmaps {
    /// Another one.
    ///
    /// # Errors
    /// There is one of that name.
    pub fn add(&self, bitmap: Bitmap) -> Result<(), BitmapError> {
        let mut list = self.list();
        if list.iter().any(|other| other.name == bitmap.name) {
            return Err(BitmapError::Exists(bitmap.name));
        }
        list.insert(0, bitmap);
        self.is_any.store(true, Ordering::SeqCst);
        Ok(())
    }

    /// One less.
    ///
    /// # Errors
    /// There is none of that name, or it is busy.
    pub fn remove(&self, name: &str) -> Result<(), BitmapError> {
        self.change(name, |_| ())?;
        self.drop_any(name);
        Ok(())
    }

    /// One less, busy or not.
    pub fn drop_any(&self, name: &str) {
        self.retain(|bitmap| bitmap.name != name);
    }

    /// None any more.
    pub fn drop_all(&self) {
        self.retain(|_| false);
    }

    /// Does something with the one of that name, busy or not.
    ///
    /// # Errors
    /// There is none.
    pub fn with<T>(
        &self,
        name: &str,
        act: impl FnOnce(&mut Bitmap) -> T,
    ) -> Result<T, BitmapError> {
        let mut list = self.list();
        let found = list.iter_mut().find(|bitmap| bitmap.name == name);
        let found = found.ok_or_else(|| BitmapError::Missing(name.to_owned()))?;
        Ok(act(found))
    }

    /// Does something with the one of that name.
    ///
    /// # Errors
    /// There is none, or it is busy.
    pub fn change<T>(
        &self,
        name: &str,
        act: impl FnOnce(&mut Bitmap) -> T,
    ) -> Result<T, BitmapError> {
        self.with(name, |bitmap| match bitmap.is_busy {
            true => Err(BitmapError::Busy(name.to_owned())),
            false => Ok(act(bitmap)),
        })?
    }

    /// What there is.
    pub fn info(&self) -> Vec<BitmapInfo> {
        self.list().iter().map(BitmapInfo::of).collect()
    }

    /// Whether a migration has one.
    pub fn is_busy(&self) -> bool {
        self.list().iter().any(|bitmap| bitmap.is_busy)
    }

    /// Takes those over that another drive has for itself and this one has not.
    pub fn adopt(&self, other: &Self) {
        let mut theirs = other.list().clone();
        theirs.retain(|bitmap| !bitmap.is_busy);
        for bitmap in theirs.into_iter().rev() {
            // One of that name is the newer one.
            let _ = self.add(bitmap);
        }
    }

    /// Bytes that were written: to be called when they are in the image.
    pub fn mark(&self, offset: u64, len: u64) {
        if self.is_any.load(Ordering::SeqCst) {
            let mut list = self.list();
            list.iter_mut().for_each(|bitmap| bitmap.mark(offset, len));
        }
    }

    /// The disk is `len` bytes long now.
    pub fn resize(&self, len: u64) {
        let mut list = self.list();
        let others = list.iter_mut().filter(|bitmap| bitmap.len != len);
        others.for_each(|bitmap| bitmap.resize(len));
    }

    fn retain(&self, is_kept: impl FnMut(&Bitmap) -> bool) {
        let mut list = self.list();
        list.retain(is_kept);
        self.is_any.store(!list.is_empty(), Ordering::SeqCst);
    }

    fn list(&self) -> MutexGuard<'_, Vec<Bitmap>> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The granularity of a bitmap for which none was said, on an image of such clusters: that length,
/// from 4 KiB to 64 KiB.
pub(super) fn default_granularity(cluster: Option<u64>) -> u32 {
    cluster.map_or(MOST, |cluster| {
        cluster.clamp(LEAST.into(), MOST.into()) as u32
    })
}

const LEAST: u32 = 4 << 10;
const MOST: u32 = 64 << 10;
/// `BDRV_BITMAP_MAX_NAME_SIZE`.
const LONGEST_NAME: usize = 1023;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn error(name: &str, granularity: u32) -> String {
        Bitmap::new(name, granularity, 1 << 20)
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn what_is_no_bitmap_is_refused_in_qmps_words() {
        assert_eq!(error("", 512), "Bitmap name cannot be empty");
        for granularity in [0, 1, 256, 513, 0xffff_ffff] {
            let text = "Granularity must be power of 2 and at least 512";
            assert_eq!(error("b", granularity), text);
        }
        let error_of = |len| Bitmap::new("b", 512, len).unwrap_err().to_string();
        assert_eq!(
            error_of(1 << 63),
            "Bitmap 'b' would need 2251799813685248 bytes of memory, which can not be had"
        );
        let long = "x".repeat(1024);
        assert_eq!(error(&long, 512), format!("Bitmap name too long: {long}"));
        assert!(Bitmap::new(&long[1..], 1 << 31, 1 << 20).is_ok());
    }

    #[test]
    fn one_bitmap_of_a_name() {
        let bitmaps = Bitmaps::default();
        let add = |name| bitmaps.add(Bitmap::new(name, 512, 4096).unwrap());
        let said = |result: Result<(), BitmapError>| result.unwrap_err().to_string();
        add("b0").unwrap();
        add("b1").unwrap();
        assert_eq!(said(add("b0")), "Bitmap already exists: b0");
        let names: Vec<_> = bitmaps.info().into_iter().map(|info| info.name).collect();
        assert_eq!(names, ["b1", "b0"]);
        bitmaps.with("b0", |bitmap| bitmap.is_busy = true).unwrap();
        assert!(bitmaps.is_busy());
        let busy = "Bitmap 'b0' is currently in use by another operation and cannot be used";
        assert_eq!(said(bitmaps.remove("b0")), busy);
        assert_eq!(said(bitmaps.change("b0", Bitmap::clear)), busy);
        assert_eq!(said(bitmaps.remove("b2")), "Dirty bitmap 'b2' not found");
        bitmaps.remove("b1").unwrap();
        bitmaps.drop_any("b0");
        assert!(bitmaps.info().is_empty() && !bitmaps.is_any.load(Ordering::SeqCst));
    }

    #[test]
    fn a_bitmap_that_is_disabled_notes_nothing() {
        let bitmaps = Bitmaps::default();
        bitmaps.add(Bitmap::new("b", 512, 4096).unwrap()).unwrap();
        bitmaps.mark(0, 1);
        bitmaps
            .with("b", |bitmap| bitmap.is_enabled = false)
            .unwrap();
        bitmaps.mark(512, 1);
        assert_eq!(bitmaps.info()[0].dirty, 512);
        bitmaps.with("b", Bitmap::clear).unwrap();
        assert_eq!(bitmaps.info()[0].dirty, 0);
    }

    #[test]
    fn those_of_an_older_drive_are_taken_over() {
        let (old, new) = (Bitmaps::default(), Bitmaps::default());
        for name in ["a", "b", "c"] {
            old.add(Bitmap::new(name, 512, 4096).unwrap()).unwrap();
        }
        old.with("b", |bitmap| bitmap.is_busy = true).unwrap();
        old.mark(0, 4096);
        new.add(Bitmap::new("a", 1024, 4096).unwrap()).unwrap();
        new.adopt(&old);
        let infos: Vec<_> = new
            .info()
            .into_iter()
            .map(|info| (info.name, info.dirty))
            .collect();
        assert_eq!(infos, [("c".to_owned(), 4096), ("a".to_owned(), 0)]);
    }

    #[test]
    fn granularity_is_that_of_the_clusters() {
        for (cluster, granularity) in [
            (None, 65536),
            (Some(512), 4096),
            (Some(8192), 8192),
            (Some(2 << 20), 65536),
        ] {
            assert_eq!(default_granularity(cluster), granularity);
        }
    }

    proptest! {
        /// Against a set of granules.
        #[test]
        fn marks_loads_and_lengths_are_those_of_a_set(
            bits in 9u32..14,
            len in 1u64..400,
            steps in proptest::collection::vec((0u8..3, any::<u32>(), 0u64..70_000), 0..40),
        ) {
            let granularity = 1u64 << bits;
            let mut len = len * SECTOR;
            let mut bitmap = Bitmap::new("b", 1 << bits, len).unwrap();
            let mut model = BTreeSet::new();
            for (step, at, count) in steps {
                let at = u64::from(at) % len.max(1);
                match step {
                    0 => {
                        bitmap.mark(at, count);
                        let end = (at + count).min(len);
                        model.extend((at..end).map(|byte| byte / granularity));
                    }
                    1 => {
                        len = (count / 64) * SECTOR;
                        bitmap.resize(len);
                        model.retain(|granule| granule * granularity < len);
                    }
                    _ => {
                        let first = (at / granularity / 64) as usize;
                        let is_there = first < bitmap.words().len();
                        // A bit that every word has.
                        prop_assert_eq!(bitmap.load(first, &[1]), is_there);
                        let range = first as u64 * 64..(first as u64 + 1) * 64;
                        model.retain(|granule| !range.contains(granule));
                        model.extend(is_there.then_some(range.start));
                    }
                }
                let set: BTreeSet<u64> = (0..bitmap.words().len() as u64 * 64)
                    .filter(|bit| bitmap.words()[(bit / 64) as usize] >> (bit % 64) & 1 == 1)
                    .collect();
                prop_assert_eq!(&set, &model);
                prop_assert_eq!(bitmap.dirty(), model.len() as u64 * granularity);
            }
        }

        #[test]
        fn bits_that_stand_for_nothing_are_refused(granules in 1u64..200, first in 0usize..5, bit in 0u64..64) {
            let mut bitmap = Bitmap::new("b", 512, granules * 512).unwrap();
            let is_there = first as u64 * 64 + bit < granules;
            prop_assert_eq!(bitmap.load(first, &[1 << bit]), is_there);
            prop_assert_eq!(bitmap.dirty(), u64::from(is_there) * 512);
        }
    }
}
