//! ContentAddressableStorage and Capabilities, call by call.

use bb_remote_execution::daemon::Channel;
use bb_remote_execution::proto::reapi::{
    self, BatchReadBlobsRequest, BatchUpdateBlobsRequest, Directory, DirectoryNode,
    FindMissingBlobsRequest, GetCapabilitiesRequest, GetTreeRequest, batch_update_blobs_request,
    capabilities_client::CapabilitiesClient,
    content_addressable_storage_client::ContentAddressableStorageClient,
};
use bb_remote_execution::resource::Compressor;
use futures::TryStreamExt;
use prost::Message;
use tonic::{Code, Status};

use super::{GIB, Server, content, sha256};

type Cas = ContentAddressableStorageClient<Channel>;

async fn start() -> (tempfile::TempDir, Server, Cas) {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(directory.path(), GIB).await;
    let client = Cas::new(server.channel()).max_decoding_message_size(64 << 20);
    (directory, server, client)
}

fn put(data: &[u8]) -> batch_update_blobs_request::Request {
    batch_update_blobs_request::Request {
        digest: Some(sha256(data).to_proto()),
        data: data.to_vec().into(),
        compressor: 0,
    }
}

fn batch(requests: Vec<batch_update_blobs_request::Request>) -> BatchUpdateBlobsRequest {
    BatchUpdateBlobsRequest {
        requests,
        ..Default::default()
    }
}

async fn upload(client: &mut Cas, data: &[u8]) -> reapi::Digest {
    let request = batch(vec![put(data)]);
    let answer = client.batch_update_blobs(request).await.unwrap();
    assert_eq!(codes(answer.get_ref()), [Code::Ok]);
    sha256(data).to_proto()
}

fn codes(response: &reapi::BatchUpdateBlobsResponse) -> Vec<Code> {
    let code =
        |status: Option<_>| status.map_or(0, |s: bb_remote_execution::proto::rpc::Status| s.code);
    let responses = response.responses.iter();
    responses
        .map(|response| Code::from_i32(code(response.status.clone())))
        .collect()
}

#[track_caller]
fn refused<T>(answer: Result<T, Status>, code: Code, words: &str) {
    let status = answer.err().expect("an error");
    assert_eq!(status.code(), code, "{status}");
    assert!(status.message().contains(words), "{status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn each_blob_of_a_batch_succeeds_or_fails_on_its_own() {
    let (_directory, _server, mut client) = start().await;
    let mut wrong_content = put(b"right");
    wrong_content.data = b"wrong".to_vec().into();
    let mut wrong_size = put(b"sized");
    wrong_size.digest.as_mut().unwrap().size_bytes = 6;
    let mut compressed = put(b"compressed");
    compressed.compressor = reapi::compressor::Value::Zstd as i32;
    let mut nameless = put(b"nameless");
    nameless.digest = None;
    let sent = vec![
        put(b"first"),
        wrong_content,
        wrong_size,
        put(b""),
        compressed,
        nameless,
        put(b"last"),
        put(b"last"),
    ];
    let request = batch(sent.clone());
    let answer = client
        .batch_update_blobs(request)
        .await
        .unwrap()
        .into_inner();
    use Code::{InvalidArgument, Ok};
    assert_eq!(
        codes(&answer),
        [
            Ok,
            InvalidArgument,
            InvalidArgument,
            Ok,
            InvalidArgument,
            InvalidArgument,
            Ok,
            Ok
        ]
    );
    for (sent, answer) in sent.iter().zip(&answer.responses) {
        assert_eq!(sent.digest, answer.digest);
    }

    let digests: Vec<_> = [&b"last"[..], b"right", b"", b"first"]
        .map(|data| sha256(data).to_proto())
        .into();
    let request = FindMissingBlobsRequest {
        blob_digests: digests.clone(),
        ..Default::default()
    };
    let missing = client.find_missing_blobs(request).await.unwrap();
    assert_eq!(missing.get_ref().missing_blob_digests, digests[1..2]);
    let request = BatchReadBlobsRequest {
        digests: digests.clone(),
        ..Default::default()
    };
    let read = client.batch_read_blobs(request).await.unwrap().into_inner();
    let read: Vec<(&[u8], i32)> = read
        .responses
        .iter()
        .map(|response| (&*response.data, response.status.as_ref().unwrap().code))
        .collect();
    assert_eq!(
        read,
        [
            (&b"last"[..], 0),
            (b"", Code::NotFound as i32),
            (b"", 0),
            (b"first", 0)
        ]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_ill_formed_or_too_large_is_refused_with_the_limit() {
    let (_directory, _server, mut client) = start().await;
    let request = batch(vec![put(&vec![0; 4 << 20])]);
    let answer = client.batch_update_blobs(request).await;
    refused(
        answer,
        Code::InvalidArgument,
        "max_batch_total_size_bytes, which is 3932160",
    );
    let answer = client.batch_update_blobs(batch(vec![put(&vec![0; 17 << 20])]));
    refused(answer.await, Code::OutOfRange, "16777216");
    let huge = reapi::Digest {
        size_bytes: i64::MAX,
        ..sha256(b"").to_proto()
    };
    let read = |digests| BatchReadBlobsRequest {
        digests,
        ..Default::default()
    };
    let answer = client
        .batch_read_blobs(read(vec![huge.clone(), huge]))
        .await;
    refused(answer, Code::InvalidArgument, "3932160");

    let bad = reapi::Digest {
        hash: "nonsense".to_owned(),
        size_bytes: 1,
    };
    let answer = client.batch_read_blobs(read(vec![bad.clone()])).await;
    refused(answer, Code::InvalidArgument, "nonsense");
    let find = FindMissingBlobsRequest {
        blob_digests: vec![bad],
        ..Default::default()
    };
    refused(
        client.find_missing_blobs(find).await,
        Code::InvalidArgument,
        "nonsense",
    );
    let find = FindMissingBlobsRequest {
        digest_function: reapi::digest_function::Value::Murmur3 as i32,
        ..Default::default()
    };
    refused(
        client.find_missing_blobs(find).await,
        Code::InvalidArgument,
        "MURMUR3",
    );
    let find = FindMissingBlobsRequest {
        instance_name: "a/blobs".to_owned(),
        ..Default::default()
    };
    refused(
        client.find_missing_blobs(find).await,
        Code::InvalidArgument,
        "reserved",
    );

    // A size of 0 does not make an empty blob.
    let lie = reapi::Digest {
        size_bytes: 0,
        ..sha256(b"not empty").to_proto()
    };
    let find = FindMissingBlobsRequest {
        blob_digests: vec![lie.clone()],
        ..Default::default()
    };
    let answer = client.find_missing_blobs(find).await.unwrap();
    assert_eq!(answer.get_ref().missing_blob_digests, [lie]);
}

fn directory(children: &[reapi::Digest]) -> Vec<u8> {
    let node = |(i, digest): (usize, &reapi::Digest)| DirectoryNode {
        name: format!("{i:05}"),
        digest: Some(digest.clone()),
    };
    Directory {
        directories: children.iter().enumerate().map(node).collect(),
        ..Default::default()
    }
    .encode_to_vec()
}

async fn tree(client: &mut Cas, request: GetTreeRequest) -> Result<Vec<Vec<Directory>>, Status> {
    let pages = client.get_tree(request).await?.into_inner();
    pages.map_ok(|page| page.directories).try_collect().await
}

fn of(root: &reapi::Digest) -> GetTreeRequest {
    GetTreeRequest {
        root_digest: Some(root.clone()),
        ..Default::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tree_has_each_directory_once_and_leaves_out_what_is_missing() {
    let (_directory, _server, mut client) = start().await;
    let leaf = upload(&mut client, &directory(&[])).await;
    let absent = sha256(b"absent").to_proto();
    let middle = upload(&mut client, &directory(&[leaf.clone(), leaf.clone()])).await;
    let root = directory(&[middle.clone(), leaf, absent.clone(), middle]);
    let root_digest = upload(&mut client, &root).await;
    let found = tree(&mut client, of(&root_digest)).await.unwrap().concat();
    let sizes: Vec<usize> = found.iter().map(|d| d.directories.len()).collect();
    assert_eq!(sizes, [4, 2, 0]);

    refused(
        tree(&mut client, of(&absent)).await,
        Code::NotFound,
        &absent.hash,
    );
    let noise = upload(&mut client, &[0xff; 40]).await;
    refused(
        tree(&mut client, of(&noise)).await,
        Code::InvalidArgument,
        "no Directory",
    );
    let request = GetTreeRequest {
        page_size: -1,
        ..of(&root_digest)
    };
    refused(
        tree(&mut client, request).await,
        Code::InvalidArgument,
        "page_size",
    );
    let request = GetTreeRequest {
        page_token: "x".to_owned(),
        ..of(&root_digest)
    };
    refused(
        tree(&mut client, request).await,
        Code::InvalidArgument,
        "page_token",
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tree_comes_in_pages_and_can_be_resumed_at_any() {
    let (_directory, _server, mut client) = start().await;
    let mut children = Vec::new();
    for i in 0..20u32 {
        // Distinct by a file's name.
        let child = Directory {
            symlinks: vec![reapi::SymlinkNode {
                name: i.to_string(),
                ..Default::default()
            }],
            ..Default::default()
        };
        children.push(upload(&mut client, &child.encode_to_vec()).await);
    }
    let root = upload(&mut client, &directory(&children)).await;
    let whole = tree(&mut client, of(&root)).await.unwrap().concat();
    assert_eq!(whole.len(), 21);
    let paged = GetTreeRequest {
        page_size: 6,
        ..of(&root)
    };
    let pages: Vec<_> = client
        .get_tree(paged.clone())
        .await
        .unwrap()
        .into_inner()
        .try_collect()
        .await
        .unwrap();
    let sizes: Vec<usize> = pages
        .iter()
        .map(|page: &reapi::GetTreeResponse| page.directories.len())
        .collect();
    assert_eq!(sizes, [6, 6, 6, 3]);
    assert_eq!(pages[3].next_page_token, "");
    let resumed = GetTreeRequest {
        page_token: pages[1].next_page_token.clone(),
        ..paged
    };
    let rest = tree(&mut client, resumed).await.unwrap().concat();
    assert_eq!(rest, whole[12..]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tree_that_doubles_at_each_level_costs_its_levels_only() {
    let (_directory, _server, mut client) = start().await;
    let mut digest = upload(&mut client, &directory(&[])).await;
    for _ in 0..60 {
        digest = upload(&mut client, &directory(&[digest.clone(), digest])).await;
    }
    let found = tree(&mut client, of(&digest)).await.unwrap().concat();
    assert_eq!(found.len(), 61);
}

#[tokio::test(flavor = "multi_thread")]
async fn capabilities_announce_what_is_served() {
    let (_directory, server, mut client) = start().await;
    let answer = CapabilitiesClient::new(server.channel())
        .get_capabilities(GetCapabilitiesRequest::default())
        .await
        .unwrap()
        .into_inner();
    let low = answer.low_api_version.unwrap();
    assert_eq!((low.major, low.minor), (2, 0));
    let cache = answer.cache_capabilities.unwrap();
    assert!(
        cache
            .action_cache_update_capabilities
            .unwrap()
            .update_enabled
    );
    let zstd = Compressor::Zstd.to_proto();
    assert_eq!(cache.supported_compressors, [zstd]);
    assert_eq!(cache.supported_batch_update_compressors, [zstd]);
    assert!(answer.execution_capabilities.is_none());
    assert_eq!(cache.cache_priority_capabilities, None);
    // A batch of just the size announced is taken, and comes back.
    let data = content(1, cache.max_batch_total_size_bytes as usize);
    let digest = upload(&mut client, &data).await;
    let request = BatchReadBlobsRequest {
        digests: vec![digest],
        ..Default::default()
    };
    let read = client.batch_read_blobs(request).await.unwrap().into_inner();
    assert!(read.encoded_len() < 4 << 20);
    assert_eq!(read.responses[0].data, data);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_s_answer_fits_into_what_grpc_clients_take_however_small_its_blobs_are() {
    let (_directory, server, client) = start().await;
    // With gRPC's own limit, 4 MiB.
    let mut client = client.max_decoding_message_size(4 << 20);
    let blobs: Vec<_> = (0..60_000u64)
        .map(|i| (sha256(&i.to_le_bytes()), i.to_le_bytes().to_vec().into()))
        .collect();
    assert!(server.store.put(&blobs).iter().all(Result::is_ok));
    let read = |count| BatchReadBlobsRequest {
        digests: blobs[..count].iter().map(|(d, _)| d.to_proto()).collect(),
        ..Default::default()
    };
    let answer = client.batch_read_blobs(read(48_000)).await.unwrap();
    let answer = answer.into_inner();
    assert_eq!(answer.responses.len(), 48_000);
    // What is counted is what it weighs.
    assert!((4_000_000..=4 << 20).contains(&answer.encoded_len()));
    let answer = client.batch_read_blobs(read(51_000)).await;
    refused(answer, Code::InvalidArgument, "make smaller batches");
    // Reasons of failures are left out before they would make the answer too large.
    let absent = (0..48_000u64).map(|i| sha256(&(i + (1 << 40)).to_le_bytes()).to_proto());
    let request = BatchReadBlobsRequest {
        digests: absent.collect(),
        ..Default::default()
    };
    let answer = client.batch_read_blobs(request).await.unwrap().into_inner();
    let not_found = |status: Option<bb_remote_execution::proto::rpc::Status>| {
        status.is_some_and(|status| status.code == Code::NotFound as i32)
    };
    assert!(answer.responses.into_iter().all(|r| not_found(r.status)));
    let update = batch(blobs.iter().map(|(_, data)| put(data)).collect());
    let answer = client.batch_update_blobs(update).await;
    refused(answer, Code::InvalidArgument, "make smaller batches");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_of_a_tree_ends_before_a_directory_that_would_make_it_large() {
    let (_directory, _server, client) = start().await;
    let mut client = client.max_decoding_message_size(4 << 20);
    let mut children = Vec::new();
    for i in 0..4u8 {
        let child = Directory {
            symlinks: vec![reapi::SymlinkNode {
                name: i.to_string(),
                target: "t".repeat(1_900_000),
                ..Default::default()
            }],
            ..Default::default()
        };
        children.push(upload(&mut client, &child.encode_to_vec()).await);
    }
    let root = upload(&mut client, &directory(&children)).await;
    let pages = tree(&mut client, of(&root)).await.unwrap();
    let sizes: Vec<usize> = pages.iter().map(Vec::len).collect();
    assert_eq!(sizes, [2, 1, 1, 1]);
}
