//! BuildQueueState: what operators see, and what they may do.

use bb_remote_execution::proto::buildqueuestate::{
    self as state, AddOrRemoveDrainRequest, GetOperationRequest, InvocationName,
    KillOperationsRequest, ListDrainsRequest, ListInvocationChildrenRequest, ListOperationsRequest,
    ListQueuedOperationsRequest, ListWorkersRequest, OperationState, PlatformQueueName,
    SizeClassQueueName, TerminateWorkersRequest, WorkerState,
    build_queue_state_client::BuildQueueStateClient, kill_operations_request,
    list_operations_request, list_workers_request, operation_state,
};

use super::*;

impl Scheduler {
    pub(super) fn state(&self) -> BuildQueueStateClient<Channel> {
        BuildQueueStateClient::new(self.state.clone())
    }

    pub(super) async fn operation_state(&self, name: &str) -> OperationState {
        let request = GetOperationRequest {
            operation_name: name.to_owned(),
        };
        let got = self.state().get_operation(request).await.unwrap();
        got.into_inner().operation.unwrap()
    }

    async fn workers(&self) -> Vec<WorkerState> {
        let request = ListWorkersRequest {
            filter: Some(all(queue())),
            page_size: 100,
            ..Default::default()
        };
        self.state()
            .list_workers(request)
            .await
            .unwrap()
            .into_inner()
            .workers
    }

    async fn drain(&self, labels: &[(&str, &str)], add: bool) -> Result<(), Status> {
        let request = AddOrRemoveDrainRequest {
            size_class_queue_name: Some(queue()),
            worker_id_pattern: labels_of(labels),
        };
        let done = match add {
            true => self.state().add_drain(request).await,
            false => self.state().remove_drain(request).await,
        };
        done.map(tonic::Response::into_inner)
    }

    async fn drains(&self) -> Vec<BTreeMap<String, String>> {
        let request = ListDrainsRequest {
            size_class_queue_name: Some(queue()),
        };
        let drains = self.state().list_drains(request).await.unwrap();
        let drains = drains.into_inner().drains.into_iter();
        drains.map(|drain| drain.worker_id_pattern).collect()
    }

    async fn kill(
        &self,
        filter: kill_operations_request::filter::Type,
        code: rpc::Code,
    ) -> Result<(), Status> {
        let request = KillOperationsRequest {
            filter: Some(kill_operations_request::Filter {
                r#type: Some(filter),
            }),
            status: Some(proto::status(code, "an operator says so")),
        };
        let killed = self.state().kill_operations(request).await;
        killed.map(tonic::Response::into_inner)
    }
}

fn labels_of(labels: &[(&str, &str)]) -> BTreeMap<String, String> {
    let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
    labels.iter().map(owned).collect()
}

fn queue() -> SizeClassQueueName {
    SizeClassQueueName {
        platform_queue_name: Some(PlatformQueueName {
            instance_name_prefix: String::new(),
            platform: Some(linux()),
        }),
        size_class: 0,
    }
}

fn all(queue: SizeClassQueueName) -> list_workers_request::Filter {
    list_workers_request::Filter {
        r#type: Some(list_workers_request::filter::Type::All(queue)),
    }
}

/// Executes actions of one build, as many as there are salts.
async fn build(
    scheduler: &Scheduler,
    invocation: &str,
    salts: &[&str],
) -> Vec<Streaming<Operation>> {
    let mut streams = Vec::new();
    for salt in salts {
        let action = scheduler.action(salt, |_| {}).await;
        let mut request = Request::new(execute(&action));
        let metadata = RequestMetadata {
            tool_invocation_id: invocation.to_owned(),
            target_id: format!("//:{salt}"),
            ..Default::default()
        };
        let value = MetadataValue::from_bytes(&metadata.encode_to_vec());
        request
            .metadata_mut()
            .insert_bin(REQUEST_METADATA_HEADER, value);
        streams.push(scheduler.request(request).await.unwrap());
    }
    streams
}

#[tokio::test(flavor = "multi_thread")]
async fn queues_invocations_operations_and_workers_are_listed_as_portals_expect() {
    let scheduler = Scheduler::start(|_| {}).await;
    let held = scheduler.parked("busy").await;
    let mut streams = build(&scheduler, "a", &["1", "2", "3"]).await;
    let executing = desired(held.await.unwrap().unwrap());
    let name = next(&mut streams[0]).await.name;
    let queues = scheduler.state().list_platform_queues(()).await.unwrap();
    let [platform_queue] = &queues.into_inner().platform_queues[..] else {
        panic!("not one platform queue");
    };
    assert_eq!(platform_queue.name, queue().platform_queue_name);
    let size_class = &platform_queue.size_class_queues[0];
    assert_eq!((size_class.workers_count, size_class.drains_count), (1, 0));
    assert!(size_class.timeout.is_none());
    let root = size_class.root_invocation.as_ref().unwrap();
    assert_eq!(
        (root.executing_workers_count, root.queued_children_count),
        (1, 1)
    );
    let counts = root.queued_operations_count.as_ref().unwrap();
    assert_eq!((counts.direct, counts.indirect), (0, 2));

    let id = proto::pack(&RequestMetadata {
        tool_invocation_id: "a".to_owned(),
        ..Default::default()
    });
    let root = InvocationName {
        size_class_queue_name: Some(queue()),
        ids: Vec::new(),
    };
    let of_build = InvocationName {
        ids: vec![id.clone()],
        ..root.clone()
    };
    for filter in 0..3 {
        let request = ListInvocationChildrenRequest {
            invocation_name: Some(root.clone()),
            filter,
        };
        let children = scheduler.state().list_invocation_children(request).await;
        let children = children.unwrap().into_inner().children;
        assert_eq!(children.len(), 1);
        assert_eq!(children[0].id.as_ref(), Some(&id));
    }

    // Page by page, in the order in which they are served.
    let mut request = ListQueuedOperationsRequest {
        invocation_name: Some(of_build.clone()),
        page_size: 1,
        ..Default::default()
    };
    let mut targets = Vec::new();
    for start_index in 0..2 {
        let page = scheduler
            .state()
            .list_queued_operations(request.clone())
            .await;
        let page = page.unwrap().into_inner();
        let info = page.pagination_info.unwrap();
        assert_eq!((info.start_index, info.total_entries), (start_index, 2));
        let [row] = &page.queued_operations[..] else {
            panic!("{start_index}: not one row");
        };
        assert!(row.invocation_name.is_none());
        targets.push(row.target_id.clone());
        request.start_after = Some(state::list_queued_operations_request::StartAfter {
            priority: row.priority,
            queued_timestamp: row.queued_timestamp,
            expected_duration: row.expected_duration,
        });
    }
    assert_eq!(targets, ["//:2", "//:3"]);

    let [worker] = &scheduler.workers().await[..] else {
        panic!("not one worker");
    };
    assert_eq!(worker.id, labels_of(&[("name", "busy")]));
    assert!(worker.timeout.is_some());
    let current = worker.current_operation.as_ref().unwrap();
    assert_eq!(current.action_digest, executing.action_digest);
    assert!(current.invocation_name.is_none() && current.stage.is_none());

    let list = async |filter: ListOperationsRequest| {
        let listed = scheduler.state().list_operations(filter).await;
        listed.unwrap().into_inner()
    };
    let everything = list(ListOperationsRequest {
        page_size: 100,
        filter_invocation_id: Some(id),
        ..Default::default()
    })
    .await
    .operations;
    assert_eq!(everything.len(), 3);
    assert!(everything.is_sorted_by_key(|row| row.name.clone()));
    let after = list(ListOperationsRequest {
        page_size: 100,
        start_after: Some(list_operations_request::StartAfter {
            operation_name: everything[0].name.clone(),
        }),
        ..Default::default()
    })
    .await;
    assert_eq!(after.operations, everything[1..]);
    assert_eq!(after.pagination_info.unwrap().start_index, 1);
    let queued = list(ListOperationsRequest {
        page_size: 0,
        filter_stage: Stage::Queued as i32,
        ..Default::default()
    })
    .await;
    assert_eq!(queued.operations, []);
    assert_eq!(queued.pagination_info.unwrap().total_entries, 2);
    let got = scheduler.operation_state(&name).await;
    assert_eq!(got.stage, Some(operation_state::Stage::Executing(())));
    assert_eq!(got.name, "");
    assert_eq!(got.target_id, "//:1");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drained_worker_gets_no_work_also_after_a_restart_until_the_drain_is_removed() {
    let scheduler = Scheduler::start(|_| {}).await;
    let held = scheduler.parked("w").await;
    scheduler.drain(&[("name", "w")], true).await.unwrap();
    scheduler.drain(&[("name", "w")], true).await.unwrap();
    scheduler.drain(&[("rack", "7")], true).await.unwrap();
    let drains = [labels_of(&[("name", "w")]), labels_of(&[("rack", "7")])];
    assert_eq!(scheduler.drains().await, drains);
    assert!(scheduler.workers().await[0].drained);
    let mut streams = build(&scheduler, "a", &["1"]).await;
    assert_eq!(stage(&next(&mut streams[0]).await), Stage::Queued);

    let scheduler = scheduler.restart().await;
    drop(held);
    let held = scheduler.parked("w").await;
    assert_eq!(scheduler.drains().await, drains);
    let mut streams = build(&scheduler, "a", &["1"]).await;
    assert_eq!(stage(&next(&mut streams[0]).await), Stage::Queued);
    assert!(!held.is_finished());
    scheduler.drain(&[("name", "w")], false).await.unwrap();
    scheduler.drain(&[("name", "w")], false).await.unwrap();
    // Its held call is answered with the work.
    desired(held.await.unwrap().unwrap());
    assert_eq!(scheduler.drains().await, drains[1..]);
}

#[tokio::test(flavor = "multi_thread")]
async fn termination_waits_for_what_workers_run_and_hands_out_nothing_more() {
    let scheduler = Scheduler::start(|_| {}).await;
    let held = scheduler.parked("w").await;
    let mut streams = build(&scheduler, "a", &["1", "2"]).await;
    let work = desired(held.await.unwrap().unwrap());
    let mut client = scheduler.state();
    let terminated = tokio::spawn(async move {
        let worker_id_pattern = labels_of(&[("name", "w")]);
        client
            .terminate_workers(TerminateWorkersRequest { worker_id_pattern })
            .await
    });
    while !scheduler.workers().await[0].drained {
        tokio::task::yield_now().await;
    }
    assert!(!terminated.is_finished());
    let done = completed(&work.action_digest.unwrap(), "done");
    scheduler.synchronize("w", done).await.unwrap();
    terminated.await.unwrap().unwrap();
    response(&mut streams[0]).await;
    let held = scheduler.parked("w").await;
    assert!(!held.is_finished());
    assert_eq!(stage(&next(&mut streams[1]).await), Stage::Queued);
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_operations_end_with_the_operators_status() {
    use kill_operations_request::filter::Type;
    let scheduler = Scheduler::start(|_| {}).await;
    let held = scheduler.parked("w").await;
    let mut streams = build(&scheduler, "a", &["1", "2"]).await;
    desired(held.await.unwrap().unwrap());
    let name = next(&mut streams[0]).await.name;
    let by_name = |name: &str| Type::OperationName(name.to_owned());
    let status = scheduler.kill(by_name(&name), rpc::Code::Ok).await;
    assert_eq!(status.unwrap_err().code(), Code::InvalidArgument);
    scheduler
        .kill(by_name(&name), rpc::Code::Unavailable)
        .await
        .unwrap();
    let status = response(&mut streams[0]).await.status.unwrap();
    assert_eq!(status.code, rpc::Code::Unavailable as i32);
    assert_eq!(status.message, "an operator says so");
    let unknown = scheduler.kill(by_name("x"), rpc::Code::Aborted).await;
    assert_eq!(unknown.unwrap_err().code(), Code::NotFound);
    let of_queue = Type::SizeClassQueueWithoutWorkers(queue());
    let status = scheduler.kill(of_queue, rpc::Code::Aborted).await;
    assert_eq!(status.unwrap_err().code(), Code::FailedPrecondition);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_operators_ask_wrongly_is_told() {
    let scheduler = Scheduler::start(|_| {}).await;
    let unknown = ListDrainsRequest {
        size_class_queue_name: Some(queue()),
    };
    let status = scheduler.state().list_drains(unknown).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    let status = scheduler
        .state()
        .list_drains(ListDrainsRequest::default())
        .await;
    assert_eq!(status.unwrap_err().code(), Code::InvalidArgument);
    let status = scheduler
        .state()
        .list_workers(ListWorkersRequest::default())
        .await;
    assert_eq!(status.unwrap_err().code(), Code::InvalidArgument);
    let request = ListInvocationChildrenRequest {
        filter: 77,
        ..Default::default()
    };
    let status = scheduler.state().list_invocation_children(request).await;
    assert_eq!(status.unwrap_err().code(), Code::InvalidArgument);
    let request = ListOperationsRequest {
        filter_stage: 99,
        ..Default::default()
    };
    let status = scheduler.state().list_operations(request).await;
    assert_eq!(status.unwrap_err().code(), Code::InvalidArgument);
    let request = GetOperationRequest {
        operation_name: "x".repeat(1 << 16),
    };
    let status = scheduler.state().get_operation(request).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    let unsorted = SizeClassQueueName {
        platform_queue_name: Some(PlatformQueueName {
            platform: Some(Platform {
                properties: vec![Property::default(), Property::default()],
            }),
            ..Default::default()
        }),
        size_class: 0,
    };
    let request = ListDrainsRequest {
        size_class_queue_name: Some(unsorted),
    };
    let status = scheduler.state().list_drains(request).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
}
