//! The laws of the queue, one by one; `tests/it/simulation.rs` has them all at once.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use prost::Message;
use uuid::Uuid;

use super::*;
use crate::{
    digest::DigestFunction,
    proto::{reapi, rpc},
    scheduler::size_class::Analyzer,
};

mod adoption;
mod attempts;
mod clients;
mod fairness;
mod limits;
mod listing;
mod platform_queues;
mod sizes;
mod statistics;
mod steering;
mod workers;

const SECOND: Duration = Duration::from_secs(1);

struct Farm {
    queue: Queue<u32, u32>,
    now: Instant,
    names: u128,
    /// What was told to waiters, by watch; what was answered to held calls.
    told: BTreeMap<u32, Stage>,
    answered: BTreeMap<u32, Instruction>,
    versions: BTreeMap<u32, u64>,
    /// What was to be kept last.
    drains: usize,
    learnt: usize,
}

fn linux() -> Platform {
    Platform::from(&BTreeMap::from([("OSFamily".into(), "linux".into())]))
}

fn key(prefix: &str) -> SizeClassQueueKey {
    SizeClassQueueKey {
        platform: linux(),
        prefix: InstanceName::parse(prefix).unwrap(),
        size_class: 0,
    }
}

fn worker(name: &str) -> WorkerId {
    WorkerId::new(BTreeMap::from([("name".to_owned(), name.to_owned())]))
}

fn caller(name: &str) -> WorkerCaller {
    caller_at(name, "its address")
}

fn caller_at(name: &str, peer: &str) -> WorkerCaller {
    WorkerCaller {
        id: worker(name),
        peer: peer.into(),
        call: None,
    }
}

fn digest(action: &str) -> Digest {
    DigestFunction::Sha256.digest_of(action.as_bytes())
}

fn reported(instance: &str, action: &str) -> ReportedAction {
    ReportedAction {
        digest: (&digest(action)).into(),
        instance: Some(InstanceName::parse(instance).unwrap()),
        attempt: None,
    }
}

fn request(action: &str) -> Request {
    request_of("", action)
}

fn request_of(instance: &str, action: &str) -> Request {
    let asked = request_for(instance, digest(action), false);
    let metadata = reapi::RequestMetadata {
        target_id: action.to_owned(),
        ..Default::default()
    };
    let metadata = vec![crate::proto::pack(&metadata)];
    let old = asked.action;
    Request {
        action: Arc::new(QueuedAction::new(
            old.instance.clone(),
            old.digest,
            reapi::Action::default(),
            old.timeout,
            metadata,
            old.queued_timestamp,
            None,
        )),
        ..asked
    }
}

fn request_for(instance: &str, digest: Digest, do_not_cache: bool) -> Request {
    let action = reapi::Action {
        do_not_cache,
        ..Default::default()
    };
    let timeout = 60 * SECOND;
    Request {
        name: Uuid::nil(),
        resumes: false,
        action: Arc::new(QueuedAction::new(
            InstanceName::parse(instance).unwrap(),
            digest,
            action,
            timeout,
            Vec::new(),
            Default::default(),
            None,
        )),
        platform: linux(),
        selector: Analyzer::Fallback.selector(timeout, None, SystemTime::UNIX_EPOCH),
        priority: 0,
        invocation: InvocationKeys::default(),
        skip_cache_lookup: false,
    }
}

fn invocation(name: &str) -> InvocationKeys {
    InvocationKeys::new([InvocationKey::from_bytes(name.as_bytes())])
}

/// Of an invocation.
fn named(name: &str, action: &str) -> Request {
    Request {
        invocation: invocation(name),
        ..request(action)
    }
}

fn idle() -> WorkerReport {
    WorkerReport {
        activity: WorkerActivity::Idle,
        prefer_being_idle: false,
    }
}

fn executing(action: &str) -> WorkerReport {
    WorkerReport {
        activity: WorkerActivity::Executing(reported("", action)),
        prefer_being_idle: false,
    }
}

fn outcome(code: rpc::Code) -> Arc<EncodedResponse> {
    Arc::new(EncodedResponse::failure(code, "of a worker".to_owned()))
}

fn completed(action: &str, code: rpc::Code) -> WorkerReport {
    WorkerReport {
        activity: WorkerActivity::Completed(reported("", action), outcome(code)),
        prefer_being_idle: false,
    }
}

fn status(stage: &Stage) -> (i32, String) {
    let Stage::Completed(outcome) = stage else {
        panic!("{stage:?}");
    };
    let response = reapi::ExecuteResponse::decode(&*outcome.response).unwrap();
    let status = response.status.unwrap();
    (status.code, status.message)
}

fn action(instruction: &Instruction) -> Option<Digest> {
    match &instruction.desired {
        DesiredWorkerState::Execute { action, .. } => Some(action.digest),
        DesiredWorkerState::Idle | DesiredWorkerState::Unchanged => None,
    }
}

impl Farm {
    fn new() -> Farm {
        Farm::with(|_| {})
    }

    fn with(change: impl FnOnce(&mut Settings)) -> Farm {
        let mut settings = Settings::from(&crate::config::scheduling::Scheduling::default());
        change(&mut settings);
        #[expect(clippy::disallowed_methods, reason = "tests are not pure")]
        let now = Instant::now();
        Farm {
            queue: Queue::new(settings, now),
            now,
            names: 0,
            told: BTreeMap::new(),
            answered: BTreeMap::new(),
            versions: BTreeMap::new(),
            drains: 0,
            learnt: 0,
        }
    }

    fn perform(&mut self) {
        for effect in self.queue.effects() {
            match effect {
                Effect::Answer { call, instruction } => {
                    self.answered.insert(call, instruction);
                }
                Effect::Tell { watch, progress } => {
                    self.told.insert(watch, progress.stage);
                    self.versions.insert(watch, progress.version);
                }
                Effect::Learned(_) => self.learnt += 1,
                Effect::Abandoned { .. } => {}
                Effect::KeepDrains { drains, .. } => self.drains = drains.len(),
            }
        }
        self.queue.check_invariants().unwrap();
    }

    fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(next) = self.queue.poll_timeout().filter(|next| *next <= end) {
            self.now = next;
            self.queue.expire(next);
            self.perform();
        }
        self.now = end;
    }

    fn execute(
        &mut self,
        request: Request,
        watch: u32,
    ) -> Result<AttachedWaiter<u32>, ExecuteRefusal> {
        self.names += 1;
        let request = Request {
            name: Uuid::from_u128(self.names),
            ..request
        };
        let attached = self.queue.execute(self.now, request, watch);
        self.perform();
        attached
    }

    fn call(
        &mut self,
        key: &SizeClassQueueKey,
        name: &str,
        report: WorkerReport,
        call: u32,
    ) -> SynchronizeAnswer {
        let wait = 120 * SECOND;
        let answer = self
            .queue
            .synchronize(self.now, key, &caller(name), report, call, wait)
            .unwrap();
        self.perform();
        answer
    }

    fn now(&mut self, name: &str, report: WorkerReport) -> Instruction {
        match self.call(&key(""), name, report, 0) {
            SynchronizeAnswer::Now(instruction) => instruction,
            SynchronizeAnswer::Held(_) => panic!("the call is held"),
        }
    }

    fn held(&mut self, name: &str, report: WorkerReport, call: u32) -> HeldCall {
        match self.call(&key(""), name, report, call) {
            SynchronizeAnswer::Held(held) => held,
            SynchronizeAnswer::Now(instruction) => panic!("{instruction:?}"),
        }
    }

    /// Queues what nobody needs to hear of.
    fn add(&mut self, request: Request) -> AttachedWaiter<u32> {
        self.execute(request, 0).unwrap()
    }

    fn name_of(&self, instruction: &Instruction) -> String {
        match &instruction.desired {
            DesiredWorkerState::Execute { action, .. } => action.target_id(),
            other => panic!("{other:?}"),
        }
    }

    /// The action that a worker executes.
    fn executed_by(&self, name: &str) -> String {
        let workers = self
            .queue
            .workers(&key(""), &WorkerFilter::All, None, 99)
            .unwrap();
        let mut rows = workers.rows.into_iter();
        let row = rows.find(|row| row.id == worker(name)).unwrap();
        row.operation.unwrap().action.target_id()
    }
}
