//! bb_scheduler in a process of its own, in a directory of its own; no root is needed. It is killed when it is
//! dropped.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command},
    time::{Duration, Instant},
};

use bb_remote_execution::{
    config::Endpoint,
    daemon::{self, Channel},
};

use super::Client;

pub struct SchedulerProcess {
    child: Child,
    directory: tempfile::TempDir,
    /// Where clients call.
    pub clients: Endpoint,
}

impl SchedulerProcess {
    /// Whose listeners are Unix sockets in its directory.
    pub fn start(text: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let clients = Endpoint::Unix(directory.path().join("clients"));
        Self::start_in(directory, clients, text)
    }

    /// The same in a directory that has been furnished, whose clients call elsewhere.
    pub fn start_in(directory: tempfile::TempDir, clients: Endpoint, text: &str) -> Self {
        let path = directory.path();
        let log = fs::File::create(path.join("log")).unwrap();
        write(path, &clients, text);
        let child = Command::new(env!("CARGO_BIN_EXE_bb_scheduler"))
            .arg("--config")
            .arg(path.join("bb_scheduler.toml"))
            .stderr(log)
            .spawn()
            .unwrap();
        SchedulerProcess {
            child,
            directory,
            clients,
        }
    }

    /// Changes the configuration, and waits until the log says `words` after that.
    pub async fn reload(&self, text: &str, words: &str) {
        use nix::{sys::signal, unistd::Pid};
        write(self.path(), &self.clients, text);
        let before = self.log().len();
        let pid = Pid::from_raw(self.child.id() as i32);
        signal::kill(pid, signal::Signal::SIGHUP).unwrap();
        self.says(before, words).await;
    }

    /// Waits until the log says it after so many bytes.
    pub async fn says(&self, after: usize, words: &str) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while !self.log().get(after..).unwrap_or_default().contains(words) {
            assert!(Instant::now() < deadline, "{words}: {}", self.log());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.path().join("log")).unwrap()
    }

    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    pub fn socket(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    pub fn channel(&self) -> Channel {
        daemon::connect(&self.clients)
    }

    pub fn client(&self) -> Client {
        Client {
            channel: self.channel(),
            instance: String::new(),
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Peak resident memory, in bytes (proc(5), VmHWM).
    pub fn peak_memory(&self) -> u64 {
        super::peak_memory(self.pid())
    }
}

fn write(path: &Path, clients: &Endpoint, text: &str) {
    let dir = path.display();
    let clients = clients.to_string();
    let clients = clients
        .trim_start_matches("grpcs://")
        .trim_start_matches("grpc://");
    let workers = match text.contains("workers.listen") {
        true => String::new(),
        false => format!("workers.listen = \"unix:{dir}/workers\"\n"),
    };
    let web = match text.contains("web.listen") {
        true => String::new(),
        false => format!("web.listen = \"unix:{dir}/web\"\n"),
    };
    let size = match text.contains("storage.embedded.maximum_size") {
        true => "",
        false => "storage.embedded.maximum_size = \"256MiB\"\n",
    };
    let whole = format!(
        "clients.listen = \"{clients}\"\n{workers}{web}\
         state = {{ listen = \"unix:{dir}/state\", directory = \"{dir}/drains\" }}\n\
         storage.embedded.directory = \"{dir}/storage\"\n{size}{text}"
    );
    fs::write(path.join("bb_scheduler.toml"), whole).unwrap();
}

impl Drop for SchedulerProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
