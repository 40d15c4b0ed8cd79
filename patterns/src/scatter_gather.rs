//! Scatter and gather: what a carrier answers, what counts as an answer, and which
//! offer is taken.

use std::{
    fmt::{self, Write as _},
    num::NonZeroU32,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};

/// So many carriers has the shop a contract with. No broker tells how many listen: who
/// wants to stop before the deadline has to know it.
pub const ASKED: usize = 3;

/// How long the shop waits, unless it is told.
pub const DEADLINE: Duration = Duration::from_millis(2500);

/// How long a slow carrier takes for an answer.
pub const SLOW: Duration = Duration::from_secs(4);

/// What does it cost to send this?
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Question {
    /// In kilograms.
    pub weight: NonZeroU32,
    /// Until when somebody waits, in milliseconds since 1970. The clocks of both have
    /// to agree, more or less.
    pub until: u64,
}

impl Question {
    /// A question of one who waits for so long from `now` on.
    #[must_use]
    pub fn new(weight: NonZeroU32, deadline: Duration, now: SystemTime) -> Self {
        let until = since_1970(now).saturating_add(millis(deadline));
        Self { weight, until }
    }

    /// Whether nobody waits any more.
    #[must_use]
    pub fn is_late(&self, now: SystemTime) -> bool {
        since_1970(now) > self.until
    }
}

fn since_1970(now: SystemTime) -> u64 {
    millis(now.duration_since(UNIX_EPOCH).unwrap_or_default())
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// A "no" is an answer too. Without one the shop would wait until its deadline for
/// somebody who has decided long ago.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// In cents.
    Offer(u64),
    /// With the reason, for people.
    Refused(String),
}

// ---- A carrier -------------------------------------------------------------

/// One who is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Carrier {
    /// A word; it goes into headers and names.
    pub name: String,
    /// For each kilogram.
    pub cents: u32,
    pub manner: Manner,
}

/// How it answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Manner {
    AtOnce,
    /// After [`SLOW`].
    Slow,
    Refuses,
    /// With bytes that are no answer.
    Garbled,
    /// As one that was killed before its acknowledgement, and is asked again.
    Twice,
}

/// What it is to do for a question.
#[derive(Debug, PartialEq, Eq)]
pub struct Work {
    /// What is asked, for people.
    pub asked: String,
    pub takes: Duration,
    /// What it sends then, one after the other.
    pub replies: Vec<Vec<u8>>,
}

impl Carrier {
    /// Reads a carrier from the words behind `carrier`, if they are right.
    #[must_use]
    pub fn parse(words: &[&str]) -> Option<Self> {
        let (name, cents, manner) = match *words {
            [name, cents] => (name, cents, Manner::AtOnce),
            [name, cents, "--slow"] => (name, cents, Manner::Slow),
            [name, cents, "--refuses"] => (name, cents, Manner::Refuses),
            [name, cents, "--garbled"] => (name, cents, Manner::Garbled),
            [name, cents, "--twice"] => (name, cents, Manner::Twice),
            _ => return None,
        };
        let word = |it: char| it.is_ascii_alphanumeric();
        if name.is_empty() || name.len() > 40 || !name.chars().all(word) {
            return None;
        }
        Some(Self {
            name: name.to_owned(),
            cents: cents.parse().ok()?,
            manner,
        })
    }

    /// What to do for a question that has come in these bytes; nothing if nobody waits
    /// any more.
    ///
    /// # Errors
    ///
    /// If the answer cannot be written.
    pub fn work(
        &self,
        payload: &[u8],
        now: SystemTime,
    ) -> serde_json::Result<Option<Work>> {
        let question: Question = match serde_json::from_slice(payload) {
            Ok(question) => question,
            Err(error) => {
                let refused = Answer::Refused(format!("not a question: {error}"));
                return Ok(Some(Work {
                    asked: format!("{} bytes", payload.len()),
                    takes: Duration::ZERO,
                    replies: vec![serde_json::to_vec(&refused)?],
                }));
            }
        };
        if question.is_late(now) {
            return Ok(None);
        }
        let weight = question.weight.get();
        let offer = Answer::Offer(u64::from(self.cents) * u64::from(weight));
        let offer = serde_json::to_vec(&offer)?;
        let refused = Answer::Refused("no van today".to_owned());
        let replies = match self.manner {
            Manner::AtOnce | Manner::Slow => vec![offer],
            Manner::Refuses => vec![serde_json::to_vec(&refused)?],
            Manner::Garbled => vec![b"\xff".to_vec()],
            Manner::Twice => vec![offer.clone(), offer],
        };
        let takes = if self.manner == Manner::Slow {
            SLOW
        } else {
            Duration::ZERO
        };
        let asked = format!("{weight} kg");
        Ok(Some(Work {
            asked,
            takes,
            replies,
        }))
    }
}

// ---- The gathering ---------------------------------------------------------

// ANCHOR: gather
/// The answers to one question.
#[derive(Debug)]
pub struct Gather {
    /// The correlation id of the question.
    id: String,
    /// As they have come. `None` is a "no".
    answers: Vec<(String, Option<u64>)>,
}

/// Something that has come back.
#[derive(Debug, Clone, Copy)]
pub struct Reply<'a> {
    /// The correlation id of the question that it answers.
    pub id: Option<&'a str>,
    /// Beside the answer and not in it: whoever sends rubbish has answered.
    pub carrier: Option<&'a str>,
    pub payload: &'a [u8],
}

/// What a reply is to this gathering.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    Counted,
    /// A reply to another question: mostly one that comes late.
    Elsewhere,
    /// This carrier has answered already, and the first answer counts.
    Again,
    /// Nobody knows whose it is, so nobody knows whether it is a second one.
    Nameless,
}

impl Gather {
    #[must_use]
    pub fn new(id: &str) -> Self {
        Self {
            id: id.to_owned(),
            answers: Vec::new(),
        }
    }

    /// Counts a reply, unless it is not for this question or not the first.
    pub fn take(&mut self, reply: &Reply<'_>) -> Taken {
        if reply.id != Some(self.id.as_str()) {
            return Taken::Elsewhere;
        }
        let Some(carrier) = reply.carrier else {
            return Taken::Nameless;
        };
        if self.answers.iter().any(|(name, _offer)| name == carrier) {
            return Taken::Again;
        }
        // What cannot be read is a "no", and not the end of the gathering.
        let offer = match serde_json::from_slice(reply.payload) {
            Ok(Answer::Offer(cents)) => Some(cents),
            Ok(Answer::Refused(_)) | Err(_) => None,
        };
        self.answers.push((carrier.to_owned(), offer));
        Taken::Counted
    }

    /// Whether all that were asked have answered.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.answers.len() >= ASKED
    }

    /// The cheapest offer, in cents; of equal ones the earliest.
    #[must_use]
    pub fn best(&self) -> Option<(&str, u64)> {
        let answers = self.answers.iter();
        let offers = answers.filter_map(|(name, offer)| Some((name, (*offer)?)));
        // Of several that are equal, this is the first.
        let best = offers.min_by_key(|(_name, cents)| *cents)?;
        Some((best.0.as_str(), best.1))
    }
}
// ANCHOR_END: gather

/// Why a gathering has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    Complete,
    Deadline,
    /// The broker says that nobody listens.
    Nobody,
    /// The careless rule.
    First,
}

impl fmt::Display for End {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Complete => "before the deadline",
            Self::Deadline => "by the deadline",
            Self::Nobody => "nobody listens",
            Self::First => "the first offer is enough",
        })
    }
}

impl Gather {
    /// Who has answered, by name, and what is taken: two lines.
    #[must_use]
    pub fn report(&self, end: End) -> String {
        let mut report =
            format!("answered: {} of {ASKED}, {end}", self.answers.len());
        // By name, so that it does not depend on who was quicker.
        let mut by_name: Vec<_> = self.answers.iter().collect();
        by_name.sort();
        let answers = by_name.into_iter().map(|(name, offer)| match offer {
            Some(cents) => format!("{name} {cents}"),
            None => format!("{name} no"),
        });
        let answers: Vec<String> = answers.collect();
        if !answers.is_empty() {
            // Writing into a String cannot fail.
            let _ = write!(report, ": {}", answers.join(", "));
        }
        let _ = match self.best() {
            Some((name, cents)) => {
                write!(report, "\ntaken:    {name} for {cents} cents")
            }
            None => write!(report, "\nnone:     no offer"),
        };
        report
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kilograms(weight: u32) -> NonZeroU32 {
        NonZeroU32::new(weight).expect("not 0")
    }

    fn offer(cents: u64) -> Vec<u8> {
        serde_json::to_vec(&Answer::Offer(cents)).expect("JSON")
    }

    fn take(gather: &mut Gather, id: &str, carrier: &str, payload: &[u8]) -> Taken {
        gather.take(&Reply {
            id: Some(id),
            carrier: Some(carrier),
            payload,
        })
    }

    #[test]
    fn the_cheapest_is_taken_and_of_equal_ones_the_earliest() {
        let mut gather = Gather::new("1");
        assert_eq!(gather.best(), None);
        for (name, cents) in [("a", 9), ("c", 7), ("b", 7)] {
            assert!(!gather.is_complete());
            let taken = take(&mut gather, "1", name, &offer(cents));
            assert_eq!(taken, Taken::Counted);
        }
        assert!(gather.is_complete());
        assert_eq!(gather.best(), Some(("c", 7)));
        assert_eq!(
            gather.report(End::Complete),
            "answered: 3 of 3, before the deadline: a 9, b 7, c 7\n\
             taken:    c for 7 cents"
        );
    }

    #[test]
    fn a_no_is_an_answer_and_no_offer() {
        let mut gather = Gather::new("1");
        let refused = br#"{"Refused":"no van today"}"#;
        assert_eq!(take(&mut gather, "1", "a", refused), Taken::Counted);
        assert_eq!(take(&mut gather, "1", "b", b"\xff"), Taken::Counted);
        assert_eq!(gather.best(), None);
        assert_eq!(
            gather.report(End::Deadline),
            "answered: 2 of 3, by the deadline: a no, b no\nnone:     no offer"
        );
    }

    #[test]
    fn what_is_not_for_it_or_comes_again_does_not_count() {
        let mut gather = Gather::new("2");
        assert_eq!(take(&mut gather, "1", "a", &offer(1)), Taken::Elsewhere);
        assert_eq!(take(&mut gather, "2", "a", &offer(5)), Taken::Counted);
        assert_eq!(take(&mut gather, "2", "a", &offer(1)), Taken::Again);
        let mut reply = Reply {
            id: Some("2"),
            carrier: None,
            payload: b"",
        };
        assert_eq!(gather.take(&reply), Taken::Nameless);
        reply.id = None;
        assert_eq!(gather.take(&reply), Taken::Elsewhere);
        assert_eq!(gather.best(), Some(("a", 5)));
    }

    #[test]
    fn a_carrier_answers_by_weight_and_not_when_nobody_waits() {
        let now = UNIX_EPOCH + Duration::from_secs(1000);
        let question = Question::new(kilograms(3), Duration::from_secs(1), now);
        let payload = serde_json::to_vec(&question).expect("JSON");
        let replies = |words: &[&str], now| {
            let carrier = Carrier::parse(words).expect("words");
            let work = carrier.work(&payload, now).expect("JSON");
            work.map(|work| (work.replies, work.takes))
        };
        let until = now + Duration::from_secs(1);
        assert_eq!(
            replies(&["swift", "790"], until),
            Some((vec![offer(2370)], Duration::ZERO))
        );
        assert_eq!(
            replies(&["snail", "390", "--slow"], until),
            Some((vec![offer(1170)], SLOW))
        );
        let twice = replies(&["swift", "790", "--twice"], until);
        assert_eq!(twice, Some((vec![offer(2370); 2], Duration::ZERO)));
        let late = until + Duration::from_millis(1);
        assert_eq!(replies(&["swift", "790"], late), None);
    }

    #[test]
    fn wrong_bytes_are_refused_and_wrong_words_are_no_carrier() {
        let carrier = Carrier::parse(&["swift", "790"]).expect("words");
        let zero = br#"{"weight":0,"until":99999999999999}"#;
        for payload in [b"\xff".as_slice(), zero] {
            let work = carrier.work(payload, UNIX_EPOCH).expect("JSON");
            let reply = &work.expect("an answer").replies[0];
            let answer: Answer = serde_json::from_slice(reply).expect("JSON");
            assert!(matches!(answer, Answer::Refused(_)), "{answer:?}");
        }
        let long = "a".repeat(41);
        for words in [
            ["swift"].as_slice(),
            &["", "1"],
            &["a b", "1"],
            &[&long, "1"],
            &["swift", "-1"],
            &["swift", "1", "--fast"],
        ] {
            assert_eq!(Carrier::parse(words), None, "{words:?}");
        }
    }
}
