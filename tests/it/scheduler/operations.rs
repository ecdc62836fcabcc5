//! google.longrunning.Operations.

use std::collections::BTreeSet;

use bb_remote_execution::proto::longrunning::{
    CancelOperationRequest, DeleteOperationRequest, GetOperationRequest, ListOperationsRequest,
    WaitOperationRequest, operations_client::OperationsClient,
};

use super::*;

type Operations = OperationsClient<Channel>;

impl Scheduler {
    fn operations(&self) -> Operations {
        OperationsClient::new(self.clients.clone())
    }

    async fn cancel(&self, name: &str) -> Result<(), Status> {
        let name = name.to_owned();
        let request = CancelOperationRequest { name };
        let cancelled = self.operations().cancel_operation(request).await;
        cancelled.map(tonic::Response::into_inner)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn operations_are_listed_page_by_page_and_by_filter() {
    let scheduler = Scheduler::start(|_| {}).await;
    let held = scheduler.parked("w").await;
    let mut streams = Vec::new();
    let mut names = BTreeSet::new();
    for number in 0..5 {
        let action = scheduler.action(&number.to_string(), |_| {}).await;
        let mut stream = scheduler.execute(&action).await.unwrap();
        names.insert(next(&mut stream).await.name);
        streams.push(stream);
    }
    desired(held.await.unwrap().unwrap());
    let list = async |filter: &str, page_size: i32| {
        let (mut listed, mut pages) = (Vec::new(), 0);
        let mut page_token = String::new();
        loop {
            let request = ListOperationsRequest {
                filter: filter.to_owned(),
                page_size,
                page_token,
                ..Default::default()
            };
            let page = scheduler.operations().list_operations(request).await?;
            let page = page.into_inner();
            listed.extend(page.operations);
            pages += 1;
            page_token = page.next_page_token;
            if page_token.is_empty() {
                return Ok::<_, Status>((listed, pages));
            }
        }
    };
    let uuids = |names: Vec<String>| -> BTreeSet<String> {
        let plain = |name: String| name.split_once('.').unwrap().0.to_owned();
        names.into_iter().map(plain).collect()
    };
    let (all, pages) = list("", 2).await.unwrap();
    assert_eq!(pages, 3);
    let listed: Vec<String> = all.into_iter().map(|operation| operation.name).collect();
    assert_eq!(uuids(listed), uuids(names.into_iter().collect()));
    let count = async |filter: &str| list(filter, 0).await.unwrap().0.len();
    assert_eq!(count("stage = EXECUTING").await, 1);
    assert_eq!(count("stage = QUEUED AND done = false").await, 4);
    assert_eq!(count("done = true").await, 0);
    assert_eq!(count("tool_invocation_id = \"\"").await, 5);
    assert_eq!(count("tool_invocation_id = \"other\"").await, 0);
    let status = list("nonsense", 0).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("write terms such as"), "{status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operation_can_be_got_waited_for_and_cancelled_by_its_name() {
    let scheduler = Scheduler::start(|_| {}).await;
    let held = scheduler.parked("w").await;
    let action = scheduler.action("x", |_| {}).await;
    let mut stream = scheduler.execute(&action).await.unwrap();
    desired(held.await.unwrap().unwrap());
    let name = next(&mut stream).await.name;
    let get = async |name: &str| {
        let name = name.to_owned();
        let request = GetOperationRequest { name };
        let got = scheduler.operations().get_operation(request).await;
        got.map(tonic::Response::into_inner)
    };
    assert_eq!(stage(&get(&name).await.unwrap()), Stage::Executing);
    let wait = async |timeout: Option<prost_types::Duration>| {
        let name = name.clone();
        let request = WaitOperationRequest { name, timeout };
        let waited = scheduler.operations().wait_operation(request).await;
        waited.unwrap().into_inner()
    };
    let short = prost_types::Duration {
        seconds: 0,
        nanos: 1_000_000,
    };
    assert!(!wait(Some(short)).await.done);
    scheduler.cancel(&name).await.unwrap();
    let status = response(&mut stream).await.status.unwrap();
    assert_eq!(status.code, rpc::Code::Cancelled as i32);
    assert!(wait(None).await.done);
    assert!(get(&name).await.unwrap().done);
    // The worker's next call tells it to stop.
    let running = executing(&action, ExecutionState::Running(()));
    let answer = scheduler.synchronize("w", running).await.unwrap();
    let state = answer.desired_state.unwrap().worker_state.unwrap();
    assert_eq!(state, desired_state::WorkerState::Idle(()));
    // Once more changes nothing, and what is not there cannot be cancelled.
    scheduler.cancel(&name).await.unwrap();
    for bad in ["", "nonsense", "00000000-0000-4000-8000-000000000000"] {
        let status = scheduler.cancel(bad).await.unwrap_err();
        assert_eq!(status.code(), Code::NotFound, "{status}");
        assert_eq!(get(bad).await.unwrap_err().code(), Code::NotFound);
    }
    let request = DeleteOperationRequest { name };
    let status = scheduler.operations().delete_operation(request).await;
    assert_eq!(status.unwrap_err().code(), Code::Unimplemented);
}

#[tokio::test(flavor = "multi_thread")]
async fn operations_of_before_a_restart_are_got_and_cancelled_by_their_names() {
    let scheduler = Scheduler::start(|_| {}).await;
    let held = scheduler.parked("busy").await;
    let (running, queued) = (
        scheduler.action("running", |_| {}).await,
        scheduler.action("queued", |_| {}).await,
    );
    let mut names = Vec::new();
    let mut streams = Vec::new();
    for action in [&running, &queued] {
        let mut stream = scheduler.execute(action).await.unwrap();
        names.push(next(&mut stream).await.name);
        streams.push(stream);
    }
    let handed = desired(held.await.unwrap().unwrap());
    let scheduler = scheduler.restart().await;
    let _idle = scheduler.synchronize("idle", IDLE).await.unwrap();
    let get = async |name: &str| {
        let name = name.to_owned();
        let request = GetOperationRequest { name };
        scheduler.operations().get_operation(request).await
    };
    let got = get(&names[1]).await.unwrap().into_inner();
    assert_eq!((&got.name, got.done), (&names[1], false));
    scheduler.cancel(&names[1]).await.unwrap();
    assert!(get(&names[1]).await.unwrap().into_inner().done);
    // Nobody has asked for this one since; and its worker calls after it was cancelled.
    scheduler.cancel(&names[0]).await.unwrap();
    assert!(get(&names[0]).await.unwrap().into_inner().done);
    let mut request = Request::new(synchronize("busy"));
    request.get_mut().current_state = Some(CurrentState {
        worker_state: Some(executing(&running, ExecutionState::Running(()))),
    });
    let trace = handed.w3c_trace_context["traceparent"].parse().unwrap();
    request.metadata_mut().insert("traceparent", trace);
    let answer = scheduler.call(request).await.unwrap();
    assert!(
        matches!(
            answer.desired_state.and_then(|state| state.worker_state),
            Some(desired_state::WorkerState::Idle(()))
        ),
        "the worker goes on with what was cancelled"
    );
}
