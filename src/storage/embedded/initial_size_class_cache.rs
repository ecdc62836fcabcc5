//! What earlier executions of actions came to. It is kept and evicted like a blob; a loss costs a few
//! executions on workers of another size.

use bytes::Bytes;
use prost::Message;

use super::{super::Error, Store, key::IndexKey, segment::NewContent};
use crate::{digest::Digest, instance::InstanceName, proto::iscc::PreviousExecutionStats};

impl Store {
    /// An encoded PreviousExecutionStats; `None` when there is none.
    pub fn previous_execution_stats(
        &self,
        instance: &InstanceName,
        reduced_action: &Digest,
    ) -> Option<Bytes> {
        let key = IndexKey::previous_execution_stats(instance, reduced_action);
        let found = self.space.index.find(&key, self.space.now())?;
        self.space.content(found)
    }

    /// In place of what was there.
    pub fn update_previous_execution_stats(
        &self,
        instance: &InstanceName,
        reduced_action: &Digest,
        stats: &PreviousExecutionStats,
    ) -> Result<(), Error> {
        self.space.store_small(&[NewContent {
            key: IndexKey::previous_execution_stats(instance, reduced_action),
            limit: self.limit_of(instance),
            content: Bytes::from(stats.encode_to_vec()),
        }])
    }
}
