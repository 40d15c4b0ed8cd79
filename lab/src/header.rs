//! The header of an example: what it teaches, how to run it, what it prints.
//!
//! The README's index, the tests and `cargo lab check` all read it from here, so
//! that no second place says what an example does.

use std::fmt;

/// A line of an expected output that stands for any number of lines, or none.
const ANY_LINES: &str = "...";

/// The parts of a header, without the `//!` marks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The first line, `Topic: what the example shows.`
    pub title: String,
    /// The paragraph after `Teaches:`, on one line.
    pub teaches: String,
    /// The commands that run the example, with their comments.
    pub runs: Vec<String>,
    /// What the example prints, a pattern for [`compare`].
    pub output: String,
}

impl Header {
    /// The part of the title before the colon, which examples of one lesson on
    /// several brokers share.
    pub fn topic(&self) -> &str {
        self.title
            .split_once(": ")
            .map_or(self.title.as_str(), |(topic, _)| topic)
    }

    /// What follows `--features` in the commands: the example needs it.
    pub fn features(&self) -> Option<&str> {
        let commands = self.runs.iter();
        let mut words = commands.flat_map(|command| command.split_whitespace());
        words.find(|word| *word == "--features")?;
        words.next()
    }
}

/// What a header lacks, and in which line of its file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeaderError {
    /// Counted from 1.
    pub line: usize,
    /// Names neither file nor line.
    pub problem: &'static str,
}

impl fmt::Display for HeaderError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.problem)
    }
}

impl std::error::Error for HeaderError {}

/// Reads the `//!` lines on top of an example's source.
pub fn parse(source: &str) -> Result<Header, HeaderError> {
    let lines: Vec<&str> = source
        .lines()
        .map_while(|line| line.strip_prefix("//!"))
        .map(|line| line.strip_prefix(' ').unwrap_or(line).trim_end())
        .collect();
    Ok(Header {
        title: title(&lines)?,
        teaches: teaches(&lines)?,
        runs: runs(&lines)?,
        output: block(
            &lines,
            "Expected output:",
            "the header has no `Expected output:` with a ```text block after it",
        )?
        .1
        .join("\n"),
    })
}

fn title(lines: &[&str]) -> Result<String, HeaderError> {
    let problem = match lines.first() {
        None => "the file does not begin with a `//!` header",
        Some(title) if !title.ends_with('.') => {
            "the title, the first line, does not end with a full stop"
        }
        Some(title) if !title.contains(": ") => {
            "the title, the first line, has not the form `Topic: sentence.`"
        }
        Some(title) => return Ok((*title).to_owned()),
    };
    Err(HeaderError { line: 1, problem })
}

fn teaches(lines: &[&str]) -> Result<String, HeaderError> {
    let text = lines
        .iter()
        .skip_while(|line| !line.starts_with("Teaches:"))
        .take_while(|line| !line.is_empty())
        .copied()
        .collect::<Vec<_>>()
        .join(" ");
    match text.trim_start_matches("Teaches:").trim() {
        "" => Err(HeaderError {
            line: 1,
            problem: "the header has no paragraph that begins with `Teaches:`",
        }),
        text => Ok(text.to_owned()),
    }
}

fn runs(lines: &[&str]) -> Result<Vec<String>, HeaderError> {
    let (line, commands) = block(
        lines,
        "Run",
        "the header has no `Run` with a ```text block after it",
    )?;
    if !commands.iter().any(|text| text.starts_with("cargo run ")) {
        return Err(HeaderError {
            line,
            problem: "the block after `Run` has no `cargo run --bin NAME`",
        });
    }
    Ok(commands
        .into_iter()
        .filter(|text| !text.is_empty())
        .map(str::to_owned)
        .collect())
}

/// The first ```` ```text ```` block after a line that begins with `label`, and
/// the number of the line that opens it.
fn block<'a>(
    lines: &[&'a str],
    label: &str,
    missing: &'static str,
) -> Result<(usize, Vec<&'a str>), HeaderError> {
    let after = |from: usize, wanted: &dyn Fn(&str) -> bool| {
        lines[from..]
            .iter()
            .position(|line| wanted(line))
            .map(|index| from + index)
    };
    let fail = |line, problem| HeaderError { line, problem };
    let label =
        after(0, &|line| line.starts_with(label)).ok_or_else(|| fail(1, missing))?;
    let open = after(label, &|line| line.starts_with("```"))
        .filter(|&open| lines[open] == "```text")
        .ok_or_else(|| fail(label + 1, missing))?;
    let close = after(open + 1, &|line| line == "```")
        .ok_or_else(|| fail(open + 1, "this ```text block has no end"))?;
    Ok((open + 1, lines[open + 1..close].to_vec()))
}

/// Compares an output with the expected output of a header.
///
/// In `expected`, a placeholder such as `<id>` stands for one or more characters
/// without a blank, and `...` alone on a line for any lines. Blanks at the end of
/// a line and empty lines at the end of the text do not count.
///
/// The error shows both texts, with `>` at the line where they part.
pub fn compare(expected: &str, actual: &str) -> Result<(), String> {
    let expected = lines_of(expected);
    let actual = lines_of(actual);
    match difference(&expected, &actual) {
        None => Ok(()),
        Some((in_expected, in_actual)) => Err(format!(
            "expected:\n{}actual:\n{}",
            marked(&expected, in_expected),
            marked(&actual, in_actual),
        )),
    }
}

/// The output with the placeholders of the expected one in the places that they
/// stand for, so that a recorded output is the same on each run.
///
/// Each line is looked up on its own: lines that `...` stands for keep their
/// text, except where they have the shape of another expected line.
pub fn placeholders(expected: &str, actual: &str) -> String {
    let expected = lines_of(expected);
    lines_of(actual)
        .into_iter()
        .map(|line| {
            // A line that is expected word for word is not a placeholder's.
            if expected.contains(&line) {
                return line;
            }
            let same_shape = |pattern: &&&str| line_matches(&parts(pattern), line);
            expected.iter().find(same_shape).copied().unwrap_or(line)
        })
        .flat_map(|line| [line, "\n"])
        .collect()
}

fn lines_of(text: &str) -> Vec<&str> {
    text.trim_end().lines().map(str::trim_end).collect()
}

/// Where the texts part: the index of the expected line that was not found and
/// of the actual line that stands in its place. The lengths if one just ends.
fn difference(expected: &[&str], actual: &[&str]) -> Option<(usize, usize)> {
    let mut at = (0, 0);
    // After the last `...`: the expected line that follows it, and the first
    // actual line that has not been tried for it.
    let mut retry: Option<(usize, usize)> = None;
    let mut furthest = (0, 0);
    loop {
        match (expected.get(at.0), actual.get(at.1)) {
            (None, None) => return None,
            (Some(&ANY_LINES), _) => {
                at.0 += 1;
                retry = Some(at);
            }
            (Some(pattern), Some(line)) if line_matches(&parts(pattern), line) => {
                at = (at.0 + 1, at.1 + 1);
            }
            _ => {
                furthest = furthest.max(at);
                match &mut retry {
                    Some(next) if next.1 < actual.len() => {
                        next.1 += 1;
                        at = *next;
                    }
                    _ => return Some(furthest),
                }
            }
        }
    }
}

fn marked(lines: &[&str], mark: usize) -> String {
    let end = (mark == lines.len()).then_some("(the end)");
    lines
        .iter()
        .copied()
        .chain(end)
        .enumerate()
        .map(|(index, line)| {
            let sign = if index == mark { '>' } else { ' ' };
            format!("  {sign} {line}\n")
        })
        .collect()
}

/// A piece of an expected line.
#[derive(Debug, PartialEq, Eq)]
enum Part<'a> {
    Text(&'a str),
    Placeholder,
}

/// Cuts a line at its placeholders: `<`, lower-case letters, digits, `_` and `-`
/// with a letter first, `>`.
fn parts(line: &str) -> Vec<Part<'_>> {
    let mut parts = Vec::new();
    let mut text_start = 0;
    let mut from = 0;
    while let Some(open) = line[from..].find('<').map(|index| from + index) {
        from = open + 1;
        let Some(close) = line[from..].find('>').map(|index| from + index) else {
            break;
        };
        if is_name(&line[from..close]) {
            parts.push(Part::Text(&line[text_start..open]));
            parts.push(Part::Placeholder);
            from = close + 1;
            text_start = from;
        }
    }
    parts.push(Part::Text(&line[text_start..]));
    parts
}

fn is_name(text: &str) -> bool {
    text.starts_with(|first: char| first.is_ascii_lowercase())
        && text.chars().all(|c| {
            c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '_' | '-')
        })
}

fn line_matches(parts: &[Part<'_>], text: &str) -> bool {
    match parts {
        [] => text.is_empty(),
        [Part::Text(literal), rest @ ..] => text
            .strip_prefix(literal)
            .is_some_and(|text| line_matches(rest, text)),
        [Part::Placeholder, rest @ ..] => text
            .char_indices()
            .take_while(|(_, c)| !c.is_whitespace())
            .any(|(index, c)| line_matches(rest, &text[index + c.len_utf8()..])),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCE: &str = "\
//! Work queue: acknowledge a job only after it is done.
//!
//! Teaches: explicit acks and redelivery. Kill this worker in the middle of a
//! job and another one gets it.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin nats_work_queue_worker    # terminal 1
//! ```
//!
//! Expected output:
//!
//! ```text
//! start: photo-1.jpg
//!   done
//! ```

use std::env;
";

    /// The problem of `SOURCE` with one text in it replaced, and its line.
    fn problem(from: &str, to: &str) -> (usize, &'static str) {
        assert!(SOURCE.contains(from), "{from} is not in the source");
        let error = parse(&SOURCE.replacen(from, to, 1)).expect_err("no problem");
        (error.line, error.problem)
    }

    #[test]
    fn a_header_is_read() {
        let header = parse(SOURCE).expect("a correct header");
        assert_eq!(header.topic(), "Work queue");
        assert_eq!(
            header.teaches,
            "explicit acks and redelivery. Kill this worker in the middle of a job \
             and another one gets it."
        );
        assert_eq!(
            header.runs,
            ["cargo run --bin nats_work_queue_worker    # terminal 1"]
        );
        assert_eq!(header.output, "start: photo-1.jpg\n  done");
        assert_eq!(header.features(), None);
    }

    #[test]
    fn a_feature_is_read_from_the_command() {
        let name = "nats_work_queue_worker";
        let source = SOURCE.replace(name, &format!("{name} --features tls"));
        let header = parse(&source).expect("a correct header");
        assert_eq!(header.features(), Some("tls"));
    }

    #[test]
    fn each_part_is_missed() {
        assert!(problem("//! Work", "// Work").1.contains("`//!` header"));
        assert!(problem("done.\n", "done\n").1.contains("full stop"));
        assert!(problem("queue: ", "queue ").1.contains("Topic: sentence"));
        assert!(problem("Teaches:", "Shows:").1.contains("`Teaches:`"));
        assert!(problem("Run, ", "Go, ").1.contains("`Run`"));
        assert!(problem("cargo run", "cargo walk").1.contains("--bin NAME"));
        assert!(problem("Expected", "Real").1.contains("`Expected output:`"));
        assert_eq!(
            problem("```text\n//! cargo", "```sh\n//! cargo").0,
            6,
            "the line of the label whose block is not text"
        );
        assert_eq!(
            problem("//! ```\n\nuse", "\nuse"),
            (14, "this ```text block has no end")
        );
    }

    #[test]
    fn placeholders_stand_for_one_word() {
        compare("sent <id> in <ms> ms", "sent a-1 in 12 ms").expect("two words");
        compare("offset <n>, key <k>", "offset 7, key 订单").expect("any letters");
        compare("<a>-<b>", "1-2-3").expect("more than one way to match");
        for near_miss in [
            "sent in 12 ms",
            "sent  in 12 ms",
            "sent a b in 12 ms",
            "sent a-1 in 12 ms!",
            "Sent a-1 in 12 ms",
            "sent a-1 in 12",
        ] {
            compare("sent <id> in <ms> ms", near_miss).expect_err(near_miss);
        }
    }

    #[test]
    fn only_a_name_makes_a_placeholder() {
        compare("a < b > c", "a < b > c").expect("blanks within");
        compare("a < b > c", "a x c").expect_err("no placeholder");
        compare("Vec<U8>", "Vec<U8>").expect("capitals");
        compare("1 < <n>", "1 < 2").expect("a lone bracket before one");
        compare("<n", "<n").expect("no end");
    }

    #[test]
    fn dots_stand_for_any_lines() {
        for actual in ["a\nz", "a\nb\nz", "a\nz\nz", "a\n\nb\nz\n\n"] {
            compare("a\n...\nz", actual).expect(actual);
        }
        compare("...", "").expect("no line at all");
        compare("...\nz", "a\nz").expect("at the start");
        compare("a\n...", "a\nb\nc").expect("at the end");
        compare("a\n...\nb <n>\n...\nz", "a\nb 1\nb 2\nc\nz").expect("twice");
        for near_miss in ["a", "z", "a\nb", "b\nz", "a\nz\nb"] {
            compare("a\n...\nz", near_miss).expect_err(near_miss);
        }
        compare("wait...", "wait for it").expect_err("dots within a line");
    }

    #[test]
    fn lines_must_be_complete_and_in_order() {
        compare("a\nb", "a \nb\r\n\n").expect("blanks at the ends");
        for near_miss in ["b\na", "a", "a\nb\nc", "a\n\nb", " a\nb", ""] {
            compare("a\nb", near_miss).expect_err(near_miss);
        }
    }

    #[test]
    fn a_difference_is_marked_in_both_texts() {
        let difference = compare("a\n...\nb <n>\nc", "a\nx\nb 1\nd").expect_err("d");
        assert_eq!(
            difference,
            "expected:\n    a\n    ...\n    b <n>\n  > c\n\
             actual:\n    a\n    x\n    b 1\n  > d\n"
        );
        let short = compare("a\nb", "a").expect_err("too short");
        assert_eq!(
            short,
            "expected:\n    a\n  > b\nactual:\n    a\n  > (the end)\n"
        );
    }

    #[test]
    fn recorded_text_is_stable() {
        let expected = "inbox <id>\n...\ntask 3 of 3";
        let recorded = placeholders(
            expected,
            "inbox _INBOX.x1\ntask 1 of 3\ninbox 7\ntask 3 of 3",
        );
        assert_eq!(
            recorded,
            "inbox <id>\ntask 1 of 3\ninbox <id>\ntask 3 of 3\n"
        );
        compare(expected, &recorded).expect("a recording matches its header");
    }
}
