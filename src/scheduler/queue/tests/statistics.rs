//! What is counted, by the law that Buildbarn's dashboards rely on: what came less what went is what there is.

use super::*;

fn of(farm: &Farm) -> QueueStatistics {
    let all = farm.queue.statistics();
    let of = all.into_iter().find(|(key, _)| key.is_some());
    of.unwrap().1
}

#[test]
fn what_happens_to_tasks_and_invocations_is_counted_once() {
    let mut farm = Farm::new();
    farm.held("a", idle(), 1);
    // The first finds a worker; two more of one invocation wait, and one of another.
    farm.add(named("one", "x"));
    farm.add(named("one", "y"));
    farm.add(named("two", "z"));
    // Joined, by its own invocation and by another one.
    farm.add(named("one", "y"));
    farm.add(named("two", "y"));
    let now = of(&farm);
    assert_eq!(now.assigned_at_once.cacheable, 1);
    assert_eq!((now.queued.cacheable, now.queued.not_cacheable), (2, 0));
    assert_eq!((now.joined_own, now.joined_others), (1, 1));
    let counts = |created, activated, deactivated, removed| InvocationCounts {
        created,
        activated,
        deactivated,
        removed,
    };
    assert_eq!(now.invocations, [counts(1, 1, 0, 0), counts(2, 2, 0, 0)]);
    // The worker comes back without a result once.
    farm.now("a", idle());
    let mut before = "x".to_owned();
    for _ in 0..2 {
        let instruction = farm.now("a", completed(&before, rpc::Code::Ok));
        before = farm.name_of(&instruction);
    }
    farm.held("a", completed(&before, rpc::Code::InvalidArgument), 2);
    let now = of(&farm);
    let retried = |result, code: rpc::Code| {
        let counts = &now.executing_retries[&(result, code as i32)];
        (counts.count(), counts.sum())
    };
    assert_eq!(retried(ExecutionResult::Success, rpc::Code::Ok), (2, 1));
    let failed = retried(ExecutionResult::Failure, rpc::Code::InvalidArgument);
    assert_eq!(failed, (1, 0));
    // The second task was one of two invocations, so that what came after it began at the root.
    assert_eq!(now.stickiness_retained.count(), 4);
    let root = now.invocations[0];
    assert_eq!((root.activated, root.deactivated), (1, 1));
    let below = now.invocations[1];
    assert_eq!(below.activated, below.deactivated);
    assert_eq!(below.activated, 2);
    // Until nobody asks for them any more.
    assert_eq!(now.completed_durations.count(), 0);
    farm.queue.detach(farm.now, Uuid::from_u128(1));
    farm.perform();
    farm.pass(120 * SECOND);
    assert_eq!(of(&farm).completed_durations.count(), 1);
}

#[test]
fn workers_that_are_told_to_terminate_are_counted_once() {
    let mut farm = Farm::new();
    farm.held("a", idle(), 1);
    farm.held("b", idle(), 2);
    for _ in 0..2 {
        let (all, from) = (WorkerPattern::default(), NextWorker::default());
        let more = farm.queue.terminate(farm.now, &all, from, &mut Vec::new());
        assert!(more.is_none());
        farm.perform();
    }
    assert_eq!(of(&farm).workers_terminating, 2);
}
