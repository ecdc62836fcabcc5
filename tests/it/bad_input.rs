//! What clients get wrong, by mistake or on purpose: each gets an answer that a person can act on,
//! and the farm goes on.

use std::{path::Path, time::Duration};

use bb_remote_execution::proto::{
    bytestream::{ReadRequest, WriteRequest, byte_stream_client::ByteStreamClient},
    reapi::{
        BatchReadBlobsRequest, Directory, DirectoryNode, ExecuteRequest, FileNode,
        FindMissingBlobsRequest, GetActionResultRequest, SymlinkNode, WaitExecutionRequest,
    },
    rpc::Code,
};
use prost::Message as _;
use tonic::Code as GrpcCode;

use crate::harness::{Client, Daemon, Farm, Task, digest_of, is_ok, is_root};

/// The status of an action that the farm took but could not run.
async fn refusal(client: &Client, task: &Task) -> (Code, String) {
    match client.try_run(task).await {
        Ok(response) => {
            let status = response.status.unwrap_or_default();
            (Code::try_from(status.code).unwrap(), status.message)
        }
        Err(status) => (
            Code::try_from(status.code() as i32).unwrap(),
            status.message().to_owned(),
        ),
    }
}

async fn assert_refused(client: &Client, what: &str, task: &Task, code: Code, words: &[&str]) {
    let (actual, message) = refusal(client, task).await;
    assert_eq!(actual, code, "{what}: {message}");
    for word in words {
        assert!(message.contains(word), "{what}: {message:?} lacks {word:?}");
    }
}

fn execute(digest: bb_remote_execution::proto::reapi::Digest) -> ExecuteRequest {
    ExecuteRequest {
        action_digest: Some(digest),
        ..Default::default()
    }
}

fn with_root(root: Directory) -> Task {
    let mut task = Task::shell("exit 0");
    task.input_root = root;
    task
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_input_gets_a_clear_error_and_the_farm_goes_on() {
    if !is_root() {
        return;
    }
    let mut farm = Farm::start(Path::new("/var/tmp"), 2, "").await;
    let client = farm.client();
    let pids = [Daemon::Scheduler, Daemon::Worker, Daemon::Runner].map(|d| farm.pid(d));

    digests(&client).await;
    names(&client).await;
    paths(&client).await;
    directories(&client).await;
    actions(&client).await;
    writes(&client).await;
    never_reads(&mut farm).await;

    assert!(is_ok(&client.run(&Task::shell("exit 0")).await));
    for (daemon, pid) in [Daemon::Scheduler, Daemon::Worker, Daemon::Runner]
        .into_iter()
        .zip(pids)
    {
        assert!(farm.is_alive(daemon), "{daemon:?} died");
        assert_eq!(farm.pid(daemon), pid);
        let peak = farm.peak_memory(daemon);
        assert!(peak < 512 << 20, "{daemon:?} took {peak} bytes");
    }
}

async fn digests(client: &Client) {
    let mut bad = Vec::new();
    for (hash, size) in [
        ("", 0),
        ("xyz", 1),
        (&"A".repeat(64) as &str, 1),
        (&"g".repeat(64), 1),
        (&"a".repeat(64), -1),
        (&"a".repeat(500_000), 1),
        ("é", 1),
    ] {
        bad.push(bb_remote_execution::proto::reapi::Digest {
            hash: hash.to_owned(),
            size_bytes: size,
        });
    }
    for digest in bad {
        let what = format!("{:.20?} {}", digest.hash, digest.size_bytes);
        let refused = |status: tonic::Status| {
            assert_eq!(
                status.code(),
                GrpcCode::InvalidArgument,
                "{what}: {status:.300}"
            );
            assert!(status.message().len() < 1000, "{what}: a novel");
        };
        let request = execute(digest.clone());
        refused(client.execution().execute(request).await.unwrap_err());
        let request = FindMissingBlobsRequest {
            blob_digests: vec![digest.clone()],
            ..Default::default()
        };
        refused(client.cas().find_missing_blobs(request).await.unwrap_err());
        let request = GetActionResultRequest {
            action_digest: Some(digest.clone()),
            ..Default::default()
        };
        refused(
            client
                .action_cache()
                .get_action_result(request)
                .await
                .unwrap_err(),
        );
        let request = BatchReadBlobsRequest {
            digests: vec![digest.clone()],
            ..Default::default()
        };
        match client.cas().batch_read_blobs(request).await {
            Err(status) => refused(status),
            Ok(response) => {
                let code = response.into_inner().responses[0]
                    .status
                    .as_ref()
                    .unwrap()
                    .code;
                assert_eq!(code, Code::InvalidArgument as i32, "{what}");
            }
        }
    }
    // An Action that is not there, and one whose size lies.
    let action = client.prepare(&Task::shell("exit 0")).await.unwrap();
    for digest in [
        digest_of(b"never uploaded"),
        bb_remote_execution::proto::reapi::Digest {
            size_bytes: action.size_bytes + 1,
            ..action
        },
    ] {
        let response = client.execute(digest).await;
        let (code, message) = match &response {
            Ok(response) => {
                let status = response.status.clone().unwrap_or_default();
                (status.code, status.message)
            }
            Err(status) => (status.code() as i32, status.message().to_owned()),
        };
        assert_eq!(code, Code::FailedPrecondition as i32, "{message}");
        assert!(
            message.contains("Action") || message.contains("action"),
            "{message}"
        );
    }
    // A blob whose size or hash lies.
    let mut digest = digest_of(b"content");
    digest.size_bytes += 1;
    for (digest, data) in [
        (digest, &b"content"[..]),
        (digest_of(b"content"), &b"c0ntent"[..]),
    ] {
        let request = bb_remote_execution::proto::reapi::BatchUpdateBlobsRequest {
            requests: vec![
                bb_remote_execution::proto::reapi::batch_update_blobs_request::Request {
                    digest: Some(digest),
                    data: data.to_vec().into(),
                    ..Default::default()
                },
            ],
            ..Default::default()
        };
        let response = client.cas().batch_update_blobs(request).await.unwrap();
        let status = response.into_inner().responses[0].status.clone().unwrap();
        assert_eq!(
            status.code,
            Code::InvalidArgument as i32,
            "{}",
            status.message
        );
    }
}

async fn names(client: &Client) {
    for name in ["blobs", "a/uploads/b", "/a", "a/", "a//b", "operations"] {
        let mut request = execute(digest_of(b"x"));
        request.instance_name = name.to_owned();
        let status = client.execution().execute(request).await.unwrap_err();
        assert_eq!(status.code(), GrpcCode::InvalidArgument, "{name}: {status}");
        let request = FindMissingBlobsRequest {
            instance_name: name.to_owned(),
            ..Default::default()
        };
        let status = client.cas().find_missing_blobs(request).await.unwrap_err();
        assert_eq!(status.code(), GrpcCode::InvalidArgument, "{name}: {status}");
    }
    let request = WaitExecutionRequest {
        name: "no-such-operation".to_owned(),
    };
    let status = client
        .execution()
        .wait_execution(request)
        .await
        .unwrap_err();
    assert_eq!(status.code(), GrpcCode::NotFound);
    assert!(status.message().contains("no-such-operation"), "{status}");
}

async fn paths(client: &Client) {
    for path in ["/etc/passwd", "../escape", "a/../../escape"] {
        let task = Task::shell("exit 0").outputs(&[path]);
        assert_refused(client, path, &task, Code::InvalidArgument, &[path]).await;
        let mut task = Task::shell("exit 0");
        task.command.working_directory = path.to_owned();
        assert_refused(client, path, &task, Code::InvalidArgument, &[path]).await;
    }
    let task = Task::shell("exit 0").outputs(&["a\0b"]);
    assert_refused(client, "NUL", &task, Code::InvalidArgument, &[]).await;
    let task = Task::new(&["/bin/echo", "a\0b"]);
    assert_refused(
        client,
        "NUL in an argument",
        &task,
        Code::InvalidArgument,
        &[],
    )
    .await;
    let mut task = Task::shell("exit 0");
    task.command.working_directory = "no/such/directory".to_owned();
    assert_refused(
        client,
        "working directory",
        &task,
        Code::InvalidArgument,
        &["no/such/directory"],
    )
    .await;
}

async fn directories(client: &Client) {
    let empty = client.upload_message(&Directory::default()).await;
    let file = client.upload("content").await;
    let node = |name: &str| FileNode {
        name: name.to_owned(),
        digest: Some(file.clone()),
        ..Default::default()
    };
    for name in ["", ".", "..", "a/b", "a\0b"] {
        for root in [
            Directory {
                files: vec![node(name)],
                ..Default::default()
            },
            Directory {
                directories: vec![DirectoryNode {
                    name: name.to_owned(),
                    digest: Some(empty.clone()),
                }],
                ..Default::default()
            },
            Directory {
                symlinks: vec![SymlinkNode {
                    name: name.to_owned(),
                    target: "x".to_owned(),
                    ..Default::default()
                }],
                ..Default::default()
            },
        ] {
            assert_refused(client, name, &with_root(root), Code::InvalidArgument, &[]).await;
        }
    }
    // The same name twice, in one list or in two.
    let twice = Directory {
        files: vec![node("same"), node("same")],
        ..Default::default()
    };
    assert_refused(
        client,
        "twice",
        &with_root(twice),
        Code::InvalidArgument,
        &["same"],
    )
    .await;
    let twice = Directory {
        files: vec![node("same")],
        directories: vec![DirectoryNode {
            name: "same".to_owned(),
            digest: Some(empty.clone()),
        }],
        ..Default::default()
    };
    assert_refused(
        client,
        "twice",
        &with_root(twice),
        Code::InvalidArgument,
        &["same"],
    )
    .await;

    // What is no Directory at all.
    let mut task = Task::shell("exit 0");
    task.action.input_root_digest = Some(client.upload(vec![0xff; 100]).await);
    assert_refused(client, "noise", &task, Code::InvalidArgument, &[]).await;

    // Directories cannot contain themselves, but they can be deep, or wide by repetition.
    let mut deep = empty.clone();
    let mut levels = Vec::new();
    for _ in 0..20_000 {
        let level = Directory {
            directories: vec![DirectoryNode {
                name: "d".to_owned(),
                digest: Some(deep),
            }],
            ..Default::default()
        };
        let level = level.encode_to_vec();
        deep = digest_of(&level);
        levels.push(level);
    }
    client.upload_many(levels).await;
    let mut task = Task::shell("exit 0");
    task.action.input_root_digest = Some(deep);
    assert_refused(client, "deep", &task, Code::InvalidArgument, &[]).await;
    let mut wide = empty.clone();
    for _ in 0..30 {
        wide = client
            .upload_message(&Directory {
                directories: ["a", "b", "c", "d"]
                    .map(|name| DirectoryNode {
                        name: name.to_owned(),
                        digest: Some(wide.clone()),
                    })
                    .to_vec(),
                ..Default::default()
            })
            .await;
    }
    let mut task = Task::shell("exit 0");
    task.action.input_root_digest = Some(wide);
    assert_refused(client, "wide", &task, Code::InvalidArgument, &[]).await;

    // An empty hash, as some clients send for an empty directory.
    let mut task = Task::shell("exit 0");
    task.action.input_root_digest = Some(Default::default());
    assert_refused(
        client,
        "empty hash",
        &task,
        Code::InvalidArgument,
        &["input_root_digest"],
    )
    .await;

    // Everything that is missing is told at once, and nothing else.
    let absent: Vec<_> = (0..5)
        .map(|i| digest_of(format!("absent {i}").as_bytes()))
        .collect();
    let root = Directory {
        files: absent[..4]
            .iter()
            .enumerate()
            .map(|(i, digest)| FileNode {
                name: format!("f{i}"),
                digest: Some(digest.clone()),
                ..Default::default()
            })
            .collect(),
        directories: vec![DirectoryNode {
            name: "z".to_owned(),
            digest: Some(absent[4].clone()),
        }],
        ..Default::default()
    };
    let response = client.run(&with_root(root)).await;
    let status = response.status.unwrap();
    assert_eq!(
        status.code,
        Code::FailedPrecondition as i32,
        "{}",
        status.message
    );
    let failure: bb_remote_execution::proto::rpc::PreconditionFailure =
        bb_remote_execution::proto::unpack(&status.details[0]).unwrap();
    let mut named: Vec<_> = failure
        .violations
        .iter()
        .map(|v| v.subject.clone())
        .collect();
    named.sort();
    let mut expected: Vec<_> = absent
        .iter()
        .map(|digest| format!("blobs/{}/{}", digest.hash, digest.size_bytes))
        .collect();
    expected.sort();
    assert_eq!(named, expected);
    assert!(failure.violations.iter().all(|v| v.r#type == "MISSING"));
    assert_eq!(status.details.len(), 1);
}

async fn actions(client: &Client) {
    assert_refused(
        client,
        "no arguments",
        &Task::new(&[]),
        Code::InvalidArgument,
        &[],
    )
    .await;
    let mut task = Task::shell("exit 0");
    task.action.platform.as_mut().unwrap().properties[0].value = "plan9".to_owned();
    assert_refused(
        client,
        "platform",
        &task,
        Code::Unavailable,
        &["plan9", "No workers exist"],
    )
    .await;
    let mut task = Task::shell("exit 0");
    task.action.timeout = Some(prost_types::Duration {
        seconds: 1 << 40,
        nanos: 0,
    });
    assert_refused(
        client,
        "timeout",
        &task,
        Code::InvalidArgument,
        &["timeout"],
    )
    .await;
    task.action.timeout = Some(prost_types::Duration {
        seconds: -1,
        nanos: 0,
    });
    assert_refused(
        client,
        "timeout",
        &task,
        Code::InvalidArgument,
        &["timeout"],
    )
    .await;

    // Noise, and a message that is larger than any Action.
    let digest = client.upload(vec![0xff; 64]).await;
    let response = client.execute(digest).await;
    let code = response.map_or_else(|s| s.code() as i32, |r| r.status.unwrap().code);
    assert_eq!(code, Code::InvalidArgument as i32);
    let huge = vec![0u8; 64 << 20];
    let digest = digest_of(&huge);
    write(client, &digest, huge).await.unwrap();
    let response = client.execute(digest).await;
    let (code, message) = response.map_or_else(
        |s| (s.code() as i32, s.message().to_owned()),
        |r| {
            let status = r.status.unwrap();
            (status.code, status.message)
        },
    );
    assert_eq!(code, Code::InvalidArgument as i32, "{message}");
}

async fn write(
    client: &Client,
    digest: &bb_remote_execution::proto::reapi::Digest,
    data: Vec<u8>,
) -> Result<i64, tonic::Status> {
    let name = format!(
        "uploads/{}/blobs/{}/{}",
        uuid::Uuid::new_v4(),
        digest.hash,
        digest.size_bytes
    );
    let mut requests = Vec::new();
    let mut offset = 0;
    for chunk in data.chunks(1 << 20) {
        requests.push(WriteRequest {
            resource_name: name.clone(),
            write_offset: offset as i64,
            finish_write: offset + chunk.len() == data.len(),
            data: chunk.to_vec().into(),
        });
        offset += chunk.len();
    }
    ByteStreamClient::new(client.channel.clone())
        .write(tokio_stream::iter(requests))
        .await
        .map(|response| response.into_inner().committed_size)
}

async fn writes(client: &Client) {
    let whole = vec![7u8; 3 << 20];
    let digest = digest_of(&whole);
    let truncated = whole[..2 << 20].to_vec();
    let status = write(client, &digest, truncated).await.unwrap_err();
    assert_eq!(status.code(), GrpcCode::InvalidArgument, "{status}");
    let mut longer = whole.clone();
    longer.extend([7; 100]);
    let status = write(client, &digest, longer).await.unwrap_err();
    assert_eq!(status.code(), GrpcCode::InvalidArgument, "{status}");
    let status = write(client, &digest, vec![8u8; 3 << 20])
        .await
        .unwrap_err();
    assert_eq!(status.code(), GrpcCode::InvalidArgument, "{status}");
    let mut bytestream = ByteStreamClient::new(client.channel.clone());
    for name in ["", "blobs", "blobs/xyz/1", "uploads/x/blobs/y/z"] {
        let request = WriteRequest {
            resource_name: name.to_owned(),
            finish_write: true,
            ..Default::default()
        };
        let status = bytestream
            .write(tokio_stream::iter([request]))
            .await
            .unwrap_err();
        assert_eq!(status.code(), GrpcCode::InvalidArgument, "{name}: {status}");
        let request = ReadRequest {
            resource_name: name.to_owned(),
            ..Default::default()
        };
        let status = bytestream.read(request).await.unwrap_err();
        assert_eq!(status.code(), GrpcCode::InvalidArgument, "{name}: {status}");
    }
    // None of them left anything that could be served.
    let request = FindMissingBlobsRequest {
        blob_digests: vec![digest.clone()],
        ..Default::default()
    };
    let missing = client.cas().find_missing_blobs(request).await.unwrap();
    assert_eq!(
        missing.into_inner().missing_blob_digests,
        vec![digest.clone()]
    );
    assert_eq!(
        write(client, &digest, whole).await.unwrap(),
        digest.size_bytes
    );
}

/// Many streams that are opened and never read, of a blob and of operations.
async fn never_reads(farm: &mut Farm) {
    let client = farm.client();
    let blob = vec![9u8; 48 << 20];
    let digest = digest_of(&blob);
    write(&client, &digest, blob).await.unwrap();
    let before = farm.peak_memory(Daemon::Scheduler);
    let mut held = Vec::new();
    for _ in 0..20 {
        let lazy = farm.client();
        let stream = ByteStreamClient::new(lazy.channel.clone())
            .read(ReadRequest {
                resource_name: format!("blobs/{}/{}", digest.hash, digest.size_bytes),
                ..Default::default()
            })
            .await
            .unwrap();
        held.push(stream);
    }
    let mut task = Task::shell("sleep 1");
    task.action.do_not_cache = false;
    let action = client.prepare(&task).await.unwrap();
    let mut operations = Vec::new();
    for _ in 0..100 {
        let request = execute(action.clone());
        operations.push(client.execution().execute(request).await.unwrap());
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    let grown = farm.peak_memory(Daemon::Scheduler).saturating_sub(before);
    // All of them together would be 960 MiB.
    assert!(grown < 400 << 20, "grew by {grown} bytes");
    assert!(is_ok(&client.run(&Task::shell("exit 0")).await));
    drop((held, operations));
}
