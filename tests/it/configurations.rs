//! Right and wrong configurations: what `--check` says of each, and what a start makes of it.
//!
//! Each one is a drop-in for a configuration that is right, in a directory of its own.

use std::{
    fs,
    os::unix::{fs::PermissionsExt, net::UnixDatagram},
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use crate::harness::{
    Daemon, Farm, free_address, is_root,
    pki::{Authority, Leaf},
};
use expect::{
    Expect::{self, Good, Refused, Waits, Warned},
    Row,
};
use runner::RUNNER;
use scheduler::SCHEDULER;
use worker::WORKER;

mod expect;
mod runner;
mod scheduler;
mod worker;

/// Put before the log of a start whose exit code is not that of a wrong configuration.
const NOT_TOLD: &str = "not EX_CONFIG:";

/// A program with its configuration, where drop-ins are put.
struct Trial<'d> {
    program: &'static str,
    directory: &'d Path,
    name: &'static str,
}

/// Killed when a row does not go as it should.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Trial<'_> {
    fn command(&self) -> Command {
        let mut command = Command::new(self.program);
        command
            .arg("--config")
            .arg(self.directory.join(format!("{}.toml", self.name)))
            .stdin(Stdio::null());
        command
    }

    /// Whether `--check` is content, and what it said on standard error.
    fn check(&self) -> (bool, String) {
        let output = self.command().arg("--check").output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        match output.status.code() {
            Some(0) => (true, said),
            Some(78) => (false, said),
            other => panic!("{other:?}: {said}"),
        }
    }

    /// Whether a start came up, and what it logged until then.
    fn start(&self) -> (bool, String) {
        let place = self.directory.join("notify");
        let _ = fs::remove_file(&place);
        let notify = UnixDatagram::bind(&place).unwrap();
        notify
            .set_read_timeout(Some(Duration::from_millis(20)))
            .unwrap();
        let log = self.directory.join("trial.log");
        let mut running = Running(
            self.command()
                .env("NOTIFY_SOCKET", &place)
                .stdout(Stdio::null())
                .stderr(fs::File::create(&log).unwrap())
                .spawn()
                .unwrap(),
        );
        let deadline = Instant::now() + Duration::from_secs(120);
        let mut buffer = [0; 4096];
        let came_up = loop {
            if let Ok(length) = notify.recv(&mut buffer)
                && String::from_utf8_lossy(&buffer[..length]).contains("READY=1")
            {
                break true;
            }
            if let Some(status) = running.0.try_wait().unwrap() {
                let log = fs::read_to_string(&log).unwrap();
                // Else systemd would start it again and again.
                let is_told = status.code() == Some(78);
                let log = if is_told {
                    log
                } else {
                    format!("{NOT_TOLD} {log}")
                };
                return (false, log);
            }
            assert!(Instant::now() < deadline, "neither ready nor gone");
        };
        if came_up {
            // SAFETY: the number is that of a child that was not waited for.
            unsafe { libc::kill(running.0.id() as i32, libc::SIGTERM) };
            running.0.wait().unwrap();
        }
        (came_up, fs::read_to_string(&log).unwrap())
    }

    /// What is not as it should be.
    fn judge(&self, text: &str, expect: Expect) -> Vec<String> {
        let drop_ins = self.directory.join(format!("{}.toml.d", self.name));
        fs::create_dir_all(&drop_ins).unwrap();
        let drop_in = drop_ins.join("50.toml");
        fs::write(&drop_in, text).unwrap();
        let mut wrong = Vec::new();
        let mut must = |right: bool, what: &str, said: &str| {
            if !right {
                wrong.push(format!("{} with {text:?}: {what}: {said}", self.name));
            }
        };
        let (good, said) = self.check();
        let (came_up, log) = self.start();
        let warns = |words: &str| {
            log.lines()
                .any(|line| line.contains("WARN") && line.contains(words))
        };
        match expect {
            Good => {
                must(good, "wrongly bad", &said);
                must(came_up, "does not start", &log);
                must(!warns(".toml"), "complains at the start", &log);
            }
            Refused(words) | Warned(words) | Waits(words) => {
                must(!good, "wrongly good", &said);
                must(said.contains(words), words, &said);
                // Where it is wrong: the drop-in and a line of it, or a key at its default.
                let place = format!("{}:", drop_in.display());
                let has_place = said.contains(&place) || matches!(expect, Waits(_));
                must(has_place, "no file and line", &said);
                for foreign in [
                    "u32",
                    "u64",
                    "usize",
                    "f64",
                    "struct ",
                    "invalid type",
                    "expected ",
                ] {
                    must(!said.contains(foreign), "not in words of people", &said);
                }
            }
        }
        match expect {
            Good => {}
            Refused(words) => {
                must(!came_up && !log.starts_with(NOT_TOLD), "starts", &log);
                must(log.contains(words), "a start says something else", &log);
            }
            Warned(words) => must(came_up && warns(words), "a start does not warn", &log),
            Waits(_) => must(came_up, "does not start", &log),
        }
        fs::remove_file(&drop_in).unwrap();
        wrong
    }

    fn judge_all(&self, rows: &[Row], fill: impl Fn(&str) -> String) {
        let wrong: Vec<String> = rows
            .iter()
            .flat_map(|(text, expect)| self.judge(&fill(text), *expect))
            .collect();
        assert!(
            wrong.is_empty(),
            "{} diagnostics:\n{}",
            wrong.len(),
            wrong.join("\n")
        );
    }
}

/// What rows name: a file, a directory to empty, a link to a vital one, one that is closed.
fn furnish(directory: &Path) {
    fs::set_permissions(directory, fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(directory.join("file"), "").unwrap();
    for name in ["clean", "build", "closed", "closed/build"] {
        fs::create_dir(directory.join(name)).unwrap();
    }
    std::os::unix::fs::symlink("/etc", directory.join("link")).unwrap();
    let closed = fs::Permissions::from_mode(0o700);
    fs::set_permissions(directory.join("closed"), closed).unwrap();
}

#[test]
fn there_are_117_configurations_and_more() {
    assert!(SCHEDULER.len() + WORKER.len() + RUNNER.len() >= 117);
}

#[test]
fn of_each_configuration_of_the_scheduler_check_says_what_a_start_makes_of_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    furnish(path);
    let held = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let busy = held.local_addr().unwrap().port().to_string();
    let [clients, workers] = [(); 2].map(|()| free_address().port().to_string());
    let dir = path.display().to_string();
    let text = format!(
        "clients.listen = \"127.0.0.1:{clients}\"\nworkers.listen = \"127.0.0.1:{workers}\"\n\
         state.listen = \"unix:{dir}/state.sock\"\n\
         web.listen = \"unix:{dir}/web.sock\"\n\
         storage.embedded.directory = \"{dir}/storage\"\nstorage.embedded.maximum_size = \"32MiB\"\n"
    );
    fs::write(path.join("bb_scheduler.toml"), text).unwrap();
    let authority = Authority::new(path, "ca");
    for (name, valid, names) in [
        ("server", (-60, 86400), &["localhost"][..]),
        ("late", (-7200, -3600), &["localhost"]),
        ("early", (3600, 7200), &["localhost"]),
        ("nameless", (-60, 86400), &[]),
    ] {
        let leaf = Leaf {
            valid,
            alternative_names: names,
            ..Default::default()
        };
        authority.issue(path, name, &leaf);
    }
    let (secret, short) = ("A".repeat(43), "A".repeat(40));
    let good = format!(r#"{{"kty":"oct","k":"{secret}"}}"#);
    let wrong = format!(r#"{{"kty":"oct","kid":"short","k":"{short}"}}"#);
    let other = format!(r#"{{"kty":"oct","k":"{secret}","use":"enc"}}"#);
    for (name, keys, mode) in [
        ("keys", &good, 0o640),
        ("open", &good, 0o644),
        ("writable", &good, 0o662),
        ("kinds", &format!("{good},{wrong}"), 0o640),
        ("useless", &other, 0o640),
    ] {
        let file = path.join(format!("{name}.json"));
        fs::write(&file, format!(r#"{{"keys":[{keys}]}}"#)).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
    }
    fs::copy(path.join("server.key"), path.join("open.key")).unwrap();
    let open = fs::Permissions::from_mode(0o644);
    fs::set_permissions(path.join("open.key"), open).unwrap();
    let trial = Trial {
        program: env!("CARGO_BIN_EXE_bb_scheduler"),
        directory: path,
        name: "bb_scheduler",
    };
    trial.judge_all(SCHEDULER, |text| {
        text.replace("{dir}", &dir)
            .replace("{clients}", &clients)
            .replace("{busy}", &busy)
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn of_each_configuration_of_the_worker_check_says_what_a_start_makes_of_it() {
    if !is_root() {
        return;
    }
    let mut farm = Farm::start(Path::new("/var/tmp"), 2, "").await;
    let limit = Duration::from_secs(60);
    farm.terminate(Daemon::Worker, limit).unwrap();
    let path = farm.path().to_owned();
    fs::write(path.join("file"), "").unwrap();
    let papers = path.join("papers/letter");
    fs::create_dir(papers.parent().unwrap()).unwrap();
    fs::write(&papers, "").unwrap();
    let (dir, clients) = (path.display().to_string(), farm.port());
    let workers = clients + 1;
    let trial = Trial {
        program: env!("CARGO_BIN_EXE_bb_worker"),
        directory: &path,
        name: "bb_worker",
    };
    tokio::task::block_in_place(|| {
        trial.judge_all(WORKER, |text| {
            text.replace("{dir}", &dir)
                .replace("{clients}", &clients.to_string())
                .replace("{workers}", &workers.to_string())
        });
    });
    assert!(papers.exists());
    assert!(!Path::new("/dev/shm/bb-unmade-build").exists());
}

#[test]
fn of_each_configuration_of_the_runner_check_says_what_a_start_makes_of_it() {
    if !is_root() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    furnish(path);
    let dir = path.display().to_string();
    let first = 2_100_000_000 + std::process::id() % 50_000 * 40;
    let text = format!(
        "listen = \"unix:{dir}/runner.sock\"\nbuild_directory = \"{dir}/build\"\n\
         allowed_users = []\nusers = {{ first = {first}, count = 8 }}\n"
    );
    fs::write(path.join("bb_runner.toml"), text).unwrap();
    let trial = Trial {
        program: env!("CARGO_BIN_EXE_bb_runner"),
        directory: path,
        name: "bb_runner",
    };
    trial.judge_all(RUNNER, |text| text.replace("{dir}", &dir));
}

#[test]
fn what_the_daemon_itself_holds_is_good_and_what_another_holds_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let free = || free_address().port();
    let text = format!(
        "clients.listen = \"127.0.0.1:{1}\"\nworkers.listen = \"unix:{0}/workers.sock\"\n\
         state.listen = \"unix:{0}/state.sock\"\n\
         web.listen = \"unix:{0}/web.sock\"\n\
         storage.embedded = {{ directory = \"{0}/storage\", maximum_size = \"32MiB\" }}\n",
        path.display(),
        free(),
    );
    for name in ["bb_scheduler.toml", "other.toml"] {
        fs::write(path.join(name), &text).unwrap();
    }
    let scheduler = |config: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bb_scheduler"));
        command.arg("--config").arg(path.join(config));
        command
    };
    let place = path.join("notify");
    let notify = UnixDatagram::bind(&place).unwrap();
    let mut running = Running(
        scheduler("bb_scheduler.toml")
            .env("NOTIFY_SOCKET", &place)
            .stderr(Stdio::null())
            .spawn()
            .unwrap(),
    );
    let mut buffer = [0; 4096];
    while let Ok(length) = notify.recv(&mut buffer) {
        if String::from_utf8_lossy(&buffer[..length]).contains("READY=1") {
            break;
        }
    }
    let output = scheduler("bb_scheduler.toml").arg("--check").output();
    let output = output.unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{output:?}");
    let process = format!("bb_scheduler (process {}", running.0.id());
    assert_eq!(said.matches(&process).count(), 5, "{said}");

    let output = scheduler("other.toml").arg("--check").output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(78), "{said}");
    assert_eq!(said.matches(&process).count(), 5, "{said}");
    assert!(
        said.contains("bb_scheduler.toml) listens there; stop it"),
        "{said}"
    );
    running.0.kill().unwrap();
}
