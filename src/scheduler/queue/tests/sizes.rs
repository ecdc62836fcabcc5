//! Several size classes of one platform.

use super::*;
use crate::scheduler::size_class::{
    FeedbackDriven, PageRank, PreviousExecution, Selector, Statistics, StatisticsUpdate,
};

fn sized(size_class: u32) -> SizeClassQueueKey {
    SizeClassQueueKey {
        size_class,
        ..key("")
    }
}

fn sized_farm(background: usize) -> Farm {
    Farm::with(|settings| {
        settings.predeclared_queues.push(PredeclaredQueue {
            prefix: InstanceName::empty(),
            platform: linux(),
            size_classes: vec![1, 4, 8],
            stickiness_limits: Vec::new(),
            maximum_queued_background_learning_operations: background,
            background_learning_operation_priority: 5,
        });
    })
}

#[test]
fn a_size_above_those_declared_or_none_at_all_is_refused_and_one_between_is_taken() {
    let mut farm = sized_farm(0);
    for (size, taken) in [(9, false), (0, false), (2, true), (8, true)] {
        let answer =
            farm.queue
                .synchronize(farm.now, &sized(size), &caller("a"), idle(), size, SECOND);
        assert_eq!(answer.is_ok(), taken, "{size}");
        farm.perform();
    }
    // One that a worker made has that size only.
    let elsewhere = |size_class| SizeClassQueueKey {
        size_class,
        ..key("elsewhere")
    };
    farm.call(&elsewhere(3), "a", idle(), 0);
    let answer = farm
        .queue
        .synchronize(farm.now, &elsewhere(4), &caller("a"), idle(), 0, SECOND);
    assert!(matches!(
        answer,
        Err(Refusal::SizeClass {
            known: 3,
            offered: 4
        })
    ));
    // Those that were not declared go; the others stay, without workers too.
    farm.pass(20 * 60 * SECOND);
    let sizes: Vec<u32> = farm.queue.platform_queues()[0]
        .size_classes
        .iter()
        .map(|queue| queue.key.size_class)
        .collect();
    assert_eq!(sizes, [1, 4, 8]);
}

#[test]
fn what_fails_on_the_smallest_is_executed_once_more_on_the_largest() {
    let mut farm = sized_farm(0);
    farm.call(&sized(1), "small", idle(), 1);
    farm.execute(request("x"), 7).unwrap();
    assert_eq!(action(&farm.answered[&1]), Some(digest("x")));
    farm.call(&sized(1), "small", completed("x", rpc::Code::Internal), 2);
    assert_eq!(farm.told[&7], Stage::Queued);
    farm.call(&sized(8), "large", idle(), 3);
    assert_eq!(farm.told[&7], Stage::Executing);
    farm.call(&sized(8), "large", completed("x", rpc::Code::Internal), 4);
    assert_eq!(
        farm.told[&7],
        Stage::Completed(outcome(rpc::Code::Internal))
    );
}

#[test]
fn a_success_on_the_smallest_is_final() {
    let mut farm = sized_farm(0);
    farm.call(&sized(1), "small", idle(), 1);
    farm.execute(request("x"), 7).unwrap();
    farm.call(&sized(1), "small", completed("x", rpc::Code::Ok), 2);
    assert_eq!(farm.told[&7], Stage::Completed(outcome(rpc::Code::Ok)));
}

/// Known to succeed on the largest, and untried elsewhere: it is executed there, and then on a smaller
/// one for nobody.
fn learns() -> Selector {
    let analyzer = Analyzer::FeedbackDriven(Arc::new(FeedbackDriven {
        failure_cache_duration: 3600 * SECOND,
        history_size: 32,
        page_rank: Some(PageRank {
            acceptable_execution_time_increase_exponent: 0.5,
            smaller_size_class_execution_timeout_multiplier: 1.5,
            minimum_execution_timeout: 10 * SECOND,
            maximum_convergence_error: 0.002,
        }),
    }));
    let action = reapi::Action::default();
    let key = analyzer
        .statistics_key(&InstanceName::empty(), DigestFunction::Sha256, &action)
        .unwrap();
    let mut statistics = Statistics::default();
    let update = StatisticsUpdate {
        key: key.clone(),
        executions: vec![(8, PreviousExecution::Succeeded(20 * SECOND))],
        failed_on_largest: false,
        probabilities: Arc::default(),
        history_size: 32,
    };
    statistics.apply(&update, SystemTime::UNIX_EPOCH);
    let known = Some((key, Arc::new(statistics)));
    analyzer.selector(60 * SECOND, known, SystemTime::UNIX_EPOCH)
}

fn succeed_on_the_largest(farm: &mut Farm, action: &str) {
    farm.call(&sized(8), "large", idle(), 1);
    let asked = Request {
        selector: learns(),
        ..request(action)
    };
    farm.execute(asked, 7).unwrap();
    let answer = farm.call(&sized(8), "large", completed(action, rpc::Code::Ok), 2);
    let SynchronizeAnswer::Held(held) = answer else {
        panic!("{answer:?}");
    };
    farm.queue.drop_call(farm.now, held);
    assert_eq!(farm.told[&7], Stage::Completed(outcome(rpc::Code::Ok)));
}

fn queued(farm: &Farm) -> Vec<OperationRow> {
    let rows = farm.queue.operations(None);
    rows.filter(|row| row.stage == Stage::Queued).collect()
}

#[test]
fn what_succeeded_on_the_largest_is_executed_on_a_smaller_one_for_nobody_but_us() {
    let mut farm = sized_farm(1);
    succeed_on_the_largest(&mut farm, "x");
    let row = queued(&farm).remove(0);
    let type_url = row.invocation.as_slice()[0].any().type_url;
    assert!(type_url.ends_with("BackgroundLearning"), "{type_url}");
    assert!(row.action.do_not_cache);
    assert_eq!((row.priority, row.key.size_class), (5, 1));
    // It waits for nobody, and stays.
    farm.pass(600 * SECOND);
    assert_eq!(farm.learnt, 1);
    let SynchronizeAnswer::Now(instruction) = farm.call(&sized(1), "s", idle(), 3) else {
        panic!("nothing is learnt");
    };
    assert_eq!(action(&instruction), Some(digest("x")));
    farm.call(&sized(1), "s", completed("x", rpc::Code::Ok), 4);
    assert_eq!(farm.learnt, 2);
    assert_eq!(queued(&farm).len(), 0);
    assert_eq!(farm.queue.counts().tasks, 1);
}

#[test]
fn no_more_is_learnt_than_may_be_queued() {
    for limit in 0..3 {
        let mut farm = sized_farm(limit);
        for i in 0..4 {
            succeed_on_the_largest(&mut farm, &format!("x{i}"));
        }
        assert_eq!(queued(&farm).len(), limit);
    }
}
