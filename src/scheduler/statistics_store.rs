//! What earlier executions came to, from storage and back.
//!
//! 1. Statistics are read before an action is queued, and written some time after it has ended
//!    (write-behind): nobody waits for a write, and what changes often is written seldom.
//! 2. Each key has one writer, which writes what is known by then: no update undoes another one.
//! 3. No more keys are held than `MAXIMUM_HANDLES`. Those that need not be written go first; while
//!    storage takes nothing and all need to be, what further actions come to is not learnt.
//! 4. Nothing fails because of statistics. What cannot be read or parsed is told in the log. An action
//!    whose statistics cannot be read has none, and none are written for it, since that would undo
//!    what is there; those that cannot be parsed are replaced.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use futures::{StreamExt, stream};
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::size_class::{Statistics, StatisticsKey, StatisticsUpdate};
use crate::{
    daemon::LogRateLimit,
    storage::{
        InitialSizeClassCache,
        single_flight::{Role, SingleFlight},
    },
};

/// Each of some kilobytes.
const MAXIMUM_HANDLES: usize = 10_000;
/// Larger ones are no statistics of ours.
const MAXIMUM_SIZE: usize = 1 << 20;
/// How long storage has for one of them, and an action waits for its.
const STORAGE_TIMEOUT: Duration = Duration::from_secs(2);
/// From an update to its write: executions of one build are written together.
const WRITE_DELAY: Duration = Duration::from_secs(1);
/// After a failed write.
const RETRY_DELAY: Duration = Duration::from_secs(10);
const CONCURRENT_WRITES: usize = 16;

/// Statistics of actions that are or were queued lately.
pub struct StatisticsStore {
    cache: InitialSizeClassCache,
    handles: Mutex<Handles>,
    reads: SingleFlight<StatisticsKey, Option<Arc<Statistics>>>,
    updated: Notify,
    refusals: LogRateLimit,
}

#[derive(Default)]
struct Handles {
    by_key: BTreeMap<StatisticsKey, StatisticsHandle>,
    /// Those that are not to be written, by their last use.
    clean: BTreeMap<u64, StatisticsKey>,
    /// Those that are, and are not being written.
    dirty: BTreeSet<StatisticsKey>,
    last_use: u64,
}

struct StatisticsHandle {
    known: Known,
    /// Its place in `clean`.
    used: u64,
    version: u64,
    written: u64,
}

enum Known {
    Statistics(Arc<Statistics>),
    /// They were forgotten while the action was queued; they are read again before they are written.
    Updates(Vec<(StatisticsUpdate, SystemTime)>),
}

impl StatisticsStore {
    /// Reads and writes this one.
    pub fn new(cache: InitialSizeClassCache) -> Arc<Self> {
        Arc::new(StatisticsStore {
            cache,
            handles: Mutex::default(),
            reads: SingleFlight::default(),
            updated: Notify::new(),
            refusals: LogRateLimit::new(5, Duration::from_secs(60)),
        })
    }

    /// `None` when they cannot be read now.
    pub async fn read(&self, key: &StatisticsKey) -> Option<Arc<Statistics>> {
        match tokio::time::timeout(STORAGE_TIMEOUT, self.read_slowly(key)).await {
            Ok(statistics) => statistics,
            Err(_) => {
                self.refuse("could not be read", key, &"storage is slow");
                None
            }
        }
    }

    async fn read_slowly(&self, key: &StatisticsKey) -> Option<Arc<Statistics>> {
        loop {
            if let Some(statistics) = self.handles.lock().get(key) {
                return Some(statistics);
            }
            match self.reads.join(key.clone()) {
                Role::Leader(leader) => {
                    let statistics = self.fetch(key).await;
                    let statistics =
                        statistics.map(|statistics| self.handles.lock().add(key, statistics));
                    leader.finish(statistics.clone());
                    return statistics;
                }
                Role::Follower(follower) => {
                    if let Some(statistics) = follower.result().await {
                        return statistics;
                    }
                }
            }
        }
    }

    async fn fetch(&self, key: &StatisticsKey) -> Option<Statistics> {
        let content = match self.cache.read(&key.instance, &key.reduced_action).await {
            Ok(None) => return Some(Statistics::default()),
            Ok(Some(content)) => content,
            Err(error) => {
                self.refuse("could not be read", key, &error);
                return None;
            }
        };
        if content.len() > MAXIMUM_SIZE {
            self.refuse("are replaced", key, &"they are larger than 1 MiB");
            return Some(Statistics::default());
        }
        Some(Statistics::decode(&content).unwrap_or_else(|error| {
            self.refuse("are replaced", key, &error);
            Statistics::default()
        }))
    }

    /// Remembers what an execution came to.
    pub fn apply(&self, update: StatisticsUpdate) {
        let key = update.key.clone();
        match self.handles.lock().apply(update, SystemTime::now()) {
            true => self.updated.notify_one(),
            false => self.refuse("are not updated", &key, &"storage does not keep up"),
        }
    }

    /// Writes, until it is dropped.
    pub async fn run(&self) {
        loop {
            self.updated.notified().await;
            tokio::time::sleep(WRITE_DELAY).await;
            while !self.write_all().await {
                tokio::time::sleep(RETRY_DELAY).await;
            }
        }
    }

    /// Writes all that is to be, once. False when some could not be written.
    pub async fn write_all(&self) -> bool {
        let dirty = self.handles.lock().take_dirty();
        let writes = stream::iter(dirty).map(|key| async move {
            let written = tokio::time::timeout(STORAGE_TIMEOUT, self.write(&key)).await;
            let written = written.unwrap_or_else(|_| {
                self.refuse("could not be written", &key, &"storage is slow");
                None
            });
            self.handles.lock().finish_write(&key, written)
        });
        let writes = writes.buffer_unordered(CONCURRENT_WRITES);
        let and = |all, written| std::future::ready(all && written);
        writes.fold(true, and).await
    }

    /// The version that has been written.
    async fn write(&self, key: &StatisticsKey) -> Option<u64> {
        self.read_slowly(key).await?;
        let (statistics, version) = self.handles.lock().version(key)?;
        let stats = statistics.to_proto();
        let written = self
            .cache
            .write(&key.instance, &key.reduced_action, stats)
            .await;
        match written {
            Ok(()) => Some(version),
            Err(error) => {
                self.refuse("could not be written", key, &error);
                None
            }
        }
    }

    fn refuse(&self, what: &str, key: &StatisticsKey, why: &dyn std::fmt::Display) {
        if let Some(suppressed) = self.refusals.admit(Instant::now()) {
            tracing::warn!(
                instance = %key.instance,
                reduced_action = %key.reduced_action,
                suppressed,
                "statistics of earlier executions {what}: {why}"
            );
        }
    }
}

impl Handles {
    fn get(&mut self, key: &StatisticsKey) -> Option<Arc<Statistics>> {
        let handle = self.by_key.get_mut(key)?;
        let Known::Statistics(statistics) = &handle.known else {
            return None;
        };
        let statistics = statistics.clone();
        if self.clean.remove(&handle.used).is_some() {
            self.last_use += 1;
            handle.used = self.last_use;
            self.clean.insert(handle.used, key.clone());
        }
        Some(statistics)
    }

    /// Adds what has been read, with what came meanwhile.
    fn add(&mut self, key: &StatisticsKey, statistics: Statistics) -> Arc<Statistics> {
        let mut statistics = Arc::new(statistics);
        if let Some(handle) = self.by_key.get_mut(key) {
            if let Known::Updates(updates) = &handle.known {
                for (update, time) in updates {
                    Arc::make_mut(&mut statistics).apply(update, *time);
                }
                handle.known = Known::Statistics(statistics.clone());
            }
            return statistics;
        }
        if self.make_room() {
            self.last_use += 1;
            self.clean.insert(self.last_use, key.clone());
            self.insert(key, Known::Statistics(statistics.clone()), self.last_use);
        }
        statistics
    }

    /// False when there is no room for it.
    fn apply(&mut self, update: StatisticsUpdate, now: SystemTime) -> bool {
        /// Of one key, while they wait for its statistics.
        const MAXIMUM_UPDATES: usize = 100;
        let key = update.key.clone();
        if !self.by_key.contains_key(&key) {
            if !self.make_room() {
                return false;
            }
            self.insert(&key, Known::Updates(Vec::new()), 0);
        }
        let Some(handle) = self.by_key.get_mut(&key) else {
            return false;
        };
        match &mut handle.known {
            Known::Statistics(statistics) => Arc::make_mut(statistics).apply(&update, now),
            Known::Updates(updates) if updates.len() < MAXIMUM_UPDATES => {
                updates.push((update, now));
            }
            Known::Updates(_) => return false,
        }
        // One that is being written stays out of `dirty` until that has ended.
        let idle = handle.version == handle.written;
        handle.version += 1;
        if idle {
            self.clean.remove(&handle.used);
            self.dirty.insert(key);
        }
        true
    }

    fn insert(&mut self, key: &StatisticsKey, known: Known, used: u64) {
        let handle = StatisticsHandle {
            known,
            used,
            version: 0,
            written: 0,
        };
        self.by_key.insert(key.clone(), handle);
    }

    fn make_room(&mut self) -> bool {
        if self.by_key.len() < MAXIMUM_HANDLES {
            return true;
        }
        match self.clean.pop_first() {
            Some((_, oldest)) => self.by_key.remove(&oldest).is_some(),
            None => false,
        }
    }

    fn take_dirty(&mut self) -> BTreeSet<StatisticsKey> {
        std::mem::take(&mut self.dirty)
    }

    fn version(&self, key: &StatisticsKey) -> Option<(Arc<Statistics>, u64)> {
        let handle = self.by_key.get(key)?;
        match &handle.known {
            Known::Statistics(statistics) => Some((statistics.clone(), handle.version)),
            Known::Updates(_) => None,
        }
    }

    /// Whether all of it has been written.
    fn finish_write(&mut self, key: &StatisticsKey, written: Option<u64>) -> bool {
        let Some(handle) = self.by_key.get_mut(key) else {
            return true;
        };
        handle.written = written.unwrap_or(handle.written);
        if handle.written < handle.version {
            self.dirty.insert(key.clone());
            return false;
        }
        self.last_use += 1;
        handle.used = self.last_use;
        self.clean.insert(handle.used, key.clone());
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::{Size, scheduler as config},
        digest::DigestFunction,
        instance::InstanceName,
        proto::reapi,
        scheduler::size_class::PreviousExecution,
        storage::Backend,
    };

    fn key(number: u64) -> StatisticsKey {
        StatisticsKey {
            instance: InstanceName::empty(),
            reduced_action: DigestFunction::Sha256.digest_of(&number.to_le_bytes()),
        }
    }

    fn update(key: StatisticsKey, seconds: u64) -> StatisticsUpdate {
        let duration = Duration::from_secs(seconds);
        StatisticsUpdate {
            key,
            executions: vec![(1, PreviousExecution::Succeeded(duration))],
            failed_on_largest: false,
            probabilities: Arc::default(),
            history_size: 32,
        }
    }

    fn embedded(directory: &std::path::Path) -> InitialSizeClassCache {
        let storage = config::Storage {
            embedded: config::Embedded {
                directory: directory.to_owned(),
                maximum_size: Size::mib(16),
                minimum_free: Size::mib(0),
                ..Default::default()
            },
            ..Default::default()
        };
        let backend = Backend::open(&storage, Default::default()).unwrap();
        InitialSizeClassCache::open(
            &config::StorageLocation::Embedded,
            &backend,
            &Default::default(),
        )
    }

    fn executions(statistics: &Statistics) -> usize {
        statistics.executions(1).len()
    }

    #[tokio::test]
    async fn statistics_survive_the_scheduler() {
        let directory = tempfile::tempdir().unwrap();
        {
            let store = StatisticsStore::new(embedded(directory.path()));
            assert!(store.read(&key(1)).await.unwrap().is_empty());
            for seconds in 0..3 {
                store.apply(update(key(1), seconds));
            }
            assert_eq!(executions(&store.read(&key(1)).await.unwrap()), 3);
            assert!(store.write_all().await);
        }
        let store = StatisticsStore::new(embedded(directory.path()));
        assert_eq!(executions(&store.read(&key(1)).await.unwrap()), 3);
        // Another instance has its own.
        let other = StatisticsKey::new(
            &InstanceName::parse("a").unwrap(),
            DigestFunction::Sha256,
            &reapi::Action::default(),
        );
        assert!(store.read(&other).await.unwrap().is_empty());
    }

    #[tokio::test]
    async fn what_was_forgotten_while_the_action_was_queued_is_read_again_before_it_is_written() {
        let directory = tempfile::tempdir().unwrap();
        let cache = embedded(directory.path());
        let store = StatisticsStore::new(cache.clone());
        store.apply(update(key(1), 1));
        assert!(store.write_all().await);
        // One that has not read it.
        let store = StatisticsStore::new(cache);
        store.apply(update(key(1), 2));
        assert!(store.write_all().await);
        assert_eq!(executions(&store.read(&key(1)).await.unwrap()), 2);
    }

    #[tokio::test]
    async fn no_more_is_held_than_is_bounded() {
        let directory = tempfile::tempdir().unwrap();
        let store = StatisticsStore::new(embedded(directory.path()));
        for number in 0..MAXIMUM_HANDLES as u64 + 100 {
            store.apply(update(key(number), 1));
        }
        assert_eq!(store.handles.lock().by_key.len(), MAXIMUM_HANDLES);
        assert!(store.write_all().await);
        for number in 0..100 {
            store.apply(update(key(1_000_000 + number), 1));
        }
        let handles = store.handles.lock();
        assert_eq!(handles.by_key.len(), MAXIMUM_HANDLES);
        assert_eq!(handles.clean.len() + handles.dirty.len(), MAXIMUM_HANDLES);
        assert_eq!(handles.dirty.len(), 100);
    }

    #[tokio::test]
    async fn what_is_torn_or_newer_is_absent_and_replaced() {
        use crate::proto::iscc;
        let directory = tempfile::tempdir().unwrap();
        let cache = embedded(directory.path());
        let newer = iscc::PerSizeClassStats {
            previous_executions: vec![iscc::PreviousExecution { outcome: None }],
            ..Default::default()
        };
        let newer = iscc::PreviousExecutionStats {
            size_classes: [(1, newer)].into(),
            ..Default::default()
        };
        let key = key(1);
        let written = cache.write(&key.instance, &key.reduced_action, newer);
        written.await.unwrap();
        let store = StatisticsStore::new(cache.clone());
        assert!(store.read(&key).await.unwrap().is_empty());
        store.apply(update(key.clone(), 1));
        assert!(store.write_all().await);
        let store = StatisticsStore::new(cache);
        assert_eq!(executions(&store.read(&key).await.unwrap()), 1);
    }

    #[tokio::test]
    async fn storage_that_does_not_answer_delays_an_action_a_little_and_loses_no_update() {
        let nobody = config::StorageLocation::Endpoint("grpc://127.0.0.1:1".parse().unwrap());
        let directory = tempfile::tempdir().unwrap();
        let InitialSizeClassCache::Embedded(store) = embedded(directory.path()) else {
            panic!("not embedded");
        };
        let cache =
            InitialSizeClassCache::open(&nobody, &Backend::Embedded(store), &Default::default());
        let store = StatisticsStore::new(cache);
        assert!(store.read(&key(1)).await.is_none());
        store.apply(update(key(1), 1));
        assert!(!store.write_all().await);
        assert_eq!(store.handles.lock().dirty.len(), 1);
    }
}
