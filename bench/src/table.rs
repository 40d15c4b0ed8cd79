//! The results as Markdown, in each language of the book.

use crate::{
    report::{Case, Report, Sample, Text},
    statistics::Spread,
};

#[derive(Clone, Copy)]
pub enum Language {
    English,
    Chinese,
}

impl Language {
    fn pick(self, en: &'static str, zh: &'static str) -> &'static str {
        match self {
            Self::English => en,
            Self::Chinese => zh,
        }
    }

    fn of(self, text: &Text) -> &str {
        match self {
            Self::English => &text.en,
            Self::Chinese => &text.zh,
        }
    }
}

pub fn render(report: &Report, language: Language) -> String {
    let mut text = String::new();
    if report.quick {
        text.push_str(language.pick(
            "**A quick run: it tries the machinery, and its figures say nothing.**\n\n",
            "**这是一次快速运行，只用来试机制，数字没有意义。**\n\n",
        ));
    }
    text.push_str(&figures(report, language));
    text.push('\n');
    text.push_str(&resources(report, language));
    text.push('\n');
    text.push_str(&settings(report, language));
    text.push('\n');
    text.push_str(&conditions(report, language));
    text
}

/// Stands for the name of the tool in the heads of the tables.
const TOOL: &str = "{tool}";

/// What the reader types: the words of the command, or the name.
fn tool(report: &Report) -> &str {
    match report.versions.tool.split_once(' ') {
        Some(("natscli", _)) => "nats bench",
        Some((name, _)) => name,
        None => &report.versions.tool,
    }
}

fn figures(report: &Report, language: Language) -> String {
    let mut table = language
        .pick(
            "| Case | Unit | Rust | `{tool}` | Times as good | Target |\n",
            "| 项目 | 单位 | Rust | `{tool}` | 倍数 | 目标 |\n",
        )
        .replace(TOOL, tool(report));
    table.push_str("| --- | --- | --: | --: | --: | --- |\n");
    for row in report.rows() {
        let verdict = match row.reached() {
            Some(true) => language.pick(": reached", "：达到"),
            Some(false) => language.pick(": **not reached**", "：**未达到**"),
            None => language.pick("none", "无"),
        };
        let target = row.case.target.map(|target| format!("{target:.1}"));
        let target = target.unwrap_or_default();
        table.push_str(&format!(
            "| {} | {} | {} | {} | {} | {target}{verdict} |\n",
            language.of(&row.case.title),
            row.measure.name(),
            spread(row.rust, figure),
            spread(row.tool, figure),
            spread(row.ratio, |ratio| format!("{ratio:.2}")),
        ));
    }
    for case in &report.cases {
        if let Some(reason) = &case.not_run {
            let not_run = language.pick("not run", "未运行");
            let title = language.of(&case.title);
            table.push_str(&format!("| {title} | {not_run}: {reason} | | | | |\n"));
        }
    }
    table
}

fn resources(report: &Report, language: Language) -> String {
    let mut table = language
        .pick(
            "| Case | Messages | CPU s: Rust | server | CPU s: `{tool}` | server \
             | Peak MiB: Rust | server | Peak MiB: `{tool}` | server |\n",
            "| 项目 | 消息数 | CPU 秒：Rust | 服务器 | CPU 秒：`{tool}` | 服务器 \
             | 内存峰值 MiB：Rust | 服务器 | 内存峰值 MiB：`{tool}` | 服务器 |\n",
        )
        .replace(TOOL, tool(report));
    table
        .push_str("| --- | --: | --: | --: | --: | --: | --: | --: | --: | --: |\n");
    for case in report.cases.iter().filter(|case| case.not_run.is_none()) {
        table.push_str(&format!(
            "| {} | {} |",
            language.of(&case.title),
            thousands(case.messages)
        ));
        for cell in cells(case, language) {
            table.push_str(&format!(" {cell} |"));
        }
        table.push('\n');
    }
    table
}

fn cells(case: &Case, language: Language) -> [String; 8] {
    let (rust, tool) = (&case.rust.samples, &case.tool.samples);
    let median = |samples: &[Sample], of: fn(&Sample) -> Option<f64>, digits| {
        let values: Option<Vec<f64>> = samples.iter().map(of).collect();
        match values.and_then(Spread::of) {
            Some(spread) => format!("{:.digits$}", spread.median),
            None => language.pick("not measured", "未测").to_owned(),
        }
    };
    let cpu = [
        |s: &Sample| s.client_cpu_seconds,
        |s: &Sample| s.broker_cpu_seconds,
    ];
    let peak = [
        |s: &Sample| s.client_peak_mib,
        |s: &Sample| s.broker_peak_mib,
    ];
    [
        median(rust, cpu[0], 2),
        median(rust, cpu[1], 2),
        median(tool, cpu[0], 2),
        median(tool, cpu[1], 2),
        median(rust, peak[0], 0),
        median(rust, peak[1], 0),
        median(tool, peak[0], 0),
        median(tool, peak[1], 0),
    ]
}

fn settings(report: &Report, language: Language) -> String {
    let mut list = String::new();
    for case in &report.cases {
        list.push_str(&format!(
            "- {}{}{}\n",
            language.of(&case.title),
            language.pick(": ", "："),
            language.of(&case.settings)
        ));
        let commands = case.rust.commands.iter().chain(&case.tool.commands);
        let commands: Vec<String> = commands.map(|c| format!("`{c}`")).collect();
        list.push_str(&format!("  <br>{}\n", commands.join("<br>")));
    }
    list
}

fn conditions(report: &Report, language: Language) -> String {
    let Report {
        date,
        repeats,
        warm_ups,
        message_bytes,
        machine,
        versions,
        server_from,
        ..
    } = report;
    let memory = machine
        .memory_gib
        .map_or(String::new(), |gib| format!(", {gib} GiB"));
    let load = match machine.load_before {
        Some(load) => format!("{load}"),
        None => language.pick("not measured", "未测").to_owned(),
    };
    let versions = format!(
        "{}, {}, {}, {}",
        versions.server, versions.client, versions.tool, versions.rust
    );
    let size = match (message_bytes, language) {
        (None, _) => String::new(),
        (Some(bytes), Language::English) => format!(" with messages of {bytes} B"),
        (Some(bytes), Language::Chinese) => format!("，消息 {bytes} B"),
    };
    let computer = format!(
        "{}, {} × {}{memory}",
        machine.system, machine.cores, machine.processor
    );
    match language {
        Language::English => format!(
            "Measured on {date}{size}: {warm_ups} run to warm up, then {repeats} repeats. \
             {versions}. The server: {server_from}. The machine: {computer}; load in \
             the minute before: {load}.\n"
        ),
        Language::Chinese => format!(
            "{date} 测得{size}：预热 {warm_ups} 次，再重复 \
             {repeats} 次。{versions}。服务器：{server_from}。机器：{computer}；之前\
             一分钟的负载：{load}。\n"
        ),
    }
}

fn spread(spread: Spread, shown: impl Fn(f64) -> String) -> String {
    let Spread { median, min, max } = spread;
    format!("{} ({} – {})", shown(median), shown(min), shown(max))
}

/// Three digits are more than the repeats agree on.
fn figure(value: f64) -> String {
    if value < 1.0 {
        return format!("{value:.2}");
    }
    let digits = value.log10().floor() as i32 + 1;
    let unit = 10_f64.powi((digits - 3).max(0));
    thousands(((value / unit).round() * unit) as u64)
}

fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::example;

    #[test]
    fn figures_have_three_digits() {
        assert_eq!(figure(3_656_594.0), "3,660,000");
        assert_eq!(figure(12_345.0), "12,300");
        assert_eq!(figure(999.6), "1,000");
        assert_eq!(figure(42.4), "42");
        assert_eq!(figure(0.057), "0.06");
        assert_eq!(thousands(1_000_000), "1,000,000");
        assert_eq!(thousands(999), "999");
    }

    #[test]
    fn a_target_that_is_not_reached_stands_beside_its_figure() {
        let text = render(&example(), Language::English);
        let line = |unit: &str| {
            let mut lines = text.lines();
            lines.find(|line| line.contains(unit)).unwrap_or_default()
        };
        assert!(line("| msg/s |").contains("| 2.00 (2.00 – 2.00) | 1.1: reached |"));
        assert!(line("| p99, µs |").contains("| 1.1: **not reached** |"));
        assert!(line("absent").contains("not run: no such example"));
        assert!(!text.contains("quick run"));
    }

    #[test]
    fn what_was_not_measured_is_named() {
        let text = render(&example(), Language::English);
        let row = "| publish | 2,000,000 | 1.50 | 0.50 | 1.50 | 0.50 | 5 | not \
                   measured | 5 | not measured |";
        assert!(text.contains(row), "{text}");
    }

    #[test]
    fn both_languages_have_the_same_figures() {
        let numbers = |language| -> String {
            let text = render(&example(), language);
            text.chars().filter(char::is_ascii_digit).collect()
        };
        assert_eq!(numbers(Language::English), numbers(Language::Chinese));
    }

    #[test]
    fn a_quick_run_says_so() {
        let quick = Report {
            quick: true,
            ..example()
        };
        assert!(render(&quick, Language::English).starts_with("**A quick run"));
    }
}
