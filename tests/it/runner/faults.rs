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
