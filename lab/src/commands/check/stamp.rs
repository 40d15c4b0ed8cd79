//! The first line of a translated page: which English text it is a translation of.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use lab::{
    book::{Language, resolve},
    digest,
    workspace::{self, read, shown},
};

/// The stamp for a translation of this English text.
pub fn of(english: &str) -> String {
    format!("<!-- en: {} -->", digest::short(english))
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
