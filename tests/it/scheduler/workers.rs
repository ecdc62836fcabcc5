//! Workers: one call at a time, and silence.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn what_a_silent_worker_executed_is_executed_by_another_one() {
    let scheduler = Scheduler::start(|config| {
        config.scheduling.busy_worker_synchronization_interval = milliseconds(50);
        config.scheduling.worker_with_no_synchronizations_timeout = milliseconds(100);
    })
    .await;
    let held = scheduler.parked("w").await;
    let action = scheduler.action("x", |_| {}).await;
    let mut stream = scheduler.execute(&action).await.unwrap();
    let first = desired(held.await.unwrap().unwrap());
    // Its call may end before the other worker is gone.
    let second = loop {
        let answer = scheduler.parked("v").await.await.unwrap().unwrap();
        let state = answer.desired_state.and_then(|state| state.worker_state);
        if let Some(desired_state::WorkerState::Executing(executing)) = state {
            break executing;
        }
    };
    assert_eq!(first.action_digest, second.action_digest);
    assert_ne!(first.w3c_trace_context, second.w3c_trace_context);
    assert!(!next(&mut stream).await.done);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_may_call_once_at_a_time_and_again_when_its_connection_is_lost() {
    let scheduler = Scheduler::start(|_| {}).await;
    let held = scheduler.parked("w").await;
    let status = scheduler.synchronize("w", IDLE).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert!(
        status
            .message()
            .starts_with("A worker with the same worker ID is already synchronizing"),
        "{status}"
    );
    held.abort();
    // The cancellation travels; nothing but it makes the next call pass.
    while scheduler.synchronize("w", IDLE).await.is_err() {
        tokio::task::yield_now().await;
    }
}
