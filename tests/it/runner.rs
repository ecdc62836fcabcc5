//! The runner, as a worker meets it: on a Unix socket, with real processes, users and mounts.
//!
//! These tests make users of numbers that nobody else has, and so need root.

mod account;
mod command;
mod containment;
mod custom;
mod faults;
mod installed;
mod options;
mod program;

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, chown},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use bb_remote_execution::{
    config::{Endpoint, ListenAddress, runner::Config, runner::Mode, runner::Users},
    daemon::{self, Channel, Failure, Lifecycle},
    proto::{
        resourceusage::PosixResourceUsage,
        runner::{CheckReadinessRequest, RunRequest, RunResponse, runner_client::RunnerClient},
        unpack,
    },
    runner,
};
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tonic::{Code, Status};

const WORKER: u32 = 900;

/// Users that no other test has, in this process or in another one that runs now.
fn fresh_users() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    1_000_000 + std::process::id() % 50_000 * 40_000 + number * 1000
}

fn is_root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        crate::harness::skip("running commands as other users takes root");
    }
    root
}

/// A runner, its build directory, and a worker's habits.
struct Farm {
    directory: TempDir,
    first: u32,
    lifecycle: Lifecycle,
    running: JoinHandle<Result<(), Failure>>,
    client: RunnerClient<Channel>,
    slots: AtomicU32,
}

impl Farm {
    async fn start() -> Self {
        Farm::start_in("/tmp", |_| {}).await
    }

    async fn start_in(parent: &str, change: impl FnOnce(&mut Config)) -> Self {
        let directory = tempfile::tempdir_in(parent).unwrap();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let first = fresh_users();
        let mut config = configuration(directory.path(), first);
        fs::create_dir(&config.build_directory).unwrap();
        change(&mut config);
        let lifecycle = Lifecycle::new();
        let running = tokio::spawn(runner::run(config, lifecycle.clone()));
        let client = connect(directory.path()).await;
        Farm {
            directory,
            first,
            lifecycle,
            running,
            client,
            slots: AtomicU32::new(0),
        }
    }

    fn build(&self) -> PathBuf {
        self.directory.path().join("build")
    }

    fn slot(&self) -> Slot {
        let number = self.slots.fetch_add(1, Ordering::Relaxed);
        Slot::make(&self.build(), number, self.first + WORKER)
    }

    async fn run(&self, slot: &Slot, arguments: &[&str]) -> Result<Ended, Status> {
        self.send(slot.request(arguments), slot).await
    }

    async fn sh(&self, script: &str) -> Ended {
        let slot = self.slot();
        self.run(&slot, &["/bin/sh", "-c", script]).await.unwrap()
    }

    async fn send(&self, request: RunRequest, slot: &Slot) -> Result<Ended, Status> {
        let response = self.client.clone().run(request).await?.into_inner();
        Ok(Ended::new(&response, slot))
    }

    fn processes(&self) -> Vec<i32> {
        processes(self.first..self.first + 8)
    }

    async fn stop(self) {
        self.lifecycle.stop();
        self.running.await.unwrap().unwrap();
        assert_eq!(processes(self.first..self.first + 8), [0i32; 0]);
        assert_eq!(groups(self.first), Vec::<PathBuf>::new());
    }
}

fn configuration(directory: &Path, first: u32) -> Config {
    Config {
        listen: ListenAddress::Unix(directory.join("runner.sock")),
        allowed_users: vec![(first + WORKER).to_string()],
        build_directory: directory.join("build"),
        users: Users { first, count: 8 },
        ..Config::default()
    }
}

async fn connect(directory: &Path) -> RunnerClient<Channel> {
    let socket = directory.join("runner.sock");
    let client = RunnerClient::new(daemon::connect(&Endpoint::Unix(socket)));
    for _ in 0..500 {
        let request = CheckReadinessRequest::default();
        match client.clone().check_readiness(request).await {
            // A connection also breaks when it is to a runner that was killed, whose socket lives on for a moment
            // in a process that it was just making.
            Err(status)
                if status.code() == Code::Unavailable
                    || std::error::Error::source(&status).is_some() =>
            {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            _ => return client,
        }
    }
    panic!("the runner does not answer");
}

/// What a worker makes for one action.
struct Slot {
    name: String,
    path: PathBuf,
}

impl Slot {
    fn make(build: &Path, number: u32, worker: u32) -> Self {
        let name = number.to_string();
        let path = build.join(&name);
        for (directory, mode) in [
            ("", 0o700),
            ("root", 0o777),
            ("tmp", 0o777),
            ("server_logs", 0o777),
        ] {
            let directory = path.join(directory);
            fs::create_dir(&directory).unwrap();
            fs::set_permissions(&directory, fs::Permissions::from_mode(mode)).unwrap();
            chown(&directory, Some(worker), Some(worker)).unwrap();
        }
        Slot { name, path }
    }

    fn request(&self, arguments: &[&str]) -> RunRequest {
        RunRequest {
            arguments: arguments.iter().map(|text| text.to_string()).collect(),
            environment_variables: BTreeMap::from([(
                "PATH".to_owned(),
                "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin".to_owned(),
            )]),
            working_directory: String::new(),
            stdout_path: format!("{}/stdout", self.name),
            stderr_path: format!("{}/stderr", self.name),
            input_root_directory: format!("{}/root", self.name),
            temporary_directory: format!("{}/tmp", self.name),
            server_logs_directory: format!("{}/server_logs", self.name),
        }
    }

    fn input(&self, name: &str, content: &[u8], mode: u32) {
        let path = self.path.join("root").join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    }
}

#[derive(Debug)]
struct Ended {
    code: i64,
    usage: PosixResourceUsage,
    /// What the control group says; truths are 1. Empty where there is none.
    group: BTreeMap<String, f64>,
    stdout: String,
    stderr: String,
    /// Empty where there is none.
    server_log: String,
}

impl Ended {
    fn new(response: &RunResponse, slot: &Slot) -> Self {
        let text =
            |name| String::from_utf8_lossy(&fs::read(slot.path.join(name)).unwrap()).into_owned();
        Ended {
            code: response.exit_code,
            usage: unpack(&response.resource_usage[0]).unwrap(),
            group: response
                .resource_usage
                .get(1)
                .map_or_else(BTreeMap::new, figures),
            stdout: text("stdout"),
            stderr: text("stderr"),
            server_log: fs::read_to_string(slot.path.join("server_logs/bb_runner.log"))
                .unwrap_or_default(),
        }
    }
}

/// Of a google.protobuf.Struct.
fn figures(message: &prost_types::Any) -> BTreeMap<String, f64> {
    use prost_types::value::Kind;
    assert!(message.type_url.ends_with("google.protobuf.Struct"));
    let figures: prost_types::Struct = prost::Message::decode(&*message.value).unwrap();
    let figure = |value: prost_types::Value| match value.kind {
        Some(Kind::NumberValue(number)) => number,
        Some(Kind::BoolValue(truth)) => f64::from(u8::from(truth)),
        other => panic!("{other:?}"),
    };
    let fields = figures.fields.into_iter();
    fields.map(|(name, value)| (name, figure(value))).collect()
}

/// Of these users, zombies aside.
fn processes(users: std::ops::Range<u32>) -> Vec<i32> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        let status = fs::read_to_string(entry.path().join("status")).unwrap_or_default();
        let field = |name| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            line.split_whitespace().next()
        };
        let user = field("Uid:").and_then(|uid| uid.parse::<u32>().ok());
        if user.is_some_and(|user| users.contains(&user)) && field("State:") != Some("Z") {
            found.push(pid);
        }
    }
    found
}

/// Control groups of the runner with these users.
fn groups(first: u32) -> Vec<PathBuf> {
    let name = format!("bb-runner-{first}");
    walkdir::WalkDir::new("/sys/fs/cgroup")
        .max_depth(8)
        .into_iter()
        .filter_entry(|entry| entry.file_type().is_dir())
        .flatten()
        .filter(|entry| entry.file_name().to_str() == Some(&name))
        .map(|entry| entry.into_path())
        .collect()
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "not so after 20 s: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
