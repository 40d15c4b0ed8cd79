//! Waiting for a condition, with a deadline, instead of sleeping.

use std::time::Duration;

use anyhow::{Result, bail};
use tokio::time::{Instant, sleep};

/// How long anything in a test may take. It ends a test that hangs; no test
/// passes or fails by a few seconds more or less.
pub const DEADLINE: Duration = Duration::from_secs(60);

const POLL: Duration = Duration::from_millis(50);

/// Asks again and again until there is an answer.
///
/// # Errors
///
/// After [`DEADLINE`]: what was waited for, and what the last look found.
pub async fn until<T>(
    what: &str,
    look: impl AsyncFnMut() -> Result<T, anyhow::Error>,
) -> Result<T> {
    within(DEADLINE, what, look).await
}

/// As [`until`], for what takes its time: a broker that looks again only every so
/// often.
///
/// # Errors
///
/// After this limit: what was waited for, and what the last look found.
pub async fn within<T>(
    limit: Duration,
    what: &str,
    mut look: impl AsyncFnMut() -> Result<T, anyhow::Error>,
) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        match look().await {
            Ok(found) => return Ok(found),
            Err(last) if Instant::now() > deadline => {
                bail!("waited {limit:?} for {what}; at last: {last:#}")
            }
            Err(_not_yet) => sleep(POLL).await,
        }
    }
}
