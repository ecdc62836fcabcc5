//! A whole farm of real daemons in a directory of its own, and a client of it.
//!
//! Root is needed, as it is to run a farm: the scheduler and the worker run under numbers without
//! accounts, the runner as root. Everything is gone when a `Farm` is dropped.

use std::{
    fs,
    io::Write,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    os::unix::{
        fs::{PermissionsExt, chown},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command},
    sync::{
        LazyLock,
        atomic::{AtomicU16, Ordering},
    },
    time::{Duration, Instant},
};

use bb_remote_execution::{
    config::{Endpoint, tls::ClientTls},
    daemon::{self, Credentials},
};

use pki::{Authority, Leaf};

pub mod browser;
mod client;
pub mod parts;
pub mod pki;
pub mod scheduler_process;
pub mod services;

pub use client::{Client, Task, digest_of, finished, is_ok};

pub const SCHEDULER_USER: u32 = 57_997;
pub const WORKER_USER: u32 = 57_998;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Daemon {
    Scheduler,
    Worker,
    Runner,
}

pub struct Farm {
    // Dropped in this order: no daemon outlives its directory.
    scheduler: Option<Child>,
    worker: Option<Child>,
    runner: Option<Child>,
    directory: tempfile::TempDir,
    clients: u16,
    workers: u16,
    /// The first of its own range of users, which no other farm on this host may share.
    users: u32,
    claim: fs::File,
    /// What clients are known by, where the farm speaks TLS.
    certificates: Option<ClientTls>,
    authority: Option<(Authority, PathBuf)>,
}

/// What is added to the configurations of a farm.
struct Files {
    scheduler: String,
    worker: String,
    certificates: Option<ClientTls>,
    authority: Option<(Authority, PathBuf)>,
}

/// Users that each farm has for its actions.
pub const USERS: u32 = 16;

/// Claims a byte of a file that all tests on this host share, for as long as the file is open.
fn claim(file: &fs::File, byte: i64) -> bool {
    use nix::fcntl::{FcntlArg, fcntl};
    let lock = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    };
    fcntl(file, FcntlArg::F_OFD_SETLK(&lock)).is_ok()
}

fn claims() -> fs::File {
    fs::OpenOptions::new()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open("/var/tmp/bb-farm-tests.lock")
        .unwrap()
}

/// A range of users, and two ports, and one a thousand above the first, that no other test on this host has. (What a packaged runner
/// uses lies below all of them.)
fn claim_users() -> (u32, u16, fs::File) {
    let file = claims();
    for number in 0..300 {
        if claim(&file, number) {
            // Below those that the kernel gives to others (ip(7), ip_local_port_range).
            return (
                59_000 + number as u32 * USERS,
                21_000 + 2 * number as u16,
                file,
            );
        }
    }
    panic!("300 farms are being tested");
}

/// A port of the loopback that nobody listens on, for a daemon that is yet to be started: no other test has
/// had it from here, and the kernel gives it to nobody who connects.
pub fn free_address() -> SocketAddr {
    static CLAIMS: LazyLock<fs::File> = LazyLock::new(claims);
    static NEXT: AtomicU16 = AtomicU16::new(23_000);
    loop {
        let port = NEXT.fetch_add(1, Ordering::Relaxed);
        assert!(port < 27_000, "4000 ports were given to tests");
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        if claim(&CLAIMS, port.into()) && TcpListener::bind(address).is_ok() {
            return address;
        }
    }
}

/// Says why a test cannot run here, also past libtest, which keeps what tests that pass have said. It
/// is counted in the file that `BB_SKIPPED` names; where `BB_REQUIRE_ALL` is set, the test fails.
pub fn skip(why: &str) {
    let thread = std::thread::current();
    let line = format!("skipped: {}: {why}\n", thread.name().unwrap_or("a test"));
    assert!(std::env::var_os("BB_REQUIRE_ALL").is_none(), "{line}");
    let _ = std::io::stderr().write_all(line.as_bytes());
    if let Some(path) = std::env::var_os("BB_SKIPPED") {
        let file = fs::OpenOptions::new().create(true).append(true).open(path);
        file.unwrap().write_all(line.as_bytes()).unwrap();
    }
}

/// Copies a program, by another process: what this one has open for writing, whatever it forks meanwhile has open too,
/// and a program that somebody has open for writing cannot be executed (ETXTBSY).
pub fn copy_program(from: impl AsRef<Path>, to: &Path) {
    let copied = Command::new("cp").arg(from.as_ref()).arg(to).status();
    assert!(copied.unwrap().success());
}

/// Farms need root; whoever lacks it is told so.
pub fn is_root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        skip("a farm needs root");
    }
    root
}

/// Of the scheduler, the workers and the clients of a farm.
fn issue_all(authority: &Authority, directory: &Path) -> [pki::Pair; 3] {
    [
        ("server", SCHEDULER_USER),
        ("worker", WORKER_USER),
        ("client", 0),
    ]
    .map(|(name, owner)| {
        let leaf = Leaf {
            name,
            ..Leaf::default()
        };
        let pair = authority.issue(directory, name, &leaf);
        chown(&pair.key, Some(owner), Some(owner)).unwrap();
        pair
    })
}

impl Farm {
    /// `parent` must be passable for other users: /var/tmp, or /dev/shm.
    pub async fn start(parent: &Path, slots: usize, scheduler_extra: &str) -> Farm {
        Farm::start_with(parent, slots, scheduler_extra, |_| String::new()).await
    }

    /// What is added to the runner's configuration may name the farm's directory.
    pub async fn start_with(
        parent: &Path,
        slots: usize,
        scheduler_extra: &str,
        runner_extra: impl FnOnce(&Path) -> String,
    ) -> Farm {
        let files = Files {
            scheduler: scheduler_extra.to_owned(),
            worker: String::new(),
            certificates: None,
            authority: None,
        };
        Farm::start_of(parent, slots, files, runner_extra).await
    }

    /// With all daemons sending traces to a collector.
    pub async fn start_traced(parent: &Path, slots: usize, collector: &str) -> Farm {
        let key = format!("traces.endpoint = \"{collector}\"\n");
        let files = Files {
            scheduler: key.clone(),
            worker: key.clone(),
            certificates: None,
            authority: None,
        };
        Farm::start_of(parent, slots, files, |_| key).await
    }

    /// With keys of the worker's, too.
    pub async fn start_with_worker(
        parent: &Path,
        slots: usize,
        scheduler_extra: &str,
        worker_extra: &str,
    ) -> Farm {
        let files = Files {
            scheduler: scheduler_extra.to_owned(),
            worker: worker_extra.to_owned(),
            certificates: None,
            authority: None,
        };
        Farm::start_of(parent, slots, files, |_| String::new()).await
    }

    /// With TLS and certificates, in files of `pki`, on all sides: clients are `CN=client`, workers
    /// `CN=worker`.
    pub async fn start_encrypted(
        parent: &Path,
        slots: usize,
        pki: &Path,
        scheduler_extra: &str,
    ) -> Farm {
        fs::set_permissions(pki, fs::Permissions::from_mode(0o755)).unwrap();
        let issuer = Authority::new(pki, "authority");
        let [server, worker, client] = issue_all(&issuer, pki);
        let authority = issuer.certificate.clone();
        let (ca, show) = (authority.display(), |path: &Path| {
            path.display().to_string()
        });
        let mut files = Files {
            scheduler: scheduler_extra.to_owned(),
            worker: String::new(),
            certificates: Some(ClientTls {
                ca: authority.clone(),
                certificate: client.certificate,
                key: client.key,
                server_name: String::new(),
            }),
            authority: Some((issuer, pki.to_owned())),
        };
        for port in ["clients", "workers"] {
            let (certificate, key) = (show(&server.certificate), show(&server.key));
            files.scheduler += &format!(
                "\n[{port}.tls]\ncertificate = \"{certificate}\"\nkey = \"{key}\"\nclient_ca = \"{ca}\"\n"
            );
        }
        for peer in ["scheduler", "storage"] {
            let (certificate, key) = (show(&worker.certificate), show(&worker.key));
            files.worker += &format!(
                "{peer}.tls = {{ ca = \"{ca}\", certificate = \"{certificate}\", key = \"{key}\" }}\n"
            );
        }
        Farm::start_of(parent, slots, files, |_| String::new()).await
    }

    /// New certificates in the place of all that there are.
    pub fn renew_certificates(&self) {
        let (authority, directory) = self.authority.as_ref().unwrap();
        issue_all(authority, directory);
    }

    async fn start_of(
        parent: &Path,
        slots: usize,
        mut files: Files,
        runner_extra: impl FnOnce(&Path) -> String,
    ) -> Farm {
        let directory = tempfile::Builder::new()
            .prefix("bb-farm.")
            .tempdir_in(parent)
            .unwrap();
        let root = directory.path();
        fs::set_permissions(root, fs::Permissions::from_mode(0o755)).unwrap();
        for (name, owner, mode) in [
            ("storage", SCHEDULER_USER, 0o700),
            ("state", SCHEDULER_USER, 0o700),
            ("worker", WORKER_USER, 0o755),
            ("worker/cache", WORKER_USER, 0o700),
            ("worker/build", WORKER_USER, 0o711),
            ("bin", 0, 0o755),
            ("run-scheduler", SCHEDULER_USER, 0o755),
            ("run-worker", WORKER_USER, 0o755),
            ("run-runner", 0, 0o755),
        ] {
            let path = root.join(name);
            fs::create_dir(&path).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            chown(&path, Some(owner), Some(owner)).unwrap();
        }
        // The daemons' users may not be able to pass the way to the build's own output.
        for program in [
            env!("CARGO_BIN_EXE_bb_scheduler"),
            env!("CARGO_BIN_EXE_bb_worker"),
            env!("CARGO_BIN_EXE_bb_runner"),
        ] {
            let program = Path::new(program);
            copy_program(
                program,
                &root.join("bin").join(program.file_name().unwrap()),
            );
        }
        let (users, ports, claim) = claim_users();
        let mut farm = Farm {
            scheduler: None,
            worker: None,
            runner: None,
            directory,
            clients: ports,
            workers: ports + 1,
            users,
            claim,
            certificates: files.certificates.clone(),
            authority: files.authority.take(),
        };
        let runner_extra = runner_extra(farm.path());
        farm.configure(slots, &files, &runner_extra);
        for daemon in [Daemon::Scheduler, Daemon::Runner, Daemon::Worker] {
            farm.spawn(daemon);
        }
        farm.wait_until_it_executes().await;
        farm
    }

    fn configure(&self, slots: usize, files: &Files, runner_extra: &str) {
        let scheduler_extra = &files.scheduler;
        let worker_extra = &files.worker;
        let scheme = match files.certificates {
            None => "grpc",
            Some(_) => "grpcs",
        };
        let root = self.path().display();
        let (clients, workers, users) = (self.clients, self.workers, self.users);
        let pages = self.pages_port();
        let write = |name: &str, text: String| fs::write(self.path().join(name), text).unwrap();
        write(
            "bb_scheduler.toml",
            format!(
                "clients.listen = \"127.0.0.1:{clients}\"\n\
                 workers.listen = \"127.0.0.1:{workers}\"\n\
                 state.listen = \"127.0.0.1:0\"\n\
                 state.directory = \"{root}/state\"\n\
                 web.listen = \"127.0.0.1:{pages}\"\n\
                 control.listen = \"unix:{root}/run-scheduler/control.sock\"\n\
                 storage.embedded.directory = \"{root}/storage\"\n{scheduler_extra}\n"
            ),
        );
        write(
            "bb_runner.toml",
            format!(
                "listen = \"unix:{root}/runner.sock\"\n\
                 socket_group = \"{WORKER_USER}\"\n\
                 allowed_users = [\"{WORKER_USER}\"]\n\
                 build_directory = \"{root}/worker/build\"\n\
                 control.listen = \"unix:{root}/run-runner/control.sock\"\n\
                 metrics.listen = \"unix:{root}/run-runner/metrics.sock\"\n\
                 users = {{ first = {users}, count = {USERS} }}\n{runner_extra}\n"
            ),
        );
        write(
            "bb_worker.toml",
            format!(
                "build_directory = \"{root}/worker/build\"\n\
                 control.listen = \"unix:{root}/run-worker/control.sock\"\n\
                 metrics.listen = \"unix:{root}/run-worker/metrics.sock\"\n\
                 scheduler.endpoint = \"{scheme}://127.0.0.1:{workers}\"\n\
                 storage.cas = \"{scheme}://127.0.0.1:{clients}\"\n\
                 storage.action_cache = \"{scheme}://127.0.0.1:{clients}\"\n{worker_extra}\
                 cache.directory = \"{root}/worker/cache\"\n\
                 [[runners]]\n\
                 endpoint = \"unix:{root}/runner.sock\"\n\
                 concurrency = {slots}\n"
            ),
        );
    }

    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    pub fn build_directory(&self) -> PathBuf {
        self.path().join("worker/build")
    }

    /// The users that its actions run as.
    pub fn users(&self) -> std::ops::Range<u32> {
        self.users..self.users + USERS
    }

    fn child(&mut self, daemon: Daemon) -> &mut Option<Child> {
        match daemon {
            Daemon::Scheduler => &mut self.scheduler,
            Daemon::Worker => &mut self.worker,
            Daemon::Runner => &mut self.runner,
        }
    }

    pub fn pid(&mut self, daemon: Daemon) -> u32 {
        self.child(daemon).as_ref().unwrap().id()
    }

    /// Peak resident memory, in bytes (proc(5), VmHWM).
    pub fn peak_memory(&mut self, daemon: Daemon) -> u64 {
        peak_memory(self.pid(daemon))
    }

    pub fn is_alive(&mut self, daemon: Daemon) -> bool {
        let child = self.child(daemon).as_mut().unwrap();
        child.try_wait().unwrap().is_none()
    }

    /// SIGKILL: nothing is drained, nothing is written.
    pub fn kill(&mut self, daemon: Daemon) {
        let mut child = self.child(daemon).take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// SIGTERM; the exit status, or `None` when the daemon does not leave in time.
    pub fn terminate(
        &mut self,
        daemon: Daemon,
        limit: Duration,
    ) -> Option<std::process::ExitStatus> {
        let mut child = self.child(daemon).take().unwrap();
        let pid = nix::unistd::Pid::from_raw(child.id() as i32);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        let deadline = Instant::now() + limit;
        while Instant::now() < deadline {
            if let Some(status) = child.try_wait().unwrap() {
                return Some(status);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        None
    }

    pub fn spawn(&mut self, daemon: Daemon) {
        let name = match daemon {
            Daemon::Scheduler => "bb_scheduler",
            Daemon::Worker => "bb_worker",
            Daemon::Runner => "bb_runner",
        };
        let program = self.path().join("bin").join(name);
        let mut command = match daemon {
            Daemon::Runner => Command::new(&program),
            Daemon::Scheduler | Daemon::Worker => {
                let (user, capabilities) = match daemon {
                    Daemon::Scheduler => (SCHEDULER_USER, "-all"),
                    _ => (WORKER_USER, "-all,+chown,+dac_override,+fowner"),
                };
                let mut command = Command::new("setpriv");
                command
                    .arg(format!("--reuid={user}"))
                    .arg(format!("--regid={user}"))
                    .args(["--clear-groups", "--no-new-privs"])
                    .arg(format!("--inh-caps={capabilities}"))
                    .arg(format!("--ambient-caps={capabilities}"))
                    .arg(&program);
                command
            }
        };
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.path().join(format!("{name}.log")))
            .unwrap();
        command
            .arg("--config")
            .arg(self.path().join(format!("{name}.toml")))
            // It is empty. Daemons that outlive a test that was killed keep the claim.
            .stdin(self.claim.try_clone().unwrap())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .process_group(0);
        let child = command.spawn().unwrap();
        *self.child(daemon) = Some(child);
    }

    /// Where the pages are, without a slash at the end.
    pub fn pages(&self) -> String {
        format!("http://localhost:{}", self.pages_port())
    }

    fn pages_port(&self) -> u16 {
        self.clients + 1000
    }

    /// The port that clients use.
    pub fn port(&self) -> u16 {
        self.clients
    }

    pub fn client(&self) -> Client {
        let address = format!("127.0.0.1:{}", self.clients);
        match &self.certificates {
            None => Client::connect(&address),
            Some(certificates) => Client {
                channel: daemon::connect_with(
                    &Endpoint::Tls(address),
                    &Credentials::of("tls", certificates),
                ),
                instance: String::new(),
            },
        }
    }

    pub fn log(&self, name: &str) -> String {
        fs::read_to_string(self.path().join(format!("{name}.log"))).unwrap_or_default()
    }

    async fn wait_until_it_executes(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(60);
        let client = self.client();
        loop {
            let outcome = match client.try_upload(b"".to_vec()).await {
                Ok(_) => client.try_run(&Task::shell("exit 0")).await,
                Err(status) => Err(status),
            };
            match outcome {
                Ok(response) if is_ok(&response) => return,
                other => assert!(
                    Instant::now() < deadline,
                    "the farm does not come up: {other:?}\n{}\n{}\n{}",
                    self.log("bb_scheduler"),
                    self.log("bb_worker"),
                    self.log("bb_runner")
                ),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

/// Peak resident memory of a process, in bytes (proc(5), VmHWM).
pub fn peak_memory(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|l| l.starts_with("VmHWM:")).unwrap();
    let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kib * 1024
}

impl Drop for Farm {
    fn drop(&mut self) {
        let children = [&mut self.worker, &mut self.scheduler, &mut self.runner];
        for child in children.into_iter().flatten() {
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            for name in ["bb_scheduler", "bb_worker", "bb_runner"] {
                let log = self.log(name);
                let tail: Vec<_> = log.lines().rev().take(20).collect();
                eprintln!("--- {name}");
                for line in tail.into_iter().rev() {
                    eprintln!("{line}");
                }
            }
        }
    }
}
