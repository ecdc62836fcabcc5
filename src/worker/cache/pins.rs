//! Who holds files of the cache: actions that need them, kept input roots that link them, and
//! whoever is changing them.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::{Busy, Cache, Key, State};
use crate::worker::lru::Handle;

/// A link to a file of the cache.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    pub inode: u64,
    pub(super) handle: Handle,
}

/// Links in an input root, each of which pins its file.
pub struct Links {
    pub(super) cache: Arc<Cache>,
    pub of: Vec<Link>,
}

impl Links {
    /// These alone; the others are let go of with what is returned.
    pub fn part(&self, of: Vec<Link>) -> Self {
        Links {
            cache: self.cache.clone(),
            of,
        }
    }
}

impl Drop for Links {
    fn drop(&mut self) {
        if !self.of.is_empty() {
            let mut state = self.cache.state.lock();
            for link in &self.of {
                state.kept.unpin(link.handle);
            }
        }
    }
}

/// Files that are not evicted for as long as this lives.
pub struct Pins {
    pub(super) cache: Arc<Cache>,
    pub(super) handles: Vec<Handle>,
}

impl Drop for Pins {
    fn drop(&mut self) {
        let mut state = self.cache.state.lock();
        for handle in &self.handles {
            state.kept.unpin(*handle);
        }
        drop(state);
        let over = self.cache.is_over();
        if over && let Ok(runtime) = tokio::runtime::Handle::try_current() {
            let cache = self.cache.clone();
            runtime.spawn_blocking(move || cache.make_fit());
        }
    }
}

/// Keys that we change; others wait for us.
pub(super) struct Claim<'a> {
    cache: &'a Cache,
    pub(super) number: u64,
    pub(super) keys: Vec<Key>,
    done: CancellationToken,
}

impl<'a> Claim<'a> {
    pub(super) fn new(cache: &'a Cache) -> Self {
        let mut state = cache.state.lock();
        state.claims += 1;
        Claim {
            cache,
            number: state.claims,
            keys: Vec::new(),
            done: CancellationToken::new(),
        }
    }

    pub(super) fn add(&mut self, state: &mut State, key: Key) {
        let busy = Busy {
            claim: self.number,
            done: self.done.clone(),
        };
        state.busy.insert(key, busy);
        self.keys.push(key);
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        if !self.keys.is_empty() {
            let mut state = self.cache.state.lock();
            for key in &self.keys {
                state.busy.remove(key);
            }
        }
        self.done.cancel();
    }
}
