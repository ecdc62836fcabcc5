//! Both ends of the worker protocol, `queue` and `slot`, and clients, against each other: one seed
//! drives a whole farm over a network that delays, drops, duplicates and reorders, in one thread.
//!
//! BB_SIMULATION_SEEDS says how many seeds to try, else they are few, and `--ignored` tries many;
//! BB_SIMULATION_SEED which one to replay and tell, in the world that BB_SIMULATION_WORLD names if it is a
//! calm one, or one of twins.
//!
//! Each seed: some minutes of trouble (lost messages, crashing workers, restarting schedulers,
//! clients that leave), then the network heals. After every step the queue's invariants hold, and
//!
//! 1. a result that a client gets is one that a slot produced for this action, or an error that the
//!    scheduler gives in words that we know; none says CANCELLED to someone who waits;
//! 2. of one invocation, a worker gets the most urgent, then oldest task that waits there; and of all
//!    clients that wait, it serves one that has the least use of workers, weighed by priority;
//! 3. a slot never runs two actions at once;
//! 4. a worker that prefers being idle is answered at once, and gets nothing new; a paused one does
//!    not ask;
//! 5. a slot keeps its result until a scheduler has answered for it;
//! 6. after the healing every client gets an end, and when all have left nothing remains;
//! 7. who wants no result from before it asked gets none, and what a failure ends for its client was
//!    tried on the largest size class;
//! 8. a drained worker gets nothing new, whatever restarts;
//! 9. no operation is started more often than its retries allow, and what a lost attempt brings ends
//!    nothing.
//!
//! All of it is one world, in parts: `world` has what there is, `events` lets it happen; `scheduler`,
//! `workers` and `clients` are the ends of the `network`; `order` judges what is handed out.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use bb_remote_execution::{
    config::scheduling::Scheduling,
    digest::{Digest, DigestFunction},
    instance::InstanceName,
    metadata::{FencingToken, WorkerCall},
    proto::{self, reapi, rpc},
    scheduler::queue::{
        Attempt, Clock, DesiredWorkerState, Drain, Effect, EncodedResponse, ExecuteRefusal,
        Explanation, HeldCall, Instruction, InvocationKey, InvocationKeys, Platform,
        PredeclaredQueue, Progress, Queue, QueueLimits, QueuedAction, ReportedAction,
        ReportedDigest, Request as QueueRequest, Settings, SizeClassQueueKey, Stage,
        SynchronizeAnswer, TICK, WorkerActivity, WorkerCaller, WorkerId, WorkerPattern,
        WorkerReport,
    },
    scheduler::size_class::Analyzer,
    worker::slot::{Activity, Answer, Desired, Slot, SlotReport, SlotStep},
};
use prost::Message;
use uuid::Uuid;

use crate::harness::parts::Random;

mod clients;
mod events;
mod network;
mod order;
mod scheduler;
mod workers;
mod world;

use scheduler::run_of;
use world::*;

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

#[test]
fn a_farm_keeps_its_promises_whatever_the_network_does() {
    if let Some(seed) = number("BB_SIMULATION_SEED") {
        let mut world = match std::env::var("BB_SIMULATION_WORLD").as_deref() {
            Ok("calm") => World::calm(seed, Instant::now()),
            Ok("twins") => World::twins(seed, Instant::now()),
            _ => World::new(seed, Instant::now()),
        };
        world.tells = true;
        println!("seed {seed}: {:?}", world.run());
        return;
    }
    keeps_its_promises(number("BB_SIMULATION_SEEDS").unwrap_or(40));
}

#[test]
#[ignore = "takes long: tests/run --all"]
fn in_a_thousand_seeds_a_farm_keeps_its_promises_and_all_that_can_happen_does() {
    keeps_its_promises(1_000);
}

fn keeps_its_promises(seeds: u64) {
    let start = Instant::now();
    let next = AtomicU64::new(0);
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let (mut steps, mut seen) = (0, BTreeMap::<&str, u64>::new());
    std::thread::scope(|scope| {
        let work = || {
            let mut told = Vec::new();
            loop {
                let seed = next.fetch_add(1, Ordering::Relaxed);
                if seed >= seeds {
                    return told;
                }
                if seed % 10_000 == 9_999 {
                    let time = start.elapsed().as_secs_f64();
                    println!("{} of {seeds} seeds begun in {time:.0} s", seed + 1);
                }
                told.push(World::new(seed, start).run());
            }
        };
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        for thread in threads {
            for told in thread.join().expect("a seed failed; its number is above") {
                steps += told.steps;
                for (what, count) in told.seen {
                    *seen.entry(what).or_default() += count;
                }
            }
        }
    });
    let rate = seeds as f64 / start.elapsed().as_secs_f64();
    println!("{seeds} seeds, {steps} steps, {rate:.0} seeds/s: {seen:?}");
    if seeds >= 1_000 {
        for what in [
            "adopted",
            "already synchronizing",
            "blamed",
            "cancelled",
            "claimed a result",
            "drained",
            "given back",
            "handed out",
            "handed out again",
            "hung up",
            "killed",
            "joined a task",
            "joined an operation",
            "no workers",
            "no workers yet",
            "operation not found",
            "queue full",
            "result",
            "scheduler restarted",
            "stood still",
            "taken up by name",
            "given up",
            "told to stop",
            "woken",
            "paused",
            "worker disappeared",
        ] {
            assert!(seen.contains_key(what), "this never happened: {what}");
        }
    }
}

#[test]
fn a_scheduler_that_stood_still_declares_nobody_gone_whose_calls_it_has_not_read() {
    assert!(seen_without_harm(World::calm, "stood still", FEW) > 0);
}

#[test]
fn two_hosts_of_one_name_never_run_what_the_other_one_runs() {
    assert!(seen_without_harm(World::twins, "already synchronizing", FEW) > 0);
}

#[test]
#[ignore = "takes long: tests/run --all"]
fn in_many_seeds_neither_a_scheduler_that_stood_still_nor_two_hosts_of_one_name_do_harm() {
    assert!(seen_without_harm(World::calm, "stood still", MANY) > 0);
    assert!(seen_without_harm(World::twins, "already synchronizing", MANY) > 0);
}

/// Worlds that have more to do than others are tried with fewer seeds.
const FEW: u64 = 4;
const MANY: u64 = 200;

/// How often `what` happened in all seeds, in none of which an action came to harm.
fn seen_without_harm(make: fn(u64, Instant) -> World, what: &str, seeds: u64) -> u64 {
    let mut count = 0;
    for seed in 0..number("BB_SIMULATION_SEEDS").unwrap_or(seeds) {
        let told = make(seed, Instant::now()).run();
        count += told.seen.get(what).copied().unwrap_or(0);
        for harm in ["worker disappeared", "blamed", "handed out again"] {
            assert!(!told.seen.contains_key(harm), "seed {seed}: {harm}");
        }
    }
    count
}

#[test]
fn a_seed_runs_the_same_way_each_time() {
    runs_the_same_way_twice(0..5);
}

#[test]
#[ignore = "takes long: tests/run --all"]
fn each_of_many_seeds_runs_the_same_way_each_time() {
    runs_the_same_way_twice(5..100);
}

fn runs_the_same_way_twice(seeds: std::ops::Range<u64>) {
    for seed in seeds {
        let once = World::new(seed, Instant::now()).run();
        let again = World::new(seed, Instant::now()).run();
        assert_eq!(once, again, "seed {seed}");
    }
}
