//! Content-based router: what is read from an order, which rule is for it, and where
//! a table of rules sends it.

use std::{
    collections::BTreeMap,
    fmt::{self, Write as _},
    ops::RangeInclusive,
    str::FromStr,
};

use serde::{Deserialize, Serialize};

/// From so many cents on, a person looks at an order before it is packed.
pub const LARGE: u64 = 100_000;

/// What stands in place of country and class if nobody can read the order.
pub const UNREADABLE: &str = "unreadable";

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    pub id: String,
    pub country: String,
    /// In cents.
    pub total: u64,
}

/// An order as a partner of the shop sends it: of each ten, five go to Germany and
/// three to France, two of these eight are large, one goes to Iceland, one to Italy.
/// One more is none of these: bytes that are no order.
///
/// # Errors
///
/// If it cannot be written as JSON.
pub fn order(number: u64) -> serde_json::Result<Vec<u8>> {
    let (country, total) = match number % 10 {
        0 => return Ok([b"\xff\xfe ", id(number).as_bytes()].concat()),
        2 | 4 => ("FR", 4_900),
        3 => ("DE", 129_000),
        6 => ("IS", 2_500),
        7 => ("FR", LARGE),
        9 => ("IT", LARGE - 1),
        _ => ("DE", 1_900),
    };
    serde_json::to_vec(&Order {
        id: id(number),
        country: country.to_owned(),
        total,
    })
}

/// The name of an order, also of one that nobody can read: it stands beside the bytes.
#[must_use]
pub fn id(number: u64) -> String {
    format!("order-{number}")
}

/// The orders from the first to the last, if these are two words for that.
#[must_use]
pub fn numbers(first: &str, last: &str) -> Option<RangeInclusive<u64>> {
    let (first, last) = (first.parse().ok()?, last.parse().ok()?);
    (1 <= first && first <= last && last <= 1_000_000).then_some(first..=last)
}

// ---- What is read from an order --------------------------------------------

/// Two letters from A to Z, as in `FR`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Country(String);

impl FromStr for Country {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        // It becomes a part of a routing key or of a subject. There a dot begins the
        // next part, and `*`, `#` and `>` stand for others.
        if word.len() == 2 && word.bytes().all(|it| it.is_ascii_uppercase()) {
            Ok(Self(word.to_owned()))
        } else {
            Err(format!("no country: {word:?}"))
        }
    }
}

impl fmt::Display for Country {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

// ANCHOR: key
/// What decides where an order goes, such as `FR.small`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    pub country: Country,
    pub large: bool,
}

impl Key {
    /// Reads an order.
    ///
    /// # Errors
    ///
    /// If the bytes are none, with the reason for people.
    pub fn of(payload: &[u8]) -> Result<Self, String> {
        let order: Order =
            serde_json::from_slice(payload).map_err(|it| it.to_string())?;
        Ok(Self {
            country: order.country.parse()?,
            large: order.total >= LARGE,
        })
    }
}

/// Which orders: the large ones of all countries, or the small ones of one. No order
/// fits two rules, so none can go to two places.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rule {
    Large,
    Country(Country),
}

impl Rule {
    /// The one that an order with this key fits.
    #[must_use]
    pub fn of(key: &Key) -> Self {
        if key.large {
            Self::Large
        } else {
            Self::Country(key.country.clone())
        }
    }

    /// As RabbitMQ's topic exchanges and the subjects of NATS write it.
    #[must_use]
    pub fn pattern(&self) -> String {
        match self {
            Self::Large => "*.large".to_owned(),
            Self::Country(country) => format!("{country}.small"),
        }
    }
}
// ANCHOR_END: key

impl fmt::Display for Key {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let class = if self.large { "large" } else { "small" };
        write!(formatter, "{}.{class}", self.country)
    }
}

impl FromStr for Rule {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        match word {
            "large" => Ok(Self::Large),
            country => Ok(Self::Country(country.parse()?)),
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Large => formatter.write_str("large"),
            Self::Country(country) => country.fmt(formatter),
        }
    }
}

/// Where the publisher says that an order belongs: its key, or [`UNREADABLE`].
#[must_use]
pub fn address(payload: &[u8]) -> String {
    Key::of(payload).map_or_else(|_| UNREADABLE.to_owned(), |key| key.to_string())
}

/// The message filter: whether an order is from this country. The rest is passed over.
#[must_use]
pub fn is_from(country: &Country, payload: &[u8]) -> bool {
    Key::of(payload).is_ok_and(|key| key.country == *country)
}

// ---- Where it goes ---------------------------------------------------------

/// Where an order can end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Place {
    /// The desk where a person looks at it.
    Review,
    Berlin,
    Lyon,
    /// No rule is for it, or nobody can read it. A place like the others: it can be
    /// looked at, and nothing in it is lost.
    Unrouted,
}

impl Place {
    pub const ALL: [Self; 4] =
        [Self::Review, Self::Berlin, Self::Lyon, Self::Unrouted];
    /// Those that a rule can lead to.
    pub const DESTINATIONS: [Self; 3] = [Self::Review, Self::Berlin, Self::Lyon];

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Review => "review",
            Self::Berlin => "berlin",
            Self::Lyon => "lyon",
            Self::Unrouted => "unrouted",
        }
    }

    /// The destinations from which a rule has to be taken when it is to lead here.
    pub fn others(self) -> impl Iterator<Item = Self> {
        Self::DESTINATIONS
            .into_iter()
            .filter(move |other| *other != self)
    }
}

impl FromStr for Place {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        let mut all = Self::ALL.into_iter();
        let place = all.find(|place| place.name() == word);
        place.ok_or_else(|| format!("no place: {word:?}"))
    }
}

impl fmt::Display for Place {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

/// Why an order is in [`Place::Unrouted`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    /// Routing it again changes nothing.
    NoOrder(String),
    /// One day there may be a rule for it.
    NoRoute(Key),
}

impl Reason {
    /// The reason that an order has, if no rule is for it.
    #[must_use]
    pub fn of(payload: &[u8]) -> Self {
        Key::of(payload).map_or_else(Self::NoOrder, Self::NoRoute)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoOrder(error) => write!(formatter, "no order: {error}"),
            Self::NoRoute(key) => write!(formatter, "no route for {key}"),
        }
    }
}

// ANCHOR: table
/// The route table, for a broker that does not route by itself.
#[derive(Debug, Default)]
pub struct Table(BTreeMap<Rule, Place>);

impl Table {
    /// Takes one row, the rule and the place. Without a place the rule is over.
    ///
    /// # Errors
    ///
    /// If it cannot be read. A rule whose place cannot be read is over as well: its
    /// orders are unrouted, where somebody sees them, and the others go on.
    pub fn learn(
        &mut self,
        rule: &[u8],
        place: Option<&[u8]>,
    ) -> Result<(Rule, Place), String> {
        let rule: Rule = String::from_utf8_lossy(rule).parse()?;
        self.0.remove(&rule);
        let place = match place {
            Some(place) => String::from_utf8_lossy(place).parse()?,
            None => Place::Unrouted,
        };
        if place != Place::Unrouted {
            self.0.insert(rule.clone(), place);
        }
        Ok((rule, place))
    }

    /// Where an order goes; if to no destination, why.
    ///
    /// # Errors
    ///
    /// If it is unrouted.
    pub fn decide(&self, payload: &[u8]) -> Result<Place, Reason> {
        let key = Key::of(payload).map_err(Reason::NoOrder)?;
        let place = self.0.get(&Rule::of(&key));
        place.copied().ok_or(Reason::NoRoute(key))
    }
}
// ANCHOR_END: table

// ---- For people ------------------------------------------------------------

/// Its id, or how many bytes it has.
#[must_use]
pub fn name(payload: &[u8]) -> String {
    let order = serde_json::from_slice(payload);
    order.map_or_else(|_| format!("{} bytes", payload.len()), |it: Order| it.id)
}

/// How many names stand on a line.
const SHOWN: usize = 8;

/// What is in a place: a line, and for what is unrouted a line each.
#[must_use]
pub fn listing(place: Place, payloads: &[Vec<u8>]) -> String {
    let label = format!("{place}:");
    let mut names: Vec<(u64, String)> = payloads
        .iter()
        .map(|payload| {
            let name = name(payload);
            let number = name.strip_prefix("order-").map(str::parse);
            let number = number.and_then(Result::ok).unwrap_or(u64::MAX);
            match place {
                Place::Unrouted => {
                    (number, format!("{name}, {}", Reason::of(payload)))
                }
                _ => (number, name),
            }
        })
        .collect();
    // As they were numbered, and not as they have come.
    names.sort();
    let names: Vec<String> = names.into_iter().map(|(_number, name)| name).collect();
    let shown = &names[..names.len().min(SHOWN)];
    let mut listing = match place {
        _ if names.is_empty() => format!("{label:<9} nothing"),
        Place::Unrouted => {
            let lines = shown.iter().map(|name| format!("{label:<9} {name}"));
            lines.collect::<Vec<_>>().join("\n")
        }
        _ => format!("{label:<9} {}", shown.join(", ")),
    };
    if names.len() > SHOWN {
        // Writing into a String cannot fail.
        let _ = write!(listing, ", and {} more", names.len() - SHOWN);
    }
    listing
}

#[cfg(test)]
mod tests {
    use super::*;

    fn orders(numbers: RangeInclusive<u64>) -> Vec<Vec<u8>> {
        numbers.map(|number| order(number).expect("JSON")).collect()
    }

    fn table(rows: &[(&str, &str)]) -> Table {
        let mut table = Table::default();
        for (rule, place) in rows {
            let learned = table.learn(rule.as_bytes(), Some(place.as_bytes()));
            learned.expect("a row");
        }
        table
    }

    #[test]
    fn value_decides_before_country_and_the_rest_is_unrouted_with_a_reason() {
        let rows = [("large", "review"), ("DE", "berlin"), ("FR", "berlin")];
        let table = table(&rows);
        let decided: Vec<String> = orders(1..=10)
            .iter()
            .map(|payload| match table.decide(payload) {
                Ok(place) => place.to_string(),
                Err(reason) => reason.to_string(),
            })
            .collect();
        assert_eq!(
            decided,
            [
                "berlin",
                "berlin",
                "review",
                "berlin",
                "berlin",
                "no route for IS.small",
                "review",
                "berlin",
                "no route for IT.small",
                "no order: expected value at line 1 column 1",
            ]
        );
    }

    #[test]
    fn a_later_row_takes_the_place_of_an_earlier_one() {
        let mut table = table(&[("FR", "berlin"), ("FR", "lyon"), ("DE", "berlin")]);
        let french = &orders(2..=2)[0];
        assert_eq!(table.decide(french), Ok(Place::Lyon));
        for over in [None, Some(b"unrouted".as_slice())] {
            table.learn(b"FR", Some(b"lyon")).expect("a row");
            assert_eq!(table.decide(french), Ok(Place::Lyon));
            let learned = table.learn(b"FR", over).expect("a row");
            assert_eq!(learned.1, Place::Unrouted);
            assert_eq!(table.decide(french), Err(Reason::of(french)));
        }
    }

    #[test]
    fn a_row_that_cannot_be_read_ends_its_rule_and_no_other() {
        let mut table = table(&[("FR", "lyon"), ("DE", "berlin")]);
        table.learn(b"FR", Some(b"\xff")).expect_err("no place");
        table.learn(b"\xff", Some(b"lyon")).expect_err("no rule");
        let [german, french] = &orders(1..=2)[..] else {
            panic!("two orders");
        };
        assert_eq!(table.decide(german), Ok(Place::Berlin));
        assert!(table.decide(french).is_err());
    }

    #[test]
    fn a_country_that_would_be_a_pattern_or_two_parts_is_none() {
        for country in ["F.R", "*", "**", ">", "#", "fr", "", "FRA", "É"] {
            let order = Order {
                id: "order-1".to_owned(),
                country: country.to_owned(),
                total: 1,
            };
            let payload = serde_json::to_vec(&order).expect("JSON");
            Key::of(&payload).expect_err(country);
            assert_eq!(address(&payload), UNREADABLE);
        }
        assert_eq!(address(&orders(2..=2)[0]), "FR.small");
        assert_eq!(address(&orders(7..=7)[0]), "FR.large");
    }

    #[test]
    fn no_key_fits_the_patterns_of_two_rules() {
        let rules = ["large", "FR", "DE"].map(|it| it.parse::<Rule>().expect("one"));
        for payload in orders(1..=9) {
            let key = Key::of(&payload).expect("an order");
            let fits = |rule: &&Rule| match rule.pattern().strip_prefix("*.") {
                Some(class) => key.to_string().ends_with(class),
                None => rule.pattern() == key.to_string(),
            };
            let fitting: Vec<&Rule> = rules.iter().filter(fits).collect();
            assert!(fitting.len() <= 1, "{key}: {fitting:?}");
            let own = Rule::of(&key);
            assert_eq!(fitting.contains(&&own), rules.contains(&own));
        }
    }

    #[test]
    fn the_filter_takes_both_classes_of_a_country() {
        let france = "FR".parse().expect("a country");
        let orders = orders(1..=10);
        let seen = orders.iter().filter(|it| is_from(&france, it));
        let seen: Vec<String> = seen.map(|it| name(it)).collect();
        assert_eq!(seen, ["order-2", "order-4", "order-7"]);
    }

    #[test]
    fn numbers_go_upwards_from_one() {
        assert_eq!(numbers("2", "3"), Some(2..=3));
        for (first, last) in [("0", "1"), ("3", "2"), ("1", "x"), ("1", "1000001")] {
            assert_eq!(numbers(first, last), None);
        }
    }

    #[test]
    fn a_listing_is_in_order_and_says_why_something_is_unrouted() {
        let mut some = orders(1..=3);
        some.reverse();
        let all = "berlin:   order-1, order-2, order-3";
        assert_eq!(listing(Place::Berlin, &some), all);
        assert_eq!(listing(Place::Lyon, &[]), "lyon:     nothing");
        assert_eq!(
            listing(Place::Unrouted, &orders(9..=10)),
            "unrouted: order-9, no route for IT.small\n\
             unrouted: 11 bytes, no order: expected value at line 1 column 1"
        );
        let many = listing(Place::Review, &orders(1..=9));
        assert!(many.ends_with(", order-8, and 1 more"), "{many}");
    }
}
