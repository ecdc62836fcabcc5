//! Capabilities: what a server announces (REAPI: ServerCapabilities).

use tonic::{Request, Response, Status, async_trait, codec::CompressionEncoding};

use super::{request::instance, response_size::MAXIMUM_BATCH_SIZE};
use crate::{
    config::grants::Permission,
    daemon::Access,
    digest::DigestFunction,
    proto::{
        reapi::{
            self, GetCapabilitiesRequest, ServerCapabilities,
            capabilities_server::{Capabilities, CapabilitiesServer},
        },
        semver::SemVer,
    },
    resource::Compressor,
    storage::{Backend, chunking::ChunkingFunction},
};

/// What differs between servers of ours.
#[derive(Clone, Default)]
pub struct Announcement {
    /// Whether actions are executed.
    pub exec_enabled: bool,
    /// Where blobs are kept, if this server serves them: it knows how large they may be.
    pub storage: Option<Backend>,
    /// Whether SplitBlob and SpliceBlob are served.
    pub chunks: bool,
}

/// What a server announces.
pub fn capabilities(announcement: Announcement) -> CapabilitiesServer<CapabilitiesService> {
    CapabilitiesServer::new(CapabilitiesService(announcement))
        .accept_compressed(CompressionEncoding::Gzip)
}

pub struct CapabilitiesService(Announcement);

#[async_trait]
impl Capabilities for CapabilitiesService {
    async fn get_capabilities(
        &self,
        request: Request<GetCapabilitiesRequest>,
    ) -> Result<Response<ServerCapabilities>, Status> {
        let instance = instance(&request.get_ref().instance_name)?;
        let access = Access::of(&request);
        access.require(&instance)?;
        let may = |what| access.may(what, &instance);
        let functions: Vec<i32> = DigestFunction::ALL
            .iter()
            .map(|function| function.to_proto() as i32)
            .collect();
        // Clients refuse to send a priority that is not announced.
        let priorities = reapi::PriorityCapabilities {
            priorities: vec![reapi::priority_capabilities::PriorityRange {
                min_priority: i32::MIN,
                max_priority: i32::MAX,
            }],
        };
        let version = |major, minor| SemVer {
            major,
            minor,
            ..Default::default()
        };
        let Announcement {
            exec_enabled,
            ref storage,
            chunks,
        } = self.0;
        let max_blob_size = match storage {
            Some(storage) => storage.maximum_blob_size(&instance).await,
            None => 0,
        };
        let mut cache = reapi::CacheCapabilities {
            digest_functions: functions.clone(),
            action_cache_update_capabilities: Some(reapi::ActionCacheUpdateCapabilities {
                update_enabled: may(Permission::ActionCacheWrite),
            }),
            // ResultsCachePolicy.priority is taken and changes nothing: no storage here keeps by it.
            cache_priority_capabilities: None,
            max_batch_total_size_bytes: MAXIMUM_BATCH_SIZE as i64,
            symlink_absolute_path_strategy: reapi::symlink_absolute_path_strategy::Value::Allowed
                as i32,
            supported_compressors: vec![Compressor::Zstd.to_proto()],
            supported_batch_update_compressors: vec![Compressor::Zstd.to_proto()],
            max_cas_blob_size_bytes: i64::try_from(max_blob_size).unwrap_or(i64::MAX),
            split_blob_support: chunks,
            splice_blob_support: chunks,
            ..Default::default()
        };
        if chunks {
            ChunkingFunction::FAST_CDC_2020.announce(&mut cache);
            ChunkingFunction::REP_MAX_CDC.announce(&mut cache);
        }
        Ok(Response::new(ServerCapabilities {
            cache_capabilities: Some(cache),
            execution_capabilities: exec_enabled.then(|| reapi::ExecutionCapabilities {
                digest_function: DigestFunction::Sha256.to_proto() as i32,
                exec_enabled: may(Permission::Execute),
                execution_priority_capabilities: Some(priorities),
                digest_functions: functions,
                supported_node_properties: vec!["mtime".to_owned(), "unix_mode".to_owned()],
            }),
            deprecated_api_version: None,
            // Bazel up to 4 speaks 2.0.
            low_api_version: Some(version(2, 0)),
            high_api_version: Some(version(2, 12)),
        }))
    }
}
