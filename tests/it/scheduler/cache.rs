//! Execute looks into the Action Cache.

use bb_remote_execution::proto::reapi::{
    ActionResult, OutputFile, ResultsCachePolicy, UpdateActionResultRequest,
    action_cache_client::ActionCacheClient, capabilities_client::CapabilitiesClient,
};

use super::*;

impl Scheduler {
    /// A result of the action in the Action Cache, whose output may be in the CAS.
    async fn remember(&self, action: &Digest, output: &Digest) -> ActionResult {
        let result = ActionResult {
            output_files: vec![OutputFile {
                path: "out".to_owned(),
                digest: Some(output.clone()),
                ..Default::default()
            }],
            ..Default::default()
        };
        let request = UpdateActionResultRequest {
            action_digest: Some(action.clone()),
            action_result: Some(result.clone()),
            ..Default::default()
        };
        let mut cache = ActionCacheClient::new(self.clients.clone());
        cache.update_action_result(request).await.unwrap();
        result
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_result_that_the_action_cache_has_is_given_at_once_and_marked_as_cached() {
    // Nobody works here.
    let scheduler = Scheduler::start(|_| {}).await;
    let output = scheduler.upload(b"output".to_vec()).await;
    let action = scheduler.action("x", |_| {}).await;
    let result = scheduler.remember(&action, &output).await;
    let mut stream = scheduler.execute(&action).await.unwrap();
    let first = next(&mut stream).await;
    assert_eq!(stage(&first), Stage::CacheCheck);
    assert!(!first.done);
    let told = response(&mut stream).await;
    assert!(told.cached_result);
    assert_eq!(told.result.as_ref(), Some(&result));
    // Its name can be waited for, too.
    let mut again = scheduler.wait(&first.name).await.unwrap();
    assert_eq!(response(&mut again).await, told);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_priority_in_the_cache_is_announced_by_nobody_and_taken_from_those_who_give_one() {
    let scheduler = Scheduler::start(|_| {}).await;
    let held = scheduler.parked("w").await;
    let mut capabilities = CapabilitiesClient::new(scheduler.clients.clone());
    let request = GetCapabilitiesRequest::default();
    let answer = capabilities.get_capabilities(request).await.unwrap();
    let answer = answer.into_inner();
    let cache = answer.cache_capabilities.unwrap();
    assert_eq!(cache.cache_priority_capabilities, None);
    // That of an execution is another one, which counts.
    let execution = answer.execution_capabilities.unwrap();
    assert!(execution.execution_priority_capabilities.is_some());

    let action = scheduler.action("x", |_| {}).await;
    let request = ExecuteRequest {
        results_cache_policy: Some(ResultsCachePolicy { priority: i32::MIN }),
        ..execute(&action)
    };
    let mut stream = scheduler.request(request).await.unwrap();
    desired(held.await.unwrap().unwrap());
    let done = completed(&action, "done");
    scheduler.synchronize("w", done).await.unwrap();
    assert_eq!(response(&mut stream).await.message, "done");

    let result = ActionResult {
        stdout_raw: b"kept".as_slice().into(),
        ..Default::default()
    };
    let mut client = ActionCacheClient::new(scheduler.clients.clone());
    let update = client.update_action_result(UpdateActionResultRequest {
        action_digest: Some(action.clone()),
        action_result: Some(result.clone()),
        results_cache_policy: Some(ResultsCachePolicy { priority: 7 }),
        ..Default::default()
    });
    assert_eq!(update.await.unwrap().into_inner(), result);
    let mut stream = scheduler.execute(&action).await.unwrap();
    assert_eq!(response(&mut stream).await.result, Some(result));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_result_is_not_given_to_who_skips_the_look_up_nor_without_its_outputs() {
    let scheduler = Scheduler::start(|_| {}).await;
    let _idle = scheduler.synchronize("w", IDLE).await.unwrap();
    let output = scheduler.upload(b"output".to_vec()).await;
    let queued = async |request: ExecuteRequest| {
        let mut stream = scheduler.request(request).await.unwrap();
        assert_eq!(stage(&next(&mut stream).await), Stage::Queued);
    };
    let skips = scheduler.action("x", |_| {}).await;
    scheduler.remember(&skips, &output).await;
    queued(ExecuteRequest {
        skip_cache_lookup: true,
        ..execute(&skips)
    })
    .await;
    let uncacheable = scheduler
        .action("y", |action| action.do_not_cache = true)
        .await;
    scheduler.remember(&uncacheable, &output).await;
    queued(execute(&uncacheable)).await;
    let incomplete = scheduler.action("z", |_| {}).await;
    let absent = DigestFunction::Sha256.digest_of(b"absent").to_proto();
    scheduler.remember(&incomplete, &absent).await;
    queued(execute(&incomplete)).await;
    queued(execute(&scheduler.action("no result", |_| {}).await)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_look_up_can_be_switched_off() {
    let scheduler = Scheduler::start(|config| config.scheduling.action_cache_lookup = false).await;
    let _idle = scheduler.synchronize("w", IDLE).await.unwrap();
    let output = scheduler.upload(b"output".to_vec()).await;
    let action = scheduler.action("x", |_| {}).await;
    scheduler.remember(&action, &output).await;
    let mut stream = scheduler.execute(&action).await.unwrap();
    assert_eq!(stage(&next(&mut stream).await), Stage::Queued);
}

#[tokio::test(flavor = "multi_thread")]
async fn results_of_a_store_elsewhere_are_checked_for_their_outputs() {
    let store = Scheduler::start(|_| {}).await;
    let place: StorageLocation =
        StorageLocation::Endpoint(Endpoint::Unix(store.directory.path().join("clients")));
    let output = store.upload(b"output".to_vec()).await;
    let tree = reapi::Tree {
        root: Some(reapi::Directory {
            files: vec![reapi::FileNode {
                name: "f".to_owned(),
                digest: Some(output.clone()),
                ..Default::default()
            }],
            ..Default::default()
        }),
        ..Default::default()
    };
    let tree = store.upload(tree.encode_to_vec()).await;
    let scheduler = Scheduler::start(|config| {
        config.storage.cas = place.clone();
        config.storage.action_cache = place;
    })
    .await;
    let action = store.action("x", |_| {}).await;
    let request = UpdateActionResultRequest {
        action_digest: Some(action.clone()),
        action_result: Some(ActionResult {
            output_directories: vec![reapi::OutputDirectory {
                path: "d".to_owned(),
                tree_digest: Some(tree),
                ..Default::default()
            }],
            ..Default::default()
        }),
        ..Default::default()
    };
    let mut cache = ActionCacheClient::new(store.clients.clone());
    cache.update_action_result(request).await.unwrap();
    let mut stream = scheduler.execute(&action).await.unwrap();
    assert!(response(&mut stream).await.cached_result);
}
