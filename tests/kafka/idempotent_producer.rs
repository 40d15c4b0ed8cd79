//! An answer that is lost makes the client send again: twice in the log without
//! idempotence, once with it.

use std::{
    net::SocketAddr,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use anyhow::{Context as _, Result, ensure};
use tests::{Example, kafka::Kafka, observe};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, tcp::OwnedReadHalf},
    task::JoinSet,
};

use crate::ran_twice;

const IDEMPOTENT_PRODUCER: &str = env!("CARGO_BIN_EXE_kafka_idempotent_producer");
const TOPIC: &str = "idempotent.payments";

/// The number of the request in Kafka's protocol.
const PRODUCE: [u8; 2] = [0, 0];

/// A proxy before Kafka that loses one answer: the broker has stored the records,
/// and the client's connection ends before it hears of it.
struct Proxy {
    address: SocketAddr,
    lost: Arc<AtomicBool>,
    _task: JoinSet<()>,
}

struct Plan {
    /// Known when Kafka has started, which has to know the proxy before.
    target: OnceLock<String>,
    /// How many records' answers come, before one is lost.
    before: AtomicUsize,
    lost: Arc<AtomicBool>,
}

impl Proxy {
    async fn start(plan: Arc<Plan>) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let (address, lost) = (listener.local_addr()?, Arc::clone(&plan.lost));
        let mut task = JoinSet::new();
        task.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((client, _peer)) = listener.accept().await {
                connections.spawn(serve(client, Arc::clone(&plan)));
            }
        });
        Ok(Self {
            address,
            lost,
            _task: task,
        })
    }
}

/// A request or an answer, with its length before it. `None` at the end.
async fn frame(from: &mut OwnedReadHalf) -> Option<Vec<u8>> {
    let length = from.read_u32().await.ok()?;
    let mut frame = length.to_be_bytes().to_vec();
    frame.resize(4 + length as usize, 0);
    from.read_exact(&mut frame[4..]).await.ok()?;
    Some(frame)
}

async fn serve(client: TcpStream, plan: Arc<Plan>) {
    let Some(target) = plan.target.get() else {
        return;
    };
    let Ok(server) = TcpStream::connect(target).await else {
        return;
    };
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    // The correlation id of the answer that is to be lost.
    let doomed: Arc<OnceLock<Vec<u8>>> = Arc::default();
    let chosen = Arc::clone(&doomed);
    let requests = async {
        while let Some(frame) = frame(&mut from_client).await {
            if frame[4..6] == PRODUCE && plan.lose_this() {
                // Key, version, id.
                chosen.get_or_init(|| frame[8..12].to_vec());
            }
            if to_server.write_all(&frame).await.is_err() {
                break;
            }
        }
    };
    let answers = async {
        while let Some(frame) = frame(&mut from_server).await {
            if doomed.get().is_some_and(|id| frame[4..8] == id[..]) {
                plan.lost.store(true, Ordering::Relaxed);
                break;
            }
            if to_client.write_all(&frame).await.is_err() {
                break;
            }
        }
    };
    tokio::select! {
        () = requests => {}
        () = answers => {}
    }
}

impl Plan {
    fn lose_this(&self) -> bool {
        let before =
            self.before
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                    Some(left.wrapping_sub(1))
                });
        before == Ok(0)
    }
}

/// Runs the example while the answer to its second payment is lost, and returns
/// what Kafka has in the end.
async fn with_a_lost_answer(words: &[&str]) -> Result<Vec<String>> {
    let plan = Arc::new(Plan {
        target: OnceLock::new(),
        before: AtomicUsize::new(1),
        lost: Arc::default(),
    });
    let proxy = Proxy::start(Arc::clone(&plan)).await?;
    let settings = format!(
        "\
listeners=CLIENTS://:1,INSIDE://:2,CONTROLLER://:3
inter.broker.listener.name=INSIDE
listener.security.protocol.map=\
CLIENTS:PLAINTEXT,INSIDE:PLAINTEXT,CONTROLLER:PLAINTEXT
advertised.listeners=CLIENTS://localhost:{}
",
        proxy.address.port()
    );
    let kafka = Kafka::start(&settings, &[]).await?;
    plan.target
        .set(kafka.address().to_owned())
        .ok()
        .context("the proxy has a target")?;
    let address = format!("localhost:{}", proxy.address.port());
    let variable = ("KAFKA_BROKERS", address.as_str());
    let ended = Example::start(IDEMPOTENT_PRODUCER, words, variable)?;
    ended.end().await?.succeeded()?;
    ensure!(proxy.lost.load(Ordering::Relaxed), "no answer was lost");
    let records = observe::kafka::records(kafka.inside(), TOPIC).await?;
    Ok(records
        .iter()
        .map(|record| observe::kafka::text(record).1)
        .collect())
}

#[tokio::test]
async fn a_lost_answer_does_not_store_a_payment_twice() -> Result<()> {
    let stored = with_a_lost_answer(&[]).await?;
    // The last one is the program's own.
    let expected = ["payment-1", "payment-2", "payment-3", "payment-1"];
    assert_eq!(stored, expected);
    Ok(())
}

/// The control: as librdkafka comes.
#[tokio::test]
async fn control_without_idempotence_it_is_there_twice() -> Result<()> {
    let stored = with_a_lost_answer(&["default"]).await?;
    let expected = [
        "payment-1",
        "payment-2",
        "payment-2",
        "payment-3",
        "payment-1",
    ];
    assert_eq!(stored, expected);
    Ok(())
}

#[tokio::test]
async fn the_program_itself_can_send_twice() -> Result<()> {
    let address = ran_twice(IDEMPOTENT_PRODUCER, &[TOPIC]).await?;
    let records = observe::kafka::records(address, TOPIC).await?;
    assert_eq!(records.len(), 8);
    Ok(())
}
