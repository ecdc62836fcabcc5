//! What would keep a runner from working, for `--check`, and what is wrong although it works; also
//! the check of directories that are emptied, without which the daemon does not start.

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

use super::{
    build_directory::{first_impassable, impassable_message},
    host_requirements::{
        check_capabilities, check_users, resolve_groups, resolve_users, socket_group, unknown_user,
    },
    sandbox,
};
use crate::{
    config::{
        self, Diagnostics, DirectoryKind, directory_kind,
        runner::{Config, Root},
    },
    daemon::{CheckReport, Failure, Installation, disk},
};

const UNIT: &str = "bb-runner.socket";
const LISTEN: &str = "listen";

/// Adds what is wrong although the daemon goes on with it.
pub fn warnings(config: &Config, installation: &Installation, diagnostics: &mut Diagnostics) {
    let drain = config.shutdown.drain_timeout;
    installation.check_drain(drain, config.termination_grace, diagnostics);
    installation.check_socket("runner", UNIT, LISTEN, &config.listen, diagnostics);
    let build = &config.build_directory;
    installation.check_size(
        "limits.log_size",
        config.limits.log_size,
        build,
        diagnostics,
    );
    if let Some(reason) = unreachable(config) {
        diagnostics.add("socket_mode", reason);
    }
    for path in &config.writable_directories {
        diagnostics.require(
            path.is_dir(),
            "writable_directories",
            format!(
                "there is no directory {}; create it, or leave it out",
                path.display()
            ),
        );
    }
    check_cleaning(config, diagnostics);
    if let Root::Image(image) = &config.root {
        check_image(image, build, diagnostics);
    }
    if let Some(program) = config.emulator.first() {
        let reason = match program.starts_with('/') {
            true => not_executable(Path::new(program)),
            false => Some("write its whole path, which begins with /".to_owned()),
        };
        if let Some(reason) = reason {
            diagnostics.add("emulator", format!("{program}: {reason}"));
        }
    }
    if let Some(worker) = installation.sibling::<config::worker::Config>("bb_worker") {
        check_worker(config, &worker, diagnostics);
    }
}

/// Adds what is wrong with the directories that are emptied, and with the command that is run.
fn check_cleaning(config: &Config, diagnostics: &mut Diagnostics) {
    let key = "clean_temporary_directories";
    for path in &config.clean_temporary_directories {
        // Refused without a look at the host.
        if directory_kind(path) == DirectoryKind::System {
            continue;
        }
        if fs::read_dir(path).is_err() {
            diagnostics.add(
                key,
                format!(
                    "there is no directory {}; create it, or leave it out",
                    path.display()
                ),
            );
        }
    }
    if let Some(program) = config.run_command_cleaner.first() {
        let path = std::env::var("PATH").unwrap_or_default();
        let found = match program.contains('/') {
            true => not_executable(Path::new(program)),
            false => std::env::split_paths(&path)
                .map(|directory| directory.join(program))
                .all(|file| not_executable(&file).is_some())
                .then(|| format!("there is no such program in {path}; write its whole path")),
        };
        if let Some(reason) = found {
            diagnostics.add("run_command_cleaner", format!("{program}: {reason}"));
        }
    }
}

/// A directory that would be emptied although the host cannot be without what is there, or a person.
pub(super) fn check_cleaned_directories(config: &Config) -> Option<Failure> {
    let homes = homes(&fs::read_to_string("/etc/passwd").unwrap_or_default());
    config
        .clean_temporary_directories
        .iter()
        .filter(|path| directory_kind(path) != DirectoryKind::System)
        .filter_map(|path| Some((path, fs::canonicalize(path).ok()?)))
        .find_map(|(path, real)| {
            let (shown, home) = (path.display(), homes.iter().find(|home| home.starts_with(&real)));
            Some(match home {
                _ if directory_kind(&real) == DirectoryKind::System => format!(
                    "{shown} leads to {}, which the host cannot be without; it would be emptied",
                    real.display()
                ),
                Some(home) => format!(
                    "{shown} would be emptied, and the home of a user is there, {}; choose another directory",
                    home.display()
                ),
                None => return None,
            })
        })
        .map(|message| Failure::Configuration {
            key: "clean_temporary_directories",
            message,
        })
}

/// The homes of people who can log in, and root's, by the text of passwd(5), where links lead to. Daemons' homes
/// are left out, as they are often /, or do not exist.
fn homes(users: &str) -> Vec<PathBuf> {
    users
        .lines()
        .filter_map(|line| {
            let fields: Vec<&str> = line.split(':').collect();
            let number: u32 = fields.get(2)?.parse().ok()?;
            let home = PathBuf::from(fields.get(5)?);
            let home = fs::canonicalize(&home).unwrap_or(home);
            let real = home.parent().is_some() && home.is_dir();
            (number == 0 || (1000..60_000).contains(&number) && real).then_some(home)
        })
        .collect()
}

/// Why a file is not a program that can be run; `None` if it is one.
fn not_executable(path: &Path) -> Option<String> {
    match fs::metadata(path) {
        Err(error) => Some(format!("could not be found: {error}")),
        Ok(metadata) if !metadata.is_file() => Some("is no program".to_owned()),
        Ok(metadata) if metadata.permissions().mode() & 0o111 == 0 => {
            Some("is not executable; chmod +x it".to_owned())
        }
        Ok(_) => None,
    }
}

/// Adds what a root file system lacks.
fn check_image(image: &Path, build: &Path, diagnostics: &mut Diagnostics) {
    if !image.is_dir() {
        diagnostics.add(
            "root",
            format!(
                "there is no directory {}; unpack a root file system there, or write \"host\"",
                image.display()
            ),
        );
        return;
    }
    let below = build.strip_prefix("/").unwrap_or(build);
    for needed in ["proc", "sys", "dev", "tmp"]
        .map(Path::new)
        .into_iter()
        .chain([below])
    {
        diagnostics.require(
            image.join(needed).is_dir(),
            "root",
            format!(
                "{} must have a directory {}",
                image.display(),
                needed.display()
            ),
        );
    }
}

/// Why nobody but root can connect, although others are to be served.
fn unreachable(config: &Config) -> Option<String> {
    const WRITE_GROUP: u32 = 0o020;
    const WRITE_OTHERS: u32 = 0o002;
    let (allowed, _) = resolve_users(&config.allowed_users);
    let own = nix::unistd::geteuid().as_raw();
    let other = allowed
        .into_iter()
        .find(|user| *user != own && *user != 0)?;
    (config.socket_mode.0 & (WRITE_GROUP | WRITE_OTHERS) == 0).then(|| {
        format!(
            "with \"{:04o}\" user {other}, of allowed_users, cannot connect; write \"0660\", and set \
             socket_group to a group of that user",
            config.socket_mode.0
        )
    })
}

/// Adds where this configuration and that of the worker in the same directory contradict each other, although each
/// is right by itself.
fn check_worker(config: &Config, worker: &config::worker::Config, diagnostics: &mut Diagnostics) {
    let ours: Vec<_> = worker
        .runners
        .iter()
        .filter(|runner| runner.endpoint.is_at(&config.listen))
        .collect();
    if ours.is_empty() {
        return;
    }
    diagnostics.require(
        worker.build_directory == config.build_directory,
        "build_directory",
        format!(
            "bb_worker.toml has {}; give both the same build_directory",
            worker.build_directory.display()
        ),
    );
    let slots: usize = ours.iter().map(|runner| runner.slots()).sum();
    diagnostics.require(
        slots <= config.users.count as usize,
        "users.count",
        format!(
            "bb_worker.toml asks for {slots} actions at a time, each of which needs a user; raise it, or lower runners.concurrency there"
        ),
    );
}

/// Reports what would keep the daemon from starting on this host, or from running actions.
pub async fn check_host(config: &Config, installation: &Installation, report: &mut CheckReport) {
    match check_capabilities() {
        Err(failure) => report.fail(failure),
        Ok(()) => report.record(
            "containment: what is required can be had",
            sandbox::check(config),
        ),
    }
    let range = config.users.range();
    // That there is none is told elsewhere.
    if !range.is_empty() {
        report.record(
            format!(
                "users: {} to {} are nobody else's",
                range.start,
                range.end - 1
            ),
            check_users(config).err(),
        );
    }
    let (_, unknown) = resolve_users(&config.allowed_users);
    report.record(
        "allowed_users: all of them exist",
        unknown.into_iter().map(unknown_user),
    );
    for failure in [
        socket_group(config).err(),
        resolve_groups(&config.additional_groups).err(),
    ]
    .into_iter()
    .flatten()
    {
        report.fail(failure);
    }
    report.try_address(installation, UNIT, LISTEN, &config.listen);
    check_build_directory(config, report);
    if let Some(failure) = check_cleaned_directories(config) {
        report.fail(failure);
    }
    for path in &config.readiness_checking_pathnames {
        let missing = fs::metadata(path)
            .err()
            .map(|error| Failure::Configuration {
                key: "readiness_checking_pathnames",
                message: format!("could not find {}: {error}", path.display()),
            });
        report.record(
            format!("readiness_checking_pathnames: {} is there", path.display()),
            missing,
        );
    }
}

/// Reports what would keep actions' users from reaching the build directory.
fn check_build_directory(config: &Config, report: &mut CheckReport) {
    let key = "build_directory";
    let mut wrong = Vec::new();
    match fs::metadata(&config.build_directory) {
        Ok(metadata) if metadata.is_dir() => {}
        Ok(metadata) => wrong.push(format!(
            "{} is no directory (mode {:o})",
            config.build_directory.display(),
            metadata.mode()
        )),
        Err(error) => wrong.push(format!(
            "could not find {}: {error}; bb_worker makes it, or give the same build_directory as in \
             bb_worker.toml",
            config.build_directory.display()
        )),
    }
    if let Some(directory) = first_impassable(&config.build_directory) {
        wrong.push(impassable_message(&directory));
    }
    if let Some(disk) = disk::space(&config.build_directory)
        && disk.total < config.limits.log_size.get()
    {
        report.note(format!(
            "limits.log_size is larger than the whole disk, {}",
            disk::rounded_to_mib(disk.total)
        ));
    }
    report.record(
        format!(
            "{key}: the users of actions can pass to {}",
            config.build_directory.display()
        ),
        wrong
            .into_iter()
            .map(|message| Failure::Configuration { key, message }),
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn homes_are_found_where_links_lead_to() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().canonicalize().unwrap();
        fs::create_dir_all(root.join("data/homes/ann")).unwrap();
        std::os::unix::fs::symlink(root.join("data/homes"), root.join("home")).unwrap();
        let home = root.join("home");
        let users = format!(
            "ann:x:1000:1000::{0}/ann:/bin/sh\nbob:x:1001:1001::{0}/gone:/bin/sh\nd:x:100:100::{0}/ann:/bin/sh\n",
            home.display()
        );
        assert_eq!(homes(&users), [root.join("data/homes/ann")]);
    }
}
