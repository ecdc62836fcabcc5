//! One event after the other.

use super::*;

impl World {
    /// One event; `false` when there is none before `end`.
    pub fn step(&mut self, end: Instant) -> bool {
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

    fn drain(&mut self, worker: usize, drained: bool) {
        if !drained && !self.drained.contains(&worker) {
            return;
        }
        let this = &self.workers[worker];
        let (key, pattern) = (
            this.key.clone(),
            WorkerPattern::new(this.id.labels().clone()),
        );
        let now = self.look();
        let done = match drained {
            true => {
                let drain = Drain {
                    key: key.clone(),
                    pattern,
                    created: prost_types::Timestamp::default(),
                };
                self.queue.add_drain(drain).is_ok()
            }
            false => self.queue.remove_drain(&key, &pattern).is_ok(),
        };
        let after = self.queue.apply_drains(now, &key, None);
        assert_eq!(after, None, "more workers than are looked at at once");
        match (done, drained) {
            (true, true) => {
                self.see("drained");
                self.drained.insert(worker);
            }
            _ => {
                self.drained.remove(&worker);
            }
        }
        self.perform();
    }

    /// What the shell does every `TICK`, unless it stands still; nothing is due before `next`.
    pub fn tick(&mut self, next: Instant) {
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
    pub fn look(&mut self) -> Instant {
        let (now, pause) = self.clock.look(self.now);
        if pause.is_some() {
            self.see("stood still");
        }
        now
    }

    pub fn handle(&mut self, event: Event) {
        // What is said to a scheduler that stands still is read when it goes on.
        if let Some(end) = self.paused
            && matches!(
                event,
                Event::Call { .. }
                    | Event::HungUp(_)
                    | Event::Execute { .. }
                    | Event::Wait { .. }
                    | Event::Left(_)
                    | Event::GiveUp { .. }
                    | Event::StandStill(_)
                    | Event::Cancel(_)
                    | Event::Kill(_)
                    | Event::Drain { .. }
            )
        {
            let mut read = end.saturating_duration_since(self.now) + self.random.up_to(200);
            if let Event::Call { worker, .. } = &event {
                read = self.in_order(*worker, read);
            }
            self.after(read, event);
            return;
        }
        self.tell(&event);
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
                started,
                ghost,
            } => {
                self.mix(10 + call);
                // An earlier scheduler's connection.
                let life = self.workers[worker].life;
                let ghost = ghost || self.broken.contains(&call);
                if generation == self.generation {
                    self.call(worker, life, (call, number), report, started, ghost);
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
                    self.execute(stream, request, None, ghost);
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
                } else if self.random.chance(80) {
                    self.see("taken up by name");
                    let ghost = self.broken.contains(&stream);
                    self.execute(stream, request, Some(name), ghost);
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
                    if self.random.chance(25) {
                        let generation = self.generation;
                        let operation = stream.operation;
                        let event = Event::GiveUp {
                            generation,
                            operation,
                        };
                        self.after(Duration::from_secs(2), event);
                    }
                }
            }
            Event::GiveUp {
                generation,
                operation,
            } => {
                if generation == self.generation {
                    self.see("given up");
                    let now = self.look();
                    self.queue.give_up(now, operation);
                    self.perform();
                }
            }
            Event::Cancel(request) => {
                self.mix(180 + request as u64);
                self.cancel(request);
            }
            Event::Kill(request) => {
                self.mix(200 + request as u64);
                self.kill(request);
            }
            Event::Drain { worker, drained } => {
                self.mix(190 + worker as u64);
                self.drain(worker, drained && !self.healed);
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
                                DesiredWorkerState::Execute {
                                    action, attempt, ..
                                } => Desired::Executing(
                                    action.digest.to_proto(),
                                    Work { action, attempt },
                                ),
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

    fn explain_waiting(&self) -> Vec<String> {
        let waiting = self.requests.iter().filter(|r| r.state != State::Ended);
        let names = waiting.map(|request| request.name);
        let why = names.map(|name| self.queue.explain(self.now, name?));
        why.map(|why| why.map_or("unknown".to_owned(), |why| why.to_string()))
            .collect()
    }

    /// All of it; returns the hash of all that happened.
    pub fn run(mut self) -> Told {
        let trouble = self.start + self.trouble;
        while self.step(trouble) {}
        self.tick(trouble);
        self.now = trouble;
        self.healed = true;
        for worker in self.drained.clone() {
            self.drain(worker, false);
        }
        for worker in 0..self.workers.len() {
            self.after(MILLISECOND, Event::Start(worker));
        }
        let patience = trouble + 60 * MINUTE;
        while self.requests.iter().any(|r| r.state != State::Ended) {
            if !self.step(patience) {
                self.fail(format!(
                    "a client waits for ever: {:?}",
                    self.explain_waiting()
                ));
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
        // Predeclared queues do.
        let empty = Queue::<u64, u64>::new(self.settings.clone(), self.now).counts();
        if counts != empty || !self.held.is_empty() || !self.streams.is_empty() {
            self.fail(format!("something remains: {counts:?}"));
        }
        Told {
            trace: self.trace,
            steps: self.steps,
            seen: self.seen,
        }
    }
}
