//! Which operation is handed out next, against a naive model that looks at all of them each time.
//!
//! From the root of the invocation tree down: what is queued at a node itself comes before what is
//! queued below it; below it, the child goes first whose (executing + 1) × 2^(priority / 100) is
//! smallest, where the priority is that of its most urgent operation; of equals, the one where
//! something was started longest ago. Inside a node: the most urgent; of these the one that is expected
//! to take longest; of these the oldest.
//!
//! The model does not choose but judges, since the order of equals that were never served is open.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use bb_remote_execution::{
    config::scheduling::Scheduling,
    digest::{Digest, DigestFunction},
    instance::InstanceName,
    proto::reapi,
    scheduler::{
        queue::{
            Attempt, DesiredWorkerState, Effect, EncodedResponse, Instruction, InvocationKey,
            InvocationKeys, Platform, PredeclaredQueue, Queue, QueuedAction, ReportedAction,
            ReportedDigest, Request, Settings, SizeClassQueueKey, Stage, SynchronizeAnswer,
            WorkerActivity, WorkerCaller, WorkerId, WorkerReport,
        },
        size_class::Analyzer,
    },
};
use proptest::prelude::*;
use uuid::Uuid;

const WORKERS: usize = 6;

#[derive(Clone, Debug)]
enum Step {
    Execute {
        path: Vec<u8>,
        priority: i32,
        seconds: u64,
        /// Which of a few actions that may be joined; none for one of its own.
        shared: Option<u8>,
    },
    /// A worker completes what it has, and asks for work.
    Synchronize(usize),
    Cancel(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let path = prop::collection::vec(0..3_u8, 0..4);
    let priority = prop_oneof![4 => Just(0), 3 => -3..3, 3 => -300..300_i32];
    let execute = (
        path,
        priority,
        1..4_u64,
        prop::option::weighted(0.2, 0..4_u8),
    );
    prop_oneof![
        5 => execute.prop_map(|(path, priority, seconds, shared)| Step::Execute {
            path,
            priority,
            seconds,
            shared,
        }),
        4 => (0..WORKERS).prop_map(Step::Synchronize),
        1 => (0..100_usize).prop_map(Step::Cancel),
    ]
}

/// What the model knows of an operation that is not completed.
#[derive(Clone, Debug)]
struct Operation {
    path: Vec<u8>,
    priority: i32,
    seconds: u64,
    arrival: u64,
    digest: Digest,
    executing: bool,
}

struct Model {
    operations: BTreeMap<Uuid, Operation>,
    /// When something was last started below a node, for nodes that something has been queued or
    /// executing at ever since.
    started: BTreeMap<Vec<u8>, u64>,
    time: u64,
}

impl Model {
    fn below<'a>(&'a self, node: &'a [u8]) -> impl Iterator<Item = &'a Operation> {
        let operations = self.operations.values();
        operations.filter(move |operation| operation.path.starts_with(node))
    }

    /// How many workers execute for a node, and its most urgent priority.
    fn load(&self, node: &[u8]) -> (usize, i32) {
        let mut executing: Vec<Digest> = self
            .below(node)
            .filter(|operation| operation.executing)
            .map(|operation| operation.digest)
            .collect();
        executing.sort_unstable();
        executing.dedup();
        let queued = self.below(node).filter(|operation| !operation.executing);
        let priority = queued.map(|operation| operation.priority).min().unwrap();
        (executing.len(), priority)
    }

    fn score(&self, node: &[u8]) -> f64 {
        let (executing, priority) = self.load(node);
        (executing as f64 + 1.0) * 2_f64.powf(f64::from(priority) / 100.0)
    }

    /// Why an operation must not be the next one.
    fn judge(&self, operation: &Operation) -> Result<(), String> {
        let queued = |node: &[u8]| {
            let node = node.to_vec();
            let operations = self.operations.values();
            operations.filter(move |operation| !operation.executing && operation.path == node)
        };
        for depth in 0..operation.path.len() {
            let node = &operation.path[..depth];
            if queued(node).next().is_some() {
                return Err(format!("something is queued at {node:?} itself"));
            }
            let chosen = &operation.path[..=depth];
            let score = self.score(chosen);
            for child in 0..3 {
                let other = [node, &[child]].concat();
                if *other == *chosen || !self.below(&other).any(|operation| !operation.executing) {
                    continue;
                }
                let theirs = self.score(&other);
                if theirs < score * (1.0 - 1e-9) {
                    return Err(format!("{other:?} has {theirs}, {chosen:?} has {score}"));
                }
                let times = (self.started.get(&other), self.started.get(chosen));
                if let (Some(theirs), Some(ours)) = times
                    // What else is equal may differ by a rounding error.
                    && self.load(&other) == self.load(chosen)
                    && theirs < ours
                {
                    return Err(format!("{other:?} was served longer ago than {chosen:?}"));
                }
            }
        }
        let key = |operation: &Operation| {
            let longest_first = u64::MAX - operation.seconds;
            (operation.priority, longest_first, operation.arrival)
        };
        match queued(&operation.path).min_by_key(|operation| key(operation)) {
            Some(first) if key(first) < key(operation) => Err(format!("{first:?} comes before")),
            _ => Ok(()),
        }
    }

    /// A task was handed out: any of its operations may have been the reason.
    fn start(&mut self, digest: Digest, judged: bool) -> Result<(), String> {
        let of_task: Vec<Operation> = self
            .operations
            .values()
            .filter(|operation| operation.digest == digest && !operation.executing)
            .cloned()
            .collect();
        let reasons: Vec<String> = of_task
            .iter()
            .filter_map(|operation| self.judge(operation).err())
            .collect();
        if judged && reasons.len() == of_task.len() {
            return Err(format!("{of_task:?} was handed out, but {reasons:?}"));
        }
        for operation in self.operations.values_mut() {
            operation.executing |= operation.digest == digest;
        }
        for operation in of_task {
            self.serve(&operation.path);
        }
        Ok(())
    }

    fn serve(&mut self, path: &[u8]) {
        self.time += 1;
        for depth in 1..=path.len() {
            self.started.insert(path[..depth].to_vec(), self.time);
        }
    }

    /// Nodes that nothing is at are forgotten.
    fn forget(&mut self) {
        let operations = &self.operations;
        self.started.retain(|node, _| {
            operations
                .values()
                .any(|operation| operation.path.starts_with(node))
        });
    }
}

struct World {
    queue: Queue<usize, ()>,
    now: Instant,
    key: SizeClassQueueKey,
    /// What each worker has.
    workers: Vec<Option<(Digest, Attempt)>>,
    model: Model,
    made: u64,
}

impl World {
    fn new() -> Self {
        let key = SizeClassQueueKey {
            platform: Platform::default(),
            prefix: InstanceName::empty(),
            size_class: 0,
        };
        let predeclared = PredeclaredQueue {
            prefix: key.prefix.clone(),
            platform: key.platform.clone(),
            size_classes: vec![0],
            stickiness_limits: Vec::new(),
            maximum_queued_background_learning_operations: 0,
            background_learning_operation_priority: 0,
        };
        let settings = Settings {
            predeclared_queues: vec![predeclared],
            ..Settings::from(&Scheduling::default())
        };
        let now = Instant::now();
        World {
            queue: Queue::new(settings, now),
            now,
            key,
            workers: vec![None; WORKERS],
            model: Model {
                operations: BTreeMap::new(),
                started: BTreeMap::new(),
                time: 0,
            },
            made: 0,
        }
    }

    fn execute(
        &mut self,
        path: &[u8],
        priority: i32,
        seconds: u64,
        shared: Option<u8>,
    ) -> Result<(), String> {
        self.made += 1;
        let content = match shared {
            Some(shared) => vec![shared],
            None => self.made.to_le_bytes().to_vec(),
        };
        let digest = DigestFunction::Sha256.digest_of(&content);
        // An action has one timeout, which is what it is expected to take.
        let seconds = shared.map_or(seconds, u64::from);
        let duration = Duration::from_secs(seconds);
        let keys = path.iter().map(|key| InvocationKey::from_bytes(&[*key]));
        let request = Request {
            name: Uuid::from_u64_pair(1, self.made),
            resumes: false,
            action: Arc::new(QueuedAction::new(
                InstanceName::empty(),
                digest,
                reapi::Action::default(),
                duration,
                Vec::new(),
                prost_types::Timestamp::default(),
                None,
            )),
            platform: self.key.platform.clone(),
            selector: Analyzer::Fallback.selector(duration, None, SystemTime::UNIX_EPOCH),
            priority,
            invocation: InvocationKeys::new(keys),
            skip_cache_lookup: false,
        };
        let attached = self.queue.execute(self.now, request, ());
        let attached = attached.map_err(|error| error.to_string())?;
        let executing = attached.progress.stage != Stage::Queued;
        let arrival = self
            .model
            .operations
            .values()
            .filter(|operation| operation.digest == digest)
            .map(|operation| operation.arrival)
            .min();
        let operation = Operation {
            path: path.to_vec(),
            priority,
            seconds,
            // That of the task.
            arrival: arrival.unwrap_or(self.made),
            digest,
            executing: false,
        };
        match self.model.operations.get_mut(&attached.operation) {
            // It joined the one of its invocation, which is as urgent as either.
            Some(joined) => joined.priority = joined.priority.min(priority),
            None => {
                let joins_running = executing && arrival.is_some();
                let operation = Operation {
                    executing: joins_running,
                    ..operation
                };
                if joins_running {
                    // Its invocation is served from now on.
                    self.model.serve(&operation.path);
                }
                self.model.operations.insert(attached.operation, operation);
            }
        }
        self.perform()
    }

    fn synchronize(&mut self, worker: usize) -> Result<(), String> {
        let caller = WorkerCaller {
            id: WorkerId::new([("thread".to_owned(), worker.to_string())].into()),
            peer: format!("127.0.0.1:{worker}").into(),
            call: None,
        };
        let task = self.workers[worker].take();
        let activity = match &task {
            None => WorkerActivity::Idle,
            Some((digest, attempt)) => WorkerActivity::Completed(
                ReportedAction {
                    digest: ReportedDigest::from(digest),
                    instance: Some(InstanceName::empty()),
                    attempt: Some(*attempt),
                },
                Arc::new(EncodedResponse::new(&reapi::ExecuteResponse::default())),
            ),
        };
        let report = WorkerReport {
            activity,
            prefer_being_idle: false,
        };
        if let Some((digest, _)) = task {
            self.model
                .operations
                .retain(|_, operation| operation.digest != digest || !operation.executing);
            self.model.forget();
        }
        let wait = Duration::from_secs(60);
        let answer = self
            .queue
            .synchronize(self.now, &self.key, &caller, report, worker, wait);
        match answer {
            Ok(SynchronizeAnswer::Now(instruction)) => self.obey(worker, instruction, true)?,
            // It is parked; in the same state it is not asked again.
            Ok(SynchronizeAnswer::Held(_)) => {
                let queued = self.model.operations.values().any(|o| !o.executing);
                if queued {
                    return Err("a worker waits although something is queued".to_owned());
                }
            }
            // Its call is held already.
            Err(_) => {}
        }
        self.perform()
    }

    fn obey(
        &mut self,
        worker: usize,
        instruction: Instruction,
        judged: bool,
    ) -> Result<(), String> {
        if let DesiredWorkerState::Execute {
            action, attempt, ..
        } = instruction.desired
        {
            self.model.start(action.digest, judged)?;
            self.workers[worker] = Some((action.digest, attempt));
        }
        Ok(())
    }

    fn cancel(&mut self, number: usize) -> Result<(), String> {
        let count = self.model.operations.len();
        let Some(name) = self
            .model
            .operations
            .keys()
            .nth(number % count.max(1))
            .copied()
        else {
            return Ok(());
        };
        let digest = self.model.operations[&name].digest;
        // Whether others who wait for its task keep it is not judged here: they are none.
        let alone = self
            .model
            .operations
            .values()
            .filter(|operation| operation.digest == digest)
            .count()
            == 1;
        if !alone {
            return Ok(());
        }
        self.queue
            .cancel(self.now, name)
            .map_err(|error| error.to_string())?;
        self.model.operations.remove(&name);
        self.model.forget();
        for worker in &mut self.workers {
            worker.take_if(|(executed, _)| *executed == digest);
        }
        self.perform()
    }

    fn perform(&mut self) -> Result<(), String> {
        for effect in self.queue.effects() {
            if let Effect::Answer { call, instruction } = effect {
                self.obey(call, instruction, false)?;
            }
        }
        self.queue.check_invariants()
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: std::env::var("BB_FAIRNESS_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(2_000),
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn the_next_operation_is_one_that_a_naive_model_would_choose(
        steps in prop::collection::vec(step(), 1..80),
    ) {
        let mut world = World::new();
        for step in &steps {
            world.now += Duration::from_millis(1);
            let result = match step {
                Step::Execute { path, priority, seconds, shared } => {
                    world.execute(path, *priority, *seconds, *shared)
                }
                Step::Synchronize(worker) => world.synchronize(*worker),
                Step::Cancel(number) => world.cancel(*number),
            };
            prop_assert!(result.is_ok(), "{step:?}: {}", result.unwrap_err());
        }
    }
}
