//! Without a broker, or with a wrong address: one line that helps, soon.

use anyhow::Result;
use tests::example::{fail_with_one_line, siblings};
use tokio::net::TcpListener;

use crate::{PUBLISHER, rabbitmq};

/// What every RabbitMQ example says.
async fn one_line(url: &str, parts: &[&str]) -> Result<()> {
    fail_with_one_line(&siblings(PUBLISHER)?, ("AMQP_URL", url), parts).await
}

#[tokio::test]
async fn no_rabbitmq_is_one_line_with_the_way_out() -> Result<()> {
    let parts = ["no RabbitMQ at localhost:1", "cargo lab up rabbitmq"];
    one_line("amqp://guest:secret@localhost:1/%2f", &parts).await
}

#[tokio::test]
async fn something_that_never_answers_is_given_up() -> Result<()> {
    let silent = TcpListener::bind("127.0.0.1:0").await?;
    let port = silent.local_addr()?.port();
    let url = format!("amqp://guest:secret@127.0.0.1:{port}/%2f");
    one_line(&url, &["no answer from RabbitMQ"]).await
}

#[tokio::test]
async fn a_broken_address_is_named_with_a_right_one() -> Result<()> {
    for url in ["", "localhost:5672", "http://guest:secret@localhost/"] {
        // Port 5672, or 5671 with TLS.
        let right = "://guest:guest@localhost:567";
        one_line(url, &["AMQP_URL", right]).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_wrong_password_is_one_line_that_says_so() -> Result<()> {
    let url = rabbitmq().await?.1.replace("guest:guest", "guest:secret");
    one_line(&url, &["ACCESS_REFUSED", "check user, password"]).await
}

#[tokio::test]
async fn an_unknown_vhost_is_one_line_that_says_so() -> Result<()> {
    let url = rabbitmq().await?.1.replace("%2f", "nowhere");
    one_line(&url, &["vhost nowhere not found"]).await
}
