//! A farm of real daemons whose blobs and results are in S3, or in Redis: a client that has the scheduler's
//! address only, and what outlives the scheduler's disk.

use std::{
    fs,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use bb_remote_execution::proto::reapi::{
    Directory, ExecuteResponse, FileNode, GetActionResultRequest,
};

use crate::harness::{
    Client, Daemon, Farm, Task, is_ok, is_root,
    services::{self, BUCKET},
};

/// What it makes has a part that needs no stream, and one that does.
async fn task(client: &Client, round: u64) -> Task {
    let mut task = Task::shell(&format!(
        "tr a-z A-Z < in > out && mkdir d && cat in in in > d/large && echo {round}"
    ))
    .outputs(&["out", "d"]);
    let input = format!("{round} hello\n").repeat(200_000);
    task.input_root = Directory {
        files: vec![FileNode {
            name: "in".to_owned(),
            digest: Some(client.upload(input).await),
            ..FileNode::default()
        }],
        ..Directory::default()
    };
    task.action.do_not_cache = false;
    task
}

async fn assert_outputs(client: &Client, response: &ExecuteResponse, round: u64) {
    assert!(is_ok(response), "{response:?}");
    let result = response.result.as_ref().unwrap();
    let out = client
        .read(result.output_files[0].digest.as_ref().unwrap())
        .await;
    let expected = format!("{round} HELLO\n").repeat(200_000);
    assert!(out == expected.as_bytes());
    let tree = result.output_directories[0].tree_digest.as_ref();
    assert!(!client.read(tree.unwrap()).await.is_empty());
}

async fn executed(client: &Client, task: &Task) -> ExecuteResponse {
    let begun = Instant::now();
    loop {
        let outcome = match client.prepare(task).await {
            Ok(action) => client.execute(action).await,
            Err(status) => Err(status),
        };
        match outcome {
            Ok(response) => return response,
            // A scheduler that starts.
            Err(status) => assert!(begun.elapsed() < Duration::from_secs(60), "{status}"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// What the Action Cache has.
async fn remembered(client: &Client, task: &Task) -> ExecuteResponse {
    let begun = Instant::now();
    let action = loop {
        match client.prepare(task).await {
            Ok(action) => break action,
            // A scheduler that starts.
            Err(status) => assert!(begun.elapsed() < Duration::from_secs(60), "{status}"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    let request = GetActionResultRequest {
        action_digest: Some(action),
        ..GetActionResultRequest::default()
    };
    let result = client.action_cache().get_action_result(request).await;
    ExecuteResponse {
        result: Some(result.unwrap().into_inner()),
        ..ExecuteResponse::default()
    }
}

async fn builds_with(storage: &str) {
    let mut farm = Farm::start(Path::new("/var/tmp"), 2, storage).await;
    let client = farm.client();
    let first = task(&client, 1).await;
    let response = executed(&client, &first).await;
    assert_outputs(&client, &response, 1).await;

    // The scheduler's disk is lost: nothing else is.
    farm.kill(Daemon::Scheduler);
    for entry in fs::read_dir(farm.path().join("storage")).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => fs::remove_dir_all(path).unwrap(),
            false => fs::remove_file(path).unwrap(),
        }
    }
    farm.spawn(Daemon::Scheduler);
    let response = remembered(&client, &first).await;
    assert_outputs(&client, &response, 1).await;

    // A worker that goes to the storage itself.
    let configuration = farm.path().join("bb_worker.toml");
    let text = fs::read_to_string(&configuration).unwrap();
    let others = text.lines().filter(|line| !line.starts_with("storage."));
    let text = others.collect::<Vec<_>>().join("\n");
    fs::write(&configuration, format!("{storage}\n{text}\n")).unwrap();
    let check = Command::new(farm.path().join("bin/bb_worker"))
        .args(["--check", "--config"])
        .arg(&configuration)
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&check.stdout);
    assert!(
        told.contains("storage.cas:") && told.contains("answers"),
        "{told}"
    );
    farm.kill(Daemon::Worker);
    farm.spawn(Daemon::Worker);
    let second = task(&client, 2).await;
    let response = executed(&client, &second).await;
    assert_outputs(&client, &response, 2).await;
    let response = remembered(&client, &second).await;
    assert_outputs(&client, &response, 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_farm_builds_with_redis_as_its_storage() {
    if !is_root() {
        return;
    }
    let Some(redis) = services::redis(&[]) else {
        return;
    };
    let address = redis.address;
    builds_with(&format!(
        "storage.cas = \"redis\"\nstorage.action_cache = \"redis\"\n\
         storage.redis.endpoint = \"redis://{address}\"\n"
    ))
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_farm_builds_with_s3_as_its_storage() {
    if !is_root() {
        return;
    }
    let Some(s3) = services::s3() else {
        return;
    };
    let directory = tempfile::Builder::new().tempdir_in("/var/tmp").unwrap();
    let file = directory.path().join("credentials");
    let key = "[default]\naws_access_key_id = a\naws_secret_access_key = b\n";
    fs::write(&file, key).unwrap();
    let readable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(directory.path(), readable).unwrap();
    let (address, file) = (s3.address, file.display());
    builds_with(&format!(
        "storage.cas = \"s3\"\nstorage.action_cache = \"s3\"\n\
         storage.s3 = {{ bucket = \"{BUCKET}\", endpoint = \"http://{address}\", prefix = \"farm\", credentials_file = \"{file}\" }}\n"
    ))
    .await;
}
