//! The runner alone: what it takes to run /bin/true, with every layer of containment and without.
//!
//! usage: cargo bench --bench farm -- runs [COUNT | debris [COUNT]]
//!
//! `debris` runs actions that each leave a process and files, and tells what has grown.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, chown},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use bb_remote_execution::{
    config::{
        Endpoint, ListenAddress,
        runner::{Config, Demand, Network, Users},
    },
    daemon::{self, Channel, Lifecycle},
    proto::runner::{CheckReadinessRequest, RunRequest, runner_client::RunnerClient},
    runner,
};

use crate::harness::is_root;

/// Far from the users of tests and of packages.
const FIRST_USER: u32 = 1_900_000_000;

type Change = fn(&mut Config);

const CONFIGURATIONS: [(&str, Change); 11] = [
    ("every layer", |_| {}),
    ("no mounts", |config| {
        config.containment.mounts = Demand::Off;
    }),
    ("no processes", |config| {
        config.containment.processes = Demand::Off;
    }),
    ("no ipc", |config| config.containment.ipc = Demand::Off),
    ("no hostname", |config| {
        config.containment.hostname = Demand::Off;
    }),
    ("network of the host", |config| {
        config.containment.network = Network::Host;
    }),
    ("no devices", |config| {
        config.containment.devices = Demand::Off;
    }),
    ("no hidden paths", |config| {
        config.containment.hidden = Demand::Off;
    }),
    ("no seccomp", |config| {
        config.containment.seccomp = Demand::Off;
    }),
    ("no cgroups", |config| {
        config.containment.cgroups = Demand::Off;
    }),
    ("users only", |config| {
        let containment = &mut config.containment;
        for layer in [
            &mut containment.mounts,
            &mut containment.ipc,
            &mut containment.hostname,
            &mut containment.seccomp,
            &mut containment.cgroups,
        ] {
            *layer = Demand::Off;
        }
        containment.network = Network::Host;
    }),
];

pub fn run(arguments: &[String]) {
    if !is_root() {
        return;
    }
    let number = |index: usize, default: usize| {
        arguments
            .get(index)
            .and_then(|text| text.parse().ok())
            .unwrap_or(default)
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    if arguments.first().is_some_and(|first| first == "debris") {
        runtime.block_on(debris(number(1, 10_000)));
        return;
    }
    let count = number(0, 1000);
    println!("Run of /bin/true by a worker's call, action directory and logs included");
    println!(
        "{:>20} {:>9} {:>9} {:>12} {:>12}",
        "", "p50 ms", "p99 ms", "1: actions/s", "8: actions/s"
    );
    for (index, (name, change)) in CONFIGURATIONS.into_iter().enumerate() {
        runtime.block_on(async {
            let bench = Bench::start(FIRST_USER + index as u32 * 100, change).await;
            bench.drive(50, 1, &["/bin/true"]).await;
            let began = Instant::now();
            let mut times = bench.drive(count, 1, &["/bin/true"]).await;
            let alone = count as f64 / began.elapsed().as_secs_f64();
            let began = Instant::now();
            bench.drive(count * 2, 8, &["/bin/true"]).await;
            let together = (count * 2) as f64 / began.elapsed().as_secs_f64();
            times.sort();
            let at = |percent: usize| times[times.len() * percent / 100].as_secs_f64() * 1e3;
            println!(
                "{name:>20} {:>9.2} {:>9.2} {alone:>12.0} {together:>12.0}",
                at(50),
                at(99)
            );
            bench.stop().await;
        });
    }
}

struct Bench {
    directory: tempfile::TempDir,
    first: u32,
    lifecycle: Lifecycle,
    running: tokio::task::JoinHandle<Result<(), daemon::Failure>>,
    client: RunnerClient<Channel>,
}

impl Bench {
    async fn start(first: u32, change: Change) -> Bench {
        let directory = tempfile::tempdir_in("/var/tmp").unwrap();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let socket = directory.path().join("runner.sock");
        let mut config = Config {
            listen: ListenAddress::Unix(socket.clone()),
            allowed_users: vec![(first + 90).to_string()],
            build_directory: directory.path().join("build"),
            users: Users { first, count: 16 },
            ..Config::default()
        };
        fs::create_dir(&config.build_directory).unwrap();
        change(&mut config);
        let lifecycle = Lifecycle::new();
        let running = tokio::spawn(runner::run(config, lifecycle.clone()));
        let client = RunnerClient::new(daemon::connect(&Endpoint::Unix(socket)));
        while client
            .clone()
            .check_readiness(CheckReadinessRequest::default())
            .await
            .is_err_and(|status| status.code() == tonic::Code::Unavailable)
        {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Bench {
            directory,
            first,
            lifecycle,
            running,
            client,
        }
    }

    /// How long each of `count` actions took, `at_once` at a time.
    async fn drive(&self, count: usize, at_once: usize, arguments: &[&str]) -> Vec<Duration> {
        let mut drivers = Vec::new();
        for slot in 0..at_once {
            let directory = self.action_directory(slot);
            let request = request(slot, arguments);
            let mut client = self.client.clone();
            drivers.push(tokio::spawn(async move {
                let mut times = Vec::new();
                for _ in 0..count / at_once {
                    let request = request.clone();
                    let began = Instant::now();
                    client.run(request).await.unwrap();
                    times.push(began.elapsed());
                    for log in ["stdout", "stderr"] {
                        fs::remove_file(directory.join(log)).unwrap();
                    }
                }
                times
            }));
        }
        let mut times = Vec::new();
        for driver in drivers {
            times.extend(driver.await.unwrap());
        }
        times
    }

    fn action_directory(&self, slot: usize) -> PathBuf {
        let directory = self.directory.path().join("build").join(slot.to_string());
        for (name, mode) in [("", 0o700), ("root", 0o777), ("tmp", 0o777)] {
            let path = directory.join(name);
            fs::create_dir_all(&path).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            chown(&path, Some(self.first + 90), Some(self.first + 90)).unwrap();
        }
        directory
    }

    async fn stop(self) {
        self.lifecycle.stop();
        self.running.await.unwrap().unwrap();
    }
}

fn request(slot: usize, arguments: &[&str]) -> RunRequest {
    RunRequest {
        arguments: arguments.iter().map(|text| (*text).to_owned()).collect(),
        environment_variables: [("PATH".to_owned(), "/usr/bin:/bin".to_owned())].into(),
        working_directory: String::new(),
        stdout_path: format!("{slot}/stdout"),
        stderr_path: format!("{slot}/stderr"),
        input_root_directory: format!("{slot}/root"),
        temporary_directory: format!("{slot}/tmp"),
        server_logs_directory: String::new(),
    }
}

/// What could grow, of this process and of the host.
#[derive(Debug)]
#[expect(dead_code, reason = "other tests use the rest")]
struct Footprint {
    resident_kib: u64,
    descriptors: usize,
    threads: usize,
    mounts: usize,
    cgroups: usize,
    processes: usize,
    shared_memory_files: usize,
    temporary_files: usize,
}

impl Footprint {
    fn take(users: std::ops::Range<u32>) -> Footprint {
        use std::os::unix::fs::MetadataExt;
        let entries = |path: &str| fs::read_dir(path).map_or(0, |entries| entries.count());
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let resident = status.lines().find(|line| line.starts_with("VmRSS:"));
        Footprint {
            resident_kib: resident
                .and_then(|line| line.split_whitespace().nth(1)?.parse().ok())
                .unwrap_or(0),
            descriptors: entries("/proc/self/fd"),
            threads: entries("/proc/self/task"),
            mounts: fs::read_to_string("/proc/self/mountinfo")
                .unwrap()
                .lines()
                .count(),
            cgroups: walkdir::WalkDir::new(Path::new("/sys/fs/cgroup"))
                .into_iter()
                .flatten()
                .filter(|entry| entry.file_type().is_dir())
                .filter(|entry| entry.path().to_string_lossy().contains("bb-runner-19"))
                .count(),
            processes: fs::read_dir("/proc")
                .unwrap()
                .flatten()
                .filter(|entry| entry.metadata().is_ok_and(|it| users.contains(&it.uid())))
                .count(),
            shared_memory_files: entries("/dev/shm"),
            temporary_files: entries("/tmp"),
        }
    }
}

async fn debris(count: usize) {
    let first = FIRST_USER + 5000;
    let bench = Bench::start(first, |_| {}).await;
    let script = "(setsid sleep 1000 &) ; echo x > /tmp/debris; echo x > /dev/shm/debris; \
                  rm -f debris; echo x > debris; ipcmk -M 4096 >/dev/null; exit 0";
    let arguments = ["/bin/sh", "-c", script];
    bench.drive(count / 10, 8, &arguments).await;
    let users = first..first + 16;
    println!("before: {:?}", Footprint::take(users.clone()));
    let began = Instant::now();
    bench.drive(count, 8, &arguments).await;
    println!("{count} actions in {:.1} s", began.elapsed().as_secs_f64());
    println!("after:  {:?}", Footprint::take(users));
    bench.stop().await;
}
