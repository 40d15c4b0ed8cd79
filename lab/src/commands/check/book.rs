//! Both books: includes, fences, translations and tables of contents.

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
};

use anyhow::Result;
use lab::{
    book::{self, Language, Listed, Page},
    markdown::{Document, Fence, Include, includes},
    workspace::{read, shown},
};

use super::{Report, stamp};

pub fn check(report: &mut Report<'_>) -> Result<()> {
    for language in Language::ALL {
        let pages = book::pages(report.root, language)?;
        for page in &pages {
            check_includes(report, page);
            check_code_is_not_pasted(report, page);
            match language {
                Language::English => check_is_translated(report, page),
                Language::Chinese => check_stamp(report, page),
            }
        }
        check_summary(report, language, &pages)?;
    }
    check_same_order(report)
}

fn check_includes(report: &mut Report<'_>, page: &Page) {
    for include in includes(&page.text) {
        if let Some(problem) = include_problem(report.root, page, &include) {
            report.add(&page.path, include.line, problem);
        }
    }
}

/// mdBook itself ends with 0 when a file or an anchor is missing.
fn include_problem(
    root: &Path,
    page: &Page,
    include: &Include<'_>,
) -> Option<String> {
    let file = page.target(include.path);
    let name = shown(root, &file);
    let Ok(text) = read(&file) else {
        return Some(format!("there is no file {name}; correct the include"));
    };
    let anchor = include.anchor?;
    if anchor.starts_with(|first: char| first.is_ascii_digit() || first == ':') {
        return Some(format!(
            "line numbers go stale; put `// ANCHOR: name` and `// ANCHOR_END: \
             name` around the lines in {name}"
        ));
    }
    let mark = ["ANCHOR:", "ANCHOR_END:"]
        .into_iter()
        .find(|mark| !text.lines().any(|line| is_mark(line, mark, anchor)))?;
    Some(format!(
        "{name} has no `{mark} {anchor}`; add it there or correct the include"
    ))
}

fn is_mark(line: &str, mark: &str, anchor: &str) -> bool {
    line.split_once(mark)
        .is_some_and(|(_, rest)| rest.split_whitespace().next() == Some(anchor))
}

fn check_code_is_not_pasted(report: &mut Report<'_>, page: &Page) {
    for fence in Document::parse(&page.text).fences {
        if fence.info.split([',', ' ']).next() == Some("rust")
            && !is_one_include(&fence)
        {
            report.add(
                &page.path,
                fence.line,
                "this code is pasted, so it goes stale; quote it from a compiled \
                 file by {{#include path:anchor}}",
            );
        }
    }
}

fn is_one_include(fence: &Fence) -> bool {
    let text = fence.text.trim();
    includes(text).len() == 1
        && text.starts_with("{{#include")
        && text.find("}}") == Some(text.len() - 2)
}

fn check_is_translated(report: &mut Report<'_>, page: &Page) {
    let english = Language::English.pages_folder(report.root);
    let Ok(path) = page.path.strip_prefix(english) else {
        return;
    };
    let chinese = Language::Chinese.pages_folder(report.root).join(path);
    if !chinese.is_file() {
        let name = shown(report.root, &chinese);
        report.add(&page.path, 1, format!("not translated; write {name}"));
    }
}

fn check_stamp(report: &mut Report<'_>, page: &Page) {
    let Some(original) = stamp::original(report.root, &page.path) else {
        return;
    };
    let name = shown(report.root, &page.path);
    let original_name = shown(report.root, &original);
    let Ok(english) = read(&original) else {
        report.add(
            &page.path,
            1,
            format!("translates nothing: there is no {original_name}; remove one"),
        );
        return;
    };
    let first = page.text.lines().next().unwrap_or_default();
    if first == stamp::of(&english) {
        return;
    }
    let problem = if stamp::is_stamp(first) {
        format!("{original_name} has changed; bring this page up to date, then")
    } else {
        format!("not stamped as a translation of {original_name}; when it is one,")
    };
    report.add(
        &page.path,
        1,
        format!("{problem} run cargo lab check --stamp {name}"),
    );
}

fn check_summary(
    report: &mut Report<'_>,
    language: Language,
    pages: &[Page],
) -> Result<()> {
    let summary = language.summary(report.root);
    let mut seen = HashSet::new();
    for Listed { line, path } in book::listed(report.root, language)? {
        let name = shown(report.root, &path);
        if !seen.insert(path) {
            report.add(&summary, line, format!("{name} is listed a second time"));
        }
    }
    for page in pages.iter().filter(|page| !seen.contains(&page.path)) {
        let name = shown(report.root, &summary);
        report.add(&page.path, 1, format!("not in the book; list it in {name}"));
    }
    Ok(())
}

/// A section has the same number in both books, so that one can change from one
/// language to the other in the middle.
fn check_same_order(report: &mut Report<'_>) -> Result<()> {
    let [english, chinese] =
        Language::ALL.map(|language| relative_order(report.root, language));
    let (english, chinese) = (english?, chinese?);
    let same = english
        .iter()
        .zip(&chinese)
        .take_while(|((_, a), (_, b))| a == b)
        .count();
    if same == english.len() && same == chinese.len() {
        return Ok(());
    }
    let shown_at = |list: &[(usize, PathBuf)]| match list.get(same) {
        Some((_, path)) => path.display().to_string(),
        None => "nothing".to_owned(),
    };
    let text = format!(
        "{} comes here, but {} in the English book; list the pages in one order",
        shown_at(&chinese),
        shown_at(&english),
    );
    let line = chinese
        .get(same)
        .or(chinese.last())
        .map_or(1, |(line, _)| *line);
    let summary = Language::Chinese.summary(report.root);
    report.add(&summary, line, text);
    Ok(())
}

/// The lines of a table of contents, with paths relative to the book.
fn relative_order(root: &Path, language: Language) -> Result<Vec<(usize, PathBuf)>> {
    let folder = language.pages_folder(root);
    Ok(book::listed(root, language)?
        .into_iter()
        .map(|Listed { line, path }| {
            let path = path.strip_prefix(&folder).unwrap_or(&path).to_owned();
            (line, path)
        })
        .collect())
}
