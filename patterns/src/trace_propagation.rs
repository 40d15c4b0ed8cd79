//! Trace propagation: what is the same on each broker: the spans, their names, and
//! where they go when they end.

use std::{
    env,
    fmt::{Display, Write as _},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use opentelemetry::{
    Context, KeyValue,
    trace::{
        Link, SpanBuilder, SpanId, SpanKind, Status, TraceContextExt as _,
        TracerProvider as _,
    },
};
use opentelemetry_otlp::ExporterBuildError;
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    trace::{SdkTracer, SdkTracerProvider, SpanData, SpanExporter},
};
use serde::{Deserialize, Serialize};

/// The header that holds the id of an order in Kafka and NATS; RabbitMQ has a place of
/// its own for it.
pub const ID: &str = "order-id";

/// An order on its way. Its id and the trace travel beside it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    pub customer: String,
    /// In pieces.
    pub quantity: u64,
}

/// The id of an order, the same on each broker.
#[must_use]
pub fn id(number: u64) -> String {
    format!("order-{number}")
}

/// The orders of the example: ten customers in turns.
#[must_use]
pub fn order(number: u64) -> Order {
    Order {
        customer: format!("customer-{}", number % 10),
        quantity: number,
    }
}

// ---- The spans -------------------------------------------------------------

// ANCHOR: spans
/// The span of whoever publishes a message.
///
/// Name, kind and attributes are those of OpenTelemetry's conventions, so that a
/// viewer knows what it shows:
/// <https://opentelemetry.io/docs/specs/semconv/messaging/messaging-spans/>.
#[must_use]
pub fn publish_span(
    system: &'static str,
    destination: &'static str,
    id: &str,
) -> SpanBuilder {
    SpanBuilder::from_name(format!("publish {destination}"))
        .with_kind(SpanKind::Producer)
        .with_attributes([
            KeyValue::new("messaging.operation.name", "publish"),
            KeyValue::new("messaging.operation.type", "send"),
            KeyValue::new("messaging.system", system),
            KeyValue::new("messaging.destination.name", destination),
            KeyValue::new("messaging.message.id", id.to_owned()),
        ])
}

/// The span of whoever works on a message that has come.
#[must_use]
pub fn process_span(
    system: &'static str,
    destination: &'static str,
    id: &str,
) -> SpanBuilder {
    let message = KeyValue::new("messaging.message.id", id.to_owned());
    processing(system, destination, message)
}

/// The span of whoever works on many messages at once. One span has one parent, and
/// here are many, so there is a link to each.
#[must_use]
pub fn batch_span(
    system: &'static str,
    destination: &'static str,
    messages: Vec<Link>,
) -> SpanBuilder {
    let count = i64::try_from(messages.len()).unwrap_or(i64::MAX);
    let count = KeyValue::new("messaging.batch.message_count", count);
    processing(system, destination, count).with_links(messages)
}

fn processing(
    system: &'static str,
    destination: &'static str,
    what: KeyValue,
) -> SpanBuilder {
    SpanBuilder::from_name(format!("process {destination}"))
        .with_kind(SpanKind::Consumer)
        .with_attributes([
            KeyValue::new("messaging.operation.name", "process"),
            KeyValue::new("messaging.operation.type", "process"),
            KeyValue::new("messaging.system", system),
            KeyValue::new("messaging.destination.name", destination),
            what,
        ])
}

/// Ends the span of this context, with the error if there is one.
pub fn end_span<T>(context: &Context, result: &Result<T, impl Display>) {
    let span = context.span();
    if let Err(error) = result {
        span.set_status(Status::error(format!("{error:#}")));
    }
    span.end();
}
// ANCHOR_END: spans

// ---- Where they go ---------------------------------------------------------

/// Each of them, set, names a collector. The SDK reads them itself, with all others of
/// <https://opentelemetry.io/docs/specs/otel/protocol/exporter/>.
const COLLECTOR: [&str; 2] = [
    "OTEL_EXPORTER_OTLP_ENDPOINT",
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
];

// ANCHOR: telemetry
/// What a service needs to make spans.
///
/// Each finished span is a line on stdout, so that one sees it without a collector.
/// Where the environment names one, the spans also go there, over HTTP and in the
/// background.
#[derive(Debug)]
pub struct Telemetry {
    provider: SdkTracerProvider,
    pub tracer: SdkTracer,
}

impl Telemetry {
    /// # Errors
    ///
    /// If the environment names a collector in a way that nobody understands.
    pub fn start(service: &'static str) -> Result<Self, ExporterBuildError> {
        let resource = Resource::builder().with_service_name(service).build();
        let mut provider = SdkTracerProvider::builder()
            .with_resource(resource)
            .with_simple_exporter(Console { service });
        let named = |name: &_| env::var_os(name).is_some_and(|it| !it.is_empty());
        if COLLECTOR.iter().any(named) {
            let exporter = opentelemetry_otlp::SpanExporter::builder()
                .with_http()
                .build()?;
            // Many spans in one request, from a thread of its own: the work waits for
            // no collector.
            provider = provider.with_batch_exporter(Reported::new(exporter));
        }
        let provider = provider.build();
        let tracer = provider.tracer("trace_propagation");
        Ok(Self { provider, tracer })
    }

    /// Sends what has not been sent, and says so if it does not arrive. A program that
    /// is killed, or calls `process::exit`, loses it. Blocks, five seconds at most.
    pub fn end(self) {
        // Not an error of the program: its work is done.
        if let Err(error) = self.provider.shutdown() {
            eprintln!("spans lost: {error}; has the collector not answered?");
        }
    }
}
// ANCHOR_END: telemetry

/// An exporter that says on stderr when spans do not arrive. Of the SDK's own one hears
/// nothing without its feature `internal-logs` and a subscriber of tracing.
#[derive(Debug)]
struct Reported<E> {
    exporter: E,
    told: AtomicBool,
}

impl<E> Reported<E> {
    fn new(exporter: E) -> Self {
        let told = AtomicBool::new(false);
        Self { exporter, told }
    }
}

impl<E: SpanExporter> SpanExporter for Reported<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let result = self.exporter.export(batch).await;
        match &result {
            Ok(()) => self.told.store(false, Ordering::Relaxed),
            // To hear it once is enough, until it is well again.
            Err(error) if !self.told.swap(true, Ordering::Relaxed) => eprintln!(
                "spans lost: {error}; is there a collector at {}?",
                COLLECTOR[0]
            ),
            Err(_again) => {}
        }
        result
    }

    fn shutdown_with_timeout(&self, limit: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(limit)
    }

    fn shutdown(&self) -> OTelSdkResult {
        self.exporter.shutdown()
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.exporter.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}

/// An exporter that prints a line for each span.
#[derive(Debug)]
struct Console {
    service: &'static str,
}

impl SpanExporter for Console {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        for span in &batch {
            println!("{}", line(self.service, span));
        }
        Ok(())
    }
}

fn line(service: &str, span: &SpanData) -> String {
    let attribute = |key: &str| {
        let mut attributes = span.attributes.iter();
        attributes.find(|attribute| attribute.key.as_str() == key)
    };
    let what = match attribute("messaging.batch.message_count") {
        Some(count) => format!("{} messages", count.value),
        None => attribute("messaging.message.id")
            .map(|id| id.value.as_str().escape_debug().to_string())
            .unwrap_or_default(),
    };
    let trace = span.span_context.trace_id();
    let id = span.span_context.span_id();
    let name = &span.name;
    let mut line =
        format!("span:    {service}, {name}, {what}: trace={trace} id={id}");
    // Writing into a String cannot fail.
    let _ = match span.parent_span_id {
        SpanId::INVALID => write!(line, " parent=none"),
        parent => write!(line, " parent={parent}"),
    };
    for link in &span.links.links {
        let _ = write!(line, " link={}", link.span_context.span_id());
    }
    if let Status::Error { description } = &span.status {
        let _ = write!(line, " error={description:?}");
    }
    line
}

#[cfg(test)]
mod tests {
    use std::{
        collections::HashMap,
        sync::{Arc, Mutex, PoisonError},
    };

    use opentelemetry::propagation::TextMapPropagator as _;
    use opentelemetry_sdk::propagation::TraceContextPropagator;

    use super::*;

    /// Keeps what it is given.
    #[derive(Debug, Clone, Default)]
    struct Kept(Arc<Mutex<Vec<SpanData>>>);

    impl Kept {
        fn spans(&self) -> Vec<SpanData> {
            self.0
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone()
        }
    }

    impl SpanExporter for Kept {
        async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
            self.0
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .extend(batch);
            Ok(())
        }
    }

    fn tracer() -> (SdkTracerProvider, SdkTracer, Kept) {
        let kept = Kept::default();
        let provider = SdkTracerProvider::builder()
            .with_simple_exporter(kept.clone())
            .build();
        let tracer = provider.tracer("test");
        (provider, tracer, kept)
    }

    /// What comes out of these headers.
    fn extracted(headers: &HashMap<String, String>) -> Context {
        TraceContextPropagator::new().extract_with_context(&Context::new(), headers)
    }

    #[test]
    fn what_is_processed_is_a_child_of_what_was_published() {
        let (_provider, tracer, kept) = tracer();
        let span = publish_span("kafka", "placed-orders", "order-1")
            .start_with_context(&tracer, &Context::new());
        let shop = Context::new().with_span(span);
        let mut headers = HashMap::new();
        TraceContextPropagator::new().inject_context(&shop, &mut headers);
        end_span(&shop, &Ok::<_, String>(()));

        let parent = extracted(&headers);
        let span = process_span("kafka", "placed-orders", "order-1")
            .start_with_context(&tracer, &parent);
        end_span(&parent.with_span(span), &Err::<(), _>("no money"));

        let spans = kept.spans();
        let [published, processed] = &spans[..] else {
            panic!("{spans:?}")
        };
        let sent = &published.span_context;
        assert_eq!(processed.span_context.trace_id(), sent.trace_id());
        assert_eq!(processed.parent_span_id, sent.span_id());
        assert_eq!(published.span_kind, SpanKind::Producer);
        assert_eq!(processed.span_kind, SpanKind::Consumer);
        assert_eq!(published.status, Status::Unset);
        assert_eq!(processed.status, Status::error("no money"));
    }

    #[test]
    fn what_is_no_trace_context_is_no_parent() {
        let good = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        for traceparent in [
            "",
            "-",
            "order-1",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            &good.repeat(1000),
        ] {
            let headers =
                HashMap::from([("traceparent".to_owned(), traceparent.to_owned())]);
            let parent = extracted(&headers);
            assert!(!parent.span().span_context().is_valid(), "{traceparent}");
        }
        let headers = HashMap::from([("traceparent".to_owned(), good.to_owned())]);
        assert!(extracted(&headers).span().span_context().is_valid());
    }

    #[test]
    fn a_line_names_service_trace_parent_links_and_error() {
        let (_provider, tracer, kept) = tracer();
        let headers = HashMap::from([(
            "traceparent".to_owned(),
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".to_owned(),
        )]);
        let shop = extracted(&headers);
        let link = Link::with_context(shop.span().span_context().clone());
        let span = process_span("nats", "orders.paid", "order-1")
            .with_links(vec![link])
            .start_with_context(&tracer, &shop);
        end_span(&shop.with_span(span), &Err::<(), _>("no\nmoney"));
        let spans = kept.spans();
        let id = spans[0].span_context.span_id();
        assert_eq!(
            line("stock", &spans[0]),
            format!(
                "span:    stock, process orders.paid, order-1: \
                 trace=0af7651916cd43dd8448eb211c80319c id={id} \
                 parent=b7ad6b7169203331 link=b7ad6b7169203331 error=\"no\\nmoney\""
            )
        );
    }
}
