//! The whole farm: real daemons on real sockets, killed, stopped and started again.

use std::{
    fs,
    ops::Range,
    os::unix::fs::MetadataExt,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use bb_remote_execution::proto::{
    reapi::{
        Directory, DirectoryNode, ExecuteRequest, ExecuteResponse, ExecutedActionMetadata,
        FileNode, GetActionResultRequest, Tree,
    },
    rpc::Code,
};
use prost::Message;

use crate::harness::{Client, Daemon, Farm, Task, WORKER_USER, finished, is_ok, is_root};

fn shared() -> &'static Path {
    Path::new("/var/tmp")
}

#[tokio::test(flavor = "multi_thread")]
async fn private_inputs_are_the_actions_own() {
    if !is_root() {
        return;
    }
    let mut farm = Farm::start(shared(), 1, "").await;
    let configuration = farm.path().join("bb_worker.toml");
    let text = fs::read_to_string(&configuration).unwrap();
    fs::write(&configuration, text + "inputs = \"private\"\n").unwrap();
    farm.kill(Daemon::Worker);
    farm.spawn(Daemon::Worker);
    let client = farm.client();
    let file = client.upload("hello\n").await;
    let node = |name: &str, is_executable| FileNode {
        name: name.to_owned(),
        digest: Some(file.clone()),
        is_executable,
        ..Default::default()
    };
    let inner = Directory {
        files: vec![node("f", true)],
        ..Default::default()
    };
    let inner = client.upload_message(&inner).await;
    let input_root = Directory {
        files: vec![node("in", false)],
        directories: vec![DirectoryNode {
            name: "d".to_owned(),
            digest: Some(inner),
        }],
        ..Default::default()
    };
    for round in 0..3 {
        let script = format!(
            "find . | sort; cat in d/f; stat -c '%u %a %h %Y' in d/f d; \
             chmod 600 in; echo more >> in; touch -d @5 in; ln in other; chmod 700 d; mv d e; \
             cat in; stat -c '%a %h %Y' in; id -u # {round}"
        );
        let mut task = Task::shell(&script).outputs(&["in"]);
        task.input_root = input_root.clone();
        let response = client.run(&task).await;
        assert!(is_ok(&response), "{response:?}");
        let told = client.standard_output(&response).await;
        let user = told.lines().last().unwrap();
        let expected = format!(
            ".\n./d\n./d/f\n./in\nhello\nhello\n{user} 666 1 946684800\n{user} 777 1 946684800\n\
             {user} 777 2 946684800\nhello\nmore\n600 2 5\n{user}\n"
        );
        assert_eq!(told, expected);
        let output = &response.result.unwrap().output_files[0];
        assert_eq!(
            client.read(output.digest.as_ref().unwrap()).await,
            b"hello\nmore\n"
        );
    }
    let log = farm.log("bb_worker");
    assert!(log.contains("input files are the actions' own"), "{log}");
    assert!(!log.contains("worker's own user"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_action_has_its_inputs_and_gives_its_outputs() {
    if !is_root() {
        return;
    }
    let farm = Farm::start(shared(), 2, "").await;
    let client = farm.client();
    let file = client.upload("hello\n").await;
    let inner = Directory {
        files: vec![FileNode {
            name: "tool".to_owned(),
            digest: Some(client.upload("#!/bin/sh\ncat \"$1\"; id -u >&2\n").await),
            is_executable: true,
            ..Default::default()
        }],
        ..Default::default()
    };
    let mut task = Task::shell(
        "mkdir -p out/tree/a && bin/tool greeting | tee out/copy > out/tree/a/copy && \
         ln -s copy out/link && chmod +x out/copy",
    )
    .outputs(&["out/copy", "out/tree", "out/link", "out/absent"]);
    task.input_root = Directory {
        files: vec![FileNode {
            name: "greeting".to_owned(),
            digest: Some(file.clone()),
            ..Default::default()
        }],
        directories: vec![DirectoryNode {
            name: "bin".to_owned(),
            digest: Some(client.upload_message(&inner).await),
        }],
        ..Default::default()
    };
    task.action.do_not_cache = false;
    let action = client.prepare(&task).await.unwrap();
    let response = client.execute(action.clone()).await.unwrap();
    assert!(is_ok(&response), "{response:?}");
    let result = response.result.clone().unwrap();

    assert_eq!(result.output_files.len(), 1);
    assert_eq!(result.output_files[0].path, "out/copy");
    assert_eq!(result.output_files[0].digest, Some(file.clone()));
    assert!(result.output_files[0].is_executable);
    assert_eq!(result.output_symlinks[0].target, "copy");
    let tree = client
        .read(result.output_directories[0].tree_digest.as_ref().unwrap())
        .await;
    let tree = Tree::decode(&*tree).unwrap();
    assert_eq!(tree.root.unwrap().directories[0].name, "a");
    assert_eq!(tree.children[0].files[0].digest, Some(file));

    let user: u32 = String::from_utf8(client.read(result.stderr_digest.as_ref().unwrap()).await)
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    assert!(user != 0 && user != WORKER_USER, "ran as {user}");
    let metadata = result.execution_metadata.clone().unwrap();
    in_order(&metadata);
    assert!(metadata.worker.contains("hostname"), "{}", metadata.worker);

    // It is in the Action Cache, as it was reported.
    let cached = client
        .action_cache()
        .get_action_result(GetActionResultRequest {
            action_digest: Some(action),
            ..Default::default()
        })
        .await
        .unwrap()
        .into_inner();
    assert_eq!(cached, result);
}

/// REAPI: ExecutedActionMetadata; every moment is told, and none before the one it follows.
fn in_order(metadata: &ExecutedActionMetadata) {
    let moments = [
        &metadata.queued_timestamp,
        &metadata.worker_start_timestamp,
        &metadata.input_fetch_start_timestamp,
        &metadata.input_fetch_completed_timestamp,
        &metadata.execution_start_timestamp,
        &metadata.execution_completed_timestamp,
        &metadata.output_upload_start_timestamp,
        &metadata.output_upload_completed_timestamp,
        &metadata.worker_completed_timestamp,
    ]
    .map(|moment| {
        let moment = moment.as_ref().expect("a moment");
        (moment.seconds, moment.nanos)
    });
    assert!(moments.is_sorted(), "{moments:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_are_told_as_what_they_are() {
    if !is_root() {
        return;
    }
    let farm = Farm::start(shared(), 2, "").await;
    let client = farm.client();

    let response = client.run(&Task::shell("echo boom >&2; exit 37")).await;
    assert_eq!(response.status.clone().unwrap_or_default().code, 0);
    assert_eq!(response.result.as_ref().unwrap().exit_code, 37);
    assert!(response.server_logs.is_empty(), "{response:?}");

    let mut slow = Task::shell("echo begun; sleep infinity");
    slow.action.timeout = Some(prost_types::Duration {
        seconds: 1,
        nanos: 0,
    });
    let response = client.run(&slow).await;
    assert_eq!(
        response.status.clone().unwrap().code,
        Code::DeadlineExceeded as i32,
        "{response:?}"
    );
    assert_eq!(client.standard_output(&response).await, "begun\n");
    let log = &response.server_logs["bb_runner.log"];
    assert!(log.human_readable);
    let log = client.read(log.digest.as_ref().unwrap()).await;
    let log = String::from_utf8(log).unwrap();
    assert!(
        log.contains("its time was over") && log.contains("- sleep: "),
        "{log}"
    );

    let response = client.run(&Task::new(&["no-such-program"])).await;
    let status = response.status.unwrap();
    assert_eq!(status.code, Code::InvalidArgument as i32);
    assert!(
        status.message.contains("no-such-program"),
        "{}",
        status.message
    );
}

/// Processes of the users that actions run as.
fn action_processes(users: &Range<u32>) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let name = entry.file_name().into_string().unwrap();
        if name.bytes().all(|byte| byte.is_ascii_digit())
            && let Ok(metadata) = entry.metadata()
            && users.contains(&metadata.uid())
        {
            let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            found.push(String::from_utf8_lossy(&line).replace('\0', " "));
        }
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_of_an_action_survives_it() {
    if !is_root() {
        return;
    }
    let farm = Farm::start(shared(), 2, "").await;
    let client = farm.client();
    let mark = format!("survivor-{}", farm.path().file_name().unwrap().display());
    let script = format!(
        "(setsid sh -c 'exec sleep 600 {mark}' >/dev/null 2>&1 &) ; \
         mkdir -p a/b && echo x > a/b/c && chmod 000 a/b a && \
         for d in /tmp /var/tmp /dev/shm; do echo x > $d/{mark} || true; done; \
         ln -s / root; mkfifo pipe; echo done"
    );
    let response = client.run(&Task::shell(&script)).await;
    assert!(is_ok(&response), "{response:?}");
    let survivors: Vec<_> = action_processes(&farm.users())
        .into_iter()
        .filter(|line| line.contains(&mark))
        .collect();
    assert!(survivors.is_empty(), "{survivors:?}");
    for place in ["/tmp", "/var/tmp", "/dev/shm"] {
        let path = Path::new(place).join(&mark);
        assert!(fs::symlink_metadata(&path).is_err(), "{}", path.display());
    }
    // What it left in its own directory goes soon.
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let left: Vec<_> = walkdir::WalkDir::new(farm.build_directory())
            .into_iter()
            .flatten()
            .filter(|entry| {
                entry
                    .metadata()
                    .is_ok_and(|metadata| farm.users().contains(&metadata.uid()))
            })
            .collect();
        if left.is_empty() {
            break;
        }
        assert!(Instant::now() < deadline, "{left:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn actions_at_the_same_time_have_users_of_their_own() {
    if !is_root() {
        return;
    }
    let farm = Farm::start(shared(), 3, "").await;
    let client = farm.client();
    let mut running = Vec::new();
    for i in 0..3 {
        let client = client.clone();
        running.push(tokio::spawn(async move {
            let response = client
                .run(&Task::shell(&format!("id -u; sleep 1; true {i}")))
                .await;
            assert!(is_ok(&response), "{response:?}");
            client.standard_output(&response).await
        }));
    }
    let mut users = Vec::new();
    for task in running {
        users.push(task.await.unwrap());
    }
    users.sort();
    users.dedup();
    assert_eq!(users.len(), 3, "{users:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_daemon_comes_back_and_the_farm_goes_on() {
    if !is_root() {
        return;
    }
    let mut farm = Farm::start(shared(), 2, "").await;
    for daemon in [Daemon::Runner, Daemon::Worker, Daemon::Scheduler] {
        let client = farm.client();
        let mark = format!("killed-{daemon:?}-{}", std::process::id());
        let action = client
            .prepare(&Task::shell(&format!("sleep 5; echo {mark}")))
            .await
            .unwrap();
        let mut stream = client
            .execution()
            .execute(ExecuteRequest {
                action_digest: Some(action),
                ..Default::default()
            })
            .await
            .unwrap()
            .into_inner();
        let deadline = Instant::now() + Duration::from_secs(20);
        while !action_processes(&farm.users())
            .iter()
            .any(|line| line.contains(&mark))
        {
            assert!(
                Instant::now() < deadline,
                "{daemon:?}: the action does not start"
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        farm.kill(daemon);
        farm.spawn(daemon);
        // A client of a worker whose runner was killed hears of nothing but the result.
        if daemon == Daemon::Runner {
            let response = loop {
                let operation = stream.message().await.unwrap().unwrap();
                if let Some(response) = finished(&operation) {
                    break response;
                }
            };
            assert!(is_ok(&response), "{response:?}");
            assert_eq!(client.standard_output(&response).await, format!("{mark}\n"));
        }
        let deadline = Instant::now() + Duration::from_secs(40);
        let client = farm.client();
        loop {
            match client.try_run(&Task::shell("exit 0")).await {
                Ok(response) if is_ok(&response) => break,
                other => assert!(Instant::now() < deadline, "{daemon:?}: {other:?}"),
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        if daemon == Daemon::Runner {
            // What the killed runner left running is gone once the new one serves.
            let left: Vec<_> = action_processes(&farm.users())
                .into_iter()
                .filter(|line| line.contains(&mark))
                .collect();
            assert!(left.is_empty(), "{left:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_worker_finishes_what_it_runs() {
    if !is_root() {
        return;
    }
    let mut farm = Farm::start(shared(), 1, "").await;
    let client = farm.client();
    let running = tokio::spawn(async move { client.run(&Task::shell("sleep 2; exit 7")).await });
    tokio::time::sleep(Duration::from_secs(1)).await;
    let status = farm.terminate(Daemon::Worker, Duration::from_secs(30));
    assert!(status.is_some_and(|status| status.success()), "{status:?}");
    let response = running.await.unwrap();
    assert_eq!(response.result.unwrap().exit_code, 7);
    for daemon in [Daemon::Runner, Daemon::Scheduler] {
        let status = farm.terminate(daemon, Duration::from_secs(30));
        assert!(
            status.is_some_and(|status| status.success()),
            "{daemon:?} {status:?}"
        );
    }
}

/// What a worker says of a fault of its own reaches the client.
const ONCE: &str = "scheduling.lost_worker_retry_count = 0";

/// Begins an action that goes on until it is killed, and makes `started` first.
async fn begin(farm: &Farm, task: Task) -> tokio::task::JoinHandle<ExecuteResponse> {
    let client = farm.client();
    let action = client.prepare(&task).await.unwrap();
    let call = tokio::spawn(async move { client.execute(action).await.unwrap() });
    let is_started = || {
        walkdir::WalkDir::new(farm.build_directory())
            .into_iter()
            .flatten()
            .any(|entry| entry.file_name() == "started")
    };
    let deadline = Instant::now() + Duration::from_secs(20);
    while !is_started() {
        assert!(Instant::now() < deadline, "the action does not start");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    call
}

#[tokio::test(flavor = "multi_thread")]
async fn outputs_are_not_read_while_processes_of_a_killed_runners_action_live() {
    if !is_root() {
        return;
    }
    // So that they live until another runner kills them.
    let mut farm = Farm::start_with(shared(), 2, ONCE, |_| {
        "[containment]\nprocesses = \"off\"\ncgroups = \"off\"\n".to_owned()
    })
    .await;
    let script = "echo begun; echo x > out; setsid sleep 1000 & touch started; sleep 1000";
    let call = begin(&farm, Task::shell(script).outputs(&["out"])).await;
    farm.kill(Daemon::Runner);
    let response = call.await.unwrap();
    assert!(!action_processes(&farm.users()).is_empty());
    let status = response.status.unwrap();
    assert_eq!(status.code, Code::Unavailable as i32, "{status:?}");
    let result = response.result.unwrap();
    assert_eq!(result.output_files, []);
    assert_eq!(result.stdout_digest, None);
    assert!(result.stdout_raw.is_empty());
    // The next one ends them.
    farm.spawn(Daemon::Runner);
    let deadline = Instant::now() + Duration::from_secs(20);
    while !action_processes(&farm.users()).is_empty() {
        assert!(Instant::now() < deadline, "they live on");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_runner_that_is_stopped_is_unavailable_and_no_timeout_of_the_action() {
    if !is_root() {
        return;
    }
    let mut farm = Farm::start(shared(), 2, ONCE).await;
    let mut task = Task::shell("touch started; sleep 1000");
    task.action.timeout = Some(prost_types::Duration {
        seconds: 2,
        nanos: 0,
    });
    let call = begin(&farm, task).await;
    let runner = farm.pid(Daemon::Runner) as i32;
    // SAFETY: the number is that of a child that was not waited for.
    unsafe { libc::kill(runner, libc::SIGSTOP) };
    let status = call.await.unwrap().status.unwrap();
    // SAFETY: as above.
    unsafe { libc::kill(runner, libc::SIGCONT) };
    assert_eq!(status.code, Code::Unavailable as i32, "{status:?}");
    assert!(status.message.contains("runner"), "{status:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_action_waits_for_a_runner_that_is_started_again_and_its_timeout_with_it() {
    if !is_root() {
        return;
    }
    let mut farm = Farm::start(shared(), 2, "").await;
    let client = farm.client();
    assert!(is_ok(&client.run(&Task::shell("exit 0; : before")).await));
    farm.kill(Daemon::Runner);
    // What is sent while its last process ends may have been read.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let mut calls = tokio::task::JoinSet::new();
    for slot in 0..2 {
        let client = farm.client();
        let mut task = Task::shell(&format!("exit 0; : {slot}"));
        task.action.timeout = Some(prost_types::Duration {
            seconds: 1,
            nanos: 0,
        });
        calls.spawn(async move { client.run(&task).await });
    }
    // Longer than the actions may run.
    tokio::time::sleep(Duration::from_secs(2)).await;
    farm.spawn(Daemon::Runner);
    for response in calls.join_all().await {
        assert!(is_ok(&response), "{:?}", response.status);
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes a farm at BB_TEST_FARM, of which it asks BB_TEST_ACTIONS: tests/package/run 8-load"]
async fn every_action_of_a_farm_under_load_ends_well_at_its_first_attempt() {
    const AT_ONCE: usize = 64;
    let address = std::env::var("BB_TEST_FARM").unwrap();
    let actions: usize = std::env::var("BB_TEST_ACTIONS").unwrap().parse().unwrap();
    let left = Arc::new(AtomicUsize::new(actions));
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..AT_ONCE.min(actions) {
        let (client, left) = (Client::connect(&address), left.clone());
        calls.spawn(async move {
            let mut failed = Vec::new();
            let next = |left: usize| left.checked_sub(1);
            while let Ok(number) = left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next) {
                let task = Task::shell(&format!("echo {number} > out")).outputs(&["out"]);
                match client.try_run(&task).await {
                    Ok(response) if is_ok(&response) => {}
                    Ok(response) => failed.push(format!("{:?}", response.status)),
                    Err(status) => failed.push(format!("{status:?}")),
                }
            }
            failed
        });
    }
    let failed: Vec<String> = calls.join_all().await.into_iter().flatten().collect();
    println!("{} of {actions} operations failed", failed.len());
    assert!(failed.is_empty(), "{:?}", &failed[..failed.len().min(5)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_action_that_ends_well_is_two_lines_in_all_logs_and_one_that_is_refused_is_named() {
    if !is_root() {
        return;
    }
    let farm = Farm::start(Path::new("/var/tmp"), 1, "").await;
    let client = farm.client();
    let lines = |hash: &str| -> Vec<String> {
        ["bb_scheduler", "bb_worker", "bb_runner"]
            .iter()
            .flat_map(|name| {
                farm.log(name)
                    .lines()
                    .map(str::to_owned)
                    .collect::<Vec<_>>()
            })
            .filter(|line| line.contains(hash))
            .collect()
    };
    let action = client
        .prepare(&Task::shell("exit 0; : well"))
        .await
        .unwrap();
    assert!(is_ok(&client.execute(action.clone()).await.unwrap()));
    let said = lines(&action.hash);
    assert_eq!(said.len(), 2, "{said:#?}");
    assert!(
        said.iter().map(String::len).sum::<usize>() < 1500,
        "{said:#?}"
    );

    let mut elsewhere = Task::shell("exit 0; : elsewhere");
    elsewhere.action.platform.as_mut().unwrap().properties[0].value = "evil\n\u{1b}[2J".to_owned();
    let action = client.prepare(&elsewhere).await.unwrap();
    client.execute(action.clone()).await.unwrap_err();
    let said = lines(&action.hash);
    assert_eq!(said.len(), 1, "{said:#?}");
    assert!(said[0].contains("refused an action"), "{said:#?}");
    assert!(said[0].contains("evil"), "{said:#?}");
    assert!(!said[0].contains('\u{1b}'), "{said:#?}");
}
