//! The bb_scheduler that is soaked.

use std::{
    fs,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// A bb_scheduler of its own; stopped when dropped.
pub struct Scheduler {
    pub child: Child,
    directory: tempfile::TempDir,
    pub clients: String,
    pub workers: String,
}

impl Scheduler {
    pub fn start(storage: Option<&str>) -> Scheduler {
        let directory = tempfile::Builder::new()
            .prefix("bb-soak.")
            .tempdir_in("/var/tmp")
            .unwrap();
        let place = directory.path().display();
        let storage = match storage {
            Some(endpoint) => {
                format!("storage.cas = \"{endpoint}\"\nstorage.action_cache = \"{endpoint}\"\n")
            }
            None => format!(
                "storage.embedded.directory = \"{place}/storage\"\n\
                 storage.embedded.maximum_size = \"1GiB\"\n"
            ),
        };
        fs::create_dir(directory.path().join("storage")).unwrap();
        let config = directory.path().join("bb_scheduler.toml");
        // All clients are one caller here, which has half of all calls at most.
        let text = format!(
            "clients.listen = \"127.0.0.1:0\"\nworkers.listen = \"127.0.0.1:0\"\n\
             state.listen = \"127.0.0.1:0\"\nstate.directory = \"{place}/state\"\n\
             web.listen = \"127.0.0.1:0\"\ncontrol.listen = \"unix:{place}/control\"\n\
             log.level = \"warn\"\n\
             callers.maximum_calls = 1000000\n\
             scheduling.operation_with_no_waiters_timeout = \"5s\"\n\
             scheduling.busy_worker_synchronization_interval = \"2s\"\n\
             scheduling.worker_with_no_synchronizations_timeout = \"20s\"\n{storage}"
        );
        // The addresses are told at level `info`; after that a line per action is too much.
        fs::write(&config, text.replace("\"warn\"", "\"info\"")).unwrap();
        let log = fs::File::create(directory.path().join("log")).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_bb_scheduler"))
            .arg("--config")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut scheduler = Scheduler {
            child,
            directory,
            clients: String::new(),
            workers: String::new(),
        };
        let deadline = Instant::now() + Duration::from_secs(60);
        while scheduler.workers.is_empty() {
            assert!(Instant::now() < deadline, "{}", scheduler.log());
            std::thread::sleep(Duration::from_millis(50));
            let log = scheduler.log();
            if let Some((_, rest)) = log.split_once("serving clients on ")
                && let Some((clients, rest)) = rest.split_once(", workers on ")
                && let Some((workers, _)) = rest.split_once(", operators on ")
            {
                scheduler.clients = clients.to_owned();
                scheduler.workers = workers.trim().to_owned();
            }
        }
        fs::write(&config, text).unwrap();
        scheduler.signal(nix::sys::signal::Signal::SIGHUP);
        scheduler
    }

    /// As after a crash: killed, and started again where it was.
    pub fn kill_and_start(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let config = self.directory.path().join("bb_scheduler.toml");
        let text = fs::read_to_string(&config).unwrap();
        let text = text
            .replace(
                "clients.listen = \"127.0.0.1:0\"",
                &format!("clients.listen = \"{}\"", self.clients),
            )
            .replace(
                "workers.listen = \"127.0.0.1:0\"",
                &format!("workers.listen = \"{}\"", self.workers),
            );
        fs::write(&config, text).unwrap();
        let log = fs::File::options()
            .append(true)
            .open(self.directory.path().join("log"))
            .unwrap();
        self.child = Command::new(env!("CARGO_BIN_EXE_bb_scheduler"))
            .arg("--config")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
    }

    fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = nix::unistd::Pid::from_raw(self.child.id() as i32);
        nix::sys::signal::kill(pid, signal).unwrap();
    }

    fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    /// Tells it to stop; what it wrote.
    pub fn stop(mut self) -> String {
        let config = self.directory.path().join("bb_scheduler.toml");
        let text = fs::read_to_string(&config).unwrap();
        fs::write(&config, text.replace("\"warn\"", "\"info\"")).unwrap();
        self.signal(nix::sys::signal::Signal::SIGHUP);
        std::thread::sleep(Duration::from_secs(1));
        self.signal(nix::sys::signal::Signal::SIGTERM);
        let _ = self.child.wait();
        self.log()
    }
}

impl Drop for Scheduler {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// In MiB (proc(5), status).
pub fn resident(pid: u32, key: &str) -> u64 {
    kib(&pid.to_string(), key) / 1024
}

/// Of this process.
pub fn resident_kib() -> u64 {
    kib("self", "VmRSS:")
}

fn kib(process: &str, key: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with(key));
    let kib = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
    kib.unwrap_or(0)
}
