//! The embedded store, its services, and the client, over real sockets.

use std::{net::SocketAddr, path::Path, sync::Arc, time::Duration};

use bb_remote_execution::{
    config::{Endpoint, ListenAddress},
    daemon::{self, Channel},
    digest::{Digest, DigestFunction},
    instance::InstanceName,
    storage::{
        Backend,
        embedded::Store,
        grpc::{Client, Options},
        serve,
    },
};
use tokio_util::sync::CancellationToken;

use crate::harness::parts::open_again;

mod actions;
mod backends;
mod bytestream;
mod cas;
mod chunks;
mod compression;

mod disk;
mod instance_limits;
mod limits;
mod misbehaving_peer;
mod objects;
mod peers;
mod shards;

/// A back end that is served on a socket of its own.
pub struct Serving {
    address: SocketAddr,
    stopping: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

impl Serving {
    pub async fn start(backend: Backend, address: SocketAddr) -> Self {
        let listener =
            daemon::listen("", "clients.listen", &ListenAddress::Tcp(address), None).unwrap();
        let address = listener.address().parse().unwrap();
        let capabilities = serve::capabilities(serve::Announcement {
            exec_enabled: false,
            storage: Some(backend.clone()),
            chunks: serve::serves_chunks(&backend),
        });
        let services = daemon::Services::default().add(capabilities);
        let routes = serve::add_to(services, &backend).into_routes();
        let stopping = CancellationToken::new();
        let serving = daemon::serve(listener, routes, stopping.clone(), Duration::ZERO);
        Serving {
            address,
            stopping,
            task: tokio::spawn(async move { serving.await.unwrap() }),
        }
    }

    pub fn client(&self) -> Client {
        self.client_with(Options::default())
    }

    pub fn client_with(&self, options: Options) -> Client {
        let endpoint = Endpoint::Tcp(self.address.to_string());
        Client::connect(&endpoint, &endpoint, options)
    }
}

/// A store that is served on a socket of its own.
pub struct Server {
    pub store: Arc<Store>,
    pub address: SocketAddr,
    serving: Serving,
}

impl Server {
    pub async fn start(directory: &Path, maximum_size: u64) -> Self {
        Self::start_at(directory, maximum_size, ANYWHERE).await
    }

    pub async fn start_at(directory: &Path, maximum_size: u64, address: SocketAddr) -> Self {
        let store = Arc::new(open_again(|| Store::open(directory, maximum_size)));
        let serving = Serving::start(Backend::Embedded(store.clone()), address).await;
        Server {
            store,
            address: serving.address,
            serving,
        }
    }

    pub fn endpoint(&self) -> Endpoint {
        Endpoint::Tcp(self.address.to_string())
    }

    pub fn channel(&self) -> Channel {
        daemon::connect(&self.endpoint())
    }

    pub fn client(&self) -> Client {
        self.serving.client()
    }

    /// Until nobody has the store open any more.
    pub async fn stop(self) {
        self.serving.stopping.cancel();
        self.serving.task.await.unwrap();
        let mut store = self.store;
        loop {
            match Arc::try_unwrap(store) {
                Ok(_) => return,
                Err(shared) => store = shared,
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// The variable that makes a test binary a server: DIRECTORY,ADDRESS,MAXIMUM_SIZE.
const SERVE: &str = "BB_TEST_SERVE_STORAGE";

/// No test of its own: what `StoreProcess` starts.
#[test]
fn serves_a_store_when_asked_to() {
    let Ok(asked) = std::env::var(SERVE) else {
        return;
    };
    let parts: Vec<&str> = asked.split(',').collect();
    let (directory, address) = (Path::new(parts[0]), parts[1].parse().unwrap());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let server = Server::start_at(directory, parts[2].parse().unwrap(), address).await;
        std::fs::write(directory.join("address.new"), server.address.to_string()).unwrap();
        std::fs::rename(directory.join("address.new"), directory.join("address")).unwrap();
        std::future::pending::<()>().await;
    });
}

/// A store in a process that can be killed.
pub struct StoreProcess {
    process: std::process::Child,
    pub address: SocketAddr,
}

impl StoreProcess {
    pub fn start(directory: &Path, address: SocketAddr, maximum_size: u64) -> Self {
        let _ = std::fs::remove_file(directory.join("address"));
        let mut process = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "storage::serves_a_store_when_asked_to"])
            .env(
                SERVE,
                format!("{},{address},{maximum_size}", directory.display()),
            )
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        loop {
            if let Ok(text) = std::fs::read_to_string(directory.join("address")) {
                let address = text.parse().unwrap();
                return StoreProcess { process, address };
            }
            assert!(process.try_wait().unwrap().is_none(), "the server is gone");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn endpoint(&self) -> Endpoint {
        Endpoint::Tcp(self.address.to_string())
    }

    /// Bytes of its memory that no file backs.
    pub fn anonymous_memory(&self) -> u64 {
        let path = format!("/proc/{}/status", self.process.id());
        let status = std::fs::read_to_string(path).unwrap();
        let line = status.lines().find(|line| line.starts_with("RssAnon:"));
        let kib = line.unwrap().split_whitespace().nth(1).unwrap();
        kib.parse::<u64>().unwrap() << 10
    }
}

/// kill -9.
impl Drop for StoreProcess {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

pub const ANYWHERE: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);

pub const GIB: u64 = 1 << 30;

pub fn sha256(content: &[u8]) -> Digest {
    DigestFunction::Sha256.digest_of(content)
}

/// The same bytes for the same seed, unlike those of any other seed.
pub fn content(seed: u64, size: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(size + 8);
    while bytes.len() < size {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(size);
    bytes
}

pub fn instance(name: &str) -> InstanceName {
    InstanceName::parse(name).unwrap()
}
