//! Splitter and aggregator: how an order is cut into lines, and when their answers
//! are one result.

mod orders;
#[cfg(test)]
mod walk;

pub use orders::{Entry, Orders, Place, Post, Taken};

use std::{
    collections::BTreeMap,
    fmt,
    time::{SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};

/// An order, as the shop writes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Basket {
    pub order: String,
    pub items: Vec<String>,
    /// Until when the customer waits, in milliseconds since 1970.
    pub until: i64,
}

/// More lines than this are a mistake.
const MOST_LINES: usize = 1_000;

/// The orders of the example: of two to four lines, and each fifth wants a teapot,
/// which is sold out.
#[must_use]
pub fn basket(number: u64, until: i64) -> Basket {
    let lines = match number % 3 {
        1 => 3,
        2 => 2,
        _ => 4,
    };
    let mut items = vec!["cup", "saucer", "spoon", "tray"];
    if number % 5 == 3 {
        items[1] = "teapot";
    }
    items.truncate(lines);
    Basket {
        order: format!("order-{number}"),
        items: items.into_iter().map(str::to_owned).collect(),
        until,
    }
}

// ---- The label -------------------------------------------------------------

/// The names of the headers.
pub mod header {
    pub const ORDER: &str = "order";
    pub const LINE: &str = "line";
    pub const TOTAL: &str = "total";
    pub const UNTIL: &str = "until";
    /// Why a message is set aside.
    pub const REASON: &str = "reason";
}

/// What stands in the headers of a message about an order, so that nobody has to read
/// the message to know what it belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Label {
    pub order: String,
    /// Counted from 1; none where it is about the whole order.
    pub line: Option<u32>,
    /// How many lines there are. With each of them: nobody knows which comes first.
    pub total: u32,
    /// Until when the customer waits, in milliseconds since 1970.
    pub until: i64,
}

impl Label {
    /// As text, which each broker carries alike.
    #[must_use]
    pub fn headers(&self) -> Vec<(&'static str, String)> {
        let mut headers = vec![
            (header::ORDER, self.order.clone()),
            (header::TOTAL, self.total.to_string()),
            (header::UNTIL, self.until.to_string()),
        ];
        if let Some(line) = self.line {
            headers.push((header::LINE, line.to_string()));
        }
        headers
    }

    /// Reads it from the headers of a message.
    ///
    /// # Errors
    ///
    /// What is wrong with it, for people.
    pub fn read(header: impl Fn(&str) -> Option<String>) -> Result<Self, String> {
        let text = |name| header(name).ok_or_else(|| format!("no {name}"));
        let number = |name: &str, text: String| {
            text.parse()
                .map_err(|_| format!("{name} {}", quoted(&text)))
        };
        let order = text(header::ORDER)?;
        let total = number(header::TOTAL, text(header::TOTAL)?)?;
        let until = text(header::UNTIL)?;
        let until = until
            .parse()
            .map_err(|_| format!("{} {}", header::UNTIL, quoted(&until)))?;
        let line = header(header::LINE);
        let line = line.map(|text| number(header::LINE, text)).transpose()?;
        let order = name(order)?;
        if let Some(line) = line
            && !(1..=total).contains(&line)
        {
            return Err(format!("line {line} of {total}"));
        }
        if total == 0 || total as usize > MOST_LINES {
            return Err(format!("{total} lines"));
        }
        Ok(Self {
            order,
            line,
            total,
            until,
        })
    }
}

/// An order needs a name that fits into a header and on a screen.
fn name(order: String) -> Result<String, String> {
    let fits = order.len() <= 100 && order.chars().all(|it| it.is_ascii_graphic());
    match fits && !order.is_empty() {
        true => Ok(order),
        false => Err(format!("order {}", quoted(&order))),
    }
}

/// What somebody has sent, as a part of one line that is not too long.
fn quoted(text: &str) -> String {
    let short: String = text.escape_debug().take(100).collect();
    format!("\"{short}\"")
}

fn not(what: &str, error: &serde_json::Error) -> String {
    let short: String = error.to_string().escape_debug().take(200).collect();
    format!("not {what}: {short}")
}

// ---- Splitter --------------------------------------------------------------

/// What goes from the splitter to a worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    pub item: String,
}

/// An order in pieces.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Split {
    /// For the aggregator: an order of which no line arrives has a deadline, too.
    pub opened: (Label, Vec<u8>),
    /// For the workers.
    pub lines: Vec<(Label, Vec<u8>)>,
}

// ANCHOR: split
/// Cuts an order into its lines. The same order gives the same lines with the same
/// labels, each time. So a splitter that dies in the middle remembers nothing: the
/// order comes again, and what was sent before is there twice.
///
/// # Errors
///
/// What is wrong with the order, for people.
pub fn split(payload: &[u8]) -> Result<Split, String> {
    let basket: Basket =
        serde_json::from_slice(payload).map_err(|error| not("an order", &error))?;
    let order = name(basket.order)?;
    let lines = basket.items.len();
    if lines == 0 || lines > MOST_LINES {
        return Err(format!("an order of {lines} lines"));
    }
    let total = u32::try_from(lines).map_err(|error| error.to_string())?;
    let label = |line| Label {
        order: order.clone(),
        line,
        total,
        until: basket.until,
    };
    let line = |(line, item): (u32, &String)| {
        let item = item.clone();
        (label(Some(line)), json(&Line { item }))
    };
    Ok(Split {
        opened: (label(None), json(&Word::Opened)),
        lines: (1..).zip(&basket.items).map(line).collect(),
    })
}
// ANCHOR_END: split

// ---- Worker ----------------------------------------------------------------

/// What a worker says of a line. A "no" is an answer, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    Reserved,
    SoldOut,
}

impl fmt::Display for Answer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Reserved => "reserved",
            Self::SoldOut => "sold out",
        })
    }
}

/// Reserves what a line says, and returns the answer with the label that it travels
/// under: that of the line.
///
/// # Errors
///
/// What is wrong with the line, for people.
pub fn work(
    label: Result<Label, String>,
    payload: &[u8],
) -> Result<(Label, Answer), String> {
    let label = label?;
    if label.line.is_none() {
        return Err("no line".to_owned());
    }
    let line: Line =
        serde_json::from_slice(payload).map_err(|error| not("a line", &error))?;
    let answer = match line.item.as_str() {
        "teapot" => Answer::SoldOut,
        _ => Answer::Reserved,
    };
    Ok((label, answer))
}

// ---- Aggregator ------------------------------------------------------------

/// What is said to the aggregator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Word {
    /// By the splitter.
    Opened,
    /// By the aggregator to itself, when the deadline has passed.
    Over,
    /// By a worker.
    #[serde(untagged)]
    Answered(Answer),
}

impl Word {
    /// As it travels.
    #[must_use]
    pub fn to_json(self) -> Vec<u8> {
        json(&self)
    }
}

/// A word with what it is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum News {
    Opened,
    Line(u32, Answer),
    Over,
}

impl News {
    fn read(label: &Label, payload: &[u8]) -> Result<Self, String> {
        let word: Word = serde_json::from_slice(payload)
            .map_err(|error| not("an answer", &error))?;
        match (word, label.line) {
            (Word::Opened, None) => Ok(Self::Opened),
            (Word::Answered(answer), Some(line)) => Ok(Self::Line(line, answer)),
            (Word::Over, None) => Ok(Self::Over),
            (Word::Answered(_), None) => Err("no line".to_owned()),
            (word, Some(line)) => Err(format!("{word:?} for line {line}")),
        }
    }
}

/// How an order has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// Each line has its answer.
    Complete,
    /// The deadline has passed before.
    Timeout,
}

/// When an order counts as complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    EachLineAnswered,
    /// The mistake: as many answers as lines, whichever they are.
    EnoughAnswers,
}

/// What is known of one order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gathering {
    pub total: u32,
    pub lines: BTreeMap<u32, Answer>,
    /// How many answers were written down. Only who is careless can tell this from
    /// the number of lines.
    pub heard: u32,
    pub end: Option<End>,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Write the answer down, and wait for more.
    Count,
    /// Write the answer down, if there is one, and the result beside it.
    Close(End),
    /// Nothing: it is known.
    Again,
    /// Nothing: the order has ended without it.
    Late,
    /// Two say different things about one order; nobody here knows who is right.
    Contradiction(String),
}

// ANCHOR: verdict
impl Gathering {
    /// What becomes of an order by what is said of it.
    #[must_use]
    pub fn verdict(&self, label: &Label, news: News, rule: Rule) -> Verdict {
        if label.total != self.total {
            let (first, other) = (self.total, label.total);
            let contradiction = format!("{other} lines, and before it was {first}");
            return Verdict::Contradiction(contradiction);
        }
        match (news, self.end) {
            (News::Opened, _) | (News::Over, Some(_)) => Verdict::Again,
            (News::Over, None) => Verdict::Close(End::Timeout),
            (News::Line(line, _), _) if self.is_known(line, rule) => Verdict::Again,
            (News::Line(..), Some(_)) => Verdict::Late,
            (News::Line(..), None) if self.is_last(rule) => {
                Verdict::Close(End::Complete)
            }
            (News::Line(..), None) => Verdict::Count,
        }
    }

    fn is_known(&self, line: u32, rule: Rule) -> bool {
        match rule {
            Rule::EachLineAnswered => self.lines.contains_key(&line),
            Rule::EnoughAnswers => false,
        }
    }

    /// Whether one more is all.
    fn is_last(&self, rule: Rule) -> bool {
        match rule {
            // Only lines that were not there before get as far as this.
            Rule::EachLineAnswered => self.lines.len() + 1 == self.total as usize,
            Rule::EnoughAnswers => self.heard + 1 >= self.total,
        }
    }
}
// ANCHOR_END: verdict

impl Gathering {
    #[must_use]
    pub fn new(total: u32) -> Self {
        Self {
            total,
            lines: BTreeMap::new(),
            heard: 0,
            end: None,
        }
    }

    /// What there is to say of it.
    #[must_use]
    pub fn report(&self, order: &str) -> Report {
        let with = |wanted: Option<Answer>| {
            let lines = 1..=self.total;
            lines
                .filter(|line| self.lines.get(line).copied() == wanted)
                .collect()
        };
        Report {
            order: order.to_owned(),
            end: self.end,
            reserved: with(Some(Answer::Reserved)),
            sold_out: with(Some(Answer::SoldOut)),
            missing: with(None),
        }
    }
}

/// The result of an order: each of its lines, by its number.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    pub order: String,
    /// None while it is open, and then nobody sends it.
    pub end: Option<End>,
    pub reserved: Vec<u32>,
    pub sold_out: Vec<u32>,
    pub missing: Vec<u32>,
}

impl Report {
    fn end(&self) -> &'static str {
        match self.end {
            None => "open",
            Some(End::Complete) => "complete",
            Some(End::Timeout) => "timeout",
        }
    }

    /// The order and how it has ended.
    #[must_use]
    pub fn summary(&self) -> String {
        format!("{} {}", self.order, self.end())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.end())?;
        for (what, lines) in [
            ("reserved", &self.reserved),
            ("sold out", &self.sold_out),
            ("missing", &self.missing),
        ] {
            if !lines.is_empty() {
                write!(formatter, ", {what}:")?;
            }
            for line in lines {
                write!(formatter, " {line}")?;
            }
        }
        Ok(())
    }
}

/// As it travels.
#[must_use]
pub fn json(value: &impl Serialize) -> Vec<u8> {
    // Texts and numbers are always JSON.
    serde_json::to_vec(value).unwrap_or_default()
}

/// What the clock of this machine shows, in milliseconds since 1970.
#[must_use]
pub fn now() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.unwrap_or_default().as_millis();
    i64::try_from(now).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn label(line: Option<u32>, total: u32) -> Label {
        Label {
            order: "order-1".to_owned(),
            line,
            total,
            until: 1_000,
        }
    }

    /// Tells a gathering of three lines this, and returns what became of it.
    fn told(gathering: &mut Gathering, line: u32, rule: Rule) -> Verdict {
        let news = News::Line(line, Answer::Reserved);
        let verdict = gathering.verdict(&label(Some(line), 3), news, rule);
        gathering.heard += 1;
        if let Verdict::Count | Verdict::Close(_) = verdict {
            gathering.lines.insert(line, Answer::Reserved);
        }
        if let Verdict::Close(end) = verdict {
            gathering.end = Some(end);
        }
        verdict
    }

    #[test]
    fn the_lines_of_an_order_are_the_same_each_time() {
        let basket = json(&basket(3, 1_000));
        let split = super::split(&basket).expect("an order");
        assert_eq!(split, super::split(&basket).expect("an order"));
        assert_eq!(
            split.opened,
            (
                Label {
                    order: "order-3".to_owned(),
                    ..label(None, 4)
                },
                br#""opened""#.to_vec()
            )
        );
        let lines: Vec<_> = split
            .lines
            .iter()
            .map(|(label, payload)| (label.line, String::from_utf8_lossy(payload)))
            .collect();
        assert_eq!(lines[0], (Some(1), r#"{"item":"cup"}"#.into()));
        assert_eq!(lines[1], (Some(2), r#"{"item":"teapot"}"#.into()));
        assert_eq!(lines.len(), 4);
    }

    #[test]
    fn what_is_no_order_is_not_split() {
        let many = vec!["cup".to_owned(); MOST_LINES + 1];
        for (order, items) in
            [("", vec!["cup".to_owned()]), ("a", vec![]), ("a", many)]
        {
            let order = order.to_owned();
            let until = 0;
            let basket = json(&Basket {
                order,
                items,
                until,
            });
            super::split(&basket).expect_err("not an order");
        }
        super::split(b"\xff").expect_err("not an order");
        let quoted = super::split(b"{\"a\\nb\":1,\"order\":\"a\\nb\"}");
        let quoted = quoted.expect_err("not an order");
        assert!(!quoted.contains('\n'), "{quoted}");
    }

    #[test]
    fn a_label_is_read_as_it_was_written() {
        for line in [None, Some(1), Some(3)] {
            let headers = label(line, 3).headers();
            let read = Label::read(|name| {
                let mut headers = headers.iter();
                let found = headers.find(|header| header.0 == name);
                found.map(|header| header.1.clone())
            });
            assert_eq!(read, Ok(label(line, 3)));
        }
    }

    #[test]
    fn a_wrong_label_says_what_is_wrong_with_it() {
        let right = [
            ("order", "a"),
            ("line", "2"),
            ("total", "3"),
            ("until", "9"),
        ];
        for (name, text, wrong) in [
            ("order", None, "no order"),
            ("order", Some(""), "order \"\""),
            ("order", Some("a\nb"), "order \"a\\nb\""),
            ("total", None, "no total"),
            ("total", Some("-3"), "total \"-3\""),
            ("total", Some("1"), "line 2 of 1"),
            ("total", Some("1001"), "1001 lines"),
            ("line", Some("0"), "line 0 of 3"),
            ("line", Some("4"), "line 4 of 3"),
            ("line", Some("x"), "line \"x\""),
            ("until", Some("soon"), "until \"soon\""),
        ] {
            let read = Label::read(|asked| {
                if asked == name {
                    return text.map(str::to_owned);
                }
                let found = right.iter().find(|header| header.0 == asked);
                found.map(|header| header.1.to_owned())
            });
            assert_eq!(read, Err(wrong.to_owned()));
        }
    }

    #[test]
    fn a_worker_answers_for_a_line_and_refuses_what_is_none() {
        let line = |item: &str| {
            let item = item.to_owned();
            json(&Line { item })
        };
        let two = || Ok(label(Some(2), 3));
        for (item, answer) in
            [("cup", Answer::Reserved), ("teapot", Answer::SoldOut)]
        {
            let expected = Ok((label(Some(2), 3), answer));
            assert_eq!(work(two(), &line(item)), expected);
        }
        work(two(), b"\xff").expect_err("not a line");
        work(Ok(label(None, 3)), &line("cup")).expect_err("not a line");
        let wrong = Err("line 4 of 3".to_owned());
        assert_eq!(
            work(wrong.clone(), &line("cup")),
            Err("line 4 of 3".to_owned())
        );
    }

    #[test]
    fn each_word_is_about_a_line_or_about_the_whole() {
        let read = |line, word: Word| News::read(&label(line, 3), &word.to_json());
        let reserved = Word::Answered(Answer::Reserved);
        assert_eq!(read(None, Word::Opened), Ok(News::Opened));
        assert_eq!(read(None, Word::Over), Ok(News::Over));
        let line = News::Line(2, Answer::Reserved);
        assert_eq!(read(Some(2), reserved), Ok(line));
        for (line, word) in [
            (Some(2), Word::Opened),
            (Some(2), Word::Over),
            (None, reserved),
        ] {
            read(line, word).expect_err("a wrong label");
        }
        let noise = News::read(&label(None, 3), b"\xff");
        noise.expect_err("not an answer");
        assert_eq!(reserved.to_json(), br#""reserved""#);
    }

    #[test]
    fn an_order_is_complete_by_its_lines_and_not_by_their_number() {
        let rule = Rule::EachLineAnswered;
        let mut gathering = Gathering::new(3);
        for (line, verdict) in [
            (3, Verdict::Count),
            (3, Verdict::Again),
            (3, Verdict::Again),
            (1, Verdict::Count),
            (2, Verdict::Close(End::Complete)),
            (2, Verdict::Again),
        ] {
            assert_eq!(told(&mut gathering, line, rule), verdict);
        }
        let report = gathering.report("order-1");
        assert_eq!(report.to_string(), "complete, reserved: 1 2 3");
    }

    #[test]
    fn who_counts_answers_is_content_with_one_line_three_times() {
        let rule = Rule::EnoughAnswers;
        let mut gathering = Gathering::new(3);
        assert_eq!(told(&mut gathering, 1, rule), Verdict::Count);
        assert_eq!(told(&mut gathering, 1, rule), Verdict::Count);
        let end = Verdict::Close(End::Complete);
        assert_eq!(told(&mut gathering, 1, rule), end);
        let report = gathering.report("order-1");
        assert_eq!(report.to_string(), "complete, reserved: 1, missing: 2 3");
    }

    #[test]
    fn the_deadline_ends_an_order_once_and_what_comes_then_is_late() {
        let rule = Rule::EachLineAnswered;
        let mut gathering = Gathering::new(3);
        told(&mut gathering, 2, rule);
        let over = |it: &Gathering| it.verdict(&label(None, 3), News::Over, rule);
        assert_eq!(over(&gathering), Verdict::Close(End::Timeout));
        gathering.end = Some(End::Timeout);
        assert_eq!(over(&gathering), Verdict::Again);
        assert_eq!(told(&mut gathering, 3, rule), Verdict::Late);
        assert_eq!(told(&mut gathering, 2, rule), Verdict::Again);
        let report = gathering.report("order-1");
        assert_eq!(report.to_string(), "timeout, reserved: 2, missing: 1 3");
    }

    #[test]
    fn another_total_is_a_contradiction_whatever_else_it_says() {
        let rule = Rule::EachLineAnswered;
        let mut gathering = Gathering::new(3);
        for end in [None, Some(End::Complete), Some(End::Timeout)] {
            gathering.end = end;
            for news in [News::Opened, News::Over, News::Line(1, Answer::Reserved)] {
                let verdict = gathering.verdict(&label(None, 4), news, rule);
                let said = "4 lines, and before it was 3".to_owned();
                assert_eq!(verdict, Verdict::Contradiction(said));
            }
        }
    }
}
