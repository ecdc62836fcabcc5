//! What those who look at the queue see.

use super::*;

#[test]
fn whoever_looks_at_the_queue_sees_what_there_is() {
    let mut farm = Farm::new();
    farm.held("a", idle(), 1);
    let attached = farm.execute(request("x"), 1).unwrap();
    farm.execute(request("y"), 2).unwrap();
    let platforms = farm.queue.platform_queues();
    let queue = &platforms[0].size_classes[0];
    assert_eq!((queue.workers, queue.root.queued_directly), (1, 1));
    let workers = farm.queue.workers(&key(""), &WorkerFilter::All, None, 9);
    let row = workers.unwrap().rows.remove(0);
    assert_eq!(row.operation.unwrap().name, attached.operation);
    let operations: Vec<_> = farm.queue.operations(None).collect();
    assert_eq!(operations.len(), 2);
    assert_eq!(operations[0].worker, Some(worker("a")));
    assert_eq!(operations[1].stage, Stage::Queued);
    let rest = farm.queue.operations(Some(operations[0].name));
    assert_eq!(rest.count(), 1);
}
