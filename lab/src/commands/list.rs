//! `cargo lab list`: the examples, each with its title.

use std::process::ExitCode;

use anstyle::{AnsiColor, Style};
use lab::{
    broker::Broker,
    workspace::{self, Example},
};

/// Shows the examples, or those whose name or title has a word in it.
#[derive(clap::Args)]
pub struct Args {
    /// Part of a name or title, such as `consumer` or `kafka`
    word: Option<String>,
}

pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let examples = workspace::examples()?;
    let shown: Vec<&Example> = match &args.word {
        None => examples.iter().collect(),
        Some(word) => examples.iter().filter(|e| has(e, word)).collect(),
    };
    if let (Some(word), []) = (&args.word, shown.as_slice()) {
        let names = examples.iter().map(|example| example.name.as_str());
        let near = workspace::near_matches(word, names);
        let hint = match near.as_slice() {
            [] => "cargo lab list shows all".to_owned(),
            near => format!("did you mean {}?", near.join(", ")),
        };
        eprintln!("error: no example has `{word}` in its name or title; {hint}");
        return Ok(ExitCode::from(2));
    }
    anstream::print!("{}", table(&shown));
    Ok(ExitCode::SUCCESS)
}

fn has(example: &Example, word: &str) -> bool {
    let word = word.to_lowercase();
    example.name.to_lowercase().contains(&word)
        || example.header.title.to_lowercase().contains(&word)
}

/// One group of lines for each broker.
fn table(examples: &[&Example]) -> String {
    let bold = Style::new().bold();
    let green = AnsiColor::Green.on_default();
    let width = examples.iter().map(|e| e.name.len()).max().unwrap_or(0);
    let group = |broker: Broker| {
        let lines: Vec<String> = examples
            .iter()
            .filter(|example| example.broker == broker)
            .map(|Example { name, header, .. }| {
                format!("  {green}{name:width$}{green:#}  {}\n", header.title)
            })
            .collect();
        (!lines.is_empty())
            .then(|| format!("{bold}{broker}{bold:#}\n{}", lines.concat()))
    };
    let groups: Vec<String> = Broker::ALL.into_iter().filter_map(group).collect();
    groups.join("\n")
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use lab::header::Header;

    use super::*;

    fn example(name: &str, title: &str) -> Example {
        Example {
            name: name.to_owned(),
            package: "examples".to_owned(),
            path: PathBuf::from("x.rs"),
            broker: Broker::of_example(name).expect("a broker in the name"),
            header: Header {
                title: title.to_owned(),
                teaches: String::new(),
                runs: Vec::new(),
                output: String::new(),
            },
        }
    }

    #[test]
    fn a_group_for_each_broker_that_has_examples() {
        let queue = example("task_queue_nats", "Task queue: one.");
        let pubsub = example("nats_pubsub", "Pub/sub: all.");
        let producer = example("kafka_producer", "Producer: keys.");
        let text = table(&[&producer, &pubsub, &queue]);
        assert_eq!(
            anstream::adapter::strip_str(&text).to_string(),
            "Kafka\n  kafka_producer   Producer: keys.\n\n\
             NATS\n  nats_pubsub      Pub/sub: all.\n  task_queue_nats  Task queue: one.\n"
        );
    }

    #[test]
    fn a_word_is_looked_for_in_name_and_title() {
        let queue = example("task_queue_nats", "Durable work: one.");
        assert!(has(&queue, "Queue"));
        assert!(has(&queue, "durable"));
        assert!(!has(&queue, "kafka"));
    }
}
