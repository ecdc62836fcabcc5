//! A back end over gRPC: ContentAddressableStorage (`cas`, `tree` for its GetTree, and `chunks`), ByteStream,
//! ActionCache; and the Capabilities of the whole farm. What they share is in `request`, `response_size` and
//! `status`.
//!
//! 1. A client that asks for much, and reads slowly, holds a piece of it in memory, not all: answers
//!    that are made as a whole are made when there is room for them (`daemon::serve`).
//! 2. A call's blobs, and a message, have limits; the error names them.
//! 3. Compressed blobs are decompressed as they come, and compressed as they are read (`compression`);
//!    what that takes has limits, also for each caller (`coder_budget`).

use tonic::codec::CompressionEncoding;

use super::Backend;
use crate::{
    daemon::Services,
    proto::{
        bytestream::byte_stream_server::{ByteStream, ByteStreamServer},
        reapi::{
            action_cache_server::ActionCacheServer,
            content_addressable_storage_server::ContentAddressableStorageServer,
        },
    },
};

use action_cache::ActionCacheService;
pub use bytestream::ByteStreamService;
pub use capabilities::{Announcement, capabilities};
use cas::CasService;
pub use chunks::serves_chunks;
pub use response_size::MAXIMUM_BATCH_SIZE;

mod action_cache;
mod bytestream;
mod capabilities;
mod cas;
mod chunks;
mod coder_budget;
mod compressed_write;
mod request;
mod response_size;
mod status;
mod tree;

/// Large enough for 200,000 digests in one FindMissingBlobs.
const MAXIMUM_REQUEST_SIZE: usize = 16 << 20;

/// Adds CAS, ByteStream and Action Cache.
pub fn add_to(services: Services, backend: &Backend) -> Services {
    let bytes = byte_stream(ByteStreamService {
        backend: backend.clone(),
    });
    add_beside_byte_stream(services, backend).add(bytes)
}

/// A service of streams, with the limits of this one.
pub fn byte_stream<S: ByteStream>(service: S) -> ByteStreamServer<S> {
    ByteStreamServer::new(service)
        .accept_compressed(CompressionEncoding::Gzip)
        .max_decoding_message_size(MAXIMUM_REQUEST_SIZE)
}

/// Adds CAS and Action Cache, for a server whose ByteStream has more than blobs.
pub fn add_beside_byte_stream(services: Services, backend: &Backend) -> Services {
    let backend = || backend.clone();
    let cas = ContentAddressableStorageServer::new(CasService { backend: backend() })
        .accept_compressed(CompressionEncoding::Gzip)
        .max_decoding_message_size(MAXIMUM_REQUEST_SIZE);
    let actions = ActionCacheServer::new(ActionCacheService { backend: backend() })
        .accept_compressed(CompressionEncoding::Gzip)
        .max_decoding_message_size(MAXIMUM_REQUEST_SIZE);
    services.add(cas).add(actions)
}
