//! Internal snapshots of a qcow2 file that nobody else has open or changes meanwhile.
//!
//! A snapshot is an L1 table of its own: it keeps the clusters that the disk had, the disk writes
//! to new ones. Its VM state is behind the disk's end in that table, as with QEMU
//! (`block/qcow2-snapshot.c`), which lists our snapshots, keeps them when it changes others and
//! takes them for ones of disks only.
//!
//! Nothing here changes a file in part: `snapshots/change.rs` says how that is done.

mod change;
mod creation;
mod error;
mod header;
mod image;
mod refcounts;
mod storage;
mod table;
mod tree;
mod vm_state;

use self::change::Change;
pub use self::creation::{Creation, New};
pub use self::error::Error;
pub use self::header::Facts;
use self::header::Header;
use self::image::Image;
pub use self::storage::Storage;
pub use self::table::{Snapshot, State};
pub use self::vm_state::VmState;

/// The snapshots of an image, in the order in which they were taken.
///
/// # Errors
/// It can not be read, or is no qcow2 that these functions can handle.
pub fn list<S: Storage>(file: &S) -> Result<Vec<Snapshot>, Error> {
    Ok(Image::open(file)?.snapshots)
}

/// What the image says of itself.
///
/// # Errors
/// It can not be read, or is no qcow2 that these functions can handle.
pub fn facts<S: Storage>(file: &S) -> Result<Facts, Error> {
    Ok(Header::read(file)?.facts())
}

/// The disk may get another size.
///
/// # Errors
/// It may not, or the image is no qcow2 that these functions can handle.
pub fn check_resize<S: Storage>(file: &S) -> Result<(), Error> {
    Header::read(file)?.check_resize()
}

/// Everything that the disk is read and written by is in the file and well: whoever has only
/// followed it can not be led astray. Only reads.
///
/// # Errors
/// What is not well.
pub fn inspect<S: Storage>(file: &S) -> Result<(), Error> {
    let image = Image::open(file)?;
    let mut refcounts = image.refcounts()?;
    tree::check(&image, &mut refcounts, &image.active()?)
}

/// Begins a snapshot of the disk as it is, with what is written to it as its VM state.
///
/// # Errors
/// The image or the name is not one for that.
pub fn create<'f, S: Storage>(file: &'f S, new: &New<'_>) -> Result<Creation<'f, S>, Error> {
    Creation::begin(Image::open(file)?, new)
}

/// Removes the snapshot with that ID.
///
/// # Errors
/// The image is as it was, unless its header could not be written: then it is that or has lost the
/// snapshot.
pub fn delete<S: Storage>(file: &S, id: &str) -> Result<(), Error> {
    let mut change = Change::begin(Image::open(file)?)?;
    let at = change.image.find(id)?;
    let snapshot = change.image.snapshots.remove(at);
    let l1 = change.image.l1(snapshot.l1, snapshot.l1_len)?;
    let mut active = change.image.active()?;
    tree::check(&change.image, &mut change.refcounts, &l1)?;
    tree::check(&change.image, &mut change.refcounts, &active)?;
    tree::count(&mut change, &l1, -1)?;
    change.free(snapshot.l1, u64::from(snapshot.l1_len) * 8)?;
    tree::flag(&mut change, &mut active, 1)?;
    change.tabulate()?;
    change.activate(&active)?;
    change.publish()
}

/// Makes the disk what it was, in size too, when the snapshot with that ID was taken. The snapshot
/// stays; its VM state is not touched.
///
/// # Errors
/// The image is as it was, unless its header could not be written: then it is that or has changed.
pub fn apply<S: Storage>(file: &S, id: &str) -> Result<(), Error> {
    let mut change = Change::begin(Image::open(file)?)?;
    let at = change.image.find(id)?;
    let snapshot = change.image.snapshots[at].clone();
    change.image.check_size(&snapshot)?;
    let (mut disk, _) = change.image.checked(&snapshot, &mut change.refcounts)?;
    let active = change.image.active()?;
    tree::check(&change.image, &mut change.refcounts, &active)?;
    tree::count(&mut change, &active, -1)?;
    tree::count(&mut change, &disk, 1)?;
    tree::flag(&mut change, &mut disk, 1)?;
    change.activate(&disk)?;
    change.image.header.size = change.image.disk_size(&snapshot);
    change.publish()
}

/// Everything that [`apply`] needs of the snapshot with that ID is in the file and well. Only reads.
///
/// # Errors
/// What is not well.
pub fn check<S: Storage>(file: &S, id: &str) -> Result<(), Error> {
    let image = Image::open(file)?;
    let at = image.find(id)?;
    image.check_size(&image.snapshots[at])?;
    let mut refcounts = image.refcounts()?;
    image.checked(&image.snapshots[at], &mut refcounts)?;
    tree::check(&image, &mut refcounts, &image.active()?)
}

/// The VM state of the snapshot with that ID is all there and what was saved: it is read wholly.
/// What the disk is changed to meanwhile does not matter.
///
/// # Errors
/// What is not well.
pub fn check_state<S: Storage>(file: &S, id: &str) -> Result<(), Error> {
    vm_state(file, id)?.map_or(Ok(()), VmState::check)
}

/// The VM state of the snapshot with that ID, to be read; `None` if it is one of disks only.
///
/// # Errors
/// There is no such snapshot, or its tables are not well.
pub fn vm_state<'f, S: Storage>(file: &'f S, id: &str) -> Result<Option<VmState<'f, S>>, Error> {
    let image = Image::open(file)?;
    let at = image.find(id)?;
    VmState::open(image, at)
}
