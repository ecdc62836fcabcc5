//! What operators do with the queue: looking at operations, killing them, drains, terminating workers. All that may
//! be long is done piece by piece, so that nobody waits for the lock for long.

use std::{sync::Arc, time::Duration};

use tokio::sync::watch;
use uuid::Uuid;

use super::{
    super::queue::{
        Drain, DrainRefusal, EncodedResponse, Explanation, KillRefusal, ListPage, NextWorker,
        OperationFilter, OperationRow, SizeClassQueueKey, StageKind, UnknownOperation,
        UnknownQueue, WorkerId, WorkerPattern,
    },
    OPERATIONS_PER_LOCK, SharedQueue,
};

/// How often workers are looked at that somebody waits for until they have ended what they execute.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

impl SharedQueue {
    pub(in crate::scheduler) fn kill_operation(
        &self,
        operation: Uuid,
        response: Arc<EncodedResponse>,
    ) -> Result<(Vec<Uuid>, usize), UnknownOperation> {
        self.decide(|queue, now| queue.kill_operation(now, operation, response))
    }

    pub(in crate::scheduler) fn kill_queued(
        &self,
        key: &SizeClassQueueKey,
        response: Arc<EncodedResponse>,
    ) -> Result<(), KillRefusal> {
        self.decide(|queue, now| queue.kill_queued(now, key, response))
    }

    pub(in crate::scheduler) fn add_drain(&self, drain: Drain) -> Result<(), DrainRefusal> {
        let key = drain.key.clone();
        self.decide(|queue, _| queue.add_drain(drain))?;
        self.apply_drains(&key);
        Ok(())
    }

    /// Piece by piece, so that nobody waits for long.
    fn apply_drains(&self, key: &SizeClassQueueKey) {
        let mut last = None;
        loop {
            last = self.decide(|queue, now| queue.apply_drains(now, key, last.as_ref()));
            if last.is_none() {
                return;
            }
        }
    }

    pub(in crate::scheduler) fn remove_drain(
        &self,
        key: &SizeClassQueueKey,
        pattern: &WorkerPattern,
    ) -> Result<(), UnknownQueue> {
        self.decide(|queue, _| queue.remove_drain(key, pattern))?;
        self.apply_drains(key);
        Ok(())
    }

    /// The drains to keep for the next scheduler, with their version; each change is told.
    pub(in crate::scheduler) fn drains(&self) -> watch::Receiver<(u64, Vec<Drain>)> {
        self.drains.subscribe()
    }

    /// Workers that match take no new work; returns when what they execute now has ended.
    pub(in crate::scheduler) async fn terminate_workers(&self, pattern: &WorkerPattern) {
        let (mut executing, mut next) = (Vec::new(), Some(NextWorker::default()));
        while let Some(from) = next {
            next = self.decide(|queue, now| queue.terminate(now, pattern, from, &mut executing));
        }
        while !executing.is_empty() {
            tokio::time::sleep(LOOK_INTERVAL).await;
            let mut rest = Vec::new();
            for piece in executing.chunks(OPERATIONS_PER_LOCK) {
                let of_piece = piece.iter().copied();
                self.look(|queue| {
                    rest.extend(of_piece.filter(|worker| queue.is_executing(*worker)))
                });
                tokio::task::yield_now().await;
            }
            executing = rest;
        }
    }

    /// Those that were told to terminate.
    pub(in crate::scheduler) async fn terminating_workers(&self) -> Vec<WorkerId> {
        let (mut ids, mut next) = (Vec::new(), Some(NextWorker::default()));
        while let Some(from) = next {
            let piece;
            (piece, next) = self.look(|queue| queue.terminating_workers(from));
            ids.extend(piece);
            tokio::task::yield_now().await;
        }
        ids
    }

    /// `None` when there is no such operation.
    pub(in crate::scheduler) fn explain(&self, operation: Uuid) -> Option<Explanation> {
        self.look_now(|queue, now| queue.explain(now, operation))
    }

    /// The oldest operations at a stage, oldest first, and how many there are. The queue is looked at piece
    /// by piece, as in `list_operations`.
    pub(in crate::scheduler) async fn oldest_operations(
        &self,
        stage: Option<StageKind>,
        limit: usize,
    ) -> (Vec<Uuid>, usize) {
        // The youngest of them is the first to go.
        let mut oldest = std::collections::BinaryHeap::new();
        let (mut total, mut last) = (0, None);
        loop {
            let piece: Vec<_> =
                self.look(|queue| queue.ages(last).take(OPERATIONS_PER_LOCK).collect());
            let Some((end, ..)) = piece.last() else {
                break;
            };
            last = Some(*end);
            for (name, queued, of) in piece {
                if stage.is_none_or(|stage| stage == of) {
                    total += 1;
                    oldest.push((queued, name));
                    if oldest.len() > limit {
                        oldest.pop();
                    }
                }
            }
            tokio::task::yield_now().await;
        }
        let oldest = oldest.into_sorted_vec().into_iter();
        (oldest.map(|(_, name)| name).collect(), total)
    }

    /// Operations by name, from the first one after `after`. The queue is looked at piece by piece, so
    /// that nobody waits for long.
    pub(in crate::scheduler) async fn list_operations(
        &self,
        after: Option<Uuid>,
        filter: &OperationFilter,
        page_size: usize,
    ) -> ListPage<OperationRow> {
        if *filter == OperationFilter::default() {
            let (start_index, total) = self.look(|queue| queue.place_of(after));
            let (mut rows, mut last) = (Vec::new(), after);
            while rows.len() < page_size {
                let more = (page_size - rows.len()).min(OPERATIONS_PER_LOCK);
                let from = last;
                let piece: Vec<OperationRow> =
                    self.look(|queue| queue.operations(from).take(more).collect());
                let Some(end) = piece.last() else {
                    break;
                };
                last = Some(end.name);
                rows.extend(piece);
                tokio::task::yield_now().await;
            }
            return ListPage {
                rows,
                start_index,
                total,
            };
        }
        let mut page = ListPage {
            rows: Vec::new(),
            start_index: 0,
            total: 0,
        };
        let mut last = None;
        loop {
            let rows: Vec<_> =
                self.look(|queue| queue.operations(last).take(OPERATIONS_PER_LOCK).collect());
            let Some(end) = rows.last().map(|row| row.name) else {
                return page;
            };
            last = Some(end);
            for row in rows.into_iter().filter(|row| filter.admits(row)) {
                page.total += 1;
                if after.is_some_and(|after| row.name <= after) {
                    page.start_index += 1;
                } else if page.rows.len() < page_size {
                    page.rows.push(row);
                }
            }
            tokio::task::yield_now().await;
        }
    }
}
