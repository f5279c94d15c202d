//! The ring between guest and device: virtio 1.0 §2.4, wherever its parts are.
//!
//! The guest can write anything there. What can not be right breaks the device, as it breaks
//! QEMU's: it does nothing more until the guest resets it. The virtio-queue crate takes a bad
//! chain for one that ends, knows no interrupt flag and can not take up a request by its number;
//! all three must be as in QEMU for a guest that moves, so the walk is ours.

use std::sync::atomic::{Ordering, fence};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, VolatileSlice};

use super::Memory;
use super::modern::Proposal;
use super::queue::{DESCRIPTOR, Queue};
use super::registers::ENTRIES;
use super::{EVENT_IDX, NOTIFY_ON_EMPTY};
use crate::vm::page_bits::Marks;

/// Part of a request's memory.
pub(super) type Piece<'a> = VolatileSlice<'a, Marks<'a>>;

/// Why a ring is of no use any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Broken(pub(super) String);

/// Result of looking into a ring.
pub(super) type Result<T = ()> = std::result::Result<T, Broken>;

/// A queue in use.
#[derive(Debug)]
pub(super) struct Ring {
    queue: Queue,
    avail: u64,
    used: u64,
    /// Index of the next used entry.
    next_used: u16,
    /// The used index the guest was last told of.
    signalled: Option<u16>,
    features: u64,
}

/// A request: what the guest has to say, and where it wants its answer.
#[derive(Debug, Default)]
pub(super) struct Chain<'a> {
    /// Where it is, also after it was executed.
    pub(super) element: Element,
    /// For the device to read.
    pub(super) readable: Vec<Piece<'a>>,
    /// For the device to write.
    pub(super) writable: Vec<Piece<'a>>,
}

/// A request that was taken, by guest-physical address and length of its parts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Element {
    /// Its first descriptor.
    pub(super) head: u16,
    /// For the device to read.
    pub(super) readable: Vec<(u64, u64)>,
    /// For the device to write.
    pub(super) writable: Vec<(u64, u64)>,
}

/// Most pieces of a request.
const PIECES: usize = 1024;
/// Descriptor flags: there is another one; the device writes; it is a table.
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// Ring flags: no interrupt, no kick wanted.
const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;

impl Ring {
    /// A ring that is nowhere yet.
    pub(super) fn new(queue: Queue) -> Self {
        let mut ring = Self {
            queue,
            avail: 0,
            used: 0,
            next_used: 0,
            signalled: None,
            features: 0,
        };
        ring.lay_out();
        ring
    }

    /// Goes on in the middle of its work, as the memory it lies in says.
    pub(super) fn resume(&mut self, memory: &Memory) -> Result {
        if !self.is_set() {
            return Ok(());
        }
        self.check(memory)?;
        let Queue {
            num, last_avail, ..
        } = self.queue;
        let guest = self.avail_index(memory)?;
        let delta = guest.wrapping_sub(last_avail);
        if u32::from(delta) > num {
            return Err(Broken(format!(
                "VQ 0 size {num:#x} Guest index {guest:#x} inconsistent with Host index \
                 {last_avail:#x}: delta {delta:#x}"
            )));
        }
        self.next_used = load(memory, at(self.used, 2))?;
        Ok(())
    }

    /// Whether a ring that goes on has no more requests under way than entries; the text says how
    /// many.
    pub(super) fn check_under_way(&self) -> std::result::Result<(), String> {
        let (num, last, used) = (self.queue.num, self.queue.last_avail, self.next_used);
        match self.is_set() && u32::from(last.wrapping_sub(used)) > num {
            true => Err(format!(
                "VQ 0 size {num:#x} < last_avail_idx {last:#x} - used_idx {used:#x}"
            )),
            false => Ok(()),
        }
    }

    /// Where it is.
    pub(super) fn queue(&self) -> &Queue {
        &self.queue
    }

    /// Whether the guest has put it somewhere where it is to be used.
    pub(super) fn is_set(&self) -> bool {
        self.queue.is_set()
    }

    /// Whether the guest has said by the present interface that it is to be used.
    pub(super) fn is_ready(&self) -> bool {
        let rings = self.queue.rings.as_ref();
        rings.is_some_and(|rings| rings.is_ready)
    }

    /// Tells what guest and device agreed on.
    pub(super) fn set_features(&mut self, features: u64) {
        self.features = features;
    }

    /// Changes the number of entries; one that can not be is ignored.
    pub(super) fn set_num(&mut self, num: u32) {
        if (1..=ENTRIES).contains(&num) {
            self.queue.num = num;
            self.lay_out();
        }
    }

    /// Changes the alignment of the used ring.
    pub(super) fn set_align(&mut self, align: u32) {
        if align != 0 {
            self.queue.align = align;
            self.lay_out();
        }
    }

    /// Puts the ring at a guest-physical address.
    pub(super) fn set_address(&mut self, desc: u64) {
        self.queue.desc = desc;
        self.lay_out();
    }

    /// Puts the ring where the guest has proposed.
    pub(super) fn accept(&mut self, proposal: &Proposal) {
        self.set_num(proposal.num.into());
        self.queue.accept(proposal);
        self.lay_out();
    }

    /// Whether all of a ring that is in use is RAM, with the words behind it that features add.
    pub(super) fn check(&self, memory: &Memory) -> Result {
        match self.is_set() {
            true => self.queue.check(self.features, memory),
            false => Ok(()),
        }
    }

    /// Leaves the ring alone from now on: its memory may be used for something else. (QEMU would
    /// look into it again at the next kick.)
    pub(super) fn retire(&mut self) {
        if let Some(rings) = &mut self.queue.rings {
            rings.is_ready = false;
        }
    }

    fn lay_out(&mut self) {
        (self.avail, self.used) = self.queue.rings();
    }

    fn has(&self, feature: u64) -> bool {
        self.features & feature != 0
    }

    fn avail_index(&self, memory: &Memory) -> Result<u16> {
        load(memory, at(self.avail, 2))
    }

    /// Takes the next request into `chain`; `false` if there is none.
    pub(super) fn pop<'a>(&mut self, memory: &'a Memory, chain: &mut Chain<'a>) -> Result<bool> {
        let (guest, last) = (self.avail_index(memory)?, self.queue.last_avail);
        let waiting = guest.wrapping_sub(last);
        if u32::from(waiting) > self.queue.num {
            return Err(Broken(format!(
                "Guest moved used index from {last} to {guest}"
            )));
        }
        if waiting == 0 {
            return Ok(false);
        }
        let place = u64::from(u32::from(last) % self.queue.num);
        let head = load(memory, at(self.avail, 4 + 2 * place))?;
        self.take(head, memory, chain)?;
        self.queue.last_avail = last.wrapping_add(1);
        Ok(true)
    }

    /// Takes the request that begins at descriptor `head` into `chain`.
    pub(super) fn take<'a>(&self, head: u16, memory: &'a Memory, chain: &mut Chain<'a>) -> Result {
        chain.clear(head);
        self.walk(head, memory, |descriptor| chain.add(descriptor, memory))
    }

    /// Shows the descriptors of a request.
    fn walk(
        &self,
        head: u16,
        memory: &Memory,
        mut visit: impl FnMut(&Descriptor) -> Result,
    ) -> Result {
        if u32::from(head) >= self.queue.num {
            return Err(Broken(format!("Guest says index {head} is available")));
        }
        let mut table = (self.queue.desc, self.queue.num);
        let mut descriptor = Descriptor::read(memory, table.0, head.into())?;
        if descriptor.flags & INDIRECT != 0 {
            let len = descriptor.len;
            if len == 0 || !u64::from(len).is_multiple_of(DESCRIPTOR) {
                return Err(broken("Invalid size for indirect buffer table"));
            }
            table = (descriptor.address, len / DESCRIPTOR as u32);
            descriptor = Descriptor::read(memory, table.0, 0)?;
        }
        let mut count = 0;
        loop {
            visit(&descriptor)?;
            count += 1;
            if descriptor.flags & NEXT == 0 {
                return Ok(());
            }
            if count >= table.1 {
                return Err(broken("Looped descriptor"));
            }
            let next = u32::from(descriptor.next);
            if next >= table.1 {
                return Err(Broken(format!("Desc next is {next}")));
            }
            descriptor = Descriptor::read(memory, table.0, next)?;
        }
    }

    /// Whether a request waits.
    fn has_more(&self, memory: &Memory) -> Result<bool> {
        Ok(self.avail_index(memory)? != self.queue.last_avail)
    }

    /// Gives a request back with `len` bytes written.
    pub(super) fn push(&mut self, memory: &Memory, head: u16, len: u32) -> Result {
        let place = u64::from(u32::from(self.next_used) % self.queue.num);
        let entry = [u32::from(head).to_le(), len.to_le()];
        let address = GuestAddress(at(self.used, 4 + 8 * place));
        memory.write_obj(entry, address).map_err(unmapped)?;
        self.next_used = self.next_used.wrapping_add(1);
        // An index that comes round to what was signalled last says no more what is new since.
        let since = |signalled| self.next_used.wrapping_sub(signalled) as i16;
        self.signalled = self.signalled.filter(|signalled| since(*signalled) > 0);
        // The entry is there before the index says so.
        let index = at(self.used, 2);
        store(memory, index, self.next_used, Ordering::Release)
    }

    /// Whether the guest wants an interrupt for what was given back.
    pub(super) fn wants_interrupt(&mut self, memory: &Memory) -> Result<bool> {
        // Indices are written before what the guest says about them is read.
        fence(Ordering::SeqCst);
        if self.has(NOTIFY_ON_EMPTY)
            && self.next_used == self.queue.last_avail
            && self.avail_index(memory)? == self.queue.last_avail
        {
            return Ok(true);
        }
        if !self.has(EVENT_IDX) {
            return Ok(load(memory, self.avail)? & NO_INTERRUPT == 0);
        }
        let new = self.next_used;
        let Some(old) = self.signalled.replace(new) else {
            return Ok(true);
        };
        let event = load(memory, at(self.avail, 4 + 2 * u64::from(self.queue.num)))?;
        Ok(new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old))
    }

    /// Tells the guest that its requests are seen without a kick.
    pub(super) fn ignore_kicks(&self, memory: &Memory) -> Result {
        if self.has(EVENT_IDX) {
            return Ok(());
        }
        let flags = load(memory, self.used)? | NO_NOTIFY;
        store(memory, self.used, flags, Ordering::Relaxed)
    }

    /// Asks the guest for kicks, and tells whether a request has come meanwhile.
    pub(super) fn want_kicks(&self, memory: &Memory) -> Result<bool> {
        if self.has(EVENT_IDX) {
            let event = at(self.used, 4 + 8 * u64::from(self.queue.num));
            store(memory, event, self.queue.last_avail, Ordering::Relaxed)?;
        } else {
            let flags = load(memory, self.used)? & !NO_NOTIFY;
            store(memory, self.used, flags, Ordering::Relaxed)?;
        }
        fence(Ordering::SeqCst);
        self.has_more(memory)
    }
}

impl<'a> Chain<'a> {
    /// Empty, for the request that begins at descriptor `head`.
    fn clear(&mut self, head: u16) {
        self.readable.clear();
        self.writable.clear();
        self.element.head = head;
        self.element.readable.clear();
        self.element.writable.clear();
    }

    fn add(&mut self, descriptor: &Descriptor, memory: &'a Memory) -> Result {
        if descriptor.len == 0 {
            return Err(broken("virtio: zero sized buffers are not allowed"));
        }
        let (pieces, parts) = if descriptor.flags & WRITE != 0 {
            (&mut self.writable, &mut self.element.writable)
        } else if self.writable.is_empty() {
            (&mut self.readable, &mut self.element.readable)
        } else {
            return Err(broken("Incorrect order for descriptors"));
        };
        parts.push((descriptor.address, descriptor.len.into()));
        let (address, len) = (GuestAddress(descriptor.address), descriptor.len as usize);
        for piece in GuestMemoryBackend::get_slices(memory, address, len) {
            pieces.push(piece.map_err(|_| broken("virtio: bogus descriptor or out of resources"))?);
        }
        if self.readable.len() + self.writable.len() > PIECES {
            return Err(broken("virtio: too many descriptors in one request"));
        }
        Ok(())
    }
}

struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    fn read(memory: &Memory, table: u64, index: u32) -> Result<Self> {
        let place = GuestAddress(at(table, DESCRIPTOR * u64::from(index)));
        let [address, rest]: [u64; 2] = memory.read_obj(place).map_err(unmapped)?;
        let rest = u64::from_le(rest);
        Ok(Self {
            address: u64::from_le(address),
            len: rest as u32,
            flags: (rest >> 32) as u16,
            next: (rest >> 48) as u16,
        })
    }
}

/// An address so far behind another one, which the guest has chosen: it can be any.
fn at(base: u64, offset: u64) -> u64 {
    base.wrapping_add(offset)
}

fn load(memory: &Memory, at: u64) -> Result<u16> {
    let value: u16 = memory
        .load(GuestAddress(at), Ordering::Acquire)
        .map_err(unmapped)?;
    Ok(u16::from_le(value))
}

fn store(memory: &Memory, at: u64, value: u16, order: Ordering) -> Result {
    memory
        .store(value.to_le(), GuestAddress(at), order)
        .map_err(unmapped)
}

fn broken(why: &str) -> Broken {
    Broken(why.to_owned())
}

fn unmapped(error: vm_memory::GuestMemoryError) -> Broken {
    Broken(format!("Cannot map the ring: {error}"))
}
