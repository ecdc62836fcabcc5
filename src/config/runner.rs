//! bb_runner.toml, see bb_runner.toml(5).

#![expect(
    missing_docs,
    reason = "keys are described in bb_runner.toml(5), as a test sees to"
)]

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{
    Diagnostics, DirectoryKind, Duration, ListenAddress, Log, Size, Validate,
    control::{RunnerControl, RunnerMetrics},
    directory_kind, path_error,
    traces::Traces,
};

/// One action each, at a time.
pub const MAX_USERS: u32 = 500;
/// kernel.pid_max is never greater.
const MOST_PROCESSES: u64 = 4_194_304;

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Ignored when systemd passes a socket under the name `runner`.
    pub listen: ListenAddress,
    /// Permission bits of a Unix socket, in octal.
    pub socket_mode: Mode,
    /// Group of a Unix socket; empty for the runner's own.
    pub socket_group: String,
    /// Names or numbers of the users who may call; root always may.
    pub allowed_users: Vec<String>,
    /// The worker's `build_directory`.
    pub build_directory: PathBuf,
    pub users: Users,
    /// What actions see as `/`.
    pub root: Root,
    pub containment: Containment,
    pub limits: Limits,
    /// Names or numbers of groups that actions are in, besides their own.
    pub additional_groups: Vec<String>,
    /// What runs the commands, such as qemu-user for another architecture: a program and arguments.
    pub emulator: Vec<String>,
    /// Between SIGTERM to a command's first process and SIGKILL to all, at a timeout or a stop.
    pub termination_grace: Duration,
    /// Emptied before the first of some actions and after the last one.
    pub clean_temporary_directories: Vec<PathBuf>,
    /// Run then, as root: a program and arguments.
    pub run_command_cleaner: Vec<String>,
    /// What actions may write to besides their own directories, such as a shared compiler cache.
    pub writable_directories: Vec<PathBuf>,
    /// TMPDIR = the action's temporary directory, unless the action sets it.
    pub set_tmpdir_environment_variable: bool,
    /// PATH, HOME and TZ, as far as the action does not set them.
    pub set_default_environment_variables: bool,
    /// Missing ones make this runner, and so the worker, not ready.
    pub readiness_checking_pathnames: Vec<PathBuf>,
    pub metrics: RunnerMetrics,
    pub control: RunnerControl,
    pub shutdown: Shutdown,
    pub traces: Traces,
    pub log: Log,
}

/// The Unix users that actions run as: `count` numbers from `first`, each also a group.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Users {
    pub first: u32,
    pub count: u32,
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Shutdown {
    /// How long running commands may go on after SIGTERM.
    pub drain_timeout: Duration,
}

/// Layers of containment; `--check` and the log tell which are on.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Containment {
    /// The host's files read-only, temporary directories and paths of the action's own.
    pub mounts: Demand,
    /// Its own processes only.
    pub processes: Demand,
    /// System V IPC and message queues of its own.
    pub ipc: Demand,
    /// `localhost` as the host's name.
    pub hostname: Demand,
    pub network: Network,
    /// A /dev of its own.
    pub devices: Demand,
    /// Whether `hidden_paths` are.
    pub hidden: Demand,
    /// Directories and files that actions find empty; those that do not exist are passed over.
    pub hidden_paths: Vec<PathBuf>,
    /// A filter of system calls.
    pub seccomp: Demand,
    /// Lets actions make user namespaces, and use what these are for.
    pub allow_user_namespaces: bool,
    /// A control group for each action.
    pub cgroups: Demand,
}

/// Of each action; those on memory, processors and processes need controllers (cgroups(7)), and are
/// not there where the host has none.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// 0 for none. There is no swap then.
    pub memory: Size,
    /// Processors' worth of time; 0 for no limit.
    pub processors: f64,
    /// Processes and threads.
    pub processes: u64,
    /// Of standard output, and of standard error; 0 for no limit.
    pub log_size: Size,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Demand {
    /// On, if the host allows it.
    #[default]
    Auto,
    /// On; or the daemon does not start.
    Require,
    Off,
}

/// What actions can reach.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Network {
    /// A loopback interface of their own, if the host allows it.
    #[default]
    Auto,
    /// The same; or the daemon does not start.
    None,
    /// Everything that the host can reach.
    Host,
}

impl Network {
    pub fn demand(self) -> Demand {
        match self {
            Network::Auto => Demand::Auto,
            Network::None => Demand::Require,
            Network::Host => Demand::Off,
        }
    }
}

/// Written as `"host"`, `"input"`, or the absolute path of a directory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Root {
    #[default]
    Host,
    /// The action's input root.
    Input,
    /// An unpacked root file system.
    Image(PathBuf),
}

impl Root {
    pub fn image(&self) -> Option<&std::path::Path> {
        match self {
            Root::Image(path) => Some(path),
            Root::Host | Root::Input => None,
        }
    }
}

impl<'de> Deserialize<'de> for Root {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        match text.as_str() {
            "host" => Ok(Root::Host),
            "input" => Ok(Root::Input),
            path if path.len() > 1 && path.starts_with('/') => Ok(Root::Image(path.into())),
            _ => Err(serde::de::Error::custom(format!(
                "{text:?} is no root; write \"host\", \"input\", or the absolute path of a root file system"
            ))),
        }
    }
}

impl Serialize for Root {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Root::Host => serializer.serialize_str("host"),
            Root::Input => serializer.serialize_str("input"),
            Root::Image(path) => path.serialize(serializer),
        }
    }
}

impl Default for Containment {
    fn default() -> Self {
        Containment {
            mounts: Demand::Auto,
            processes: Demand::Auto,
            ipc: Demand::Auto,
            hostname: Demand::Auto,
            network: Network::Auto,
            devices: Demand::Auto,
            hidden: Demand::Auto,
            hidden_paths: [
                "/run",
                "/var/lib/bb-scheduler",
                "/var/lib/bb-worker",
                "/etc/bb-remote-execution",
            ]
            .map(PathBuf::from)
            .to_vec(),
            seccomp: Demand::Auto,
            allow_user_namespaces: false,
            cgroups: Demand::Auto,
        }
    }
}

impl Users {
    pub fn range(&self) -> std::ops::Range<u32> {
        self.first..self.first.saturating_add(self.count)
    }
}

impl Serialize for Mode {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{:04o}", self.0))
    }
}

/// Permission bits, written as `"0660"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mode(pub u32);

impl<'de> Deserialize<'de> for Mode {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        match u32::from_str_radix(&text, 8) {
            Ok(mode) if mode <= 0o777 => Ok(Mode(mode)),
            _ => Err(serde::de::Error::custom(format!(
                "{text:?} is no file mode; write permission bits in octal, such as \"0660\""
            ))),
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        Config {
            listen: ListenAddress::Unix(PathBuf::from("/run/bb-runner/runner.sock")),
            socket_mode: Mode(0o660),
            socket_group: String::new(),
            allowed_users: vec!["bb-worker".to_owned()],
            build_directory: PathBuf::from("/var/lib/bb-worker/build"),
            users: Users::default(),
            root: Root::default(),
            containment: Containment::default(),
            limits: Limits::default(),
            additional_groups: Vec::new(),
            emulator: Vec::new(),
            termination_grace: Duration::seconds(0),
            clean_temporary_directories: Vec::new(),
            run_command_cleaner: Vec::new(),
            writable_directories: Vec::new(),
            set_tmpdir_environment_variable: true,
            set_default_environment_variables: true,
            readiness_checking_pathnames: Vec::new(),
            metrics: RunnerMetrics::default(),
            control: RunnerControl::default(),
            shutdown: Shutdown::default(),
            traces: Traces::default(),
            log: Log::default(),
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            memory: Size(0),
            processors: 0.0,
            processes: 8192,
            log_size: Size::mib(100),
        }
    }
}

impl Default for Users {
    fn default() -> Self {
        Users {
            first: 58_000,
            count: 256,
        }
    }
}

impl Default for Shutdown {
    fn default() -> Self {
        Shutdown {
            drain_timeout: Duration::seconds(60),
        }
    }
}

impl Validate for Config {
    fn validate(&self, diagnostics: &mut Diagnostics) {
        self.control.validate(diagnostics);
        self.traces.validate(diagnostics);
        let mut is_wrong = |key: &str, wrong: bool, message: &str| {
            diagnostics.require(!wrong, key, message);
        };
        is_wrong(
            "listen",
            matches!(self.listen, ListenAddress::Tcp(_)),
            "callers are known by their Unix user; write a socket, such as \"unix:/run/bb-runner/runner.sock\"",
        );
        for (key, paths) in [
            ("writable_directories", &self.writable_directories),
            (
                "clean_temporary_directories",
                &self.clean_temporary_directories,
            ),
            ("containment.hidden_paths", &self.containment.hidden_paths),
            (
                "readiness_checking_pathnames",
                &self.readiness_checking_pathnames,
            ),
        ] {
            for path in paths {
                if let Some(reason) = path_error(path) {
                    is_wrong(key, true, &format!("{}: {reason}", path.display()));
                }
            }
        }
        for path in &self.clean_temporary_directories {
            let vital = directory_kind(path) == DirectoryKind::System
                || self.build_directory.starts_with(path);
            is_wrong(
                "clean_temporary_directories",
                path_error(path).is_none() && vital,
                &format!(
                    "{} would be emptied, which the host cannot be without; name a directory that \
                     holds nothing but what actions leave, such as /tmp",
                    path.display()
                ),
            );
        }
        for path in &self.writable_directories {
            is_wrong(
                "writable_directories",
                path.parent().is_none() && path.is_absolute(),
                "/ is everything; name the directories that actions share",
            );
        }
        for path in &self.containment.hidden_paths {
            let needed = [
                "/", "/usr", "/bin", "/lib", "/lib64", "/etc", "/dev", "/proc",
            ];
            is_wrong(
                "containment.hidden_paths",
                needed.iter().any(|needed| Path::new(needed) == path),
                &format!("no command runs without {}; leave it out", path.display()),
            );
        }
        for (key, command) in [
            ("emulator", &self.emulator),
            ("run_command_cleaner", &self.run_command_cleaner),
        ] {
            is_wrong(
                key,
                command.iter().any(|word| word.contains('\0')),
                "it has a NUL character",
            );
            is_wrong(
                key,
                command.first().is_some_and(String::is_empty),
                "write a program first, then its arguments; or [] for none",
            );
        }
        is_wrong(
            "limits.processes",
            self.limits.processes < 16,
            "a command and its helpers need at least 16",
        );
        is_wrong(
            "limits.processes",
            self.limits.processes > MOST_PROCESSES,
            "Linux has at most 4194304 processes; lower it",
        );
        is_wrong(
            "limits.memory",
            self.limits.memory != Size(0) && self.limits.memory < Size::mib(16),
            "no program runs in less than 16MiB; raise it, or write \"0B\" for no limit",
        );
        is_wrong(
            "limits.processors",
            !(self.limits.processors == 0.0
                || (0.01..=100_000.0).contains(&self.limits.processors)),
            "write a number such as 2.0, or 0.0 for no limit",
        );
        is_wrong(
            "root",
            self.root != Root::Host && self.containment.mounts == Demand::Off,
            "another root than the host's takes containment.mounts, which is \"off\"; switch that on",
        );
        if let Some(reason) = path_error(&self.build_directory) {
            is_wrong(
                "build_directory",
                true,
                &format!("{reason}; it is the same as the worker's build_directory"),
            );
        } else {
            is_wrong(
                "build_directory",
                directory_kind(&self.build_directory) != DirectoryKind::Ordinary,
                "the worker empties it, and others have files there; choose a directory of its own, such as /var/lib/bb-worker/build",
            );
        }
        self.users.validate(diagnostics);
    }
}

impl Users {
    fn validate(&self, diagnostics: &mut Diagnostics) {
        diagnostics.require(
            self.first >= 1000,
            "users.first",
            "numbers below 1000 belong to the system; choose a free range, such as first = 58000",
        );
        // Each running action has a thread of the runner's for itself.
        diagnostics.require(
            self.count <= MAX_USERS,
            "users.count",
            "there can be at most 500 actions at once on one host",
        );
        let end = self.first.checked_add(self.count);
        let overlaps_nobody = end.is_none_or(|end| end > 65_534 && self.first <= 65_535);
        diagnostics.require(
            self.count > 0 && !overlaps_nobody,
            "users.count",
            "the range must hold at least one user, and not reach 65534 (nobody)",
        );
        // systemd.exec(5), DynamicUser=: 61184 to 65519.
        let range = self.range();
        diagnostics.require(
            range.start > 65_519 || range.end <= 61_184 || overlaps_nobody,
            "users.first",
            "systemd gives the numbers from 61184 to 65519 to services with DynamicUser=; choose a range below or above, such as first = 58000",
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_of_processes_that_no_kernel_takes_is_an_error() {
        for (processes, is_good) in [
            (15, false),
            (16, true),
            (4_194_304, true),
            (4_194_305, false),
        ] {
            let mut config = Config::default();
            config.limits.processes = processes;
            let mut diagnostics = Diagnostics::default();
            config.validate(&mut diagnostics);
            assert_eq!(diagnostics.0.is_empty(), is_good, "{processes}");
        }
    }
}
