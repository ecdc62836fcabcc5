//! Who comes first, PURE: the only place where the order of operations, and of workers, is decided.
//!
//! Each size-class queue has a tree of *invocations*: a node for each key of each level. Operations are
//! queued at the node of their keys. A free worker goes from the root down: what is queued at a node
//! itself goes first; else it goes to the child that has the least of
//! (workers that execute for it + 1) · 2^(its most urgent priority / 100), and of equal ones to that
//! which was served least recently, unless the worker sticks to one of them.
//!
//! 1. A node exists while it or one below it has an operation, or a worker that last worked for it.
//! 2. A child is among its parent's `ready` exactly while something is queued in it or below it, under
//!    its present score; and among its `idle` exactly while an idle worker waits there.
//! 3. A worker that executes for several operations counts once at each node above them.

mod node;

use std::collections::BTreeMap;

pub(super) use node::{Invocation, Position};

use super::{
    InvocationKey, InvocationKeys,
    arena::{Arena, InvocationNumber, OperationNumber, QueueNumber, WorkerNumber},
    report::CallNumber,
};

/// What has happened to the invocations of one depth of a tree; the root's depth is 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InvocationCounts {
    pub created: u64,
    /// From now on something of it is queued or executed.
    pub activated: u64,
    pub deactivated: u64,
    pub removed: u64,
}

impl InvocationCounts {
    /// Adds those of each depth to those of the same depth.
    pub(super) fn add_each(sums: &mut Vec<Self>, counts: &[Self]) {
        if sums.len() < counts.len() {
            sums.resize(counts.len(), Self::default());
        }
        for (sum, more) in sums.iter_mut().zip(counts) {
            sum.created += more.created;
            sum.activated += more.activated;
            sum.deactivated += more.deactivated;
            sum.removed += more.removed;
        }
    }
}

/// The trees of all size-class queues.
#[derive(Default)]
pub(super) struct Invocations {
    nodes: Arena<InvocationNumber, Invocation>,
    /// Of each tree, by depth.
    counts: BTreeMap<QueueNumber, Vec<InvocationCounts>>,
    /// Orders the times at which nodes were served.
    served: u64,
}

impl Invocations {
    pub(super) fn insert_root(&mut self, queue: QueueNumber) -> InvocationNumber {
        let root = Invocation::new(queue, None, InvocationKeys::default());
        let number = self.nodes.insert(root);
        self.hold(number);
        count(&mut self.counts, queue, 0).created += 1;
        number
    }

    /// What has happened in a queue's tree, by depth.
    pub(super) fn counts(&self, queue: QueueNumber) -> &[InvocationCounts] {
        self.counts.get(&queue).map_or(&[], Vec::as_slice)
    }

    /// The same in each tree.
    pub(super) fn all_counts(&self) -> impl Iterator<Item = (QueueNumber, &[InvocationCounts])> {
        self.counts
            .iter()
            .map(|(queue, counts)| (*queue, counts.as_slice()))
    }

    pub(super) fn get(&self, number: InvocationNumber) -> &Invocation {
        &self.nodes[number]
    }

    pub(super) fn len(&self) -> usize {
        self.nodes.len()
    }

    /// The node of these keys; or, where there may be no more nodes, one above it.
    pub(super) fn find_or_insert(
        &mut self,
        root: InvocationNumber,
        keys: &InvocationKeys,
        limit: usize,
    ) -> InvocationNumber {
        let mut at = root;
        for (level, key) in keys.as_slice().iter().enumerate() {
            if let Some(child) = self.nodes[at].children.get(key) {
                at = *child;
                continue;
            }
            if self.nodes.len() >= limit {
                break;
            }
            let above = &keys.as_slice()[..=level];
            let keys = match above.len() == keys.as_slice().len() {
                true => keys.clone(),
                false => InvocationKeys::new(above.iter().cloned()),
            };
            let queue = self.nodes[at].queue;
            let child = Invocation::new(queue, Some(at), keys);
            let child = self.nodes.insert(child);
            count(&mut self.counts, queue, level + 1).created += 1;
            self.nodes[at].children.insert(key.clone(), child);
            at = child;
        }
        at
    }

    pub(super) fn find(
        &self,
        root: InvocationNumber,
        keys: &InvocationKeys,
    ) -> Option<InvocationNumber> {
        let mut keys = keys.as_slice().iter();
        keys.try_fold(root, |at, key| self.nodes[at].children.get(key).copied())
    }

    /// Something names the node: it stays until `release`.
    pub(super) fn hold(&mut self, number: InvocationNumber) {
        self.nodes[number].held += 1;
    }

    pub(super) fn release(&mut self, number: InvocationNumber) {
        self.nodes[number].held -= 1;
        self.remove_unused(number);
    }

    /// A node that was found but is not held may go again.
    pub(super) fn remove_unused(&mut self, number: InvocationNumber) {
        let mut at = Some(number);
        while let Some(number) = at {
            let node = &self.nodes[number];
            if node.held > 0 || !node.children.is_empty() {
                return;
            }
            let node = self.nodes.remove(number);
            at = node.parent;
            if let (Some(parent), Some(key)) = (node.parent, node.keys.as_slice().last()) {
                self.nodes[parent].children.remove(key);
                count(&mut self.counts, node.queue, node.depth()).removed += 1;
            } else {
                self.counts.remove(&node.queue);
            }
        }
    }

    /// Changes a node, then those above it, and puts each where it now belongs.
    fn change(&mut self, from: InvocationNumber, mut change: impl FnMut(&mut Invocation, bool)) {
        let (mut at, mut first) = (from, true);
        loop {
            let node = &mut self.nodes[at];
            let before = node.is_active();
            change(node, first);
            match (before, node.is_active()) {
                (false, true) => count(&mut self.counts, node.queue, node.depth()).activated += 1,
                (true, false) => count(&mut self.counts, node.queue, node.depth()).deactivated += 1,
                _ => {}
            }
            let Some(parent) = node.parent else {
                return;
            };
            let (ready, idle) = (node.ready_place(), node.idle_place());
            let old_ready = std::mem::replace(&mut node.ready_at, ready);
            let old_idle = std::mem::replace(&mut node.idle_at, idle);
            let above = &mut self.nodes[parent];
            if old_ready != ready {
                if let Some(place) = old_ready {
                    above.ready.remove(&(place, at));
                }
                if let Some(place) = ready {
                    above.ready.insert((place, at));
                }
            }
            if old_idle != idle {
                if let Some(place) = old_idle {
                    above.idle.remove(&(place, at));
                }
                if let Some(place) = idle {
                    above.idle.insert((place, at));
                }
            }
            (at, first) = (parent, false);
        }
    }

    pub(super) fn enqueue(&mut self, number: InvocationNumber, position: Position) {
        self.change(number, |node, itself| {
            if itself {
                node.queued.insert(position);
            }
            *node.priorities.entry(position.priority).or_insert(0) += 1;
            node.queued_in_all += 1;
        });
    }

    pub(super) fn dequeue(&mut self, number: InvocationNumber, position: Position) {
        self.change(number, |node, itself| {
            if itself {
                let was = node.queued.remove(&position);
                debug_assert!(was, "an operation is queued elsewhere");
            }
            if let Some(count) = node.priorities.get_mut(&position.priority) {
                *count -= 1;
                if *count == 0 {
                    node.priorities.remove(&position.priority);
                }
            }
            node.queued_in_all -= 1;
        });
    }

    /// A worker executes for the node.
    pub(super) fn start(&mut self, number: InvocationNumber, worker: WorkerNumber) {
        self.served += 1;
        let served = self.served;
        self.change(number, |node, _| {
            *node.executing.entry(worker).or_insert(0) += 1;
            node.served = served;
        });
    }

    pub(super) fn stop(&mut self, number: InvocationNumber, worker: WorkerNumber) {
        self.change(number, |node, _| {
            if let Some(count) = node.executing.get_mut(&worker) {
                *count -= 1;
                if *count == 0 {
                    node.executing.remove(&worker);
                }
            }
        });
    }

    /// A worker that last worked for the node waits for work.
    pub(super) fn insert_idle(
        &mut self,
        number: InvocationNumber,
        call: CallNumber,
        worker: WorkerNumber,
    ) {
        self.change(number, |node, itself| {
            if itself {
                node.idle_synchronizing.insert(call, worker);
            }
            node.idle_in_all += 1;
        });
    }

    pub(super) fn remove_idle(&mut self, number: InvocationNumber, call: CallNumber) {
        self.change(number, |node, itself| {
            if itself {
                let was = node.idle_synchronizing.remove(&call);
                debug_assert!(was.is_some(), "a worker waits elsewhere");
            }
            node.idle_in_all -= 1;
        });
    }

    /// A worker that is not busy last worked for the node; or not any more.
    pub(super) fn count_idle(&mut self, number: InvocationNumber, more: bool) {
        let mut at = Some(number);
        while let Some(number) = at {
            let node = &mut self.nodes[number];
            match more {
                true => node.idle_workers += 1,
                false => node.idle_workers -= 1,
            }
            at = node.parent;
        }
    }

    /// What a free worker is to do. `sticks_to` has, for each level, the node that the worker worked for
    /// and whether it prefers that one still.
    pub(super) fn pick(
        &self,
        root: InvocationNumber,
        sticks_to: &[(InvocationNumber, bool)],
    ) -> Option<OperationNumber> {
        let mut at = root;
        let mut former = sticks_to.iter();
        loop {
            let node = &self.nodes[at];
            if let Some(first) = node.queued.first() {
                return Some(first.operation);
            }
            let (best, mut next) = *node.ready.first()?;
            let preferred = former.next();
            if let Some((preferred, true)) = preferred
                && let Some(Invocation {
                    ready_at: Some(place),
                    ..
                }) = self.nodes.get(*preferred)
                && place.score == best.score
            {
                next = *preferred;
            }
            if preferred.is_none_or(|(preferred, _)| *preferred != next) {
                former = [].iter();
            }
            at = next;
        }
    }

    /// The worker that is to take work of the node: one that last worked for it, or for the nearest;
    /// of those the one that called last, whose caches are warmest. Where several are as near, one of
    /// the invocation that has the least use of workers.
    pub(super) fn idle_worker(&self, number: InvocationNumber) -> Option<WorkerNumber> {
        let mut near = number;
        while self.nodes[near].idle_in_all == 0 {
            near = self.nodes[near].parent?;
        }
        loop {
            let node = &self.nodes[near];
            if let Some((_, worker)) = node.idle_synchronizing.last_key_value() {
                return Some(*worker);
            }
            near = node.idle.first()?.1;
        }
    }

    /// From the outermost key on.
    pub(super) fn path(&self, number: InvocationNumber) -> Vec<InvocationNumber> {
        let mut path = Vec::new();
        let mut at = number;
        while let Some(parent) = self.nodes[at].parent {
            path.push(at);
            at = parent;
        }
        path.reverse();
        path
    }

    /// The innermost node that both are in.
    pub(super) fn common(
        &self,
        one: InvocationNumber,
        other: InvocationNumber,
    ) -> InvocationNumber {
        let depth = |number: InvocationNumber| self.nodes[number].depth();
        let (mut one, mut other) = (one, other);
        while one != other {
            let deeper = match depth(one) >= depth(other) {
                true => &mut one,
                false => &mut other,
            };
            match self.nodes[*deeper].parent {
                Some(parent) => *deeper = parent,
                None => break,
            }
        }
        one
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (InvocationNumber, &Invocation)> {
        self.nodes.iter()
    }

    /// The children of a node, by their keys.
    pub(super) fn children(
        &self,
        number: InvocationNumber,
    ) -> &BTreeMap<InvocationKey, InvocationNumber> {
        &self.nodes[number].children
    }
}

fn count(
    counts: &mut BTreeMap<QueueNumber, Vec<InvocationCounts>>,
    queue: QueueNumber,
    depth: usize,
) -> &mut InvocationCounts {
    let of = counts.entry(queue).or_default();
    if of.len() <= depth {
        of.resize(depth + 1, InvocationCounts::default());
    }
    &mut of[depth]
}
