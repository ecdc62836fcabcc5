//! TLS in a configuration: of a listener, and of a client.
//!
//! An empty path is none. Whether files are there and fit is not known here: see `daemon::tls`.

#![expect(
    missing_docs,
    reason = "keys are described in bb_scheduler.toml(5) and bb_worker.toml(5), as a test sees to"
)]

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Diagnostics, Endpoint};

/// A listener's; off without a certificate.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct ServerTls {
    /// In PEM, with the certificates between it and the authority's.
    pub certificate: PathBuf,
    pub key: PathBuf,
    /// Whoever has a certificate of these authorities is known by it.
    pub client_ca: PathBuf,
    /// Certificates of clients that count no longer.
    pub client_crl: PathBuf,
    pub client_certificates: ClientCertificates,
}

/// Whether clients must have a certificate, where there is a `client_ca`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ClientCertificates {
    #[default]
    Required,
    Optional,
}

/// A client's, for endpoints whose scheme is grpcs.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct ClientTls {
    /// Empty for the host's authorities.
    pub ca: PathBuf,
    pub certificate: PathBuf,
    pub key: PathBuf,
    /// What the server's certificate must be for; empty for the endpoint's host.
    pub server_name: String,
}

impl ServerTls {
    /// Whether the listener speaks TLS.
    pub fn is_on(&self) -> bool {
        !is_empty(&self.certificate)
    }

    /// What no host is needed to find wrong. `section` is the dotted key of these.
    pub fn validate(&self, section: &str, diagnostics: &mut Diagnostics) {
        let pair = (section, &*self.certificate, &*self.key);
        validate_pair(pair, diagnostics);
        for (name, path) in [
            ("client_ca", &self.client_ca),
            ("client_crl", &self.client_crl),
        ] {
            let key = format!("{section}.{name}");
            require_absolute(&key, path, diagnostics);
            diagnostics.require(
                is_empty(path) || self.is_on(),
                &key,
                format!(
                    "clients show certificates only where the listener has one; set {section}.certificate too"
                ),
            );
        }
        diagnostics.require(
            is_empty(&self.client_crl) || !is_empty(&self.client_ca),
            &format!("{section}.client_crl"),
            format!("no client is asked for a certificate; set {section}.client_ca too"),
        );
        diagnostics.require(
            self.client_certificates == ClientCertificates::Required || !is_empty(&self.client_ca),
            &format!("{section}.client_certificates"),
            format!("no client is asked for a certificate; set {section}.client_ca too"),
        );
    }
}

impl ClientTls {
    /// As `ServerTls::validate`; `endpoints` are those that it is for.
    pub fn validate(&self, section: &str, endpoints: &[&Endpoint], diagnostics: &mut Diagnostics) {
        validate_pair((section, &self.certificate, &self.key), diagnostics);
        require_absolute(&format!("{section}.ca"), &self.ca, diagnostics);
        let is_used = endpoints
            .iter()
            .any(|endpoint| matches!(endpoint, Endpoint::Tls(_)));
        diagnostics.require(
            is_used || *self == ClientTls::default(),
            section,
            "no endpoint here speaks TLS, so that this does nothing; write \"grpcs://\" in place of \"grpc://\"",
        );
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | ':');
        diagnostics.require(
            self.server_name.chars().all(plain),
            &format!("{section}.server_name"),
            "it is the name of a host, such as \"storage.example\", without scheme and port",
        );
    }
}

fn is_empty(path: &Path) -> bool {
    path.as_os_str().is_empty()
}

fn validate_pair((section, certificate, key): (&str, &Path, &Path), diagnostics: &mut Diagnostics) {
    for (name, path) in [("certificate", certificate), ("key", key)] {
        require_absolute(&format!("{section}.{name}"), path, diagnostics);
    }
    let (given, lacking) = match is_empty(certificate) {
        true => ("key", "certificate"),
        false => ("certificate", "key"),
    };
    diagnostics.require(
        is_empty(certificate) == is_empty(key),
        &format!("{section}.{given}"),
        format!("it is of no use without {section}.{lacking}; set both, or none"),
    );
}

fn require_absolute(key: &str, path: &Path, diagnostics: &mut Diagnostics) {
    diagnostics.require(
        is_empty(path) || path.is_absolute(),
        key,
        "the path must begin with /, since a daemon has no directory of its own to begin at",
    );
}
