//! Clients: they ask, ask again by name, and check what they get.

use super::*;

/// What an operator says.
const KILLED: &str = "killed";

impl World {
    pub fn ask(&mut self, request: usize) {
        let now = self.now;
        self.requests[request].asked.get_or_insert(now);
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

    pub fn updated(&mut self, request: usize, name: Uuid, stage: Stage) {
        self.requests[request].name = Some(name);
        let Stage::Completed(outcome) = stage else {
            return;
        };
        let response = reapi::ExecuteResponse::decode(&*outcome.response).unwrap();
        let status = response.status.unwrap_or_default();
        let code = rpc::Code::try_from(status.code).unwrap();
        let text = status.message;
        if let Some(run) = run_of(&outcome) {
            self.check_result(request, run, code);
            self.see("result");
            self.requests[request].state = State::Ended;
            return;
        }
        let (digest, _) = self.actions[self.requests[request].action];
        self.see(match code {
            rpc::Code::Unavailable if text.contains("disappeared while task was executing") => {
                "worker disappeared"
            }
            rpc::Code::Unavailable if text.contains("disappeared while task was queued") => {
                "queue disappeared"
            }
            rpc::Code::Unavailable if text.contains("were lost while they executed") => {
                "workers lost too often"
            }
            rpc::Code::Cancelled if self.is_cancelled(request) => {
                if self.requests[request].cancelled {
                    self.see("cancelled");
                    self.requests[request].state = State::Ended;
                    return;
                }
                "cancelled by another run of the same client"
            }
            rpc::Code::Aborted if text == KILLED && self.killed.contains(&digest) => "killed",
            rpc::Code::Internal if text.contains("may crash the worker") => "blamed",
            _ => self.fail(format!("a client gets {code:?} {text:?}")),
        });
        // As clients do with what is the farm's fault.
        self.requests[request].name = None;
        self.requests[request].state = State::Waiting;
        let pause = self.random.up_to(2_000);
        self.after(pause, Event::Ask(request));
    }

    fn check_result(&self, request: usize, run: u64, code: rpc::Code) {
        let this = &self.requests[request];
        let (digest, _) = self.actions[this.action];
        let Some(run) = self.runs.get(&run) else {
            self.fail("a client gets a result that nobody produced")
        };
        if run.instance != this.instance {
            self.fail("a client gets the result of another instance");
        }
        if run.action != digest || run.ended != Some(code) {
            self.fail("a client gets the result of something else");
        }
        if run.size_class == SIZE_CLASSES[0] && code != rpc::Code::Ok {
            self.fail("an action failed that the largest size class was not tried for");
        }
        if this.skip_cache_lookup && run.reported < this.asked {
            self.fail("a result from before it asked is given to who wants none");
        }
    }

    /// Requests of one client for one action share an operation.
    fn is_cancelled(&self, request: usize) -> bool {
        let this = &self.requests[request];
        let shares = |other: &&Request| other.client == this.client && other.action == this.action;
        self.requests
            .iter()
            .filter(shares)
            .any(|other| other.cancelled)
    }

    pub fn cancel(&mut self, request: usize) {
        let this = &self.requests[request];
        let (State::Asking(_), Some(name)) = (this.state, this.name) else {
            return;
        };
        let now = self.look();
        if self.queue.cancel(now, name).is_ok() {
            self.requests[request].cancelled = true;
        }
        self.perform();
    }

    /// By an operator.
    pub fn kill(&mut self, request: usize) {
        let this = &self.requests[request];
        let (State::Asking(_), Some(name)) = (this.state, this.name) else {
            return;
        };
        let (digest, _) = self.actions[this.action];
        let now = self.look();
        let response = EncodedResponse::failure(rpc::Code::Aborted, KILLED.to_owned());
        let killed = self.queue.kill_operation(now, name, Arc::new(response));
        if killed.is_ok() {
            self.killed.insert(digest);
        }
        self.perform();
    }

    pub fn broken(&mut self, request: usize, why: Why) {
        let end = matches!(why, Why::NoWorkers { transient: false });
        self.see(match why {
            Why::Network => "stream broken",
            Why::NotFound => "operation not found",
            Why::Full => "queue full",
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
}
