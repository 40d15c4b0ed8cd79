//! The first line of a translated page: which English text it is a translation of.

use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use lab::{
    book::{Language, resolve},
    workspace::{self, read, shown},
};
use sha2::{Digest as _, Sha256};

/// The stamp for a translation of this English text.
pub fn of(english: &str) -> String {
    let digest = Sha256::digest(english);
    let mut hash = String::new();
    for byte in &digest[..6] {
        // Writing to a string cannot fail.
        let _ = write!(hash, "{byte:02x}");
    }
    format!("<!-- en: {hash} -->")
}

/// Has this line the form of a stamp?
pub fn is_stamp(line: &str) -> bool {
    line.starts_with("<!-- en: ") && line.ends_with(" -->")
}

/// The English page that a Chinese one translates: the same path in the other
/// book. None if the path is not in the Chinese book.
pub fn original(root: &Path, page: &Path) -> Option<PathBuf> {
    let path = page
        .strip_prefix(Language::Chinese.pages_folder(root))
        .ok()?;
    Some(Language::English.pages_folder(root).join(path))
}

/// Writes the stamp into the first line of a Chinese page, whose path is relative
/// to the root or absolute.
pub fn write(root: &Path, page: &Path) -> Result<()> {
    let page = resolve(&root.join("here"), &page.to_string_lossy());
    let name = shown(root, &page);
    let english = original(root, &page).with_context(|| {
        format!("{name} is not a page of docs/zh-CN/src; only those have a stamp")
    })?;
    let text = read(&page)?;
    let rest = match text.split_once('\n') {
        Some((first, rest)) if is_stamp(first) => rest,
        _ => text.as_str(),
    };
    let stamped = format!("{}\n{rest}", of(&read(&english)?));
    if workspace::write(&page, &stamped)? {
        println!("{name} is stamped as up to date");
    } else {
        println!("{name} was up to date");
    }
    Ok(())
}
