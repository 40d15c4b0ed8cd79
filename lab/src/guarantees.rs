//! What a pattern has kept of its promise under a fault: counted by the tests, kept
//! below `docs/guarantees`, shown by the book as a table.

use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use crate::{
    book::Language,
    broker::Broker,
    digest,
    workspace::{files, read, shown, write},
};

/// What is done to a pattern while it works.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// SIGKILL, and it is started again.
    WorkerKilled,
    /// SIGSTOP, for longer than the broker waits for it, then SIGCONT.
    WorkerFrozen,
    /// SIGKILL, and it is started again with its data.
    BrokerKilled,
    /// It answers nobody for a while.
    BrokerFrozen,
    /// Of three nodes the one that leads: SIGKILL, and it is started again.
    LeaderKilled,
    /// What the worker sends is dropped, the acknowledgement of its work with it; then
    /// the connection is cut.
    ConnectionCut,
}

impl Fault {
    const ALL: [Self; 6] = [
        Self::WorkerKilled,
        Self::WorkerFrozen,
        Self::ConnectionCut,
        Self::BrokerKilled,
        Self::BrokerFrozen,
        Self::LeaderKilled,
    ];

    /// The name in file names and on the screen.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::WorkerKilled => "worker-killed",
            Self::WorkerFrozen => "worker-frozen",
            Self::BrokerKilled => "broker-killed",
            Self::BrokerFrozen => "broker-frozen",
            Self::LeaderKilled => "leader-killed",
            Self::ConnectionCut => "connection-cut",
        }
    }

    fn title(self, language: Language) -> &'static str {
        match (language, self) {
            (Language::English, Self::WorkerKilled) => "worker killed",
            (Language::English, Self::WorkerFrozen) => "worker frozen",
            (Language::English, Self::BrokerKilled) => "broker killed",
            (Language::English, Self::BrokerFrozen) => "broker frozen",
            (Language::English, Self::LeaderKilled) => "leader killed",
            (Language::English, Self::ConnectionCut) => "connection cut",
            (Language::Chinese, Self::WorkerKilled) => "杀掉 worker",
            (Language::Chinese, Self::WorkerFrozen) => "冻住 worker",
            (Language::Chinese, Self::BrokerKilled) => "杀掉 broker",
            (Language::Chinese, Self::BrokerFrozen) => "冻住 broker",
            (Language::Chinese, Self::LeaderKilled) => "杀掉领导者",
            (Language::Chinese, Self::ConnectionCut) => "切断连接",
        }
    }
}

/// What a pattern promises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// What is acknowledged is not lost.
    AtLeastOnce,
    /// And its effect is there once, also if it is delivered more often.
    EffectivelyOnce,
    /// What is acknowledged is not lost, and what has the same key has its first
    /// effect in its order.
    InOrder,
    /// Nothing: the same without what makes the promise true. It has to fail.
    Control,
    /// The same without what keeps the order. It has to get out of order.
    OrderControl,
}

impl Claim {
    const ALL: [Self; 5] = [
        Self::AtLeastOnce,
        Self::EffectivelyOnce,
        Self::InOrder,
        Self::Control,
        Self::OrderControl,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::AtLeastOnce => "at least once",
            Self::EffectivelyOnce => "effectively once",
            Self::InOrder => "at least once, in order",
            Self::Control => "control",
            Self::OrderControl => "control of the order",
        }
    }

    fn title(self, language: Language) -> &'static str {
        match (language, self) {
            (Language::English, claim) => claim.name(),
            (Language::Chinese, Self::AtLeastOnce) => "至少一次",
            (Language::Chinese, Self::EffectivelyOnce) => "效果恰好一次",
            (Language::Chinese, Self::InOrder) => "至少一次，保序",
            (Language::Chinese, Self::Control) => "对照",
            (Language::Chinese, Self::OrderControl) => "顺序的对照",
        }
    }
}

/// What was counted, in messages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Publishes that were tried, each repeat as one.
    pub attempted: u64,
    /// Messages whose publisher was told that the broker has them.
    pub acknowledged: u64,
    /// Different messages that had an effect.
    pub received: u64,
    /// Acknowledged and without an effect.
    pub lost: u64,
    /// Deliveries of what was delivered before. None if nobody could count them.
    pub repeated: Option<u64>,
    /// Effects that were there before.
    pub doubled: u64,
    /// Messages whose first effect came after that of a later one with the same key.
    /// None where the effects of several programs have no common order.
    pub reordered: Option<u64>,
}

impl Counts {
    const NAMES: [&str; 7] = [
        "attempted",
        "acknowledged",
        "received",
        "lost",
        "repeated",
        "doubled",
        "reordered",
    ];

    fn values(self) -> [Option<u64>; 7] {
        [
            Some(self.attempted),
            Some(self.acknowledged),
            Some(self.received),
            Some(self.lost),
            self.repeated,
            Some(self.doubled),
            self.reordered,
        ]
    }
}

/// A line of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cell {
    /// As in the name of the example, `idempotent_consumer`; see [`Cell::example`].
    pub pattern: String,
    /// The words on its command line that make it the control; empty if it is none.
    pub variant: String,
    pub broker: Broker,
    pub fault: Fault,
    /// How often the fault was done.
    pub times: u64,
    pub claim: Claim,
    pub counts: Counts,
}

impl Cell {
    /// The name of the example: of a pattern the broker comes last, and of a lesson of
    /// one broker, as that of its three nodes, it comes first.
    #[must_use]
    pub fn example(&self) -> String {
        let (pattern, broker) = (&self.pattern, self.broker.name());
        match self.fault {
            Fault::LeaderKilled => format!("{broker}_{pattern}"),
            _ => format!("{pattern}_{broker}"),
        }
    }

    /// The command that counts it again.
    fn counted_by(&self) -> String {
        let part = match self.fault {
            Fault::LeaderKilled => self.broker.name(),
            _ => "faults",
        };
        format!("LAB_RECORD=1 cargo lab test {part}")
    }

    /// # Errors
    ///
    /// If the counts do not keep the claim; or, of a control, if they do.
    pub fn holds(&self) -> Result<()> {
        let Counts {
            lost,
            doubled,
            reordered,
            ..
        } = self.counts;
        let kept = match self.claim {
            Claim::AtLeastOnce => lost == 0,
            Claim::EffectivelyOnce => lost == 0 && doubled == 0,
            Claim::InOrder => lost == 0 && reordered == Some(0),
            Claim::Control => lost + doubled > 0,
            Claim::OrderControl => reordered.is_some_and(|count| count > 0),
        };
        ensure!(kept, "it should be {}: {self:?}", self.claim.name());
        Ok(())
    }

    fn file(&self, root: &Path) -> PathBuf {
        let word = self.variant.split_whitespace().last().unwrap_or_default();
        let variant = match word.trim_start_matches('-') {
            "" => String::new(),
            variant => format!(".{variant}"),
        };
        folder(root).join(format!(
            "{}.{}{variant}.{}.json",
            self.pattern,
            self.broker.name(),
            self.fault.name()
        ))
    }

    /// Writes it below `docs/guarantees`.
    ///
    /// # Errors
    ///
    /// If the claim does not hold, or the file cannot be written.
    pub fn record(&self, root: &Path) -> Result<()> {
        self.holds()?;
        let counts = Counts::NAMES.into_iter().zip(self.counts.values());
        let counts: serde_json::Map<String, Value> = counts
            .map(|(name, count)| (name.to_owned(), json!(count)))
            .collect();
        let cell = json!({
            "pattern": self.pattern,
            "variant": self.variant,
            "broker": self.broker.name(),
            "fault": self.fault.name(),
            "times": self.times,
            "claim": self.claim.name(),
            "counts": counts,
            "code": code(root, self)?,
        });
        let text = serde_json::to_string_pretty(&cell)?;
        write(&self.file(root), &format!("{text}\n"))?;
        Ok(())
    }

    /// Is this line of the table there, with this claim?
    ///
    /// # Errors
    ///
    /// If it is not, with the way out.
    pub fn is_recorded(&self, root: &Path) -> Result<()> {
        let file = self.file(root);
        let way_out = format!("run {}, then cargo lab index", self.counted_by());
        let (recorded, _code) = parse(&read(&file).context(way_out.clone())?)
            .with_context(|| shown(root, &file))?;
        ensure!(
            recorded.claim == self.claim && recorded.times == self.times,
            "{} tells of another test; {way_out}",
            shown(root, &file)
        );
        Ok(())
    }
}

fn folder(root: &Path) -> PathBuf {
    root.join("docs/guarantees")
}

/// What stands for the code that was tested.
fn code(root: &Path, cell: &Cell) -> Result<String> {
    let (pattern, source) = (&cell.pattern, root.join("patterns/src"));
    let example = match cell.fault {
        Fault::LeaderKilled => {
            root.join(format!("{}-examples/src", cell.broker.name()))
        }
        _ => source.clone(),
    };
    let example = read(&example.join(format!("bin/{}.rs", cell.example())))?;
    // Not each pattern has something that is common to all brokers, and some have more
    // than one file of it.
    let mut common = read(&source.join(format!("{pattern}.rs"))).unwrap_or_default();
    let folder = source.join(pattern);
    if folder.is_dir() {
        for file in files(&folder, "rs")? {
            common.push_str(&read(&file)?);
        }
    }
    // A comment counts nothing, so it may be mended without counting again.
    let counted: Vec<&str> = example
        .lines()
        .chain(common.lines())
        .filter(|line| !line.trim_start().starts_with("//"))
        .collect();
    Ok(digest::short(&counted.join("\n")))
}

/// A cell, and the code it was counted with.
fn parse(text: &str) -> Result<(Cell, String)> {
    let value: Value = serde_json::from_str(text)?;
    let string = |name: &str| {
        let value = value[name].as_str();
        value.with_context(|| format!("{name} is not a text"))
    };
    let count = |name: &str| {
        let value = value["counts"][name].as_u64();
        value.with_context(|| format!("{name} is not a count"))
    };
    let fault = string("fault")?;
    let claim = string("claim")?;
    let broker: Broker = string("broker")?.parse().map_err(anyhow::Error::msg)?;
    let cell = Cell {
        pattern: string("pattern")?.to_owned(),
        variant: string("variant")?.to_owned(),
        broker,
        fault: Fault::ALL
            .into_iter()
            .find(|known| known.name() == fault)
            .with_context(|| format!("{fault} is no fault"))?,
        times: value["times"].as_u64().context("times is not a count")?,
        claim: Claim::ALL
            .into_iter()
            .find(|known| known.name() == claim)
            .with_context(|| format!("{claim} is no claim"))?,
        counts: Counts {
            attempted: count("attempted")?,
            acknowledged: count("acknowledged")?,
            received: count("received")?,
            lost: count("lost")?,
            repeated: value["counts"]["repeated"].as_u64(),
            doubled: count("doubled")?,
            reordered: value["counts"]["reordered"].as_u64(),
        },
    };
    Ok((cell, string("code")?.to_owned()))
}

/// Each file with its cell and its code, in the order of the table.
fn recorded(root: &Path) -> Result<Vec<(PathBuf, Cell, String)>> {
    let mut cells = Vec::new();
    for file in files(&folder(root), "json")? {
        let (cell, code) =
            parse(&read(&file)?).with_context(|| shown(root, &file))?;
        cells.push((file, cell, code));
    }
    let order = |cell: &Cell| {
        let is_control = matches!(cell.claim, Claim::Control | Claim::OrderControl);
        // What is about three nodes comes after what one is enough for.
        let several = cell.fault == Fault::LeaderKilled;
        let pattern = match several {
            true => String::new(),
            false => cell.pattern.clone(),
        };
        let name = (several, pattern, is_control, cell.variant.clone());
        (name, cell.broker as usize, cell.fault)
    };
    cells.sort_by_key(|(_, cell, _)| order(cell));
    Ok(cells)
}

/// The table of the book, and its file.
fn table(root: &Path, language: Language) -> Result<(PathBuf, String)> {
    let mut text = match language {
        Language::English => {
            "| Example | Promise | Fault | Attempted | Acknowledged | Received | Lost | \
             Delivered again | Effects again | Out of order |\n"
        }
        Language::Chinese => {
            "| 示例 | 承诺 | 故障 | 尝试 | 已确认 | 收到 | 丢失 | 再次投递 | 重复生效 | 乱序 |\n"
        }
    }
    .to_owned();
    text.push_str(
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n",
    );
    for (_, cell, _) in recorded(root)? {
        let variant = match cell.variant.as_str() {
            "" => String::new(),
            variant => format!(" {variant}"),
        };
        // Writing to a string cannot fail.
        let _ = write!(
            text,
            "| `{}{variant}` | {} | {} × {} |",
            cell.example(),
            cell.claim.title(language),
            cell.fault.title(language),
            cell.times
        );
        for count in cell.counts.values() {
            let count =
                count.map_or_else(|| "–".to_owned(), |count| count.to_string());
            let _ = write!(text, " {count} |");
        }
        text.push('\n');
    }
    let file = folder(root).join(format!("table.{}.md", language.code()));
    Ok((file, text))
}

/// Writes the tables of both languages from what is recorded.
///
/// # Errors
///
/// If a record cannot be read.
pub fn update(root: &Path) -> Result<()> {
    for language in Language::ALL {
        let (file, text) = table(root, language)?;
        write(&file, &text)?;
    }
    Ok(())
}

/// What of the tables is not true any more: each file with the problem.
///
/// # Errors
///
/// If a record cannot be read.
pub fn problems(root: &Path) -> Result<Vec<(PathBuf, String)>> {
    let mut problems = Vec::new();
    for (file, cell, counted) in recorded(root)? {
        if code(root, &cell).ok() != Some(counted) {
            let text = format!("counted with other code; run {}", cell.counted_by());
            problems.push((file, text));
        } else if let Err(error) = cell.holds() {
            problems.push((file, error.to_string()));
        }
    }
    for language in Language::ALL {
        let (file, text) = table(root, language)?;
        if read(&file).ok() != Some(text) {
            problems.push((file, "not up to date; run cargo lab index".to_owned()));
        }
    }
    Ok(problems)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn cell(claim: Claim, counts: Counts) -> Cell {
        Cell {
            pattern: "bill".to_owned(),
            variant: String::new(),
            broker: Broker::Nats,
            fault: Fault::WorkerKilled,
            times: 10,
            claim,
            counts,
        }
    }

    #[test]
    fn a_claim_is_kept_or_not() {
        let good = Counts {
            attempted: 1001,
            acknowledged: 1000,
            received: 1000,
            repeated: Some(3),
            reordered: Some(0),
            ..Counts::default()
        };
        let lossy = Counts { lost: 1, ..good };
        let twice = Counts { doubled: 1, ..good };
        let late = Counts {
            reordered: Some(1),
            ..good
        };
        let unknown = Counts {
            reordered: None,
            ..good
        };
        for (claim, counts, kept) in [
            (Claim::AtLeastOnce, good, true),
            (Claim::AtLeastOnce, twice, true),
            (Claim::AtLeastOnce, lossy, false),
            (Claim::EffectivelyOnce, good, true),
            (Claim::EffectivelyOnce, twice, false),
            (Claim::EffectivelyOnce, lossy, false),
            (Claim::AtLeastOnce, late, true),
            (Claim::AtLeastOnce, unknown, true),
            (Claim::EffectivelyOnce, late, true),
            (Claim::InOrder, good, true),
            (Claim::InOrder, twice, true),
            (Claim::InOrder, lossy, false),
            (Claim::InOrder, late, false),
            (Claim::InOrder, unknown, false),
            (Claim::OrderControl, good, false),
            (Claim::OrderControl, lossy, false),
            (Claim::OrderControl, twice, false),
            (Claim::OrderControl, late, true),
            (Claim::OrderControl, unknown, false),
            (Claim::Control, late, false),
            (Claim::Control, good, false),
            (Claim::Control, twice, true),
            (Claim::Control, lossy, true),
        ] {
            let holds = cell(claim, counts).holds().is_ok();
            assert_eq!(holds, kept, "{claim:?} {counts:?}");
        }
    }

    #[test]
    fn a_record_is_read_again_and_known_as_stale() {
        let root = tempfile::tempdir().expect("a folder");
        let root = root.path();
        let example = root.join("patterns/src/bin/bill_nats.rs");
        write(&example, "fn main() {}").expect("an example");
        let counts = Counts {
            attempted: 7,
            acknowledged: 6,
            received: 6,
            reordered: Some(2),
            ..Counts::default()
        };
        let cell = cell(Claim::AtLeastOnce, counts);
        assert!(cell.is_recorded(root).is_err());
        cell.record(root).expect("a record");
        cell.is_recorded(root).expect("it is there");
        let cells = recorded(root).expect("records");
        assert_eq!(cells[0].1, cell);

        assert_eq!(problems(root).expect("problems").len(), 2, "no tables yet");
        update(root).expect("tables");
        assert_eq!(problems(root).expect("problems"), []);
        let table = folder(root).join("table.en.md");
        let text = read(&table).expect("a table");
        let line = "| `bill_nats` | at least once | worker killed × 10 | 7 | 6 | 6 | \
                    0 | – | 0 | 2 |";
        assert!(text.contains(line), "{text}");

        write(&example, "//! A comment.\nfn main() {}").expect("an edit");
        assert_eq!(problems(root).expect("problems"), []);
        write(&example, "fn main() { todo!() }").expect("an edit");
        let found = problems(root).expect("problems");
        assert!(found[0].1.contains("other code"), "{found:?}");
        fs::remove_file(&table).expect("removed");
        assert_eq!(problems(root).expect("problems").len(), 2);
    }

    #[test]
    fn a_lesson_of_three_nodes_comes_last_by_its_own_name() {
        let root = tempfile::tempdir().expect("a folder");
        let root = root.path();
        for (file, pattern, fault) in [
            ("patterns/src/bin/zeal_nats.rs", "zeal", Fault::WorkerKilled),
            (
                "nats-examples/src/bin/nats_bill.rs",
                "bill",
                Fault::LeaderKilled,
            ),
        ] {
            write(&root.join(file), "fn main() {}").expect("an example");
            let cell = Cell {
                pattern: pattern.to_owned(),
                fault,
                ..cell(Claim::AtLeastOnce, Counts::default())
            };
            cell.record(root).expect("a record");
        }
        let (_file, table) = table(root, Language::English).expect("a table");
        let names = table.lines().filter_map(|line| line.split('`').nth(1));
        assert_eq!(names.collect::<Vec<_>>(), ["zeal_nats", "nats_bill"]);
    }

    #[test]
    fn what_cannot_be_read_names_its_file() {
        let root = tempfile::tempdir().expect("a folder");
        let file = folder(root.path()).join("bill.nats.worker-killed.json");
        write(&file, "{\"fault\": 7}").expect("a file");
        let error = problems(root.path()).expect_err("not a cell");
        let text = format!("{error:#}");
        assert!(
            text.contains("worker-killed.json: fault is not a text"),
            "{text}"
        );
    }
}
