//! RAM on its way in: pages go from the reader's buffer into the incoming machine's fresh memory.
//!
//! Every offset and length is checked against the blocks of this machine before it is used.
//! Contract with the machine: its anonymous blocks read as zero when the migration begins, so a
//! zero page that was never received needs no touch. QEMU: `ram_load_precopy`.

use std::ops::Range;
use std::sync::Arc;

use super::populate::Populator;
use super::{IDSTR, Record, VERSION, Word};
use crate::migration::Error;
use crate::migration::integrity::PageHashes;
use crate::migration::stats::RamStats;
use crate::migration::stream::Reader;
use crate::vm::guest::SectionHeader;
use crate::vm::memory::{PAGE_SIZE, RamBlock, is_zero};

/// The live section `ram`, incoming.
pub struct RamLoad<'a> {
    blocks: &'a [Arc<RamBlock>],
    hashes: Option<PageHashes>,
    current: Option<usize>,
    populator: Populator,
    section_id: Option<u32>,
    is_complete: bool,
    /// Pages received.
    pub stats: RamStats,
}

impl<'a> RamLoad<'a> {
    /// Nothing has arrived.
    pub fn new(blocks: &'a [Arc<RamBlock>]) -> Self {
        let total = blocks.iter().map(|block| block.len()).sum();
        let stats = RamStats {
            total,
            remaining: total,
            ..RamStats::default()
        };
        Self {
            blocks,
            hashes: None,
            current: None,
            populator: Populator::new(),
            section_id: None,
            is_complete: false,
            stats,
        }
    }

    /// START: its header has been read.
    pub fn setup(
        &mut self,
        reader: &mut Reader,
        header: &SectionHeader,
        id: u32,
    ) -> Result<(), Error> {
        if header.version != VERSION {
            let version = header.version;
            let text = format!("savevm: unsupported version {version} for '{IDSTR}' v{VERSION}");
            return Err(Error::Stream(text));
        }
        if self.section_id.replace(id).is_some() {
            return Err(Error::stream("Section 'ram' was started twice"));
        }
        let word = self.word(reader)?;
        if word.record != Record::MemSize {
            return Err(Error::stream(
                "Section 'ram' does not begin with the list of RAM blocks",
            ));
        }
        self.block_list(reader, word.offset)?;
        self.records(reader)
    }

    /// PART or END of the section with that id.
    pub fn load(&mut self, reader: &mut Reader, id: u32, is_end: bool) -> Result<(), Error> {
        if self.section_id != Some(id) {
            return Err(Error::Stream(format!("Unknown savevm section {id}")));
        }
        if self.is_complete {
            return Err(Error::stream("Section 'ram' goes on after its end"));
        }
        self.records(reader)?;
        if is_end {
            self.is_complete = true;
            self.stats.remaining = 0;
            self.blank_the_rest();
        }
        Ok(())
    }

    /// What is missing of the section, for the operator.
    pub fn missing(&self) -> Option<&'static str> {
        match (self.section_id, self.is_complete) {
            (None, _) => Some("start of section 'ram'"),
            (_, false) => Some("end of section 'ram'"),
            _ => None,
        }
    }

    /// Sum of the page hashes.
    pub fn sum(&self) -> u64 {
        self.hashes.as_ref().map_or(0, PageHashes::sum)
    }

    fn word(&self, reader: &mut Reader) -> Result<Word, Error> {
        Word::parse(reader.be64()?).map_err(Error::Stream)
    }

    fn block_list(&mut self, reader: &mut Reader, total: u64) -> Result<(), Error> {
        let mut left = total;
        let mut order = Vec::with_capacity(self.blocks.len());
        while left > 0 {
            let name = reader.cstr()?;
            let length = reader.be64()?;
            let index = self.find(&name)?;
            let expected = self.blocks[index].len();
            if length != expected {
                let text = format!(
                    "Size mismatch: {name}: {length:#x} != {expected:#x}: Invalid argument"
                );
                return Err(Error::Stream(text));
            }
            if order.contains(&index) {
                return Err(Error::Stream(format!("RAM block '{name}' is listed twice")));
            }
            order.push(index);
            left = left.checked_sub(length).ok_or_else(|| {
                Error::Stream(format!("RAM blocks do not add up to {total:#x} bytes"))
            })?;
        }
        let mut all = self.blocks.iter().enumerate();
        if let Some((_, block)) = all.find(|(index, _)| !order.contains(index)) {
            let text = format!(
                "RAM block '{}' is not in the migration stream",
                block.name()
            );
            return Err(Error::Stream(text));
        }
        self.hashes = Some(PageHashes::new(self.blocks, &order));
        Ok(())
    }

    fn records(&mut self, reader: &mut Reader) -> Result<(), Error> {
        loop {
            let word = self.word(reader)?;
            match word.record {
                Record::Eos => return Ok(()),
                Record::MemSize => {
                    return Err(Error::stream("The list of RAM blocks came a second time"));
                }
                Record::Zero => self.zero(reader, word)?,
                Record::Page => self.page(reader, word)?,
            }
        }
    }

    /// Block and page that a record is about.
    #[inline]
    fn place(&mut self, reader: &mut Reader, word: Word) -> Result<(usize, usize), Error> {
        if !word.same_block {
            let name = reader.cstr()?;
            self.current = Some(self.find(&name)?);
        }
        let block = self.current.ok_or_else(|| {
            Error::stream("A RAM page says it is in the same block as the last, and is the first")
        })?;
        let page = usize::try_from(word.offset / PAGE_SIZE as u64).unwrap_or(usize::MAX);
        if page >= self.blocks[block].pages() {
            let name = self.blocks[block].name();
            let text = format!("Illegal RAM offset {:#x} in block '{name}'", word.offset);
            return Err(Error::Stream(text));
        }
        Ok((block, page))
    }

    fn zero(&mut self, reader: &mut Reader, word: Word) -> Result<(), Error> {
        let (block, page) = self.place(reader, word)?;
        let fill = reader.u8()?;
        if fill != 0 {
            return Err(Error::Stream(format!(
                "Found a zero page with value {fill}"
            )));
        }
        self.stats.duplicate += 1;
        self.clear(block, page)
    }

    fn page(&mut self, reader: &mut Reader, word: Word) -> Result<(), Error> {
        let (index, page) = self.place(reader, word)?;
        let content = reader.page()?;
        self.stats.normal += 1;
        if is_zero(content) {
            return self.clear(index, page);
        }
        let hashes = self.hashes.as_mut().ok_or_else(no_list)?;
        hashes.note(index, page, content);
        let block = &self.blocks[index];
        block.page(page).write(content);
        self.populator.received(index, block, page);
        Ok(())
    }

    /// What never held anything else is not touched here: it is zero, or blanked at the end.
    fn clear(&mut self, block: usize, page: usize) -> Result<(), Error> {
        let hashes = self.hashes.as_mut().ok_or_else(no_list)?;
        if !hashes.is_zero(block, page) {
            self.blocks[block].page(page).clear();
            hashes.note_zero(block, page);
        }
        Ok(())
    }

    /// Memory that others back may hold anything where the source had zeros and sent nothing.
    fn blank_the_rest(&mut self) {
        let Some(hashes) = &self.hashes else { return };
        for (index, block) in self
            .blocks
            .iter()
            .enumerate()
            .filter(|(_, b)| !b.is_anonymous())
        {
            let blank = |run: Range<usize>| {
                run.filter(|page| hashes.is_zero(index, *page))
                    .for_each(|page| block.page(page).clear());
            };
            if block.populated(blank).is_err() {
                blank(0..block.pages());
            }
        }
    }

    fn find(&self, name: &str) -> Result<usize, Error> {
        self.blocks
            .iter()
            .position(|block| block.name() == name)
            .ok_or_else(|| {
                let name = name.escape_default();
                Error::Stream(format!(
                    "Unknown ramblock \"{name}\", cannot accept migration"
                ))
            })
    }
}

fn no_list() -> Error {
    Error::stream("A RAM page came before the list of RAM blocks")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migration::memory_channel::Recording;
    use crate::migration::ram::{header, put_block_list, put_eos};
    use crate::migration::section::put_cstr;
    use crate::vm::memory::Backing;
    use proptest::prelude::*;

    const PAGES: [usize; 2] = [70, 3];

    fn blocks() -> Vec<Arc<RamBlock>> {
        let block = |(name, pages): (&str, usize)| {
            Arc::new(RamBlock::new(name, (pages * PAGE_SIZE) as u64, Backing::Anonymous).unwrap())
        };
        ["a", "b"].into_iter().zip(PAGES).map(block).collect()
    }

    fn list(blocks: &[Arc<RamBlock>]) -> Vec<u8> {
        let mut bytes = Vec::new();
        put_block_list(blocks.iter().map(|block| &**block), &mut bytes);
        bytes
    }

    fn record(to: &mut Vec<u8>, record: Record, name: Option<&str>, page: u64, payload: &[u8]) {
        let offset = page * PAGE_SIZE as u64;
        to.extend(
            Word {
                record,
                same_block: name.is_none(),
                offset,
            }
            .compose()
            .to_be_bytes(),
        );
        if let Some(name) = name {
            put_cstr(name, to);
        }
        to.extend(payload);
    }

    /// START, then one END with those bytes, with everything this room says about them.
    fn load(start: &[u8], end: &[u8]) -> Result<(), String> {
        let blocks = blocks();
        let mut ram = RamLoad::new(&blocks);
        let mut reader = Recording::reader(&[start, end].concat());
        let result = ram
            .setup(&mut reader, &header(), 1)
            .and_then(|()| ram.load(&mut reader, 1, true));
        result.map_err(|error| error.to_string())
    }

    fn refusal(end: impl FnOnce(&mut Vec<u8>)) -> String {
        let mut bytes = Vec::new();
        end(&mut bytes);
        put_eos(&mut bytes);
        load(&list(&blocks()), &bytes).expect_err("must be refused")
    }

    #[test]
    fn nothing_is_written_outside_the_blocks() {
        let page = [1; PAGE_SIZE];
        assert_eq!(
            refusal(|to| record(to, Record::Page, Some("b"), 3, &page)),
            "Illegal RAM offset 0x3000 in block 'b'"
        );
        let far = u64::MAX >> 12;
        assert!(refusal(|to| record(to, Record::Zero, Some("a"), far, &[0])).contains("Illegal"));
        assert_eq!(
            refusal(|to| record(to, Record::Page, Some("c\x1b"), 0, &page)),
            "Unknown ramblock \"c\\u{1b}\", cannot accept migration"
        );
        assert!(refusal(|to| record(to, Record::Page, None, 0, &page)).contains("is the first"));
        assert_eq!(
            refusal(|to| record(to, Record::Zero, Some("a"), 0, &[90])),
            "Found a zero page with value 90"
        );
        assert!(refusal(|to| to.extend(list(&blocks()))).contains("a second time"));
    }

    #[test]
    fn the_block_list_must_be_this_machines() {
        let refused = |start: &[u8]| load(start, &[]).expect_err("must be refused");
        let all = blocks();
        let smaller = Arc::new(RamBlock::new("b", 4096, Backing::Anonymous).unwrap());
        assert_eq!(
            refused(&list(&[all[0].clone(), smaller])),
            "Size mismatch: b: 0x1000 != 0x3000: Invalid argument"
        );
        assert_eq!(
            refused(&list(&all[..1])),
            "RAM block 'b' is not in the migration stream"
        );
        let twice = list(&[all[1].clone(), all[1].clone()]);
        assert_eq!(refused(&twice), "RAM block 'b' is listed twice");
        let mut wrong = list(&all);
        wrong[6] -= 0x10;
        assert!(refused(&wrong).contains("do not add up"));
    }

    #[test]
    fn pieces_must_come_in_order() {
        let blocks = blocks();
        let mut reader = Recording::reader(&[0; 64]);
        let mut ram = RamLoad::new(&blocks);
        let error = ram.load(&mut reader, 2, false).unwrap_err().to_string();
        assert_eq!(error, "Unknown savevm section 2");
        let old = SectionHeader {
            version: 5,
            ..header()
        };
        let error = ram.setup(&mut reader, &old, 1).unwrap_err().to_string();
        assert_eq!(error, "savevm: unsupported version 5 for 'ram' v4");
        assert_eq!(ram.missing(), Some("start of section 'ram'"));
    }

    fn records() -> impl Strategy<Value = Vec<(usize, usize, usize, u8)>> {
        // Runs of pages, as they come, and breaks in them: block, first page, length, content.
        proptest::collection::vec((0usize..2, 0usize..70, 1usize..40, 0u8..4), 0..12)
    }

    proptest! {
        #[test]
        fn any_order_of_pages_ends_as_the_last_one_said(
            runs in records(),
            piece in prop_oneof![1usize..20_000, Just(1 << 20)],
        ) {
            let blocks = blocks();
            let mut bytes = list(&blocks);
            let mut model: Vec<Vec<u8>> = PAGES.iter().map(|pages| vec![0; *pages]).collect();
            let mut last = None;
            for (block, first, length, fill) in runs {
                for page in (first..first + length).filter(|page| *page < PAGES[block]) {
                    let name = (last.replace(block) != Some(block)).then(|| blocks[block].name());
                    match fill {
                        3 => record(&mut bytes, Record::Zero, name, page as u64, &[0]),
                        fill => record(&mut bytes, Record::Page, name, page as u64, &[fill; PAGE_SIZE]),
                    }
                    model[block][page] = fill % 3;
                }
            }
            put_eos(&mut bytes);
            let mut reader = Recording::reader_in_pieces(&bytes, piece);
            let mut ram = RamLoad::new(&blocks);
            ram.setup(&mut reader, &header(), 1).unwrap();
            ram.load(&mut reader, 1, true).unwrap();
            let mut hashes = PageHashes::new(&blocks, &[0, 1]);
            let mut content = [0; PAGE_SIZE];
            for (index, pages) in model.iter().enumerate() {
                for (page, fill) in pages.iter().enumerate() {
                    blocks[index].page(page).read(&mut content);
                    prop_assert!(content == [*fill; PAGE_SIZE], "block {} page {}", index, page);
                    if *fill != 0 {
                        hashes.note_live(index, page, &blocks[index].page(page));
                    }
                }
            }
            prop_assert_eq!(ram.sum(), hashes.sum());
        }
    }
}
