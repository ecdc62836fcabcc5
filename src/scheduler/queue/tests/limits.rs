//! How much may be queued, and why something is queued.

use super::*;

fn full(farm: &mut Farm, request: Request) -> QueueFull {
    match farm.execute(request, 0) {
        Err(ExecuteRefusal::QueueFull(full)) => full,
        other => panic!("{other:?}"),
    }
}

#[test]
fn beyond_a_limit_of_queued_operations_clients_are_to_try_again_later() {
    let mut farm = Farm::with(|settings| {
        settings.limits.queued_operations = 6;
        settings.limits.queued_operations_per_instance_name = 4;
        settings.limits.queued_operations_per_invocation = 2;
    });
    farm.held("a", idle(), 1);
    farm.execute(request("busy"), 0).unwrap();
    let of = |instance: &str, client: &str, action: String| Request {
        invocation: invocation(client),
        ..request_of(instance, &action)
    };
    for i in 0..2 {
        farm.execute(of("", "one", format!("a{i}")), 0).unwrap();
    }
    let refused = full(&mut farm, of("", "one", "a9".to_owned()));
    assert_eq!(
        (refused.key, refused.limit),
        ("queued_operations_per_invocation", 2)
    );
    for i in 0..2 {
        farm.execute(of("", "two", format!("b{i}")), 0).unwrap();
    }
    let refused = full(&mut farm, of("", "three", "a9".to_owned()));
    assert_eq!(refused.key, "queued_operations_per_instance_name");
    for i in 0..2 {
        farm.execute(of("i", "three", format!("c{i}")), 0).unwrap();
    }
    let refused = full(&mut farm, of("j", "four", "d".to_owned()));
    assert_eq!(refused.key, "queued_operations");
    assert!(refused.retry_after > Duration::ZERO);
    // What is under way is joined all the same; and there is room when one has been given out.
    farm.execute(of("", "one", "a0".to_owned()), 0).unwrap();
    farm.now("a", completed("busy", rpc::Code::Ok));
    farm.execute(of("j", "four", "d".to_owned()), 0).unwrap();
}

#[test]
fn keys_beyond_the_limit_of_invocations_share_the_node_above() {
    let mut farm = Farm::with(|settings| settings.limits.invocations = 3);
    farm.held("a", idle(), 1);
    farm.execute(request("busy"), 0).unwrap();
    for i in 0..10 {
        let asked = Request {
            invocation: invocation(&i.to_string()),
            ..request(&format!("x{i}"))
        };
        farm.execute(asked, 0).unwrap();
    }
    assert_eq!(farm.queue.counts().invocations, 3);
    let root = farm.queue.platform_queues()[0].size_classes[0].root;
    assert_eq!((root.queued_directly, root.queued_indirectly), (8, 2));
}

#[test]
fn workers_and_platform_queues_are_bounded() {
    let mut farm = Farm::with(|settings| {
        settings.limits.workers = 3;
        settings.limits.platform_queues = 2;
    });
    let mut call = |prefix: &str, name: &str| {
        let (now, key) = (farm.now, key(prefix));
        let answer = farm
            .queue
            .synchronize(now, &key, &caller(name), idle(), 0, SECOND);
        farm.perform();
        answer.map(|_| ())
    };
    call("one", "a").unwrap();
    call("two", "a").unwrap();
    assert!(matches!(
        call("three", "a"),
        Err(Refusal::TooMany {
            key: "platform_queues",
            ..
        })
    ));
    call("one", "b").unwrap();
    assert!(matches!(
        call("one", "c"),
        Err(Refusal::TooMany { key: "workers", .. })
    ));
}

#[test]
fn work_waits_for_a_predeclared_pool_of_no_workers_for_ever() {
    let mut farm = Farm::with(|settings| {
        settings.predeclared_queues.push(PredeclaredQueue {
            prefix: InstanceName::empty(),
            platform: linux(),
            size_classes: vec![0],
            stickiness_limits: Vec::new(),
            maximum_queued_background_learning_operations: 0,
            background_learning_operation_priority: 0,
        });
    });
    farm.execute(request("x"), 7).unwrap();
    farm.pass(24 * 3600 * SECOND);
    assert_eq!(farm.queue.counts().queued, 1);
    assert_eq!(action(&farm.now("a", idle())), Some(digest("x")));
    farm.pass(24 * 3600 * SECOND);
    assert_eq!(farm.queue.counts().queues, 1);
}

#[test]
fn whoever_waits_can_hear_why() {
    let mut farm = Farm::new();
    farm.held("a", idle(), 1);
    farm.execute(request("busy"), 0).unwrap();
    let of = |client: &str, action: &str| Request {
        invocation: invocation(client),
        ..request(action)
    };
    farm.execute(of("one", "x"), 1).unwrap();
    farm.execute(of("two", "y"), 2).unwrap();
    let last = farm.execute(of("two", "z"), 3).unwrap();
    let why = farm.queue.explain(farm.now, last.operation).unwrap();
    let Explanation::Queued(queued) = &why else {
        panic!("{why}");
    };
    assert_eq!((queued.before_it, queued.queued), (1, 3));
    assert_eq!(queued.invocations_before, [1]);
    assert_eq!((queued.workers.all, queued.workers.executing), (1, 1));
    // Nothing has been executed so far, so that nobody knows.
    assert_eq!(queued.expected_wait, None);
    let text = why.to_string();
    assert!(
        text.contains("1 operation before it") && text.contains("1 worker"),
        "{text}"
    );
    assert!(farm.queue.explain(farm.now, Uuid::from_u128(99)).is_none());
    farm.pass(3 * SECOND);
    farm.now("a", completed("busy", rpc::Code::Ok));
    let why = farm.queue.explain(farm.now, last.operation).unwrap();
    assert!(why.to_string().contains("about 6 s to wait"), "{why}");
}

#[test]
fn actions_have_room_for_so_many_bytes_in_all() {
    let mut farm = Farm::with(|settings| settings.limits.action_bytes = 100_000);
    let large = |name: &str| {
        let asked = request(name);
        let action = reapi::Action {
            salt: vec![7; 30_000].into(),
            do_not_cache: true,
            ..Default::default()
        };
        let old = &asked.action;
        Request {
            action: Arc::new(QueuedAction::new(
                old.instance.clone(),
                old.digest,
                action,
                old.timeout,
                Vec::new(),
                old.queued_timestamp,
                None,
            )),
            ..asked
        }
    };
    farm.now(
        "a",
        WorkerReport {
            prefer_being_idle: true,
            ..idle()
        },
    );
    for i in 0..3 {
        farm.execute(large("x"), i).unwrap();
    }
    let refusal = full(&mut farm, large("x"));
    assert_eq!((refusal.key, refusal.limit), ("actions_size", 100_000));
    // One that is completed goes with its last operation.
    farm.queue.cancel(farm.now, Uuid::from_u128(1)).unwrap();
    farm.queue.detach(farm.now, Uuid::from_u128(1));
    farm.perform();
    farm.pass(61 * SECOND);
    farm.execute(large("x"), 9).unwrap();
}

#[test]
fn times_that_nobody_can_have_are_no_duration() {
    let metadata = |start, end| reapi::ExecutedActionMetadata {
        execution_start_timestamp: Some(prost_types::Timestamp {
            seconds: start,
            nanos: i32::MIN,
        }),
        execution_completed_timestamp: Some(prost_types::Timestamp {
            seconds: end,
            nanos: i32::MAX,
        }),
        ..Default::default()
    };
    for (start, end) in [(i64::MIN, i64::MAX), (i64::MAX, i64::MIN)] {
        let response = EncodedResponse::new(&reapi::ExecuteResponse {
            result: Some(reapi::ActionResult {
                execution_metadata: Some(metadata(start, end)),
                ..Default::default()
            }),
            ..Default::default()
        });
        assert_eq!(response.duration, Duration::ZERO);
    }
}
