//! The file cache: input files by digest, on local disk, from which the files of input roots are made.
//!
//! 1. It stays within its limits of bytes, of files, and of what its file system has free; only what
//!    is pinned may exceed them, and no single action is allowed to pin more than the limit.
//! 2. A pinned file is not evicted. Every file of an input root that has a record pins the cached file that it is made
//!    of, so that the inode number of what the root links is given to no other file, and blocks that are shared
//!    are counted. When evicting does not suffice, or roots have over half of the inodes,
//!    `WorkerBuildDirectory` is asked to let go of idle roots.
//! 3. A file is fetched once, however many actions ask for it at the same time.
//! 4. Whoever holds the lock of the index does no I/O; a key being fetched or evicted is in progress
//!    instead.
//! 5. A file that somebody else changed is removed and fetched again; whoever used it learns of it.
//! 6. No content is used that this worker has not read.
//! 7. Every inode counts: cached files, their extra inodes, and files with unshared inodes of roots that are kept.
//!
//! Locks are taken in this order: modifications, extra inodes, index.
//!
//! To be read in this order:
//!
//! - `key` identifies a file, and is its name on disk; `worker_files` makes files with the worker's owner, mode and
//!   mtime, knows them by these, and copies content, by reflink where the file system has them; `cache_directory` has the files of the cache on disk; `watch` hears of what others change there.
//! - `index` knows what is in the cache, and `input_file` what a file of an input root is made of.
//! - `cache` is what these make up, with its limits; `pins` keep files in it.
//! - `eviction` keeps the limits; `modifications` removes what others changed.
//! - `fetch` brings what is absent; `outputs` adds what actions made, of which `output_ownership` makes the worker the
//!   owner.
//! - `create_input_file` makes files of input roots from cached ones, and makes and removes extra inodes for that.
//! - `verification` reads what an earlier worker left before its first use, and all files again in the background; `cache_counts` counts that, and hits and misses.

mod cache;
mod cache_counts;
mod cache_directory;
mod create_input_file;
mod eviction;
mod fetch;
mod index;
mod input_file;
mod key;
mod modifications;
mod output_ownership;
mod outputs;
mod pins;
mod verification;
mod watch;
mod worker_files;

pub use cache::{CacheLimits, FileCache};
pub use create_input_file::{CreateError, CreateMode};
pub use eviction::MINIMUM_FREE_INODES;
pub use input_file::{InputFile, InputFileKind};
pub use key::FileKey;
pub use output_ownership::take_ownership;
pub use pins::{InputFiles, PinnedFiles};
pub use verification::{Portion, Verifier};
pub use worker_files::{MTIME, has_worker_attributes};
