//! Request and reply: what is asked, what is answered, and when it is too late to.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// What does it cost?
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Question {
    pub item: String,
    pub quantity: u64,
}

/// The questions of the example.
#[must_use]
pub fn question(number: u64) -> Question {
    Question {
        item: "label".to_owned(),
        quantity: number,
    }
}

/// An answer always comes, also when the question was wrong: whoever waits for one
/// cannot tell a refusal from a broken server otherwise.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// In cents.
    Price(u64),
    /// With the reason, for people.
    Refused(String),
}

/// What the server answers: a label costs ten cents.
#[must_use]
pub fn answer(payload: &[u8]) -> Answer {
    match serde_json::from_slice::<Question>(payload) {
        Ok(question) if question.item == "label" => {
            Answer::Price(question.quantity.saturating_mul(10))
        }
        Ok(question) => Answer::Refused(format!("no price for {}", question.item)),
        Err(error) => Answer::Refused(format!("not a question: {error}")),
    }
}

/// The header that says until when somebody waits, in milliseconds since 1970.
pub const DEADLINE: &str = "deadline";

/// That header for one who waits for so long from `now` on.
#[must_use]
pub fn deadline(now: SystemTime, patience: Duration) -> String {
    let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    (since + patience).as_millis().to_string()
}

// ANCHOR: late
/// Whether nobody waits any more. Then the server does not work for nothing, which it
/// has no time for, for it is late. The clocks of both have to agree, more or less. A
/// question without a deadline, or with one that is no number, is answered.
#[must_use]
pub fn is_late(deadline: Option<&str>, now: SystemTime) -> bool {
    let now = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    let deadline = deadline.and_then(|text| text.parse().ok());
    deadline.is_some_and(|deadline: u128| now.as_millis() > deadline)
}
// ANCHOR_END: late

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_question_has_an_answer() {
        let payload = serde_json::to_vec(&question(7)).expect("JSON");
        assert_eq!(answer(&payload), Answer::Price(70));
        let unknown = br#"{"item":"ship","quantity":1}"#;
        assert_eq!(
            answer(unknown),
            Answer::Refused("no price for ship".to_owned())
        );
        assert!(matches!(answer(b"\xff"), Answer::Refused(_)));
    }

    #[test]
    fn late_is_after_the_deadline() {
        let now = UNIX_EPOCH + Duration::from_secs(1000);
        let until = deadline(now, Duration::from_secs(2));
        assert_eq!(until, "1002000");
        assert!(!is_late(Some(&until), now + Duration::from_secs(2)));
        assert!(is_late(Some(&until), now + Duration::from_millis(2001)));
        assert!(!is_late(None, now));
        assert!(!is_late(Some("soon"), now));
    }
}
