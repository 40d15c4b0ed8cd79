//! Broker images: the official ones where they can be had, else ones that are
//! built from packages (see `images/README.md`).

use std::{
    env,
    process::Command,
    sync::{OnceLock, mpsc::RecvTimeoutError},
    time::Duration,
};

use anyhow::{Context as _, Error, Result, bail};

use crate::{
    broker::Broker, job::Job, packages, progress, services, shell, trouble,
    workspace,
};

/// A registry that can be reached answers within this time; where a firewall
/// swallows the question, Docker itself would wait for minutes.
const FIRST_ANSWER: Duration = Duration::from_secs(20);

/// The images to use, as (variable, name), for `docker-compose.yml`: the one in
/// the environment; else the official one, if it is here; else one that was
/// built here; else the official one, pulled; else one that is built now.
///
/// # Errors
///
/// If an image can neither be pulled nor built. Without `yes`, nothing is
/// installed for a build, and the error names the command that does.
pub fn ensure(brokers: &[Broker], yes: bool) -> Result<Vec<(&'static str, String)>> {
    let mut missing = Vec::new();
    for broker in brokers {
        if available(*broker).is_none() && pull(services::image(*broker)).is_err() {
            missing.push(*broker);
        }
    }
    if !missing.is_empty() {
        build(&missing, yes).map_err(trouble::explained)?;
    }
    let image = |broker: &Broker| {
        let image = available(*broker)
            .with_context(|| format!("the image of {broker} has disappeared"))?;
        Ok((broker.image_var(), image))
    };
    brokers.iter().map(image).collect()
}

/// The image that can be used without any download or build.
pub fn available(broker: Broker) -> Option<String> {
    let chosen = env::var(broker.image_var()).ok();
    chosen
        .filter(|image| !image.is_empty())
        .or_else(|| official(broker))
        .or_else(|| built(broker))
}

fn official(broker: Broker) -> Option<String> {
    let image = services::image(broker);
    let mut inspect = Command::new("docker");
    inspect.args(["image", "inspect", "--format", "{{.Id}}", image]);
    shell::output(&mut inspect).ok()?;
    Some(image.to_owned())
}

/// The newest image that `images/build.sh` has made.
fn built(broker: Broker) -> Option<String> {
    let mut list = Command::new("docker");
    list.args(["images", "--format", "{{.Repository}}:{{.Tag}}"])
        .arg(format!("mq-local/{}", broker.name()));
    let names = shell::output(&mut list).ok()?;
    names.lines().next().map(str::to_owned)
}

/// Pulls an image, unless an earlier pull has shown that no registry answers.
fn pull(image: &str) -> Result<()> {
    static CLOSED: OnceLock<()> = OnceLock::new();
    if CLOSED.get().is_some() {
        bail!("no image registry can be reached");
    }
    let step = progress::step(format!("pulling {image}"));
    let result = try_pull(image, &step);
    match &result {
        Ok(()) => step.done(format!("pulled {image}")),
        Err(error) => {
            CLOSED.get_or_init(|| ());
            step.failed(format!("{image} cannot be pulled: {}", reason(error)));
        }
    }
    result
}

/// Docker's line is long; what matters stands after its last colon.
fn reason(error: &Error) -> String {
    let text = format!("{error:#}");
    let line = text.lines().next_back().unwrap_or_default();
    line.rsplit(": ")
        .next()
        .unwrap_or_default()
        .trim()
        .to_owned()
}

fn try_pull(image: &str, step: &progress::Step) -> Result<()> {
    let mut job = Job::start(Command::new("docker").args(["pull", image]))?;
    match job.line(FIRST_ANSWER) {
        Ok(line) => step.say(line),
        Err(RecvTimeoutError::Disconnected) => {}
        Err(RecvTimeoutError::Timeout) => {
            job.stop();
            bail!("no answer for {} s", FIRST_ANSWER.as_secs());
        }
    }
    job.finish(step)
}

/// Builds images with `images/build.sh`.
fn build(brokers: &[Broker], yes: bool) -> Result<()> {
    let names: Vec<&str> = brokers.iter().map(|broker| broker.name()).collect();
    let list = names.join(", ");
    install_tools(&list, yes)?;
    let mut command = if packages::is_root() {
        Command::new("images/build.sh")
    } else {
        let mut command = Command::new("sudo");
        command.args(["--preserve-env", "images/build.sh"]);
        command
    };
    command.args(&names).current_dir(workspace::root());
    let step = progress::step(format!("building images for {list}"));
    Job::start(&mut command)?.finish(&step)?;
    step.done(format!("built images for {list}"));
    Ok(())
}

/// What `images/build.sh` needs.
pub fn missing_tools() -> Vec<&'static str> {
    let pip = || {
        let mut pip = Command::new("python3");
        pip.args(["-m", "pip", "--version"]);
        shell::output(&mut pip).is_ok()
    };
    let mut missing = Vec::new();
    if shell::which("mmdebstrap").is_none() {
        missing.push("mmdebstrap");
    }
    if !pip() {
        missing.push("python3-pip");
    }
    let (program, package) = match env::var_os("MAVEN_REPO_URL") {
        Some(_) => ("curl", "curl"),
        None => ("mvn", "maven"),
    };
    if shell::which(program).is_none() {
        missing.push(package);
    }
    missing
}

fn install_tools(images: &str, yes: bool) -> Result<()> {
    let missing = missing_tools();
    if missing.is_empty() {
        return Ok(());
    }
    let Some(command) = packages::install_command(&missing) else {
        bail!(
            "the images of {images} cannot be pulled, and building them needs \
             Debian or Ubuntu; connect this machine to an image registry, or set \
             {} and its like to images that you have",
            Broker::Kafka.image_var()
        );
    };
    if !yes {
        bail!(
            "the images of {images} cannot be pulled, and building them needs more \
             tools: run `{command}`, or this again with --yes"
        );
    }
    packages::install(&missing)
}
