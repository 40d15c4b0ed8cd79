//! Who is trusted gets in, by password over TLS or as the user of a certificate;
//! everybody else is refused for a reason that is told in one line.

use anyhow::{Result, ensure};
use certs::CLIENT;
use tests::{Example, example::Ended, observe, rabbitmq::RabbitMq, tls::Files};

const TLS: &str = env!("CARGO_BIN_EXE_rabbitmq_tls");
const MTLS: &str = env!("CARGO_BIN_EXE_rabbitmq_mtls_external");

/// The configurations that a reader starts a RabbitMQ with.
const TLS_CONFIG: &str =
    include_str!("../../rabbitmq-examples/config/rabbitmq_tls.conf");
const MTLS_CONFIG: &str =
    include_str!("../../rabbitmq-examples/config/rabbitmq_mtls_external.conf");
const MTLS_USERS: &str =
    include_str!("../../rabbitmq-examples/config/rabbitmq_mtls_external.json");

/// A RabbitMQ, and the files of a client on this machine.
struct Shop {
    example: &'static str,
    rabbitmq: RabbitMq,
    files: Files,
}

impl Shop {
    async fn open(
        example: &'static str,
        config: &str,
        users: Option<&str>,
    ) -> Result<Self> {
        let files = Files::make()?;
        let rabbitmq = RabbitMq::start(config, users, &files.for_server()).await?;
        Ok(Self {
            example,
            rabbitmq,
            files,
        })
    }

    /// Runs the example with the right settings but for these.
    async fn run(&self, changed: &[(&str, &str)]) -> Result<Ended> {
        let path = |name| self.files.path(name);
        let (ca, certificate, key) =
            (path("ca.pem"), path("client.pem"), path("client.key"));
        let right = [
            ("AMQP_URL", self.rabbitmq.address()),
            ("AMQP_CA", &ca),
            ("AMQP_CERT", &certificate),
            ("AMQP_KEY", &key),
        ];
        // Of two values the later one counts.
        let variables = [&right[..], changed].concat();
        Example::start_with(self.example, &[], &variables)?
            .end()
            .await
    }

    /// Expects that a server with this certificate is refused, which the book
    /// shows as this experiment.
    async fn distrusts(
        &self,
        ca: &str,
        words: &str,
        experiment: Option<&str>,
    ) -> Result<()> {
        let ca = self.files.path(ca);
        let mut ended = self.run(&[("AMQP_CA", &ca)]).await?;
        let line = ended.one_line_error()?;
        ensure!(line.contains(words), "{words:?} is not in {line:?}");
        ensure!(!ended.stdout.contains("connected"), "{}", ended.stdout);
        if let Some(experiment) = experiment {
            self.as_in_the_book(&mut ended);
            ended.printed_what_the_book_shows(experiment)?;
        }
        Ok(())
    }

    /// The port is another one on each run.
    fn as_in_the_book(&self, ended: &mut Ended) {
        let address = self.rabbitmq.address();
        let place = address.replace("amqps://", "").replace("/%2f", "");
        ended.stderr = ended.stderr.replace(&place, "<address>");
    }

    /// Not one connection has been let in.
    async fn is_untouched(&self, queue: &str) -> Result<()> {
        let plain = self.rabbitmq.plain();
        let queues = self.rabbitmq.management()?.queue_names(plain).await?;
        ensure!(!queues.iter().any(|name| name == queue), "{queues:?}");
        Ok(())
    }
}

/// The configuration with another server certificate.
fn with_certificate(config: &str, name: &str) -> String {
    config.replace("certs/server.", &format!("certs/{name}-server."))
}

#[tokio::test]
async fn over_tls_an_order_goes_there_and_back() -> Result<()> {
    let shop = Shop::open(TLS, TLS_CONFIG, None).await?;
    for _run in 0..2 {
        let ended = shop.run(&[]).await?.succeeded()?;
        ended.printed_what_its_header_says()?;
    }
    let ready =
        observe::rabbitmq::ready(shop.rabbitmq.plain(), "tls.orders").await?;
    assert_eq!(ready, 0);

    // The right port, without TLS; then TLS, to the port without.
    let plain = shop.rabbitmq.address().replace("amqps", "amqp");
    let ended = shop.run(&[("AMQP_URL", &plain)]).await?;
    ended.refused("with TLS, AMQP_URL begins with amqps://")?;
    let ended = shop.run(&[("AMQP_URL", shop.rabbitmq.plain())]).await?;
    ended.refused("AMQP_URL is without TLS")?;
    let ended = shop
        .run(&[("AMQP_URL", &shop.rabbitmq.plain().replace("amqp", "amqps"))])
        .await?;
    ended.refused("speaks no TLS on this port")?;
    let ended = shop.run(&[("AMQP_CA", "nowhere.pem")]).await?;
    let line = ended.one_line_error()?;
    ensure!(line.contains("cannot read nowhere.pem; make it:"), "{line}");
    Ok(())
}

#[tokio::test]
async fn a_server_is_refused_that_is_not_who_it_should_be() -> Result<()> {
    let shop = Shop::open(TLS, TLS_CONFIG, None).await?;
    let words = "nobody whom we trust vouches for RabbitMQ";
    shop.distrusts("foreign-ca.pem", words, Some("foreign"))
        .await?;
    shop.is_untouched("tls.orders").await?;
    for (certificate, words) in [
        ("expired", "has expired; renew it"),
        (
            "wrong-host",
            "is not for localhost; use a name that is in it",
        ),
    ] {
        let config = with_certificate(TLS_CONFIG, certificate);
        let shop = Shop::open(TLS, &config, None).await?;
        shop.distrusts("ca.pem", words, Some(certificate)).await?;
        shop.is_untouched("tls.orders").await?;
    }
    Ok(())
}

#[tokio::test]
async fn the_certificate_is_the_user_with_its_permissions() -> Result<()> {
    let shop = Shop::open(MTLS, MTLS_CONFIG, Some(MTLS_USERS)).await?;
    for _run in 0..2 {
        let ended = shop.run(&[]).await?.succeeded()?;
        ended.printed_what_its_header_says()?;
    }
    // Who has sent it is in the message, and not the refused one.
    let plain = shop.rabbitmq.plain();
    let orders = observe::rabbitmq::drain(plain, "mtls.orders").await?;
    assert_eq!(orders.len(), 2);
    for order in orders {
        let user = order.properties.user_id().as_ref();
        assert_eq!(user.map(|user| user.as_str()), Some(CLIENT));
    }
    shop.is_untouched("orders").await?;

    // Without a certificate, and with one that nobody vouches for.
    let none = [("AMQP_CERT", ""), ("AMQP_KEY", "")];
    let mut ended = shop.run(&none).await?;
    ended.refused("asks for a certificate")?;
    shop.as_in_the_book(&mut ended);
    ended.printed_what_the_book_shows("nobody")?;
    let (certificate, key) = (
        shop.files.path("foreign-client.pem"),
        shop.files.path("foreign-client.key"),
    );
    let foreign = [
        ("AMQP_CERT", certificate.as_str()),
        ("AMQP_KEY", key.as_str()),
    ];
    shop.run(&foreign)
        .await?
        .refused("does not trust the authority of our certificate")?;
    assert_eq!(observe::rabbitmq::ready(plain, "mtls.orders").await?, 0);
    shop.distrusts("foreign-ca.pem", "nobody whom we trust vouches", None)
        .await
}

/// A user whom the authority vouches for and RabbitMQ does not know.
#[tokio::test]
async fn a_certificate_of_nobodys_is_refused() -> Result<()> {
    let users = MTLS_USERS.replace("\"app\"", "\"other\"");
    let shop = Shop::open(MTLS, MTLS_CONFIG, Some(&users)).await?;
    shop.run(&[]).await?.refused("ACCESS_REFUSED")?;
    Ok(())
}
