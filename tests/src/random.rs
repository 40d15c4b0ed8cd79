//! Random choices that can be made again.

use std::env;

/// The variable that repeats a run.
const SEED: &str = "FAULT_SEED";

/// Random numbers from the seed in `FAULT_SEED`, else from a new one. The test's
/// output, which is shown when it fails, says which.
#[must_use]
pub fn seeded() -> fastrand::Rng {
    let seed = env::var(SEED).ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| fastrand::u64(..));
    println!("{SEED}={seed}");
    fastrand::Rng::with_seed(seed)
}
