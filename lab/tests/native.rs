//! Brokers as plain processes: they come back with their data, and nothing of
//! them outlives the program that started them.
#![cfg(unix)]

use std::{
    env,
    fs::{self, OpenOptions},
    io::{BufRead as _, BufReader, Write as _},
    net::{Ipv4Addr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use lab::{
    broker::Broker,
    native::{self, Options, Server},
    private,
};

/// Longer than anything here takes; ends a test that waits in vain.
const LIMIT: Duration = Duration::from_secs(20);

fn start_nats() -> Result<Server> {
    let options = Options {
        yes: true,
        ..Options::default()
    };
    native::start(Broker::Nats, &options)
}

#[test]
fn a_killed_broker_comes_back_with_its_data_on_the_same_port() -> Result<()> {
    let mut server = start_nats()?;
    let port = server.port();
    let stream = r#"{"name":"ORDERS","subjects":["orders.>"]}"#;
    request(port, "$JS.API.STREAM.CREATE.ORDERS", stream)?;
    let receipt = request(port, "orders.new", "order 1")?;
    ensure!(receipt.contains(r#""seq":1"#), "not stored: {receipt}");

    server.kill()?;
    assert!(!is_open(port), "something still serves port {port}");
    server.restart()?;

    assert_eq!(server.port(), port);
    let info = request(port, "$JS.API.STREAM.INFO.ORDERS", "")?;
    assert!(info.contains(r#""messages":1"#), "{info}");
    Ok(())
}

#[test]
fn a_paused_broker_answers_only_after_it_goes_on() -> Result<()> {
    let server = start_nats()?;
    let port = server.port();
    server.pause()?;
    // The kernel accepts the connection; the greeting must come from NATS.
    let connection = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    connection.set_read_timeout(Some(Duration::from_millis(300)))?;
    let mut greeting = String::new();
    let answer = BufReader::new(&connection).read_line(&mut greeting);
    assert!(answer.is_err(), "a frozen server said {greeting}");
    server.resume()?;
    connection.set_read_timeout(Some(LIMIT))?;
    BufReader::new(&connection).read_line(&mut greeting)?;
    assert!(greeting.starts_with("INFO "), "{greeting}");
    Ok(())
}

#[test]
fn a_dropped_broker_leaves_no_process_and_no_folder() -> Result<()> {
    let server = start_nats()?;
    let (port, folder) = (server.port(), folder_of(&server)?);
    drop(server);
    assert!(!is_open(port), "something still serves port {port}");
    assert!(!folder.exists(), "{} is still there", folder.display());
    Ok(())
}

#[test]
fn a_taken_port_is_named_with_the_setting_that_moves_it() -> Result<()> {
    let server = start_nats()?;
    let port = server.port();
    let options = Options {
        port: Some(port),
        ..Options::default()
    };
    let second = native::start(Broker::Nats, &options).map(|_| ());
    let error = second.map_err(|e| e.to_string()).err().unwrap_or_default();
    assert_eq!(
        error,
        format!("port {port} is taken; set NATS_PORT to a free one")
    );
    Ok(())
}

#[test]
fn a_private_server_has_its_configuration_and_ends_when_dropped() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let config = folder.path().join("nats_private.conf");
    fs::write(&config, "server_name: private\n")?;
    let server = private::start(Broker::Nats, &config, true)?;
    let [(name, url)] = server.variables.as_slice() else {
        bail!("only the address is needed: {:?}", server.variables);
    };
    assert_eq!(*name, "NATS_URL");
    let port = url.rsplit(':').next().context(url.clone())?.parse()?;
    let connection = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    let mut greeting = String::new();
    BufReader::new(&connection).read_line(&mut greeting)?;
    assert!(
        greeting.contains(r#""server_name":"private""#),
        "{greeting}"
    );
    drop(server);
    assert!(!is_open(port), "something still serves port {port}");
    Ok(())
}

#[test]
fn a_private_kafka_has_its_listeners_and_ends_when_dropped() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let settings = folder.path().join("kafka_private.properties");
    let text = "\
#   kafka-storage.sh format --add-scram 'SCRAM-SHA-512=[name=a,password=b]'
#   kafka-topics.sh --bootstrap-server localhost:1 --create --topic private
listeners=CLIENTS://:1,INSIDE://:2,CONTROLLER://:3
inter.broker.listener.name=INSIDE
listener.security.protocol.map=\
CLIENTS:PLAINTEXT,INSIDE:PLAINTEXT,CONTROLLER:PLAINTEXT
";
    fs::write(&settings, text)?;
    let server = private::start(Broker::Kafka, &settings, true)?;
    let [(name, address)] = server.variables.as_slice() else {
        bail!("only the address is needed: {:?}", server.variables);
    };
    assert_eq!(*name, "KAFKA_BROKERS");
    let port = address.rsplit(':').next().context("no port")?.parse()?;
    assert!(is_open(port), "nobody listens on port {port}");
    drop(server);
    assert!(!is_open(port), "something still serves port {port}");
    Ok(())
}

#[test]
fn nothing_outlives_a_program_that_is_killed() -> Result<()> {
    let mut program = Program::start("kill")?;
    program.child.kill()?;
    program.child.wait()?;
    program.leaves_nothing()
}

#[test]
fn nothing_outlives_a_program_that_panics() -> Result<()> {
    let mut program = Program::start("panic")?;
    program.child.wait()?;
    program.leaves_nothing()
}

#[test]
fn nothing_outlives_a_program_that_gets_ctrl_c() -> Result<()> {
    let mut program = Program::start("interrupt")?;
    let interrupt = format!("kill -s INT {}", program.child.id());
    Command::new("sh").args(["-c", &interrupt]).status()?;
    let status = program.child.wait()?;
    // The handler comes back only when all is tidied up.
    assert_eq!(status.code(), Some(130));
    assert!(!program.folder.exists());
    program.leaves_nothing()
}

/// Not a test: the program that the tests above start and end.
#[test]
#[ignore = "run by the other tests"]
fn program_with_a_broker() -> Result<()> {
    let (Ok(ending), Some(report)) = (env::var("ENDING"), env::var_os("REPORT"))
    else {
        return Ok(());
    };
    if ending == "interrupt" {
        lab::cleanup::on_interrupt()?;
    }
    let server = start_nats()?;
    let mut report = OpenOptions::new().write(true).open(report)?;
    writeln!(
        report,
        "{} {}",
        server.port(),
        folder_of(&server)?.display()
    )?;
    assert_ne!(ending, "panic", "as asked for");
    thread::sleep(LIMIT);
    Ok(())
}

/// This test program, started once more to run a broker.
struct Program {
    child: Child,
    port: u16,
    folder: PathBuf,
}

impl Program {
    fn start(ending: &str) -> Result<Self> {
        let report = tempfile::NamedTempFile::new()?;
        let child = Command::new(env::current_exe()?)
            .args(["--exact", "program_with_a_broker", "--ignored"])
            .env("ENDING", ending)
            .env("REPORT", report.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let text = eventually("a report of the program", || {
            let text = fs::read_to_string(report.path()).ok()?;
            text.ends_with('\n').then_some(text)
        })?;
        let (port, folder) = text.trim().split_once(' ').context(text.clone())?;
        Ok(Self {
            child,
            port: port.parse()?,
            folder: folder.into(),
        })
    }

    fn leaves_nothing(self) -> Result<()> {
        eventually("the port to be free", || {
            (!is_open(self.port)).then_some(())
        })?;
        eventually("the folder to go", || (!self.folder.exists()).then_some(()))
    }
}

fn folder_of(server: &Server) -> Result<PathBuf> {
    let folder = server.log().parent().context("a log without a folder")?;
    ensure!(folder.is_dir(), "{} is no folder", folder.display());
    Ok(Path::new(folder).to_owned())
}

fn is_open(port: u16) -> bool {
    TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok()
}

fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> Result<T> {
    let deadline = Instant::now() + LIMIT;
    while Instant::now() < deadline {
        if let Some(found) = look() {
            return Ok(found);
        }
        thread::sleep(Duration::from_millis(10));
    }
    bail!("waited {} s in vain for {what}", LIMIT.as_secs())
}

/// Sends a request in NATS' own protocol and returns the reply.
fn request(port: u16, subject: &str, body: &str) -> Result<String> {
    let mut connection = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    connection.set_read_timeout(Some(LIMIT))?;
    let size = body.len();
    write!(
        connection,
        "CONNECT {{\"verbose\":false}}\r\nSUB reply 1\r\n\
         PUB {subject} reply {size}\r\n{body}\r\n"
    )?;
    let mut lines = BufReader::new(connection).lines();
    while let Some(line) = lines.next() {
        if line?.starts_with("MSG reply ") {
            return Ok(lines.next().context("a reply without a body")??);
        }
    }
    bail!("no reply to {subject}")
}
