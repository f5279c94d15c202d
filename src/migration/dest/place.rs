//! Where in the stream the destination is, for whoever has to find out what went wrong there.

use crate::migration::Error;
use crate::migration::channel::Fault;

/// What has been read, and what is being read.
#[derive(Default)]
pub(super) struct Place {
    here: Option<Here>,
    passed: Vec<Stretch>,
}

struct Here {
    what: String,
    from: u64,
    is_over: bool,
}

/// What lies between two marks of the hash.
struct Stretch {
    what: String,
    end: u64,
}

impl Place {
    /// The next thing begins at that offset.
    pub(super) fn enter(&mut self, what: String, from: u64) {
        let is_over = false;
        self.here = Some(Here {
            what,
            from,
            is_over,
        });
    }

    /// It is over.
    pub(super) fn leave(&mut self) {
        if let Some(here) = &mut self.here {
            here.is_over = true;
        }
    }

    /// A mark of the hash is at that offset.
    pub(super) fn mark(&mut self, end: u64) {
        let what = self.here.as_ref().map_or("", |here| &here.what).to_owned();
        self.passed.push(Stretch { what, end });
    }

    /// Nothing more is read: what fails now does not fail at a place.
    pub(super) fn forget(&mut self) {
        self.here = None;
    }

    /// An error with the place where it came up; `position` bytes have been read.
    pub(super) fn of(&self, error: Error, position: u64) -> Error {
        let Some(here) = &self.here else { return error };
        if matches!(error, Error::Channel(Fault::Cancelled) | Error::Peer(_)) {
            return error;
        }
        let Here { what, from, .. } = here;
        Error::Stream(match here.is_over {
            true => format!("{error} (after {what}, at byte {position:#x})"),
            false => format!("{error} ({what} from byte {from:#x}, read up to {position:#x})"),
        })
    }

    /// Where two hashes began to differ, of which these are the marks; `end` is where they end.
    pub(super) fn of_damage(&self, theirs: &[u32], ours: &[u32], end: u64) -> String {
        let same = theirs.iter().zip(ours).take_while(|(a, b)| a == b).count();
        let from = match same {
            0 => 0,
            n => self.passed.get(n - 1).map_or(0, |before| before.end),
        };
        match self.passed.get(same) {
            Some(Stretch { what, end }) => format!("{what}, between bytes {from:#x} and {end:#x}"),
            None => format!("the end, between bytes {from:#x} and {end:#x}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place() -> Place {
        let mut place = Place::default();
        place.enter("header".to_owned(), 0);
        place.mark(0x14);
        place.enter("section 'toy' 1".to_owned(), 0x14);
        place
    }

    #[test]
    fn an_error_is_told_with_its_place() {
        let mut place = place();
        let told = |place: &Place| place.of(Error::stream("Bad"), 0x20).to_string();
        assert_eq!(
            told(&place),
            "Bad (section 'toy' 1 from byte 0x14, read up to 0x20)"
        );
        place.leave();
        assert_eq!(told(&place), "Bad (after section 'toy' 1, at byte 0x20)");
        assert!(place.of(Fault::Cancelled.into(), 0x20).is_cancel());
        place.forget();
        assert_eq!(told(&place), "Bad");
    }

    #[test]
    fn damage_lies_before_the_first_mark_that_differs() {
        let mut place = place();
        place.mark(0x30);
        let damage = |theirs: &[u32]| place.of_damage(theirs, &[1, 2], 0x31);
        assert_eq!(damage(&[0, 0]), "header, between bytes 0x0 and 0x14");
        assert_eq!(
            damage(&[1, 0]),
            "section 'toy' 1, between bytes 0x14 and 0x30"
        );
        assert_eq!(damage(&[1, 2]), "the end, between bytes 0x30 and 0x31");
        assert_eq!(damage(&[]), "header, between bytes 0x0 and 0x14");
    }
}
