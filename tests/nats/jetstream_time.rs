//! The server ends a message when its lifetime is over, and delivers one when it
//! is due, whether or not the program is still there that asked for it.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use async_nats::jetstream::{
    message::PublishMessage,
    stream::{Config, RawMessageErrorKind},
};
use futures_lite::{StreamExt as _, future::poll_once};
use tests::{Example, observe, wait};
use tokio::sync::Mutex;

use crate::nats;

const MESSAGE_TTL: &str = env!("CARGO_BIN_EXE_nats_jetstream_message_ttl");
const SCHEDULE: &str = env!("CARGO_BIN_EXE_nats_jetstream_schedule");

/// Each stream belongs to its example.
static EXPIRY: Mutex<()> = Mutex::const_new(());
static SCHEDULES: Mutex<()> = Mutex::const_new(());

#[tokio::test]
async fn a_message_ends_with_its_lifetime_and_a_marker_says_so() -> Result<()> {
    let _turn = EXPIRY.lock().await;
    let nats = nats().await?;
    for _run in 0..2 {
        let ended = Example::start(MESSAGE_TTL, &[], nats)?.end().await?;
        ended.succeeded()?.printed_what_its_header_says()?;
    }

    let jetstream = observe::nats::jetstream(nats.1).await?;
    let stream = jetstream.get_stream("RESERVATIONS").await?;
    let first = stream.get_raw_message(1).await;
    let gone = first.err().context("the first message is still there")?;
    assert_eq!(gone.kind(), RawMessageErrorKind::NoMessageFound);
    let second = stream.get_raw_message(2).await?;
    assert_eq!(second.subject.as_str(), "reservations.sku-2");
    Ok(())
}

/// The control: without `subject_delete_marker_ttl` the message vanishes too, and
/// nothing comes in its place.
#[tokio::test]
async fn control_without_a_marker_a_message_only_vanishes() -> Result<()> {
    let nats = nats().await?;
    let jetstream = observe::nats::jetstream(nats.1).await?;
    observe::nats::forget_stream(nats.1, "UNMARKED").await?;
    let mut stream = jetstream
        .create_stream(Config {
            name: "UNMARKED".to_owned(),
            subjects: vec!["unmarked".to_owned()],
            allow_message_ttl: true,
            ..Config::default()
        })
        .await?;
    let message = PublishMessage::build().payload("cart 17".into());
    let message = message.ttl(Duration::from_secs(1));
    jetstream.send_publish("unmarked", message).await?.await?;
    wait::until("the end of the message", async || {
        let state = stream.info().await?.state.clone();
        ensure!(state.messages == 0, "{} messages", state.messages);
        assert_eq!(state.last_sequence, 1, "something came in its place");
        Ok(())
    })
    .await
}

#[tokio::test]
async fn a_reminder_comes_once_and_only_through_the_stream() -> Result<()> {
    let _turn = SCHEDULES.lock().await;
    let nats = nats().await?;
    let observer = observe::nats::connect(nats.1).await?;
    let mut core = observe::nats::subscribe(&observer, "reminders.due.*").await?;

    let ended = Example::start(SCHEDULE, &[], nats)?.end().await?;
    ended.succeeded()?.printed_what_its_header_says()?;

    let jetstream = observe::nats::jetstream(nats.1).await?;
    let stream = jetstream.get_stream("REMINDERS").await?;
    let mut subjects = stream.info_with_subjects("reminders.>").await?;
    let mut found = Vec::new();
    while let Some(subject) = subjects.next().await {
        found.push(subject?);
    }
    assert_eq!(found, [("reminders.due.order-17".to_owned(), 1)]);
    observe::nats::round_trip(&observer).await?;
    let nothing = poll_once(core.next()).await;
    assert!(nothing.is_none(), "a core subscriber got {nothing:?}");
    Ok(())
}

#[tokio::test]
async fn a_reminder_outlives_the_program_that_planned_it() -> Result<()> {
    let _turn = SCHEDULES.lock().await;
    let nats = nats().await?;
    let mut example = Example::start(SCHEDULE, &[], nats)?;
    example.prints("scheduled: reminder for order-18").await?;
    example.kill().await?;

    let jetstream = observe::nats::jetstream(nats.1).await?;
    let stream = jetstream.get_stream("REMINDERS").await?;
    wait::until("the reminder", async || {
        let subject = "reminders.due.order-17";
        let due = stream.get_last_raw_message_by_subject(subject).await?;
        assert_eq!(&due.payload[..], b"order-17");
        Ok(())
    })
    .await
}
