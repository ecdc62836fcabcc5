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
use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};

use self::{journal::complain, log::Levels, reload::Running};
use crate::config::{self, Diagnostics, Log, Validate};

mod check;
mod connect;
pub mod disk;
mod holder;
mod journal;
mod life;
mod listen;
mod log;
mod memory;
mod reload;
mod server;
mod unit;
mod watchdog;

pub use check::{Findings, Host, SHIPPED_STOP_TIMEOUT};
pub use connect::connect;
pub use life::{Heart, Life};
pub use listen::{Listener, Peer, SocketPermissions, listen};
pub use log::LineLimit;
pub use server::{
    Answers, Limits, Received, Reservation, Services, serve, serve_within, with_room,
};

const EX_CONFIG: u8 = 78;

/// Calls that wait in a socket of systemd's make it start a daemon again at once. Five starts in ten
/// seconds are too many for it, and it gives up for good (systemd.unit(5), StartLimitBurst=).
const BEFORE_A_RESTART: Duration = Duration::from_secs(3);

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

/// Which boot of the host this is (random(4)). Units that hide /proc/sys pass it on as BB_BOOT_ID
/// (systemd.unit(5), `%b`), without hyphens.
pub fn boot_id() -> std::io::Result<String> {
    match std::fs::read_to_string("/proc/sys/kernel/random/boot_id") {
        Ok(text) => Ok(text.trim().replace('-', "")),
        Err(error) => std::env::var("BB_BOOT_ID").map_err(|_| error),
    }
}

/// Deep trees need many open directories; systemd leaves it to daemons to raise their limit.
pub fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, "could not raise the limit of open files");
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

    /// Print every key with its value and where that comes from, and exit
    #[arg(long, conflicts_with = "check")]
    print_config: bool,

    /// Check the configuration, then tell a running daemon to read it again
    #[arg(long, value_name = "PID", conflicts_with_all = ["check", "print_config"],
          value_parser = clap::value_parser!(i32).range(1..))]
    reload: Option<i32>,
}

/// A daemon's whole main function.
///
/// `warnings` says what is wrong although the daemon starts with it. `probe` tries what would keep
/// `run` from working, without changing anything.
pub fn main<C: Validate + 'static>(
    program: Program,
    log_of: fn(&C) -> &Log,
    warnings: fn(&C, &Host, &mut Diagnostics),
    probe: impl AsyncFnOnce(&C, &Host, &mut Findings),
    run: impl AsyncFnOnce(C, Life) -> Result<(), Failure>,
) -> ExitCode {
    let directory = Path::new("/etc/bb-remote-execution");
    let default = directory.join(format!("{}.toml", program.name));
    let flags = flags(&program, &default);
    let (path, optional) = match flags.config {
        Some(path) => (path, false),
        None => (default, true),
    };
    let loaded = config::examine::<C>(&path, optional);
    let host = Host::of(program.name, &path, &loaded).with_units_in(directory);
    if flags.check {
        return check::run(&program, &host, &loaded, warnings, probe);
    }
    if !loaded.errors.is_empty() {
        let text = format!(
            "{}\nAll keys are described in {}.toml(5).",
            config::Errors(loaded.errors),
            program.name
        );
        complain(program.name, &text);
        return ExitCode::from(EX_CONFIG);
    }
    if flags.print_config {
        print!("{}", config::effective(&path, &loaded));
        return ExitCode::SUCCESS;
    }
    if let Some(pid) = flags.reload {
        return ask_to_reload(&program, pid);
    }
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            complain(program.name, &format!("could not start threads: {error}"));
            return ExitCode::FAILURE;
        }
    };
    let config = loaded.config;
    let levels = log::start(program.name, log_of(&config).level);
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        configuration = %in_words(&loaded.files),
        "starting"
    );
    let mut diagnostics = Diagnostics::default();
    warnings(&config, &host, &mut diagnostics);
    for diagnostic in diagnostics.into_errors(&path) {
        tracing::warn!("{}", diagnostic.brief());
    }
    let life = Life::new();
    watchdog::start(&life, runtime.handle());
    memory::start();
    let running = Running {
        path: path.clone(),
        optional,
        table: loaded.table,
        log_of,
    };
    let result = runtime.block_on(async {
        let signals = tokio::spawn(obey_signals(life.clone(), running, levels));
        let result = run(config, life).await;
        signals.abort();
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
                Failure::Environment { .. } => {
                    if listen::any_passed() {
                        std::thread::sleep(BEFORE_A_RESTART);
                    }
                    ExitCode::FAILURE
                }
            }
        }
    }
}

fn flags(program: &Program, default: &Path) -> Flags {
    use clap::{CommandFactory, FromArgMatches};
    let name = program.name;
    let mut command = Flags::command()
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
    // For those who make packages; shells need not complete it.
    let completions = clap::Arg::new("completions")
        .long("completions")
        .hide(true)
        .value_parser(clap::value_parser!(clap_complete::Shell));
    let matches = command.clone().arg(completions).get_matches();
    if let Some(shell) = matches.get_one::<clap_complete::Shell>("completions") {
        clap_complete::generate(*shell, &mut command, name, &mut std::io::stdout());
        std::process::exit(0);
    }
    Flags::from_arg_matches(&matches).unwrap_or_else(|error| error.exit())
}

/// Names of files, for one line.
fn in_words(files: &[PathBuf]) -> String {
    match files {
        [] => "defaults".to_owned(),
        files => {
            let names: Vec<String> = files
                .iter()
                .map(|file| file.display().to_string())
                .collect();
            names.join(", ")
        }
    }
}

fn explain(failure: &Failure, path: &Path) -> String {
    match failure {
        Failure::Configuration { key, message } => {
            config::at_key(path, key, message.clone()).brief()
        }
        Failure::Environment { message } => message.clone(),
    }
}

/// What a unit's ExecReload= runs, once the configuration was found good.
///
/// systemd hears that a reload goes on before this process ends, so that `systemctl reload` returns
/// only when the daemon has said that it is done (systemd.service(5), NotifyAccess=exec).
fn ask_to_reload(program: &Program, pid: i32) -> ExitCode {
    use nix::{
        sys::signal::{Signal, kill},
        unistd::Pid,
    };
    let _ = sd_notify::notify(&[NotifyState::Reloading]);
    match kill(Pid::from_raw(pid), Signal::SIGHUP) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let text = format!("could not signal the daemon, process {pid}: {error}");
            complain(program.name, &text);
            ExitCode::FAILURE
        }
    }
}

/// The first SIGTERM or SIGINT asks the daemon to finish; a second one ends it at once. SIGHUP
/// reads the configuration again.
async fn obey_signals<C>(life: Life, mut running: Running<C>, levels: Levels)
where
    C: Validate,
{
    let (Ok(mut terminate), Ok(mut interrupt), Ok(mut hang_up)) = (
        signal(SignalKind::terminate()),
        signal(SignalKind::interrupt()),
        signal(SignalKind::hangup()),
    ) else {
        tracing::error!("could not listen for signals; SIGTERM will end this daemon at once");
        return;
    };
    enum Told {
        Stop,
        Reload,
    }
    loop {
        let told = tokio::select! {
            _ = terminate.recv() => Told::Stop,
            _ = interrupt.recv() => Told::Stop,
            _ = hang_up.recv() => Told::Reload,
        };
        match told {
            Told::Reload => reload(&life, &mut running, &levels),
            Told::Stop if !life.stopping().is_cancelled() => {
                tracing::info!("stopping");
                let _ = sd_notify::notify(&[NotifyState::Stopping]);
                life.stop();
            }
            Told::Stop => {
                tracing::warn!("stopping at once");
                std::process::exit(1);
            }
        }
    }
}

/// Says RELOADING=1 and READY=1 around it (sd_notify(3)).
fn reload<C>(life: &Life, running: &mut Running<C>, levels: &Levels)
where
    C: Validate,
{
    if let Ok(now) = NotifyState::monotonic_usec_now() {
        let _ = sd_notify::notify(&[NotifyState::Reloading, now]);
    }
    let news = running.reload(levels);
    // A daemon that is still starting says when it is ready by itself.
    life.set_news(news);
    let Some(status) = life.last_status() else {
        return;
    };
    let _ = sd_notify::notify(&[NotifyState::Ready, NotifyState::Status(&status)]);
}
