//! The book's two languages and their pages.

use std::{
    path::{Component, Path, PathBuf},
    str::FromStr,
};

use anyhow::{Context as _, Result};

use crate::{
    markdown::{self, Document},
    workspace::{files, read},
};

/// A language that the README and the book are written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Language {
    English,
    Chinese,
}

impl Language {
    pub const ALL: [Self; 2] = [Self::English, Self::Chinese];

    /// The name of its folder below `docs`.
    pub fn code(self) -> &'static str {
        match self {
            Self::English => "en",
            Self::Chinese => "zh-CN",
        }
    }

    pub fn readme(self) -> &'static str {
        match self {
            Self::English => "README.md",
            Self::Chinese => "README.zh-CN.md",
        }
    }

    /// The folder with `book.toml`.
    pub fn folder(self, root: &Path) -> PathBuf {
        root.join("docs").join(self.code())
    }

    /// The folder with `SUMMARY.md` and the pages.
    pub fn pages_folder(self, root: &Path) -> PathBuf {
        self.folder(root).join("src")
    }

    /// The table of contents.
    pub fn summary(self, root: &Path) -> PathBuf {
        self.pages_folder(root).join("SUMMARY.md")
    }
}

impl FromStr for Language {
    type Err = String;

    fn from_str(code: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|language| language.code() == code)
            .ok_or_else(|| format!("no book is in {code}; there are en and zh-CN"))
    }
}

/// A page of the book.
#[derive(Debug)]
pub struct Page {
    pub path: PathBuf,
    pub text: String,
}

impl Page {
    /// The file that a relative path on this page means.
    pub fn target(&self, relative: &str) -> PathBuf {
        resolve(&self.path, relative)
    }

    /// Does it quote a marked part of this file?
    pub fn quotes(&self, file: &Path) -> bool {
        markdown::includes(&self.text).iter().any(|include| {
            include.anchor.is_some() && self.target(include.path) == file
        })
    }

    /// Does it include this file, or a part of it?
    pub fn includes(&self, file: &Path) -> bool {
        markdown::includes(&self.text)
            .iter()
            .any(|include| self.target(include.path) == file)
    }

    /// The text of its first heading.
    pub fn heading(&self) -> Option<String> {
        let headings = Document::parse(&self.text).headings;
        headings.into_iter().next().map(|heading| heading.text)
    }
}

/// The pages below the folder of a language, sorted by path, whether or not
/// `SUMMARY.md` lists them.
pub fn pages(root: &Path, language: Language) -> Result<Vec<Page>> {
    let summary = language.summary(root);
    markdown_files(&language.pages_folder(root))?
        .into_iter()
        .filter(|path| *path != summary)
        .map(|path| {
            let text = read(&path)?;
            Ok(Page { path, text })
        })
        .collect()
}

/// The Markdown files below a folder, sorted. Folders whose name begins with a
/// dot are left out, and so is `target`.
pub fn markdown_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = files(folder, "md")?;
    if folder.is_dir() {
        let entries = folder
            .read_dir()
            .with_context(|| format!("cannot list {}", folder.display()))?;
        for entry in entries {
            let entry = entry?;
            let name = entry.file_name();
            let hidden = name.to_string_lossy().starts_with('.');
            if entry.file_type()?.is_dir() && !hidden && name != "target" {
                found.extend(markdown_files(&entry.path())?);
            }
        }
    }
    found.sort();
    Ok(found)
}

/// A page that `SUMMARY.md` lists.
#[derive(Debug, PartialEq, Eq)]
pub struct Listed {
    /// The line of `SUMMARY.md`, counted from 1.
    pub line: usize,
    pub path: PathBuf,
}

/// The pages that `SUMMARY.md` lists, in its order; none if it is missing.
pub fn listed(root: &Path, language: Language) -> Result<Vec<Listed>> {
    let summary = language.summary(root);
    if !summary.is_file() {
        return Ok(Vec::new());
    }
    let links = Document::parse(&read(&summary)?).links;
    Ok(links
        .into_iter()
        .map(|link| Listed {
            line: link.line,
            path: resolve(&summary, &link.target),
        })
        .collect())
}

/// The path that `relative` means in a file, with its `..` worked out, so that it
/// can be compared with a path that was found by looking.
pub fn resolve(file: &Path, relative: &str) -> PathBuf {
    let mut path = file.parent().unwrap_or(file).to_owned();
    for component in Path::new(relative).components() {
        match component {
            Component::ParentDir => {
                path.pop();
            }
            Component::CurDir => {}
            other => path.push(other),
        }
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_relative_path_is_worked_out() {
        let page = Path::new("/w/docs/en/src/kafka/producer.md");
        assert_eq!(
            resolve(page, "../../../../kafka-examples/./x.rs"),
            Path::new("/w/kafka-examples/x.rs")
        );
    }

    #[test]
    fn a_page_quotes_a_file_by_anchor_only() {
        let page = |text: &str| Page {
            path: PathBuf::from("/w/docs/en/src/a.md"),
            text: text.to_owned(),
        };
        let file = Path::new("/w/docs/x.rs");
        assert!(page("{{#include ../../x.rs:main}}").quotes(file));
        assert!(!page("{{#include ../../x.rs}}").quotes(file));
        assert!(!page("{{#include ../x.rs:main}}").quotes(file));
    }
}
