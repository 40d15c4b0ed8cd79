//! Who is trusted gets in as the user of its certificate; everybody else is
//! refused for a reason that is told in one line.

use anyhow::{Context as _, Result, ensure};
use tests::{
    Example,
    example::Ended,
    nats::{Server, Servers},
    tls::Files,
};

const TLS: &str = env!("CARGO_BIN_EXE_nats_tls");

/// The configuration that a reader starts a server with.
const CONFIG: &str = include_str!("../../nats-examples/config/nats_tls.conf");

/// A server, and the files of a client on this machine.
struct Shop {
    servers: Servers,
    made: Files,
}

impl Shop {
    async fn open(config: &str) -> Result<Self> {
        let made = Files::make()?;
        let files = made.for_server();
        let [port] = Servers::ports()?;
        let config = config.to_owned();
        let name = "shop";
        let servers =
            Servers::start(&[Server { name, config, port }], &files).await?;
        Ok(Self { servers, made })
    }

    /// Runs the example with these files; an empty name leaves one out.
    async fn run(&self, ca: &str, client: &str) -> Result<Ended> {
        let file = |name: String| {
            let given = !name.starts_with('.');
            if given {
                self.made.path(&name)
            } else {
                String::new()
            }
        };
        let url = self.servers.url("shop")?;
        let variables = [
            ("NATS_URL", url.as_str()),
            ("NATS_CA", &file(format!("{ca}.pem"))),
            ("NATS_CERT", &file(format!("{client}.pem"))),
            ("NATS_KEY", &file(format!("{client}.key"))),
        ];
        Example::start_with(TLS, &[], &variables)?.end().await
    }

    /// Runs the example and expects its refusal, with these words.
    async fn refuses(&self, ca: &str, client: &str, words: &str) -> Result<Ended> {
        let ended = self.run(ca, client).await?;
        ended.refused(words)?;
        Ok(ended)
    }
}

/// The configuration with another server certificate.
fn with_certificate(name: &str) -> String {
    CONFIG.replace("certs/server.", &format!("certs/{name}-server."))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_certificate_is_the_user_with_its_permissions() -> Result<()> {
    let shop = Shop::open(CONFIG).await?;
    let ended = shop.run("ca", "client").await?.succeeded()?;
    ended.printed_what_its_header_says()?;

    // The server's own record of who was denied what.
    let log = shop.servers.log("shop").await?;
    let denied = log
        .lines()
        .find(|line| line.contains("Publish Violation"))
        .context("the log tells of no violation")?;
    ensure!(denied.contains("app@shop.example"), "{denied}");
    ensure!(denied.contains("tls.refunds.new"), "{denied}");
    Ok(())
}

/// A user whom the authority vouches for and the server does not know.
#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_of_nobodys_is_refused() -> Result<()> {
    let config = CONFIG.replace("app@shop.example", "other@shop.example");
    let shop = Shop::open(&config).await?;
    shop.refuses("ca", "client", "knows no user for this certificate")
        .await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_is_refused_without_a_certificate_or_with_a_foreign_one()
-> Result<()> {
    let shop = Shop::open(CONFIG).await?;
    shop.refuses("ca", "", "asks for a certificate").await?;
    let words = "does not trust the authority of our certificate";
    shop.refuses("ca", "foreign-client", words).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_is_refused_that_is_not_who_it_should_be() -> Result<()> {
    let shop = Shop::open(CONFIG).await?;
    let words = "nobody whom we trust vouches for NATS";
    let mut ended = shop.refuses("foreign-ca", "client", words).await?;
    // The port is another one on each run.
    let url = shop.servers.url("shop")?;
    ended.stderr = ended
        .stderr
        .replace(url.trim_start_matches("nats://"), "<address>");
    ended.printed_what_the_book_shows("foreign")?;

    let shop = Shop::open(&with_certificate("wrong-host")).await?;
    shop.refuses("ca", "client", "is not for localhost").await?;

    let shop = Shop::open(&with_certificate("expired")).await?;
    shop.refuses("ca", "client", "has expired").await?;
    Ok(())
}

/// TLS on one side only: a server without it, then a client without settings.
#[tokio::test(flavor = "multi_thread")]
async fn tls_on_one_side_only_is_refused() -> Result<()> {
    let shop = Shop::open("").await?;
    shop.refuses("ca", "client", "speaks no TLS").await?;
    let shop = Shop::open(CONFIG).await?;
    // It takes up TLS, as the server asks for it, and trusts the system's list.
    shop.refuses("", "", "nobody whom we trust").await?;
    Ok(())
}

/// The control to the refusals: TLS without client certificates lets in who has
/// none, and nothing is denied to a client that nobody knows.
#[tokio::test(flavor = "multi_thread")]
async fn control_tls_alone_knows_nobody() -> Result<()> {
    let config = "tls { cert_file: certs/server.pem, key_file: certs/server.key }";
    let shop = Shop::open(config).await?;
    let ended = shop.run("ca", "").await?.succeeded()?;
    let text = &ended.stdout;
    ensure!(
        text.contains("connected: the server requires TLS: true"),
        "{text}"
    );
    ensure!(text.contains("known as:  nobody"), "{text}");
    ensure!(!text.contains("denied"), "{text}");
    Ok(())
}

/// The control: a client that does not insist on TLS tells a server without it
/// everything in plain text.
#[tokio::test(flavor = "multi_thread")]
async fn control_a_client_that_does_not_insist_speaks_plain_text() -> Result<()> {
    let shop = Shop::open("").await?;
    let ended = shop.run("", "").await?.succeeded()?;
    let text = &ended.stdout;
    ensure!(text.contains("the server requires TLS: false"), "{text}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_file_is_named_with_the_command_that_makes_it() -> Result<()> {
    let shop = Shop::open(CONFIG).await?;
    shop.refuses("nowhere", "client", "nowhere.pem; make it: cargo run")
        .await?;
    Ok(())
}
