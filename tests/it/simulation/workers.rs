//! Workers: slots, what they run, and how they end.

use super::*;

impl World {
    pub fn drive(&mut self, worker: usize) {
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
                    let this = &self.workers[worker];
                    let started = match &report.activity {
                        _ if this.foreign => None,
                        Activity::Executing(_) | Activity::Completed(..) => this.started.clone(),
                        Activity::Idle | Activity::Started(_) => None,
                    };
                    self.send_call(worker, life, call, report, started);
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
                    if !self.closing {
                        let delay = self.random.up_to(60_000);
                        self.after(delay, Event::Start(worker));
                    }
                    return;
                }
            }
        }
    }

    pub fn send_call(
        &mut self,
        worker: usize,
        life: u32,
        call: u64,
        report: SlotReport<RunResult>,
        started: Option<Started>,
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
        let foreign = self.workers[worker].foreign;
        if !self.healed && !foreign && self.random.chance(4) {
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
                    started: started.clone(),
                    ghost: true,
                },
            );
        }
        let delay = self.delay();
        let delay = self.in_order(worker, delay);
        self.after(
            delay,
            Event::Call {
                generation,
                worker,
                call,
                number: call,
                report,
                started,
                ghost: false,
            },
        );
    }

    /// When a call arrives, not before those that Buildbarn's worker made before it.
    pub fn in_order(&mut self, worker: usize, delay: Duration) -> Duration {
        let (now, this) = (self.now, &mut self.workers[worker]);
        if !this.foreign {
            return delay;
        }
        this.arrival = this.arrival.max(now + delay);
        this.arrival - now
    }

    pub fn hang_up(&mut self, worker: usize) {
        if let Some(call) = self.workers[worker].call.take() {
            self.broken.insert(call);
            let notice = self.notice();
            self.after(notice, Event::HungUp(call));
        }
    }

    pub fn start(&mut self, worker: usize, work: Work) {
        if self.workers[worker].running.is_some() {
            self.fail("a slot runs two actions at once");
        }
        let (run, life) = (self.number(), self.workers[worker].life);
        self.runs.insert(
            run,
            Run {
                action: work.action.digest,
                instance: work.action.instance.clone(),
                size_class: self.workers[worker].key.size_class,
                attempt: work.attempt,
                ended: None,
                reported: None,
            },
        );
        self.count_start(work.attempt.operation);
        self.workers[worker].started = Some(Started {
            instance: work.action.instance.clone(),
            attempt: work.attempt,
        });
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

    /// Each time that a scheduler took it up, so many workers may be lost with it, and so often one of them
    /// may lose it; and the largest size class tries it once more.
    fn count_start(&mut self, operation: Uuid) {
        let (made, starts) = self.starts.entry(operation).or_default();
        *starts += 1;
        let retries = self.settings.lost_worker_retry_count + self.settings.worker_task_retry_count;
        let sizes = if self.settings.predeclared_queues.is_empty() {
            1
        } else {
            2
        };
        if *starts > *made * (retries + sizes) {
            self.fail("an action is started more often than is allowed");
        }
    }

    pub fn end(&mut self, worker: usize) {
        self.hang_up(worker);
        let worker = &mut self.workers[worker];
        worker.slot = None;
        worker.running = None;
        worker.kept = None;
        worker.wake = None;
        worker.paused = self.start;
        worker.life += 1;
    }

    pub fn slot(&mut self, worker: usize, life: u32) -> Option<&mut Slot<Work, RunResult>> {
        let worker = self.workers.get_mut(worker)?;
        (worker.life == life).then_some(worker.slot.as_mut()?)
    }

    pub fn finished(&mut self, worker: usize, life: u32, run: u64) {
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
        if let Some(run) = self.runs.get_mut(&run) {
            run.ended = Some(code);
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
}
