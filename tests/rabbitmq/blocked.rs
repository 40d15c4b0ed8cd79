//! A broker that is short of memory: the publisher says so and ends, or goes on when
//! the broker is well again.

use anyhow::{Result, ensure};
use tests::{Example, observe, rabbitmq::RabbitMq};

use crate::own_vhost;

const BLOCKED: &str = env!("CARGO_BIN_EXE_rabbitmq_blocked");
const QUEUE: &str = "blocked.readings";

/// The configuration that a reader starts a RabbitMQ with.
const CONFIG: &str =
    include_str!("../../rabbitmq-examples/config/rabbitmq_blocked.conf");

#[tokio::test(flavor = "multi_thread")]
async fn a_publisher_says_that_it_is_blocked_and_goes_on_when_it_is_not()
-> Result<()> {
    let rabbitmq = RabbitMq::start(CONFIG, None, &[]).await?;
    let variable = ("AMQP_URL", rabbitmq.address());
    let ended = Example::start(BLOCKED, &[], variable)?.end().await?;
    ended.succeeded()?.printed_what_its_header_says()?;

    let mut patient = Example::start(BLOCKED, &["60"], variable)?;
    patient.prints("consumer:").await?;
    // As an operator does who has found the memory.
    rabbitmq
        .rabbitmqctl(&["set_vm_memory_high_watermark", "0.6"])
        .await?;
    patient.prints("unblocked:").await?;
    let ended = patient.end().await?.succeeded()?;
    ensure!(
        ended.stdout.ends_with("closed:    in order\n"),
        "{}",
        ended.stdout
    );
    // The confirmed one is there; what was in doubt before may be too.
    let ready = observe::rabbitmq::ready(rabbitmq.plain(), QUEUE).await?;
    ensure!((1..=2).contains(&ready), "{ready} readings");
    Ok(())
}

/// The control: the same program where nothing is wrong.
#[tokio::test]
async fn a_well_rabbitmq_confirms_at_once() -> Result<()> {
    let (_management, address) = own_vhost().await?;
    let ended = Example::start(BLOCKED, &[], ("AMQP_URL", &address))?;
    let ended = ended.end().await?.succeeded()?;
    ensure!(
        ended.stdout.ends_with("confirmed: this RabbitMQ is well\n"),
        "{}",
        ended.stdout
    );
    assert_eq!(observe::rabbitmq::ready(&address, QUEUE).await?, 1);

    let ended = Example::start(BLOCKED, &["soon"], ("AMQP_URL", &address))?;
    assert_eq!(ended.end().await?.status.code(), Some(2));
    Ok(())
}
