//! Who comes first.

use super::*;

#[test]
fn the_most_urgent_then_the_oldest_task_comes_first() {
    let mut farm = Farm::new();
    farm.held("a", idle(), 1);
    farm.execute(request("busy"), 0).unwrap();
    for (action, priority) in [
        ("later", 0),
        ("last", i32::MAX),
        ("first", i32::MIN),
        ("latest", 0),
    ] {
        let request = Request {
            priority,
            ..request(action)
        };
        farm.execute(request, 0).unwrap();
    }
    // It is asked for again, and soon.
    let urgent = Request {
        priority: -1,
        ..request("last")
    };
    farm.execute(urgent, 0).unwrap();
    let mut before = "busy";
    for next in ["first", "last", "later", "latest"] {
        let instruction = farm.now("a", completed(before, rpc::Code::Ok));
        assert_eq!(action(&instruction), Some(digest(next)));
        before = next;
    }
}

fn nested(names: &[&str], action: &str) -> Request {
    let keys = names
        .iter()
        .map(|name| InvocationKey::from_bytes(name.as_bytes()));
    Request {
        invocation: InvocationKeys::new(keys),
        ..request(action)
    }
}

/// The actions that workers are given in turn, each of which is completed before the next one.
fn served(farm: &mut Farm, worker: &str, mut before: String, count: usize) -> Vec<String> {
    let mut served = Vec::new();
    for _ in 0..count {
        let instruction = farm.now(worker, completed(&before, rpc::Code::Ok));
        before = farm.name_of(&instruction);
        served.push(before.clone());
    }
    served
}

#[test]
fn invocations_are_served_in_turn() {
    let mut farm = Farm::new();
    farm.held("a", idle(), 1);
    farm.add(named("busy", "busy"));
    for client in ["one", "two", "three", "four", "five"] {
        for i in 0..5 {
            farm.add(named(client, &format!("{client} {i}")));
        }
    }
    let queues = farm.queue.platform_queues();
    let root = queues[0].size_classes[0].root;
    assert_eq!((root.queued_directly, root.queued_indirectly), (0, 25));
    assert_eq!(
        (root.children, root.active_children, root.queued_children),
        (6, 6, 5)
    );
    let served = served(&mut farm, "a", "busy".to_owned(), 25);
    for (round, five) in served.chunks(5).enumerate() {
        let wanted = ["one", "two", "three", "four", "five"].map(|c| format!("{c} {round}"));
        assert_eq!(five, wanted);
    }
}

#[test]
fn a_hundred_steps_of_priority_are_twice_the_share() {
    let mut farm = Farm::new();
    for i in 0..9 {
        farm.held(&format!("w{i}"), idle(), i);
    }
    for i in 0..9 {
        farm.add(named("busy", &format!("busy {i}")));
    }
    for i in 0..20 {
        let urgent = Request {
            priority: -100,
            ..named("urgent", &format!("urgent {i}"))
        };
        farm.add(urgent);
        farm.add(named("plain", &format!("plain {i}")));
    }
    let mut counts = BTreeMap::new();
    for i in 0..9 {
        let before = farm.executed_by(&format!("w{i}"));
        let instruction = farm.now(&format!("w{i}"), completed(&before, rpc::Code::Ok));
        let name = farm.name_of(&instruction);
        let client = name.split(' ').next().unwrap().to_owned();
        *counts.entry(client).or_insert(0) += 1;
    }
    assert_eq!(
        counts,
        BTreeMap::from([("plain".to_owned(), 3), ("urgent".to_owned(), 6)])
    );
}

#[test]
fn the_most_extreme_priorities_are_in_order() {
    let mut farm = Farm::new();
    farm.held("a", idle(), 1);
    farm.add(named("busy", "busy"));
    for (client, priority) in [
        ("last", i32::MAX),
        ("first", i32::MIN),
        ("second", i32::MIN + 200),
    ] {
        farm.add(Request {
            priority,
            ..named(client, client)
        });
    }
    let served = served(&mut farm, "a", "busy".to_owned(), 3);
    assert_eq!(served, ["first", "second", "last"]);
}

#[test]
fn what_hangs_at_an_invocation_itself_comes_before_those_below_it() {
    let mut farm = Farm::new();
    farm.held("a", idle(), 1);
    farm.add(named("busy", "busy"));
    farm.add(nested(&["user", "build"], "below"));
    farm.add(nested(&["user"], "itself"));
    let served = served(&mut farm, "a", "busy".to_owned(), 2);
    assert_eq!(served, ["itself", "below"]);
}

#[test]
fn users_share_before_their_builds_do() {
    let mut farm = Farm::new();
    for worker in ["a", "b", "c"] {
        farm.held(worker, idle(), 1);
        farm.add(named("busy", &format!("busy {worker}")));
    }
    for build in ["1", "2", "3"] {
        farm.add(nested(&["many", build], &format!("many {build}")));
    }
    farm.add(nested(&["few", "1"], "few"));
    let mut order = Vec::new();
    for worker in ["a", "b", "c"] {
        let before = farm.executed_by(worker);
        let instruction = farm.now(worker, completed(&before, rpc::Code::Ok));
        order.push(farm.name_of(&instruction));
    }
    assert_eq!(order, ["many 1", "few", "many 2"]);
}

#[test]
fn new_work_goes_to_the_idle_worker_that_last_worked_for_its_invocation() {
    let mut farm = Farm::new();
    // Each works for one invocation, then waits.
    for (call, client) in [(1, "one"), (2, "two"), (3, "three")] {
        farm.held(client, idle(), call);
        farm.add(named(client, client));
    }
    for (call, client) in [(11, "one"), (12, "two"), (13, "three")] {
        farm.held(client, completed(client, rpc::Code::Ok), call);
    }
    let filter = WorkerFilter::IdleSynchronizing(invocation("two"));
    let idle_workers = farm.queue.workers(&key(""), &filter, None, 9).unwrap();
    assert_eq!(idle_workers.rows[0].id, worker("two"));
    assert_eq!(idle_workers.total, 1);
    farm.add(named("two", "again"));
    assert_eq!(action(&farm.answered[&12]), Some(digest("again")));
    // Nobody is near: the invocation with the least use of workers gives its one.
    farm.add(named("one", "more"));
    assert_eq!(action(&farm.answered[&11]), Some(digest("more")));
    farm.add(named("new", "new"));
    assert_eq!(action(&farm.answered[&13]), Some(digest("new")));
}

#[test]
fn ten_idle_workers_of_nested_invocations_are_found_from_the_nearest_on() {
    let mut farm = Farm::new();
    for i in 0..10 {
        let (user, build) = (format!("user {}", i / 5), format!("build {i}"));
        farm.held(&format!("w{i}"), idle(), i);
        farm.add(nested(&[&user, &build], &format!("x{i}")));
    }
    for i in 0..10 {
        farm.held(
            &format!("w{i}"),
            completed(&format!("x{i}"), rpc::Code::Ok),
            100 + i,
        );
    }
    farm.add(nested(&["user 1", "build 7"], "near"));
    assert_eq!(action(&farm.answered[&107]), Some(digest("near")));
    for round in 0..4 {
        farm.add(nested(&["user 1", "other"], &format!("same user {round}")));
    }
    let answered = [105, 106, 108, 109].map(|call| farm.answered.contains_key(&call));
    assert_eq!(answered, [true; 4]);
    for round in 0..5 {
        farm.add(nested(&["user 2", "other"], &format!("any {round}")));
    }
    assert_eq!(farm.queue.counts().idle_synchronizing_workers, 0);
}

#[test]
fn a_worker_stays_with_its_invocation_among_equals_for_as_long_as_it_may() {
    let mut farm = Farm::with(|settings| settings.stickiness_limits = vec![3 * SECOND]);
    farm.held("a", idle(), 1);
    farm.add(named("one", "one 0"));
    for i in 1..9 {
        farm.add(named("one", &format!("one {i}")));
        farm.add(named("two", &format!("two {i}")));
    }
    let mut before = "one 0".to_owned();
    let mut order = Vec::new();
    for _ in 0..7 {
        farm.pass(SECOND);
        let instruction = farm.now("a", completed(&before, rpc::Code::Ok));
        before = farm.name_of(&instruction);
        order.push(before.split(' ').next().unwrap().to_owned());
    }
    assert_eq!(order, ["one", "one", "two", "two", "two", "one", "one"]);
}

#[test]
fn a_worker_is_near_what_all_operations_of_its_last_task_had_in_common() {
    let mut farm = Farm::new();
    farm.held("a", idle(), 1);
    farm.add(nested(&["user", "one"], "x"));
    farm.add(nested(&["user", "two"], "x"));
    farm.held("a", completed("x", rpc::Code::Ok), 2);
    let listed = |farm: &Farm, names: &[&str]| {
        let keys = names
            .iter()
            .map(|name| InvocationKey::from_bytes(name.as_bytes()));
        let filter = WorkerFilter::IdleSynchronizing(InvocationKeys::new(keys));
        let found = farm.queue.workers(&key(""), &filter, None, 9);
        found.map_or(0, |page| page.total)
    };
    assert_eq!(listed(&farm, &["user"]), 1);
    assert_eq!(listed(&farm, &["user", "one"]), 0);
}

#[test]
fn an_invocation_goes_with_its_last_operation_and_worker() {
    let mut farm = Farm::new();
    farm.held("a", idle(), 1);
    let before = farm.queue.counts().invocations;
    let attached = farm.add(nested(&["user", "build"], "x"));
    assert_eq!(farm.queue.counts().invocations, before + 2);
    farm.held("a", completed("x", rpc::Code::Ok), 2);
    // The worker keeps its place.
    assert_eq!(farm.queue.counts().invocations, before + 2);
    farm.queue.detach(farm.now, attached.operation);
    farm.add(nested(&["else"], "y"));
    farm.held("a", completed("y", rpc::Code::Ok), 3);
    assert_eq!(farm.queue.counts().invocations, before + 1);
}
