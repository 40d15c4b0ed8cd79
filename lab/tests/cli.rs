//! What somebody gets from `cargo lab` who mistypes, or has no Docker, or whose
//! port is taken: one line that helps, and an exit status that tells.
#![cfg(unix)]

use std::{
    net::TcpListener,
    process::{Command, Output},
};

use anyhow::{Result, ensure};

/// An address at which no Docker engine answers.
const NO_ENGINE: (&str, &str) = ("DOCKER_HOST", "unix:///nonexistent.sock");

/// `cargo lab` in an environment that names no broker of the person who runs
/// the tests.
fn lab(args: &[&str]) -> Command {
    let mut lab = Command::new(env!("CARGO_BIN_EXE_lab"));
    lab.args(args);
    for variable in ["KAFKA_BROKERS", "AMQP_URL", "NATS_URL"] {
        lab.env_remove(variable);
    }
    lab
}

fn fails(mut command: Command, status: i32, parts: &[&str]) -> Result<Output> {
    let output = command.output()?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.code() == Some(status),
        "{}, not {status}: {stderr}",
        output.status
    );
    for part in parts {
        ensure!(stderr.contains(part), "{part:?} is not in: {stderr}");
    }
    Ok(output)
}

#[test]
fn an_unknown_example_gets_near_matches() -> Result<()> {
    let parts = ["no example is named kafka_prodcer", "kafka_producer"];
    fails(lab(&["run", "kafka_prodcer"]), 2, &parts)?;
    let parts = ["no example is named zzz", "cargo lab list"];
    fails(lab(&["run", "zzz"]), 2, &parts)?;
    Ok(())
}

#[test]
fn an_unknown_broker_gets_a_near_match() -> Result<()> {
    fails(lab(&["up", "kafak"]), 2, &["kafak", "'kafka'"])?;
    Ok(())
}

#[test]
fn a_port_that_is_taken_is_named_with_the_setting_that_moves_it() -> Result<()> {
    let taken = TcpListener::bind("127.0.0.1:0")?;
    let port = taken.local_addr()?.port().to_string();
    let mut up = lab(&["up", "--native", "--yes", "nats"]);
    up.env("NATS_PORT", &port);
    let said = format!("port {port} is taken");
    fails(up, 1, &[&said, "set NATS_PORT to a free one"])?;
    Ok(())
}

#[test]
fn a_port_that_is_no_number_is_named() -> Result<()> {
    let mut up = lab(&["up", "--native", "--yes", "nats"]);
    up.env("NATS_PORT", "many");
    fails(up, 1, &["NATS_PORT=many is no port number", "4222"])?;
    Ok(())
}

#[test]
fn without_an_engine_docker_is_one_line_with_the_way_out() -> Result<()> {
    let mut up = lab(&["up", "--docker", "nats"]);
    up.env(NO_ENGINE.0, NO_ENGINE.1);
    let output = fails(up, 1, &["error: "])?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    let errors = stderr.lines().filter(|line| line.starts_with("error: "));
    ensure!(errors.count() == 1, "not one line: {stderr}");
    ensure!(stderr.contains("DOCKER_HOST"), "no way out: {stderr}");
    Ok(())
}

#[test]
fn a_broken_address_in_the_environment_is_named_without_its_password() -> Result<()>
{
    let mut status = lab(&["status"]);
    status.env("AMQP_URL", "amqp://guest:secret@:x/");
    let output = fails(status, 1, &["AMQP_URL", "amqp://guest:guest@localhost"])?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(!stderr.contains("secret"), "shows the password: {stderr}");
    Ok(())
}

#[test]
fn the_reader_of_a_list_may_go_away() -> Result<()> {
    let lab = env!("CARGO_BIN_EXE_lab");
    let output = Command::new("sh")
        .args(["-c", &format!("{lab} list | head -n 1")])
        .output()?;
    ensure!(output.status.success(), "{}", output.status);
    ensure!(output.stderr.is_empty(), "said something on stderr");
    Ok(())
}
