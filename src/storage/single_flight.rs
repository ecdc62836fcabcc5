//! Single flight: whoever asks for what somebody is already fetching waits for that one.
//!
//! 1. A key has one leader at a time.
//! 2. A follower gets what its leader finished with, or learns that its leader gave up.
//! 3. Who keeps results must keep them before the leader is dropped, and look for them under the lock
//!    under which he joins: then nothing is fetched twice.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Arc, OnceLock},
};

use parking_lot::Mutex;
use tokio::sync::Notify;

type Flights<K, V> = Arc<Mutex<HashMap<K, Arc<Flight<V>>>>>;

/// A fetch that several wait for. There is one for each small blob, so that it is small, too.
struct Flight<V> {
    /// `None` when the leader gave up.
    result: OnceLock<Option<V>>,
    ended: Notify,
}

impl<V> Flight<V> {
    /// Only the first result counts.
    fn end(&self, result: Option<V>) {
        if self.result.set(result).is_ok() {
            self.ended.notify_waiters();
        }
    }
}

/// What is being fetched.
pub struct SingleFlight<K, V>(Flights<K, V>);

/// Who fetches what several ask for.
pub enum Role<K: Eq + Hash, V> {
    /// Nobody else fetches it.
    Leader(Leader<K, V>),
    /// Waits for the leader's result.
    Follower(Follower<V>),
}

/// Whoever fetches. Dropped without having finished, its followers must see for themselves.
pub struct Leader<K: Eq + Hash, V> {
    flights: Flights<K, V>,
    key: K,
    flight: Arc<Flight<V>>,
}

/// Whoever waits for a leader.
pub struct Follower<V>(Arc<Flight<V>>);

impl<K, V> Default for SingleFlight<K, V> {
    fn default() -> Self {
        SingleFlight(Arc::default())
    }
}

impl<K: Clone + Eq + Hash, V: Clone> SingleFlight<K, V> {
    /// Makes the first who asks for a key its leader, and others followers.
    pub fn join(&self, key: K) -> Role<K, V> {
        let mut flights = self.0.lock();
        if let Some(flight) = flights.get(&key) {
            return Role::Follower(Follower(flight.clone()));
        }
        let flight = Arc::new(Flight {
            result: OnceLock::new(),
            ended: Notify::new(),
        });
        flights.insert(key.clone(), flight.clone());
        Role::Leader(Leader {
            flights: self.0.clone(),
            key,
            flight,
        })
    }
}

impl<K: Eq + Hash, V: Clone> Leader<K, V> {
    /// What is to be fetched.
    pub fn key(&self) -> &K {
        &self.key
    }

    /// For a leader that takes its own result in the way of all others.
    pub fn follower(&self) -> Follower<V> {
        Follower(self.flight.clone())
    }

    /// Gives the result to all followers.
    pub fn finish(self, result: V) {
        self.flight.end(Some(result));
    }
}

impl<K: Eq + Hash, V> Drop for Leader<K, V> {
    fn drop(&mut self) {
        self.flights.lock().remove(&self.key);
        self.flight.end(None);
    }
}

impl<V: Clone> Follower<V> {
    /// `None` when the leader gave up.
    pub async fn result(self) -> Option<V> {
        if let Some(result) = self.0.result.get() {
            return result.clone();
        }
        let ended = self.0.ended.notified();
        let mut ended = std::pin::pin!(ended);
        // From here on, whoever ends it is heard.
        ended.as_mut().enable();
        if self.0.result.get().is_none() {
            ended.await;
        }
        self.0.result.get().cloned().flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn followers_share_their_leader_s_result_and_learn_when_there_is_none() {
        let flights = SingleFlight::default();
        let join = || flights.join("blob");
        let Role::Leader(leader) = join() else {
            panic!("the first is the leader");
        };
        let Role::Follower(early) = join() else {
            panic!("the second is a follower");
        };
        leader.finish("x");
        assert_eq!(early.result().await, Some("x"));
        let Role::Leader(leader) = join() else {
            panic!("a new flight");
        };
        let Role::Follower(abandoned) = join() else {
            panic!("its follower");
        };
        drop(leader);
        assert_eq!(abandoned.result().await, None);
        assert!(matches!(join(), Role::Leader(_)));
    }
}
