//! Each example: its header, its recorded output, its page in both languages.

use anyhow::Result;
use lab::{
    book::{self, Language},
    header::{self, Header},
    workspace::{self, Source, files, read, shown},
};

use super::Report;

pub fn check(report: &mut Report<'_>) -> Result<()> {
    let sources = workspace::sources_in(report.root)?;
    for source in &sources {
        match header::parse(&read(&source.path)?) {
            Err(error) => report.add(&source.path, error.line, error.problem),
            Ok(header) => {
                check_command(report, source, &header);
                check_output(report, source, &header);
                check_demo(report, source, &header);
            }
        }
    }
    check_pages(report, &sources)?;
    check_outputs_are_wanted(report)
}

fn check_command(report: &mut Report<'_>, source: &Source, header: &Header) {
    let name = &source.name;
    let runs_it = header.runs.iter().any(|command| {
        let mut words = command.split_whitespace();
        words.any(|word| word == "--bin") && words.next() == Some(name)
    });
    if !runs_it {
        report.add(
            &source.path,
            1,
            format!("the header does not run it; write `cargo run --bin {name}`"),
        );
    }
}

fn check_output(report: &mut Report<'_>, source: &Source, header: &Header) {
    let name = &source.name;
    let path = report.root.join(format!("docs/outputs/{name}.txt"));
    let Ok(recorded) = read(&path) else {
        report.add(
            &source.path,
            1,
            "its output is not recorded; run cargo lab record",
        );
        return;
    };
    if header::compare(&header.output, &recorded).is_err() {
        report.add(
            &path,
            1,
            format!(
                "not what the header of {} expects; correct the header or run \
                 cargo lab record",
                shown(report.root, &source.path)
            ),
        );
    }
}

/// The transcript of the demo shows what each of its examples prints: between
/// the command and the line with the verdict.
fn check_demo(report: &mut Report<'_>, source: &Source, header: &Header) {
    let path = report.root.join("docs/outputs/demo.txt");
    // That it is missing is told elsewhere.
    let transcript = read(&path).unwrap_or_default();
    let transcript = anstream::adapter::strip_str(&transcript).to_string();
    let command = format!("\n$ cargo run --bin {}\n", source.name);
    let Some((before, rest)) = transcript.split_once(&command) else {
        return;
    };
    let printed = rest.split("\n✓ ").next().unwrap_or_default();
    if header::compare(&header.output, printed).is_err() {
        let problem = format!(
            "not what the header of {} expects; run cargo lab record",
            shown(report.root, &source.path)
        );
        report.add(&path, before.matches('\n').count() + 2, problem);
    }
}

fn check_pages(report: &mut Report<'_>, sources: &[Source]) -> Result<()> {
    for language in Language::ALL {
        let pages = book::pages(report.root, language)?;
        for source in sources {
            if !pages.iter().any(|page| page.quotes(&source.path)) {
                let code = language.code();
                let name = &source.name;
                report.add(
                    &source.path,
                    1,
                    format!(
                        "no page in docs/{code}/src quotes it; write one with \
                         {{{{#include …/{name}.rs:ANCHOR}}}}"
                    ),
                );
            }
        }
    }
    Ok(())
}

/// A recorded output outlives the example or the experiment that printed it.
/// English page and README decide: the Chinese ones follow them.
fn check_outputs_are_wanted(report: &mut Report<'_>) -> Result<()> {
    let pages = book::pages(report.root, Language::English)?;
    let Ok(readme) = read(&report.root.join(Language::English.readme())) else {
        // That it is missing is a finding of its own.
        return Ok(());
    };
    for output in files(&report.root.join("docs/outputs"), "txt")? {
        let name = output.file_stem().unwrap_or_default().to_string_lossy();
        let shown = pages.iter().any(|page| page.includes(&output))
            || readme.contains(&format!("<!-- lab:output {name} -->"))
            || readme.contains(&format!("docs/outputs/{name}.svg"));
        if !shown {
            report.add(&output, 1, "no page shows it; include it or remove it");
        }
    }
    Ok(())
}
