//! Certificates and keys in files, and what is wrong with them; and what a peer's certificate says.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::SystemTime,
};

use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, pem::PemObject},
};
use x509_cert::{
    Certificate,
    der::{Decode, asn1::ObjectIdentifier},
    ext::pkix::{SubjectAltName, name::GeneralName},
};

use crate::daemon::reloadable::read_small;

/// A certificate with those above it, and its key.
pub(super) type Chain = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

/// Who a peer is, as its certificate says, which was verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerCertificate {
    /// The subject (RFC 4514).
    pub subject: String,
    /// Its CN, O and OU, and the DNS names, URIs and mail addresses of the subjectAltName, by the names
    /// of these kinds.
    pub names: Vec<(&'static str, String)>,
    /// Until when it is valid.
    pub not_after: SystemTime,
}

impl PeerCertificate {
    /// `None` for one that cannot be read any further.
    pub(super) fn parse(certificate: &CertificateDer<'_>) -> Option<Self> {
        let certificate = Certificate::from_der(certificate).ok()?;
        let tbs = &certificate.tbs_certificate;
        let mut names = Vec::new();
        for attribute in tbs.subject.0.iter().flat_map(|set| set.0.iter()) {
            // RFC 5280, appendix A.1
            let kind = match attribute.oid {
                COMMON_NAME => "cn",
                ORGANIZATION => "o",
                ORGANIZATIONAL_UNIT => "ou",
                _ => continue,
            };
            if let Ok(value) = std::str::from_utf8(attribute.value.value()) {
                names.push((kind, value.to_owned()));
            }
        }
        for name in alternative_names(&certificate) {
            names.push(match name {
                GeneralName::DnsName(name) => ("dns", name.to_string()),
                GeneralName::UniformResourceIdentifier(uri) => ("uri", uri.to_string()),
                GeneralName::Rfc822Name(address) => ("email", address.to_string()),
                _ => continue,
            });
        }
        Some(PeerCertificate {
            subject: tbs.subject.to_string(),
            names,
            not_after: tbs.validity.not_after.to_system_time(),
        })
    }
}

const COMMON_NAME: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.4.3");
const ORGANIZATION: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.4.10");
const ORGANIZATIONAL_UNIT: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.4.11");

fn alternative_names(certificate: &Certificate) -> Vec<GeneralName> {
    let found = certificate.tbs_certificate.get::<SubjectAltName>();
    found
        .ok()
        .flatten()
        .map_or(Vec::new(), |(_, names)| names.0)
}

/// All certificates of a file, of which there is one at least.
pub(super) fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let data = read_small(path)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&data).collect();
    let found = found.map_err(|error| format!("{}: {error}", path.display()))?;
    if found.is_empty() {
        return Err(format!(
            "{}: it has no certificate in PEM (-----BEGIN CERTIFICATE-----)",
            path.display()
        ));
    }
    for certificate in &found {
        Certificate::from_der(certificate).map_err(|error| {
            format!(
                "{}: what is in it is no certificate: {error}",
                path.display()
            )
        })?;
    }
    Ok(found)
}

/// A certificate's file, and that of its key.
pub(super) fn chain(certificate: &Path, key: &Path) -> Result<Chain, String> {
    let certificates = certificates(certificate)?;
    let data = read_small(key)?;
    let key = PrivateKeyDer::from_pem_slice(&data).map_err(|error| {
        let remedy = match std::str::from_utf8(&data) {
            Ok(text) if text.contains("ENCRYPTED") => {
                "it is encrypted; write it without a password, by openssl pkey -in FILE -out FILE"
                    .to_owned()
            }
            _ => format!("it has no private key in PEM: {error}"),
        };
        format!("{}: {remedy}", key.display())
    })?;
    Ok((certificates, key))
}

/// Authorities.
pub(super) fn roots(path: &Path) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        roots.add(certificate).map_err(|error| {
            format!(
                "{}: a certificate cannot be an authority: {error}",
                path.display()
            )
        })?;
    }
    Ok(roots)
}

/// Lists of certificates that count no longer.
pub(super) fn revocations(
    path: &Path,
) -> Result<Vec<CertificateRevocationListDer<'static>>, String> {
    let data = read_small(path)?;
    let lists: Result<Vec<_>, _> = CertificateRevocationListDer::pem_slice_iter(&data).collect();
    match lists {
        Ok(lists) if lists.is_empty() => Err(format!(
            "{}: it has no list in PEM (-----BEGIN X509 CRL-----)",
            path.display()
        )),
        Ok(lists) => Ok(lists),
        Err(error) => Err(format!("{}: {error}", path.display())),
    }
}

/// What rustls says of a certificate and a key that it does not take.
pub(super) fn unusable(certificate: &Path, key: &Path, error: &rustls::Error) -> String {
    match error {
        rustls::Error::InconsistentKeys(_) => format!(
            "{}: it is not the key of the certificate in {}; write both anew, as a pair",
            key.display(),
            certificate.display()
        ),
        error => format!("{} and {}: {error}", certificate.display(), key.display()),
    }
}

/// What is wrong with a certificate, though it can be used: when it is valid, and for whom.
pub(super) fn faults_of_certificate(path: &Path, is_server: bool, now: SystemTime) -> Vec<String> {
    let Ok(found) = certificates(path) else {
        return Vec::new();
    };
    let mut faults = Vec::new();
    for (number, certificate) in found.iter().enumerate() {
        let Ok(certificate) = Certificate::from_der(certificate) else {
            continue;
        };
        faults.extend(fault_of_dates(path, &certificate, now));
        if number == 0 && is_server && alternative_names(&certificate).is_empty() {
            faults.push(format!(
                "{}: it names no host (subjectAltName), so that clients refuse it; have it made with \
                 the names that they use",
                path.display()
            ));
        }
    }
    faults
}

/// An authority's file is at fault when nothing in it is valid.
pub(super) fn faults_of_authorities(path: &Path, now: SystemTime) -> Vec<String> {
    let Ok(found) = certificates(path) else {
        return Vec::new();
    };
    let faults: Vec<String> = found
        .iter()
        .filter_map(|certificate| Certificate::from_der(certificate).ok())
        .filter_map(|certificate| fault_of_dates(path, &certificate, now))
        .collect();
    match faults.len() == found.len() {
        true => faults,
        false => Vec::new(),
    }
}

fn fault_of_dates(path: &Path, certificate: &Certificate, now: SystemTime) -> Option<String> {
    let validity = &certificate.tbs_certificate.validity;
    let (from, to) = (
        validity.not_before.to_system_time(),
        validity.not_after.to_system_time(),
    );
    let date = humantime::format_rfc3339_seconds;
    let what = match (now < from, now > to) {
        (true, _) => format!(
            "is not valid before {}; see to the host's clock, or wait",
            date(from)
        ),
        (_, true) => format!("has expired at {}; renew it", date(to)),
        _ => return None,
    };
    let subject = certificate.tbs_certificate.subject.to_string();
    Some(format!(
        "{}: the certificate of {:?} {what}",
        path.display(),
        crate::text::shorten(&subject)
    ))
}

/// Whether others can read a key.
pub(super) fn fault_of_key(path: &Path) -> Option<String> {
    let mode = fs::metadata(path).ok()?.permissions().mode() & 0o7777;
    (mode & 0o007 != 0).then(|| {
        format!(
            "{}: its mode is {mode:04o}, so that everybody on this host can use the key; chmod o= {0}",
            path.display()
        )
    })
}

/// The path, unless it is empty.
pub(super) fn given(path: &Path) -> Option<PathBuf> {
    (!path.as_os_str().is_empty()).then(|| path.to_owned())
}
