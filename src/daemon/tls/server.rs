//! A listener's side: its certificate, and which certificates of clients count.

use std::{path::Path, sync::Arc, time::SystemTime};

use rustls::{
    ServerConfig,
    server::{NoServerSessionStorage, WebPkiClientVerifier},
};
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;

use super::{
    ALPN, PAGES_ALPN, PROVIDER, PeerCertificate,
    certificate::{
        chain, fault_of_key, faults_of_authorities, faults_of_certificate, given, revocations,
        roots, unusable,
    },
};
use crate::{
    config::{
        Diagnostics,
        tls::{ClientCertificates, ServerTls as Config},
    },
    daemon::{CheckReport, Failure, Lifecycle, reloadable::Reloadable},
};

/// TLS of a listener, whose files are read again when they change.
#[derive(Clone)]
pub struct ServerTls(Arc<Reloadable<ServerConfig>>);

/// Makes handshakes.
#[derive(Clone)]
pub(in crate::daemon) struct TlsAcceptor {
    config: Arc<Reloadable<ServerConfig>>,
    protocols: &'static [&'static [u8]],
}

/// TLS as configured; `None` when it is off. `section` is the dotted key of all this.
pub fn server_tls(
    section: &'static str,
    config: &Config,
    lifecycle: &Lifecycle,
) -> Result<Option<ServerTls>, Failure> {
    if !config.is_on() {
        return Ok(None);
    }
    let files = [
        &config.certificate,
        &config.key,
        &config.client_ca,
        &config.client_crl,
    ];
    let from = config.clone();
    let opened = Reloadable::open(section, files.map(Clone::clone), move || load(&from));
    let opened = opened.map_err(|message| Failure::Configuration {
        key: section,
        message,
    })?;
    lifecycle.keep_fresh(&opened);
    Ok(Some(ServerTls(opened)))
}

fn load(config: &Config) -> Result<ServerConfig, String> {
    let builder = ServerConfig::builder_with_provider(PROVIDER.clone())
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?;
    let builder = match given(&config.client_ca) {
        None => builder.with_no_client_auth(),
        Some(authorities) => {
            let roots = Arc::new(roots(&authorities)?);
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, PROVIDER.clone());
            let verifier = match given(&config.client_crl) {
                Some(path) => verifier
                    .with_crls(revocations(&path)?)
                    .allow_unknown_revocation_status(),
                None => verifier,
            };
            let verifier = match config.client_certificates {
                ClientCertificates::Required => verifier,
                ClientCertificates::Optional => verifier.allow_unauthenticated(),
            };
            let verifier = verifier.build().map_err(|error| {
                let lists = config.client_crl.display();
                format!("{} and {lists}: {error}", authorities.display())
            })?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let (certificates, key) = chain(&config.certificate, &config.key)?;
    let mut made = builder
        .with_single_cert(certificates, key)
        .map_err(|error| unusable(&config.certificate, &config.key, &error))?;
    made.alpn_protocols = vec![ALPN.to_vec()];
    made.session_storage = Arc::new(NoServerSessionStorage {});
    made.send_tls13_tickets = 0;
    Ok(made)
}

/// What is wrong with a listener's files, although it can be served.
pub fn warn_server(section: &str, config: &Config, diagnostics: &mut Diagnostics) {
    if !config.is_on() {
        return;
    }
    let now = SystemTime::now();
    let mut add = |name: &str, faults: Vec<String>| {
        for fault in faults {
            diagnostics.add(format!("{section}.{name}"), fault);
        }
    };
    add(
        "certificate",
        faults_of_certificate(&config.certificate, true, now),
    );
    add("key", fault_of_key(&config.key).into_iter().collect());
    if given(&config.client_ca).is_some() {
        add("client_ca", faults_of_authorities(&config.client_ca, now));
    }
}

/// Whether a listener's files can be used.
pub fn check_server(section: &'static str, config: &Config, report: &mut CheckReport) {
    if config.is_on() {
        let shown = |path: &Path| path.display().to_string();
        let failure = load(config).err().map(|message| Failure::Configuration {
            key: section,
            message,
        });
        let what = format!("{section}: {} can be used", shown(&config.certificate));
        report.record(what, failure);
    }
}

impl ServerTls {
    pub(in crate::daemon) fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor {
            config: self.0.clone(),
            protocols: &[ALPN],
        }
    }
}

impl TlsAcceptor {
    /// The same for peers that may speak HTTP/1.1.
    pub(in crate::daemon) fn for_pages(&self) -> Self {
        TlsAcceptor {
            config: self.config.clone(),
            protocols: &[ALPN, PAGES_ALPN],
        }
    }

    /// The connection, and who is at its other end, as far as a certificate says so.
    pub(in crate::daemon) async fn accept(
        &self,
        stream: TcpStream,
    ) -> std::io::Result<(TlsStream<TcpStream>, Option<PeerCertificate>)> {
        let mut config = self.config.value();
        if *self.protocols != [ALPN] {
            let protocols = self.protocols.iter().map(|name| name.to_vec());
            Arc::make_mut(&mut config).alpn_protocols = protocols.collect();
        }
        let acceptor = tokio_rustls::TlsAcceptor::from(config);
        let stream = acceptor.accept(stream).await?;
        let (_, connection) = stream.get_ref();
        let certificate = match connection
            .peer_certificates()
            .and_then(|chain| chain.first())
        {
            None => None,
            Some(certificate) => {
                let parsed = PeerCertificate::parse(certificate);
                let unreadable = || std::io::Error::other("its certificate cannot be read");
                Some(parsed.ok_or_else(unreadable)?)
            }
        };
        Ok((stream, certificate))
    }
}
