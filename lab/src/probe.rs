//! Asking a port who is there, in the words of the broker's own protocol: an
//! open port alone says nothing, as Docker opens it before the broker does.

use std::{
    env,
    io::{Read as _, Write as _},
    net::{TcpStream, ToSocketAddrs as _},
    time::Duration,
};

use anyhow::{Result, bail};

use crate::broker::Broker;

/// A broker on this machine answers within a few milliseconds.
const PATIENCE: Duration = Duration::from_secs(2);

/// Where a client connects to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    pub host: String,
    pub port: u16,
}

/// Who listens at an [`Endpoint`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listener {
    /// Nobody.
    Nothing,
    /// A broker of the kind that was asked for. Kafka does not tell its version.
    Broker { version: Option<String> },
    /// Some program that does not speak the broker's protocol, or not without
    /// encryption.
    Other,
}

/// The endpoint that the examples use: the one in the environment, else the
/// default.
///
/// # Errors
///
/// If the variable holds something that is no address.
pub fn endpoint(broker: Broker) -> Result<Endpoint> {
    let variable = broker.address_var();
    let Ok(address) = env::var(variable) else {
        return Ok(Endpoint {
            host: "localhost".to_owned(),
            port: broker.default_port(),
        });
    };
    match parse(&address, broker.default_port()) {
        Some(endpoint) => Ok(endpoint),
        None => bail!(
            "{variable} holds no address of {broker}; a right one is {}",
            broker.address(broker.default_port())
        ),
    }
}

/// Finds host and port in an address: `host:port`, the first of several
/// separated by commas, or a URL with or without user and path.
pub fn parse(address: &str, default_port: u16) -> Option<Endpoint> {
    let first = address.split(',').next()?;
    let rest = first.split_once("://").map_or(first, |(_, rest)| rest);
    let rest = rest.split(['/', '?']).next()?;
    let rest = rest.rsplit_once('@').map_or(rest, |(_, rest)| rest);
    let (host, port) = match rest.rsplit_once(':') {
        Some((host, port)) if !host.ends_with(':') => (host, port.parse().ok()?),
        _ => (rest, default_port),
    };
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let valid = !host.is_empty() && !host.contains(char::is_whitespace);
    valid.then(|| Endpoint {
        host: host.to_owned(),
        port,
    })
}

/// Connects and asks. Takes two seconds at most for each address of the host.
pub fn listener(broker: Broker, endpoint: &Endpoint) -> Listener {
    let Some(mut stream) = connect(endpoint) else {
        return Listener::Nothing;
    };
    let version = match broker {
        Broker::Kafka => kafka(&mut stream),
        Broker::RabbitMq => rabbitmq(&mut stream),
        Broker::Nats => nats(&mut stream),
    };
    match version {
        Some(version) => Listener::Broker { version },
        None => Listener::Other,
    }
}

fn connect(endpoint: &Endpoint) -> Option<TcpStream> {
    let addresses = (endpoint.host.as_str(), endpoint.port)
        .to_socket_addrs()
        .ok()?;
    let stream = addresses
        .filter_map(|address| TcpStream::connect_timeout(&address, PATIENCE).ok())
        .next()?;
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    Some(stream)
}

/// Asks with `ApiVersions`, version 0, which each broker understands. The answer
/// begins with its length and the number that came with the question.
fn kafka(stream: &mut TcpStream) -> Option<Option<String>> {
    const CORRELATION: [u8; 4] = [0, 0, 0, 7];
    let mut question = vec![0, 0, 0, 13, 0, 18, 0, 0];
    question.extend(CORRELATION);
    question.extend([0, 3]);
    question.extend(b"lab");
    stream.write_all(&question).ok()?;
    let mut answer = [0; 8];
    stream.read_exact(&mut answer).ok()?;
    (answer[4..] == CORRELATION).then_some(None)
}

/// Sends the protocol header; the server's `connection.start` carries a table in
/// which "version" is followed by a string with its length.
fn rabbitmq(stream: &mut TcpStream) -> Option<Option<String>> {
    const METHOD_FRAME: u8 = 1;
    stream.write_all(b"AMQP\0\0\x09\x01").ok()?;
    let answer = first_bytes(stream)?;
    if answer.first() != Some(&METHOD_FRAME) {
        return None;
    }
    let key = b"\x07versionS";
    let version = answer
        .windows(key.len())
        .position(|window| window == key)
        .and_then(|at| {
            let (length, text) =
                answer.get(at + key.len()..)?.split_first_chunk()?;
            let length = usize::try_from(u32::from_be_bytes(*length)).ok()?;
            String::from_utf8(text.get(..length)?.to_vec()).ok()
        });
    Some(version)
}

/// A NATS server speaks first: `INFO {"server_id":..,"version":"2.15.1",..}`.
fn nats(stream: &mut TcpStream) -> Option<Option<String>> {
    let greeting = String::from_utf8_lossy(&first_bytes(stream)?).into_owned();
    let info = greeting.strip_prefix("INFO ")?;
    let version = info.split_once(r#""version":""#).map(|(_, rest)| rest);
    Some(version.and_then(|rest| Some(rest.split_once('"')?.0.to_owned())))
}

fn first_bytes(stream: &mut TcpStream) -> Option<Vec<u8>> {
    let mut buffer = [0; 4096];
    let length = stream.read(&mut buffer).ok()?;
    Some(buffer[..length].to_vec())
}

#[cfg(test)]
mod tests {
    use std::{io, net::TcpListener, thread};

    use super::*;

    fn at(host: &str, port: u16) -> Option<Endpoint> {
        Some(Endpoint {
            host: host.to_owned(),
            port,
        })
    }

    #[test]
    fn host_and_port_are_found_in_each_kind_of_address() {
        assert_eq!(parse("localhost:9092", 1), at("localhost", 9092));
        assert_eq!(parse("one:1,two:2", 9), at("one", 1));
        assert_eq!(parse("amqp://u:p@host:5673/%2f", 1), at("host", 5673));
        assert_eq!(parse("amqps://host/vhost?x=y", 5671), at("host", 5671));
        assert_eq!(parse("nats://[::1]:4222", 1), at("::1", 4222));
        assert_eq!(parse("demo", 4222), at("demo", 4222));
    }

    #[test]
    fn what_is_no_address_is_refused() {
        for text in ["", "amqp://", "localhost:port", "localhost:99999", "a b"] {
            assert_eq!(parse(text, 1), None, "{text}");
        }
    }

    #[test]
    fn a_broker_is_known_by_its_greeting() -> io::Result<()> {
        let greeting = br#"INFO {"server_id":"X","version":"2.15.1"}"#;
        let endpoint = answering(greeting)?;
        let version = Some("2.15.1".to_owned());
        assert_eq!(
            listener(Broker::Nats, &endpoint),
            Listener::Broker { version }
        );
        let endpoint = answering(b"SSH-2.0-OpenSSH\r\n")?;
        assert_eq!(listener(Broker::RabbitMq, &endpoint), Listener::Other);
        Ok(())
    }

    /// A server that says one thing to one client.
    fn answering(bytes: &'static [u8]) -> io::Result<Endpoint> {
        let server = TcpListener::bind(("127.0.0.1", 0))?;
        let port = server.local_addr()?.port();
        thread::spawn(move || -> io::Result<()> {
            let (mut client, _) = server.accept()?;
            client.write_all(bytes)?;
            // Held open until the client leaves.
            client.read_to_end(&mut Vec::new()).map(drop)
        });
        Ok(Endpoint {
            host: "127.0.0.1".to_owned(),
            port,
        })
    }
}
