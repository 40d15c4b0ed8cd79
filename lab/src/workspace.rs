//! The workspace on disk: its root, and the examples that are found by looking.

use std::{
    env, fs,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use anyhow::{Context as _, Result, bail};

use crate::{
    broker::Broker,
    header::{self, Header},
};

/// The packages whose `src/bin` holds examples.
const PACKAGES: [&str; 4] = [
    "kafka-examples",
    "nats-examples",
    "patterns",
    "rabbitmq-examples",
];

/// The root folder of the workspace: the nearest one above the current folder
/// that has a `lab` package, else the one that this program was built in.
pub fn root() -> &'static Path {
    static ROOT: OnceLock<PathBuf> = OnceLock::new();
    ROOT.get_or_init(|| {
        let built_in = Path::new(env!("CARGO_MANIFEST_DIR"));
        let here = env::current_dir().unwrap_or_default();
        here.ancestors()
            .find(|folder| folder.join("lab/Cargo.toml").is_file())
            .or(built_in.parent())
            .unwrap_or(built_in)
            .to_owned()
    })
}

/// The folder for what is fetched or built once: `LAB_CACHE`, by default
/// `target/lab`.
pub fn cache() -> PathBuf {
    env::var_os("LAB_CACHE")
        .map_or_else(|| root().join("target/lab"), |folder| root().join(folder))
}

/// A path below the root, as links and messages show it: relative to the root,
/// with `/` on each system.
pub fn shown(root: &Path, path: &Path) -> String {
    let path = path.strip_prefix(root).unwrap_or(path);
    path.to_string_lossy().replace('\\', "/")
}

/// The source file of an example, not yet read.
#[derive(Clone, Debug)]
pub struct Source {
    /// The name of the file and of the program, unique in the workspace.
    pub name: String,
    pub package: String,
    pub path: PathBuf,
    pub broker: Broker,
}

/// An example with its header.
#[derive(Clone, Debug)]
pub struct Example {
    /// The name of the file and of the program, unique in the workspace.
    pub name: String,
    pub package: String,
    pub path: PathBuf,
    pub broker: Broker,
    pub header: Header,
}

/// The examples of this workspace, sorted by name.
///
/// # Errors
///
/// Names the first file that has no complete header, and what it lacks.
pub fn examples() -> Result<Vec<Example>> {
    examples_in(root())
}

/// The examples of the workspace in this folder, sorted by name.
///
/// # Errors
///
/// See [`examples`].
pub fn examples_in(root: &Path) -> Result<Vec<Example>> {
    sources_in(root)?
        .into_iter()
        .map(|source| {
            let text = read(&source.path)?;
            let header = header::parse(&text).with_context(|| {
                format!("{} has no complete header", shown(root, &source.path))
            })?;
            Ok(Example {
                name: source.name,
                package: source.package,
                path: source.path,
                broker: source.broker,
                header,
            })
        })
        .collect()
}

/// The source files of the examples in this folder, sorted by name.
///
/// # Errors
///
/// Two examples with one name, or a name that tells no broker.
pub fn sources_in(root: &Path) -> Result<Vec<Source>> {
    let mut sources = Vec::new();
    for package in PACKAGES {
        for path in files(&root.join(package).join("src/bin"), "rs")? {
            sources.push(source(root, package, path)?);
        }
    }
    sources.sort_by(|a: &Source, b| a.name.cmp(&b.name));
    let twice = sources.windows(2).find(|pair| pair[0].name == pair[1].name);
    if let Some([a, b]) = twice {
        bail!(
            "{} and {} would both become the program {}; rename one",
            shown(root, &a.path),
            shown(root, &b.path),
            a.name
        );
    }
    Ok(sources)
}

fn source(root: &Path, package: &str, path: PathBuf) -> Result<Source> {
    let name = path
        .file_stem()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let broker = Broker::of_example(&name).with_context(|| {
        format!(
            "{} has no broker in its name; begin it with kafka_, rabbitmq_ or \
             nats_, or end it so in patterns",
            shown(root, &path)
        )
    })?;
    Ok(Source {
        name,
        package: package.to_owned(),
        path,
        broker,
    })
}

/// The files with this extension directly in a folder, sorted; none if there is
/// no such folder.
pub fn files(folder: &Path, extension: &str) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    if folder.is_dir() {
        let entries = fs::read_dir(folder)
            .with_context(|| format!("cannot list {}", folder.display()))?;
        for entry in entries {
            let path = entry?.path();
            if path.extension().is_some_and(|ext| ext == extension) {
                files.push(path);
            }
        }
    }
    files.sort();
    Ok(files)
}

/// A text file, or an error that names it.
pub fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path)
        .with_context(|| format!("cannot read {}", path.display()))
}

/// Writes a text file, and its folder, if it is not the same already; tells
/// whether it did.
pub fn write(path: &Path, text: &str) -> Result<bool> {
    if fs::read_to_string(path).is_ok_and(|old| old == text) {
        return Ok(false);
    }
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)
            .with_context(|| format!("cannot make {}", folder.display()))?;
    }
    fs::write(path, text)
        .with_context(|| format!("cannot write {}", path.display()))?;
    Ok(true)
}

/// The names that somebody who typed `word` may have meant, the nearest first.
pub fn near_matches<'a>(
    word: &str,
    names: impl IntoIterator<Item = &'a str>,
) -> Vec<&'a str> {
    let word = word.to_lowercase();
    let likeness = |name: &str| {
        // One word of the name is enough: `worker` finds `task_queue_worker`.
        name.split('_')
            .chain([name])
            .map(|part| strsim::normalized_damerau_levenshtein(&word, part))
            .fold(0.0, f64::max)
    };
    let mut names: Vec<_> = names
        .into_iter()
        .map(|name| (likeness(name), name))
        .filter(|(likeness, _)| *likeness > 0.5)
        .collect();
    names.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(b.1)));
    names.into_iter().map(|(_, name)| name).take(5).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn touch(root: &Path, file: &str) {
        let path = root.join(file);
        fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
        fs::write(path, "").expect("a file");
    }

    #[test]
    fn examples_are_found_by_their_files() {
        let root = tempfile::tempdir().expect("a folder");
        touch(root.path(), "patterns/src/bin/task_queue_nats.rs");
        touch(root.path(), "kafka-examples/src/bin/kafka_producer.rs");
        touch(root.path(), "kafka-examples/src/bin/notes.md");
        touch(root.path(), "kafka-examples/src/lib.rs");
        let found = sources_in(root.path()).expect("examples");
        let found: Vec<_> =
            found.iter().map(|s| (s.name.as_str(), s.broker)).collect();
        assert_eq!(
            found,
            [
                ("kafka_producer", Broker::Kafka),
                ("task_queue_nats", Broker::Nats)
            ]
        );
    }

    #[test]
    fn names_must_be_unique_and_tell_the_broker() {
        let root = tempfile::tempdir().expect("a folder");
        touch(root.path(), "patterns/src/bin/task_queue_nats.rs");
        touch(root.path(), "nats-examples/src/bin/task_queue_nats.rs");
        let error = sources_in(root.path()).expect_err("twice");
        assert!(error.to_string().contains("rename one"), "{error}");

        let root = tempfile::tempdir().expect("a folder");
        touch(root.path(), "patterns/src/bin/task_queue.rs");
        let error = sources_in(root.path()).expect_err("no broker");
        assert!(
            error.to_string().contains("no broker in its name"),
            "{error}"
        );
    }

    #[test]
    fn a_slip_of_the_finger_finds_the_name() {
        let names = ["kafka_consumer", "kafka_producer", "nats_pubsub"];
        assert_eq!(near_matches("kafka-producer", names)[0], "kafka_producer");
        assert_eq!(near_matches("pub_sub", names), ["nats_pubsub"]);
        assert!(near_matches("zookeeper", names).is_empty());
    }
}
