//! Copying what one mirror lacks from another, in the background: a few at a time, and what finds no room
//! is left for the next who asks for it.

use std::{fs::File, sync::Arc};

use rustix::fs::{Mode, OFlags};
use tokio::sync::Semaphore;

use super::member::Member;
use crate::{
    digest::Digest,
    instance::InstanceName,
    proto::reapi::ActionResult,
    storage::{Content, Error, blocking},
};

/// Copies at a time, and those that wait.
const CONCURRENCY: usize = 8;
const MOST_WAITING: usize = 4096;

/// Larger blobs go by way of a file.
const LARGEST_IN_MEMORY: u64 = 1 << 20;

pub(super) struct Repairs {
    waiting: Arc<Semaphore>,
    running: Arc<Semaphore>,
}

impl Default for Repairs {
    fn default() -> Self {
        Repairs {
            waiting: Arc::new(Semaphore::new(MOST_WAITING)),
            running: Arc::new(Semaphore::new(CONCURRENCY)),
        }
    }
}

impl Repairs {
    pub(super) fn copy_blob(
        &self,
        instance: &InstanceName,
        digest: &Digest,
        from: &Arc<Member>,
        to: &Arc<Member>,
    ) {
        let (from, to, instance, digest) = (from.clone(), to.clone(), instance.clone(), *digest);
        self.start(async move {
            let content = match digest.size() <= LARGEST_IN_MEMORY {
                true => {
                    let read = from.client.read(&instance, &digest, LARGEST_IN_MEMORY);
                    Content::Bytes(from.call(read).await?)
                }
                false => {
                    let file = Arc::new(blocking(nameless_file).await??);
                    let read = from.client.read_to_file(&instance, &digest, file.clone());
                    from.call(read).await?;
                    Content::File(file)
                }
            };
            let upload = to.client.upload(&instance, vec![(digest, content)]);
            to.call(upload).await
        });
    }

    pub(super) fn copy_result(
        &self,
        instance: &InstanceName,
        action: &Digest,
        result: &ActionResult,
        to: Arc<Member>,
    ) {
        let (instance, action, result) = (instance.clone(), *action, result.clone());
        self.start(async move {
            let update = to.client.update_action_result(&instance, &action, result);
            to.call(update).await
        });
    }

    fn start(&self, copy: impl Future<Output = Result<(), Error>> + Send + 'static) {
        let Ok(place) = self.waiting.clone().try_acquire_owned() else {
            return;
        };
        let running = self.running.clone();
        tokio::spawn(async move {
            // Never closed.
            let _turn = running.acquire().await;
            if let Err(error) = copy.await {
                tracing::debug!(%error, "could not copy from one mirror to another");
            }
            drop(place);
        });
    }
}

/// On disk, until it is closed.
fn nameless_file() -> Result<File, Error> {
    let directory = std::env::temp_dir();
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let file = rustix::fs::open(directory.as_path(), flags, Mode::RUSR | Mode::WUSR);
    Ok(File::from(
        file.map_err(|error| Error::of_file(error.into()))?,
    ))
}
