//! A thousand orders over channels that deliver in any order, twice, or not at all,
//! between programs that die between any two steps.

use std::{collections::HashMap, env, path::Path, time::Duration};

use fastrand::Rng;

use super::{Message, Participant, Sagas, Service, State, order};

const ORDERS: u64 = 1_000;
const LIMIT: Duration = Duration::from_millis(1_000);
/// How many orders are on their way at a time.
const AT_ONCE: u64 = 50;
/// So many hundred steps are far more than they take to their end.
const LOOKS: u32 = 5_000;
/// Each of these misfortunes happens once in so many times.
const RARE: u32 = 12;

/// All that is outside of the two kinds of programs.
struct World {
    random: Rng,
    now: i64,
    sagas: Sagas,
    services: HashMap<Participant, Service>,
    inbox: Vec<Vec<u8>>,
    commands: HashMap<Participant, Vec<Vec<u8>>>,
    /// How each misfortune has come about so far.
    seen: HashMap<&'static str, u32>,
}

impl World {
    fn new(random: Rng) -> Self {
        let memory = Path::new(":memory:");
        let service = |it| {
            let service = Service::open(it, memory);
            (it, service.expect("a database in memory"))
        };
        Self {
            random,
            now: 0,
            sagas: Sagas::open(memory, LIMIT).expect("a database in memory"),
            services: Participant::ALL.into_iter().map(service).collect(),
            inbox: Vec::new(),
            commands: Participant::ALL.map(|it| (it, Vec::new())).into(),
            seen: HashMap::new(),
        }
    }

    fn happens(&mut self, what: &'static str) -> bool {
        let happens = self.random.u32(..RARE) == 0;
        if happens {
            *self.seen.entry(what).or_default() += 1;
        }
        happens
    }

    /// One step of somebody.
    fn step(&mut self) {
        match self.random.usize(..10) {
            0..3 => self.orchestrator_takes(),
            3..6 => self.orchestrator_sends(),
            6..9 => {
                let at = self.random.usize(..Participant::ALL.len());
                self.service_works(Participant::ALL[at]);
            }
            _ => {
                self.now += self.random.i64(0..40);
                self.sagas.overdue(self.now).expect("a write");
            }
        }
    }

    /// A message in any order. It stays, if who takes it dies before it
    /// acknowledges.
    fn pick(&mut self, from: Option<Participant>) -> Option<Vec<u8>> {
        let twice = self.happens("delivered twice");
        let queue = match from {
            None => &mut self.inbox,
            Some(service) => self.commands.entry(service).or_default(),
        };
        if queue.is_empty() {
            return None;
        }
        let at = self.random.usize(..queue.len());
        Some(if twice {
            queue[at].clone()
        } else {
            queue.swap_remove(at)
        })
    }

    fn orchestrator_takes(&mut self) {
        let Some(message) = self.pick(None) else {
            return;
        };
        // An order that is lost was never placed; an answer may get lost.
        let answer = !message.starts_with(br#"{"placed""#);
        if answer && self.happens("an answer is lost") {
            return;
        }
        let taken = self.sagas.take(&message, self.now).expect("a write");
        taken.expect("something to read");
    }

    fn orchestrator_sends(&mut self) {
        let limit = self.random.u32(1..5);
        for command in self.sagas.waiting(limit).expect("a list") {
            if !self.happens("a command is lost") {
                let queue = self.commands.entry(command.to).or_default();
                queue.push(command.payload.clone());
            }
            if self.happens("dies between send and cross off") {
                return;
            }
            self.sagas.cross_off(&command).expect("a write");
        }
    }

    fn service_works(&mut self, participant: Participant) {
        let Some(command) = self.pick(Some(participant)) else {
            return;
        };
        let service = self.services.get_mut(&participant).expect("a service");
        let answered = service.handle(&command).expect("a write");
        let answered = answered.expect("an answer");
        if self.happens("dies between effect and answer") {
            let queue = self.commands.entry(participant).or_default();
            queue.push(command);
            return;
        }
        self.inbox.push(answered.payload);
    }

    /// How each order has ended; none if one has not.
    fn ends(&self) -> Option<HashMap<String, State>> {
        if self.sagas.deadline().expect("a look").is_some() {
            return None;
        }
        let history = self.sagas.history().expect("a list");
        // The last line of each order counts.
        let ends = history
            .into_iter()
            .filter_map(|it| Some((it.order, it.state?)));
        Some(ends.collect())
    }

    fn busy(&self) -> bool {
        !self.inbox.is_empty() || self.commands.values().any(|it| !it.is_empty())
    }

    /// In the books of each service: once, or once and taken back, or never.
    fn check(&self, ends: &HashMap<String, State>) {
        for number in 1..=ORDERS {
            let order = order(number);
            let end = ends.get(&order.id).copied();
            for (participant, amount) in [
                (Participant::Payment, order.total),
                (Participant::Stock, order.pieces),
                (Participant::Shipping, 1),
            ] {
                let books = self.services[&participant].books(&order.id);
                let books = books.expect("a list");
                let right = match end {
                    Some(State::Completed) => books == [amount],
                    Some(State::Compensated) => {
                        books.is_empty() || books == [amount, -amount]
                    }
                    _ => false,
                };
                assert!(right, "{}: {end:?}, {participant:?} {books:?}", order.id);
            }
        }
    }
}

#[test]
fn a_thousand_orders_end_and_the_books_balance() {
    let seed = env::var("FAULT_SEED").ok().and_then(|it| it.parse().ok());
    let seed = seed.unwrap_or_else(|| fastrand::u64(..));
    println!("FAULT_SEED={seed}");
    let mut world = World::new(Rng::with_seed(seed));
    for number in 1..=ORDERS {
        let placed = Message::Placed(order(number)).to_json();
        world.inbox.push(placed);
        let mut looks = 0..LOOKS;
        while number % AT_ONCE == 0 && (world.busy() || world.ends().is_none()) {
            assert!(looks.next().is_some(), "some orders do not end");
            for _step in 0..100 {
                world.step();
            }
        }
    }
    let ends = world.ends().expect("all have ended");
    assert_eq!(ends.len(), 1_000);
    world.check(&ends);

    // The walk went through all that it is about.
    let count = |state| ends.values().filter(|end| **end == state).count();
    let (completed, compensated) =
        (count(State::Completed), count(State::Compensated));
    println!(
        "{completed} completed, {compensated} compensated, {:?}",
        world.seen
    );
    assert!(completed > 50 && compensated > 400);
    assert_eq!(world.seen.len(), 5);
    assert!(world.seen.values().all(|times| *times > 50));
}
