//! Memory for compressing and decompressing what callers read and write.
//!
//! 1. All coders together have 256 MiB, those of one caller no more than 64 MiB.
//! 2. Who needs more waits for a while, the first to come first.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, LazyLock},
    time::Duration,
};

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::{Request, Status};

use crate::{
    daemon::{Access, Peer},
    storage::compression,
};

/// In KiB.
const OF_ALL: usize = 256 << 10;
const OF_CALLER: usize = 64 << 10;

const CODER_TIMEOUT: Duration = Duration::from_secs(30);

/// Who waits for whom.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum CoderCaller {
    /// By certificate, or by the kernel.
    Known(String),
    Address(IpAddr),
    Nobody,
}

impl CoderCaller {
    pub(super) fn of<T>(request: &Request<T>) -> Self {
        let access = Access::of(request);
        match (access.identity(), request.extensions().get::<Peer>()) {
            (identity, _) if !identity.is_nobody() => {
                CoderCaller::Known(identity.name().to_owned())
            }
            (_, Some(Peer::Tcp(Some(address)))) => CoderCaller::Address(address.ip()),
            _ => CoderCaller::Nobody,
        }
    }
}

struct CoderBudget {
    all: Arc<Semaphore>,
    /// Those that have some of it, or wait for it.
    callers: Mutex<HashMap<CoderCaller, Arc<Semaphore>>>,
}

static BUDGET: LazyLock<CoderBudget> = LazyLock::new(|| CoderBudget {
    all: Arc::new(Semaphore::new(OF_ALL)),
    callers: Mutex::default(),
});

/// A coder's memory, given back when dropped.
pub(super) struct CoderReservation {
    _all: OwnedSemaphorePermit,
    _own: OwnedSemaphorePermit,
}

/// Memory for a coder of a blob of this size.
pub(super) async fn reserve(caller: &CoderCaller, size: u64) -> Result<CoderReservation, Status> {
    BUDGET.reserve(caller, size).await
}

impl CoderBudget {
    async fn reserve(&self, caller: &CoderCaller, size: u64) -> Result<CoderReservation, Status> {
        let count = u32::try_from(compression::memory(size) >> 10).unwrap_or(u32::MAX);
        let own = {
            let mut callers = self.callers.lock();
            callers.retain(|_, budget| {
                Arc::strong_count(budget) > 1 || budget.available_permits() < OF_CALLER
            });
            let fresh = || Arc::new(Semaphore::new(OF_CALLER));
            callers.entry(caller.clone()).or_insert_with(fresh).clone()
        };
        let both = async {
            let own = own.acquire_many_owned(count).await;
            (self.all.clone().acquire_many_owned(count).await, own)
        };
        match tokio::time::timeout(CODER_TIMEOUT, both).await {
            Ok((Ok(all), Ok(own))) => Ok(CoderReservation {
                _all: all,
                _own: own,
            }),
            _ => Err(Status::resource_exhausted(
                "too many compressed streams are under way; try again later, or without compression",
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_caller_takes_no_more_than_a_quarter_and_gives_it_back() {
        let budget = CoderBudget {
            all: Arc::new(Semaphore::new(OF_ALL)),
            callers: Mutex::default(),
        };
        let greedy = CoderCaller::Known("cn:greedy".to_owned());
        let mut held = Vec::new();
        let soon = Duration::from_millis(50);
        while let Ok(reservation) =
            tokio::time::timeout(soon, budget.reserve(&greedy, u64::MAX)).await
        {
            held.push(reservation.unwrap());
        }
        assert_eq!(held.len(), 7);
        let other = CoderCaller::Address([127, 0, 0, 1].into());
        drop(budget.reserve(&other, 1).await.unwrap());
        held.pop();
        held.push(budget.reserve(&greedy, u64::MAX).await.unwrap());
        drop(held);
        drop(budget.reserve(&other, 1).await.unwrap());
        assert_eq!(budget.callers.lock().len(), 1);
        assert_eq!(budget.all.available_permits(), OF_ALL);
    }
}
