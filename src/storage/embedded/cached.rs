//! Reads that wait for no disk, for threads that must not wait: of what is not there, and of small blobs that
//! the page cache has. `None` always means: ask where waiting is allowed. Handing a read to another thread and
//! waking up again costs more than the read itself.

use bytes::Bytes;

use super::{super::Error, SMALL, Store, action_results, key::IndexKey, segment::Read};
use crate::{digest::Digest, instance::InstanceName, proto::reapi::ActionResult};

impl Store {
    /// A whole blob of at most `limit` bytes.
    pub fn read_cached(&self, digest: &Digest, limit: u64) -> Option<Result<Bytes, Error>> {
        if digest.size() > limit.min(SMALL) || digest.is_empty_blob() {
            return None;
        }
        self.space.require_directory().ok()?;
        let content = match self.entry(digest) {
            // Not counted yet if it has to be waited for: then it is looked up again.
            Some(found) => Ok(self.space.content_there(&found, Read::Cached)?),
            None => Err(Error::Missing(vec![*digest])),
        };
        self.space.counts.looked_up(content.is_ok());
        Some(content)
    }

    /// What [`Store::action_result`] returns or, where the outputs are in another CAS,
    /// [`Store::unchecked_action_result`].
    pub fn cached_action_result(
        &self,
        instance: &InstanceName,
        action: &Digest,
        outputs_are_elsewhere: bool,
    ) -> Option<Result<Option<ActionResult>, Error>> {
        self.space.require_directory().ok()?;
        let key = IndexKey::action(instance, action);
        let Some(found) = self.space.index.peek(&key) else {
            return Some(Ok(None));
        };
        let content = self.space.content_there(&found, Read::Cached)?;
        let result = match action_results::decode(action, content) {
            Ok(result) => result,
            Err(error) => return Some(Err(error)),
        };
        // Whether those are complete is in Trees and Directories, which would be read.
        if !outputs_are_elsewhere && !result.output_directories.is_empty() {
            return None;
        }
        self.space.index.find(&key, self.space.now());
        let complete = outputs_are_elsewhere || self.is_complete(action.function(), &result);
        Some(Ok(complete.then_some(result)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::DigestFunction;

    const LIMIT: u64 = 1 << 20;

    fn blob(content: &'static [u8]) -> (Digest, Bytes) {
        let content = Bytes::from_static(content);
        (DigestFunction::Sha256.digest_of(&content), content)
    }

    #[test]
    fn what_is_not_there_is_told_at_once_and_what_was_just_written_is_read_at_once() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path(), 64 << 20).unwrap();
        let (kept, absent) = (blob(b"kept"), blob(b"absent"));
        assert!(store.put(std::slice::from_ref(&kept))[0].is_ok());

        // A file system without RWF_NOWAIT tells nothing, and waiting reads tell the same.
        if let Some(read) = store.read_cached(&kept.0, LIMIT) {
            assert_eq!(read.unwrap(), kept.1);
            let both = store.read_many_cached(&[kept.0, absent.0], LIMIT).unwrap();
            assert_eq!(both[0].as_ref().unwrap(), &kept.1);
            assert!(matches!(both[1], Err(Error::Missing(_))));
        }
        assert_eq!(store.read(&kept.0, LIMIT).unwrap(), kept.1);
        let missing = store.read_cached(&absent.0, LIMIT);
        assert!(matches!(missing, Some(Err(Error::Missing(digests))) if digests == [absent.0]));
        assert!(store.read_cached(&kept.0, 1).is_none());
    }

    #[test]
    fn a_damaged_blob_is_not_returned() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path(), 64 << 20).unwrap();
        let kept = blob(b"what will be damaged");
        assert!(store.put(std::slice::from_ref(&kept))[0].is_ok());
        for entry in walkdir::WalkDir::new(directory.path()) {
            let path = entry.unwrap().into_path();
            if path
                .extension()
                .is_some_and(|extension| extension == "data")
            {
                let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
                std::os::unix::fs::FileExt::write_all_at(&file, b"W", 0).unwrap();
            }
        }

        assert!(store.read_cached(&kept.0, LIMIT).is_none());
        assert!(matches!(store.read(&kept.0, LIMIT), Err(Error::Missing(_))));
        assert!(matches!(
            store.read_cached(&kept.0, LIMIT),
            Some(Err(Error::Missing(_)))
        ));
    }
}
