//! What `--check` does: it reads the configuration as a start does, tries what a start needs, and
//! tells all of it. Nothing is started or changed.
//!
//! 1. What is refused here, a start refuses too, or it warns of it in the same words.
//! 2. What is good here, a start does not complain of.

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use super::{
    CheckReport, Failure,
    logging::print_error,
    owner::{self, Owner},
    process::{EX_CONFIG, Program},
    systemd_unit::SystemdUnits,
};
use crate::config::{self, Diagnostics, ExplicitKeys, ListenAddress, Loaded, Validate};

/// Whose configuration is looked at, where it lies, and on what host.
#[derive(Clone, Debug)]
pub struct Installation {
    /// The program's name.
    pub program: &'static str,
    /// Where the configuration lies.
    pub path: PathBuf,
    /// The path is the one that the program's unit uses.
    pub is_default: bool,
    /// The path is the one that this instance of the program's template unit uses.
    pub instance: Option<String>,
    /// The keys that its files give.
    pub table: toml::Table,
    /// The units of the host.
    pub units: SystemdUnits,
}

impl Installation {
    /// Of a configuration that lies at `path`, not where the program's unit looks for it.
    pub fn of<C: Validate>(program: &'static str, path: &Path, loaded: &Loaded<C>) -> Self {
        Installation {
            program,
            path: path.to_owned(),
            is_default: false,
            instance: None,
            table: loaded.table.clone(),
            units: SystemdUnits::of(Path::new("/")),
        }
    }

    /// Of a configuration that lies where one of this host's units looks for it, if it does.
    pub fn with_units_in(mut self, directory: &Path) -> Self {
        let default = directory.join(format!("{}.toml", self.program));
        self.is_default = owner::is_same_file(&self.path, &default);
        let path = fs::canonicalize(&self.path).unwrap_or_else(|_| self.path.clone());
        let is_there = path
            .parent()
            .is_some_and(|parent| owner::is_same_file(parent, directory));
        self.instance = path
            .file_stem()
            .and_then(|stem| stem.to_str()?.strip_prefix(self.program)?.strip_prefix('@'))
            .filter(|instance| is_there && !instance.is_empty())
            .map(str::to_owned);
        self
    }

    /// The unit that reads this configuration, where `unit` is the one that reads the default's.
    fn unit(&self, unit: &str) -> Option<String> {
        match &self.instance {
            Some(instance) => unit
                .rsplit_once('.')
                .map(|(name, kind)| format!("{name}@{instance}.{kind}")),
            None => self.is_default.then(|| unit.to_owned()),
        }
    }

    fn service(&self) -> String {
        format!("{}.service", self.program.replace('_', "-"))
    }

    /// The keys that its files give, rather than their defaults.
    pub fn explicit_keys(&self) -> ExplicitKeys<'_> {
        ExplicitKeys(&self.table)
    }

    fn listener(&self, address: &ListenAddress) -> Owner {
        owner::of_listener(address, |owner| self.is_daemon(owner))
    }

    /// Whether that is the daemon which runs with this configuration.
    fn is_daemon(&self, owner: &Owner) -> bool {
        owner.is_daemon(self.program, &self.path, self.is_default)
    }

    /// The configuration of another of the three programs, if it lies beside this one and is right.
    pub fn sibling<C: Validate>(&self, program: &str) -> Option<C> {
        let path = self.path.with_file_name(format!("{program}.toml"));
        config::load(&path, false).ok()
    }

    /// The unit's time to stop, if it is not for ever: that of this host's unit, else the shipped one's.
    pub fn stop_timeout(&self) -> Option<std::time::Duration> {
        use super::systemd_unit::StopTimeout;
        let unit = self.unit(&self.service());
        match unit.and_then(|unit| self.units.stop_timeout(&unit)) {
            Some(StopTimeout::Infinite) => None,
            Some(StopTimeout::After(limit)) => Some(limit),
            None => Some(SHIPPED_STOP_TIMEOUT),
        }
    }

    /// What `shutdown.drain_timeout` must be shorter than, by some seconds.
    pub fn check_drain(
        &self,
        drain: config::Duration,
        more: config::Duration,
        diagnostics: &mut Diagnostics,
    ) {
        if let Some(limit) = self.stop_timeout()
            && drain.get() + more.get() >= limit
        {
            let unit = self.program.replace('_', "-");
            let (key, sum) = match more.get().is_zero() {
                true => ("shutdown.drain_timeout", String::new()),
                false => (
                    "shutdown.drain_timeout",
                    format!(" together with termination_grace, {more},"),
                ),
            };
            diagnostics.add(
                key,
                format!(
                    "{drain}{sum} is not shorter than the {} that systemd gives the daemon to stop, \
                     so that it would be killed; lower it, or raise TimeoutStopSec= with \"systemctl \
                     edit {unit}.service\"",
                    config::Duration(limit)
                ),
            );
        }
    }
}

/// As in packaging/systemd; a test compares them.
pub const SHIPPED_STOP_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(90);

impl CheckReport {
    /// Whether this program can listen at an address, or does already, or systemd does for it.
    pub fn try_address(
        &mut self,
        installation: &Installation,
        unit: &str,
        key: &'static str,
        address: &ListenAddress,
    ) {
        if installation.units.are_in_use()
            && let Some(service) = installation.unit(&installation.service())
            && installation
                .units
                .setting(&service, "Service", "ExecStart")
                .is_some()
            && let Some(unit) = installation.unit(unit)
            && let Some(sockets) = installation.units.listens(&unit)
        {
            return self.try_sockets(installation, &unit, key, address, &sockets);
        }
        match super::listen::try_to_bind(address) {
            Ok(()) => self.good(format!("{key}: {address} is free")),
            Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
                let owner = installation.listener(address);
                if installation.is_daemon(&owner) {
                    self.good(format!(
                        "{key}: {address}, which {owner} listens on already"
                    ));
                } else {
                    self.fail(super::listen::not_listening(key, address, &error));
                }
            }
            Err(error) => self.fail(super::listen::not_listening(key, address, &error)),
        }
    }

    /// What systemd is to listen on in place of `address`.
    fn try_sockets(
        &mut self,
        installation: &Installation,
        unit: &str,
        key: &'static str,
        address: &ListenAddress,
        sockets: &[ListenAddress],
    ) {
        let written: Vec<String> = sockets.iter().map(ToString::to_string).collect();
        let written = written.join(" and ");
        if installation.explicit_keys().contains(key) && !sockets.contains(address) {
            let message = overridden(address, unit, &written);
            return self.fail(Failure::Configuration { key, message });
        }
        for socket in sockets {
            match super::listen::try_to_bind(socket) {
                Ok(()) => self.note(format!(
                    "{unit} does not listen on {socket}; systemctl start {unit}"
                )),
                Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
                    let owner = installation.listener(socket);
                    let is_right = match &owner {
                        Owner::Systemd | Owner::Unknown(None | Some(0)) => true,
                        Owner::Process(_) => installation.is_daemon(&owner),
                        Owner::Unknown(Some(_)) => false,
                    };
                    match is_right {
                        true => self.good(format!("{key}: {unit} listens on {socket}")),
                        false => self.fail(super::listen::not_listening(key, socket, &error)),
                    }
                }
                // Of another user, or not there yet; systemd may do more than this user.
                Err(_) => self.good(format!("{key}: {unit} is to listen on {socket}")),
            }
        }
    }

    /// A lock that a running daemon has on one of its directories.
    pub fn try_lock(&mut self, installation: &Installation, key: &'static str, locked: &Path) {
        use rustix::fs::{FlockOperation, flock};
        let Ok(file) = std::fs::File::open(locked) else {
            return;
        };
        if flock(&file, FlockOperation::NonBlockingLockShared).is_ok() {
            return;
        }
        drop(file);
        let owner = owner::of_lock(locked);
        let shown = locked.display();
        if installation.is_daemon(&owner) {
            self.good(format!("{key}: {shown} is in use by {owner}"));
        } else {
            self.fail(Failure::Configuration {
                key,
                message: format!(
                    "{shown} is in use by {owner}; stop that, or choose a directory of its own"
                ),
            });
        }
    }
}

/// Of an address that does nothing, since systemd listens elsewhere.
pub(super) fn overridden(address: &ListenAddress, unit: &str, sockets: &str) -> String {
    format!(
        "{address} is not used, because systemd listens on {sockets} instead, for {unit}; change that \
         with \"systemctl edit {unit}\", and leave this key out"
    )
}

/// The whole of `--check`.
pub(super) fn run<C: Validate>(
    program: &Program,
    installation: &Installation,
    loaded: &Loaded<C>,
    warnings: fn(&C, &Installation, &mut Diagnostics),
    probe: impl AsyncFnOnce(&C, &Installation, &mut CheckReport),
) -> ExitCode {
    let name = program.name;
    println!("{name} {}", env!("CARGO_PKG_VERSION"));
    for file in &loaded.files {
        println!("  read   {}", file.display());
    }
    for file in &loaded.ignored_files {
        println!(
            "  note   {} is passed over: the names of drop-ins end in .toml",
            file.display()
        );
    }
    if loaded.files.is_empty() && loaded.is_toml {
        println!(
            "  note   there is no {}: every key has its default",
            installation.path.display()
        );
    }
    let mut errors: Vec<String> = loaded.errors.iter().map(ToString::to_string).collect();
    let mut failed = false;
    // Of a file that is no TOML nothing is known.
    if loaded.is_toml {
        let mut diagnostics = Diagnostics::default();
        warnings(&loaded.config, installation, &mut diagnostics);
        errors.extend(
            diagnostics
                .into_errors(&installation.path)
                .iter()
                .map(ToString::to_string),
        );
        let report = match tokio::runtime::Runtime::new() {
            Ok(runtime) => {
                let mut report = CheckReport::default();
                runtime.block_on(probe(&loaded.config, installation, &mut report));
                report
            }
            Err(error) => {
                print_error(name, &format!("could not start threads: {error}"));
                return ExitCode::FAILURE;
            }
        };
        for good in &report.good {
            println!("  good   {good}");
        }
        for note in &report.notes {
            println!("  note   {note}");
        }
        for failure in &report.failures {
            let text = match failure {
                Failure::Configuration { key, message } => {
                    config::at_key(&installation.path, key, message.clone()).to_string()
                }
                Failure::Environment { message } => message.clone(),
            };
            if !errors.contains(&text) {
                errors.push(text);
            }
        }
        failed = !report.failures.is_empty();
    }
    for error in &errors {
        print_error(name, error);
    }
    match errors.len() {
        0 => {
            println!("{name}: {} is good", installation.path.display());
            return ExitCode::SUCCESS;
        }
        1 => print_error(name, "1 error"),
        count => print_error(name, &format!("{count} errors")),
    }
    if !loaded.errors.is_empty() || !failed {
        print_error(name, &format!("All keys are described in {name}.toml(5)."));
    }
    ExitCode::from(EX_CONFIG)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_belongs_to_the_unit_that_reads_it() {
        let directory = tempfile::tempdir().unwrap();
        let other = tempfile::tempdir().unwrap();
        let unit = |directory: &Path, path: &Path| {
            let installation = Installation {
                program: "bb_runner",
                path: path.to_owned(),
                is_default: false,
                instance: None,
                table: toml::Table::new(),
                units: SystemdUnits::of(directory),
            };
            installation
                .with_units_in(directory)
                .unit("bb-runner.socket")
        };
        let [default, instance, stranger] = ["bb_runner", "bb_runner@network", "my_runner"]
            .map(|name| directory.path().join(format!("{name}.toml")));
        for path in [&default, &instance, &stranger] {
            fs::write(path, "").unwrap();
        }
        let named = |name: &str| Some(name.to_owned());
        assert_eq!(unit(directory.path(), &default), named("bb-runner.socket"));
        assert_eq!(
            unit(directory.path(), &instance),
            named("bb-runner@network.socket")
        );
        assert_eq!(unit(directory.path(), &stranger), None);
        assert_eq!(unit(other.path(), &default), None);
        assert_eq!(unit(other.path(), &instance), None);
    }
}
