//! `cargo lab index`: the generated parts of both READMEs, and the table of
//! guarantees.

use std::{collections::HashMap, path::Path, process::ExitCode};

use anyhow::{Context as _, Result, bail};
use lab::{
    book::{self, Language, Page},
    broker::Broker,
    guarantees,
    workspace::{self, Example, read, shown, write},
};

/// Writes the generated parts of README.md and README.zh-CN.md anew.
///
/// Between `<!-- lab:index -->` and `<!-- /lab:index -->` comes the table of the
/// examples, between `<!-- lab:output NAME -->` and `<!-- /lab:output -->` the
/// recorded output docs/outputs/NAME.txt. The tables of the book below
/// docs/guarantees are written from what the tests of faults have counted.
#[derive(clap::Args)]
pub struct Args {
    /// Write nothing, and fail if something would change
    #[arg(long)]
    check: bool,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    let root = workspace::root();
    if !args.check {
        guarantees::update(root)?;
    }
    for language in Language::ALL {
        let readme = language.readme();
        if args.check {
            let text = rendered(root, language).context(readme)?;
            if read(&root.join(readme))? != text {
                bail!("{readme} is not up to date; run cargo lab index");
            }
        } else if update(root, language)? {
            println!("{readme} is up to date now");
        } else {
            println!("{readme} was up to date");
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Writes the README of a language if it is not as it should be; tells whether it
/// did.
pub fn update(root: &Path, language: Language) -> Result<bool> {
    let readme = language.readme();
    let text = rendered(root, language).context(readme)?;
    write(&root.join(readme), &text)
}

/// The README of a language as it should be.
///
/// # Errors
///
/// No index at all, a block without an end, an output that was not recorded, an
/// example without a complete header.
pub fn rendered(root: &Path, language: Language) -> Result<String> {
    let text = read(&root.join(language.readme()))?;
    let mut result = String::with_capacity(text.len());
    let mut has_index = false;
    let mut lines = text.lines().enumerate();
    while let Some((number, line)) = lines.next() {
        result.push_str(line);
        result.push('\n');
        let Some(block) = Block::opened_by(line) else {
            continue;
        };
        let end = block.end();
        if !lines.any(|(_, line)| line.trim() == end) {
            bail!("the block that line {} opens has no {end}", number + 1);
        }
        let content = match block {
            Block::Index => {
                has_index = true;
                index(root, language)?
            }
            Block::Output(name) => output(root, name)?,
        };
        result.push_str(&format!("\n{content}\n{end}\n"));
    }
    if !has_index {
        bail!("the examples are not listed; write <!-- lab:index --> and its end");
    }
    Ok(result)
}

/// A part of a README that is generated.
#[derive(Clone, Copy)]
enum Block<'a> {
    Index,
    Output(&'a str),
}

impl<'a> Block<'a> {
    fn opened_by(line: &'a str) -> Option<Self> {
        let comment = line.trim().strip_prefix("<!-- ")?.strip_suffix(" -->")?;
        match comment.split_once(' ') {
            None if comment == "lab:index" => Some(Self::Index),
            Some(("lab:output", name)) => Some(Self::Output(name)),
            _ => None,
        }
    }

    fn end(self) -> &'static str {
        match self {
            Self::Index => "<!-- /lab:index -->",
            Self::Output(_) => "<!-- /lab:output -->",
        }
    }
}

fn output(root: &Path, name: &str) -> Result<String> {
    let path = root.join("docs/outputs").join(format!("{name}.txt"));
    let text = read(&path).with_context(|| {
        format!("{name} has no recorded output; run cargo lab record")
    })?;
    let plain = anstream::adapter::strip_str(text.trim_end());
    Ok(format!("```text\n{plain}\n```\n"))
}

/// A row of the index: the examples of one topic.
struct Row<'a> {
    topic: &'a str,
    examples: Vec<&'a Example>,
}

fn index(root: &Path, language: Language) -> Result<String> {
    let examples = workspace::examples_in(root)?;
    let pages = Pages::of(root, language)?;
    let (topic, page) = match language {
        Language::English => ("Topic", "page"),
        Language::Chinese => ("主题", "讲解"),
    };
    let cell = |example: &&Example| {
        let file = shown(root, &example.path);
        let link = format!("[`{}`]({file})", example.name);
        match pages.of_example(example) {
            Some(found) => {
                format!("{link} ([{page}]({}))", shown(root, &found.path))
            }
            None => link,
        }
    };

    let mut table = format!("| {topic} |");
    table.extend(Broker::ALL.map(|broker| format!(" {broker} |")));
    table.push_str("\n| --- | --- | --- | --- |\n");
    for row in rows(&examples, &pages) {
        table.push_str(&format!("| {} |", topic_in(language, &row, &pages)));
        for broker in Broker::ALL {
            let of_broker = row.examples.iter().filter(|e| e.broker == broker);
            let cells: Vec<String> = of_broker.map(cell).collect();
            table.push_str(&format!(" {} |", cells.join("<br>")));
        }
        table.push('\n');
    }
    Ok(table)
}

/// In the order of the book, as that is the order in which one learns.
fn rows<'a>(examples: &'a [Example], pages: &Pages) -> Vec<Row<'a>> {
    let mut examples: Vec<&Example> = examples.iter().collect();
    examples.sort_by_key(|example| pages.position(example));
    let mut rows: Vec<Row<'a>> = Vec::new();
    for example in examples {
        let topic = example.header.topic();
        match rows.iter_mut().find(|row| row.topic == topic) {
            Some(row) => row.examples.push(example),
            None => rows.push(Row {
                topic,
                examples: vec![example],
            }),
        }
    }
    rows
}

/// A header has its topic in English only. In Chinese it is what the heading of
/// the topic's first page has before the colon.
fn topic_in(language: Language, row: &Row<'_>, pages: &Pages) -> String {
    let heading = match language {
        Language::English => None,
        Language::Chinese => row
            .examples
            .iter()
            .find_map(|example| pages.of_example(example)?.heading()),
    };
    match heading {
        None => row.topic.to_owned(),
        Some(heading) => {
            let topic = heading.split(['：', ':']).next().unwrap_or_default();
            topic.trim().to_owned()
        }
    }
}

/// The pages of a language in the order of its table of contents, and which of
/// them quotes which example.
struct Pages {
    pages: Vec<Page>,
    /// From an example's name to an index of `pages`.
    quoting: HashMap<String, usize>,
}

impl Pages {
    fn of(root: &Path, language: Language) -> Result<Self> {
        let listed = book::listed(root, language)?;
        let mut pages = book::pages(root, language)?;
        pages.sort_by_key(|page| {
            let position = listed.iter().position(|l| l.path == page.path);
            position.unwrap_or(usize::MAX)
        });
        let quoting = workspace::sources_in(root)?
            .into_iter()
            .filter_map(|source| {
                let page = pages.iter().position(|p| p.quotes(&source.path))?;
                Some((source.name, page))
            })
            .collect();
        Ok(Self { pages, quoting })
    }

    fn of_example(&self, example: &Example) -> Option<&Page> {
        self.quoting
            .get(&example.name)
            .map(|&index| &self.pages[index])
    }

    fn position(&self, example: &Example) -> usize {
        self.quoting
            .get(&example.name)
            .copied()
            .unwrap_or(usize::MAX)
    }
}
