//! The Unix users that actions run as, one for each action that is running.
//!
//! 1. No two running actions have the same user.
//! 2. A user is given back only when no process of it lives; one whose processes could not be
//!    killed is retired.
//! 3. The user that was given back last is given out last, so that whatever may stick to a number
//!    is as old as possible.

use std::{
    collections::VecDeque,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::config::runner;

/// The users of one runner, and which of them nobody has.
#[derive(Debug)]
pub(super) struct UserPool {
    free: Mutex<VecDeque<u32>>,
    /// A permit for each user in `free`.
    permits: Arc<Semaphore>,
    range: Range<u32>,
    retired: AtomicU32,
}

/// A user (and group, of the same number) that is one action's own.
#[derive(Debug)]
pub(super) struct ActionUser {
    id: u32,
    pool: Arc<UserPool>,
    // Given back by its own drop, after that of this has put the number back.
    permit: Option<OwnedSemaphorePermit>,
}

/// No user is free; the administrator must act, or the worker ask for less at once.
#[derive(Debug, thiserror::Error)]
#[error(
    "all {0} users are in use; give users.count of bb_runner.toml at least the sum of all workers' concurrency"
)]
pub(super) struct AllUsersInUse(u32);

impl UserPool {
    pub(super) fn new(config: &runner::Users) -> Arc<Self> {
        let range = config.range();
        Arc::new(UserPool {
            permits: Arc::new(Semaphore::new(range.len())),
            free: Mutex::new(range.clone().collect()),
            range,
            retired: AtomicU32::new(0),
        })
    }

    /// Waits at most this long for a user that nobody has.
    pub(super) async fn take(
        self: &Arc<Self>,
        timeout: Duration,
    ) -> Result<ActionUser, AllUsersInUse> {
        let permit = tokio::time::timeout(timeout, self.permits.clone().acquire_owned()).await;
        let all_in_use = || AllUsersInUse(self.range.len() as u32);
        let Ok(Ok(permit)) = permit else {
            return Err(all_in_use());
        };
        let id = self.free.lock().pop_front().ok_or_else(all_in_use)?;
        Ok(ActionUser {
            id,
            pool: self.clone(),
            permit: Some(permit),
        })
    }

    /// How many users actions have now.
    pub(super) fn in_use(&self) -> usize {
        (self.usable() as usize).saturating_sub(self.permits.available_permits())
    }

    /// How many users were not retired.
    fn usable(&self) -> u32 {
        self.range.len() as u32 - self.retired.load(Ordering::Relaxed)
    }

    /// Whether no action can run any more.
    pub(super) fn all_retired(&self) -> bool {
        self.usable() == 0
    }

    /// Waits until every user was given back, so that no action runs.
    pub(super) async fn wait_all_returned(&self, timeout: Duration) -> bool {
        let all = self.usable();
        tokio::time::timeout(timeout, self.permits.acquire_many(all))
            .await
            .is_ok_and(|permits| permits.is_ok())
    }
}

impl ActionUser {
    /// Its number, which is both uid and gid.
    pub(super) fn id(&self) -> u32 {
        self.id
    }

    /// Keeps the user from being given out again by this runner.
    pub(super) fn retire(mut self) {
        if let Some(permit) = self.permit.take() {
            permit.forget();
            self.pool.retired.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Drop for ActionUser {
    fn drop(&mut self) {
        if self.permit.is_some() {
            self.pool.free.lock().push_back(self.id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(1);

    fn users(count: u32) -> Arc<UserPool> {
        UserPool::new(&runner::Users {
            first: 70_000,
            count,
        })
    }

    #[tokio::test]
    async fn each_user_is_one_actions_own_and_the_last_given_back_is_the_last_given_out() {
        let users = users(3);
        let (a, b) = (
            users.take(SHORT).await.unwrap(),
            users.take(SHORT).await.unwrap(),
        );
        assert_eq!((a.id(), b.id()), (70_000, 70_001));
        drop(a);
        let (c, d) = (
            users.take(SHORT).await.unwrap(),
            users.take(SHORT).await.unwrap(),
        );
        assert_eq!((c.id(), d.id()), (70_002, 70_000));
        let error = users.take(SHORT).await.unwrap_err();
        assert!(error.to_string().contains("users.count"), "{error}");
        assert!(!users.wait_all_returned(SHORT).await);
        drop((b, c, d));
        assert!(users.wait_all_returned(SHORT).await);
    }

    #[tokio::test]
    async fn a_retired_user_never_comes_back() {
        let users = users(1);
        users.take(SHORT).await.unwrap().retire();
        users.take(SHORT).await.unwrap_err();
    }
}
