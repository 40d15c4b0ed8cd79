//! `cargo lab check` finds each way in which text and code can part.
//!
//! A small workspace that agrees with itself is written into a temporary folder;
//! each test breaks one thing in it.

use std::{fs, path::PathBuf, process::Command};

use tempfile::TempDir;

const EXAMPLE: &str = "kafka-examples/src/bin/kafka_producer.rs";
const ENGLISH: &str = "docs/en/src/kafka/producer.md";
const CHINESE: &str = "docs/zh-CN/src/kafka/producer.md";

const SOURCE: &str = "\
//! Producer: wait until the broker has the message.
//!
//! Teaches: delivery reports.
//!
//! Run, after `cargo lab up kafka`:
//!
//! ```text
//! cargo run --bin kafka_producer
//! ```
//!
//! Expected output:
//!
//! ```text
//! sent: offset <offset>
//! ```

// ANCHOR: main
fn main() {}
// ANCHOR_END: main
";

const PAGE: &str = "\
# Producer: one message

See [the code](#code).

## Code

```rust,ignore
{{#include ../../../../kafka-examples/src/bin/kafka_producer.rs:main}}
```

```text
{{#include ../../../outputs/kafka_producer.txt}}
```
";

const PAGE_ZH: &str = "\
# 生产者：一条消息

```rust,ignore
{{#include ../../../../kafka-examples/src/bin/kafka_producer.rs:main}}
```

```text
{{#include ../../../outputs/kafka_producer.txt}}
```
";

const README: &str = "\
# Examples

![the demo](docs/outputs/demo.svg)

<!-- lab:output kafka_producer -->
<!-- /lab:output -->

<!-- lab:index -->
<!-- /lab:index -->
";

const SUMMARY: &str = "\
# Summary

[Start](index.md)

- [Producer](kafka/producer.md)
";

struct Workspace {
    folder: TempDir,
}

impl Workspace {
    /// A workspace in which everything agrees.
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let workspace = Self { folder };
        let demo = "$ cargo lab demo --yes\n\u{1b}[32m✓\u{1b}[0m kafka_producer\n";
        for (file, text) in [
            ("lab/Cargo.toml", ""),
            (EXAMPLE, SOURCE),
            ("tests/kafka/main.rs", "mod producer;\n"),
            ("tests/kafka/producer.rs", ""),
            ("docs/outputs/kafka_producer.txt", "sent: offset <offset>\n"),
            ("docs/outputs/demo.txt", demo),
            ("docs/outputs/demo.svg", &lab::svg::render(demo)),
            ("docs/en/src/SUMMARY.md", SUMMARY),
            ("docs/en/src/index.md", "# Start\n"),
            (ENGLISH, PAGE),
            ("docs/zh-CN/src/SUMMARY.md", SUMMARY),
            ("docs/zh-CN/src/index.md", "# 开始\n"),
            (CHINESE, PAGE_ZH),
            ("README.md", README),
            ("README.zh-CN.md", README),
        ] {
            workspace.write(file, text);
        }
        let (stamped, said) =
            workspace.lab(&["check", "--stamp", "docs/zh-CN/src/index.md", CHINESE]);
        assert!(stamped, "{said}");
        let (indexed, said) = workspace.lab(&["index"]);
        assert!(indexed, "{said}");
        workspace
    }

    fn path(&self, file: &str) -> PathBuf {
        self.folder.path().join(file)
    }

    fn read(&self, file: &str) -> String {
        fs::read_to_string(self.path(file)).expect(file)
    }

    fn write(&self, file: &str, text: &str) {
        let path = self.path(file);
        fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
        fs::write(path, text).expect(file);
    }

    fn append(&self, file: &str, text: &str) {
        self.write(file, &format!("{}{text}", self.read(file)));
    }

    fn replace(&self, file: &str, from: &str, to: &str) {
        let text = self.read(file);
        assert!(text.contains(from), "{file} has no {from}");
        self.write(file, &text.replace(from, to));
    }

    fn remove(&self, file: &str) {
        fs::remove_file(self.path(file)).expect(file);
    }

    /// Runs `lab` here: did it end with 0, and what did it say?
    fn lab(&self, arguments: &[&str]) -> (bool, String) {
        let result = Command::new(env!("CARGO_BIN_EXE_lab"))
            .args(arguments)
            .current_dir(self.folder.path())
            .output()
            .expect("lab starts");
        let said = [result.stdout, result.stderr].concat();
        let said = String::from_utf8(said).expect("UTF-8");
        (result.status.success(), said)
    }

    /// The one problem that `check` must find, as it is printed.
    fn problem(&self) -> String {
        let (agrees, said) = self.lab(&["check"]);
        assert!(!agrees, "nothing was found: {said}");
        assert!(said.contains("error: 1 problem\n"), "{said}");
        said.lines().next().unwrap_or_default().to_owned()
    }

    #[track_caller]
    fn finds(&self, place: &str, words: &str) {
        let problem = self.problem();
        assert!(
            problem.starts_with(&format!("{place}: ")) && problem.contains(words),
            "expected `{words}` at {place}, found {problem}"
        );
    }
}

#[test]
fn a_workspace_that_agrees_passes() {
    let (agrees, said) = Workspace::new().lab(&["check"]);
    assert!(agrees, "{said}");
}

#[test]
fn all_problems_are_listed_in_one_run() {
    let workspace = Workspace::new();
    workspace.append("docs/outputs/demo.txt", "✓ nats_pubsub\n");
    workspace.append(CHINESE, "[gone](gone.md)\n");
    workspace.write("tests/kafka/main.rs", "");
    let (agrees, said) = workspace.lab(&["check"]);
    assert!(!agrees && said.contains("error: 3 problems"), "{said}");
}

#[test]
fn an_output_that_nothing_shows() {
    let workspace = Workspace::new();
    workspace.write("docs/outputs/kafka_gone.txt", "left over\n");
    workspace.finds("docs/outputs/kafka_gone.txt:1", "no page shows it");
}

#[test]
fn a_summary_of_other_parts_than_the_tests_have() {
    let workspace = Workspace::new();
    workspace.replace(
        "README.md",
        "<!-- lab:index -->",
        "<!-- lab:output test -->\n<!-- /lab:output -->\n\n<!-- lab:index -->",
    );
    let summary = "$ cargo lab test --yes\n...\n\n\u{2713} lint   1.0 s\n";
    workspace.write("docs/outputs/test.txt", summary);
    let (indexed, said) = workspace.lab(&["index"]);
    assert!(indexed, "{said}");
    workspace.finds("docs/outputs/test.txt:1", "not the parts of cargo lab test");
}

#[test]
fn a_header_that_lacks_a_part() {
    let workspace = Workspace::new();
    workspace.replace(EXAMPLE, "Teaches:", "Shows:");
    let (_, said) = workspace.lab(&["check"]);
    assert!(
        said.contains(&format!("{EXAMPLE}:1: the header has no")),
        "{said}"
    );
}

#[test]
fn a_header_that_runs_another_example() {
    let workspace = Workspace::new();
    workspace.replace(EXAMPLE, "--bin kafka_producer", "--bin kafka_producers");
    workspace.finds(&format!("{EXAMPLE}:1"), "cargo run --bin kafka_producer");
}

#[test]
fn an_output_that_was_never_recorded() {
    let workspace = Workspace::new();
    workspace.remove("docs/outputs/kafka_producer.txt");
    let (_, said) = workspace.lab(&["check"]);
    let expected = format!("{EXAMPLE}:1: its output is not recorded");
    assert!(said.contains(&expected), "{said}");
}

#[test]
fn an_output_that_is_not_the_header_s() {
    let workspace = Workspace::new();
    workspace.replace(EXAMPLE, "sent: offset", "sent to offset");
    workspace.finds("docs/outputs/kafka_producer.txt:1", "cargo lab record");
}

#[test]
fn an_output_that_no_page_shows() {
    let workspace = Workspace::new();
    workspace.write("docs/outputs/kafka_gone.txt", "x\n");
    workspace.finds("docs/outputs/kafka_gone.txt:1", "include it or remove it");
}

#[test]
fn a_demo_that_shows_an_output_of_the_past() {
    let workspace = Workspace::new();
    let demo = |offset: &str| {
        format!("Brokers\n\n$ cargo run --bin kafka_producer\n{offset}\n✓ yes\n")
    };
    workspace.write("docs/outputs/demo.txt", &demo("sent: offset 7"));
    let (drawn, said) = workspace.lab(&["record", "--picture"]);
    assert!(drawn, "{said}");
    let (passes, said) = workspace.lab(&["check"]);
    assert!(passes, "{said}");
    workspace.write("docs/outputs/demo.txt", &demo("delivered: 7"));
    let (drawn, said) = workspace.lab(&["record", "--picture"]);
    assert!(drawn, "{said}");
    workspace.finds("docs/outputs/demo.txt:3", "run cargo lab record");
}

#[test]
fn an_example_without_a_page() {
    let workspace = Workspace::new();
    workspace.write(
        "kafka-examples/src/bin/kafka_consumer.rs",
        &SOURCE.replace("kafka_producer", "kafka_consumer"),
    );
    workspace.write("docs/outputs/kafka_consumer.txt", "sent: offset <offset>\n");
    workspace.lab(&["index"]);
    let (_, said) = workspace.lab(&["check"]);
    assert!(said.contains("no page in docs/en/src quotes it"), "{said}");
    assert!(
        said.contains("no page in docs/zh-CN/src quotes it"),
        "{said}"
    );
}

#[test]
fn an_anchor_that_is_gone() {
    let workspace = Workspace::new();
    workspace.replace(EXAMPLE, "// ANCHOR_END: main\n", "");
    let (_, said) = workspace.lab(&["check"]);
    for place in [format!("{ENGLISH}:8"), format!("{CHINESE}:5")] {
        let problem = format!("{place}: {EXAMPLE} has no `ANCHOR_END: main`");
        assert!(said.contains(&problem), "{said}");
    }
}

#[test]
fn an_anchor_whose_name_only_begins_so() {
    let workspace = Workspace::new();
    workspace.replace(EXAMPLE, "ANCHOR: main", "ANCHOR: main_loop");
    let (_, said) = workspace.lab(&["check"]);
    assert!(said.contains("has no `ANCHOR: main`"), "{said}");
}

#[test]
fn an_include_of_no_file_or_by_line_numbers() {
    let workspace = Workspace::new();
    workspace.append(CHINESE, "{{#include ../no.txt}}\n");
    workspace.finds(
        &format!("{CHINESE}:11"),
        "there is no file docs/zh-CN/src/no.txt",
    );
    workspace.replace(CHINESE, "../no.txt", "../../../outputs/demo.txt:1:2");
    workspace.finds(&format!("{CHINESE}:11"), "line numbers go stale");
}

#[test]
fn code_that_is_pasted() {
    let workspace = Workspace::new();
    workspace.append(CHINESE, "\n```rust\nfn main() {}\n```\n");
    workspace.finds(&format!("{CHINESE}:12"), "pasted");
}

#[test]
fn a_stale_translation_and_its_stamp() {
    let workspace = Workspace::new();
    workspace.append(ENGLISH, "\nOne more thing.\n");
    workspace.finds(
        &format!("{CHINESE}:1"),
        &format!("cargo lab check --stamp {CHINESE}"),
    );
    workspace.lab(&["check", "--stamp", CHINESE]);
    let (agrees, said) = workspace.lab(&["check"]);
    assert!(agrees, "{said}");
    assert!(
        workspace.read(CHINESE).contains("-->\n# 生产者"),
        "the text was kept"
    );
}

#[test]
fn a_translation_without_a_stamp_or_an_original() {
    let workspace = Workspace::new();
    workspace.write("docs/zh-CN/src/index.md", "# 开始\n");
    workspace.finds("docs/zh-CN/src/index.md:1", "not stamped as a translation");
    let (stamped, said) = workspace.lab(&["check", "--stamp", ENGLISH]);
    assert!(
        !stamped && said.contains("only those have a stamp"),
        "{said}"
    );

    let workspace = Workspace::new();
    workspace.write("docs/zh-CN/src/more.md", "# 更多\n");
    let (_, said) = workspace.lab(&["check"]);
    assert!(said.contains("translates nothing"), "{said}");
}

#[test]
fn a_page_that_is_not_translated() {
    let workspace = Workspace::new();
    workspace.remove("docs/zh-CN/src/index.md");
    let (_, said) = workspace.lab(&["check"]);
    let expected = "docs/en/src/index.md:1: not translated; write \
                    docs/zh-CN/src/index.md";
    assert!(said.contains(expected), "{said}");
}

#[test]
fn a_table_of_contents_that_is_wrong() {
    let workspace = Workspace::new();
    for language in ["en", "zh-CN"] {
        workspace.append(
            &format!("docs/{language}/src/SUMMARY.md"),
            "- [Again](index.md)\n",
        );
    }
    let (_, said) = workspace.lab(&["check"]);
    assert!(
        said.contains("docs/en/src/SUMMARY.md:6: docs/en/src/index.md is listed")
    );
    assert!(said.contains("error: 2 problems"), "{said}");

    let workspace = Workspace::new();
    workspace.replace(
        "docs/zh-CN/src/SUMMARY.md",
        "[Start](index.md)\n\n- [Producer](kafka/producer.md)\n",
        "- [Producer](kafka/producer.md)\n- [Start](index.md)\n",
    );
    workspace.finds(
        "docs/zh-CN/src/SUMMARY.md:3",
        "kafka/producer.md comes here, but index.md in the English book",
    );

    let workspace = Workspace::new();
    for language in ["en", "zh-CN"] {
        workspace.replace(
            &format!("docs/{language}/src/SUMMARY.md"),
            "[Start](index.md)\n",
            "",
        );
    }
    let (_, said) = workspace.lab(&["check"]);
    assert!(
        said.contains("docs/en/src/index.md:1: not in the book"),
        "{said}"
    );
}

#[test]
fn a_stale_index_and_a_stale_output() {
    let workspace = Workspace::new();
    let readme = workspace.read("README.md");
    assert!(readme.contains("sent: offset <offset>"), "{readme}");
    assert!(
        readme.contains(&format!(
            "| Producer | [`kafka_producer`]({EXAMPLE}) ([page]({ENGLISH})) |"
        )),
        "{readme}"
    );
    let chinese = workspace.read("README.zh-CN.md");
    assert!(
        chinese.contains("| 生产者 | [`kafka_producer`]"),
        "{chinese}"
    );

    workspace.replace("README.md", "| Producer |", "| Sender |");
    workspace.finds("README.md:17", "cargo lab index");
    let (fresh, said) = workspace.lab(&["index", "--check"]);
    assert!(!fresh && said.contains("run cargo lab index"), "{said}");
    workspace.lab(&["index"]);
    workspace.lab(&["index"]);
    assert_eq!(workspace.read("README.md"), readme, "the index is stable");
}

#[test]
fn a_readme_without_its_blocks() {
    let workspace = Workspace::new();
    workspace.replace("README.md", "<!-- /lab:index -->\n", "");
    workspace.finds("README.md:1", "the block that line 13 opens has no");
    workspace.replace("README.md", "<!-- lab:index -->", "");
    workspace.finds("README.md:1", "the examples are not listed");
    workspace.remove("README.md");
    workspace.finds("README.md:1", "missing; write it");
}

#[test]
fn a_stale_picture() {
    let workspace = Workspace::new();
    workspace.append("docs/outputs/demo.txt", "✓ nats_pubsub\n");
    workspace.finds("docs/outputs/demo.svg:1", "cargo lab record --picture");
    let (drawn, said) = workspace.lab(&["record", "--picture"]);
    assert!(drawn, "{said}");
    let (agrees, said) = workspace.lab(&["check"]);
    assert!(agrees, "{said}");
}

#[test]
fn a_test_that_is_never_compiled() {
    let workspace = Workspace::new();
    workspace.write("tests/kafka/main.rs", "mod producers;\n");
    workspace.finds("tests/kafka/producer.rs:1", "write `mod producer;`");
}

#[test]
fn a_link_to_no_file_or_heading() {
    let workspace = Workspace::new();
    workspace.append("README.md", "\n\n[a](docs/none.md)\n");
    workspace.finds("README.md:22", "there is no docs/none.md");
    workspace.replace("README.md", "docs/none.md", &format!("{ENGLISH}#codes"));
    workspace.finds("README.md:22", "it has #producer-one-message, #code");
}

#[test]
fn a_link_that_leaves_the_book() {
    let workspace = Workspace::new();
    let link = "[file](../../../../kafka-examples/src/bin/kafka_producer.rs)";
    workspace.append(CHINESE, &format!("\n{link}\n"));
    workspace.finds(&format!("{CHINESE}:12"), "not in the built book");
}

/// This small workspace has no driver that could tell whether they are shown.
#[test]
fn results_of_a_benchmark_that_nobody_can_check() {
    let workspace = Workspace::new();
    workspace.write("docs/bench/nats.json", "{}");
    workspace.finds("docs/bench:1", "cannot be checked");
}
