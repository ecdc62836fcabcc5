//! Sandboxes that wait for actions, made ahead on a thread of its own.
//!
//! 1. Who takes one gets one that is usable now, or the reason why the last one could not be made.
//! 2. After a failure the thread tries again by itself, `RETRY_INTERVAL` later, whether or not
//!    somebody waits: a shortage that is over is noticed, and one that lasts costs little.
//! 3. `last_verification` answers from the last attempt to make a sandbox: by its failure, or, if it succeeded less
//!    than `MAXIMUM_VERIFICATION_AGE` ago and the newest sandbox that waits is usable, that one can be made.
//!    `verify_can_build` always waits for a new attempt. So whoever asks for readiness again and again has a sandbox
//!    made each `MAXIMUM_VERIFICATION_AGE` at most, as long as a usable one waits.
//! 4. Whoever waits holds no lock, and can give up at any time.
//! 5. The one in place of a sandbox that was taken is made when whoever took it has tried to start its process
//!    (`refill`), or when few are left; if it came to no try, at the next of these. For making one and starting
//!    a process have the kernel's locks and, on a host with few processors, those in common.

use std::{
    collections::VecDeque,
    io,
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex, MutexGuard};
use tokio::sync::watch;

use super::{
    action_sandbox::Sandbox, builder::SandboxBuilder, error::SandboxError,
    mount_generation::DirectoryId, sandbox_context::SandboxContext,
};

/// How many sandboxes the thread makes ahead.
const TARGET_READY: usize = 5;
/// With fewer than this left the next ones are made at once, rather than when `refill` says so.
const MINIMUM_READY: usize = 3;
/// How long after a failure the thread tries again.
const RETRY_INTERVAL: Duration = Duration::from_millis(250);
/// How long a sandbox that was made says that others can be made.
const MAXIMUM_VERIFICATION_AGE: Duration = Duration::from_secs(10);
/// How long it may take to make a sandbox, on a host that is busy.
const BUILD_TIMEOUT: Duration = Duration::from_secs(30);

/// Gives out sandboxes that a thread prepares ahead.
#[derive(Debug)]
pub(crate) struct SandboxPool {
    context: Arc<SandboxContext>,
    shared: Arc<PoolShared>,
    builder: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug, Default)]
struct PoolShared {
    state: Mutex<PoolState>,
    /// Where the thread waits for something to make.
    wanted: Condvar,
    /// The number of sandboxes that were made or could not be, at which all others wait.
    attempts: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct PoolState {
    /// The oldest first.
    ready: VecDeque<Sandbox>,
    /// `None` until the first one has ended.
    last: Option<BuildAttempt>,
    is_closed: bool,
}

/// An attempt to make a sandbox.
#[derive(Debug)]
struct BuildAttempt {
    at: Instant,
    failure: Option<SandboxError>,
}

impl SandboxPool {
    /// Starts the thread, which begins to make sandboxes.
    pub(crate) fn open(context: SandboxContext) -> io::Result<Self> {
        let context = Arc::new(context);
        let shared = Arc::<PoolShared>::default();
        let builder = std::thread::Builder::new()
            .name("sandboxes".to_owned())
            .spawn({
                let (context, shared) = (context.clone(), shared.clone());
                move || shared.build(&context)
            })?;
        Ok(SandboxPool {
            context,
            shared,
            builder: Mutex::new(Some(builder)),
        })
    }

    /// What its sandboxes are made from.
    pub(crate) fn context(&self) -> &SandboxContext {
        &self.context
    }

    /// The oldest sandbox that is ready, if it is usable around the build directory that has this device and inode
    /// number; else it is dropped.
    pub(crate) fn try_take(&self, build_directory: DirectoryId) -> Option<Sandbox> {
        let sandbox = self.shared.pop().ok()??;
        let mount_generation = self.context.mount_generation.current();
        sandbox
            .is_usable(build_directory, mount_generation)
            .then_some(sandbox)
    }

    /// Waits for a sandbox around the build directory that has this device and inode number.
    pub(crate) async fn take(&self, build_directory: DirectoryId) -> Result<Sandbox, SandboxError> {
        let mount_generation = self.context.mount_generation.current();
        // Each of those that are ready may be out of date, as may the one that is in the making.
        for _ in 0..TARGET_READY + 2 {
            let sandbox = self.shared.next().await?;
            if sandbox.is_usable(build_directory, mount_generation) {
                return Ok(sandbox);
            }
        }
        Err(SandboxError::other(
            "build directory",
            "it is replaced, or sandboxes are killed, all the time",
        ))
    }

    /// Has the thread make what is missing. To be called once a process was started in a sandbox that was taken; without the
    /// call, the thread makes more only when fewer than `MINIMUM_READY` are left, or at the next call of this or of
    /// `verify_can_build`.
    pub(crate) fn refill(&self) {
        self.shared.wanted.notify_one();
    }

    /// Whether it is known that a sandbox can be made, or why none can; `None` when `verify_can_build` must find out.
    pub(crate) fn last_verification(
        &self,
        build_directory: DirectoryId,
    ) -> Option<Result<(), SandboxError>> {
        let mount_generation = self.context.mount_generation.current();
        let state = self.shared.state.lock();
        let last = state.last.as_ref()?;
        match &last.failure {
            // It stands until the next attempt, which begins after `RETRY_INTERVAL`, has ended.
            Some(failure) => Some(Err(failure.clone())),
            None if last.at.elapsed() > MAXIMUM_VERIFICATION_AGE => None,
            None => {
                let newest = state.ready.back()?;
                newest
                    .is_usable(build_directory, mount_generation)
                    .then_some(Ok(()))
            }
        }
    }

    /// Waits until the next sandbox was made, whatever is ready. The error says why none can be made.
    pub(crate) async fn verify_can_build(&self) -> Result<(), SandboxError> {
        let mut attempts = self.shared.attempts.subscribe();
        // The new one is made in place of the oldest.
        let oldest = {
            let mut state = self.shared.state.lock();
            match state.ready.len() < TARGET_READY {
                true => None,
                false => state.ready.pop_front(),
            }
        };
        // Its end takes a while.
        tokio::task::spawn_blocking(move || drop(oldest));
        self.shared.wanted.notify_one();
        self.shared.await_attempt(&mut attempts).await
    }

    /// Removes all sandboxes that nobody is in; there will be no others.
    pub(crate) fn close(&self) {
        let ready = {
            let mut state = self.shared.state.lock();
            state.is_closed = true;
            std::mem::take(&mut state.ready)
        };
        self.shared.wanted.notify_one();
        self.shared.attempts.send_modify(|_| ());
        drop(ready);
        if let Some(builder) = self.builder.lock().take() {
            let _ = builder.join();
        }
        if let Some(cgroups) = &self.context.cgroups {
            cgroups.close();
        }
    }
}

impl Drop for SandboxPool {
    fn drop(&mut self) {
        self.close();
    }
}

impl PoolShared {
    /// What the thread does, until closed.
    fn build(&self, context: &SandboxContext) {
        let mut builder = None;
        let mut state = self.state.lock();
        while !state.is_closed {
            if state.ready.len() >= TARGET_READY {
                self.wanted.wait(&mut state);
                continue;
            }
            if let Some(BuildAttempt { at, failure }) = &state.last
                && failure.is_some()
                && at.elapsed() < RETRY_INTERVAL
            {
                let until = *at + RETRY_INTERVAL;
                self.wanted.wait_until(&mut state, until);
                continue;
            }
            let made = MutexGuard::unlocked(&mut state, || match &mut builder {
                Some(builder) => SandboxBuilder::build(builder, context),
                none => none.insert(SandboxBuilder::new()?).build(context),
            });
            let was_failing = state
                .last
                .as_ref()
                .is_some_and(|last| last.failure.is_some());
            let failure = match made {
                Ok(sandbox) => {
                    state.ready.push_back(sandbox);
                    None
                }
                Err(error) => Some(error),
            };
            match &failure {
                Some(error) if !was_failing => {
                    tracing::error!("{error}; no action can run until a sandbox can be made")
                }
                None if was_failing => tracing::info!("sandboxes for actions can be made again"),
                _ => {}
            }
            state.last = Some(BuildAttempt {
                at: Instant::now(),
                failure,
            });
            self.attempts.send_modify(|attempts| *attempts += 1);
        }
        // One that was made while it was closed.
        let ready = std::mem::take(&mut state.ready);
        drop(state);
        drop(ready);
    }

    /// Takes the oldest that is ready, if there is one.
    fn pop(&self) -> Result<Option<Sandbox>, SandboxError> {
        let mut state = self.state.lock();
        if state.is_closed {
            return Err(SandboxError::other("stop", "bb_runner stops"));
        }
        let sandbox = state.ready.pop_front();
        let is_low = state.ready.len() < MINIMUM_READY;
        drop(state);
        if sandbox.is_some() && is_low {
            self.wanted.notify_one();
        }
        Ok(sandbox)
    }

    /// Takes the oldest that is ready, as soon as there is one.
    async fn next(&self) -> Result<Sandbox, SandboxError> {
        let mut attempts = self.attempts.subscribe();
        loop {
            if let Some(sandbox) = self.pop()? {
                return Ok(sandbox);
            }
            self.await_attempt(&mut attempts).await?;
        }
    }

    /// Waits for an attempt that this receiver has not seen.
    async fn await_attempt(&self, attempts: &mut watch::Receiver<u64>) -> Result<(), SandboxError> {
        let attempted = tokio::time::timeout(BUILD_TIMEOUT, attempts.changed()).await;
        if attempted.is_err() {
            return Err(SandboxError::other(
                "wait",
                format!("it was not made within {BUILD_TIMEOUT:?}"),
            ));
        }
        let state = self.state.lock();
        if state.is_closed {
            return Err(SandboxError::other("stop", "bb_runner stops"));
        }
        match state.last.as_ref().and_then(|last| last.failure.clone()) {
            Some(failure) => Err(failure),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use super::*;

    #[tokio::test]
    async fn who_waits_for_a_sandbox_can_give_up_and_holds_no_lock() {
        let shared = PoolShared::default();
        let mut waiting = pin!(shared.next());
        let soon = Duration::from_millis(1);
        assert!(tokio::time::timeout(soon, &mut waiting).await.is_err());
        shared.state.try_lock().unwrap().is_closed = true;
        shared.attempts.send_modify(|_| ());
        let error = waiting.await.unwrap_err();
        assert!(error.to_string().contains("bb_runner stops"), "{error}");
    }
}
