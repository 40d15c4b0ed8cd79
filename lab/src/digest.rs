//! A short name for a text, to see that it has changed.

use std::fmt::Write as _;

use sha2::{Digest as _, Sha256};

/// The first 48 bits of its SHA-256, in hexadecimal digits: enough to see that a text
/// was changed, not to keep somebody from it.
#[must_use]
pub fn short(text: &str) -> String {
    let mut hash = String::new();
    for byte in &Sha256::digest(text)[..6] {
        // Writing to a string cannot fail.
        let _ = write!(hash, "{byte:02x}");
    }
    hash
}
