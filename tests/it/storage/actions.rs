//! The Action Cache: a result that is returned names only what is there.

use bb_remote_execution::{
    daemon::Channel,
    digest::{Digest, DigestFunction},
    proto::reapi::{
        self, ActionResult, Directory, DirectoryNode, FileNode, GetActionResultRequest,
        OutputDirectory, OutputFile, Tree, UpdateActionResultRequest,
        action_cache_client::ActionCacheClient,
    },
    storage::embedded::Store,
};
use prost::Message;
use tonic::{Code, Status};

use super::{GIB, Server, sha256};

type Actions = ActionCacheClient<Channel>;

async fn get(
    client: &mut Actions,
    instance: &str,
    action: &Digest,
) -> Result<ActionResult, Status> {
    let request = GetActionResultRequest {
        instance_name: instance.to_owned(),
        action_digest: Some(action.to_proto()),
        ..Default::default()
    };
    Ok(client.get_action_result(request).await?.into_inner())
}

async fn update(
    client: &mut Actions,
    instance: &str,
    action: &Digest,
    result: &ActionResult,
) -> Result<(), Status> {
    let request = UpdateActionResultRequest {
        instance_name: instance.to_owned(),
        action_digest: Some(action.to_proto()),
        action_result: Some(result.clone()),
        ..Default::default()
    };
    client.update_action_result(request).await.map(drop)
}

fn put(store: &Store, data: impl AsRef<[u8]>) -> Digest {
    let data = data.as_ref().to_vec();
    let digest = sha256(&data);
    store.put(&[(digest, data.into())]).pop().unwrap().unwrap();
    digest
}

fn file(digest: Digest) -> FileNode {
    FileNode {
        name: "file".to_owned(),
        digest: Some(digest.to_proto()),
        ..Default::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_result_of_which_anything_is_missing_is_none() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(directory.path(), GIB).await;
    let mut client = Actions::new(server.channel());
    let here = put(&server.store, b"here");
    let absent = sha256(b"absent");
    let tree = |digest: Digest, child: Digest| Tree {
        root: Some(Directory {
            files: vec![file(digest)],
            ..Default::default()
        }),
        children: vec![Directory {
            files: vec![file(child)],
            ..Default::default()
        }],
    };
    let complete_tree = put(&server.store, tree(here, here).encode_to_vec());
    let broken_root = put(&server.store, tree(absent, here).encode_to_vec());
    let broken_child = put(&server.store, tree(here, absent).encode_to_vec());
    let no_tree = put(&server.store, [0xff; 30]);
    let directory_of = |files: Vec<FileNode>, directories: Vec<Digest>| {
        let nodes = directories.into_iter().map(|digest| DirectoryNode {
            name: digest.hash_hex(),
            digest: Some(digest.to_proto()),
        });
        Directory {
            files,
            directories: nodes.collect(),
            ..Default::default()
        }
        .encode_to_vec()
    };
    let leaf = put(&server.store, directory_of(vec![file(here)], vec![]));
    let root = put(&server.store, directory_of(vec![], vec![leaf, leaf]));
    let broken_leaf = put(&server.store, directory_of(vec![file(absent)], vec![]));
    let broken = put(&server.store, directory_of(vec![], vec![leaf, broken_leaf]));
    let hollow = put(&server.store, directory_of(vec![], vec![absent]));

    let with_file = |digest: Digest| ActionResult {
        output_files: vec![OutputFile {
            path: "out".to_owned(),
            digest: Some(digest.to_proto()),
            ..Default::default()
        }],
        ..Default::default()
    };
    let with_directory = |tree: Option<Digest>, root: Option<Digest>| ActionResult {
        output_directories: vec![OutputDirectory {
            path: "out".to_owned(),
            tree_digest: tree.map(|digest| digest.to_proto()),
            root_directory_digest: root.map(|digest| digest.to_proto()),
            ..Default::default()
        }],
        ..Default::default()
    };
    let stdout = |digest: Digest| ActionResult {
        stdout_digest: Some(digest.to_proto()),
        ..Default::default()
    };
    let stderr = |digest: Digest| ActionResult {
        stderr_digest: Some(digest.to_proto()),
        ..Default::default()
    };
    let empty = DigestFunction::Sha256.empty();
    let complete = [
        ActionResult::default(),
        with_file(here),
        with_file(empty),
        stdout(here),
        stderr(here),
        with_directory(Some(complete_tree), None),
        with_directory(None, Some(root)),
        with_directory(Some(complete_tree), Some(root)),
    ];
    let incomplete = [
        with_file(absent),
        stdout(absent),
        stderr(absent),
        with_directory(Some(absent), None),
        with_directory(Some(no_tree), None),
        with_directory(Some(broken_root), None),
        with_directory(Some(broken_child), None),
        with_directory(None, Some(absent)),
        with_directory(None, Some(broken)),
        with_directory(None, Some(hollow)),
        with_directory(Some(complete_tree), Some(broken)),
    ];
    for (i, result) in complete.iter().enumerate() {
        let action = sha256(format!("complete {i}").as_bytes());
        update(&mut client, "", &action, result).await.unwrap();
        assert_eq!(&get(&mut client, "", &action).await.unwrap(), result);
    }
    for (i, result) in incomplete.iter().enumerate() {
        let action = sha256(format!("incomplete {i}").as_bytes());
        update(&mut client, "", &action, result).await.unwrap();
        let status = get(&mut client, "", &action).await.unwrap_err();
        assert_eq!(status.code(), Code::NotFound, "{i}: {status}");
    }
    // What was missing arrives.
    put(&server.store, b"absent");
    let action = sha256(b"incomplete 6");
    get(&mut client, "", &action).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn results_are_apart_by_instance_and_the_last_one_counts_after_a_restart_too() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(directory.path(), GIB).await;
    let mut client = Actions::new(server.channel());
    let action = sha256(b"action");
    let exit = |exit_code| ActionResult {
        exit_code,
        ..Default::default()
    };
    for (instance, code) in [("a", 1), ("b", 2), ("a", 3)] {
        update(&mut client, instance, &action, &exit(code))
            .await
            .unwrap();
    }
    let status = get(&mut client, "", &action).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    server.stop().await;
    let server = Server::start(directory.path(), GIB).await;
    let mut client = Actions::new(server.channel());
    assert_eq!(get(&mut client, "a", &action).await.unwrap(), exit(3));
    assert_eq!(get(&mut client, "b", &action).await.unwrap(), exit(2));
}

#[tokio::test(flavor = "multi_thread")]
async fn results_with_ill_formed_digests_are_refused_by_name() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(directory.path(), GIB).await;
    let mut client = Actions::new(server.channel());
    let action = sha256(b"action");
    let bad = Some(reapi::Digest {
        hash: "abc".to_owned(),
        size_bytes: 1,
    });
    let file = |digest| ActionResult {
        output_files: vec![OutputFile {
            path: "some/file".to_owned(),
            digest,
            ..Default::default()
        }],
        ..Default::default()
    };
    let directory = |tree_digest, root_directory_digest| ActionResult {
        output_directories: vec![OutputDirectory {
            path: "some/directory".to_owned(),
            tree_digest,
            root_directory_digest,
            ..Default::default()
        }],
        ..Default::default()
    };
    let stdout = ActionResult {
        stdout_digest: bad.clone(),
        ..Default::default()
    };
    for (result, words) in [
        (file(bad.clone()), "some/file"),
        (file(None), "some/file"),
        (directory(bad.clone(), None), "some/directory"),
        (directory(None, bad.clone()), "some/directory"),
        (directory(None, None), "some/directory"),
        (stdout, "stdout_digest"),
    ] {
        let status = update(&mut client, "", &action, &result).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.message().contains(words), "{status}");
    }
    let request = UpdateActionResultRequest {
        action_digest: Some(action.to_proto()),
        ..Default::default()
    };
    let status = client.update_action_result(request).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    let request = GetActionResultRequest {
        action_digest: bad,
        ..Default::default()
    };
    let status = client.get_action_result(request).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
}
