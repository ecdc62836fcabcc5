//! The scheduler's end: calls and streams arrive, and what the queue decides goes out.

use super::*;

/// Which run produced it; none did where the scheduler says so itself.
pub fn run_of(outcome: &EncodedResponse) -> Option<u64> {
    let response = reapi::ExecuteResponse::decode(&*outcome.response).ok()?;
    response.message.parse().ok()
}

impl World {
    /// After each verb.
    pub fn perform(&mut self) {
        for effect in self.queue.effects() {
            self.tell(&effect);
            match effect {
                Effect::Answer { call, instruction } => {
                    self.note_attempt(&instruction);
                    let Some(&(_, worker, life)) = self.held.get(&call) else {
                        self.fail("a call is answered that is not held");
                    };
                    self.see("woken");
                    let works = matches!(instruction.desired, DesiredWorkerState::Execute { .. });
                    if works && self.drained.contains(&worker) {
                        self.fail("a drained worker is woken for something new");
                    }
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
                Effect::Learned(_) | Effect::Abandoned { .. } => {}
                Effect::KeepDrains { drains, .. } => self.settings.drains = drains,
                Effect::Tell { watch, progress } => {
                    if let Stage::Completed(outcome) = &progress.stage {
                        self.check_attempt(outcome);
                    }
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

    /// What is handed out takes the place of all that was handed out before for its operation.
    fn note_attempt(&mut self, instruction: &Instruction) {
        if let DesiredWorkerState::Execute { attempt, .. } = &instruction.desired {
            let attempts = self.handed_out.entry(attempt.operation).or_default();
            attempts.push(attempt.number);
        }
    }

    /// Workers that say which attempt they report are believed of the present one only.
    fn check_attempt(&self, outcome: &EncodedResponse) {
        let Some(run) = run_of(outcome).and_then(|run| self.runs.get(&run)) else {
            return;
        };
        let says = !self.workers[0].foreign;
        let attempts = self.handed_out.get(&run.attempt.operation);
        let lost = attempts
            .and_then(|attempts| attempts.split_last())
            .is_some_and(|(_, lost)| lost.contains(&run.attempt.number));
        if says && lost {
            self.fail("a task ends with what a lost attempt brought");
        }
    }

    pub fn update(&mut self, number: u64, progress: Progress) {
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

    pub fn break_stream(&mut self, stream: u64, request: usize) {
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

    pub fn answer(
        &mut self,
        worker: usize,
        life: u32,
        call: u64,
        instruction: Option<Instruction>,
    ) {
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

    pub fn call(
        &mut self,
        worker: usize,
        life: u32,
        (call, number): (u64, u64),
        report: SlotReport<RunResult>,
        started: Option<Started>,
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
            instance: started.as_ref().map(|started| started.instance.clone()),
            attempt: started.as_ref().map(|started| started.attempt),
        };
        if let Activity::Completed(_, result) = &report.activity
            && let Some(run) = self.runs.get_mut(&result.run)
        {
            run.reported = Some(self.now);
        }
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
        let waited = self.waiting(&key, worker);
        let (wait, now) = (self.random.up_to(120_000), self.look());
        let caller = WorkerCaller {
            id,
            peer: format!("{worker}, life {life}").into(),
            call: (!self.workers[worker].foreign).then_some(WorkerCall {
                session: (worker as u64) << 32 | u64::from(life),
                number,
                // Every other one proves that the one before it is gone.
                token: worker.is_multiple_of(2).then_some(FencingToken {
                    directory: worker as u64,
                    start: u64::from(life),
                }),
            }),
        };
        let decided = self.queue.synchronize(now, &key, &caller, said, call, wait);
        self.tell(&decided);
        match decided {
            Ok(SynchronizeAnswer::Now(instruction)) => {
                self.note_attempt(&instruction);
                match &instruction.desired {
                    DesiredWorkerState::Execute { action: work, .. } => {
                        let rest = self.waiting(&key, worker);
                        self.check_order(&waited, &rest, work);
                        let first = waited.has(work);
                        if first && (unwilling || self.drained.contains(&worker)) {
                            self.fail("a worker that takes none is handed new work");
                        }
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

    /// With the name of an operation that a scheduler before this one had, it is taken up again.
    pub fn execute(&mut self, stream: u64, request: usize, resumed: Option<Uuid>, ghost: bool) {
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
        // Half of all farms know a client's builds apart.
        let (client, build) = (asked.client.to_string(), (request % 3).to_string());
        let levels = 1 + (self.seed % 2) as usize;
        let queued = QueueRequest {
            resumes: resumed.is_some(),
            platform: asked.platform.clone(),
            selector: Analyzer::Fallback.selector(MINUTE, None, SystemTime::UNIX_EPOCH),
            priority: asked.priority,
            invocation: InvocationKeys::new(
                [&client, &build][..levels]
                    .iter()
                    .map(|key| InvocationKey::from_bytes(key.as_bytes())),
            ),
            skip_cache_lookup: asked.skip_cache_lookup,
            action: Arc::new(QueuedAction::new(
                asked.instance.clone(),
                digest,
                action,
                MINUTE,
                Vec::new(),
                arrival,
                None,
            )),
            name: resumed.unwrap_or(Uuid::from_u64_pair(self.random.next(), self.random.next())),
        };
        let (name, asked_for) = (queued.name, queued.action.clone());
        let takes_no_other = queued.skip_cache_lookup && !queued.resumes;
        let (watch, parked) = (
            self.number(),
            self.queue.counts().idle_synchronizing_workers,
        );
        let now = self.look();
        let attached = self.queue.execute(now, queued, watch);
        self.tell(&attached);
        match attached {
            Ok(attached) => {
                if attached.operation == name {
                    self.starts.entry(name).or_default().0 += 1;
                }
                let joined = !Arc::ptr_eq(&attached.action, &asked_for);
                if joined {
                    self.see(match attached.operation == name {
                        true => "joined a task",
                        false => "joined an operation",
                    });
                } else if matches!(attached.progress.stage, Stage::Completed(_)) {
                    if takes_no_other {
                        self.fail("a result from before it asked is given to who wants none");
                    }
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
                let why = match error {
                    ExecuteRefusal::NoWorkers(error) => Why::NoWorkers {
                        transient: error.transient,
                    },
                    ExecuteRefusal::QueueFull(_) => Why::Full,
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

    pub fn attach(
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

    pub fn refuse(&mut self, stream: u64, request: usize, why: Why) {
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
    pub fn restart(&mut self) {
        self.generation += 1;
        self.handed_out.clear();
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
}
