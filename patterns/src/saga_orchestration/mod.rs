//! Saga: what the orchestrator and its services say to each other, and what comes
//! next.

mod sagas;
mod service;
#[cfg(test)]
mod walk;

pub use sagas::{Entry, Sagas, Sent};
pub use service::{Answered, Service};

use std::{
    str::FromStr,
    time::{SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};

/// What a customer wants.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    pub id: String,
    pub item: String,
    pub pieces: i64,
    /// In cents.
    pub total: i64,
    pub country: String,
}

/// The orders of the example. Of five, two go well; the others fail at the stock, at
/// the carrier, and at the bank.
#[must_use]
pub fn order(number: u64) -> Order {
    let (item, total, country) = match number % 5 {
        2 => ("teapot", 2_500, "France"),
        3 => ("cup", 2_500, "Atlantis"),
        0 => ("cup", 2_500_000, "France"),
        _ => ("cup", 2_500, "France"),
    };
    Order {
        id: format!("order-{number}"),
        item: item.to_owned(),
        pieces: 2,
        total,
        country: country.to_owned(),
    }
}

/// A service that takes commands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Participant {
    Payment,
    Stock,
    Shipping,
}

impl Participant {
    pub const ALL: [Self; 3] = [Self::Payment, Self::Stock, Self::Shipping];

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Payment => "payment",
            Self::Stock => "stock",
            Self::Shipping => "shipping",
        }
    }
}

impl FromStr for Participant {
    type Err = ();

    fn from_str(name: &str) -> Result<Self, ()> {
        let mut all = Self::ALL.into_iter();
        all.find(|it| it.name() == name).ok_or(())
    }
}

/// What a service can be told to do: three steps, and for each what takes it back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    Pay,
    Refund,
    Reserve,
    Release,
    Ship,
    Cancel,
}

impl Action {
    pub const ALL: [Self; 6] = [
        Self::Pay,
        Self::Refund,
        Self::Reserve,
        Self::Release,
        Self::Ship,
        Self::Cancel,
    ];

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Pay => "pay",
            Self::Refund => "refund",
            Self::Reserve => "reserve",
            Self::Release => "release",
            Self::Ship => "ship",
            Self::Cancel => "cancel",
        }
    }

    /// Who does it.
    #[must_use]
    pub fn participant(self) -> Participant {
        match self {
            Self::Pay | Self::Refund => Participant::Payment,
            Self::Reserve | Self::Release => Participant::Stock,
            Self::Ship | Self::Cancel => Participant::Shipping,
        }
    }

    /// Whether it takes another one back.
    #[must_use]
    pub fn takes_back(self) -> bool {
        matches!(self, Self::Refund | Self::Release | Self::Cancel)
    }
}

/// What the orchestrator sends to a service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Command {
    /// The same each time it is sent, so that the service can tell.
    pub id: String,
    pub action: Action,
    pub order: Order,
}

impl Command {
    #[must_use]
    pub fn new(action: Action, order: &Order) -> Self {
        Self {
            // An order is told each action once, so this is one of a kind.
            id: format!("{}.{}", order.id, action.name()),
            action,
            order: order.clone(),
        }
    }
}

/// What a service answers to a command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    /// That of the command.
    pub id: String,
    pub action: Action,
    /// The id of the order.
    pub order: String,
    pub outcome: Outcome,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    Done,
    /// Nothing has been done, for this reason.
    Refused(String),
}

/// What comes to the orchestrator.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Message {
    Placed(Order),
    Answered(Reply),
}

impl Message {
    /// As it travels.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        // Texts and numbers are always JSON.
        serde_json::to_vec(self).unwrap_or_default()
    }
}

/// How far an order is: what it waits for, or how it has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Paying,
    Reserving,
    Shipping,
    /// The end: paid, taken out of the stock, shipped.
    Completed,
    Cancelling,
    Releasing,
    Refunding,
    /// The other end: nothing paid, nothing taken, nothing shipped.
    Compensated,
}

impl State {
    pub const ALL: [Self; 8] = [
        Self::Paying,
        Self::Reserving,
        Self::Shipping,
        Self::Completed,
        Self::Cancelling,
        Self::Releasing,
        Self::Refunding,
        Self::Compensated,
    ];

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Paying => "paying",
            Self::Reserving => "reserving",
            Self::Shipping => "shipping",
            Self::Completed => "completed",
            Self::Cancelling => "cancelling",
            Self::Releasing => "releasing",
            Self::Refunding => "refunding",
            Self::Compensated => "compensated",
        }
    }

    // ANCHOR: action
    /// The command that is sent when an order enters this state, and whose answer it
    /// waits for. At its end there is none.
    #[must_use]
    pub fn action(self) -> Option<Action> {
        match self {
            Self::Paying => Some(Action::Pay),
            Self::Reserving => Some(Action::Reserve),
            Self::Shipping => Some(Action::Ship),
            Self::Cancelling => Some(Action::Cancel),
            Self::Releasing => Some(Action::Release),
            Self::Refunding => Some(Action::Refund),
            Self::Completed | Self::Compensated => None,
        }
    }
    // ANCHOR_END: action
}

impl FromStr for State {
    type Err = ();

    fn from_str(name: &str) -> Result<Self, ()> {
        let mut all = Self::ALL.into_iter();
        all.find(|state| state.name() == name).ok_or(())
    }
}

/// What happens to an order that waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    Done(Action),
    Refused(Action),
    /// The deadline has passed, and no answer has come.
    Silence,
}

// ANCHOR: next
/// The state after this event; none if it does not belong to this state, and then
/// nothing changes: an answer that comes twice, or too late.
#[must_use]
pub fn next(state: State, event: Event) -> Option<State> {
    use Action::{Cancel, Pay, Refund, Release, Reserve, Ship};
    use Event::{Done, Refused, Silence};
    use State::{
        Cancelling, Compensated, Completed, Paying, Refunding, Releasing, Reserving,
        Shipping,
    };
    let next = match (state, event) {
        // Forward.
        (Paying, Done(Pay)) => Reserving,
        (Reserving, Done(Reserve)) => Shipping,
        (Shipping, Done(Ship)) => Completed,
        // Refused: that step is not done, and those before it are taken back.
        (Paying, Refused(Pay)) => Compensated,
        (Reserving, Refused(Reserve)) => Refunding,
        (Shipping, Refused(Ship)) => Releasing,
        // Silent: it may be done, now or later, so that step is taken back, too.
        (Paying, Silence) => Refunding,
        (Reserving, Silence) => Releasing,
        (Shipping, Silence) => Cancelling,
        // Backward.
        (Cancelling, Done(Cancel)) => Releasing,
        (Releasing, Done(Release)) => Refunding,
        (Refunding, Done(Refund)) => Compensated,
        // Never given up, but told once more.
        (Cancelling | Releasing | Refunding, Silence) => state,
        _ => return None,
    };
    Some(next)
}
// ANCHOR_END: next

/// What the clock of this machine shows, in milliseconds since 1970.
#[must_use]
pub fn now() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.unwrap_or_default().as_millis();
    i64::try_from(now).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::{
        Action::{Cancel, Pay, Refund, Release, Reserve, Ship},
        Event::{Done, Refused, Silence},
        State::{
            Cancelling, Compensated, Completed, Paying, Refunding, Releasing,
            Reserving, Shipping,
        },
        *,
    };

    /// All that changes anything. Everything else is in no line, and changes
    /// nothing.
    const MOVES: [(State, Event, State); 15] = [
        (Paying, Done(Pay), Reserving),
        (Paying, Refused(Pay), Compensated),
        (Paying, Silence, Refunding),
        (Reserving, Done(Reserve), Shipping),
        (Reserving, Refused(Reserve), Refunding),
        (Reserving, Silence, Releasing),
        (Shipping, Done(Ship), Completed),
        (Shipping, Refused(Ship), Releasing),
        (Shipping, Silence, Cancelling),
        (Cancelling, Done(Cancel), Releasing),
        (Cancelling, Silence, Cancelling),
        (Releasing, Done(Release), Refunding),
        (Releasing, Silence, Releasing),
        (Refunding, Done(Refund), Compensated),
        (Refunding, Silence, Refunding),
    ];

    fn events() -> Vec<Event> {
        let done = Action::ALL.map(Done);
        let refused = Action::ALL.map(Refused);
        [&done[..], &refused[..], &[Silence]].concat()
    }

    #[test]
    fn each_event_in_each_state_does_what_the_table_says() {
        for state in State::ALL {
            for event in events() {
                let line = MOVES.iter().find(|it| (it.0, it.1) == (state, event));
                let expected = line.map(|it| it.2);
                assert_eq!(next(state, event), expected, "{state:?}, {event:?}");
            }
        }
    }

    #[test]
    fn only_the_two_ends_wait_for_nothing() {
        for state in State::ALL {
            let end = matches!(state, Completed | Compensated);
            assert_eq!(state.action().is_none(), end, "{state:?}");
            assert_eq!(next(state, Silence).is_none(), end, "{state:?}");
            assert_eq!(state.name().parse(), Ok(state));
        }
    }

    #[test]
    fn what_takes_back_is_asked_of_who_has_done_it() {
        for pair in [[Pay, Refund], [Reserve, Release], [Ship, Cancel]] {
            assert_eq!(pair.map(Action::takes_back), [false, true]);
            assert_eq!(pair[0].participant(), pair[1].participant());
        }
        for participant in Participant::ALL {
            assert_eq!(participant.name().parse(), Ok(participant));
        }
    }

    #[test]
    fn a_message_is_read_as_it_was_written() {
        let reply = Reply {
            id: "order-1.pay".to_owned(),
            action: Pay,
            order: "order-1".to_owned(),
            outcome: Outcome::Refused("no".to_owned()),
        };
        for message in [Message::Placed(order(1)), Message::Answered(reply)] {
            let read: Message =
                serde_json::from_slice(&message.to_json()).expect("JSON");
            assert_eq!(read, message);
        }
        let command = Command::new(Ship, &order(7));
        assert_eq!(command.id, "order-7.ship");
    }
}
