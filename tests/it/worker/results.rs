//! How an action ends, and what is kept of it.

use std::time::{Duration, Instant};

use bb_remote_execution::{
    config::{self, Endpoint, worker},
    daemon::Failure,
    proto::{cas::HistoricalExecuteResponse, reapi, rpc::Code},
    worker::execute::ExecutionPhase,
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::farm::{FUNCTION, Farm, shell};

pub fn code(response: &reapi::ExecuteResponse) -> Code {
    let status = response.status.clone().unwrap_or_default();
    Code::try_from(status.code).unwrap()
}

pub fn text(response: &reapi::ExecuteResponse) -> &str {
    let status = response.status.as_ref();
    status.map_or("", |status| status.message.as_str())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_good_result_is_in_the_action_cache_when_it_is_reported() {
    let farm = Farm::start().await;
    let root = farm.root(&[]).await;
    let script = "echo out; echo err >&2; echo file > f; echo $FROM_WORKER > g";
    let task = farm.task(&shell(script, &["f", "g"]), root).await;
    farm.calls.take();
    let response = farm.execute(task.clone()).await;
    assert_eq!(response.status, None);
    let calls = farm.calls.take();
    let position = |name: &str| calls.iter().position(|call| call == name);
    assert!(
        position("BatchUpdateBlobs") < position("UpdateActionResult"),
        "{calls:?}"
    );
    assert!(calls.len() <= 5, "{calls:?}");
    let result = farm.action_result(&task).await.unwrap();
    assert_eq!(Some(&result), response.result.as_ref());
    assert_eq!(farm.read(&result.stdout_digest).await, b"out\n");
    assert_eq!(farm.read(&result.stderr_digest).await, b"err\n");
    assert_eq!(farm.read(&result.output_files[0].digest).await, b"file\n");
    assert_eq!(farm.read(&result.output_files[1].digest).await, b"yes\n");
    assert!(
        response
            .message
            .starts_with("Action details (cached result): http://browser/blobs/sha256/action/")
    );
    let metadata = result.execution_metadata.unwrap();
    assert_eq!(metadata.worker, r#"{"hostname":"here"}"#);
    let stamps = [
        metadata.worker_start_timestamp,
        metadata.input_fetch_start_timestamp,
        metadata.input_fetch_completed_timestamp,
        metadata.execution_start_timestamp,
        metadata.execution_completed_timestamp,
        metadata.output_upload_start_timestamp,
        metadata.output_upload_completed_timestamp,
        metadata.worker_completed_timestamp,
    ]
    .map(|stamp| stamp.map(|stamp| (stamp.seconds, stamp.nanos)).unwrap());
    assert!(stamps.is_sorted(), "{stamps:?}");
    assert!(metadata.virtual_execution_duration.is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_action_without_outputs_uploads_nothing() {
    let farm = Farm::start().await;
    let root = farm.root(&[]).await;
    let task = farm.task(&shell("true", &[]), root).await;
    // The client asks once in its life for the server's limits.
    farm.shell("true # first", &[], &[]).await;
    farm.calls.take();
    let response = farm.execute(task).await;
    assert_eq!(response.status, None);
    assert_eq!(farm.calls.take(), ["BatchReadBlobs", "UpdateActionResult"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_cached_is_kept_behind_a_link() {
    let farm = Farm::start().await;
    let root = farm.root(&[]).await;
    let failing = farm
        .task(&shell("echo why; exit 37", &[]), root.clone())
        .await;
    let mut uncached = farm.task(&shell("echo why; exit 0", &[]), root).await;
    uncached.action.do_not_cache = true;
    for (task, exit_code) in [(failing, 37), (uncached, 0)] {
        let response = farm.execute(task.clone()).await;
        assert_eq!(response.status, None);
        assert_eq!(response.result.as_ref().unwrap().exit_code, exit_code);
        assert_eq!(farm.action_result(&task).await, None);
        let prefix = "Action details (uncached result): http://browser/blobs/sha256/historical_execute_response/";
        let name = response.message.strip_prefix(prefix).unwrap();
        let (hash, size) = name.trim_end_matches('/').split_once('-').unwrap();
        let digest = reapi::Digest {
            hash: hash.to_owned(),
            size_bytes: size.parse().unwrap(),
        };
        let kept: HistoricalExecuteResponse = farm.read_message(&Some(digest)).await;
        assert_eq!(kept.action_digest, Some(task.digest.to_proto()));
        assert_eq!(kept.execute_response.unwrap().result, response.result);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_that_is_too_slow_ends_with_what_it_made_so_far() {
    let farm = Farm::start().await;
    let root = farm.root(&[]).await;
    let script = "echo out; echo file > f; (sleep 100; echo late > f) & sleep 100";
    let mut task = farm.task(&shell(script, &["f"]), root).await;
    task.timeout = Duration::from_secs(2);
    let response = farm.execute(task.clone()).await;
    assert_eq!(code(&response), Code::DeadlineExceeded);
    assert!(
        text(&response).starts_with("Failed to run command: "),
        "{}",
        text(&response)
    );
    let result = response.result.unwrap();
    assert_eq!(farm.read(&result.stdout_digest).await, b"out\n");
    assert_eq!(farm.read(&result.output_files[0].digest).await, b"file\n");
    assert_eq!(farm.action_result(&task).await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_action_ends_soon_and_leaves_nothing() {
    let farm = Farm::start().await;
    let root = farm.root(&[]).await;
    let task = farm
        .task(&shell("echo file > f; sleep infinity", &["f"]), root)
        .await;
    let (sender, mut stage) = watch::channel(ExecutionPhase::FetchingInputs);
    let cancel = CancellationToken::new();
    let (executor, token, before) = (farm.executor.clone(), cancel.clone(), task.clone());
    let running = tokio::spawn(async move { executor.execute(0, before, &sender, &token).await });
    stage
        .wait_for(|stage| *stage == ExecutionPhase::Running)
        .await
        .unwrap();
    cancel.cancel();
    let response = running.await.unwrap();
    assert_eq!(code(&response), Code::Cancelled);
    assert_eq!(farm.action_result(&task).await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn stages_come_in_their_order() {
    let farm = Farm::start().await;
    let root = farm.root(&[]).await;
    let task = farm
        .task(
            &shell("sleep 0.1; head -c 3000000 /dev/zero > f", &["f"]),
            root,
        )
        .await;
    let (sender, mut stage) = watch::channel(ExecutionPhase::FetchingInputs);
    let watching = tokio::spawn(async move {
        let mut seen = Vec::new();
        while stage.changed().await.is_ok() {
            seen.push(*stage.borrow_and_update());
        }
        seen
    });
    let response = farm
        .executor
        .execute(0, task, &sender, &CancellationToken::new())
        .await;
    assert_eq!(response.status, None);
    drop(sender);
    let seen = watching.await.unwrap();
    let after = &seen[seen
        .iter()
        .position(|s| *s == ExecutionPhase::Running)
        .unwrap()..];
    assert_eq!(
        after,
        [ExecutionPhase::Running, ExecutionPhase::UploadingOutputs]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_client_got_wrong_is_an_invalid_argument() {
    let farm = Farm::start().await;
    let root = farm.root(&[]).await;
    for command in [
        reapi::Command::default(),
        shell("true", &["/absolute"]),
        shell("true", &["../outside"]),
        reapi::Command {
            working_directory: "../x".to_owned(),
            ..shell("true", &[])
        },
        reapi::Command {
            arguments: vec!["/nonexistent".to_owned()],
            ..Default::default()
        },
    ] {
        let task = farm.task(&command, root.clone()).await;
        let response = farm.execute(task).await;
        assert_eq!(
            code(&response),
            Code::InvalidArgument,
            "{}",
            text(&response)
        );
    }
    // As `bgd request-dummy` sends it.
    let task = farm.task_of(reapi::Action {
        command_digest: Some(FUNCTION.empty().to_proto()),
        input_root_digest: Some(reapi::Digest::default()),
        ..Default::default()
    });
    let response = farm.execute(task).await;
    assert_eq!(
        code(&response),
        Code::InvalidArgument,
        "{}",
        text(&response)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_is_ready_when_its_runner_sees_its_directories() {
    let farm = Farm::start().await;
    farm.executor.check_readiness(0).await.unwrap();
    let response = farm.shell("true", &[], &[]).await;
    assert_eq!(response.status, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_runner_cannot_do_is_unavailable_and_its_host_goes_out_of_service() {
    use bb_remote_execution::worker::availability::NotReady;
    for answer in [
        tonic::Code::Internal,
        tonic::Code::Cancelled,
        tonic::Code::Unknown,
        tonic::Code::ResourceExhausted,
        tonic::Code::PermissionDenied,
    ] {
        let farm = Farm::start_failing(answer).await;
        let availability = &farm.executor.availability;
        let paused = availability.paused();
        // The pauses take long.
        let faults = if answer == tonic::Code::Internal {
            3
        } else {
            1
        };
        for fault in 1..=faults {
            let before = *paused.borrow();
            let script = format!("echo out > f # {fault}");
            let response = farm.shell(&script, &[], &["f"]).await;
            assert_eq!(code(&response), Code::Unavailable, "{}", text(&response));
            assert!(text(&response).contains("Failed to run command: no"));
            // Whoever takes the action next is somebody else.
            assert!(*paused.borrow() > before);
            let ready = farm.executor.check_readiness(0).await;
            assert!(matches!(ready, Err(NotReady::Paused { .. })), "{ready:?}");
            assert_eq!(availability.trouble().is_some(), fault == 3);
            while Instant::now() <= *paused.borrow() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
        if answer != tonic::Code::Internal {
            continue;
        }
        let trouble = availability.trouble().unwrap();
        assert!(trouble.contains("3 failures in a row"), "{trouble}");
        // One slot tries; the others wait for it.
        farm.executor.check_readiness(0).await.unwrap();
        let other = farm.executor.check_readiness(1).await;
        assert!(matches!(other, Err(NotReady::Paused { .. })), "{other:?}");
        farm.mend_runner();
        let response = farm.shell("true", &[], &[]).await;
        assert_eq!(response.status, None);
        farm.executor.check_readiness(1).await.unwrap();
        assert_eq!(availability.trouble(), None);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_runner_says_of_the_action_is_told_to_the_client_and_no_fault_of_the_host() {
    for (answer, expected) in [
        (tonic::Code::InvalidArgument, Code::InvalidArgument),
        (tonic::Code::DeadlineExceeded, Code::DeadlineExceeded),
        // A program that cannot be read: elsewhere it may be.
        (tonic::Code::DataLoss, Code::Unavailable),
    ] {
        let farm = Farm::start_failing(answer).await;
        for fault in 1..=4 {
            let response = farm.shell(&format!("true # {fault}"), &[], &[]).await;
            assert_eq!(code(&response), expected, "{}", text(&response));
        }
        farm.executor.check_readiness(0).await.unwrap();
        assert_eq!(farm.executor.availability.trouble(), None);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_where_a_group_is_configured_may_its_runner_enter_by_itself() {
    if !nix::unistd::geteuid().is_root() {
        crate::harness::skip("only root can give directories to any group");
        return;
    }
    for (group, expected) in [(None, "700 0\n"), (Some(12345), "770 12345\n")] {
        let settings = super::farm::Settings {
            group,
            ..Default::default()
        };
        let farm = Farm::start_with(settings).await;
        farm.executor.check_readiness(0).await.unwrap();
        // What an action leaves is in no root of a later one, be it kept or not.
        for run in 0..4 {
            let script = format!("stat -c '%a %g' ..; ls in; test ! -e left; touch left # {run}");
            let response = farm.shell(&script, &[("in", "x")], &[]).await;
            assert_eq!(response.status, None, "{}", text(&response));
            let result = response.result.unwrap();
            assert_eq!(result.exit_code, 0);
            let out = farm.read(&result.stdout_digest).await;
            assert_eq!(String::from_utf8(out).unwrap(), format!("{expected}in\n"));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn logs_of_the_server_are_told_by_their_paths() {
    let farm = Farm::start().await;
    let script =
        "mkdir $LOGS/a; echo one > $LOGS/a/b; echo two > $LOGS/c; ln -s c $LOGS/d; mkfifo $LOGS/e";
    let response = farm.shell(script, &[], &[]).await;
    let logs = response.server_logs;
    assert_eq!(logs.keys().collect::<Vec<_>>(), ["a/b", "c"]);
    assert_eq!(farm.read(&logs["a/b"].digest).await, b"one\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_check_names_each_key_that_must_be_changed() {
    let directory = tempfile::tempdir().unwrap();
    let other_file_system = tempfile::tempdir_in("/dev/shm").unwrap();
    let nobody = |name: &str| Endpoint::Unix(directory.path().join(name));
    let passable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(other_file_system.path(), passable).unwrap();
    let mut settings = worker::Config {
        build_directory: other_file_system.path().join("build"),
        ..Default::default()
    };
    settings.cache.directory = directory.path().join("cache");
    settings.scheduler.endpoint = nobody("scheduler.sock");
    settings.storage.cas = nobody("storage.sock").into();
    settings.storage.action_cache = nobody("storage.sock").into();
    settings.runners[0].endpoint = nobody("runner.sock");
    let path = directory.path().join("bb_worker.toml");
    let loaded = config::examine::<worker::Config>(&path, true);
    let installation = bb_remote_execution::daemon::Installation::of("bb_worker", &path, &loaded);
    let mut report = bb_remote_execution::daemon::CheckReport::default();
    bb_remote_execution::worker::probe(&settings, &installation, &mut report).await;
    let mut keys: Vec<&str> = report
        .failures()
        .iter()
        .map(|failure| match failure {
            Failure::Configuration { key, .. } => *key,
            other => panic!("{other}"),
        })
        .collect();
    keys.sort_unstable();
    assert_eq!(
        keys,
        [
            "build_directory",
            "runners.endpoint",
            "scheduler.endpoint",
            "storage.cas"
        ]
    );
    // It changes nothing.
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    assert_eq!(
        std::fs::read_dir(other_file_system.path()).unwrap().count(),
        0
    );
}
