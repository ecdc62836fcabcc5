//! Modes and times of outputs, for clients that ask for them (REAPI: NodeProperties).
//!
//! 1. What is told of a file is what the command left: the mode of one that the worker has taken over is
//!    remembered from before.

use std::collections::HashMap;

use prost_types::Timestamp;
use rustix::fs::Stat;

use crate::{proto::reapi::NodeProperties, worker::command::NodePropertyKeys};

/// Device and inode number.
pub(super) type InodeId = (u64, u64);

/// The properties that are asked for, and those of files that are not any more what they were.
#[derive(Default)]
pub(super) struct OutputProperties {
    keys: NodePropertyKeys,
    before: HashMap<InodeId, NodeProperties>,
}

impl OutputProperties {
    pub(super) fn new(keys: NodePropertyKeys) -> Self {
        OutputProperties {
            keys,
            before: HashMap::new(),
        }
    }

    /// Whether any are asked for.
    pub(super) fn are_wanted(&self) -> bool {
        self.keys != NodePropertyKeys::default()
    }

    /// Before the worker changes a file.
    pub(super) fn remember(&mut self, inode: InodeId, stat: &Stat) {
        if self.are_wanted() {
            let told = tell(self.keys, stat);
            self.before.entry(inode).or_insert(told);
        }
    }

    /// `None` when none are asked for.
    pub(super) fn of(&self, stat: &Stat) -> Option<NodeProperties> {
        let before = || self.before.get(&(stat.st_dev, stat.st_ino)).cloned();
        self.are_wanted()
            .then(|| before().unwrap_or_else(|| tell(self.keys, stat)))
    }
}

fn tell(keys: NodePropertyKeys, stat: &Stat) -> NodeProperties {
    NodeProperties {
        properties: Vec::new(),
        mtime: keys.mtime.then_some(Timestamp {
            seconds: stat.st_mtime,
            nanos: stat.st_mtime_nsec as i32,
        }),
        unix_mode: keys.unix_mode.then_some(stat.st_mode & 0o7777),
    }
}
