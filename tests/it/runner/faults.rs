//! What the runner says and does when the host, or somebody on it, keeps it from running actions.

use super::*;

/// The one directory of control groups of this farm's runner.
fn group(farm: &Farm) -> Option<PathBuf> {
    let found = groups(farm.first).pop();
    if found.is_none() {
        crate::harness::skip("there are no control groups of version 2 here");
    }
    found
}

async fn is_ready(farm: &Farm) -> Result<(), Status> {
    let request = CheckReadinessRequest::default();
    farm.client.clone().check_readiness(request).await?;
    Ok(())
}

async fn until_ready(farm: &Farm) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while let Err(status) = is_ready(farm).await {
        assert!(Instant::now() < deadline, "{status:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn control_groups_that_somebody_removed_are_made_again() {
    if !is_root() {
        return;
    }
    let farm = Farm::start().await;
    farm.sh("true").await;
    let Some(group) = group(&farm) else { return };
    until("the place for control groups is removed", || {
        // Everything in it dies, sandboxes that wait for actions too, and those made meanwhile.
        let _ = fs::write(group.join("cgroup.kill"), "1");
        for entry in fs::read_dir(&group).into_iter().flatten().flatten() {
            let _ = fs::remove_dir(entry.path());
        }
        fs::remove_dir(&group).is_ok()
    })
    .await;
    // A sandbox that was being made meanwhile may be the last one to fail.
    until_ready(&farm).await;
    for _ in 0..8 {
        farm.sh("true").await;
    }
    assert!(group.is_dir());
    farm.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_runner_that_cannot_start_actions_is_not_ready_says_why_and_recovers() {
    if !is_root() {
        return;
    }
    let farm = Farm::start().await;
    farm.sh("true").await;
    let Some(group) = group(&farm) else { return };
    let limit = group.join("cgroup.max.descendants");
    fs::write(&limit, "0").unwrap();
    // Those that were made before may be used up.
    let mut refused = None;
    for _ in 0..50 {
        let slot = farm.slot();
        if let Err(status) = farm.run(&slot, &["/bin/true"]).await {
            refused = Some(status);
            break;
        }
    }
    for status in [refused.unwrap(), is_ready(&farm).await.unwrap_err()] {
        assert_eq!(status.code(), Code::Unavailable, "{status:?}");
        let message = status.message();
        assert!(message.contains("cgroup.max.descendants"), "{message}");
        assert!(message.contains(group.to_str().unwrap()), "{message}");
    }
    fs::write(&limit, "max").unwrap();
    until_ready(&farm).await;
    farm.sh("true").await;
    farm.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_of_the_caller_kills_the_command_and_is_exceeded() {
    if !is_root() {
        return;
    }
    let farm = Farm::start().await;
    let slot = farm.slot();
    let script = "echo begun; setsid sleep 1000 & sleep 1000";
    let mut request = tonic::Request::new(slot.request(&["/bin/sh", "-c", script]));
    // As Buildbarn's worker does.
    request.set_timeout(Duration::from_millis(700));
    let status = farm.client.clone().run(request).await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
    assert!(status.message().contains("700ms"), "{status:?}");
    // The answer says that nothing is left.
    assert_eq!(farm.processes(), [0i32; 0]);
    assert_eq!(
        fs::read_to_string(slot.path.join("stdout")).unwrap(),
        "begun\n"
    );
    let log = fs::read_to_string(slot.path.join("server_logs/bb_runner.log")).unwrap();
    for words in ["its time of 0.7 s was over", "- sleep: ", "time: 0.7 s"] {
        assert!(log.contains(words), "{words}: {log}");
    }

    // One that is kept changes nothing.
    let slot = farm.slot();
    let mut request = tonic::Request::new(slot.request(&["/bin/sh", "-c", "exit 7"]));
    request.set_timeout(Duration::from_secs(600));
    let response = farm.client.clone().run(request).await.unwrap();
    assert_eq!(response.into_inner().exit_code, 7);
    let slot = farm.slot();
    let mut request = tonic::Request::new(slot.request(&["no_such_command"]));
    request.set_timeout(Duration::from_secs(600));
    let status = farm.client.clone().run(request).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    farm.stop().await;
}

/// Runs a script for a second, in which it does not end.
async fn run_late(farm: &Farm, slot: &Slot, request: RunRequest) {
    let mut request = tonic::Request::new(request);
    request.set_timeout(Duration::from_secs(1));
    let begun = Instant::now();
    let status = farm.client.clone().run(request).await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
    assert!(begun.elapsed() < Duration::from_secs(10));
    let printed = fs::read_to_string(slot.path.join("stdout")).unwrap();
    assert_eq!(printed, "begun\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_action_that_its_own_command_ended_has_no_server_log() {
    if !is_root() {
        return;
    }
    let farm = Farm::start().await;
    for script in [
        "true",
        "exit 7",
        "kill -SEGV $$",
        "setsid sleep 1000 & exit 1",
    ] {
        let slot = farm.slot();
        farm.run(&slot, &["/bin/sh", "-c", script]).await.unwrap();
        let logs = fs::read_dir(slot.path.join("server_logs")).unwrap();
        assert_eq!(logs.count(), 0, "{script}");
    }
    let slot = farm.slot();
    farm.run(&slot, &["no_such_command"]).await.unwrap_err();
    let logs = fs::read_dir(slot.path.join("server_logs")).unwrap();
    assert_eq!(logs.count(), 0);
    farm.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_action_puts_in_place_of_its_server_log_is_neither_followed_nor_written_to() {
    if !is_root() {
        return;
    }
    let farm = Farm::start().await;
    let victim = farm.directory.path().join("victim");
    fs::write(&victim, "as it was").unwrap();
    let absent = farm.directory.path().join("absent");
    // Beside its input root.
    let place = "../server_logs/bb_runner.log";
    for make in [
        format!("ln -s {} {place}", victim.display()),
        format!("ln -s {} {place}", absent.display()),
        format!("mkfifo {place}"),
        format!("mkdir {place}"),
        format!("echo mine > {place}"),
    ] {
        let slot = farm.slot();
        let logs = slot.path.join("server_logs");
        let script = format!("{make} && echo begun; exec sleep 1000");
        let request = slot.request(&["/bin/sh", "-c", &script]);
        run_late(&farm, &slot, request).await;
        let found = fs::symlink_metadata(logs.join("bb_runner.log")).unwrap();
        assert!(!found.is_file() || found.len() == 5, "{make}: {found:?}");
    }
    assert_eq!(fs::read_to_string(&victim).unwrap(), "as it was");
    assert!(!absent.exists());
    // Nor is one made where the worker takes none, or what it names is a link.
    let slot = farm.slot();
    let mut request = slot.request(&["/bin/sh", "-c", "echo begun; exec sleep 1000"]);
    request.server_logs_directory = String::new();
    run_late(&farm, &slot, request).await;
    assert_eq!(
        fs::read_dir(slot.path.join("server_logs")).unwrap().count(),
        0
    );
    let slot = farm.slot();
    let elsewhere = farm.build().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    std::os::unix::fs::symlink(&elsewhere, slot.path.join("link")).unwrap();
    let mut request = slot.request(&["/bin/sh", "-c", "echo begun; exec sleep 1000"]);
    request.server_logs_directory = format!("{}/link", slot.name);
    run_late(&farm, &slot, request).await;
    assert_eq!(fs::read_dir(&elsewhere).unwrap().count(), 0);
    farm.stop().await;
}
