//! The links of all Markdown files to files and headings of the workspace.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use anyhow::Result;
use lab::{
    book::{self, Language},
    markdown::{Document, Link},
    workspace::{read, shown},
};

use super::Report;

pub fn check(report: &mut Report<'_>) -> Result<()> {
    let mut documents = HashMap::new();
    for path in book::markdown_files(report.root)? {
        let document = Document::parse(&read(&path)?);
        documents.insert(path, document);
    }
    for (path, document) in &documents {
        for link in &document.links {
            if let Some(problem) = problem(report.root, path, link, &documents) {
                report.add(path, link.line, problem);
            }
        }
    }
    Ok(())
}

fn problem(
    root: &Path,
    from: &Path,
    link: &Link,
    documents: &HashMap<PathBuf, Document>,
) -> Option<String> {
    let target = link.target.as_str();
    if target.contains("://") || target.starts_with("mailto:") {
        return None;
    }
    let (file, heading) = match target.split_once('#') {
        Some((file, heading)) => (file, Some(heading)),
        None => (target, None),
    };
    let path = match file {
        "" => from.to_owned(),
        file => book::resolve(from, file),
    };
    let name = shown(root, &path);
    if !path.exists() {
        return Some(format!("there is no {name}; write it or correct the link"));
    }
    if leaves_the_book(root, from, &path) {
        return Some(format!(
            "{name} is not in the built book, where this link leads nowhere; name \
             the file without a link"
        ));
    }
    let heading = heading?;
    let document = documents.get(&path)?;
    let known = document.headings.iter().any(|known| known.id == heading);
    (!known).then(|| {
        let ids: Vec<&str> =
            document.headings.iter().map(|h| h.id.as_str()).collect();
        format!(
            "{name} has no heading #{heading}; it has #{}",
            ids.join(", #")
        )
    })
}

/// A page of the book can link to pages only, of either language.
fn leaves_the_book(root: &Path, from: &Path, to: &Path) -> bool {
    let in_a_book = |path: &Path| {
        Language::ALL
            .iter()
            .any(|language| path.starts_with(language.pages_folder(root)))
    };
    in_a_book(from) && !in_a_book(to)
}
