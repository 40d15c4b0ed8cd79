//! What a user may do is what its permissions say, and a refusal is seen.

use anyhow::Result;
use tests::{Example, example::Ended, observe, rabbitmq::RabbitMq};

const PERMISSIONS: &str = env!("CARGO_BIN_EXE_rabbitmq_permissions");

/// The configuration that a reader starts a RabbitMQ with.
const CONFIG: &str =
    include_str!("../../rabbitmq-examples/config/rabbitmq_permissions.conf");
const USERS: &str =
    include_str!("../../rabbitmq-examples/config/rabbitmq_permissions.json");

async fn run(rabbitmq: &RabbitMq) -> Result<Ended> {
    let variable = ("AMQP_URL", rabbitmq.address());
    Example::start(PERMISSIONS, &[], variable)?.end().await
}

#[tokio::test]
async fn each_user_may_do_what_is_permitted_to_it() -> Result<()> {
    let rabbitmq = RabbitMq::start(CONFIG, Some(USERS), &[]).await?;
    for _run in 0..2 {
        let ended = run(&rabbitmq).await?.succeeded()?;
        ended.printed_what_its_header_says()?;
    }
    // Two sales of each run are permitted, and both are read; the forbidden ones
    // are in no queue.
    let shop = rabbitmq.plain().replace("%2f", "shop");
    let booked = observe::rabbitmq::drain(&shop, "shop.booked").await?;
    assert_eq!(booked.len(), 0);
    Ok(())
}

/// The example says what it finds, not what it expects.
#[tokio::test]
async fn other_permissions_are_other_lines() -> Result<()> {
    let users = USERS.replace("^shop\\\\.sales$", "^shop\\\\.nothing$");
    assert_ne!(users, USERS);
    let rabbitmq = RabbitMq::start(CONFIG, Some(&users), &[]).await?;
    let ended = run(&rabbitmq).await?.succeeded()?;
    let till = "till:  configure no   write no   read no";
    assert!(ended.stdout.contains(till), "{}", ended.stdout);
    Ok(())
}

#[tokio::test]
async fn a_server_that_does_not_know_the_users_is_one_line() -> Result<()> {
    let variable = crate::rabbitmq().await?;
    let ended = Example::start(PERMISSIONS, &[], variable)?.end().await?;
    ended.refused("refuses the user owner")?;
    ended.refused("cargo lab run rabbitmq_permissions")?;
    Ok(())
}
