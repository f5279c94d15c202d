//! What the system said, in `strerror`'s words.
//!
//! Rust appends ` (os error N)` to a system error; QEMU does not, and scripts match its texts.

use std::fmt;
use std::io;

/// Shows an error as `strerror` words it: `No such file or directory`.
pub struct Errno<'a>(pub &'a io::Error);

impl fmt::Display for Errno<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = self.0.to_string();
        let end = match self.0.raw_os_error() {
            Some(_) => text.rfind(" (os error ").unwrap_or(text.len()),
            None => text.len(),
        };
        f.write_str(&text[..end])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_system_error_loses_its_number_and_nothing_else() {
        assert_eq!(
            Errno(&io::Error::from_raw_os_error(2)).to_string(),
            "No such file or directory"
        );
        assert_eq!(
            Errno(&io::Error::other("x (os error 1)")).to_string(),
            "x (os error 1)"
        );
    }
}
