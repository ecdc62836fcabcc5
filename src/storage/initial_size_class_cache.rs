//! Buildbarn's initial size class cache: what earlier executions of actions came to, which a scheduler
//! reads and writes.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use prost::Message;

use super::{Backend, Error, blocking, embedded, grpc};
use crate::{
    config::scheduler::StorageLocation, daemon::Credentials, digest::Digest,
    instance::InstanceName, proto::iscc::PreviousExecutionStats,
};

/// Where it is. Cheap to clone.
#[derive(Clone)]
pub enum InitialSizeClassCache {
    /// In the embedded store of this process.
    Embedded(Arc<embedded::Store>),
    /// Another server's, over gRPC.
    Grpc(grpc::InitialSizeClassCacheClient),
    /// Nowhere: what is known is lost when the process ends.
    Absent,
}

impl InitialSizeClassCache {
    /// Connects at the first call. The embedded one is where the blobs are, if these are embedded.
    pub fn open(location: &StorageLocation, backend: &Backend, credentials: &Credentials) -> Self {
        const TIMEOUT: Duration = Duration::from_secs(60);
        match (location, backend.embedded()) {
            (StorageLocation::Endpoint(endpoint), _) => InitialSizeClassCache::Grpc(
                grpc::InitialSizeClassCacheClient::connect(endpoint, credentials, TIMEOUT),
            ),
            (_, Some(store)) => InitialSizeClassCache::Embedded(store.clone()),
            (_, None) => InitialSizeClassCache::Absent,
        }
    }

    /// An encoded PreviousExecutionStats; `None` when there is none.
    pub async fn read(
        &self,
        instance: &InstanceName,
        reduced_action: &Digest,
    ) -> Result<Option<Bytes>, Error> {
        match self {
            InitialSizeClassCache::Embedded(store) => {
                let (store, instance, digest) = (store.clone(), instance.clone(), *reduced_action);
                blocking(move || store.previous_execution_stats(&instance, &digest)).await
            }
            InitialSizeClassCache::Grpc(client) => {
                let stats = client.read(instance, reduced_action).await?;
                Ok(stats.map(|stats| stats.encode_to_vec().into()))
            }
            InitialSizeClassCache::Absent => Ok(None),
        }
    }

    /// In place of what was there.
    pub async fn write(
        &self,
        instance: &InstanceName,
        reduced_action: &Digest,
        stats: PreviousExecutionStats,
    ) -> Result<(), Error> {
        match self {
            InitialSizeClassCache::Embedded(store) => {
                let (store, instance, digest) = (store.clone(), instance.clone(), *reduced_action);
                blocking(move || store.update_previous_execution_stats(&instance, &digest, &stats))
                    .await?
            }
            InitialSizeClassCache::Grpc(client) => {
                client.write(instance, reduced_action, stats).await
            }
            InitialSizeClassCache::Absent => Ok(()),
        }
    }
}
