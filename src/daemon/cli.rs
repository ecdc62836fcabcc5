//! The command line of the three programs, and their main function.
//!
//! Exit codes: 0 after a stop that was asked for, 78 (sysexits(3), EX_CONFIG) when the
//! administrator must change the configuration first, so that a unit can refrain from restarting,
//! and 1 for everything that a restart may cure.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use clap::{CommandFactory, FromArgMatches, Parser};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use sd_notify::NotifyState;

use super::{
    CheckReport, CommandError, Failure, Installation, Lifecycle, check, health, listen,
    logging::{self, print_error},
    memory,
    process::{EX_CONFIG, Program, notify},
    reload::ReloadableConfig,
    signals,
};
use crate::config::{self, Diagnostics, Loaded, Log, Validate};

/// So many tasks are polled before the kernel is asked for what has arrived, unless none is ready sooner. Under load
/// the messages of as many calls go out together (`batched_writes`): 250 is 8 % more actions a second than this, and
/// 61, tokio's, 8 % less. But a call waits for all of them twice, and a poll takes microseconds or half a millisecond.
const EVENT_INTERVAL: u32 = 128;

/// Calls that wait in a socket of systemd's make it start a daemon again at once. Five starts in ten
/// seconds are too many for it, and it gives up for good (systemd.unit(5), StartLimitBurst=).
const RESTART_DELAY: Duration = Duration::from_secs(3);

#[derive(Parser)]
#[command(disable_help_subcommand = true)]
struct Cli<A: clap::Subcommand> {
    /// TOML file; its drop-ins in FILE.d/*.toml are read too
    #[arg(long, value_name = "FILE", global = true)]
    config: Option<PathBuf>,

    /// As the command check
    #[arg(long)]
    check: bool,

    /// As the command print-config
    #[arg(long, conflicts_with = "check")]
    print_config: bool,

    /// As the command reload
    #[arg(long, value_name = "PID", conflicts_with_all = ["check", "print_config"],
          value_parser = clap::value_parser!(i32).range(1..))]
    reload: Option<i32>,

    #[command(subcommand)]
    command: Option<AnyCommand<A>>,
}

/// What a program does instead of serving.
#[derive(clap::Subcommand)]
enum AnyCommand<A: clap::Subcommand> {
    /// What it asks a daemon that runs.
    #[command(flatten)]
    Ask(A),
    #[command(flatten)]
    Shared(SharedCommand),
}

/// What each of the three programs can do instead of serving.
#[derive(Clone, Copy, clap::Subcommand)]
enum SharedCommand {
    /// Check the configuration, directories, sockets and peers, say what to change, and exit
    Check,
    /// Print every key with its value and where that comes from, and exit
    PrintConfig,
    /// Check the configuration, then tell a running daemon to read it again
    Reload {
        #[arg(value_parser = clap::value_parser!(i32).range(1..))]
        pid: i32,
    },
}

impl<A: clap::Subcommand> Cli<A> {
    /// Flags came before commands, and do the same.
    fn into_command(self) -> Result<Option<AnyCommand<A>>, clap::Error> {
        let flag = match (self.check, self.print_config, self.reload) {
            (true, ..) => Some(SharedCommand::Check),
            (_, true, _) => Some(SharedCommand::PrintConfig),
            (.., pid) => pid.map(|pid| SharedCommand::Reload { pid }),
        };
        match (flag, self.command) {
            (Some(_), Some(_)) => Err(clap::Error::raw(
                clap::error::ErrorKind::ArgumentConflict,
                "a flag and a command ask for different things; leave the flag out\n",
            )),
            (flag, command) => Ok(flag.map(AnyCommand::Shared).or(command)),
        }
    }
}

/// A daemon's whole main function.
///
/// `warnings` says what is wrong although the daemon starts with it. `probe` tries what would keep
/// `run` from working, without changing anything. `ask` does what the program's own commands say; what is
/// wrong with the configuration is left to the daemon that they ask.
pub fn main<C: Validate + 'static, A: clap::Subcommand>(
    program: Program,
    log_of: fn(&C) -> &Log,
    warnings: fn(&C, &Installation, &mut Diagnostics),
    probe: impl AsyncFnOnce(&C, &Installation, &mut CheckReport),
    run: impl AsyncFnOnce(C, Lifecycle) -> Result<(), Failure>,
    ask: impl AsyncFnOnce(A, &C) -> Result<(), CommandError>,
) -> ExitCode {
    let directory = Path::new("/etc/bb-remote-execution");
    let default = directory.join(format!("{}.toml", program.name));
    let (config, command) = parse::<A>(&program, &default);
    let (path, optional) = match config {
        Some(path) => (path, false),
        None => (default, true),
    };
    let loaded = config::examine::<C>(&path, optional);
    let command = match command {
        Some(AnyCommand::Ask(command)) => {
            // Else a daemon would be asked that is not meant.
            if !optional && let Some(error) = loaded.unreadable() {
                return CommandError::NotFound(error).report(program.name);
            }
            return ask_daemon(&program, ask(command, &loaded.config));
        }
        Some(AnyCommand::Shared(command)) => Some(command),
        None => None,
    };
    let installation = Installation::of(program.name, &path, &loaded).with_units_in(directory);
    if let Some(SharedCommand::Check) = command {
        return check::run(&program, &installation, &loaded, warnings, probe);
    }
    if !loaded.errors.is_empty() {
        let text = format!(
            "{}\nAll keys are described in {}.toml(5).",
            config::Errors(loaded.errors),
            program.name
        );
        print_error(program.name, &text);
        return ExitCode::from(EX_CONFIG);
    }
    match command {
        Some(SharedCommand::PrintConfig) => {
            print!("{}", config::effective(&path, &loaded));
            ExitCode::SUCCESS
        }
        Some(SharedCommand::Reload { pid }) => ask_to_reload(&program, pid),
        Some(SharedCommand::Check) | None => {
            let mut diagnostics = Diagnostics::default();
            warnings(&loaded.config, &installation, &mut diagnostics);
            serve(&program, &path, optional, loaded, log_of, diagnostics, run)
        }
    }
}

/// Asks a daemon that runs, and waits for its answers.
fn ask_daemon(
    program: &Program,
    asking: impl Future<Output = Result<(), CommandError>>,
) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let done = match runtime {
        Ok(runtime) => runtime.block_on(asking),
        Err(error) => Err(CommandError::Failed(error.to_string())),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => error.report(program.name),
    }
}

/// Runs the daemon until it ends.
fn serve<C: Validate + 'static>(
    program: &Program,
    path: &Path,
    optional: bool,
    loaded: Loaded<C>,
    log_of: fn(&C) -> &Log,
    warnings: Diagnostics,
    run: impl AsyncFnOnce(C, Lifecycle) -> Result<(), Failure>,
) -> ExitCode {
    let config = loaded.config;
    let level = logging::start(program.name, log_of(&config));
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(processors.div_ceil(program.processors_per_thread))
        .event_interval(EVENT_INTERVAL)
        .enable_all()
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            print_error(program.name, &format!("could not start threads: {error}"));
            return ExitCode::FAILURE;
        }
    };
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        configuration = %names_of(&loaded.files),
        "starting"
    );
    for warning in warnings.into_errors(path) {
        tracing::warn!("{}", warning.brief());
    }
    let lifecycle = Lifecycle::new();
    health::start_watchdog(&lifecycle.health, runtime.handle());
    memory::start();
    let reloadable = ReloadableConfig {
        path: path.to_owned(),
        optional,
        table: loaded.table,
        log_of,
    };
    let result = runtime.block_on(async {
        let obeying = tokio::spawn(signals::obey(lifecycle.clone(), reloadable, level));
        let result = run(config, lifecycle).await;
        obeying.abort();
        result
    });
    // Blocking calls that hang, such as on a dead disk, must not keep the daemon from leaving.
    runtime.shutdown_timeout(Duration::from_secs(2));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Configuration { key, message }) => {
            tracing::error!("{}", config::at_key(path, key, message).brief());
            ExitCode::from(EX_CONFIG)
        }
        Err(Failure::Environment { message }) => {
            tracing::error!("{message}");
            if listen::any_passed() {
                std::thread::sleep(RESTART_DELAY);
            }
            ExitCode::FAILURE
        }
    }
}

/// The file that `--config` names, and what the program is to do.
fn parse<A: clap::Subcommand>(
    program: &Program,
    default: &Path,
) -> (Option<PathBuf>, Option<AnyCommand<A>>) {
    // For those who make packages; shells need not complete it.
    let completions = clap::Arg::new("completions")
        .long("completions")
        .hide(true)
        .value_parser(clap::value_parser!(clap_complete::Shell));
    let mut described = described::<A>(program, default);
    let matches = described.clone().arg(completions).get_matches();
    if let Some(shell) = matches.get_one::<clap_complete::Shell>("completions") {
        clap_complete::generate(*shell, &mut described, program.name, &mut std::io::stdout());
        std::process::exit(0);
    }
    let mut cli = Cli::<A>::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    let config = cli.config.take();
    let command = cli.into_command().unwrap_or_else(|error| error.exit());
    (config, command)
}

fn described<A: clap::Subcommand>(program: &Program, default: &Path) -> clap::Command {
    let name = program.name;
    Cli::<A>::command()
        .name(name)
        .version(env!("CARGO_PKG_VERSION"))
        .about(program.about)
        .after_help(format!(
            "Without --config, {} is read when it exists; without any file, every key has a \
             default that works on one host.\n\nExit status: 0 after SIGTERM or SIGINT; 78 when \
             the configuration must be changed; 1 for what a restart may cure. Of commands that ask a \
             daemon: 66 when what was named is not there; 69 when the daemon does not answer; 77 when \
             the caller may not do this.\n\nSee {name}(8) \
             and {name}.toml(5).",
            default.display()
        ))
}

/// Names of files, for one line.
fn names_of(files: &[PathBuf]) -> String {
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

/// What a unit's ExecReload= runs, once the configuration was found good.
///
/// systemd hears that a reload goes on before this process ends, so that `systemctl reload` returns
/// only when the daemon has said that it is done (systemd.service(5), NotifyAccess=exec).
fn ask_to_reload(program: &Program, pid: i32) -> ExitCode {
    notify(&[NotifyState::Reloading]);
    match kill(Pid::from_raw(pid), Signal::SIGHUP) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let text = format!("could not signal the daemon, process {pid}: {error}");
            print_error(program.name, &text);
            ExitCode::FAILURE
        }
    }
}
