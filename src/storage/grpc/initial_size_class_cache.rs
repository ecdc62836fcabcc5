//! A client of buildbarn.iscc.InitialSizeClassCache.

use std::{sync::Arc, time::Duration};

use super::call::CalledServer;
use crate::{
    config::Endpoint,
    daemon::{self, Channel, Credentials},
    digest::Digest,
    instance::InstanceName,
    proto::iscc::{
        GetPreviousExecutionStatsRequest, PreviousExecutionStats,
        UpdatePreviousExecutionStatsRequest,
        initial_size_class_cache_client::InitialSizeClassCacheClient as Stub,
    },
    storage::{Error, retry::RetryPolicy},
};

/// Cheap to clone.
#[derive(Clone)]
pub struct InitialSizeClassCacheClient {
    stub: Stub<Channel>,
    server: Arc<CalledServer>,
}

impl InitialSizeClassCacheClient {
    /// Connects at the first call, so that it never fails here.
    pub fn connect(endpoint: &Endpoint, credentials: &Credentials, timeout: Duration) -> Self {
        InitialSizeClassCacheClient {
            stub: Stub::new(daemon::connect_with(endpoint, credentials)),
            server: Arc::new(CalledServer::new(endpoint, timeout, RetryPolicy::default())),
        }
    }

    /// `None` when there are none.
    pub async fn read(
        &self,
        instance: &InstanceName,
        reduced_action: &Digest,
    ) -> Result<Option<PreviousExecutionStats>, Error> {
        let request = GetPreviousExecutionStatsRequest {
            instance_name: instance.to_string(),
            reduced_action_digest: Some(reduced_action.to_proto()),
            digest_function: reduced_action.function().to_proto() as i32,
        };
        let answer = self.server.unary(Some(reduced_action), || {
            let (mut stub, request) = (self.stub.clone(), request.clone());
            async move { stub.get_previous_execution_stats(request).await }
        });
        match answer.await {
            Ok(stats) => Ok(Some(stats)),
            Err(Error::Missing(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// In place of what was there.
    pub async fn write(
        &self,
        instance: &InstanceName,
        reduced_action: &Digest,
        stats: PreviousExecutionStats,
    ) -> Result<(), Error> {
        let request = UpdatePreviousExecutionStatsRequest {
            instance_name: instance.to_string(),
            reduced_action_digest: Some(reduced_action.to_proto()),
            previous_execution_stats: Some(stats),
            digest_function: reduced_action.function().to_proto() as i32,
        };
        let answer = self.server.unary(None, || {
            let (mut stub, request) = (self.stub.clone(), request.clone());
            async move { stub.update_previous_execution_stats(request).await }
        });
        answer.await.map(drop)
    }
}
