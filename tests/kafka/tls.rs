//! What the tests of the examples with TLS share: a Kafka that shows a
//! certificate.

use anyhow::{Context as _, Result};

/// The settings with one more listener, like CLIENTS in all but the certificate
/// that it shows.
pub fn with_listener(settings: &str, name: &str, certificate: &str) -> String {
    let key = format!("listener.name.{}", name.to_lowercase());
    let mut lines: Vec<String> = Vec::new();
    for line in settings.lines() {
        match line.split_once('=') {
            Some(("listeners", _)) => {
                lines.push(format!("{line},{name}://localhost:0"));
            }
            Some(("listener.security.protocol.map", map)) => {
                let of_clients = map.split(',').find_map(|entry| {
                    entry.strip_prefix("CLIENTS:").map(str::to_owned)
                });
                let protocol = of_clients.unwrap_or_default();
                lines.push(format!("{line},{name}:{protocol}"));
            }
            _ => lines.push(line.to_owned()),
        }
        if let Some(rest) = line.strip_prefix("listener.name.clients") {
            lines.push(format!("{key}{rest}"));
        }
    }
    lines.extend([
        format!("{key}.ssl.keystore.type=PEM"),
        format!("{key}.ssl.keystore.key=${{files:certs:{certificate}.key}}"),
        format!(
            "{key}.ssl.keystore.certificate.chain=${{files:certs:{certificate}.pem}}"
        ),
    ]);
    lines.join("\n")
}

/// Runs the command at the end of a line, for what it finds wrong with a
/// certificate.
pub fn second_opinion(line: &str) -> Result<String> {
    let at = line.find("openssl s_client").context("no command")?;
    let script = format!("{} < /dev/null 2>&1", &line[at..]);
    let output = std::process::Command::new("sh")
        .args(["-c", &script])
        .output()?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
