//! Actions that do not go on: what a client prints, what `bb_scheduler why` says, and what the page shows. Each
//! tells who must act; run with --nocapture they are shown as a person sees them.

use bb_remote_execution::config::routing::PlatformQueue;

use super::*;

/// What a person is told of an operation, by the command and by its page.
async fn is_told(scheduler: &Scheduler, case: &str, name: &str, words: &[&str]) {
    let why = scheduler.told(&["why", name]).await;
    let uuid = name.get(..36).unwrap();
    let page = scheduler.page(&format!("/operations/{uuid}")).await;
    assert_eq!(page.status, 200, "{}", page.body);
    let text = text_of(&page.body);
    println!("--- {case}\nwhy:  {}", why.trim());
    let line = text.lines().find(|line| line.contains("queued: "));
    println!("page: {}", line.unwrap_or_default().trim());
    for word in words {
        assert!(why.contains(word), "{case}: {word}: {why}");
        assert!(text.contains(word), "{case}: {word}: {text}");
    }
}

/// A page without its elements.
fn text_of(page: &str) -> String {
    let mut text = String::new();
    let mut inside = false;
    for c in page.chars() {
        match c {
            '<' => inside = true,
            '>' if inside => {
                inside = false;
                text.push('\n');
            }
            c if !inside => text.push(c),
            _ => {}
        }
    }
    text.replace("&quot;", "\"").replace("&amp;", "&")
}

/// The first words of an operation whose action is queued.
async fn queued(scheduler: &Scheduler, salt: &str) -> (Streaming<Operation>, String) {
    let action = scheduler.action(salt, |_| {}).await;
    let mut stream = scheduler.execute(&action).await.unwrap();
    let name = next(&mut stream).await.name;
    (stream, name)
}

#[tokio::test(flavor = "multi_thread")]
async fn six_stuck_actions_say_why() {
    // 1. No worker has the platform, and none is expected: the client is told at once.
    let scheduler = Scheduler::start(|config| {
        config.scheduling.platform_queue_with_no_workers_timeout = seconds(0);
        config.scheduling.limits.queued_operations = 3;
    })
    .await;
    scheduler.synchronize("a", IDLE).await.unwrap();
    let action = scheduler
        .action("1", |action| {
            action.platform = Some(Platform {
                properties: vec![Property {
                    name: "OSFamily".to_owned(),
                    value: "plan9".to_owned(),
                }],
            });
        })
        .await;
    let refused = scheduler.execute(&action).await.unwrap_err();
    println!(
        "--- no worker for the platform\nclient: {:?}: {}",
        refused.code(),
        refused.message()
    );
    assert_eq!(refused.code(), Code::FailedPrecondition);
    for word in ["plan9", "linux", "OSFamily"] {
        assert!(refused.message().contains(word), "{refused}");
    }

    // 2. All workers are busy.
    let held = scheduler.parked("a").await;
    let (_busy, _) = queued(&scheduler, "2").await;
    desired(held.await.unwrap().unwrap());
    let (_second, name) = queued(&scheduler, "3").await;
    let words = ["1 worker matches: 1 executing", "0 operations before it"];
    is_told(&scheduler, "all workers are busy", &name, &words).await;

    // 3. The only worker is drained.
    scheduler.told(&["drain", "name=a"]).await;
    let words = ["1 drained", "it waits until a worker takes work"];
    is_told(&scheduler, "the worker is drained", &name, &words).await;
    scheduler.told(&["undrain", "name=a"]).await;

    // 6. As much is queued as may be.
    let (_third, _) = queued(&scheduler, "4").await;
    let (_fourth, _) = queued(&scheduler, "5").await;
    let action = scheduler.action("6", |_| {}).await;
    let refused = scheduler.execute(&action).await.unwrap_err();
    println!(
        "--- a limit is reached\nclient: {:?}: {}",
        refused.code(),
        refused.message()
    );
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert!(
        refused.message().contains("limits.queued_operations"),
        "{refused}"
    );

    // 5. The worker is silent: its call has ended, and no other one has come.
    let silent = Scheduler::start(|_| {}).await;
    let held = silent.parked("s").await;
    held.abort();
    let words = ["1 silent"];
    let mut tries = 0;
    let (_stream, name) = loop {
        let (stream, name) = queued(&silent, &format!("silent {tries}")).await;
        // The scheduler may not have heard yet that the call is gone.
        if silent.told(&["why", &name]).await.contains("queued: ") {
            break (stream, name);
        }
        tries += 1;
        assert!(tries < 100);
    };
    while !silent.told(&["why", &name]).await.contains(words[0]) {
        // It may call for some seconds yet.
        tries += 1;
        assert!(tries < 300);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    is_told(&silent, "the worker is silent", &name, &words).await;

    // 4. It failed on the small worker, and there is no large one.
    let sized = Scheduler::start(|config| {
        config.predeclared_platform_queues = vec![PlatformQueue {
            platform: BTreeMap::from([("OSFamily".to_owned(), "linux".to_owned())]),
            size_classes: vec![1, 4],
            ..PlatformQueue::default()
        }];
        config.scheduling.size_classes.feedback_driven = true;
    })
    .await;
    let action = sized.action("7", |_| {}).await;
    let mut stream = sized.execute(&action).await.unwrap();
    let name = next(&mut stream).await.name;
    let words = ["no workers of its platform and size class "];
    is_told(&sized, "no worker of the size class", &name, &words).await;
}
