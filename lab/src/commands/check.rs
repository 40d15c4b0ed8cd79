//! `cargo lab check`: does everything that is written agree with the code?

mod book;
mod examples;
mod links;
pub mod stamp;

use std::{
    fmt,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Result;
use lab::{
    book::Language,
    guarantees, svg,
    workspace::{self, files, read, shown},
};

use super::{bench, index, test};

/// Finds what does not agree with the code: headers, recorded outputs, pages,
/// translations, links, the index, the picture in the READMEs, and what shows the
/// results of the benchmark and of the tests of faults.
///
/// Each finding is one line with its file, its line and the way out.
#[derive(clap::Args)]
pub struct Args {
    /// Mark these translated pages as up to date with the English ones
    #[arg(long, value_name = "PAGE", num_args = 1..)]
    stamp: Vec<PathBuf>,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    let root = workspace::root();
    if !args.stamp.is_empty() {
        for page in &args.stamp {
            stamp::write(root, page)?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    let problems = problems(root)?;
    for problem in &problems {
        println!("{problem}");
    }
    match problems.len() {
        0 => {
            println!(
                "✓ examples, outputs, pages, links, index, picture and figures agree"
            );
            Ok(ExitCode::SUCCESS)
        }
        1 => anyhow::bail!("1 problem"),
        count => anyhow::bail!("{count} problems"),
    }
}

/// Something that does not agree with the code.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Problem {
    /// Relative to the root.
    file: String,
    /// Counted from 1.
    line: usize,
    /// What is wrong, and the way out.
    text: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.file, self.line, self.text)
    }
}

/// What has been found so far.
struct Report<'a> {
    root: &'a Path,
    problems: Vec<Problem>,
}

impl Report<'_> {
    fn add(&mut self, file: &Path, line: usize, text: impl Into<String>) {
        self.problems.push(Problem {
            file: shown(self.root, file),
            line,
            text: text.into(),
        });
    }
}

fn problems(root: &Path) -> Result<Vec<Problem>> {
    let mut report = Report {
        root,
        problems: Vec::new(),
    };
    examples::check(&mut report)?;
    book::check(&mut report)?;
    links::check(&mut report)?;
    check_index(&mut report);
    check_picture(&mut report);
    check_summary(&mut report);
    check_bench(&mut report);
    check_guarantees(&mut report);
    check_test_modules(&mut report)?;
    report.problems.sort();
    Ok(report.problems)
}

fn check_index(report: &mut Report<'_>) {
    for language in Language::ALL {
        let readme = report.root.join(language.readme());
        if !readme.is_file() {
            report.add(&readme, 1, "missing; write it, with <!-- lab:index -->");
            continue;
        }
        match index::rendered(report.root, language) {
            Err(error) => report.add(&readme, 1, format!("{error:#}")),
            Ok(text) => {
                let old = read(&readme).unwrap_or_default();
                if let Some(line) = first_difference(&old, &text) {
                    report.add(
                        &readme,
                        line,
                        "a generated part is not up to date; run cargo lab index",
                    );
                }
            }
        }
    }
}

/// The READMEs show the end of `cargo lab test`.
fn check_summary(report: &mut Report<'_>) {
    let recorded = report.root.join("docs/outputs/test.txt");
    if read(&recorded).is_ok_and(|text| !test::tells_of_each_part(&text)) {
        let way_out =
            "not the parts of cargo lab test; run it, then cargo lab record";
        report.add(&recorded, 1, way_out);
    }
}

fn check_picture(report: &mut Report<'_>) {
    let transcript = report.root.join("docs/outputs/demo.txt");
    let picture = transcript.with_extension("svg");
    match read(&transcript) {
        Err(_) => report.add(
            &transcript,
            1,
            "there is no transcript of the demo; run cargo lab record",
        ),
        Ok(text) if read(&picture).is_ok_and(|old| old == svg::render(&text)) => {}
        Ok(_) => report.add(
            &picture,
            1,
            "the picture does not show demo.txt; run cargo lab record --picture",
        ),
    }
}

/// The tables and the picture of a benchmark show its results.
fn check_bench(report: &mut Report<'_>) {
    match bench::problems(report.root) {
        Err(error) => {
            let folder = report.root.join("docs/bench");
            report.add(&folder, 1, format!("cannot be checked: {error:#}"));
        }
        Ok(problems) => {
            for (file, problem) in problems {
                let text = format!("{problem}; run cargo lab bench --render");
                report.add(&report.root.join(file), 1, text);
            }
        }
    }
}

/// The table of guarantees tells of the code that is here.
fn check_guarantees(report: &mut Report<'_>) {
    match guarantees::problems(report.root) {
        Err(error) => {
            let folder = report.root.join("docs/guarantees");
            report.add(&folder, 1, format!("cannot be checked: {error:#}"));
        }
        Ok(problems) => {
            for (file, text) in problems {
                report.add(&file, 1, text);
            }
        }
    }
}

/// Cargo compiles only what `main.rs` names: a forgotten file is a test that
/// never runs.
fn check_test_modules(report: &mut Report<'_>) -> Result<()> {
    let tests = report.root.join("tests");
    if !tests.is_dir() {
        return Ok(());
    }
    for entry in tests.read_dir()? {
        let folder = entry?.path();
        let main = folder.join("main.rs");
        let Ok(text) = read(&main) else {
            continue;
        };
        for file in files(&folder, "rs")? {
            let name = file.file_stem().unwrap_or_default().to_string_lossy();
            let declaration = format!("mod {name};");
            if file != main && !text.lines().any(|line| line == declaration) {
                let main = shown(report.root, &main);
                report.add(
                    &file,
                    1,
                    format!("never compiled; write `{declaration}` into {main}"),
                );
            }
        }
    }
    Ok(())
}

/// The number of the first line that is not the same in both.
fn first_difference(old: &str, new: &str) -> Option<usize> {
    if old == new {
        return None;
    }
    let same = old.lines().zip(new.lines()).take_while(|(a, b)| a == b);
    Some(same.count() + 1)
}
