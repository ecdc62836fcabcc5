//! Turns at writing archives, so that whoever takes archives slowly, or many of them, harms nobody else.
//!
//! 1. So many are written at a time, and of one caller half of them.
//! 2. While somebody waits for a turn, an archive whose reader takes nothing for a while, or all too slowly, is
//!    given up. While nobody does, readers have all the time that their connection has.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Archives that are written at a time; of one caller, half of them.
const MOST: usize = 8;
/// How long somebody waits for a turn.
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// Without taking anything for so long, or slower than this on average, a reader gives way to those who wait.
const PROGRESS_TIMEOUT: Duration = Duration::from_secs(15);
const MINIMUM_RATE: u64 = 64 << 10;

/// The turns of all callers.
pub(in crate::scheduler::web) struct Archives {
    turns: Arc<Semaphore>,
    by_caller: Mutex<BTreeMap<String, Arc<Semaphore>>>,
    waiting: AtomicUsize,
}

/// A turn, until it is dropped.
pub(super) struct Turn {
    archives: Arc<Archives>,
    begun: Instant,
    _of_caller: OwnedSemaphorePermit,
    _of_all: OwnedSemaphorePermit,
}

impl Default for Archives {
    fn default() -> Self {
        Archives {
            turns: Arc::new(Semaphore::new(MOST)),
            by_caller: Mutex::default(),
            waiting: AtomicUsize::new(0),
        }
    }
}

/// Somebody waits for a turn while this is there.
struct WaitingTurn<'a>(&'a AtomicUsize);

impl Drop for WaitingTurn<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Archives {
    fn of_caller(&self, caller: &str) -> Arc<Semaphore> {
        let mut by_caller = self.by_caller.lock();
        // Those that nobody holds or waits for.
        by_caller.retain(|_, turns| Arc::strong_count(turns) > 1);
        let turns = by_caller.entry(caller.to_owned());
        let own = || Arc::new(Semaphore::new(MOST / 2));
        turns.or_insert_with(own).clone()
    }

    /// `None` when there was none for too long.
    pub(super) async fn turn(self: &Arc<Self>, caller: &str) -> Option<Turn> {
        self.turn_within(caller, LONGEST_WAIT).await
    }

    async fn turn_within(self: &Arc<Self>, caller: &str, limit: Duration) -> Option<Turn> {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let _waiting = WaitingTurn(&self.waiting);
        let taken = async {
            let of_caller = self.of_caller(caller).acquire_owned().await.ok()?;
            let of_all = self.turns.clone().acquire_owned().await.ok()?;
            Some((of_caller, of_all))
        };
        let (of_caller, of_all) = tokio::time::timeout(limit, taken).await.ok()??;
        Some(Turn {
            archives: self.clone(),
            begun: Instant::now(),
            _of_caller: of_caller,
            _of_all: of_all,
        })
    }
}

impl Turn {
    /// Whether it is over, for a reader who has taken so many bytes, the last of them so long ago.
    pub(super) fn is_over(&self, taken: u64, silence: Duration) -> bool {
        let age = self.begun.elapsed();
        let slow = age >= PROGRESS_TIMEOUT && taken < age.as_secs() * MINIMUM_RATE;
        let is_wanted = self.archives.waiting.load(Ordering::Relaxed) > 0;
        is_wanted && (silence >= PROGRESS_TIMEOUT || slow)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_caller_has_half_of_the_turns_and_gives_way_only_to_those_who_wait() {
        let archives = Arc::new(Archives::default());
        let soon = Duration::from_millis(20);
        let mut held = Vec::new();
        for _ in 0..MOST / 2 {
            held.push(archives.turn("greedy").await.unwrap());
        }
        assert!(archives.turn_within("greedy", soon).await.is_none());
        held.push(archives.turn("other").await.unwrap());
        assert!(!held[0].is_over(0, PROGRESS_TIMEOUT));
        archives.waiting.fetch_add(1, Ordering::Relaxed);
        assert!(held[0].is_over(0, PROGRESS_TIMEOUT));
        assert!(!held[0].is_over(0, Duration::ZERO));
        held.clear();
        assert!(archives.turn("greedy").await.is_some());
        assert_eq!(archives.by_caller.lock().len(), 1);
    }
}
