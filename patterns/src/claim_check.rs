//! Claim check: what a claim says, what can be wrong with it, and a folder of documents.

use std::{
    fmt::{self, Write as _},
    fs::{self, File},
    io::{self, Read as _, Write as _},
    path::{Path, PathBuf},
    process,
    time::{Duration, SystemTime},
};

use ring::digest::{SHA256, digest};
use serde::{Deserialize, Serialize};

/// More than this nobody reads into memory because a message says so.
pub const MAX_LENGTH: u64 = 64_000_000;

/// The SHA-256 of a document, in 64 hexadecimal digits and nothing else: it can name a
/// file, and no file outside of its folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(String);

impl Digest {
    /// The digest of these bytes.
    #[must_use]
    pub fn of(document: &[u8]) -> Self {
        let mut hex = String::with_capacity(64);
        for byte in digest(&SHA256, document).as_ref() {
            // Writing into a String cannot fail.
            let _ = write!(hex, "{byte:02x}");
        }
        Self(hex)
    }

    /// Its digits.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

// ANCHOR: digest
impl TryFrom<String> for Digest {
    type Error = &'static str;

    /// What comes in a message is a digest or nothing: `../../etc/passwd` is no name of
    /// a document.
    fn try_from(text: String) -> Result<Self, Self::Error> {
        let digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        if text.len() == 64 && text.bytes().all(digit) {
            Ok(Self(text))
        } else {
            Err("not a SHA-256 in lower case")
        }
    }
}
// ANCHOR_END: digest

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.0
    }
}

/// What the message holds in place of the document.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    pub invoice: String,
    /// The name of the document in the store as well.
    pub sha256: Digest,
    pub length: u64,
}

/// Why a claim gives no document. It does not go away by waiting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    NotAClaim,
    TooLong(u64),
    Missing,
    Length { found: u64, claimed: u64 },
    Digest,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAClaim => write!(f, "not a claim"),
            Self::TooLong(length) => write!(f, "claims {length} bytes, too many"),
            Self::Missing => write!(f, "no such document"),
            // Who reads one byte too many knows no more than that.
            Self::Length { found, claimed } if found > claimed => {
                write!(f, "more than {claimed} bytes")
            }
            Self::Length { found, claimed } => {
                write!(f, "{found} bytes instead of {claimed}")
            }
            Self::Digest => write!(f, "another digest"),
        }
    }
}

impl Claim {
    /// The claim for a document.
    #[must_use]
    pub fn new(invoice: String, document: &[u8]) -> Self {
        Self {
            invoice,
            sha256: Digest::of(document),
            length: length(document),
        }
    }

    /// What a message claims.
    ///
    /// # Errors
    ///
    /// If it is no claim, or one for more than anybody reads.
    pub fn read(payload: &[u8]) -> Result<Self, Fault> {
        let claim: Self =
            serde_json::from_slice(payload).map_err(|_error| Fault::NotAClaim)?;
        if claim.length > MAX_LENGTH {
            return Err(Fault::TooLong(claim.length));
        }
        Ok(claim)
    }

    // ANCHOR: check
    /// Whether the document is the one that was meant, whoever had it meanwhile.
    ///
    /// # Errors
    ///
    /// If it is another one.
    pub fn check(&self, document: &[u8]) -> Result<(), Fault> {
        let (found, claimed) = (length(document), self.length);
        if found != claimed {
            Err(Fault::Length { found, claimed })
        } else if Digest::of(document) != self.sha256 {
            Err(Fault::Digest)
        } else {
            Ok(())
        }
    }
    // ANCHOR_END: check
}

fn length(document: &[u8]) -> u64 {
    u64::try_from(document.len()).unwrap_or(u64::MAX)
}

/// The name of an invoice.
#[must_use]
pub fn invoice(number: u64) -> String {
    format!("invoice-{number}")
}

/// Stands in for an invoice as a PDF, with a picture on each page: ten megabytes, each
/// invoice others.
#[must_use]
pub fn document(number: u64) -> Vec<u8> {
    const LENGTH: usize = 10_000_000;
    let line = format!("% {} of the shop\n", invoice(number));
    let mut document = b"%PDF-1.7\n".to_vec();
    document.reserve(LENGTH + line.len());
    while document.len() < LENGTH {
        document.extend_from_slice(line.as_bytes());
    }
    document.truncate(LENGTH);
    document
}

/// A folder of documents, in the place of an object store such as S3. A document is
/// named after its digest, so nothing is ever changed: it is there, whole, or it is not.
pub struct Folder {
    path: PathBuf,
}

impl Folder {
    /// Opens the folder, and makes it where there is none.
    ///
    /// # Errors
    ///
    /// If it cannot be made.
    pub fn open(path: &Path) -> io::Result<Self> {
        fs::create_dir_all(path)?;
        Ok(Self {
            path: path.to_owned(),
        })
    }

    fn place(&self, digest: &Digest) -> PathBuf {
        self.path.join(digest.as_str())
    }

    // ANCHOR: put
    /// Returns when the document is on the disk, under its name. One that is there is
    /// written once more, whole or not at all, and counts as new from now on.
    ///
    /// # Errors
    ///
    /// If it cannot be written. Then nobody may be told of it.
    pub fn put(&self, digest: &Digest, document: &[u8]) -> io::Result<()> {
        // A name that nobody reads, until all bytes are there: a program that dies here
        // leaves a part of a file, and not a part of a document.
        let name = format!("{}.{}.part", digest.as_str(), process::id());
        let part = self.path.join(name);
        let mut file = File::create(&part)?;
        file.write_all(document)?;
        file.sync_all()?;
        fs::rename(&part, self.place(digest))?;
        // The new name is on the disk when the folder is. Windows has no such call.
        if cfg!(unix) {
            File::open(&self.path)?.sync_all()?;
        }
        Ok(())
    }
    // ANCHOR_END: put

    // ANCHOR: get
    /// The document that is claimed, checked.
    ///
    /// # Errors
    ///
    /// The outer one if the folder cannot be read now, which may pass; the inner one if
    /// there is no such document, which will not.
    pub fn get(&self, claim: &Claim) -> io::Result<Result<Vec<u8>, Fault>> {
        let file = match File::open(self.place(&claim.sha256)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(Err(Fault::Missing));
            }
            Err(error) => return Err(error),
        };
        let mut document = Vec::new();
        // One more than claimed, to see whether there is more.
        file.take(claim.length + 1).read_to_end(&mut document)?;
        Ok(claim.check(&document).map(|()| document))
    }
    // ANCHOR_END: get

    // ANCHOR: sweep
    /// Deletes the documents that have been here for longer than this, and says how many
    /// there were. No message may live as long: then nobody can come with a claim.
    ///
    /// # Errors
    ///
    /// If the folder cannot be read, or one not be deleted.
    pub fn sweep(&self, age: Duration) -> io::Result<usize> {
        let now = SystemTime::now();
        let mut swept = 0;
        for entry in fs::read_dir(&self.path)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            // What is not ours stays; a part was left by a program that died.
            let part = name.strip_suffix(".part").is_some();
            if !part && Digest::try_from(name).is_err() {
                continue;
            }
            let written = entry.metadata()?.modified()?;
            if now.duration_since(written).unwrap_or_default() >= age {
                fs::remove_file(entry.path())?;
                swept += 1;
            }
        }
        Ok(swept)
    }
    // ANCHOR_END: sweep
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder() -> (tempfile::TempDir, Folder) {
        let place = tempfile::tempdir().expect("a folder");
        let folder =
            Folder::open(&place.path().join("documents")).expect("a folder");
        (place, folder)
    }

    fn claim(document: &[u8]) -> Claim {
        Claim::new(invoice(1), document)
    }

    #[test]
    fn a_claim_is_short_and_says_the_digest_that_all_others_say() {
        let claim = claim(b"abc");
        // From FIPS 180-2.
        let digest =
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        let json =
            format!(r#"{{"invoice":"invoice-1","sha256":"{digest}","length":3}}"#);
        assert_eq!(serde_json::to_string(&claim).expect("JSON"), json);
        assert_eq!(Claim::read(json.as_bytes()), Ok(claim));
        assert_eq!(document(1).len(), 10_000_000);
        assert_ne!(Digest::of(&document(1)), Digest::of(&document(2)));
    }

    #[test]
    fn a_path_is_no_digest() {
        let upper = "A".repeat(64);
        let padded = format!("../{}", "a".repeat(61));
        for name in ["", "../../etc/passwd", "/etc/passwd", &upper, &padded] {
            let json =
                serde_json::json!({ "invoice": "x", "sha256": name, "length": 1 });
            let payload = json.to_string().into_bytes();
            assert_eq!(Claim::read(&payload), Err(Fault::NotAClaim), "{name}");
        }
        assert_eq!(Claim::read(b"\xff"), Err(Fault::NotAClaim));
        let mut long = claim(b"abc");
        long.length = u64::MAX;
        let payload = serde_json::to_vec(&long).expect("JSON");
        assert_eq!(Claim::read(&payload), Err(Fault::TooLong(u64::MAX)));
    }

    #[test]
    fn what_is_put_is_what_is_got_and_nothing_else_is() {
        let (_place, folder) = folder();
        let claim = claim(b"one hundred mugs");
        assert_eq!(folder.get(&claim).expect("a look"), Err(Fault::Missing));
        for _time in 0..2 {
            let put = folder.put(&claim.sha256, b"one hundred mugs");
            put.expect("a write");
        }
        let got = folder.get(&claim).expect("a look").expect("a document");
        assert_eq!(got, b"one hundred mugs");
        assert_eq!(fs::read_dir(&folder.path).expect("a list").count(), 1);

        let place = folder.place(&claim.sha256);
        for (content, fault) in [
            (&b"one hundred cups"[..], "another digest"),
            (&b"one hundred"[..], "11 bytes instead of 16"),
            (&b"one hundred mugs, white"[..], "more than 16 bytes"),
        ] {
            fs::write(&place, content).expect("a write");
            let got = folder.get(&claim).expect("a look").expect_err(fault);
            assert_eq!(got.to_string(), fault);
        }
    }

    #[test]
    fn a_sweep_takes_what_is_old_and_ours() {
        let (_place, folder) = folder();
        let put = folder.put(&Digest::of(b"abc"), b"abc");
        put.expect("a write");
        for name in ["0123.99.part", "README"] {
            fs::write(folder.path.join(name), "x").expect("a write");
        }
        assert_eq!(folder.sweep(Duration::from_secs(3600)).expect("a sweep"), 0);
        assert_eq!(folder.sweep(Duration::ZERO).expect("a sweep"), 2);
        let left: Vec<_> = fs::read_dir(&folder.path)
            .expect("a list")
            .map(|entry| entry.expect("an entry").file_name())
            .collect();
        assert_eq!(left, ["README"]);
    }
}
