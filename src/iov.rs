//! Borrowed pieces of memory for gather writes and scatter reads.
//!
//! A migrated page goes from guest memory to `writev` and from `readv` to guest memory without a
//! copy. Guest memory may change under us, so it can not be lent out as `&[u8]`; these wrappers
//! carry the address and the lifetime and nothing else. This file is one of the rooms where
//! `unsafe` may live.
#![expect(unsafe_code, reason = "iovec arrays are raw pointers by definition")]

use std::io::{self, IoSlice, IoSliceMut};
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

/// Most pieces one system call takes (`UIO_MAXIOV`).
pub const MAX_PIECES: usize = 1024;

/// Bytes to be written from, for the lifetime `'a`.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Out<'a>(libc::iovec, PhantomData<&'a [u8]>);

/// Room to be read into, for the lifetime `'a`.
#[repr(transparent)]
pub struct In<'a>(libc::iovec, PhantomData<&'a mut [u8]>);

// SAFETY: an `Out` is a shared borrow of bytes; sending it is sending that borrow.
unsafe impl Send for Out<'_> {}
// SAFETY: an `In` is an exclusive borrow of bytes; sending it is sending that borrow.
unsafe impl Send for In<'_> {}

impl<'a> From<&'a [u8]> for Out<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        Self(
            libc::iovec {
                iov_base: bytes.as_ptr() as *mut _,
                iov_len: bytes.len(),
            },
            PhantomData,
        )
    }
}

impl<'a> From<&'a mut [u8]> for In<'a> {
    fn from(bytes: &'a mut [u8]) -> Self {
        Self(
            libc::iovec {
                iov_base: bytes.as_mut_ptr().cast(),
                iov_len: bytes.len(),
            },
            PhantomData,
        )
    }
}

impl<'a, B: BitmapSlice> From<&VolatileSlice<'a, B>> for Out<'a> {
    fn from(slice: &VolatileSlice<'a, B>) -> Self {
        // SAFETY: a volatile slice is readable for its length during 'a.
        unsafe { Self::from_raw(slice.ptr_guard().as_ptr(), slice.len()) }
    }
}

impl<'a, B: BitmapSlice> From<&VolatileSlice<'a, B>> for In<'a> {
    /// Whoever fills the room marks it dirty in the slice's bitmap afterwards.
    fn from(slice: &VolatileSlice<'a, B>) -> Self {
        // SAFETY: a volatile slice is writable for its length during 'a, and nobody has a
        // reference to its bytes.
        unsafe { Self::from_raw(slice.ptr_guard_mut().as_ptr(), slice.len()) }
    }
}

impl<'a> Out<'a> {
    /// A piece of memory that others may write meanwhile.
    ///
    /// # Safety
    /// `ptr` must be readable for `len` bytes during `'a`.
    pub unsafe fn from_raw(ptr: *const u8, len: usize) -> Self {
        Self(
            libc::iovec {
                iov_base: ptr as *mut _,
                iov_len: len,
            },
            PhantomData,
        )
    }

    /// Length in bytes.
    #[expect(
        clippy::len_without_is_empty,
        reason = "a piece is a span, not a collection"
    )]
    pub fn len(&self) -> usize {
        self.0.iov_len
    }

    /// The same piece without its first `n` bytes (`n` at most its length).
    pub fn skip(self, n: usize) -> Self {
        assert!(n <= self.0.iov_len);
        // SAFETY: n is at most the length, so the pointer stays within the piece or one past it.
        unsafe { Self::from_raw(self.0.iov_base.cast::<u8>().add(n), self.0.iov_len - n) }
    }

    /// The first `n` bytes of the piece (`n` at most its length).
    pub fn first(self, n: usize) -> Self {
        assert!(n <= self.0.iov_len);
        // SAFETY: the first n bytes of what is readable are readable.
        unsafe { Self::from_raw(self.0.iov_base.cast::<u8>(), n) }
    }

    /// Appends the piece's bytes to `to` (in-memory channels; sockets use [`write()`]).
    pub fn copy_to(&self, to: &mut Vec<u8>) {
        to.reserve(self.0.iov_len);
        // SAFETY: the source is readable for iov_len bytes (constructor), the target has been
        // reserved, and the two can not overlap: `to` owns its buffer.
        unsafe {
            std::ptr::copy_nonoverlapping(
                self.0.iov_base.cast::<u8>(),
                to.as_mut_ptr().add(to.len()),
                self.0.iov_len,
            );
            to.set_len(to.len() + self.0.iov_len);
        }
    }
}

impl Out<'_> {
    /// Whether all of its bytes are zero.
    pub fn is_zero(&self) -> bool {
        as_slices(std::slice::from_ref(self))
            .iter()
            .all(|slice| slice.iter().all(|byte| *byte == 0))
    }
}

impl<'a> In<'a> {
    /// Room in memory that others may read or write meanwhile.
    ///
    /// # Safety
    /// `ptr` must be writable for `len` bytes during `'a`, and only through raw pointers
    /// elsewhere.
    pub unsafe fn from_raw(ptr: *mut u8, len: usize) -> Self {
        Self(
            libc::iovec {
                iov_base: ptr.cast(),
                iov_len: len,
            },
            PhantomData,
        )
    }

    /// Length in bytes.
    #[expect(
        clippy::len_without_is_empty,
        reason = "a room is a span, not a collection"
    )]
    pub fn len(&self) -> usize {
        self.0.iov_len
    }

    /// The same room without its first `n` bytes (`n` at most its length).
    pub fn skip(self, n: usize) -> Self {
        assert!(n <= self.0.iov_len);
        // SAFETY: n is at most the length, so the pointer stays within the room or one past it;
        // `self` is consumed, so the room is still borrowed once.
        unsafe { Self::from_raw(self.0.iov_base.cast::<u8>().add(n), self.0.iov_len - n) }
    }

    /// Makes all of the room zero.
    pub fn zero(&mut self) {
        // SAFETY: the room is writable for iov_len bytes.
        unsafe { std::ptr::write_bytes(self.0.iov_base.cast::<u8>(), 0, self.0.iov_len) };
    }

    /// Fills the room's first bytes from `bytes` and tells how many fitted.
    pub fn fill(&mut self, bytes: &[u8]) -> usize {
        let n = bytes.len().min(self.0.iov_len);
        // SAFETY: the room is writable for iov_len >= n bytes; `bytes` is a live slice of others.
        unsafe { std::ptr::copy(bytes.as_ptr(), self.0.iov_base.cast::<u8>(), n) };
        n
    }
}

/// Drops the first `count` bytes of pieces or rooms, of which `len` and `skip` are the methods.
pub fn advance<T>(spans: &mut Vec<T>, count: usize, len: fn(&T) -> usize, skip: fn(T, usize) -> T) {
    let mut rest = count;
    let is_done = |span: &&T| {
        let is_done = len(span) <= rest;
        rest -= if is_done { len(span) } else { 0 };
        is_done
    };
    let done = spans.iter().take_while(is_done).count();
    spans.drain(..done);
    if rest > 0 && !spans.is_empty() {
        let first = spans.remove(0);
        spans.insert(0, skip(first, rest));
    }
}

/// The pieces for a library that takes the standard library's, none of them empty.
pub fn as_slices<'a>(pieces: &'a [Out<'_>]) -> Vec<IoSlice<'a>> {
    let pieces = pieces.iter().filter(|piece| piece.len() > 0);
    let slice = |piece: &'a Out<'_>| {
        // SAFETY: the span is readable by construction. Of guest memory, which may change under us
        // (vm-memory's users lend it in the same way), only bytes are read, never values of which
        // anything else depends.
        let bytes =
            unsafe { std::slice::from_raw_parts(piece.0.iov_base.cast::<u8>(), piece.0.iov_len) };
        IoSlice::new(bytes)
    };
    pieces.map(slice).collect()
}

/// The rooms for a library that takes the standard library's, none of them empty.
pub fn as_slices_mut<'a>(rooms: &'a mut [In<'_>]) -> Vec<IoSliceMut<'a>> {
    let rooms = rooms.iter_mut().filter(|room| room.len() > 0);
    let slice = |room: &'a mut In<'_>| {
        // SAFETY: the span is writable by construction, and lent out once: the room is borrowed.
        // Guest memory may change under us; see `as_slices`.
        let bytes =
            unsafe { std::slice::from_raw_parts_mut(room.0.iov_base.cast::<u8>(), room.0.iov_len) };
        IoSliceMut::new(bytes)
    };
    rooms.map(slice).collect()
}

/// `writev(2)`: returns the number of bytes the descriptor took. At most [`MAX_PIECES`] are used.
pub fn write(fd: BorrowedFd<'_>, pieces: &[Out<'_>]) -> io::Result<usize> {
    let count = pieces.len().min(MAX_PIECES) as libc::c_int;
    // SAFETY: Out is a transparent iovec whose span is readable by construction.
    let n = unsafe { libc::writev(fd.as_raw_fd(), pieces.as_ptr().cast(), count) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// `pwritev(2)`: as [`write()`], at `offset` bytes into a file.
pub fn write_at(fd: BorrowedFd<'_>, pieces: &[Out<'_>], offset: u64) -> io::Result<usize> {
    let count = pieces.len().min(MAX_PIECES) as libc::c_int;
    let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
    // SAFETY: Out is a transparent iovec whose span is readable by construction.
    let n = unsafe { libc::pwritev(fd.as_raw_fd(), pieces.as_ptr().cast(), count, offset) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// `preadv(2)`: as [`read`], from `offset` bytes into a file.
pub fn read_at(fd: BorrowedFd<'_>, rooms: &mut [In<'_>], offset: u64) -> io::Result<usize> {
    let count = rooms.len().min(MAX_PIECES) as libc::c_int;
    let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
    // SAFETY: In is a transparent iovec whose span is writable by construction.
    let n = unsafe { libc::preadv(fd.as_raw_fd(), rooms.as_ptr().cast(), count, offset) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// `readv(2)`: returns the number of bytes read, 0 at the end. At most [`MAX_PIECES`] are used.
pub fn read(fd: BorrowedFd<'_>, rooms: &mut [In<'_>]) -> io::Result<usize> {
    let count = rooms.len().min(MAX_PIECES) as libc::c_int;
    // SAFETY: In is a transparent iovec whose span is writable by construction.
    let n = unsafe { libc::readv(fd.as_raw_fd(), rooms.as_ptr().cast(), count) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}
