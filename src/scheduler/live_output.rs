//! What running actions print: asked of their workers, each of which keeps a call for that.
//!
//! 1. Nothing is kept here but questions that have no answer yet, `MOST_QUESTIONS` of each worker at most;
//!    a question is given up after `ANSWER_TIMEOUT`.
//! 2. A worker is only asked about its own slots; what it says of others' is nobody's answer.

use std::{
    collections::HashMap,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::{Stream, stream};
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use crate::{
    daemon::Access,
    digest::Digest,
    instance::InstanceName,
    proto::live_output::{
        Answer, Output, Question, WorkerMessage, WorkerState, live_output_server, worker_message,
    },
    scheduler::status,
};

/// Questions of one worker that have no answer yet.
const MOST_QUESTIONS: usize = 64;
/// How long a worker may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// Slots of one worker.
const MOST_SLOTS: usize = 4096;
/// Bytes of one answer.
pub(super) const LARGEST_PIECE: u32 = 64 << 10;

/// Workers that can be asked, by their slots: a prefix of instance names, and labels as JSON.
#[derive(Default)]
pub(super) struct LiveOutput {
    workers: Mutex<HashMap<(String, String), Arc<AskedWorker>>>,
    next: AtomicU64,
}

struct AskedWorker {
    questions: mpsc::Sender<Question>,
    waiting: Mutex<HashMap<u64, oneshot::Sender<Answer>>>,
    /// Of the instance names that it works for.
    prefix: String,
    state: Mutex<WorkerState>,
}

/// What is wanted of an action's output.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    pub output: Output,
    /// A negative one is counted from the end.
    pub offset: i64,
    pub size: u32,
}

impl LiveOutput {
    /// What a slot says of the action that it executes; `None` when it says nothing, or executes another.
    pub(super) async fn ask(
        &self,
        slot: &(String, String),
        action: &Digest,
        wanted: Wanted,
    ) -> Option<Answer> {
        let asked = self.workers.lock().get(slot).cloned()?;
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, answer) = oneshot::channel();
        {
            let mut waiting = asked.waiting.lock();
            if waiting.len() >= MOST_QUESTIONS {
                return None;
            }
            waiting.insert(number, sender);
        }
        let _forget = ForgottenQuestion {
            asked: asked.clone(),
            number,
        };
        let question = Question {
            number,
            worker_id: slot.1.clone(),
            action_digest: Some(action.to_proto()),
            output: wanted.output as i32,
            offset: wanted.offset,
            maximum_size: wanted.size.min(LARGEST_PIECE),
        };
        let answered = async {
            asked.questions.send(question).await.ok()?;
            answer.await.ok()
        };
        let answer = tokio::time::timeout(ANSWER_TIMEOUT, answered)
            .await
            .ok()??;
        answer.executing.then_some(answer)
    }

    /// What a worker says of itself; `None` for one that says nothing.
    pub(super) fn state_of(&self, slot: &(String, String)) -> Option<WorkerState> {
        let asked = self.workers.lock().get(slot).cloned()?;
        let state = asked.state.lock();
        Some(WorkerState {
            worker_ids: Vec::new(),
            ..state.clone()
        })
    }

    fn insert(&self, asked: &Arc<AskedWorker>, state: WorkerState) {
        let mut workers = self.workers.lock();
        for id in state.worker_ids.iter().take(MOST_SLOTS) {
            workers.insert((asked.prefix.clone(), id.clone()), asked.clone());
        }
        *asked.state.lock() = state;
    }

    fn remove(&self, asked: &Arc<AskedWorker>) {
        let ids = asked.state.lock().worker_ids.clone();
        let mut workers = self.workers.lock();
        for id in ids.into_iter().map(|id| (asked.prefix.clone(), id)) {
            // Another call of the worker may have taken its place.
            if workers
                .get(&id)
                .is_some_and(|known| Arc::ptr_eq(known, asked))
            {
                workers.remove(&id);
            }
        }
    }
}

/// A question that nobody waits for any more when this is dropped.
struct ForgottenQuestion {
    asked: Arc<AskedWorker>,
    number: u64,
}

impl Drop for ForgottenQuestion {
    fn drop(&mut self) {
        self.asked.waiting.lock().remove(&self.number);
    }
}

/// What workers call.
pub(super) struct LiveOutputService {
    pub live: Arc<LiveOutput>,
    pub stopping: CancellationToken,
}

type Questions = Pin<Box<dyn Stream<Item = Result<Question, Status>> + Send>>;

/// A worker's call, for as long as it lasts.
struct ServedWorker {
    live: Arc<LiveOutput>,
    asked: Arc<AskedWorker>,
    asking: mpsc::Receiver<Question>,
    stopping: CancellationToken,
    /// The worker says nothing more.
    gone: CancellationToken,
    /// Reads what the worker says, and ends with the call.
    _reading: tokio_util::sync::DropGuard,
}

impl Drop for ServedWorker {
    fn drop(&mut self) {
        self.live.remove(&self.asked);
    }
}

#[tonic::async_trait]
impl live_output_server::LiveOutput for LiveOutputService {
    type ServeStream = Questions;

    async fn serve(
        &self,
        request: Request<Streaming<WorkerMessage>>,
    ) -> Result<Response<Questions>, Status> {
        let access = Access::of(&request);
        let mut messages = request.into_inner();
        let state = match messages.message().await?.and_then(|first| first.message) {
            Some(worker_message::Message::State(state)) => state,
            Some(worker_message::Message::Answer(_)) | None => WorkerState::default(),
        };
        let prefix = InstanceName::parse(&state.instance_name_prefix).map_err(status::invalid)?;
        access.require(&prefix)?;
        let (questions, asking) = mpsc::channel(MOST_QUESTIONS);
        let asked = Arc::new(AskedWorker {
            questions,
            waiting: Mutex::default(),
            prefix: prefix.as_str().to_owned(),
            state: Mutex::default(),
        });
        self.live.insert(&asked, state);
        let (ended, gone) = (CancellationToken::new(), CancellationToken::new());
        let served = ServedWorker {
            live: self.live.clone(),
            asked: asked.clone(),
            asking,
            stopping: self.stopping.clone(),
            gone: gone.clone(),
            _reading: ended.clone().drop_guard(),
        };
        let live = self.live.clone();
        tokio::spawn(async move {
            let _gone = gone.drop_guard();
            loop {
                let message = tokio::select! {
                    message = messages.message() => message,
                    () = ended.cancelled() => return,
                };
                match message.ok().flatten().and_then(|message| message.message) {
                    Some(worker_message::Message::State(state)) => live.insert(&asked, state),
                    Some(worker_message::Message::Answer(answer)) => {
                        if let Some(waiting) = asked.waiting.lock().remove(&answer.number) {
                            let _ = waiting.send(answer);
                        }
                    }
                    None => {
                        live.remove(&asked);
                        return;
                    }
                }
            }
        });
        let questions = stream::unfold(served, |mut served| async move {
            tokio::select! {
                question = served.asking.recv() => question.map(|question| (Ok(question), served)),
                () = served.gone.clone().cancelled_owned() => None,
                () = served.stopping.clone().cancelled_owned() => {
                    Some((Err(status::stopping()), served))
                }
            }
        });
        Ok(Response::new(Box::pin(questions)))
    }
}
