//! A client's side: which servers it trusts, who it says it is.

use std::{
    error::Error,
    future::Future,
    path::Path,
    pin::Pin,
    sync::{Arc, LazyLock},
    task::{Context, Poll},
    time::{Duration, SystemTime},
};

use http::Uri;
use hyper_util::client::legacy::connect::HttpConnector;
use rustls::{AlertDescription, ClientConfig, RootCertStore, pki_types::ServerName};
use tokio::{io::AsyncBufReadExt, net::TcpStream};
use tokio_rustls::client::TlsStream;
use tower::Service;

use super::{
    ALPN, PROVIDER,
    certificate::{
        chain, fault_of_key, faults_of_authorities, faults_of_certificate, given, roots, unusable,
    },
};
use crate::{
    config::{self, Diagnostics, tls::ClientTls as Config},
    daemon::{
        CheckReport, Failure, Lifecycle, call_headers::CallHeaders, reloadable::Reloadable,
        secrets::Secrets,
    },
};

/// What calls on a peer are made with. The default trusts the host's authorities, and shows nothing.
#[derive(Clone, Default)]
pub struct Credentials {
    tls: Option<ClientIdentity>,
    headers: CallHeaders,
    secrets: Secrets,
}

/// Whom a client trusts, and its certificate.
#[derive(Clone)]
pub(in crate::daemon) struct ClientIdentity {
    files: Arc<Reloadable<ClientConfig>>,
    server_name: String,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials").finish_non_exhaustive()
    }
}

impl Credentials {
    /// As configured. `section` is the dotted key of `config`; files that it names are read again when
    /// they change.
    pub fn open(
        section: &'static str,
        config: &Config,
        lifecycle: &Lifecycle,
    ) -> Result<Self, Failure> {
        if *config == Config::default() {
            return Ok(Credentials::default());
        }
        let opened = open(section, config).map_err(|message| Failure::Configuration {
            key: section,
            message,
        })?;
        lifecycle.keep_fresh(&opened.files);
        Ok(Credentials {
            tls: Some(opened),
            ..Credentials::default()
        })
    }

    /// As `open`, of a daemon that does not run: for `--check`.
    pub fn of(section: &'static str, config: &Config) -> Self {
        Credentials {
            tls: open(section, config).ok(),
            ..Credentials::default()
        }
    }

    /// The same with headers that are shown in each call. There is no `lifecycle` where no daemon runs.
    pub fn with_headers(
        self,
        config: config::call_headers::CallHeaders<'_>,
        lifecycle: Option<&Lifecycle>,
    ) -> Result<Self, Failure> {
        let headers = CallHeaders::open(config, lifecycle)?;
        Ok(Credentials { headers, ..self })
    }

    /// The same with secrets in files, by the keys that name these. There is no `lifecycle` where no daemon
    /// runs.
    pub fn with_secrets(
        self,
        files: Vec<(&'static str, &Path)>,
        lifecycle: Option<&Lifecycle>,
    ) -> Result<Self, Failure> {
        let secrets = Secrets::open(files, lifecycle)?;
        Ok(Credentials { secrets, ..self })
    }

    /// What the file says now that a key names; `None` where none was named.
    pub fn secret(&self, key: &str) -> Option<Arc<String>> {
        self.secrets.value(key)
    }

    /// Speaks TLS to a server, a host and its port, that is no gRPC peer.
    pub(in crate::daemon) async fn secure(
        &self,
        authority: &str,
        stream: TcpStream,
    ) -> Result<TlsStream<TcpStream>, String> {
        let identity = match &self.tls {
            Some(identity) => identity.clone(),
            None => HOST.clone()?,
        };
        let name = match identity.server_name.as_str() {
            "" => host_of(authority),
            name => name.to_owned(),
        };
        let server = ServerName::try_from(name).map_err(|error| error.to_string())?;
        let mut config = ClientConfig::clone(&identity.files.value());
        config.alpn_protocols.clear();
        let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
        let stream = connector.connect(server, stream).await;
        stream.map_err(|error| explain(&error).unwrap_or_else(|| error.to_string()))
    }

    pub(in crate::daemon) fn headers(&self) -> &CallHeaders {
        &self.headers
    }

    pub(in crate::daemon) fn tls(&self) -> Option<&ClientIdentity> {
        self.tls.as_ref()
    }
}

fn open(section: &'static str, config: &Config) -> Result<ClientIdentity, String> {
    let files = [&config.ca, &config.certificate, &config.key].map(Clone::clone);
    let from = config.clone();
    Ok(ClientIdentity {
        files: Reloadable::open(section, files, move || load(&from))?,
        server_name: config.server_name.clone(),
    })
}

/// Of the host's authorities, which are read once.
static HOST: LazyLock<Result<ClientIdentity, String>> =
    LazyLock::new(|| open("tls", &Config::default()));

fn load(config: &Config) -> Result<ClientConfig, String> {
    let roots = match given(&config.ca) {
        Some(path) => roots(&path)?,
        None => host_roots()?,
    };
    let builder = ClientConfig::builder_with_provider(PROVIDER.clone())
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .with_root_certificates(roots);
    let mut made = match given(&config.certificate) {
        None => builder.with_no_client_auth(),
        Some(_) => {
            let (certificates, key) = chain(&config.certificate, &config.key)?;
            builder
                .with_client_auth_cert(certificates, key)
                .map_err(|error| unusable(&config.certificate, &config.key, &error))?
        }
    };
    made.alpn_protocols = vec![ALPN.to_vec()];
    made.resumption = rustls::client::Resumption::disabled();
    Ok(made)
}

fn host_roots() -> Result<RootCertStore, String> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(found.certs);
    match roots.is_empty() {
        true => Err(
            "this host has no authorities to trust; install ca-certificates, or name a file of yours \
             with tls.ca"
                .to_owned(),
        ),
        false => Ok(roots),
    }
}

/// What is wrong with a client's files, although it can call.
pub fn warn_client(section: &str, config: &Config, diagnostics: &mut Diagnostics) {
    let now = SystemTime::now();
    let mut add = |name: &str, faults: Vec<String>| {
        for fault in faults {
            diagnostics.add(format!("{section}.{name}"), fault);
        }
    };
    if given(&config.ca).is_some() {
        add("ca", faults_of_authorities(&config.ca, now));
    }
    if given(&config.certificate).is_some() {
        let faults = faults_of_certificate(&config.certificate, false, now);
        add("certificate", faults);
        add("key", fault_of_key(&config.key).into_iter().collect());
    }
}

/// Whether a client can show what it is to show in each call.
pub fn check_headers(config: config::call_headers::CallHeaders<'_>, report: &mut CheckReport) {
    let [_, key] = config.keys;
    if !config.authorization_file.as_os_str().is_empty() {
        let failure = CallHeaders::open(config, None).err();
        let name = config.authorization_file.display();
        report.record(format!("{key}: {name} can be used"), failure);
    }
}

/// Whether a client's files can be used.
pub fn check_client(section: &'static str, config: &Config, report: &mut CheckReport) {
    if *config == Config::default() {
        return;
    }
    let failure = load(config).err().map(|message| Failure::Configuration {
        key: section,
        message,
    });
    report.record(format!("{section}: its files can be used"), failure);
}

/// Connects over TCP, then TLS.
#[derive(Clone)]
pub(in crate::daemon) struct TlsConnector {
    tcp: HttpConnector,
    identity: Result<ClientIdentity, String>,
    /// Of the endpoint, without its port.
    host: String,
}

impl TlsConnector {
    /// To `authority`, a host and its port, by what connects over TCP.
    pub(in crate::daemon) fn new(
        tcp: HttpConnector,
        authority: &str,
        identity: Option<&ClientIdentity>,
    ) -> Self {
        TlsConnector {
            tcp,
            identity: match identity {
                Some(identity) => Ok(identity.clone()),
                None => HOST.clone(),
            },
            host: host_of(authority),
        }
    }
}

/// A host with its port, without that.
fn host_of(authority: &str) -> String {
    let host = authority
        .rsplit_once(':')
        .map_or(authority, |(host, _)| host);
    host.trim_matches(['[', ']']).to_owned()
}

/// Servers say first what they take (RFC 9113, section 3.4). One that waits for us is not waited for.
const FIRST_FRAME: Duration = Duration::from_secs(2);

type ConnectFuture<T> =
    Pin<Box<dyn Future<Output = Result<T, Box<dyn Error + Send + Sync>>> + Send>>;

impl Service<Uri> for TlsConnector {
    type Response = TlsStream<TcpStream>;
    type Error = Box<dyn Error + Send + Sync>;
    type Future = ConnectFuture<Self::Response>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.tcp.poll_ready(context).map_err(Into::into)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let (connecting, identity) = (self.tcp.call(uri), self.identity.clone());
        let host = self.host.clone();
        Box::pin(async move {
            let identity = identity?;
            let name = match identity.server_name.as_str() {
                "" => host,
                name => name.to_owned(),
            };
            let server = ServerName::try_from(name)?;
            let stream = connecting.await?.into_inner();
            let connector = tokio_rustls::TlsConnector::from(identity.files.value());
            let told = |error: std::io::Error| explain(&error).unwrap_or_else(|| error.to_string());
            let mut stream = connector.connect(server, stream).await.map_err(told)?;
            // What the server thinks of our certificate comes after our side of the handshake, and
            // before the first frame of HTTP/2.
            match tokio::time::timeout(FIRST_FRAME, stream.fill_buf()).await {
                Ok(Err(error)) => Err(told(error).into()),
                Ok(Ok([])) => Err("the server closed the connection after the handshake".into()),
                Ok(Ok(_)) | Err(_) => Ok(stream),
            }
        })
    }
}

/// What an error means for those who run a client, if it is one of TLS.
pub(in crate::daemon) fn explain(error: &(dyn Error + 'static)) -> Option<String> {
    let error = tls_error(error)?;
    let remedy = match error {
        rustls::Error::AlertReceived(AlertDescription::ProtocolVersion)
        | rustls::Error::InvalidMessage(_) => {
            "; does that port speak TLS? If not, write grpc:// in place of grpcs://"
        }
        rustls::Error::AlertReceived(AlertDescription::CertificateRequired) => {
            "; it wants a certificate of its clients: set tls.certificate and tls.key"
        }
        rustls::Error::AlertReceived(_) => "; the other side's log says why",
        rustls::Error::InvalidCertificate(rustls::CertificateError::UnknownIssuer) => {
            "; name the file of its authority with tls.ca"
        }
        _ => "",
    };
    Some(format!("TLS: {error}{remedy}"))
}

fn tls_error<'e>(error: &'e (dyn Error + 'static)) -> Option<&'e rustls::Error> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<rustls::Error>() {
            return Some(error);
        }
        // An io::Error has what it wraps not as its source.
        if let Some(error) = error.downcast_ref::<std::io::Error>()
            && let Some(inner) = error.get_ref()
            && let Some(error) = inner.downcast_ref::<rustls::Error>()
        {
            return Some(error);
        }
        cause = error.source();
    }
    None
}
