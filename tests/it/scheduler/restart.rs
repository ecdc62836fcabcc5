//! Schedulers that end, or are killed, and those that come after them.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_scheduler_that_stops_sends_everybody_to_its_successor_who_takes_up_the_work() {
    let scheduler = Scheduler::start(|_| {}).await;
    let held = scheduler.parked("busy").await;
    let action = scheduler.action("x", |_| {}).await;
    let mut stream = scheduler.execute(&action).await.unwrap();
    desired(held.await.unwrap().unwrap());
    next(&mut stream).await;
    let idle = scheduler.parked("idle").await;
    let scheduler = scheduler.restart().await;
    assert_eq!(
        stream.message().await.unwrap_err().code(),
        Code::Unavailable
    );
    assert_eq!(idle.await.unwrap().unwrap_err().code(), Code::Unavailable);

    let running = executing(&action, ExecutionState::Running(()));
    let answer = scheduler.synchronize("busy", running).await.unwrap();
    assert!(answer.desired_state.is_none(), "{answer:?}");
    let _idle = scheduler.parked("idle").await;
    let mut stream = scheduler.execute(&action).await.unwrap();
    assert_eq!(stage(&next(&mut stream).await), Stage::Executing);
    scheduler
        .synchronize("busy", completed(&action, "from before"))
        .await
        .unwrap();
    assert_eq!(response(&mut stream).await.message, "from before");
}
