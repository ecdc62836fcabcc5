//! The embedded store, its services, and the client, over real sockets.

use std::{net::SocketAddr, path::Path, sync::Arc, time::Duration};

use bb_remote_execution::{
    config::{Endpoint, ListenAddress},
    daemon,
    digest::{Digest, DigestFunction},
    instance::InstanceName,
    storage::{
        local::Store,
        remote::{Client, Options},
        service,
    },
};
use tokio_util::sync::CancellationToken;
use tonic::{service::Routes, transport::Channel};

mod client;
mod disk;
mod rpc;

/// A store that is served on a socket of its own.
pub struct Server {
    pub store: Arc<Store>,
    pub address: SocketAddr,
    stopping: CancellationToken,
    serving: tokio::task::JoinHandle<()>,
}

impl Server {
    pub async fn start(directory: &Path, maximum_size: u64) -> Self {
        let anywhere = ([127, 0, 0, 1], 0).into();
        Self::start_at(directory, maximum_size, anywhere).await
    }

    pub async fn start_at(directory: &Path, maximum_size: u64, address: SocketAddr) -> Self {
        let store = Arc::new(Store::open(directory, maximum_size).unwrap());
        let listener =
            daemon::listen("", "clients.listen", &ListenAddress::Tcp(address), None).unwrap();
        let address = listener.address().parse().unwrap();
        let routes =
            Routes::default().add_service(service::capabilities(false, store.maximum_blob_size()));
        let routes = service::add_to(routes, &store);
        let stopping = CancellationToken::new();
        let serving = daemon::serve(listener, routes, stopping.clone(), Duration::ZERO);
        let serving = tokio::spawn(async move { serving.await.unwrap() });
        Server {
            store,
            address,
            stopping,
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
        Client::connect(&self.endpoint(), &self.endpoint(), Options::default())
    }

    /// Until nobody has the store open any more.
    pub async fn stop(self) {
        self.stopping.cancel();
        self.serving.await.unwrap();
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
