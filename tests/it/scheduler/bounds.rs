//! Clients that ask for very much: what that takes is bounded, and each answer is one that is told.

use futures::future::join_all;

use super::*;

/// The platform has a queue, whose only worker is busy.
async fn with_a_busy_worker(change: impl FnOnce(&mut Config)) -> Scheduler {
    let scheduler = Scheduler::start(change).await;
    let held = scheduler.parked("busy").await;
    let other = scheduler.action("other", |_| {}).await;
    scheduler.execute(&other).await.unwrap();
    desired(held.await.unwrap().unwrap());
    scheduler
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_streams_instance_names_and_invocations_of_one_connection_are_queued_up_to_the_limit()
 {
    const STREAMS: usize = 10_000;
    const QUEUED: usize = 9_900;
    let scheduler = with_a_busy_worker(|config| {
        config.scheduling.limits.queued_operations = QUEUED;
    })
    .await;
    let action = scheduler.action("x", |_| {}).await;
    let (mut streams, mut refused) = (Vec::new(), 0);
    for hundred in 0..STREAMS / 100 {
        let calls = (0..100).map(|one| {
            let number = hundred * 100 + one;
            let mut request = Request::new(ExecuteRequest {
                instance_name: format!("instance-{number}"),
                skip_cache_lookup: true,
                ..execute(&action)
            });
            let metadata = RequestMetadata {
                tool_invocation_id: number.to_string(),
                ..Default::default()
            };
            let value = MetadataValue::from_bytes(&metadata.encode_to_vec());
            request
                .metadata_mut()
                .insert_bin(REQUEST_METADATA_HEADER, value);
            scheduler.request(request)
        });
        for answer in join_all(calls).await {
            match answer {
                Ok(stream) => streams.push(stream),
                Err(status) => {
                    assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
                    assert!(status.message().contains("queued_operations"), "{status}");
                    assert!(!status.details().is_empty(), "no RetryInfo");
                    refused += 1;
                }
            }
        }
    }
    assert_eq!((streams.len(), refused), (QUEUED, STREAMS - QUEUED));
    for place in [0, QUEUED - 1] {
        let first = next(&mut streams[place]).await;
        assert_eq!(stage(&first), Stage::Queued);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn platforms_that_no_worker_has_are_refused_in_few_words_however_many_there_are() {
    let scheduler = with_a_busy_worker(|_| {}).await;
    for number in 0..1_000 {
        let action = scheduler
            .action("x", |action| {
                action.platform.as_mut().unwrap().properties[0].value = number.to_string();
            })
            .await;
        let status = scheduler.execute(&action).await.unwrap_err();
        assert_eq!(status.code(), Code::Unavailable, "{status}");
        assert!(status.message().len() < 1_000, "{status}");
    }
}
