//! The results: what is stored as JSON, and shown by table and picture.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use crate::statistics::Spread;

#[derive(Debug, Deserialize, Serialize)]
pub struct Report {
    pub broker: String,
    /// Year, month and day.
    pub date: String,
    /// Was it only a try of the machinery, with few messages?
    pub quick: bool,
    pub repeats: u32,
    pub warm_ups: u32,
    /// Of each message; None where each case says it.
    pub message_bytes: Option<u32>,
    pub machine: Machine,
    pub versions: Versions,
    /// Where the server came from.
    pub server_from: String,
    pub cases: Vec<Case>,
}

#[derive(Debug, Deserialize, Serialize)]
pub struct Machine {
    pub system: String,
    pub processor: String,
    pub cores: u32,
    pub memory_gib: Option<f64>,
    /// What else ran, on average in the minute before.
    pub load_before: Option<f64>,
}

#[derive(Debug, Deserialize, Serialize)]
pub struct Versions {
    pub server: String,
    pub client: String,
    pub tool: String,
    pub rust: String,
}

/// The same task, done by the examples and by the tool.
#[derive(Debug, Deserialize, Serialize)]
pub struct Case {
    pub id: String,
    pub title: Text,
    /// Durability, windows, batches.
    pub settings: Text,
    /// In each sample.
    pub messages: u64,
    /// How many times as quick as the tool the example should be, if anything was
    /// aimed at.
    pub target: Option<f64>,
    /// Why there are no samples.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub not_run: Option<String>,
    pub rust: Side,
    pub tool: Side,
}

/// In each language of the book.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Text {
    pub en: String,
    pub zh: String,
}

impl Text {
    pub fn new(en: &str, zh: &str) -> Self {
        Self {
            en: en.to_owned(),
            zh: zh.to_owned(),
        }
    }
}

#[derive(Debug, Default, Deserialize, Serialize)]
pub struct Side {
    /// As one could type them.
    pub commands: Vec<String>,
    /// One for each repeat, in their order.
    pub samples: Vec<Sample>,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Sample {
    pub values: BTreeMap<Measure, f64>,
    /// Of all programs of this side, and of the broker meanwhile. None where it
    /// was not measured.
    pub client_cpu_seconds: Option<f64>,
    pub broker_cpu_seconds: Option<f64>,
    pub client_peak_mib: Option<f64>,
    pub broker_peak_mib: Option<f64>,
}

#[derive(
    Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize,
)]
pub enum Measure {
    #[serde(rename = "msg/s")]
    Rate,
    #[serde(rename = "p50 us")]
    P50,
    #[serde(rename = "p99 us")]
    P99,
}

impl Measure {
    pub fn name(self) -> &'static str {
        match self {
            Self::Rate => "msg/s",
            Self::P50 => "p50, µs",
            Self::P99 => "p99, µs",
        }
    }

    /// How many times as good as the other a value is.
    fn ratio(self, value: f64, other: f64) -> f64 {
        match self {
            Self::Rate => value / other,
            Self::P50 | Self::P99 => other / value,
        }
    }
}

/// A measure of a case, over all repeats.
pub struct Row<'a> {
    pub case: &'a Case,
    pub measure: Measure,
    pub rust: Spread,
    pub tool: Spread,
    /// Of the two samples of each repeat, so that what slows the machine down
    /// for a while slows both.
    pub ratio: Spread,
}

impl Row<'_> {
    /// None where nothing was aimed at.
    pub fn reached(&self) -> Option<bool> {
        let target = self.case.target?;
        Some(self.ratio.median >= target)
    }
}

impl Case {
    pub fn rows(&self) -> impl Iterator<Item = Row<'_>> {
        let first = self.rust.samples.first();
        let measures = first.into_iter().flat_map(|sample| sample.values.keys());
        measures.filter_map(|measure| self.row(*measure))
    }

    fn row(&self, measure: Measure) -> Option<Row<'_>> {
        let values = |side: &Side| -> Option<Vec<f64>> {
            let samples = side.samples.iter();
            samples.map(|s| s.values.get(&measure).copied()).collect()
        };
        let (rust, tool) = (values(&self.rust)?, values(&self.tool)?);
        let ratios = rust.iter().zip(&tool).map(|(r, t)| measure.ratio(*r, *t));
        Some(Row {
            case: self,
            measure,
            ratio: Spread::of(ratios)?,
            rust: Spread::of(rust)?,
            tool: Spread::of(tool)?,
        })
    }
}

impl Report {
    pub fn rows(&self) -> impl Iterator<Item = Row<'_>> {
        self.cases.iter().flat_map(Case::rows)
    }

    pub fn from_json(text: &str) -> Result<Self> {
        serde_json::from_str(text).context("these are no results of a benchmark")
    }

    pub fn to_json(&self) -> Result<String> {
        Ok(serde_json::to_string_pretty(self)? + "\n")
    }
}

/// Results for the tests of what shows them.
#[cfg(test)]
pub fn example() -> Report {
    let sample = |values: &[(Measure, f64)]| Sample {
        values: values.iter().copied().collect(),
        client_cpu_seconds: Some(1.5),
        broker_cpu_seconds: Some(0.5),
        client_peak_mib: Some(5.25),
        broker_peak_mib: None,
    };
    let side = |samples: Vec<Sample>| Side {
        commands: vec!["nats bench pub a --msgs 2000000".to_owned()],
        samples,
    };
    let rates = |rates: [f64; 3]| {
        side(rates.map(|rate| sample(&[(Measure::Rate, rate)])).into())
    };
    let latencies = |values: [(f64, f64); 3]| {
        let sample =
            |(p50, p99)| sample(&[(Measure::P50, p50), (Measure::P99, p99)]);
        side(values.map(sample).into())
    };
    let case = |id: &str, rust, tool| Case {
        id: id.to_owned(),
        title: Text::new(id, "某项"),
        settings: Text::new("memory only", "只在内存"),
        messages: 2_000_000,
        target: Some(1.1),
        not_run: None,
        rust,
        tool,
    };
    let mut absent = case("absent", Side::default(), Side::default());
    absent.not_run = Some("no such example".to_owned());
    Report {
        broker: "NATS".to_owned(),
        date: "2026-01-02".to_owned(),
        quick: false,
        repeats: 3,
        warm_ups: 1,
        message_bytes: Some(128),
        machine: Machine {
            system: "Linux 6".to_owned(),
            processor: "a <fast> one & more".to_owned(),
            cores: 2,
            memory_gib: Some(8.0),
            load_before: Some(0.1),
        },
        versions: Versions {
            server: "nats-server 2.15.1".to_owned(),
            client: "async-nats 0.51.0".to_owned(),
            tool: "natscli 0.5.1".to_owned(),
            rust: "rustc 1.95.0".to_owned(),
        },
        server_from: "a process of this run".to_owned(),
        cases: vec![
            // Each repeat twice as slow as the one before, on both sides.
            case("publish", rates([4e6, 2e6, 1e6]), rates([2e6, 1e6, 5e5])),
            case(
                "request",
                latencies([(100.0, 400.0), (110.0, 420.0), (90.0, 410.0)]),
                latencies([(100.0, 200.0), (110.0, 210.0), (90.0, 205.0)]),
            ),
            absent,
        ],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_again() -> Result<()> {
        let text = example().to_json()?;
        assert_eq!(Report::from_json(&text)?.to_json()?, text);
        assert!(Report::from_json("{}").is_err());
        Ok(())
    }

    #[test]
    fn a_ratio_is_that_of_the_two_samples_of_a_repeat() {
        let report = example();
        let rows: Vec<_> = report.rows().collect();
        assert_eq!(rows.len(), 3, "a rate, two latencies, nothing for absent");
        let ratio = rows[0].ratio;
        assert_eq!((ratio.min, ratio.median, ratio.max), (2.0, 2.0, 2.0));
        assert_eq!(rows[0].reached(), Some(true));
    }

    #[test]
    fn a_longer_latency_is_worse() {
        let report = example();
        let rows: Vec<_> = report.rows().collect();
        assert_eq!(rows[1].ratio.median, 1.0);
        assert_eq!(rows[2].ratio.median, 0.5);
        assert_eq!([rows[1].reached(), rows[2].reached()], [Some(false); 2]);
    }
}
