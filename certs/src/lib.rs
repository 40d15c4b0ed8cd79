//! Certificates for the examples and tests that speak TLS, made at run time: a
//! key in a repository is a key that everybody has.
//!
//! One certificate authority, a server and a client that it vouches for, and
//! one of each that must be refused, each for one reason only.

use std::{
    fs::{self, OpenOptions},
    io::Write as _,
    net::{IpAddr, Ipv4Addr},
    path::Path,
};

use anyhow::{Context as _, Result};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose, SanType,
};
use time::{Duration, OffsetDateTime};

/// The common name of the client.
pub const CLIENT: &str = "app";

/// The e-mail address of the client, by which a server may know it as a user.
pub const CLIENT_EMAIL: &str = "app@shop.example";

/// The only host for which the server with the wrong name is valid.
pub const WRONG_HOST: &str = "elsewhere.example";

/// A certificate and its private key, as PEM.
pub struct Pair {
    pub certificate: String,
    /// PKCS #8.
    pub key: String,
}

/// A set of certificates that belong together.
pub struct Certificates {
    /// Whom clients and servers trust.
    pub ca: String,
    /// For `localhost` and `127.0.0.1`.
    pub server: Pair,
    /// For [`CLIENT`], with [`CLIENT_EMAIL`].
    pub client: Pair,
    /// An authority whom nobody should trust.
    pub foreign_ca: String,
    /// As [`Self::client`], but by the foreign authority.
    pub foreign_client: Pair,
    /// As [`Self::server`], but its time is over.
    pub expired_server: Pair,
    /// As [`Self::server`], but for [`WRONG_HOST`].
    pub wrong_host_server: Pair,
}

impl Certificates {
    /// Makes a new set with new keys, valid for a month.
    ///
    /// # Errors
    ///
    /// If the system has no random numbers.
    pub fn make() -> Result<Self> {
        let ca = authority("shop CA")?;
        let foreign = authority("somebody else's CA")?;
        let now = OffsetDateTime::now_utc();
        let here = vec![
            SanType::DnsName("localhost".try_into()?),
            SanType::IpAddress(IpAddr::V4(Ipv4Addr::LOCALHOST)),
        ];
        let elsewhere = vec![SanType::DnsName(WRONG_HOST.try_into()?)];
        let mail = vec![SanType::Rfc822Name(CLIENT_EMAIL.try_into()?)];
        let server = |names, end| {
            leaf(
                &ca,
                "server",
                names,
                ExtendedKeyUsagePurpose::ServerAuth,
                end,
            )
        };
        let client = |ca, names| {
            let usage = ExtendedKeyUsagePurpose::ClientAuth;
            leaf(ca, CLIENT, names, usage, now + MONTH)
        };
        Ok(Self {
            server: server(here.clone(), now + MONTH)?,
            client: client(&ca, mail.clone())?,
            foreign_client: client(&foreign, mail)?,
            expired_server: server(here, now - Duration::days(1))?,
            wrong_host_server: server(elsewhere, now + MONTH)?,
            ca: ca.pem(),
            foreign_ca: foreign.pem(),
        })
    }

    /// The files in which [`Self::write`] writes them: names and contents.
    pub fn files(&self) -> [(&'static str, &str); 12] {
        [
            ("ca.pem", &self.ca),
            ("server.pem", &self.server.certificate),
            ("server.key", &self.server.key),
            ("client.pem", &self.client.certificate),
            ("client.key", &self.client.key),
            ("foreign-ca.pem", &self.foreign_ca),
            ("foreign-client.pem", &self.foreign_client.certificate),
            ("foreign-client.key", &self.foreign_client.key),
            ("expired-server.pem", &self.expired_server.certificate),
            ("expired-server.key", &self.expired_server.key),
            ("wrong-host-server.pem", &self.wrong_host_server.certificate),
            ("wrong-host-server.key", &self.wrong_host_server.key),
        ]
    }

    /// Writes all files into a folder, which is made if it is not there. Only
    /// their owner may read the keys.
    ///
    /// # Errors
    ///
    /// If a file cannot be written.
    pub fn write(&self, folder: &Path) -> Result<()> {
        fs::create_dir_all(folder)
            .with_context(|| format!("cannot make {}", folder.display()))?;
        for (name, text) in self.files() {
            let path = folder.join(name);
            write_file(&path, text)
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(())
    }
}

const MONTH: Duration = Duration::days(30);

fn authority(name: &str) -> Result<CertifiedIssuer<'static, KeyPair>> {
    let mut params = params(name, OffsetDateTime::now_utc() + MONTH);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(CertifiedIssuer::self_signed(params, KeyPair::generate()?)?)
}

fn leaf(
    issuer: &CertifiedIssuer<'static, KeyPair>,
    name: &str,
    alternative_names: Vec<SanType>,
    usage: ExtendedKeyUsagePurpose,
    end: OffsetDateTime,
) -> Result<Pair> {
    let mut params = params(name, end);
    params.subject_alt_names = alternative_names;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![usage];
    // Some TLS libraries look for the issuer by this and not by name.
    params.use_authority_key_identifier_extension = true;
    let key = KeyPair::generate()?;
    Ok(Pair {
        certificate: params.signed_by(&key, issuer)?.pem(),
        key: key.serialize_pem(),
    })
}

fn params(name: &str, end: OffsetDateTime) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    // From the past: the clocks of two machines differ.
    params.not_before = end - MONTH - Duration::days(1);
    params.not_after = end;
    params
}

fn write_file(path: &Path, text: &str) -> Result<()> {
    // Anew and not over an old one, whose permissions would stay as they are.
    if path.exists() {
        fs::remove_file(path)?;
    }
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    if path.extension().is_some_and(|extension| extension == "key") {
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    }
    options.open(path)?.write_all(text.as_bytes())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rustls_pki_types::{
        CertificateDer, ServerName, UnixTime, pem::PemObject as _,
    };
    use webpki::{EndEntityCert, Error, KeyUsage, anchor_from_trusted_cert, ring};

    use super::*;

    /// Is this a certificate that somebody who trusts `ca` accepts now?
    fn verified(ca: &str, pair: &Pair, usage: KeyUsage) -> Result<(), Error> {
        verified_at(UnixTime::now(), ca, pair, usage)
    }

    fn verified_at(
        time: UnixTime,
        ca: &str,
        pair: &Pair,
        usage: KeyUsage,
    ) -> Result<(), Error> {
        let der = |pem: &str| {
            CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|_| Error::BadDer)
        };
        let (ca, certificate) = (der(ca)?, der(&pair.certificate)?);
        EndEntityCert::try_from(&certificate)?
            .verify_for_usage(
                &[ring::ECDSA_P256_SHA256],
                &[anchor_from_trusted_cert(&ca)?],
                &[],
                time,
                usage,
                None,
                None,
            )
            .map(drop)
    }

    fn is_for(pair: &Pair, host: &str) -> Result<bool> {
        let der = CertificateDer::from_pem_slice(pair.certificate.as_bytes())?;
        let name = ServerName::try_from(host)?;
        let certificate = EndEntityCert::try_from(&der)?;
        Ok(certificate.verify_is_valid_for_subject_name(&name).is_ok())
    }

    #[test]
    fn server_and_client_are_accepted_in_their_parts_only() -> Result<()> {
        let made = Certificates::make()?;
        let (server, client) = (KeyUsage::server_auth(), KeyUsage::client_auth());
        verified(&made.ca, &made.server, server)?;
        verified(&made.ca, &made.client, client)?;
        assert!(verified(&made.ca, &made.server, client).is_err());
        assert!(verified(&made.ca, &made.client, server).is_err());
        assert!(is_for(&made.server, "localhost")?);
        assert!(is_for(&made.server, "127.0.0.1")?);
        Ok(())
    }

    /// Only the one thing that its name says is wrong with each.
    #[test]
    fn each_refused_one_is_refused_for_its_reason() -> Result<()> {
        let made = Certificates::make()?;
        let (server, client) = (KeyUsage::server_auth(), KeyUsage::client_auth());

        let error = verified(&made.ca, &made.foreign_client, client);
        assert_eq!(error, Err(Error::UnknownIssuer));
        verified(&made.foreign_ca, &made.foreign_client, client)?;

        let error = verified(&made.ca, &made.expired_server, server);
        assert!(matches!(error, Err(Error::CertExpired { .. })), "{error:?}");
        let now = UnixTime::now().as_secs();
        let earlier =
            UnixTime::since_unix_epoch(Duration::from_secs(now - 2 * 86_400));
        verified_at(earlier, &made.ca, &made.expired_server, server)?;
        assert!(is_for(&made.expired_server, "localhost")?);

        verified(&made.ca, &made.wrong_host_server, server)?;
        assert!(!is_for(&made.wrong_host_server, "localhost")?);
        assert!(is_for(&made.wrong_host_server, WRONG_HOST)?);
        Ok(())
    }

    #[test]
    fn two_sets_do_not_know_each_other() -> Result<()> {
        let (one, other) = (Certificates::make()?, Certificates::make()?);
        let error = verified(&one.ca, &other.server, KeyUsage::server_auth());
        assert!(error.is_err());
        Ok(())
    }

    #[cfg(unix)]
    #[test]
    fn only_the_owner_may_read_a_key() -> Result<()> {
        use std::os::unix::fs::PermissionsExt as _;

        let folder = tempfile::tempdir()?;
        let made = Certificates::make()?;
        // An old file that all may read does not keep its permissions.
        fs::write(folder.path().join("server.key"), "old")?;
        made.write(folder.path())?;
        for (name, text) in made.files() {
            let path = folder.path().join(name);
            assert_eq!(fs::read_to_string(&path)?, text, "{name}");
            let mode = path.metadata()?.permissions().mode() & 0o077;
            assert!(mode == 0 || !name.ends_with(".key"), "{name}: {mode:o}");
        }
        Ok(())
    }
}
