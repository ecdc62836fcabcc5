//! What the commands that ask a running daemon share: whom they ask, with what right, and how they end.
//!
//! Exit codes: 0 when what was asked for is done; 66 (sysexits(3), EX_NOINPUT) when what was named is not
//! there; 69 (EX_UNAVAILABLE) when the daemon does not answer; 77 (EX_NOPERM) when the caller may not do
//! this; 2 when options or arguments are wrong, whoever finds that; 1 for every other failure.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use tonic::{
    Code, Status,
    metadata::{Ascii, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
};

use super::{AnsweredChannel, Credentials, Output, connect_with, logging::print_error};
use crate::config::{Endpoint, ListenAddress, tls::ClientTls};

/// By then a daemon that runs has begun its answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Whom a command asks, and how it prints what it hears.
#[derive(Clone, Debug, clap::Args)]
pub struct CommandOptions {
    /// Print JSON, for scripts
    #[arg(long)]
    json: bool,

    /// Ask a daemon elsewhere: grpc://HOST:PORT, grpcs://HOST:PORT for TLS, or unix:/PATH
    #[arg(long, value_name = "ENDPOINT")]
    endpoint: Option<Endpoint>,

    /// Authorities in PEM that the other end is trusted by, instead of this host's
    #[arg(long, value_name = "FILE", requires = "endpoint")]
    ca: Option<PathBuf>,

    /// Certificate in PEM to be known by
    #[arg(long, value_name = "FILE", requires = "endpoint", requires = "key")]
    certificate: Option<PathBuf>,

    /// Private key of the certificate
    #[arg(long, value_name = "FILE", requires = "certificate")]
    key: Option<PathBuf>,

    /// File with a token to be known by
    #[arg(long, value_name = "FILE", requires = "endpoint")]
    authorization_file: Option<PathBuf>,
}

/// Why a command did not do what it was asked for; each variant has its exit code.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    /// The options or arguments are wrong.
    #[error("{0}")]
    Usage(String),
    /// What was named is not there.
    #[error("{0}")]
    NotFound(String),
    /// The daemon does not answer.
    #[error("{0}")]
    Unavailable(String),
    /// Somebody else must do this, or must allow it.
    #[error("{0}")]
    NotPermitted(String),
    /// The daemon, or this host, failed.
    #[error("{0}")]
    Failed(String),
}

impl CommandError {
    fn code(&self) -> u8 {
        match self {
            CommandError::Usage(_) => 2,
            CommandError::NotFound(_) => 66,
            CommandError::Unavailable(_) => 69,
            CommandError::NotPermitted(_) => 77,
            CommandError::Failed(_) => 1,
        }
    }

    /// The exit code, after the reason was told on standard error.
    pub fn report(&self, program: &str) -> ExitCode {
        let text = self.to_string();
        let lines: Vec<_> = text.lines().map(crate::text::printable).collect();
        print_error(program, &lines.join("\n"));
        ExitCode::from(self.code())
    }
}

impl From<Status> for CommandError {
    fn from(status: Status) -> Self {
        let text = status.message().to_owned();
        match status.code() {
            Code::InvalidArgument => CommandError::Usage(text),
            Code::NotFound => CommandError::NotFound(text),
            Code::Unavailable => CommandError::Unavailable(text),
            Code::PermissionDenied | Code::Unauthenticated => CommandError::NotPermitted(text),
            Code::Unimplemented => CommandError::Failed(format!(
                "the other end does not know this; is it an older version, or another port? {text}"
            )),
            code => CommandError::Failed(format!("{code:?}: {text}")),
        }
    }
}

/// A channel whose calls show a token, if there is one, and end when they are not answered in time.
pub type CommandChannel = InterceptedService<AnsweredChannel, Authorization>;

fn silence(program: &str, place: &str) -> String {
    let (unit, seconds) = (program.replace('_', "-"), ANSWER_TIMEOUT.as_secs());
    format!(
        "{program} at {place} does not answer within {seconds} s: it is stopped, or its host is overloaded; look there with \"systemctl status {unit}\" and \"journalctl -u {unit}\""
    )
}

/// Adds the header `authorization` (RFC 6750) to each call.
#[derive(Clone, Debug)]
pub struct Authorization(Option<MetadataValue<Ascii>>);

impl Interceptor for Authorization {
    fn call(&mut self, mut request: tonic::Request<()>) -> Result<tonic::Request<()>, Status> {
        if let Some(value) = &self.0 {
            request
                .metadata_mut()
                .insert("authorization", value.clone());
        }
        Ok(request)
    }
}

impl CommandOptions {
    /// Where the answers are printed.
    pub fn output(&self) -> Output {
        Output::of_process(self.json)
    }

    /// The status of the daemon of this host, which listens at `control`, or at the Unix socket that the
    /// options name.
    pub async fn fetch_status(
        &self,
        program: &str,
        control: &ListenAddress,
    ) -> Result<serde_json::Value, CommandError> {
        let path = match (&self.endpoint, control) {
            (Some(Endpoint::Unix(path)), _) | (None, ListenAddress::Unix(path)) => path,
            _ => {
                return Err(CommandError::Failed(format!(
                    "{program} tells its status on a Unix socket only; write --endpoint unix:/PATH"
                )));
            }
        };
        try_socket(program, path)?;
        let asked = super::observation::fetch_status(path);
        let told = tokio::time::timeout(ANSWER_TIMEOUT, asked).await;
        let told = told.map_err(|_| {
            CommandError::Unavailable(silence(program, &path.display().to_string()))
        })?;
        told.map_err(|error| {
            CommandError::Unavailable(format!("{program} at {}: {error}", path.display()))
        })
    }

    /// A channel to the daemon of this host, which listens at `control`, or to the one that the options
    /// name. `program` is the daemon's.
    pub fn connect(
        &self,
        program: &str,
        control: &ListenAddress,
    ) -> Result<CommandChannel, CommandError> {
        let token = match &self.authorization_file {
            Some(path) => Some(read_token(path)?),
            None => None,
        };
        let endpoint = match (&self.endpoint, control) {
            (Some(endpoint), _) => endpoint.clone(),
            (None, ListenAddress::Unix(path)) => {
                try_socket(program, path)?;
                Endpoint::Unix(path.clone())
            }
            (None, ListenAddress::Tcp(address)) => Endpoint::Tcp(address.to_string()),
        };
        if token.is_some() && matches!(endpoint, Endpoint::Tcp(_)) {
            return Err(CommandError::Failed(format!(
                "a token is shown by TLS only, which {endpoint} does not speak; write \"grpcs://\" in place of \"grpc://\""
            )));
        }
        let credentials = Credentials::of(
            "options",
            &ClientTls {
                ca: self.ca.clone().unwrap_or_default(),
                certificate: self.certificate.clone().unwrap_or_default(),
                key: self.key.clone().unwrap_or_default(),
                server_name: String::new(),
            },
        );
        let channel = connect_with(&endpoint, &credentials);
        let silence = silence(program, &endpoint.to_string());
        let channel = AnsweredChannel::new(channel, ANSWER_TIMEOUT, silence);
        Ok(InterceptedService::new(channel, Authorization(token)))
    }
}

fn read_token(path: &Path) -> Result<MetadataValue<Ascii>, CommandError> {
    let failed = |why: String| CommandError::Failed(format!("{}: {why}", path.display()));
    let text = fs::read_to_string(path).map_err(|error| failed(error.to_string()))?;
    let token = text.trim();
    let header = match token.split_once(' ') {
        Some((scheme, _)) if scheme.eq_ignore_ascii_case("bearer") => token.to_owned(),
        _ => format!("Bearer {token}"),
    };
    let mut value: MetadataValue<Ascii> = header
        .parse()
        .map_err(|_| failed("it must have a token, and nothing else".to_owned()))?;
    value.set_sensitive(true);
    Ok(value)
}

/// Whether the daemon of this host can be asked; says who must do what when it cannot.
fn try_socket(program: &str, path: &Path) -> Result<(), CommandError> {
    let Err(error) = std::os::unix::net::UnixStream::connect(path) else {
        return Ok(());
    };
    let unit = program.replace('_', "-");
    let shown = path.display();
    Err(match error.kind() {
        io::ErrorKind::PermissionDenied => {
            let remedy = match group_of(path) {
                Some(group) if group != "root" => {
                    format!(
                        "root may, and members of the group {group}: usermod -aG {group} NAME, then log in again"
                    )
                }
                _ => "root may".to_owned(),
            };
            CommandError::NotPermitted(format!("you may not open {shown}; {remedy}"))
        }
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
            CommandError::Unavailable(format!(
                "no {program} of this host answers at {shown}: start it with \"systemctl start {unit}\", or say where it is with --endpoint or --config"
            ))
        }
        _ => CommandError::Unavailable(format!("could not connect to {shown}: {error}")),
    })
}

fn group_of(socket: &Path) -> Option<String> {
    let gid = fs::metadata(socket).ok()?.gid();
    let group = nix::unistd::Group::from_gid(nix::unistd::Gid::from_raw(gid));
    Some(group.ok().flatten()?.name)
}
