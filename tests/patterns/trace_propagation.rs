//! One order is one trace, from the shop over three brokers to the mail.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::{Context as _, Result, bail, ensure};
use lab::broker::Broker;
use lapin::{
    BasicProperties,
    types::{AMQPValue, FieldTable},
};
use opentelemetry_proto::tonic::{
    collector::trace::v1::ExportTraceServiceRequest, common::v1::any_value::Value,
};
use prost::Message as _;
use rdkafka::{
    ClientConfig, Message as _,
    message::{Header, Headers as _, OwnedHeaders},
    producer::{FutureProducer, FutureRecord},
};
use tests::{
    Example, broker,
    example::{Ended, fail_with_one_line_each},
    observe, wait,
};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{TcpListener, TcpStream},
    sync::Mutex as Turn,
    task::JoinHandle,
};

const KAFKA: &str = env!("CARGO_BIN_EXE_trace_propagation_kafka");
const NATS: &str = env!("CARGO_BIN_EXE_trace_propagation_nats");
const RABBITMQ: &str = env!("CARGO_BIN_EXE_trace_propagation_rabbitmq");

const TOPIC: &str = "placed-orders";
const STREAM: &str = "PAID_ORDERS";
const SUBJECT: &str = "orders.paid";
const QUEUE: &str = "orders.packed";

/// Topic, stream and queue belong to the pattern, so its tests take turns.
static TURN: Turn<()> = Turn::const_new(());

/// Variables for the programs, the first three for Kafka, RabbitMQ and NATS.
type Variables = Vec<(&'static str, String)>;

/// The shared brokers, without what an earlier test has left.
async fn fresh() -> Result<Variables> {
    let kafka = broker::shared(Broker::Kafka).await?;
    let rabbitmq = broker::shared(Broker::RabbitMq).await?;
    let nats = broker::shared(Broker::Nats).await?;
    observe::kafka::forget(kafka, TOPIC, "traced-payment").await?;
    observe::rabbitmq::delete_queues(rabbitmq, &[QUEUE]).await?;
    observe::nats::forget_stream(nats, STREAM).await?;
    Ok(vec![
        (Broker::Kafka.address_var(), kafka.to_owned()),
        (Broker::RabbitMq.address_var(), rabbitmq.to_owned()),
        (Broker::Nats.address_var(), nats.to_owned()),
        // Whoever runs the tests may send spans somewhere, or all through a proxy.
        ("OTEL_EXPORTER_OTLP_ENDPOINT", String::new()),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", String::new()),
        ("OTEL_TRACES_SAMPLER", String::new()),
        ("NO_PROXY", "127.0.0.1".to_owned()),
    ])
}

fn start(binary: &str, words: &[&str], variables: &Variables) -> Result<Example> {
    let variables: Vec<(&str, &str)> = variables
        .iter()
        .map(|(name, value)| (*name, value.as_str()))
        .collect();
    Example::start_with(binary, words, &variables)
}

/// Lets a program finish.
async fn stop(example: Example) -> Result<Ended> {
    example.interrupt().await?;
    example.end().await?.succeeded()
}

/// A span as it was exported.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Span {
    service: String,
    name: String,
    trace: String,
    id: String,
    /// Empty where there is none.
    parent: String,
    links: Vec<String>,
}

/// The spans that a program has printed, in their order.
fn printed(ended: &Ended) -> Result<Vec<Span>> {
    let lines = ended.stdout.lines();
    lines
        .filter_map(|line| line.strip_prefix("span:    "))
        .map(|line| span(line).with_context(|| line.to_owned()))
        .collect()
}

fn span(line: &str) -> Option<Span> {
    let (service, rest) = line.split_once(", ")?;
    let (name, rest) = rest.split_once(", ")?;
    let (_what, rest) = rest.rsplit_once(": trace=")?;
    let mut words = rest.split(' ');
    let trace = words.next()?.to_owned();
    let id = words.next()?.strip_prefix("id=")?.to_owned();
    let parent = words.next()?.strip_prefix("parent=")?;
    let links = words.map(|word| word.strip_prefix("link=").map(str::to_owned));
    Some(Span {
        service: service.to_owned(),
        name: name.to_owned(),
        trace,
        id,
        parent: parent.replace("none", ""),
        links: links.collect::<Option<_>>()?,
    })
}

/// Service and name of each span of a journey, each the child of the one before.
const JOURNEY: [(&str, &str); 6] = [
    ("shop", "publish placed-orders"),
    ("payment", "process placed-orders"),
    ("payment", "publish orders.paid"),
    ("stock", "process orders.paid"),
    ("stock", "publish orders.packed"),
    ("mail", "process orders.packed"),
];

/// These spans are one trace, and each is the child of the one before it.
fn is_one_journey(spans: &[Span]) -> Result<()> {
    let traces: BTreeSet<&str> =
        spans.iter().map(|span| span.trace.as_str()).collect();
    ensure!(traces.len() == 1, "{} traces: {spans:#?}", traces.len());
    ensure!(spans.len() == JOURNEY.len(), "{spans:#?}");
    let mut parent = String::new();
    for (service, name) in JOURNEY {
        let found = spans
            .iter()
            .find(|span| span.service == service && span.name == name)
            .with_context(|| format!("no {service}, {name}: {spans:#?}"))?;
        ensure!(
            found.parent == parent,
            "{found:?} below {parent}: {spans:#?}"
        );
        parent.clone_from(&found.id);
    }
    Ok(())
}

#[tokio::test]
async fn the_stories_print_what_their_headers_say() -> Result<()> {
    let _turn = TURN.lock().await;
    let variables = fresh().await?;
    for binary in [KAFKA, NATS, RABBITMQ] {
        for _time in 0..2 {
            let ended = start(binary, &[], &variables)?.end().await?.succeeded()?;
            ended.printed_what_its_header_says()?;
            // The header has names for the ids; here they have to fit.
            let spans = printed(&ended)?;
            let trace = &spans[0].trace;
            for span in spans.iter().filter(|span| !span.parent.is_empty()) {
                assert_eq!(span.trace, *trace, "{}", ended.stdout);
                let parent = spans.iter().find(|other| other.id == span.parent);
                assert!(parent.is_some(), "{}", ended.stdout);
            }
        }
    }
    Ok(())
}

/// A batch is a child of none of its orders and linked to all of them.
#[tokio::test]
async fn a_batch_is_linked_to_each_of_its_orders() -> Result<()> {
    let _turn = TURN.lock().await;
    let variables = fresh().await?;
    let ended = start(KAFKA, &[], &variables)?.end().await?.succeeded()?;
    let spans = printed(&ended)?;
    let placed: Vec<&Span> =
        spans.iter().filter(|span| span.service == "shop").collect();
    let batch = spans.iter().find(|span| span.service == "books");
    let batch = batch.context("a batch")?;
    assert_eq!(batch.parent, "");
    assert_eq!(batch.links, [placed[0].id.clone(), placed[1].id.clone()]);
    assert!(placed.iter().all(|order| order.trace != batch.trace));
    Ok(())
}

/// Step by step, so that each message can be looked at where it is stored.
#[tokio::test]
async fn one_order_is_one_trace_and_each_broker_stores_its_context() -> Result<()> {
    let _turn = TURN.lock().await;
    let variables = fresh().await?;
    let mut spans = Vec::new();

    let shop = start(KAFKA, &["publish", "1", "1"], &variables)?;
    spans.extend(printed(&shop.end().await?.succeeded()?)?);
    let records =
        observe::kafka::read_all(&variables[0].1, TOPIC, 4, "read_committed")
            .await?;
    let [record] = &records[..] else {
        bail!("{records:?}")
    };
    let headers = record.headers().context("headers")?;
    let context = headers.iter().find(|header| header.key == "traceparent");
    let context = context
        .and_then(|header| header.value)
        .context("a context")?;
    assert_eq!(str::from_utf8(context)?, context_of(&spans[0]));

    let mut payment = start(KAFKA, &["serve"], &variables)?;
    payment.prints("paid:    order-1").await?;
    spans.extend(printed(&stop(payment).await?)?);
    let jetstream = observe::nats::jetstream(&variables[2].1).await?;
    let stream = jetstream.get_stream(STREAM).await?;
    let message = stream.get_raw_message(1).await?;
    let context = message.headers.get("traceparent").context("a context")?;
    assert_eq!(context.as_str(), context_of(published(&spans, SUBJECT)?));

    let mut stock = start(NATS, &["serve"], &variables)?;
    stock.prints("packed:  order-1").await?;
    spans.extend(printed(&stop(stock).await?)?);
    let (connection, channel) = observe::rabbitmq::connect(&variables[1].1).await?;
    let order = channel
        .basic_get(QUEUE.into(), Default::default())
        .await?
        .context("an order")?;
    let headers = order.delivery.properties.headers().as_ref();
    let context = headers.context("headers")?.inner().get("traceparent");
    let expected = context_of(published(&spans, QUEUE)?);
    assert_eq!(context, Some(&AMQPValue::LongString(expected.into())));
    // Not acknowledged, so it goes back.
    connection.close(200, "".into()).await?;

    let mut mail = start(RABBITMQ, &["serve"], &variables)?;
    mail.prints("mailed:  order-1").await?;
    spans.extend(printed(&stop(mail).await?)?);
    is_one_journey(&spans)
}

/// The header that the W3C has for this span.
fn context_of(span: &Span) -> String {
    format!("00-{}-{}-01", span.trace, span.id)
}

fn published<'a>(spans: &'a [Span], to: &str) -> Result<&'a Span> {
    let name = format!("publish {to}");
    let found = spans.iter().find(|span| span.name == name);
    found.with_context(|| format!("no {name}: {spans:#?}"))
}

/// The same journey, and nobody writes the context into the headers: all is done and
/// printed as before, and no trace tells of more than one service.
#[tokio::test]
async fn control_without_injection_each_service_has_a_trace_of_its_own() -> Result<()>
{
    let _turn = TURN.lock().await;
    let variables = fresh().await?;
    let words = ["publish", "1", "1", "--no-inject"];
    let shop = start(KAFKA, &words, &variables)?.end().await?.succeeded()?;
    let serve = ["serve", "--no-inject"];
    let mut payment = start(KAFKA, &serve, &variables)?;
    payment.prints("paid:    order-1").await?;
    let mut stock = start(NATS, &serve, &variables)?;
    stock.prints("packed:  order-1").await?;
    let mut mail = start(RABBITMQ, &["serve"], &variables)?;
    mail.prints("mailed:  order-1").await?;
    let (payment, stock, mail) =
        (stop(payment).await?, stop(stock).await?, stop(mail).await?);
    let mut traces: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for ended in [&shop, &payment, &stock, &mail] {
        for span in printed(ended)? {
            traces.entry(span.trace).or_default().insert(span.service);
        }
    }
    assert_eq!(traces.len(), 4, "{traces:#?}");
    assert!(traces.values().all(|services| services.len() == 1));

    let records =
        observe::kafka::read_all(&variables[0].1, TOPIC, 4, "read_committed")
            .await?;
    let headers = records[0].headers().context("headers")?;
    assert!(headers.iter().all(|header| header.key != "traceparent"));
    payment.printed_as_the_book_shows(
        "no-inject",
        "ready:   payment, from Kafka's placed-orders to orders.paid in NATS\n\
         span:    payment, publish orders.paid, order-1: trace=<own-trace> id=<paid> \
         parent=<payment>\n\
         span:    payment, process placed-orders, order-1: trace=<own-trace> id=<payment> \
         parent=none\n\
         paid:    order-1\n\
         stopped\n",
    )
}

/// Headers that other programs have written, and that are no context, or one that does
/// not go into the headers of the next broker: the order goes on, and so does the
/// service.
#[tokio::test]
async fn a_broken_context_from_outside_begins_a_new_trace() -> Result<()> {
    let _turn = TURN.lock().await;
    let variables = fresh().await?;
    let good = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let long = good.repeat(1000);
    let broken: [&[u8]; 4] = [
        b"",
        b"\xff\xfe",
        b"00-00000000000000000000000000000000-0000000000000000-01",
        long.as_bytes(),
    ];

    let mut payment = start(KAFKA, &["serve"], &variables)?;
    payment.prints("ready:").await?;
    for (number, context) in broken.iter().enumerate() {
        let id = format!("broken-{number}");
        into_kafka(&variables[0].1, &id, &[("traceparent", context)]).await?;
        payment.prints(&format!("paid:    {id}")).await?;
    }
    // A state of two lines, which no header of NATS can hold. Of the context itself
    // nothing is broken.
    let headers: [(&str, &[u8]); 2] = [
        ("traceparent", good.as_bytes()),
        ("tracestate", b"shop=a\nb"),
    ];
    into_kafka(&variables[0].1, "two-lines\r\nid", &headers).await?;
    payment.prints("process placed-orders").await?;
    // A state and an id that no broker to come would take.
    let state = format!("shop={}", "x".repeat(100_000));
    let headers: [(&str, &[u8]); 2] = [
        ("traceparent", good.as_bytes()),
        ("tracestate", state.as_bytes()),
    ];
    into_kafka(&variables[0].1, &state, &headers).await?;
    payment.prints("process placed-orders").await?;
    payment.prints("paid:").await?;
    let payment = stop(payment).await?;
    let spans = printed(&payment)?;
    let processed = spans.iter().filter(|span| span.name.starts_with("process"));
    let parents: Vec<&str> = processed.map(|span| span.parent.as_str()).collect();
    let outside = "b7ad6b7169203331";
    assert_eq!(parents, ["", "", "", "", outside, outside]);
    let traces: BTreeSet<&str> =
        spans.iter().map(|span| span.trace.as_str()).collect();
    assert_eq!(traces.len(), 5, "{spans:#?}");

    // NATS has the six orders of the payment; these two come from outside.
    let jetstream = observe::nats::jetstream(&variables[2].1).await?;
    for context in ["order-1", &long] {
        let mut headers = async_nats::HeaderMap::new();
        headers.insert("order-id", "broken");
        headers.insert("traceparent", context);
        jetstream
            .publish_with_headers(SUBJECT, headers, "{}".into())
            .await?
            .await?;
    }
    // And one without a header at all.
    jetstream.publish(SUBJECT, "{}".into()).await?.await?;
    let mut stock = start(NATS, &["serve"], &variables)?;
    stock.prints("packed:  PAID_ORDERS-9").await?;
    let spans = printed(&stop(stock).await?)?;
    let processed = spans.iter().filter(|span| span.name.starts_with("process"));
    let parents: Vec<&str> = processed.map(|span| span.parent.as_str()).collect();
    assert_eq!(parents.len(), 9);
    assert!(parents[..6].iter().all(|parent| !parent.is_empty()));
    assert_eq!(parents[6..], ["", "", ""]);

    let mut mail = start(RABBITMQ, &["serve"], &variables)?;
    for _order in 0..9 {
        mail.prints("mailed:").await?;
    }
    let (connection, channel) = observe::rabbitmq::connect(&variables[1].1).await?;
    for (id, context) in [
        ("number", AMQPValue::LongLongInt(1)),
        ("bytes", AMQPValue::LongString(vec![0xff].into())),
        ("long", AMQPValue::LongString(long.as_str().into())),
    ] {
        let mut headers = FieldTable::default();
        headers.insert("traceparent".into(), context);
        let properties = BasicProperties::default()
            .with_message_id(id.into())
            .with_headers(headers);
        let (exchange, queue) = ("".into(), QUEUE.into());
        channel
            .basic_publish(exchange, queue, Default::default(), b"{}", properties)
            .await?
            .await?;
    }
    mail.prints("mailed:  long").await?;
    connection.close(200, "".into()).await?;
    let spans = printed(&stop(mail).await?)?;
    let parents: Vec<&str> = spans.iter().map(|span| span.parent.as_str()).collect();
    assert_eq!(parents.len(), 12);
    assert!(parents[..9].iter().all(|parent| !parent.is_empty()));
    assert_eq!(parents[9..], ["", "", ""]);
    Ok(())
}

/// An order as another program writes it.
async fn into_kafka(
    address: &str,
    id: &str,
    headers: &[(&str, &[u8])],
) -> Result<()> {
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", address)
        .create()?;
    let mut all = OwnedHeaders::new().insert(Header {
        key: "order-id",
        value: Some(id),
    });
    for (key, value) in headers {
        all = all.insert(Header {
            key,
            value: Some(*value),
        });
    }
    let record = FutureRecord::to(TOPIC)
        .key("one")
        .headers(all)
        .payload("{}");
    let sent = producer.send(record, wait::DEADLINE).await;
    sent.map_err(|(error, _record)| error)?;
    Ok(())
}

/// What the collector gets is what one sees there: three orders, three traces, each
/// with the six spans of four services. All of them arrive because each program sends
/// at its end what it has.
#[tokio::test]
async fn a_collector_gets_each_order_as_one_trace() -> Result<()> {
    let _turn = TURN.lock().await;
    let mut variables = fresh().await?;
    let collector = Collector::start().await?;
    variables.push(("OTEL_EXPORTER_OTLP_ENDPOINT", collector.address.clone()));
    // Longer than the test: what arrives was sent at the end of the program.
    variables.push(("OTEL_BSP_SCHEDULE_DELAY", "600000".to_owned()));
    let payment = start(KAFKA, &["serve"], &variables)?;
    let stock = start(NATS, &["serve"], &variables)?;
    let mut mail = start(RABBITMQ, &["serve"], &variables)?;
    let shop = start(KAFKA, &["publish", "1", "3"], &variables)?;
    let mut ended = vec![shop.end().await?.succeeded()?];
    for _order in 0..3 {
        mail.prints("mailed:").await?;
    }
    for service in [payment, stock, mail] {
        ended.push(stop(service).await?);
    }
    let arrived = collector.spans();
    assert_eq!(arrived.len(), 18, "{arrived:#?}");
    let mut traces: BTreeMap<&str, Vec<Span>> = BTreeMap::new();
    for span in &arrived {
        traces.entry(&span.trace).or_default().push(span.clone());
    }
    assert_eq!(traces.len(), 3);
    for spans in traces.values() {
        is_one_journey(spans)?;
    }
    // And the same as on the screens.
    let mut shown = Vec::new();
    for ended in &ended {
        shown.extend(printed(ended)?);
    }
    let sorted = |mut spans: Vec<Span>| {
        spans.sort();
        spans
    };
    assert_eq!(sorted(arrived), sorted(shown));
    Ok(())
}

/// Nobody listens, or somebody who never answers: the work is done, a line says that
/// the spans are lost, and the program ends.
#[tokio::test]
async fn without_its_collector_the_work_goes_on() -> Result<()> {
    let _turn = TURN.lock().await;
    let silent = TcpListener::bind("127.0.0.1:0").await?;
    for endpoint in [
        "http://127.0.0.1:1".to_owned(),
        format!("http://{}", silent.local_addr()?),
    ] {
        let mut variables = fresh().await?;
        variables.push(("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint));
        for binary in [KAFKA, NATS, RABBITMQ] {
            let ended = start(binary, &[], &variables)?.end().await?;
            assert!(ended.status.success(), "{}", ended.stderr);
            ended.printed_what_its_header_says()?;
            assert!(!ended.stderr.is_empty());
            for line in ended.stderr.lines() {
                assert!(line.starts_with("spans lost: "), "{line}");
            }
        }
    }
    Ok(())
}

#[tokio::test]
async fn an_address_of_no_collector_gets_one_line() -> Result<()> {
    let endpoint = ("OTEL_EXPORTER_OTLP_ENDPOINT", "not an address");
    let binaries = [KAFKA, NATS, RABBITMQ];
    fail_with_one_line_each(&binaries, &[endpoint], &["OTEL_"]).await
}

#[tokio::test]
async fn wrong_words_get_the_usage_and_a_missing_broker_one_line() -> Result<()> {
    let _turn = TURN.lock().await;
    let variables = fresh().await?;
    let of = |index: usize| (variables[index].0, variables[index].1.as_str());
    let no_kafka = ("KAFKA_BROKERS", "localhost:1");
    let no_rabbitmq = ("AMQP_URL", "amqp://app:secret@localhost:1/%2f");
    let no_nats = ("NATS_URL", "nats://app:secret@localhost:1");
    for (binary, sides, missing) in [
        (KAFKA, [no_kafka, of(2)], "cargo lab up kafka"),
        (KAFKA, [of(0), no_nats], "cargo lab up nats"),
        (NATS, [no_nats, of(1)], "cargo lab up nats"),
        (NATS, [of(2), no_rabbitmq], "cargo lab up rabbitmq"),
        (RABBITMQ, [no_rabbitmq, of(0)], "cargo lab up rabbitmq"),
    ] {
        let parts = ["localhost:1", missing];
        fail_with_one_line_each(&[binary], &sides, &parts).await?;
        for words in [
            &["--no-inject"][..],
            &["serve", "fast"],
            &["publish", "1"],
            &["publish", "one", "2"],
            &["publish", "5", "3"],
            &["publish", "1", "2", "--inject"],
        ] {
            let ended = Example::start_with(binary, words, &sides)?.end().await?;
            assert_eq!(ended.status.code(), Some(2), "{words:?}");
            ensure!(
                ended.stderr.starts_with("usage: trace_propagation_"),
                "{}",
                ended.stderr
            );
        }
    }
    Ok(())
}

// ---- A collector -----------------------------------------------------------

/// Takes what the exporters send, as a collector does: OTLP over HTTP, in protobuf.
struct Collector {
    address: String,
    requests: Arc<Mutex<Vec<ExportTraceServiceRequest>>>,
    server: JoinHandle<()>,
}

impl Collector {
    async fn start() -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = format!("http://{}", listener.local_addr()?);
        let requests = Arc::default();
        let kept = Arc::clone(&requests);
        let server = tokio::spawn(async move {
            while let Ok((stream, _peer)) = listener.accept().await {
                let kept = Arc::clone(&kept);
                tokio::spawn(async move {
                    // A connection that breaks is one without a request: the test
                    // misses its spans.
                    let _ended = take_requests(stream, &kept).await;
                });
            }
        });
        Ok(Self {
            address,
            requests,
            server,
        })
    }

    fn spans(&self) -> Vec<Span> {
        let requests = self.requests.lock();
        let requests = requests.unwrap_or_else(PoisonError::into_inner);
        let mut spans = Vec::new();
        for resource in requests.iter().flat_map(|it| &it.resource_spans) {
            let attributes = resource.resource.iter().flat_map(|it| &it.attributes);
            let service = attributes
                .filter(|attribute| attribute.key == "service.name")
                .find_map(|attribute| {
                    match attribute.value.as_ref()?.value.as_ref()? {
                        Value::StringValue(name) => Some(name.clone()),
                        _other => None,
                    }
                });
            for span in resource.scope_spans.iter().flat_map(|it| &it.spans) {
                spans.push(Span {
                    service: service.clone().unwrap_or_default(),
                    name: span.name.clone(),
                    trace: hex(&span.trace_id),
                    id: hex(&span.span_id),
                    parent: hex(&span.parent_span_id),
                    links: span.links.iter().map(|it| hex(&it.span_id)).collect(),
                });
            }
        }
        spans
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.server.abort();
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The requests of one connection.
async fn take_requests(
    stream: TcpStream,
    requests: &Mutex<Vec<ExportTraceServiceRequest>>,
) -> Result<()> {
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    while stream.read_line(&mut line).await? > 0 {
        ensure!(line.starts_with("POST /v1/traces "), "{line}");
        let mut length = 0;
        let mut protobuf = false;
        loop {
            line.clear();
            stream.read_line(&mut line).await?;
            let Some((name, value)) = line.trim().split_once(": ") else {
                break;
            };
            match name.to_ascii_lowercase().as_str() {
                "content-length" => length = value.parse()?,
                "content-type" => protobuf = value == "application/x-protobuf",
                _ => {}
            }
        }
        ensure!(protobuf, "not what OTLP has over HTTP");
        let mut body = vec![0; length];
        stream.read_exact(&mut body).await?;
        let request = ExportTraceServiceRequest::decode(body.as_slice())?;
        requests
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(request);
        // An answer that says nothing is a good one.
        let answer: &[u8] = b"HTTP/1.1 200 OK\r\n\
            content-type: application/x-protobuf\r\ncontent-length: 0\r\n\r\n";
        stream.get_mut().write_all(answer).await?;
        line.clear();
    }
    Ok(())
}
