//! Digests of files, one by one or several at a time.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    sync::atomic::{AtomicUsize, Ordering},
};

use super::bounds::ReadDeadline;
use crate::{
    digest::{Digest, DigestFunction},
    worker::fault::Fault,
};

/// Read at a time; a file of up to this size is in the buffer afterwards.
pub(super) const BUFFER: usize = 64 << 10;
const HASHING_THREADS: usize = 8;

/// Reads a file, and no more of it than its `size`. Tells its length too when all of it is in
/// `buffer`.
pub(super) fn hash(
    file: &File,
    size: u64,
    function: DigestFunction,
    time: ReadDeadline<'_>,
    buffer: &mut Vec<u8>,
) -> Result<(Digest, Option<usize>), Fault> {
    buffer.resize(BUFFER, 0);
    let mut hasher = function.hasher(size);
    let mut first = 0;
    loop {
        time.check()?;
        let at = hasher.size() + first as u64;
        let most = (size.saturating_sub(at)).min((BUFFER - first) as u64) as usize;
        let length = match file.read_at(&mut buffer[first..first + most], at) {
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(Fault::of_disk("read an output", error)),
        };
        // A buffer is hashed when it is full, so that a small file is still in it at the end.
        first += length;
        if length == 0 {
            break;
        }
        if first == BUFFER {
            hasher.update(buffer);
            first = 0;
        }
    }
    let whole = (hasher.size() == 0).then_some(first);
    hasher.update(&buffer[..first]);
    if hasher.size() < size {
        // It has become shorter, and its size may be part of its hash.
        return hash(file, hasher.size(), function, time, buffer);
    }
    Ok((hasher.finish(), whole))
}

/// Of files with their sizes, in their order; `None` for those that could not be read.
pub(super) fn hash_all(
    files: &[(&File, u64)],
    function: DigestFunction,
    time: ReadDeadline<'_>,
) -> Vec<Option<Digest>> {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get().min(HASHING_THREADS));
    let next = AtomicUsize::new(0);
    let work = || {
        let mut buffer = Vec::new();
        let mut digests = Vec::new();
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some((file, size)) = files.get(at) else {
                return digests;
            };
            let hashed = hash(file, *size, function, time, &mut buffer);
            digests.extend(hashed.ok().map(|(digest, _)| (at, digest)));
        }
    };
    let mut digests = vec![None; files.len()];
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads.min(files.len()))
            .map(|_| scope.spawn(work))
            .collect();
        let mut done = work();
        for other in others {
            done.extend(other.join().unwrap_or_default());
        }
        for (at, digest) in done {
            digests[at] = Some(digest);
        }
    });
    digests
}
