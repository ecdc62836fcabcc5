//! Pages of a farm that is full.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant, SystemTime},
};

use axum::{body::to_bytes, http::Request};
use prost_types::Timestamp;
use tower::Service;
use uuid::Uuid;

use super::*;
use crate::{
    config::scheduler::Config,
    daemon::PageAccess,
    digest::DigestFunction,
    instance::InstanceName,
    proto::reapi,
    scheduler::{
        queue::{
            InvocationKeys, Platform, QueuedAction, Request as Execute, Settings,
            SizeClassQueueKey, WorkerActivity, WorkerCaller, WorkerId, WorkerReport,
        },
        size_class::Analyzer,
        statistics_store::StatisticsStore,
    },
    storage::embedded,
};

const OPERATIONS: usize = 100_000;
const WORKERS: usize = 10_000;

async fn fetch(router: &Router, path: &str) -> (String, Duration) {
    let mut request = Request::get(path)
        .header("host", "localhost")
        .body(axum::body::Body::empty())
        .unwrap();
    request.extensions_mut().insert(PageAccess::default());
    let began = Instant::now();
    let response = router.clone().call(request).await.unwrap();
    let passed = began.elapsed();
    assert_eq!(response.status(), 200, "{path}");
    let body = to_bytes(response.into_body(), usize::MAX).await.unwrap();
    (String::from_utf8(body.to_vec()).unwrap(), passed)
}

#[tokio::test]
async fn lists_of_100_000_operations_and_10_000_workers_are_small_and_soon_there() {
    let config = Config::default();
    let statistics = StatisticsStore::new(InitialSizeClassCache::Absent);
    let queue = SharedQueue::new(Settings::from(&config), &statistics);
    let directory = tempfile::tempdir().unwrap();
    let store = embedded::Store::open(directory.path(), 64 << 20).unwrap();
    let platform = Platform::from(&BTreeMap::from([(
        "OSFamily".to_owned(),
        "linux".to_owned(),
    )]));
    let key = SizeClassQueueKey {
        platform: platform.clone(),
        prefix: InstanceName::empty(),
        size_class: 0,
    };
    for number in 0..WORKERS {
        let labels = BTreeMap::from([("hostname".to_owned(), format!("host{number:05}"))]);
        let caller = WorkerCaller {
            id: WorkerId::new(labels),
            peer: "192.0.2.1:4".into(),
            call: None,
        };
        let report = WorkerReport {
            activity: WorkerActivity::Idle,
            prefer_being_idle: true,
        };
        let call = queue.synchronize(
            &key,
            &caller,
            report,
            Duration::ZERO,
            std::future::pending(),
        );
        call.await.unwrap();
    }
    let selector = Analyzer::from(&config.scheduling.size_classes).selector(
        Duration::from_secs(60),
        None,
        SystemTime::now(),
    );
    let mut waiters = Vec::new();
    for number in 0..OPERATIONS {
        let digest = DigestFunction::Sha256.digest_of(&number.to_le_bytes());
        let waiter = queue.execute(Execute {
            name: Uuid::from_u128(1 + number as u128 * 0x1_0000_0001),
            resumes: false,
            action: Arc::new(QueuedAction::new(
                InstanceName::empty(),
                digest,
                reapi::Action::default(),
                Duration::from_secs(60),
                Vec::new(),
                Timestamp::default(),
                None,
            )),
            platform: platform.clone(),
            selector: selector.clone(),
            priority: 0,
            invocation: InvocationKeys::default(),
            skip_cache_lookup: false,
        });
        waiters.push(waiter.unwrap());
    }
    let router = router(Arc::new(Pages::new(
        queue.clone(),
        DrainFile::new(directory.path()),
        Backend::Embedded(Arc::new(store)),
        Arc::default(),
        InitialSizeClassCache::Absent,
        Arc::default(),
        Protection::new("", "localhost"),
    )));
    for path in [
        "/",
        "/queues",
        "/workers",
        "/operations",
        "/operations?stage=executing",
        "/operations?stage=queued&find=nothing",
    ] {
        let (body, passed) = fetch(&router, path).await;
        println!("{path}: {} bytes after {passed:?}", body.len());
        assert!(body.len() < 400_000, "{path}: {}", body.len());
        assert!(passed < Duration::from_secs(3), "{path}: {passed:?}");
    }
    // Page by page, to the end.
    let (mut path, mut seen) = ("/workers".to_owned(), 0);
    loop {
        let (body, _) = fetch(&router, &path).await;
        seen += body.matches("host</bdi>").count() + body.matches("hostname</bdi>").count();
        let next = body.split("rel=\"next\" href=\"").nth(1);
        let Some(next) = next.and_then(|rest| rest.split('"').next()) else {
            break;
        };
        path = next.replace("&amp;", "&");
    }
    assert_eq!(seen, WORKERS);
    // What is done under the lock for one piece.
    let longest = (0..50)
        .map(|_| {
            let began = Instant::now();
            let piece = queue.look(|queue| queue.operations(None).take(256).count());
            assert_eq!(piece, 256);
            began.elapsed()
        })
        .min();
    println!("a piece of 256 operations: {longest:?}");
    assert!(longest < Some(Duration::from_millis(5)), "{longest:?}");
}
