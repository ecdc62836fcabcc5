//! The world of one seed: what there is, and what is going to happen.

use super::*;

pub const MILLISECOND: Duration = Duration::from_millis(1);
/// Of a platform queue that is predeclared.
pub const SIZE_CLASSES: [u32; 2] = [1, 4];
pub const MINUTE: Duration = Duration::from_secs(60);

#[derive(Clone, Debug, PartialEq)]
pub struct RunResult {
    pub run: u64,
    pub code: rpc::Code,
}

#[derive(Debug)]
pub enum Event {
    // At the scheduler.
    Call {
        generation: u32,
        worker: usize,
        call: u64,
        /// That of the call which this is, or is a duplicate of.
        number: u64,
        report: SlotReport<RunResult>,
        /// What is said of the reported action.
        started: Option<Started>,
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
    /// Its client has ended it by itself, and not come back.
    GiveUp {
        generation: u32,
        operation: Uuid,
    },
    Cancel(usize),
    /// An operator ends what a request waits for.
    Kill(usize),
    /// A worker gets no new work, or does again.
    Drain {
        worker: usize,
        drained: bool,
    },
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

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    Network,
    NotFound,
    Full,
    NoWorkers { transient: bool },
}

/// What a worker knows of what it started.
#[derive(Clone, Debug)]
pub struct Started {
    pub instance: InstanceName,
    pub attempt: Attempt,
}

/// What a slot is told to do.
#[derive(Clone, Debug)]
pub struct Work {
    pub action: Arc<QueuedAction>,
    pub attempt: Attempt,
}

pub struct Worker {
    /// Buildbarn's: it numbers no calls, and says nothing of what it started. They come once, and in
    /// order, as nothing else tells them apart.
    pub foreign: bool,
    /// When its last call arrives.
    pub arrival: Instant,
    pub key: SizeClassQueueKey,
    pub id: WorkerId,
    pub life: u32,
    pub slot: Option<Slot<Work, RunResult>>,
    pub call: Option<u64>,
    pub running: Option<Running>,
    /// Of what was started last.
    pub started: Option<Started>,
    /// A result that no scheduler has answered for.
    pub kept: Option<u64>,
    pub wake: Option<Instant>,
    /// It must not ask for work before.
    pub paused: Instant,
}

pub struct Running {
    pub run: u64,
    pub cancelled: bool,
}

/// One execution at a worker.
pub struct Run {
    pub action: Digest,
    /// Whose blobs it worked with.
    pub instance: InstanceName,
    /// Of the worker.
    pub size_class: u32,
    pub attempt: Attempt,
    pub ended: Option<rpc::Code>,
    /// When a scheduler heard of its end last.
    pub reported: Option<Instant>,
}

pub struct Request {
    pub client: usize,
    pub action: usize,
    pub instance: InstanceName,
    pub platform: Platform,
    pub priority: i32,
    pub skip_cache_lookup: bool,
    /// When it was asked for first.
    pub asked: Option<Instant>,
    pub cancelled: bool,
    pub state: State,
    pub name: Option<Uuid>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum State {
    Waiting,
    Asking(u64),
    Ended,
}

pub struct Stream {
    pub request: usize,
    pub operation: Uuid,
    pub watch: u64,
    pub version: u64,
}

/// What happened with a seed.
#[derive(Debug, PartialEq)]
pub struct Told {
    pub trace: u64,
    pub steps: u64,
    pub seen: BTreeMap<&'static str, u64>,
}

pub struct World {
    pub seed: u64,
    /// Prints what happens.
    pub tells: bool,
    pub trouble: Duration,
    pub random: Random,
    pub start: Instant,
    pub now: Instant,
    pub healed: bool,
    /// All clients are content.
    pub closing: bool,
    pub events: BTreeMap<(Instant, u64), Event>,
    pub last: u64,
    pub trace: u64,
    pub steps: u64,
    /// How often what we are here for happened.
    pub seen: BTreeMap<&'static str, u64>,

    pub settings: Settings,
    pub generation: u32,
    pub queue: Queue<u64, u64>,
    pub clock: Clock,
    /// The scheduler stands still, until then.
    pub paused: Option<Instant>,
    /// By call; with the worker and its life, unless it is a ghost.
    pub held: BTreeMap<u64, (HeldCall, usize, u32)>,
    pub streams: BTreeMap<u64, Stream>,
    /// Calls and streams whose other end is gone.
    pub broken: BTreeSet<u64>,

    pub workers: Vec<Worker>,
    pub requests: Vec<Request>,
    pub actions: Vec<(Digest, bool)>,
    pub runs: BTreeMap<u64, Run>,
    /// The attempts of each operation that this scheduler handed out.
    pub handed_out: BTreeMap<Uuid, Vec<u64>>,
    /// How often operations came into being, and how often slots started what was handed out for them.
    pub starts: BTreeMap<Uuid, (u32, u32)>,
    pub drained: BTreeSet<usize>,
    pub killed: BTreeSet<Digest>,
}

pub fn platform(properties: &[(&str, &str)]) -> Platform {
    Platform::from(
        &properties
            .iter()
            .map(|(name, value)| (name.to_string(), value.to_string()))
            .collect::<BTreeMap<_, _>>(),
    )
}

/// Where a worker takes its work from. Of sized platform queues, each size class has one.
fn worker_key(
    random: &mut Random,
    sized: bool,
    platforms: &[Platform],
    prefixes: [InstanceName; 2],
    number: u64,
) -> SizeClassQueueKey {
    let platform = usize::from(!random.chance(80));
    let prefix = usize::from(!random.chance(70));
    let classes = SIZE_CLASSES.len() as u64;
    let size_class = SIZE_CLASSES[(number % classes) as usize];
    let is_sized = sized && (number < classes || (platform, prefix) == (0, 0));
    let (platform, prefix) = if is_sized { (0, 0) } else { (platform, prefix) };
    SizeClassQueueKey {
        platform: platforms[platform].clone(),
        prefix: prefixes[prefix].clone(),
        size_class: if is_sized { size_class } else { 0 },
    }
}

impl World {
    pub fn new(seed: u64, start: Instant) -> Self {
        let mut world = World::empty(seed, start);
        world.plan();
        world
    }

    /// Each worker has a twin of the same name.
    pub fn twins(seed: u64, start: Instant) -> Self {
        let mut world = World::calm(seed, start);
        for worker in 0..world.workers.len() {
            // Two of Buildbarn's that execute one digest for two instances say too little to be told apart.
            world.workers[worker].foreign = false;
            let twin = Worker {
                foreign: false,
                arrival: start,
                key: world.workers[worker].key.clone(),
                id: world.workers[worker].id.clone(),
                life: 0,
                slot: None,
                call: None,
                running: None,
                started: None,
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
    pub fn calm(seed: u64, start: Instant) -> Self {
        let mut world = World::empty(seed, start);
        world.healed = true;
        world.plan();
        world
    }

    pub fn empty(seed: u64, start: Instant) -> Self {
        let mut random = Random(seed);
        let mut limits = QueueLimits::default();
        if random.chance(10) {
            limits.queued_operations = 3;
        }
        let sized = random.chance(30);
        let buildbarn = random.chance(20);
        let settings = Settings {
            limits,
            first_attempt: random.next(),
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
        let predeclared = PredeclaredQueue {
            prefix: name(""),
            platform: platforms[0].clone(),
            size_classes: SIZE_CLASSES.to_vec(),
            stickiness_limits: Vec::new(),
            maximum_queued_background_learning_operations: 0,
            background_learning_operation_priority: 0,
        };
        let settings = Settings {
            predeclared_queues: if sized { vec![predeclared] } else { Vec::new() },
            ..settings
        };
        // Small worlds find most; large ones have crowds.
        let large = random.chance(10);
        let (few, many) = match large {
            true if random.chance(4) => (random.below(150) + 50, random.below(300) + 100),
            true => (random.below(6) + 2, random.below(60) + 20),
            false => (random.below(3) + 1, random.below(12) + 3),
        };
        // What fails on a smaller size class needs a worker of the largest.
        let fewest = if sized { SIZE_CLASSES.len() as u64 } else { 1 };
        let workers = (0..(few + random.below(2)).max(fewest))
            .map(|i| Worker {
                foreign: buildbarn,
                arrival: start,
                key: worker_key(
                    &mut random,
                    sized,
                    &platforms[..2],
                    [name(""), name("a")],
                    i,
                ),
                id: WorkerId::new(BTreeMap::from([("thread".to_owned(), i.to_string())])),
                life: 0,
                slot: None,
                call: None,
                running: None,
                started: None,
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
                skip_cache_lookup: random.chance(20),
                asked: None,
                cancelled: false,
                state: State::Waiting,
                name: None,
            })
            .collect();
        World {
            seed,
            tells: false,
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
            handed_out: BTreeMap::new(),
            starts: BTreeMap::new(),
            drained: BTreeSet::new(),
            killed: BTreeSet::new(),
        }
    }

    /// When who comes, and what goes wrong.
    pub fn plan(&mut self) {
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
            if !self.healed && self.random.chance(5) {
                let later = self.random.up_to(60_000);
                self.after(at + later, Event::Cancel(request));
            }
            if !self.healed && self.random.chance(3) {
                let later = self.random.up_to(60_000);
                self.after(at + later, Event::Kill(request));
            }
        }
        if self.random.chance(30) {
            let at = self.random.up_to(trouble);
            self.after(at, Event::Restart);
        }
        if wrong > 0 {
            for worker in 0..self.workers.len() {
                if self.random.chance(20) {
                    let at = self.random.up_to(trouble);
                    let until = at + self.random.up_to(120_000);
                    for (at, drained) in [(at, true), (until, false)] {
                        self.after(at, Event::Drain { worker, drained });
                    }
                }
            }
        }
    }

    pub fn number(&mut self) -> u64 {
        self.last += 1;
        self.last
    }

    pub fn after(&mut self, delay: Duration, event: Event) {
        let number = self.number();
        self.events.insert((self.now + delay, number), event);
    }

    pub fn fail(&self, what: impl std::fmt::Display) -> ! {
        panic!(
            "seed {} at {:?}, step {}: {what}\nreplay with BB_SIMULATION_SEED={}",
            self.seed,
            self.now - self.start,
            self.steps,
            self.seed
        );
    }

    pub fn see(&mut self, what: &'static str) {
        self.tell(&what);
        *self.seen.entry(what).or_default() += 1;
    }

    pub fn tell(&self, what: &dyn std::fmt::Debug) {
        if self.tells {
            println!("{:?} {what:?}", self.now - self.start);
        }
    }

    pub fn mix(&mut self, word: u64) {
        self.trace = (self.trace ^ word).wrapping_mul(0x0100_0000_01b3);
    }
}
