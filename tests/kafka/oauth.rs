//! A client gets in with a token and stays in with the next ones; without a good
//! one it is refused, for a reason that is told in one line.

use std::{
    error::Error,
    fs,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Result, bail, ensure};
use data_encoding::BASE64URL_NOPAD;
use rdkafka::{
    ClientConfig, ClientContext,
    admin::AdminClient,
    client::OAuthToken,
    error::KafkaError,
    producer::{FutureProducer, FutureRecord, Producer as _},
};
use serde_json::json;
use tests::{Example, example::Ended, kafka::Kafka, observe, tls::Files, wait};
use tokio::{sync::OnceCell, task::spawn_blocking};

const OAUTH: &str = env!("CARGO_BIN_EXE_kafka_oauth");
const ORDERS: &str = "oauth.orders";

/// The settings that a reader starts a Kafka with.
const SETTINGS: &str =
    include_str!("../../kafka-examples/config/kafka_oauth.properties");

/// One Kafka for all tests here.
struct Shop {
    kafka: Kafka,
    files: Files,
}

async fn shop() -> Result<&'static Shop> {
    static SHOP: OnceCell<Shop> = OnceCell::const_new();
    let open = async || {
        let files = Files::make()?;
        let kafka = Kafka::start(SETTINGS, &files.for_server()).await?;
        Ok::<_, anyhow::Error>(Shop { kafka, files })
    };
    SHOP.get_or_try_init(open).await
}

impl Shop {
    /// Runs the example with the right settings but for these.
    async fn run(&self, changed: &[(&str, &str)]) -> Result<Ended> {
        let ca = self.files.path("ca.pem");
        let right = [("KAFKA_BROKERS", self.kafka.address()), ("KAFKA_CA", &ca)];
        let variables = [&right[..], changed].concat();
        Example::start_with(OAUTH, &[], &variables)?.end().await
    }

    /// Runs the example with this text where it looks for a token.
    async fn run_with_token(&self, name: &str, token: &str) -> Result<Ended> {
        let path = self.files.path(name);
        fs::write(&path, token)?;
        self.run(&[("KAFKA_TOKEN_FILE", &path)]).await
    }

    fn client(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        config
            .set("bootstrap.servers", self.kafka.address())
            .set("security.protocol", "SASL_SSL")
            .set("sasl.mechanism", "OAUTHBEARER")
            .set("ssl.ca.location", self.files.path("ca.pem"))
            .set("message.timeout.ms", "2000");
        config
    }
}

fn now() -> Result<i64> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
    Ok(i64::try_from(now.as_secs())?)
}

fn token(algorithm: &str, user: &str, end: i64, signature: &str) -> String {
    let head = json!({"alg": algorithm}).to_string();
    let claims = json!({"sub": user, "iat": end - 3600, "exp": end}).to_string();
    let encoded = |part: String| BASE64URL_NOPAD.encode(part.as_bytes());
    format!("{}.{}.{signature}", encoded(head), encoded(claims))
}

#[tokio::test]
async fn a_new_token_comes_before_the_old_one_ends() -> Result<()> {
    let shop = shop().await?;
    let ended = shop.run(&[]).await?.succeeded()?;
    ended.printed_what_its_header_says()?;

    // Through the listener that asks for no token.
    let records = observe::kafka::records(shop.kafka.inside(), ORDERS).await?;
    let keys: Vec<_> = records.iter().map(|r| observe::kafka::text(r).0).collect();
    assert_eq!(keys, ["order-1", "order-2", "order-3"]);
    // For whom Kafka has taken it.
    let log = shop.kafka.log().await?;
    let denied = log.lines().any(|line| {
        line.contains("Principal = User:orders is Denied")
            && line.contains("Topic:LITERAL:oauth.refunds")
    });
    ensure!(denied, "the log tells of no denial to orders");
    Ok(())
}

#[tokio::test]
async fn a_token_that_is_not_good_is_refused() -> Result<()> {
    let shop = shop().await?;
    let later = now()? + 3600;
    let expired = token("none", "orders", now()? - 60, "");
    let ended = shop.run_with_token("expired", &expired).await?;
    ended.refused("Must supply an unexpired token")?;

    // A broker that believes tokens without a signature does not know this one.
    let foreign = token("RS256", "orders", later, "c2lnbmF0dXJl");
    let mut ended = shop.run_with_token("foreign", &foreign).await?;
    let line = ended.refused("does not accept the token")?;
    ensure!(!line.contains(&foreign), "the token is shown: {line}");
    // The port is another one on each run.
    ended.stderr = ended.stderr.replace(shop.kafka.address(), "<address>");
    ended.printed_what_the_book_shows("foreign")?;

    let ended = shop.run_with_token("garbage", "not a token").await?;
    ended.refused("not a token of three parts")?;
    let nowhere = ("KAFKA_TOKEN_FILE", "nowhere.jwt");
    let ended = shop.run(&[nowhere]).await?;
    ended.refused("no token in nowhere.jwt; a fresh one is wanted")?;
    Ok(())
}

/// Somebody else's token gets in, and may do nothing.
#[tokio::test]
async fn another_user_may_not_do_the_same() -> Result<()> {
    let shop = shop().await?;
    let other = token("none", "stranger", now()? + 3600, "");
    let ended = shop.run_with_token("stranger", &other).await?;
    let line = ended.one_line_error()?;
    ensure!(line.contains("does not permit oauth.orders"), "{line}");
    ended.printed_what_the_book_shows("stranger")
}

#[tokio::test]
async fn a_kafka_is_refused_that_is_not_who_it_should_be() -> Result<()> {
    let shop = shop().await?;
    let foreign = shop.files.path("foreign-ca.pem");
    let ended = shop.run(&[("KAFKA_CA", &foreign)]).await?;
    ended.refused("does not hold")?;
    let ended = shop.run(&[("KAFKA_BROKERS", shop.kafka.inside())]).await?;
    ended.refused("speaks no TLS")?;
    Ok(())
}

/// Gives the same token each time, as long as `REFRESH` says.
struct Stubborn<const REFRESH: bool> {
    token: String,
    end: i64,
}

impl<const REFRESH: bool> ClientContext for Stubborn<REFRESH> {
    const ENABLE_REFRESH_OAUTH_TOKEN: bool = REFRESH;

    fn generate_oauth_token(
        &self,
        _config: Option<&str>,
    ) -> Result<OAuthToken, Box<dyn Error>> {
        Ok(OAuthToken {
            token: self.token.clone(),
            principal_name: "orders".to_owned(),
            lifetime_ms: self.end * 1000,
        })
    }
}

impl<const REFRESH: bool> Stubborn<REFRESH> {
    fn new() -> Result<Self> {
        let end = now()? + 3;
        Ok(Self {
            token: token("none", "orders", end, ""),
            end,
        })
    }
}

async fn send<C: ClientContext + 'static>(
    producer: &FutureProducer<C>,
    topic: &str,
) -> Result<(), KafkaError> {
    let record = FutureRecord::to(topic).key("order").payload("1 kettle");
    let sent = producer.send(record, Duration::ZERO).await;
    sent.map(drop).map_err(|(error, _record)| error)
}

/// The control to the next token: with the first one alone, Kafka ends the
/// connection and lets nobody in again.
#[tokio::test]
async fn control_with_one_token_the_time_is_soon_up() -> Result<()> {
    let shop = shop().await?;
    let topic = "oauth.stubborn";
    observe::kafka::create_topic(shop.kafka.inside(), topic).await?;
    shop.kafka
        .run(
            "kafka-acls.sh --add --allow-principal User:orders --producer --topic \
             oauth.stubborn",
        )
        .await?;
    let producer: FutureProducer<Stubborn<true>> =
        shop.client().create_with_context(Stubborn::new()?)?;
    send(&producer, topic).await?;
    wait::until("the end of the token", async || {
        match send(&producer, topic).await {
            Err(_) => Ok(()),
            Ok(()) => bail!("orders still get through"),
        }
    })
    .await
}

/// The control to the constant: without it nobody asks for a token.
#[tokio::test]
async fn control_without_the_constant_nobody_asks_for_a_token() -> Result<()> {
    let shop = shop().await?;
    asked(&shop.client(), Stubborn::<true>::new()?).await?;
    let answer = asked(&shop.client(), Stubborn::<false>::new()?).await;
    ensure!(answer.is_err(), "it got in without a token");

    // Nor does an admin client of rdkafka 0.39: it looks into another queue than
    // the one in which the question comes.
    let context = Stubborn::<true>::new()?;
    let admin: AdminClient<_> = shop.client().create_with_context(context)?;
    let patience = Duration::from_secs(3);
    let answer = spawn_blocking(move || {
        admin.inner().fetch_metadata(None, patience).map(drop)
    });
    ensure!(
        answer.await?.is_err(),
        "an admin client asks for tokens now"
    );
    Ok(())
}

/// Does Kafka answer a client with this context?
async fn asked<C: ClientContext + 'static>(
    config: &ClientConfig,
    context: C,
) -> Result<()> {
    let producer: FutureProducer<C> = config.create_with_context(context)?;
    let patience = Duration::from_secs(3);
    spawn_blocking(move || producer.client().fetch_metadata(None, patience))
        .await??;
    Ok(())
}
