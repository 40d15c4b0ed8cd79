//! A thousand orders over channels that deliver in any order, twice, or not at all,
//! between programs that die between any two steps.

use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    path::Path,
};

use fastrand::Rng;

use super::{
    End, Label, Orders, Place, Report, Rule, Taken, Word, basket, json, split, work,
};

const ORDERS: u64 = 1_000;
/// Each misfortune happens once in so many times.
const RARE: u32 = 10;

type Message = (Label, Vec<u8>);

/// All that is outside of the programs.
struct World {
    random: Rng,
    orders: Orders,
    baskets: Vec<Vec<u8>>,
    lines: Vec<Message>,
    answers: Vec<Message>,
    /// What whoever wants results has got.
    results: Vec<Report>,
    /// The lines whose answers have reached the aggregator, in time.
    told: BTreeMap<String, BTreeSet<u32>>,
    /// How each misfortune has come about so far.
    seen: BTreeMap<&'static str, u32>,
}

impl World {
    fn happens(&mut self, what: &'static str) -> bool {
        let happens = self.random.u32(..RARE) == 0;
        if happens {
            *self.seen.entry(what).or_default() += 1;
        }
        happens
    }

    /// One step of somebody; false if there was nothing to do for him.
    fn step(&mut self) -> bool {
        match self.random.u32(..4) {
            0 => self.splitter(),
            1 => self.worker(),
            2 => self.aggregator_takes(),
            _ => self.aggregator_sends(),
        }
    }

    /// From anywhere in the queue. It stays, if who takes it dies before it
    /// acknowledges.
    fn pick<T: Clone>(
        &mut self,
        queue: impl Fn(&mut Self) -> &mut Vec<T>,
    ) -> Option<T> {
        let twice = self.happens("delivered twice");
        let length = queue(self).len();
        if length == 0 {
            return None;
        }
        let at = self.random.usize(..length);
        let queue = queue(self);
        Some(if twice {
            queue[at].clone()
        } else {
            queue.swap_remove(at)
        })
    }

    fn splitter(&mut self) -> bool {
        let Some(basket) = self.pick(|it| &mut it.baskets) else {
            return false;
        };
        let split = split(&basket).expect("an order");
        self.answers.push(split.opened);
        for line in split.lines {
            if self.happens("the splitter dies between two lines") {
                self.baskets.push(basket);
                break;
            }
            self.lines.push(line);
        }
        true
    }

    fn worker(&mut self) -> bool {
        let Some((label, payload)) = self.pick(|it| &mut it.lines) else {
            return false;
        };
        // The broken shelf: whatever lies there never gets an answer.
        if label.line == Some(3) && label.order.ends_with('7') {
            return true;
        }
        let (label, answer) = work(Ok(label), &payload).expect("a line");
        self.answers.push((label, Word::Answered(answer).to_json()));
        true
    }

    fn aggregator_takes(&mut self) -> bool {
        let Some((label, payload)) = self.pick(|it| &mut it.answers) else {
            return false;
        };
        let (order, line) = (label.order.clone(), label.line);
        let taken = self.orders.take(Ok(label), &payload).expect("a write");
        let Taken::Noted(entry) = taken else {
            panic!("{taken:?}");
        };
        if let Some(line) = line
            && !entry.what.ends_with("too late")
        {
            self.told.entry(order).or_default().insert(line);
        }
        true
    }

    fn aggregator_sends(&mut self) -> bool {
        let waiting = self.orders.waiting(5).expect("a list");
        for post in &waiting {
            match post.to {
                Place::Results => {
                    let report = serde_json::from_slice(&post.payload);
                    self.results.push(report.expect("JSON"));
                }
                Place::Answers => {
                    let over = (post.label.clone(), post.payload.clone());
                    self.answers.push(over);
                }
            }
            if self.happens("dies between send and cross off") {
                break;
            }
            self.orders.cross_off(post).expect("a write");
        }
        !waiting.is_empty()
    }

    /// Until nobody has anything to do.
    fn run(&mut self) {
        let mut idle = 0;
        while idle < 100 {
            idle = if self.step() { 0 } else { idle + 1 };
        }
    }
}

#[test]
fn each_of_a_thousand_orders_has_one_result_and_it_is_right() {
    let seed = env::var("FAULT_SEED").ok().and_then(|it| it.parse().ok());
    let seed = seed.unwrap_or_else(|| fastrand::u64(..));
    println!("FAULT_SEED={seed}");
    let memory = Path::new(":memory:");
    let mut world = World {
        random: Rng::with_seed(seed),
        orders: Orders::open(memory, Rule::EachLineAnswered).expect("in memory"),
        baskets: (1..=ORDERS).map(|it| json(&basket(it, 50))).collect(),
        lines: Vec::new(),
        answers: Vec::new(),
        results: Vec::new(),
        told: BTreeMap::new(),
        seen: BTreeMap::new(),
    };
    world.run();
    world.orders.remind(49).expect("a write");
    assert_eq!(world.orders.waiting(1).expect("a list"), []);
    // A hundred at a time.
    for _batch in 0..=ORDERS / 100 {
        world.orders.remind(50).expect("a write");
        world.run();
    }

    let mut results: BTreeMap<&str, Vec<&Report>> = BTreeMap::new();
    for report in &world.results {
        results.entry(&report.order).or_default().push(report);
    }
    assert_eq!(results.len() as u64, ORDERS);
    let mut timeouts = 0;
    for number in 1..=ORDERS {
        let basket = basket(number, 50);
        let all = &results[basket.order.as_str()];
        // Sent twice, it is the same.
        assert!(all.iter().all(|it| *it == all[0]), "{all:?}");
        let report = all[0];
        let told = &world.told[&basket.order];
        let total = u32::try_from(basket.items.len()).expect("a few");
        let missing: Vec<u32> =
            (1..=total).filter(|line| !told.contains(line)).collect();
        assert_eq!(report.missing, missing, "{report:?}");
        let broken = basket.order.ends_with('7') && total >= 3;
        let expected = if broken { End::Timeout } else { End::Complete };
        assert_eq!(report.end, Some(expected), "{report:?}");
        timeouts += u32::from(broken);
    }

    // The walk went through all that it is about.
    println!("{timeouts} timeouts, {:?}", world.seen);
    assert!((50..500).contains(&timeouts), "{timeouts}");
    assert_eq!(world.seen.len(), 3);
    assert!(
        world.seen.values().all(|times| *times > 50),
        "{:?}",
        world.seen
    );
}
