//! Both ends of the worker protocol, `queue` and `slot`, and clients, against each other: one seed
//! drives a whole farm over a network that delays, drops, duplicates and reorders, in one thread.
//!
//! BB_SIMULATION_SEEDS says how many seeds to try, BB_SIMULATION_SEED which one to replay.
//!
//! Each seed: some minutes of trouble (lost messages, crashing workers, restarting schedulers,
//! clients that leave), then the network heals. After every step the queue's invariants hold, and
//!
//! 1. a result that a client gets is one that a slot produced for this action, or an error that the
//!    scheduler gives in words that we know; none says CANCELLED to someone who waits;
//! 2. of one invocation, a worker gets the most urgent, then oldest task that waits there;
//! 3. a slot never runs two actions at once;
//! 4. a worker that prefers being idle is answered at once, and gets nothing new; a paused one does
//!    not ask;
//! 5. a slot keeps its result until a scheduler has answered for it;
//! 6. after the healing every client gets an end, and when all have left nothing remains.
//!
//! Long, since all of it is one world: each event may touch every part.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use bb_remote_execution::{
    config::scheduler::Scheduling,
    digest::{Digest, DigestFunction},
    instance::InstanceName,
    metadata::WorkerCall,
    proto::{self, reapi, rpc},
    scheduler::queue::{
        Caller, Clock, Counts, DesiredWorkerState, Effect, EncodedResponse, ExecuteRefusal,
        HeldCall, Instruction, InvocationKey, InvocationKeys, OperationRow, Platform, Progress,
        Queue, QueuedAction, ReportedAction, ReportedDigest, Request as QueueRequest, Settings,
        SizeClassQueueKey, Stage, SynchronizeAnswer, TICK, WorkerActivity, WorkerId, WorkerReport,
    },
    scheduler::size_class::Analyzer,
    worker::slot::{Activity, Answer, Desired, Slot, SlotReport, SlotStep},
};
use prost::Message;
use uuid::Uuid;

use crate::harness::parts::Random;

const MILLISECOND: Duration = Duration::from_millis(1);
const MINUTE: Duration = Duration::from_secs(60);

#[derive(Clone, Debug, PartialEq)]
struct RunResult {
    run: u64,
    code: rpc::Code,
}

enum Event {
    // At the scheduler.
    Call {
        generation: u32,
        worker: usize,
        call: u64,
        /// That of the call which this is, or is a duplicate of.
        number: u64,
        report: SlotReport<RunResult>,
        /// Whose the reported action is.
        instance: Option<InstanceName>,
        /// A duplicate: nobody hears the answer.
        ghost: bool,
    },
    HungUp(u64),
    Execute {
        generation: u32,
        stream: u64,
        request: usize,
        ghost: bool,
    },
    Wait {
        generation: u32,
        stream: u64,
        request: usize,
        name: Uuid,
    },
    Left(u64),
    Restart,
    /// It stands still for so long.
    StandStill(Duration),
    // At a worker; nothing reaches its next life.
    Answered {
        worker: usize,
        life: u32,
        call: u64,
        instruction: Option<Instruction>,
    },
    Finished {
        worker: usize,
        life: u32,
        run: u64,
    },
    Ready {
        worker: usize,
        life: u32,
        ok: bool,
    },
    Crash(usize),
    Stop(usize),
    Pause(usize),
    Start(usize),
    // At a client.
    Update {
        stream: u64,
        request: usize,
        name: Uuid,
        stage: Stage,
    },
    Broken {
        stream: u64,
        request: usize,
        why: Why,
    },
    Ask(usize),
    Abandon(usize),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Why {
    Network,
    NotFound,
    NoWorkers { transient: bool },
}

struct Worker {
    key: SizeClassQueueKey,
    id: WorkerId,
    life: u32,
    slot: Option<Slot<Arc<QueuedAction>, RunResult>>,
    call: Option<u64>,
    running: Option<Running>,
    /// Of what was started last.
    instance: Option<InstanceName>,
    /// A result that no scheduler has answered for.
    kept: Option<u64>,
    wake: Option<Instant>,
    /// It must not ask for work before.
    paused: Instant,
}

struct Running {
    run: u64,
    cancelled: bool,
}

struct Request {
    client: usize,
    action: usize,
    instance: InstanceName,
    platform: Platform,
    priority: i32,
    state: State,
    name: Option<Uuid>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Waiting,
    Asking(u64),
    Ended,
}

struct Stream {
    request: usize,
    operation: Uuid,
    watch: u64,
    version: u64,
}

/// What a seed's story was.
#[derive(Debug, PartialEq)]
struct Told {
    trace: u64,
    steps: u64,
    seen: BTreeMap<&'static str, u64>,
}

struct World {
    seed: u64,
    trouble: Duration,
    random: Random,
    start: Instant,
    now: Instant,
    healed: bool,
    /// All clients are content.
    closing: bool,
    events: BTreeMap<(Instant, u64), Event>,
    last: u64,
    trace: u64,
    steps: u64,
    /// How often what we are here for happened.
    seen: BTreeMap<&'static str, u64>,

    settings: Settings,
    generation: u32,
    queue: Queue<u64, u64>,
    clock: Clock,
    /// The scheduler stands still, until then.
    paused: Option<Instant>,
    /// By call; with the worker and its life, unless it is a ghost.
    held: BTreeMap<u64, (HeldCall, usize, u32)>,
    streams: BTreeMap<u64, Stream>,
    /// Calls and streams whose other end is gone.
    broken: BTreeSet<u64>,

    workers: Vec<Worker>,
    requests: Vec<Request>,
    actions: Vec<(Digest, bool)>,
    /// What each run was of, whose blobs it worked with, and how it ended.
    runs: BTreeMap<u64, (Digest, InstanceName, Option<rpc::Code>)>,
}

fn platform(properties: &[(&str, &str)]) -> Platform {
    Platform::from(
        &properties
            .iter()
            .map(|(name, value)| (name.to_string(), value.to_string()))
            .collect::<BTreeMap<_, _>>(),
    )
}

impl World {
    fn new(seed: u64, start: Instant) -> Self {
        let mut world = World::empty(seed, start);
        world.plan();
        world
    }

    /// Each worker has a twin of the same name.
    fn twins(seed: u64, start: Instant) -> Self {
        let mut world = World::calm(seed, start);
        for worker in 0..world.workers.len() {
            let twin = Worker {
                key: world.workers[worker].key.clone(),
                id: world.workers[worker].id.clone(),
                life: 0,
                slot: None,
                call: None,
                running: None,
                instance: None,
                kept: None,
                wake: None,
                paused: start,
            };
            world.workers.push(twin);
            let at = world.random.up_to(20_000);
            world.after(at, Event::Start(world.workers.len() - 1));
        }
        world
    }

    /// Where nothing goes wrong, but for a scheduler that stands still.
    fn calm(seed: u64, start: Instant) -> Self {
        let mut world = World::empty(seed, start);
        world.healed = true;
        world.plan();
        world
    }

    fn empty(seed: u64, start: Instant) -> Self {
        let mut random = Random(seed);
        let settings = Settings {
            operation_with_no_waiters_timeout: MINUTE,
            busy_worker_interval: Duration::from_secs(10),
            worker_silence_timeout: MINUTE,
            platform_queue_with_no_workers_timeout: 15 * MINUTE,
            worker_task_retry_count: if random.chance(50) { 9 } else { 1 },
            default_platform: random
                .chance(50)
                .then(|| platform(&[("OSFamily", "linux")])),
            lost_worker_retry_count: if random.chance(50) { 3 } else { 0 },
            ..Settings::from(&Scheduling::default())
        };
        let platforms = [
            platform(&[("OSFamily", "linux")]),
            platform(&[("OSFamily", "linux"), ("pool", "big")]),
            platform(&[]),
            platform(&[("OSFamily", "plan9")]),
        ];
        let name = |text: &str| InstanceName::parse(text).unwrap();
        // Small worlds find most; large ones have crowds.
        let large = random.chance(10);
        let (few, many) = match large {
            true => (random.below(6) + 2, random.below(60) + 20),
            false => (random.below(3) + 1, random.below(12) + 3),
        };
        let workers = (0..few + random.below(2))
            .map(|i| Worker {
                key: SizeClassQueueKey {
                    platform: platforms[if random.chance(80) { 0 } else { 1 }].clone(),
                    prefix: name(if random.chance(70) { "" } else { "a" }),
                    size_class: 0,
                },
                id: WorkerId::new(BTreeMap::from([("thread".to_owned(), i.to_string())])),
                life: 0,
                slot: None,
                call: None,
                running: None,
                instance: None,
                kept: None,
                wake: None,
                paused: start,
            })
            .collect();
        let actions: Vec<(Digest, bool)> = (0..random.below(many) + 1)
            .map(|i| {
                let digest = DigestFunction::Sha256.digest_of(&i.to_le_bytes());
                (digest, random.chance(20))
            })
            .collect();
        let requests = (0..many)
            .map(|_| Request {
                client: random.below(few) as usize,
                action: random.below(actions.len() as u64) as usize,
                instance: name(["", "a", "a/b"][random.below(3) as usize]),
                platform: platforms[match random.below(20) {
                    0 => 3,
                    1 => 2,
                    2..5 => 1,
                    _ => 0,
                }]
                .clone(),
                priority: random.below(3) as i32 - 1,
                state: State::Waiting,
                name: None,
            })
            .collect();
        World {
            seed,
            trouble: MINUTE * (3 + random.below(if large { 20 } else { 3 }) as u32),
            random,
            start,
            now: start,
            healed: false,
            closing: false,
            events: BTreeMap::new(),
            last: 0,
            trace: 0xcbf2_9ce4_8422_2325,
            steps: 0,
            seen: BTreeMap::new(),
            queue: Queue::new(settings.clone(), start),
            clock: Clock::new(start),
            paused: None,
            settings,
            generation: 0,
            held: BTreeMap::new(),
            streams: BTreeMap::new(),
            broken: BTreeSet::new(),
            workers,
            requests,
            actions,
            runs: BTreeMap::new(),
        }
    }

    /// When who comes, and what goes wrong.
    fn plan(&mut self) {
        let trouble = self.trouble.as_millis() as u64;
        let mut wrong: u64 = 2 + trouble / 120_000;
        if self.healed || self.random.chance(20) {
            wrong = 0;
        }
        if self.healed || self.random.chance(20) {
            let at = self.random.up_to(trouble);
            let pause = MINUTE + self.random.up_to(600_000);
            self.after(at, Event::StandStill(pause));
        }
        for worker in 0..self.workers.len() {
            let at = self.random.up_to(20_000);
            self.after(at, Event::Start(worker));
            for _ in 0..self.random.below(wrong) {
                let at = self.random.up_to(trouble);
                let event = match self.random.below(3) {
                    0 => Event::Crash(worker),
                    1 => Event::Pause(worker),
                    _ => Event::Stop(worker),
                };
                self.after(at, event);
            }
        }
        for request in 0..self.requests.len() {
            let at = self.random.up_to(trouble * 3 / 4);
            self.after(at, Event::Ask(request));
            if self.random.chance(15) {
                let later = self.random.up_to(120_000);
                self.after(at + later, Event::Abandon(request));
            }
        }
        if self.random.chance(30) {
            let at = self.random.up_to(trouble);
            self.after(at, Event::Restart);
        }
    }

    fn number(&mut self) -> u64 {
        self.last += 1;
        self.last
    }

    fn after(&mut self, delay: Duration, event: Event) {
        let number = self.number();
        self.events.insert((self.now + delay, number), event);
    }

    fn fail(&self, what: impl std::fmt::Display) -> ! {
        panic!(
            "seed {} at {:?}, step {}: {what}\nreplay with BB_SIMULATION_SEED={}",
            self.seed,
            self.now - self.start,
            self.steps,
            self.seed
        );
    }

    fn see(&mut self, what: &'static str) {
        *self.seen.entry(what).or_default() += 1;
    }

    fn mix(&mut self, word: u64) {
        self.trace = (self.trace ^ word).wrapping_mul(0x0100_0000_01b3);
    }

    // The network.

    fn lost(&mut self) -> bool {
        !self.healed && self.random.chance(6)
    }

    fn delay(&mut self) -> Duration {
        match self.healed || self.random.chance(90) {
            true => self.random.up_to(20),
            false => self.random.up_to(20_000),
        }
    }

    /// Until an end notices that the other one is gone.
    fn notice(&mut self) -> Duration {
        match self.healed || self.random.chance(70) {
            true => self.random.up_to(200),
            false => self.random.up_to(80_000),
        }
    }

    // The scheduler.

    /// After each verb.
    fn perform(&mut self) {
        for effect in self.queue.effects() {
            match effect {
                Effect::Answer { call, instruction } => {
                    let Some(&(_, worker, life)) = self.held.get(&call) else {
                        self.fail("a call is answered that is not held");
                    };
                    self.see("woken");
                    if self.broken.contains(&call) {
                        // Either the answer is lost, or it was never sent and the call's end
                        // gives the task back.
                        if self.random.chance(50) {
                            self.held.remove(&call);
                        }
                        continue;
                    }
                    self.held.remove(&call);
                    self.answer(worker, life, call, Some(instruction));
                }
                Effect::Learned(_) | Effect::KeepDrains { .. } | Effect::Abandoned { .. } => {}
                Effect::Tell { watch, progress } => {
                    let told: Vec<u64> = self
                        .streams
                        .iter()
                        .filter(|(_, s)| s.watch == watch && s.version < progress.version)
                        .map(|(number, _)| *number)
                        .collect();
                    for stream in told {
                        self.update(stream, progress.clone());
                    }
                }
            }
        }
        if let Err(broken) = self.queue.check_invariants() {
            self.fail(broken);
        }
    }

    fn update(&mut self, number: u64, progress: Progress) {
        let Some(stream) = self.streams.get_mut(&number) else {
            return;
        };
        stream.version = progress.version;
        let (request, name) = (stream.request, stream.operation);
        let completed = matches!(progress.stage, Stage::Completed(_));
        if !self.broken.contains(&number) {
            if self.lost() {
                self.break_stream(number, request);
            } else {
                let delay = self.delay();
                let stage = progress.stage;
                let event = Event::Update {
                    stream: number,
                    request,
                    name,
                    stage,
                };
                self.after(delay, event);
            }
        }
        if completed {
            self.streams.remove(&number);
            let now = self.look();
            self.queue.detach(now, name);
        }
    }

    fn break_stream(&mut self, stream: u64, request: usize) {
        self.broken.insert(stream);
        let (theirs, ours) = (self.notice(), self.notice());
        self.after(theirs, Event::Left(stream));
        let why = Why::Network;
        let event = Event::Broken {
            stream,
            request,
            why,
        };
        self.after(ours, event);
    }

    fn answer(&mut self, worker: usize, life: u32, call: u64, instruction: Option<Instruction>) {
        let (delay, instruction) = match self.lost() {
            true => (self.notice(), None),
            false => (self.delay(), instruction),
        };
        self.after(
            delay,
            Event::Answered {
                worker,
                life,
                call,
                instruction,
            },
        );
    }

    fn call(
        &mut self,
        worker: usize,
        life: u32,
        (call, number): (u64, u64),
        report: SlotReport<RunResult>,
        instance: Option<InstanceName>,
        ghost: bool,
    ) {
        let (key, id) = (
            self.workers[worker].key.clone(),
            self.workers[worker].id.clone(),
        );
        let reported = |digest: &reapi::Digest| ReportedAction {
            digest: ReportedDigest::from(
                &Digest::parse(None, digest).expect("the echo of a digest"),
            ),
            instance: instance.clone(),
            attempt: None,
        };
        let unwilling = report.prefer_being_idle;
        let executes = matches!(report.activity, Activity::Executing(_));
        let activity = match &report.activity {
            Activity::Idle => WorkerActivity::Idle,
            Activity::Started(digest) | Activity::Executing(digest) => {
                WorkerActivity::Executing(reported(digest))
            }
            Activity::Completed(digest, result) => WorkerActivity::Completed(
                reported(digest),
                Arc::new(EncodedResponse::new(&reapi::ExecuteResponse {
                    message: result.run.to_string(),
                    status: Some(proto::status(result.code, "")),
                    ..Default::default()
                })),
            ),
        };
        let said = WorkerReport {
            activity,
            prefer_being_idle: report.prefer_being_idle,
        };
        let waited = self.waiting(&key);
        let (wait, now) = (self.random.up_to(120_000), self.look());
        let caller = Caller {
            id,
            peer: format!("{worker}, life {life}").into(),
            call: Some(WorkerCall {
                session: (worker as u64) << 32 | u64::from(life),
                number,
            }),
        };
        let decided = self.queue.synchronize(now, &key, &caller, said, call, wait);
        match decided {
            Ok(SynchronizeAnswer::Now(instruction)) => {
                match &instruction.desired {
                    DesiredWorkerState::Execute { action: work, .. } => {
                        self.check_order(&waited, &key, work);
                        let first = waited.contains_key(&work.queued_timestamp.seconds);
                        self.see(if first {
                            "handed out"
                        } else {
                            "handed out again"
                        });
                    }
                    DesiredWorkerState::Idle if executes => self.see("told to stop"),
                    DesiredWorkerState::Idle | DesiredWorkerState::Unchanged => {}
                }
                if !ghost {
                    self.answer(worker, life, call, Some(instruction));
                }
            }
            Ok(SynchronizeAnswer::Held(_)) if unwilling => {
                self.fail("a call is held against its will")
            }
            Ok(SynchronizeAnswer::Held(held)) => {
                self.held.insert(call, (held, worker, life));
                if ghost {
                    self.broken.insert(call);
                    let notice = self.notice();
                    self.after(notice, Event::HungUp(call));
                }
            }
            Err(_) if ghost => {}
            Err(_) => {
                self.see("already synchronizing");
                self.answer(worker, life, call, None)
            }
        }
        self.perform();
    }

    /// How urgent the tasks are that wait here. Their time tells them apart.
    fn waiting(&self, key: &SizeClassQueueKey) -> BTreeMap<i64, i32> {
        let mut urgency = BTreeMap::new();
        for row in self.queue.operations(None) {
            if *row.key == *key && row.stage == Stage::Queued {
                let task = urgency
                    .entry(row.action.queued_timestamp.seconds)
                    .or_insert(i32::MAX);
                *task = row.priority.min(*task);
            }
        }
        urgency
    }

    fn check_order(
        &self,
        waited: &BTreeMap<i64, i32>,
        key: &SizeClassQueueKey,
        work: &QueuedAction,
    ) {
        let task = work.queued_timestamp.seconds;
        let Some(urgency) = waited.get(&task) else {
            return;
        };
        let whose = |row: &OperationRow| row.invocation.clone();
        let rows: Vec<OperationRow> = self.queue.operations(None).collect();
        let of = |task| {
            rows.iter()
                .filter(move |row| row.action.queued_timestamp.seconds == task)
                .map(whose)
                .collect::<BTreeSet<_>>()
        };
        let mine = of(task);
        let waits = self.waiting(key);
        if waits.iter().any(|(other, theirs)| {
            (*theirs, *other) < (*urgency, task) && mine.len() == 1 && of(*other) == mine
        }) {
            self.fail("a task was handed out before a more urgent one of its invocation");
        }
    }

    fn execute(&mut self, stream: u64, request: usize, ghost: bool) {
        let asked = &self.requests[request];
        let (digest, do_not_cache) = self.actions[asked.action];
        let action = reapi::Action {
            do_not_cache,
            ..Default::default()
        };
        let arrival = prost_types::Timestamp {
            seconds: self.last as i64,
            nanos: 0,
        };
        let client = asked.client.to_string();
        let queued = QueueRequest {
            resumes: false,
            platform: asked.platform.clone(),
            selector: Analyzer::Fallback.selector(MINUTE, None, SystemTime::UNIX_EPOCH),
            priority: asked.priority,
            invocation: InvocationKeys::new([InvocationKey::from_bytes(client.as_bytes())]),
            skip_cache_lookup: false,
            action: Arc::new(QueuedAction::new(
                asked.instance.clone(),
                digest,
                action,
                MINUTE,
                Vec::new(),
                arrival,
            )),
            name: Uuid::from_u64_pair(self.random.next(), self.random.next()),
        };
        let (name, asked_for) = (queued.name, queued.action.clone());
        let (watch, parked) = (
            self.number(),
            self.queue.counts().idle_synchronizing_workers,
        );
        let now = self.look();
        let attached = self.queue.execute(now, queued, watch);
        match attached {
            Ok(attached) => {
                let joined = !Arc::ptr_eq(&attached.action, &asked_for);
                if joined {
                    self.see(match attached.operation == name {
                        true => "joined a task",
                        false => "joined an operation",
                    });
                } else if matches!(attached.progress.stage, Stage::Completed(_)) {
                    self.see("claimed a result");
                } else if matches!(attached.progress.stage, Stage::Executing)
                    && self.queue.counts().idle_synchronizing_workers == parked
                {
                    self.see("adopted");
                }
                self.attach(
                    stream,
                    request,
                    attached.operation,
                    attached.watch,
                    attached.progress,
                )
            }
            Err(error) => {
                let why = Why::NoWorkers {
                    transient: match error {
                        ExecuteRefusal::NoWorkers(error) => error.transient,
                        ExecuteRefusal::QueueFull(_) => true,
                    },
                };
                self.refuse(stream, request, why);
            }
        }
        if ghost {
            self.broken.insert(stream);
            let notice = self.notice();
            self.after(notice, Event::Left(stream));
        }
        self.perform();
    }

    fn attach(
        &mut self,
        stream: u64,
        request: usize,
        operation: Uuid,
        watch: u64,
        progress: Progress,
    ) {
        self.streams.insert(
            stream,
            Stream {
                request,
                operation,
                watch,
                version: progress.version,
            },
        );
        self.update(stream, progress);
    }

    fn refuse(&mut self, stream: u64, request: usize, why: Why) {
        let delay = self.delay();
        self.after(
            delay,
            Event::Broken {
                stream,
                request,
                why,
            },
        );
    }

    /// All that the old one knew is gone, and whoever was connected to it notices.
    fn restart(&mut self) {
        self.generation += 1;
        self.queue = Queue::new(self.settings.clone(), self.now);
        self.clock = Clock::new(self.now);
        for (call, (_, worker, life)) in std::mem::take(&mut self.held) {
            if !self.broken.contains(&call) {
                let notice = self.notice();
                self.after(
                    notice,
                    Event::Answered {
                        worker,
                        life,
                        call,
                        instruction: None,
                    },
                );
            }
        }
        for (stream, gone) in std::mem::take(&mut self.streams) {
            if !self.broken.contains(&stream) {
                self.refuse(stream, gone.request, Why::Network);
            }
        }
    }

    // A worker.

    fn drive(&mut self, worker: usize) {
        loop {
            let now = self.now;
            let life = self.workers[worker].life;
            let Some(slot) = &mut self.workers[worker].slot else {
                return;
            };
            match slot.next(now) {
                SlotStep::Call(report) => {
                    let asks = report.activity == Activity::Idle && !report.prefer_being_idle;
                    if asks && now < self.workers[worker].paused {
                        self.fail("a paused slot asks for work");
                    }
                    let kept = self.workers[worker].kept;
                    let told = match &report.activity {
                        Activity::Completed(_, result) => Some(result.run),
                        _ => None,
                    };
                    if kept.is_some() && kept != told {
                        self.fail("a slot forgets a result");
                    }
                    let call = self.number();
                    self.workers[worker].call = Some(call);
                    let instance = match &report.activity {
                        Activity::Executing(_) | Activity::Completed(..) => {
                            self.workers[worker].instance.clone()
                        }
                        Activity::Idle | Activity::Started(_) => None,
                    };
                    self.send_call(worker, life, call, report, instance);
                }
                SlotStep::AbortCall => self.hang_up(worker),
                SlotStep::LeaveCall => self.workers[worker].call = None,
                SlotStep::Start(work) => self.start(worker, work),
                SlotStep::Cancel => {
                    let Some(running) = &mut self.workers[worker].running else {
                        self.fail("a slot cancels nothing");
                    };
                    running.cancelled = true;
                    let run = running.run;
                    let delay = self.random.up_to(5_000);
                    self.after(delay, Event::Finished { worker, life, run });
                }
                SlotStep::CheckReadiness => {
                    let ok = self.healed || self.random.chance(90);
                    let delay = self.random.up_to(50);
                    self.after(delay, Event::Ready { worker, life, ok });
                }
                SlotStep::Wait(until) => {
                    if until.is_some_and(|until| until <= now) {
                        self.fail("a slot waits for what has passed");
                    }
                    self.workers[worker].wake = until;
                    return;
                }
                SlotStep::Exit => {
                    if self.workers[worker].running.is_some() {
                        self.fail("a slot leaves while it runs something");
                    }
                    self.end(worker);
                    if !self.healed {
                        let delay = self.random.up_to(60_000);
                        self.after(delay, Event::Start(worker));
                    }
                    return;
                }
            }
        }
    }

    fn send_call(
        &mut self,
        worker: usize,
        life: u32,
        call: u64,
        report: SlotReport<RunResult>,
        instance: Option<InstanceName>,
    ) {
        let generation = self.generation;
        if self.lost() {
            let delay = self.notice();
            self.after(
                delay,
                Event::Answered {
                    worker,
                    life,
                    call,
                    instruction: None,
                },
            );
            return;
        }
        if !self.healed && self.random.chance(4) {
            let (delay, ghost) = (self.delay(), self.number());
            let report = SlotReport {
                activity: match &report.activity {
                    Activity::Idle => Activity::Idle,
                    Activity::Started(digest) => Activity::Started(digest.clone()),
                    Activity::Executing(digest) => Activity::Executing(digest.clone()),
                    Activity::Completed(digest, result) => {
                        Activity::Completed(digest.clone(), result.clone())
                    }
                },
                prefer_being_idle: report.prefer_being_idle,
            };
            self.after(
                delay,
                Event::Call {
                    generation,
                    worker,
                    call: ghost,
                    number: call,
                    report,
                    instance: instance.clone(),
                    ghost: true,
                },
            );
        }
        let delay = self.delay();
        self.after(
            delay,
            Event::Call {
                generation,
                worker,
                call,
                number: call,
                report,
                instance,
                ghost: false,
            },
        );
    }

    fn hang_up(&mut self, worker: usize) {
        if let Some(call) = self.workers[worker].call.take() {
            self.broken.insert(call);
            let notice = self.notice();
            self.after(notice, Event::HungUp(call));
        }
    }

    fn start(&mut self, worker: usize, work: Arc<QueuedAction>) {
        if self.workers[worker].running.is_some() {
            self.fail("a slot runs two actions at once");
        }
        let (run, life) = (self.number(), self.workers[worker].life);
        self.runs
            .insert(run, (work.digest, work.instance.clone(), None));
        self.workers[worker].instance = Some(work.instance.clone());
        self.workers[worker].running = Some(Running {
            run,
            cancelled: false,
        });
        let longest = if self.random.chance(70) {
            5_000
        } else {
            90_000
        };
        let duration = self.random.up_to(longest);
        self.after(duration, Event::Finished { worker, life, run });
    }

    fn end(&mut self, worker: usize) {
        self.hang_up(worker);
        let worker = &mut self.workers[worker];
        worker.slot = None;
        worker.running = None;
        worker.kept = None;
        worker.wake = None;
        worker.paused = self.start;
        worker.life += 1;
    }

    fn slot(
        &mut self,
        worker: usize,
        life: u32,
    ) -> Option<&mut Slot<Arc<QueuedAction>, RunResult>> {
        let worker = self.workers.get_mut(worker)?;
        (worker.life == life).then_some(worker.slot.as_mut()?)
    }

    // A client.

    fn ask(&mut self, request: usize) {
        let stream = self.number();
        let generation = self.generation;
        self.requests[request].state = State::Asking(stream);
        if self.lost() {
            let notice = self.notice();
            let why = Why::Network;
            self.after(
                notice,
                Event::Broken {
                    stream,
                    request,
                    why,
                },
            );
            return;
        }
        let delay = self.delay();
        match self.requests[request].name {
            Some(name) => self.after(
                delay,
                Event::Wait {
                    generation,
                    stream,
                    request,
                    name,
                },
            ),
            None => {
                if !self.healed && self.random.chance(4) {
                    let (delay, ghost) = (self.delay(), self.number());
                    self.after(
                        delay,
                        Event::Execute {
                            generation,
                            stream: ghost,
                            request,
                            ghost: true,
                        },
                    );
                }
                self.after(
                    delay,
                    Event::Execute {
                        generation,
                        stream,
                        request,
                        ghost: false,
                    },
                );
            }
        }
    }

    fn updated(&mut self, request: usize, name: Uuid, stage: Stage) {
        self.requests[request].name = Some(name);
        let Stage::Completed(outcome) = stage else {
            return;
        };
        let response = reapi::ExecuteResponse::decode(&*outcome.response).unwrap();
        let status = response.status.unwrap_or_default();
        let code = rpc::Code::try_from(status.code).unwrap();
        let text = status.message;
        let (digest, _) = self.actions[self.requests[request].action];
        if let Ok(run) = response.message.parse::<u64>() {
            let instance = &self.requests[request].instance;
            match self.runs.get(&run) {
                Some((_, whose, _)) if whose != instance => {
                    self.fail("a client gets the result of another instance")
                }
                Some((action, _, Some(ended))) if *action == digest && *ended == code => {}
                Some(_) => self.fail("a client gets the result of something else"),
                None => self.fail("a client gets a result that nobody produced"),
            }
            self.see("result");
            self.requests[request].state = State::Ended;
            return;
        }
        self.see(match code {
            rpc::Code::Unavailable if text.contains("disappeared while task was executing") => {
                "worker disappeared"
            }
            rpc::Code::Unavailable if text.contains("disappeared while task was queued") => {
                "queue disappeared"
            }
            rpc::Code::Internal if text.contains("may crash the worker") => "blamed",
            _ => self.fail(format!("a client gets {code:?} {text:?}")),
        });
        // As clients do with what is the farm's fault.
        self.requests[request].name = None;
        self.requests[request].state = State::Waiting;
        let pause = self.random.up_to(2_000);
        self.after(pause, Event::Ask(request));
    }

    fn broken(&mut self, request: usize, why: Why) {
        let end = matches!(why, Why::NoWorkers { transient: false });
        self.see(match why {
            Why::Network => "stream broken",
            Why::NotFound => "operation not found",
            Why::NoWorkers { transient: true } => "no workers yet",
            Why::NoWorkers { transient: false } => "no workers",
        });
        if end || why == Why::NotFound || self.random.chance(30) {
            self.requests[request].name = None;
        }
        self.requests[request].state = if end { State::Ended } else { State::Waiting };
        if !end {
            let pause = self.random.up_to(match why {
                Why::NoWorkers { .. } => 60_000,
                _ => 1_000,
            });
            self.after(pause, Event::Ask(request));
        }
    }

    // The loop.

    /// One event; `false` when there is none before `end`.
    fn step(&mut self, end: Instant) -> bool {
        let event = self.events.first_key_value().map(|((at, _), _)| *at);
        // After a pause it is the first to see what is due.
        let resume = self.paused;
        let expiry = self.queue.poll_timeout().map(|at| self.clock.real(at));
        let expiry = resume.or(expiry);
        let wake = self.workers.iter().filter_map(|w| w.wake).min();
        let Some(next) = [event, expiry, wake].into_iter().flatten().min() else {
            return false;
        };
        if next > end {
            self.tick(end);
            self.now = end;
            return false;
        }
        self.tick(next);
        self.now = self.now.max(next);
        self.steps += 1;
        self.mix((self.now - self.start).as_nanos() as u64);
        if event == Some(next) {
            if let Some((_, event)) = self.events.pop_first() {
                self.handle(event);
            }
        } else if expiry == Some(next) {
            self.paused = None;
            self.mix(1);
            let now = self.look();
            self.queue.expire(now);
            self.perform();
        } else {
            self.mix(2);
            for worker in 0..self.workers.len() {
                if self.workers[worker].wake == wake {
                    self.workers[worker].wake = None;
                    self.drive(worker);
                }
            }
        }
        let counts = self.queue.counts();
        self.mix((counts.operations << 20 | counts.tasks << 10 | counts.queued) as u64);
        self.mix((counts.workers << 10 | counts.idle_synchronizing_workers) as u64);
        true
    }

    /// What the shell does every `TICK`, unless it stands still; nothing is due before `next`.
    fn tick(&mut self, next: Instant) {
        if self.paused.is_some() {
            return;
        }
        let mut at = self.now;
        while at + TICK < next {
            at += TICK;
            self.clock.look(at);
        }
    }

    /// The scheduler's time.
    fn look(&mut self) -> Instant {
        let (now, pause) = self.clock.look(self.now);
        if pause.is_some() {
            self.see("stood still");
        }
        now
    }

    fn handle(&mut self, event: Event) {
        // What is said to a scheduler that stands still is read when it goes on.
        if let Some(end) = self.paused
            && matches!(
                event,
                Event::Call { .. }
                    | Event::HungUp(_)
                    | Event::Execute { .. }
                    | Event::Wait { .. }
                    | Event::Left(_)
                    | Event::StandStill(_)
            )
        {
            let read = end.saturating_duration_since(self.now) + self.random.up_to(200);
            self.after(read, event);
            return;
        }
        match event {
            Event::StandStill(pause) => {
                self.mix(170);
                self.paused = Some(self.now + pause);
            }
            Event::Call {
                generation,
                worker,
                call,
                number,
                report,
                instance,
                ghost,
            } => {
                self.mix(10 + call);
                // An earlier scheduler's connection.
                let life = self.workers[worker].life;
                let ghost = ghost || self.broken.contains(&call);
                if generation == self.generation {
                    self.call(worker, life, (call, number), report, instance, ghost);
                } else if !ghost {
                    self.answer(worker, life, call, None);
                }
            }
            Event::HungUp(call) => {
                self.mix(20 + call);
                if let Some((held, ..)) = self.held.remove(&call) {
                    let before = self.queue.counts();
                    let now = self.look();
                    self.queue.drop_call(now, held);
                    let after = self.queue.counts();
                    if (before.idle_synchronizing_workers, before.queued)
                        != (after.idle_synchronizing_workers, after.queued)
                    {
                        let again =
                            after.idle_synchronizing_workers >= before.idle_synchronizing_workers;
                        self.see(if again { "given back" } else { "hung up" });
                    }
                    self.perform();
                }
            }
            Event::Execute {
                generation,
                stream,
                request,
                ghost,
            } => {
                self.mix(30 + stream);
                let ghost = ghost || self.broken.contains(&stream);
                if generation == self.generation {
                    self.execute(stream, request, ghost);
                } else if !ghost {
                    self.refuse(stream, request, Why::Network);
                }
            }
            Event::Wait {
                generation,
                stream,
                request,
                name,
            } => {
                self.mix(40 + stream);
                if generation != self.generation {
                    self.refuse(stream, request, Why::Network);
                } else if let Some(attached) = self.queue.wait(name) {
                    let (watch, progress) = (attached.watch, attached.progress);
                    self.attach(stream, request, name, watch, progress);
                    if self.broken.contains(&stream) {
                        let notice = self.notice();
                        self.after(notice, Event::Left(stream));
                    }
                } else {
                    self.refuse(stream, request, Why::NotFound);
                }
                self.perform();
            }
            Event::Left(stream) => {
                self.mix(50 + stream);
                if let Some(stream) = self.streams.remove(&stream) {
                    let now = self.look();
                    self.queue.detach(now, stream.operation);
                    self.perform();
                }
            }
            Event::Restart => {
                if !self.healed {
                    self.mix(60);
                    self.paused = None;
                    self.see("scheduler restarted");
                    self.restart();
                }
            }
            Event::Answered {
                worker,
                life,
                call,
                instruction,
            } => {
                self.mix(70 + call);
                let (now, random) = (self.now, self.random.next());
                if self.workers[worker].call != Some(call) {
                    return;
                }
                let Some(slot) = self.slot(worker, life) else {
                    return;
                };
                let drops = instruction.as_ref().is_some_and(|instruction| {
                    instruction.desired != DesiredWorkerState::Unchanged
                });
                match instruction {
                    None => slot.failed(now, random),
                    Some(instruction) => slot.answered(
                        now,
                        Answer {
                            due: now + instruction.next,
                            desired: match instruction.desired {
                                DesiredWorkerState::Unchanged => Desired::Unchanged,
                                DesiredWorkerState::Idle => Desired::Idle,
                                DesiredWorkerState::Execute { action: work, .. } => {
                                    Desired::Executing(work.digest.to_proto(), work)
                                }
                            },
                        },
                    ),
                }
                if drops {
                    self.workers[worker].kept = None;
                }
                // A call that fails may yet be held at the other end.
                if let Some(call) = self.workers[worker].call.take() {
                    self.broken.insert(call);
                    let notice = self.notice();
                    self.after(notice, Event::HungUp(call));
                }
                self.drive(worker);
            }
            Event::Finished { worker, life, run } => self.finished(worker, life, run),
            Event::Ready { worker, life, ok } => {
                self.mix(90 + worker as u64);
                let (now, pause) = (self.now, self.random.up_to(5_000));
                if let Some(slot) = self.slot(worker, life) {
                    slot.readiness(now, ok, pause);
                    self.drive(worker);
                }
            }
            Event::Crash(worker) => {
                self.mix(100 + worker as u64);
                if self.workers[worker].slot.is_some() && !self.healed {
                    self.end(worker);
                    let delay = self.random.up_to(100_000);
                    self.after(delay, Event::Start(worker));
                }
            }
            Event::Stop(worker) => {
                self.mix(110 + worker as u64);
                let (now, drain) = (self.now, self.random.up_to(60_000));
                if let Some(slot) = &mut self.workers[worker].slot {
                    slot.stop(now + drain);
                    self.drive(worker);
                }
            }
            Event::Pause(worker) => {
                self.mix(130 + worker as u64);
                let until = self.now + self.random.up_to(60_000);
                if let Some(slot) = &mut self.workers[worker].slot {
                    slot.pause(until);
                    let paused = &mut self.workers[worker].paused;
                    *paused = until.max(*paused);
                    self.see("paused");
                    self.drive(worker);
                }
            }
            Event::Start(worker) => {
                self.mix(120 + worker as u64);
                if self.workers[worker].slot.is_none() && !self.closing {
                    self.workers[worker].slot = Some(Slot::new(self.now));
                    self.drive(worker);
                }
            }
            Event::Update {
                stream,
                request,
                name,
                stage,
            } => {
                self.mix(130 + stream);
                if self.requests[request].state == State::Asking(stream) {
                    self.updated(request, name, stage);
                }
            }
            Event::Broken {
                stream,
                request,
                why,
            } => {
                self.mix(140 + stream);
                if self.requests[request].state == State::Asking(stream) {
                    self.broken(request, why);
                }
            }
            Event::Ask(request) => {
                self.mix(150 + request as u64);
                if self.requests[request].state == State::Waiting {
                    self.ask(request);
                }
            }
            Event::Abandon(request) => {
                self.mix(160 + request as u64);
                if let State::Asking(stream) = self.requests[request].state {
                    self.break_stream(stream, request);
                }
                self.requests[request].state = State::Ended;
            }
        }
    }

    fn finished(&mut self, worker: usize, life: u32, run: u64) {
        self.mix(80 + run);
        let now = self.now;
        let this = &mut self.workers[worker];
        let Some(running) = this
            .running
            .take_if(|running| this.life == life && running.run == run)
        else {
            return;
        };
        let code = match running.cancelled {
            true => rpc::Code::Cancelled,
            false if self.random.chance(90) => rpc::Code::Ok,
            false => rpc::Code::DeadlineExceeded,
        };
        if let Some((.., ended)) = self.runs.get_mut(&run) {
            *ended = Some(code);
        }
        if !running.cancelled {
            self.workers[worker].kept = Some(run);
        }
        if let Some(slot) = &mut self.workers[worker].slot {
            let healthy = code == rpc::Code::Ok;
            slot.finished(now, RunResult { run, code }, healthy);
            self.drive(worker);
        }
    }

    /// The whole story; returns the hash of all that happened.
    fn run(mut self) -> Told {
        let trouble = self.start + self.trouble;
        while self.step(trouble) {}
        self.tick(trouble);
        self.now = trouble;
        self.healed = true;
        for worker in 0..self.workers.len() {
            self.after(MILLISECOND, Event::Start(worker));
        }
        let patience = trouble + 60 * MINUTE;
        while self.requests.iter().any(|r| r.state != State::Ended) {
            if !self.step(patience) {
                self.fail("a client waits for ever");
            }
        }
        self.closing = true;
        for worker in 0..self.workers.len() {
            self.after(MINUTE, Event::Stop(worker));
        }
        let quiet = self.now + 60 * MINUTE;
        while self.step(quiet) {}
        if self.workers.iter().any(|worker| worker.slot.is_some()) {
            self.fail("a worker does not leave");
        }
        let counts = self.queue.counts();
        if counts != Counts::default() || !self.held.is_empty() || !self.streams.is_empty() {
            self.fail(format!("something remains: {counts:?}"));
        }
        Told {
            trace: self.trace,
            steps: self.steps,
            seen: self.seen,
        }
    }
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

#[test]
fn a_farm_keeps_its_promises_whatever_the_network_does() {
    let start = Instant::now();
    if let Some(seed) = number("BB_SIMULATION_SEED") {
        println!("seed {seed}: {:?}", World::new(seed, start).run());
        return;
    }
    let seeds = number("BB_SIMULATION_SEEDS").unwrap_or(10_000);
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
            "claimed a result",
            "given back",
            "handed out",
            "handed out again",
            "hung up",
            "joined a task",
            "joined an operation",
            "no workers",
            "no workers yet",
            "operation not found",
            "result",
            "scheduler restarted",
            "stood still",
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
    assert!(seen_without_harm(World::calm, "stood still") > 0);
}

#[test]
fn two_hosts_of_one_name_never_run_what_the_other_one_runs() {
    assert!(seen_without_harm(World::twins, "already synchronizing") > 0);
}

/// How often `what` happened in all seeds, in none of which an action came to harm.
fn seen_without_harm(make: fn(u64, Instant) -> World, what: &str) -> u64 {
    let mut count = 0;
    for seed in 0..number("BB_SIMULATION_SEEDS").unwrap_or(1_000) {
        let told = make(seed, Instant::now()).run();
        count += told.seen.get(what).copied().unwrap_or(0);
        for harm in ["worker disappeared", "blamed", "handed out again"] {
            assert!(!told.seen.contains_key(harm), "seed {seed}: {harm}");
        }
    }
    count
}

#[test]
fn a_seed_tells_the_same_story_each_time() {
    for seed in 0..100 {
        let once = World::new(seed, Instant::now()).run();
        let again = World::new(seed, Instant::now()).run();
        assert_eq!(once, again, "seed {seed}");
    }
}
