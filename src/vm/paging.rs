//! Guest-virtual to guest-physical: the page tables as the processor walks them. Pure.

/// Registers that decide how addresses are translated.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Paging {
    /// Paging and protection enable.
    pub(super) cr0: u64,
    /// The root of the tables.
    pub(super) cr3: u64,
    /// PSE and PAE.
    pub(super) cr4: u64,
    /// Long mode active.
    pub(super) efer: u64,
}

/// Translates `address`. `read` reads guest-physical memory, or says that there is none.
/// `None`: not mapped.
pub(super) fn translate(
    paging: &Paging,
    address: u64,
    read: &dyn Fn(u64, &mut [u8]) -> Option<()>,
) -> Option<u64> {
    if paging.cr0 & CR0_PG == 0 {
        // What no processor without paging can say; QEMU's answer.
        return Some(address & REACH);
    }
    if paging.efer & EFER_LMA != 0 {
        let sign = address.cast_signed() >> 47;
        let levels: &[u32] = if paging.cr4 & CR4_LA57 != 0 {
            &[48, 39, 30, 21, 12]
        } else {
            &[39, 30, 21, 12]
        };
        if paging.cr4 & CR4_LA57 == 0 && sign != 0 && sign != -1 {
            return None;
        }
        return walk(paging.cr3 & FRAME, levels, address, read);
    }
    let address = address & u64::from(u32::MAX);
    if paging.cr4 & CR4_PAE != 0 {
        let top = paging.cr3 & 0xffff_ffe0;
        let entry = quad(top + (address >> 30) * 8, read)?;
        return (entry & PRESENT != 0)
            .then(|| walk(entry & FRAME, &[21, 12], address, read))
            .flatten();
    }
    let entry = word((paging.cr3 & 0xffff_f000) + (address >> 22) * 4, read)?;
    if entry & PRESENT == 0 {
        return None;
    }
    if entry & LARGE != 0 && paging.cr4 & CR4_PSE != 0 {
        // PSE-36: bits 13 to 20 of the entry are bits 32 to 39 of the address.
        let high = (entry >> 13 & 0xff) << 32;
        return Some(high | entry & 0xffc0_0000 | address & 0x3f_ffff);
    }
    let entry = word((entry & 0xffff_f000) + (address >> 12 & 0x3ff) * 4, read)?;
    (entry & PRESENT != 0).then_some(entry & 0xffff_f000 | address & 0xfff)
}

/// Walks tables of 512 entries; `levels` are the shifts of the address at each.
fn walk(
    table: u64,
    levels: &[u32],
    address: u64,
    read: &dyn Fn(u64, &mut [u8]) -> Option<()>,
) -> Option<u64> {
    let (shift, rest) = levels.split_first()?;
    let entry = quad(table + (address >> shift & 0x1ff) * 8, read)?;
    if entry & PRESENT == 0 {
        return None;
    }
    let offset = (1 << shift) - 1;
    let is_page = rest.is_empty() || (*shift <= 30 && entry & LARGE != 0);
    if is_page {
        return Some(entry & FRAME & !offset | address & offset);
    }
    walk(entry & FRAME, rest, address, read)
}

fn quad(at: u64, read: &dyn Fn(u64, &mut [u8]) -> Option<()>) -> Option<u64> {
    let mut bytes = [0; 8];
    read(at, &mut bytes).map(|()| u64::from_le_bytes(bytes))
}

fn word(at: u64, read: &dyn Fn(u64, &mut [u8]) -> Option<()>) -> Option<u64> {
    let mut bytes = [0; 4];
    read(at, &mut bytes).map(|()| u64::from(u32::from_le_bytes(bytes)))
}

/// Physical addresses have 52 bits.
const REACH: u64 = (1 << 52) - 1;
const CR0_PG: u64 = 1 << 31;
const CR4_PSE: u64 = 1 << 4;
const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;
const EFER_LMA: u64 = 1 << 10;
const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;
/// Bits of an entry that are an address.
const FRAME: u64 = 0x000f_ffff_ffff_f000;

#[cfg(test)]
mod tests {
    use super::*;

    struct Memory(Vec<u8>);

    impl Memory {
        fn new() -> Self {
            Self(vec![0; 0x10000])
        }

        fn put<const N: usize>(&mut self, at: usize, bytes: [u8; N]) {
            self.0[at..at + N].copy_from_slice(&bytes);
        }

        fn translate(&self, paging: &Paging, address: u64) -> Option<u64> {
            translate(paging, address, &|at, to| {
                let at = usize::try_from(at).ok()?;
                to.copy_from_slice(self.0.get(at..at + to.len())?);
                Some(())
            })
        }
    }

    #[test]
    fn without_paging_addresses_stand_for_themselves() {
        assert_eq!(
            Memory::new().translate(&Paging::default(), 0x1234_5678),
            Some(0x1234_5678)
        );
        // Nothing wraps: beyond memory there is none.
        assert_eq!(
            Memory::new().translate(&Paging::default(), 1 << 32),
            Some(1 << 32)
        );
        assert_eq!(
            Memory::new().translate(&Paging::default(), u64::MAX),
            Some(0xf_ffff_ffff_ffff)
        );
    }

    #[test]
    fn four_levels_with_all_page_sizes() {
        let mut memory = Memory::new();
        let paging = Paging {
            cr0: CR0_PG | 1,
            cr3: 0x1000,
            cr4: CR4_PAE,
            efer: EFER_LMA,
        };
        memory.put(0x1000, 0x2003u64.to_le_bytes());
        memory.put(0x1000 + 511 * 8, 0x2003u64.to_le_bytes());
        memory.put(0x2000, 0x3003u64.to_le_bytes());
        memory.put(0x2008, (5 << 30 | 0x83u64).to_le_bytes());
        memory.put(0x3000, 0x4003u64.to_le_bytes());
        memory.put(0x3008, (0x60_0000 | 0x83u64).to_le_bytes());
        memory.put(0x4000 + 3 * 8, (1 << 63 | 0x7000 | 3u64).to_le_bytes());
        assert_eq!(memory.translate(&paging, 0x3abc), Some(0x7abc));
        assert_eq!(memory.translate(&paging, 0x2000), None);
        assert_eq!(memory.translate(&paging, 0x21_2345), Some(0x61_2345));
        assert_eq!(
            memory.translate(&paging, 0x4012_3456),
            Some(5 << 30 | 0x12_3456)
        );
        assert_eq!(
            memory.translate(&paging, 0xffff_ff80_0000_3abc),
            Some(0x7abc)
        );
        assert_eq!(
            memory.translate(&paging, 0x0000_ff80_0000_3abc),
            None,
            "not canonical"
        );
        assert_eq!(memory.translate(&paging, 0x8000_0000), None);
    }

    #[test]
    fn pae_and_two_levels() {
        let mut memory = Memory::new();
        memory.put(0x1008, 0x2001u64.to_le_bytes());
        memory.put(0x2000, 0x3001u64.to_le_bytes());
        memory.put(0x3008, 0x1_0000_5001u64.to_le_bytes());
        let pae = Paging {
            cr0: CR0_PG | 1,
            cr3: 0x1000,
            cr4: CR4_PAE,
            efer: 0,
        };
        assert_eq!(memory.translate(&pae, 0x4000_1fff), Some(0x1_0000_5fff));
        assert_eq!(memory.translate(&pae, 0x1fff), None);

        let mut memory = Memory::new();
        memory.put(0x1004, 0x2001u32.to_le_bytes());
        memory.put(0x1008, (0x0080_0081u32 | 1 << 13).to_le_bytes());
        memory.put(0x2004, 0x9001u32.to_le_bytes());
        let two = Paging {
            cr0: CR0_PG | 1,
            cr3: 0x1000,
            cr4: CR4_PSE,
            efer: 0,
        };
        assert_eq!(memory.translate(&two, 0x40_1234), Some(0x9234));
        assert_eq!(memory.translate(&two, 0x81_2345), Some(0x1_0081_2345));
        assert_eq!(memory.translate(&two, 0x1000), None);
    }

    #[test]
    fn tables_outside_memory_map_nothing() {
        let paging = Paging {
            cr0: CR0_PG,
            cr3: 0xfff0_0000,
            cr4: 0,
            efer: EFER_LMA,
        };
        assert_eq!(Memory::new().translate(&paging, 0), None);
    }
}
