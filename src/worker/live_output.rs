//! What running actions print, for those who read it meanwhile: the scheduler asks, this answers.
//!
//! 1. An action is never slowed: its files are only read, `LARGEST_PIECE` bytes at a time, and only when
//!    somebody asks; what is asked by one call is answered one question after the other.
//! 2. What an action may have put in place of its files is not followed, nor waited for.

use std::{
    collections::HashMap,
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use futures::stream;
use parking_lot::Mutex;
use rustix::fs::{FileType, Mode, OFlags};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};

use super::status_line::StatusLine;
use crate::{
    daemon::{self, Channel},
    digest::Digest,
    proto::{
        live_output::{
            Answer, Output, Question, WorkerMessage, WorkerState,
            live_output_client::LiveOutputClient, worker_message::Message,
        },
        reapi::ExecutedActionMetadata,
    },
};

const LARGEST_PIECE: u32 = 64 << 10;
/// Between two messages about the worker itself.
const STATE_INTERVAL: Duration = Duration::from_secs(60);
/// Until the scheduler is called again.
const RETRY_PAUSE: Duration = Duration::from_secs(5);
/// The same for one that does not know this service.
const UNKNOWN_PAUSE: Duration = Duration::from_secs(600);

/// What the slots of this worker execute.
#[derive(Default)]
pub struct RunningOutputs(Mutex<HashMap<String, Arc<RunningOutput>>>);

struct RunningOutput {
    action: Digest,
    /// The action's own, which has its standard output and error.
    directory: OwnedFd,
    metadata: ExecutedActionMetadata,
}

/// A slot's action can be read until this is dropped.
pub struct Readable<'a> {
    running: &'a RunningOutputs,
    worker: String,
}

impl Drop for Readable<'_> {
    fn drop(&mut self) {
        self.running.0.lock().remove(&self.worker);
    }
}

impl RunningOutputs {
    /// From now on a slot's action can be read; `None` when this process has no descriptor for it.
    pub(super) fn insert(
        &self,
        action: &Digest,
        directory: impl AsFd,
        metadata: &ExecutedActionMetadata,
    ) -> Option<Readable<'_>> {
        let running = RunningOutput {
            action: *action,
            directory: rustix::io::fcntl_dupfd_cloexec(directory, 0).ok()?,
            metadata: ExecutedActionMetadata {
                auxiliary_metadata: Vec::new(),
                ..metadata.clone()
            },
        };
        let worker = metadata.worker.clone();
        self.0.lock().insert(worker.clone(), Arc::new(running));
        Some(Readable {
            running: self,
            worker,
        })
    }

    fn answer(&self, question: &Question) -> Answer {
        let none = Answer {
            number: question.number,
            ..Answer::default()
        };
        let Some(running) = self.0.lock().get(&question.worker_id).cloned() else {
            return none;
        };
        let asked = question.action_digest.clone().unwrap_or_default();
        if running.action.to_proto() != asked {
            return none;
        }
        let mut answer = Answer {
            executing: true,
            metadata: Some(running.metadata.clone()),
            ..none
        };
        let name = match question.output() {
            Output::Stdout => "stdout",
            Output::Stderr => "stderr",
            Output::Unspecified => return answer,
        };
        // One that is not there has printed nothing yet.
        if let Ok((size, offset, data)) = read(&running, name, question) {
            (answer.size, answer.offset, answer.data) = (size, offset, data.into());
        }
        answer
    }
}

/// How much there is, and a piece of it with its offset.
fn read(
    running: &RunningOutput,
    name: &str,
    question: &Question,
) -> rustix::io::Result<(u64, u64, Vec<u8>)> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = rustix::fs::openat(&running.directory, name, flags, Mode::empty())?;
    let stat = rustix::fs::fstat(&file)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(rustix::io::Errno::INVAL);
    }
    let size = u64::try_from(stat.st_size).unwrap_or_default();
    let offset = match u64::try_from(question.offset) {
        Ok(offset) => offset.min(size),
        Err(_) => size.saturating_sub(question.offset.unsigned_abs()),
    };
    let wanted = u64::from(question.maximum_size.min(LARGEST_PIECE)).min(size - offset);
    let mut data = vec![0; usize::try_from(wanted).unwrap_or_default()];
    let read = rustix::io::pread(&file, data.as_mut_slice(), offset)?;
    data.truncate(read);
    Ok((size, offset, data))
}

/// Answers the scheduler until `stopping`.
pub(super) async fn run(
    channel: Channel,
    workers: Vec<String>,
    prefix: String,
    running: Arc<RunningOutputs>,
    directory: PathBuf,
    status_line: Arc<StatusLine>,
    stopping: CancellationToken,
) {
    let state = || {
        let space = daemon::disk::space(&directory);
        WorkerMessage {
            message: Some(Message::State(WorkerState {
                version: env!("CARGO_PKG_VERSION").to_owned(),
                worker_ids: workers.clone(),
                instance_name_prefix: prefix.clone(),
                disk_free_bytes: space.as_ref().map_or(0, |space| space.available),
                disk_size_bytes: space.as_ref().map_or(0, |space| space.total),
            })),
        }
    };
    loop {
        let pause = tokio::select! {
            ended = serve(LiveOutputClient::new(channel.clone()), &running, &state, &status_line) => match ended {
                Err(status) if status.code() == Code::Unimplemented => {
                    status_line.answered();
                    UNKNOWN_PAUSE
                }
                _ => RETRY_PAUSE.mul_f64(0.5 + fastrand::f64()),
            },
            () = stopping.cancelled() => return,
        };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = stopping.cancelled() => return,
        }
    }
}

async fn serve(
    mut client: LiveOutputClient<Channel>,
    running: &Arc<RunningOutputs>,
    state: &impl Fn() -> WorkerMessage,
    status_line: &StatusLine,
) -> Result<(), Status> {
    let (sender, receiver) = mpsc::channel(4);
    let _ = sender.send(state()).await;
    let messages = stream::unfold(receiver, |mut receiver| async move {
        let message = receiver.recv().await?;
        Some((message, receiver))
    });
    let mut questions = client.serve(messages).await?.into_inner();
    // Calls of idle slots are held, so that they say it minutes later.
    status_line.answered();
    let mut states = tokio::time::interval(STATE_INTERVAL);
    states.tick().await;
    loop {
        let question = tokio::select! {
            question = questions.message() => question?,
            _ = states.tick() => {
                let _ = sender.send(state()).await;
                continue;
            }
        };
        let Some(question) = question else {
            return Ok(());
        };
        let running = running.clone();
        let answered = daemon::spawn_blocking(move || running.answer(&question)).await;
        if let Ok(answer) = answered {
            let message = WorkerMessage {
                message: Some(Message::Answer(answer)),
            };
            let _ = sender.send(message).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::DigestFunction;

    #[test]
    fn what_an_action_has_printed_is_read_in_pieces_and_nothing_else_is() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("stdout"), "0123456789").unwrap();
        std::os::unix::fs::symlink("/etc/passwd", directory.path().join("stderr")).unwrap();
        let running = RunningOutputs::default();
        let action = DigestFunction::Sha256.digest_of(b"action");
        let metadata = ExecutedActionMetadata {
            worker: "{}".to_owned(),
            ..ExecutedActionMetadata::default()
        };
        let opened = std::fs::File::open(directory.path()).unwrap();
        let readable = running.insert(&action, &opened, &metadata).unwrap();
        let ask = |output: Output, offset, maximum_size| {
            running.answer(&Question {
                number: 1,
                worker_id: "{}".to_owned(),
                action_digest: Some(action.to_proto()),
                output: output as i32,
                offset,
                maximum_size,
            })
        };
        let answer = ask(Output::Stdout, 2, 3);
        assert_eq!(
            (&*answer.data, answer.offset, answer.size),
            (&b"234"[..], 2, 10)
        );
        assert_eq!(&*ask(Output::Stdout, -4, 100).data, b"6789");
        assert_eq!(&*ask(Output::Stdout, 50, 100).data, b"");
        let link = ask(Output::Stderr, 0, 100);
        assert!(link.executing && link.data.is_empty());
        assert!(ask(Output::Unspecified, 0, 0).executing);
        drop(readable);
        assert!(!ask(Output::Stdout, 0, 10).executing);
    }
}
