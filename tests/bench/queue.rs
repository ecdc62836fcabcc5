//! The pure queue alone, on one core: nothing is sent, nobody waits.
//!
//! usage: cargo bench --bench farm -- queue [QUEUED WORKERS INVOCATIONS [COUNT]]
//!
//! With so many operations queued, of so many invocations of ten users, so many workers complete what
//! they have and are handed the next, and for each a client queues another one. The story is told
//! twice, and the quicker of both is each verb's time, so that what else the machine did is left out. Of
//! deadlines that pass, which are seldom and long, it is the processor's time.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use bb_remote_execution::{
    config::scheduling::Scheduling,
    digest::{Digest, DigestFunction},
    instance::InstanceName,
    proto::{self, reapi},
    scheduler::{
        queue::{
            Attempt, DesiredWorkerState, Effect, EncodedResponse, Instruction, InvocationKey,
            InvocationKeys, Platform, PredeclaredQueue, Queue, QueueLimits, QueuedAction,
            ReportedAction, ReportedDigest, Request, Settings, SizeClassQueueKey,
            SynchronizeAnswer, WorkerActivity, WorkerCaller, WorkerId, WorkerReport,
        },
        size_class::Analyzer,
    },
};
use uuid::Uuid;

use crate::soak::resident_kib;

const USERS: u64 = 10;

pub fn run(arguments: &[String]) {
    let numbers: Vec<usize> = arguments
        .iter()
        .filter_map(|text| text.parse().ok())
        .collect();
    match numbers[..] {
        [queued, workers, invocations, count] => measure(queued, workers, invocations, count),
        [queued, workers, invocations] => measure(queued, workers, invocations, 500_000),
        _ => {
            measure(1_000, 1_000, 100, 500_000);
            measure(1_000_000, 10_000, 1_000, 500_000);
        }
    }
}

/// What a verb took, each time.
type Times = BTreeMap<&'static str, Vec<u32>>;

fn measure(queued: usize, workers: usize, invocations: usize, count: usize) {
    println!("{queued} queued, {workers} workers, {invocations} invocations of {USERS} users");
    let (mut times, mut rounds) = (Times::new(), Vec::<u32>::new());
    for story in 0..2 {
        let mut bench = Bench::new(workers, invocations);
        let before = resident_kib();
        for _ in 0..queued + workers {
            bench.execute();
        }
        if story == 0 {
            let bytes = (resident_kib() - before) * 1024 / (queued + workers) as u64;
            println!("  {bytes} bytes for each queued operation");
        }
        for worker in 0..workers {
            bench.synchronize(worker);
        }
        for number in 0..count {
            bench.spent = 0;
            bench.synchronize(number % workers);
            bench.execute();
            bench.expire();
            let spent = bench.spent;
            match rounds.get_mut(number) {
                Some(earlier) => *earlier = spent.min(*earlier),
                None => rounds.push(spent),
            }
        }
        bench.lose_all_workers();
        if story == 0 {
            times = bench.times;
            continue;
        }
        for (verb, later) in bench.times {
            let Some(earlier) = times.get_mut(verb) else {
                continue;
            };
            for (earlier, later) in earlier.iter_mut().zip(later) {
                *earlier = later.min(*earlier);
            }
        }
    }
    let seconds = rounds.into_iter().map(f64::from).sum::<f64>() / 1e9;
    let rate = count as f64 / seconds;
    println!("  complete, assign and enqueue: {rate:.0} a second");
    for (verb, mut times) in times {
        times.sort_unstable();
        let at = |share: f64| f64::from(times[((times.len() - 1) as f64 * share) as usize]) / 1e3;
        println!(
            "  {verb:<24} median {:.1} µs, 99.9 % {:.1} µs, worst {:.1} µs",
            at(0.5),
            at(0.999),
            at(1.0)
        );
    }
}

struct Bench {
    queue: Queue<usize, u64>,
    now: Instant,
    key: SizeClassQueueKey,
    workers: Vec<(WorkerCaller, Option<(Digest, Attempt)>)>,
    response: Arc<EncodedResponse>,
    invocations: u64,
    made: u64,
    times: Times,
    /// Nanoseconds in verbs alone: what the benchmark does to make requests is not the queue's.
    spent: u32,
}

impl Bench {
    fn new(workers: usize, invocations: usize) -> Self {
        let platform = [
            ("OSFamily", "linux"),
            ("container-image", "docker://debian"),
        ];
        let platform = platform.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let key = SizeClassQueueKey {
            platform: Platform::from(&BTreeMap::from(platform)),
            prefix: InstanceName::empty(),
            size_class: 0,
        };
        let limits = QueueLimits {
            queued_operations: usize::MAX,
            queued_operations_per_instance_name: usize::MAX,
            queued_operations_per_invocation: usize::MAX,
            ..QueueLimits::default()
        };
        let settings = Settings {
            // As many as of a farm that is a hundred times slower, in a minute.
            operation_with_no_waiters_timeout: Duration::from_millis(500),
            limits,
            predeclared_queues: vec![PredeclaredQueue {
                prefix: key.prefix.clone(),
                platform: key.platform.clone(),
                size_classes: vec![0],
                stickiness_limits: Vec::new(),
                maximum_queued_background_learning_operations: 0,
                background_learning_operation_priority: 0,
            }],
            ..Settings::from(&Scheduling::default())
        };
        let now = Instant::now();
        let workers = (0..workers).map(|worker| {
            let labels = [("hostname", "host"), ("thread", &worker.to_string())];
            let labels = labels.map(|(name, value)| (name.to_owned(), value.to_owned()));
            let caller = WorkerCaller {
                id: WorkerId::new(labels.into()),
                peer: "127.0.0.1:1".into(),
                call: None,
            };
            (caller, None)
        });
        let mut bench = Bench {
            queue: Queue::new(settings, now),
            now,
            workers: workers.collect(),
            response: Arc::new(EncodedResponse::new(&reapi::ExecuteResponse::default())),
            invocations: invocations as u64,
            made: 0,
            times: Times::new(),
            spent: 0,
            key,
        };
        // Where platform queues are not predeclared, one worker's call makes this one.
        let (caller, _) = &bench.workers[0];
        let report = WorkerReport {
            activity: WorkerActivity::Idle,
            prefer_being_idle: true,
        };
        let _ = bench
            .queue
            .synchronize(now, &bench.key, caller, report, 0, Duration::ZERO);
        bench
    }

    fn time<T>(&mut self, verb: &'static str, work: impl FnOnce(&mut Self) -> T) -> T {
        let begin = Instant::now();
        let result = work(self);
        let took = begin.elapsed().as_nanos().min(u128::from(u32::MAX)) as u32;
        self.spent = self.spent.saturating_add(took);
        self.times.entry(verb).or_default().push(took);
        result
    }

    /// The same, by the time that this thread had a processor.
    fn time_on_processor(&mut self, verb: &'static str, work: impl FnOnce(&mut Self)) {
        let nanoseconds = || {
            let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
            time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
        };
        let begin = nanoseconds();
        work(self);
        let took = u32::try_from(nanoseconds() - begin).unwrap_or(u32::MAX);
        self.times.entry(verb).or_default().push(took);
    }

    fn request(&mut self) -> Request {
        self.made += 1;
        let digest = DigestFunction::Sha256.digest_of(&self.made.to_le_bytes());
        let invocation = self.made % self.invocations;
        let keys = [
            format!("user-{}", invocation % USERS),
            format!("{invocation:036}"),
        ];
        let action = reapi::Action {
            command_digest: Some(digest.to_proto()),
            input_root_digest: Some(digest.to_proto()),
            ..Default::default()
        };
        let metadata = proto::pack(&reapi::RequestMetadata {
            tool_invocation_id: keys[1].clone(),
            action_id: digest.hash_hex(),
            target_id: "//some/package/of:a_target".to_owned(),
            ..Default::default()
        });
        Request {
            name: Uuid::from_u64_pair(self.made.wrapping_mul(0x9e37_79b9_7f4a_7c15), self.made),
            resumes: false,
            action: Arc::new(QueuedAction::new(
                self.key.prefix.clone(),
                digest,
                action,
                Duration::from_secs(1800),
                vec![metadata],
                prost_types::Timestamp {
                    seconds: self.made as i64,
                    nanos: 0,
                },
                None,
            )),
            platform: self.key.platform.clone(),
            selector: Analyzer::Fallback.selector(
                Duration::from_secs(1800),
                None,
                SystemTime::UNIX_EPOCH,
            ),
            priority: (self.made % 3) as i32 * 10,
            invocation: InvocationKeys::new(
                keys.iter()
                    .map(|key| InvocationKey::from_bytes(key.as_bytes())),
            ),
            skip_cache_lookup: false,
        }
    }

    fn execute(&mut self) {
        let request = self.request();
        let (now, watch) = (self.now, self.made);
        let attached = self.time("enqueue", |bench| bench.queue.execute(now, request, watch));
        let operation = attached.expect("it is queued").operation;
        self.perform();
        // A client that will ask again.
        if self.made.is_multiple_of(64) {
            self.time("detach and wait", |bench| {
                bench.queue.detach(now, operation);
                bench.queue.wait(operation);
            });
        }
    }

    /// Completes what the worker has, and is handed the next.
    fn synchronize(&mut self, worker: usize) {
        let (caller, task) = self.workers[worker].clone();
        let activity = match &task {
            None => WorkerActivity::Idle,
            Some((digest, attempt)) => WorkerActivity::Completed(
                ReportedAction {
                    digest: ReportedDigest::from(digest),
                    instance: Some(self.key.prefix.clone()),
                    attempt: Some(*attempt),
                },
                self.response.clone(),
            ),
        };
        let report = WorkerReport {
            activity,
            prefer_being_idle: false,
        };
        let (now, wait) = (self.now, Duration::from_secs(60));
        let answer = self.time("complete and assign", |bench| {
            let key = &bench.key;
            bench
                .queue
                .synchronize(now, key, &caller, report, worker, wait)
        });
        if let Some((_, attempt)) = task {
            self.time("detach", |bench| {
                bench.queue.detach(now, attempt.operation);
            });
        }
        self.workers[worker].1 = None;
        if let Ok(SynchronizeAnswer::Now(instruction)) = answer {
            self.obey(worker, instruction);
        }
        self.perform();
    }

    fn obey(&mut self, worker: usize, instruction: Instruction) {
        if let DesiredWorkerState::Execute {
            action, attempt, ..
        } = instruction.desired
        {
            self.workers[worker].1 = Some((action.digest, attempt));
        }
    }

    fn perform(&mut self) {
        for effect in self.queue.effects() {
            if let Effect::Answer { call, instruction } = effect {
                self.obey(call, instruction);
            }
        }
    }

    fn expire(&mut self) {
        self.now += Duration::from_micros(5);
        let now = self.now;
        if self.queue.poll_timeout().is_some_and(|due| due <= now) {
            self.time("expire", |bench| bench.queue.expire(now));
            self.perform();
        }
    }

    /// All fall silent at once.
    fn lose_all_workers(&mut self) {
        self.now += Duration::from_secs(600);
        let (now, mut verbs) = (self.now, 0);
        let begin = Instant::now();
        while self.queue.poll_timeout().is_some_and(|due| due <= now) {
            self.time_on_processor("expire, all workers lost", |bench| {
                bench.queue.expire(now);
            });
            self.perform();
            verbs += 1;
        }
        let took = begin.elapsed().as_secs_f64() * 1e3;
        println!("  all workers lost: {took:.0} ms in {verbs} verbs");
    }
}
