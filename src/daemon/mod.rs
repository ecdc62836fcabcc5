//! What the three daemons share: flags, configuration, log, readiness, signals, exit codes.
//!
//! Exit codes: 0 after a stop that was asked for, 78 (sysexits(3), EX_CONFIG) when the
//! administrator must change the configuration first, so that a unit can refrain from restarting,
//! and 1 for everything that a restart may cure.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use clap::Parser;
use serde::de::DeserializeOwned;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::config::{self, Check, Log};

mod connect;
mod listen;
mod log;

pub use connect::connect;
pub use listen::{Listener, Peer, SocketPermissions, listen, serve};

const EX_CONFIG: u8 = 78;

/// What `--help` and `--version` say, and where the configuration is.
pub struct Program {
    pub name: &'static str,
    pub about: &'static str,
}

/// Why a daemon cannot start, or go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// The administrator must change this key.
    #[error("{key}: {message}")]
    Configuration { key: &'static str, message: String },
    /// Something on the host, or another daemon; a restart may help.
    #[error("{message}")]
    Environment { message: String },
}

/// The life of one daemon: told to stop once, says when it is ready.
#[derive(Clone, Debug, Default)]
pub struct Life {
    stopping: CancellationToken,
}

impl Life {
    pub fn new() -> Self {
        Life::default()
    }

    /// Cancelled when the daemon should finish what it does and leave.
    pub fn stopping(&self) -> CancellationToken {
        self.stopping.clone()
    }

    pub fn stop(&self) {
        self.stopping.cancel();
    }

    /// All sockets are open, and requests are answered (sd_notify(3)).
    pub fn ready(&self, status: &str) {
        tracing::info!("{status}");
        let _ = sd_notify::notify(&[
            sd_notify::NotifyState::Ready,
            sd_notify::NotifyState::Status(status),
        ]);
    }

    /// One line for `systemctl status`.
    pub fn status(&self, status: &str) {
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Status(status)]);
    }
}

#[derive(Parser)]
struct Flags {
    /// TOML file; its drop-ins in FILE.d/*.toml are read too
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Check the configuration, directories, sockets and peers, say what to change, and exit
    #[arg(long)]
    check: bool,
}

/// A daemon's whole main function.
///
/// `probe` says everything that would keep `run` from working, without changing anything.
pub fn main<C: DeserializeOwned + Check>(
    program: Program,
    log_of: fn(&C) -> &Log,
    probe: impl AsyncFnOnce(&C) -> Vec<Failure>,
    run: impl AsyncFnOnce(C, Life) -> Result<(), Failure>,
) -> ExitCode {
    let default = PathBuf::from(format!("/etc/bb-remote-execution/{}.toml", program.name));
    let flags = flags(&program, &default);
    let (path, optional) = match flags.config {
        Some(path) => (path, false),
        None => (default, true),
    };
    let config: C = match config::load(&path, optional) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("{}: {error}", program.name);
            eprintln!("All keys are described in {}.toml(5).", program.name);
            return ExitCode::from(EX_CONFIG);
        }
    };
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("{}: could not start threads: {error}", program.name);
            return ExitCode::FAILURE;
        }
    };
    if flags.check {
        let failures = runtime.block_on(probe(&config));
        for failure in &failures {
            eprintln!("{}: {}", program.name, explain(failure, &path));
        }
        if failures.is_empty() {
            println!("{}: {} is good", program.name, path.display());
            return ExitCode::SUCCESS;
        }
        return ExitCode::from(EX_CONFIG);
    }
    log::start(log_of(&config).level);
    let life = Life::new();
    let result = runtime.block_on(async {
        let signals = tokio::spawn(obey_signals(life.clone()));
        let watchdog = tokio::spawn(feed_watchdog());
        let result = run(config, life).await;
        signals.abort();
        watchdog.abort();
        result
    });
    // Blocking calls that hang, such as on a dead disk, must not keep the daemon from leaving.
    runtime.shutdown_timeout(Duration::from_secs(2));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            tracing::error!("{}", explain(&failure, &path));
            match failure {
                Failure::Configuration { .. } => ExitCode::from(EX_CONFIG),
                Failure::Environment { .. } => ExitCode::FAILURE,
            }
        }
    }
}

fn flags(program: &Program, default: &Path) -> Flags {
    use clap::{CommandFactory, FromArgMatches};
    let name = program.name;
    let command = Flags::command()
        .name(name)
        .version(env!("CARGO_PKG_VERSION"))
        .about(program.about)
        .after_help(format!(
            "Without --config, {} is read when it exists; without any file, every key has a \
             default that works on one host.\n\nExit status: 0 after SIGTERM or SIGINT; 78 when \
             the configuration must be changed; 1 for what a restart may cure.\n\nSee {name}(8) \
             and {name}.toml(5).",
            default.display()
        ));
    Flags::from_arg_matches(&command.get_matches()).unwrap_or_else(|error| error.exit())
}

fn explain(failure: &Failure, path: &Path) -> String {
    match failure {
        Failure::Configuration { key, message } => match config::locate(path, key) {
            Some((file, line)) => format!("{}:{line}: {key}: {message}", file.display()),
            None => format!("{}: {key}: {message}", path.display()),
        },
        Failure::Environment { message } => message.clone(),
    }
}

/// The first SIGTERM or SIGINT asks the daemon to finish; a second one ends it at once.
async fn obey_signals(life: Life) {
    let (Ok(mut terminate), Ok(mut interrupt)) = (
        signal(SignalKind::terminate()),
        signal(SignalKind::interrupt()),
    ) else {
        tracing::error!("could not listen for signals; SIGTERM will end this daemon at once");
        return;
    };
    let mut next = async || {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    next().await;
    tracing::info!("stopping");
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    life.stop();
    next().await;
    tracing::warn!("stopping at once");
    std::process::exit(1);
}

/// Twice per period, from the runtime that does the work: a runtime that hangs is restarted
/// (systemd.service(5), WatchdogSec=).
async fn feed_watchdog() {
    let Some(period) = sd_notify::watchdog_enabled() else {
        return;
    };
    let mut ticks = tokio::time::interval(period / 2);
    loop {
        ticks.tick().await;
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Watchdog]);
    }
}
