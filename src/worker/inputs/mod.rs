//! Input roots: the directories that actions run in. Their cost follows what changed: the roots of
//! past actions are kept, and turned into those of the next ones.
//!
//! ```text
//! BUILD_DIRECTORY/N/               the action directory: the worker's, 0700. The runner opens it for
//!                                  the action's user while the action runs, and shuts it again
//! BUILD_DIRECTORY/N/root/          the input root; every directory in it is 0777, and the worker's unless
//!                                  its inputs are private
//! BUILD_DIRECTORY/N/tmp/           0777
//! BUILD_DIRECTORY/N/server_logs/   0777
//! BUILD_DIRECTORY/N/home/          0777; the action's $HOME
//! BUILD_DIRECTORY/N/std{out,err}   made by the runner
//! BUILD_DIRECTORY/stashed/         subtrees that no root has, for roots that will want them
//! BUILD_DIRECTORY/deleted/         what is to be removed, and what an earlier worker left
//! ```
//!
//! An action finds in its root what its Directory messages say, the directories that its declared outputs lie in, and
//! nothing else, and empty `tmp`, `home` and `server_logs`. That holds because of these:
//!
//! - I1 Files: an input file is the worker's and read-only: a reflink of a cached file or an empty one,
//!   made while no action can see it; or a hard link to a file of the cache, which was whole before it
//!   had a name. Files of private inputs are the action's own; their roots are never kept.
//! - I2 Credentials: actions run as users that are neither root nor the worker. When an action's
//!   output tells otherwise, all is thrown away, and nothing is kept for a while (`reuse_suspension`).
//! - I3 Directories: every directory of a root that is kept is the worker's, so that no action can change its
//!   owner or mode, nor choose its ctime; it may write to it because of its mode, behind the action directory. All directories of
//!   roots of private inputs belong to the action's user; these roots are never kept.
//! - I4 Nothing foreign stays: what an action made is removed before the next one gets the root.
//! - I5 No process: roots are cleaned while the action directory's lock is held, which the runner holds
//!   for as long as a process of the action lives (flock(2)). The directory then has another name, so
//!   that a call that arrives late at the runner finds nothing.
//! - I6 Baseline: a directory's ctime is looked at after the worker's last change to it.
//! - I7 Errors discard: after any error, a root and all that is known of it is thrown away.
//! - I8 Distinct: no two files of a root are one inode, so that programs find separate files whatever
//!   their content is. Reflinks and empty files are so by themselves. For hard links, a root knows which
//!   of the inodes of a cached file it links (`inode_allocator`), takes for one more occurrence the first one that
//!   it does not link, and the cache makes that when there is none. A subtree that leaves the
//!   root frees its inodes; one that comes into it brings its own along, and where the root links one
//!   of these already, that file is linked anew, to another inode, before the subtree is in its place.
//!   So what stays in a root is not looked at; what comes or goes costs some nanoseconds a file, and at
//!   most one link for each whose content the root has elsewhere: less than making the subtree.
//!
//! Roots of reflinks and roots of hard links do not become one another, nor lend one another
//! subtrees. Where actions are to have input files of their own, each root is made anew, of copies: then the
//! runner makes the action's user their owner, and nothing of the root is kept. So it is, too, where the client
//! gives inputs modes or times.
//!
//! Roots are cleaned in the background. How many are being cleaned is bounded; beyond that, actions
//! wait.
//!
//! To be read in this order:
//!
//! - `prepare` is the whole way from a task to its root.
//! - `directory_message` is a Directory message, `merkle_tree` a tree of them; `directory_cache` fetches them.
//! - `file_cache` has the input files. What is fetched for both is split into `batches`.
//! - `plan` says how one tree becomes another.
//! - `planned_root` chooses a root and has it laid out: `lay_out` performs the plan, `assign_inodes` gives each
//!   hard link an inode that the root does not link yet, as `inode_allocator` knows, and has `file_cache` create it; `set_node_properties` sets
//!   the modes and times that a client gives; `lay_out_counts` counts all that.
//! - `root_record` is what the worker knows of a root that it keeps.
//! - `input_root` is what an action has; `action_directory` is the directory around it.
//! - `worker_build_directory` is what roots share: it makes empty roots, decides which are kept, has used ones cleaned
//!   (`cleaning` makes a root what its record says), invalidates all, and waits for free space.
//! - `root_pool` has the roots that are idle, and in `subtree_stash` the subtrees that no root has; `deletion` removes
//!   what is thrown away.
//! - `ctime_resolution` and `reuse_suspension` tell whether roots may be kept, and `free_space_monitor` what
//!   is free: whether it suffices for a command to start, whether the disk was full while one ran, and which one has
//!   taken too much, by its `disk_usage`.

mod action_directory;
mod assign_inodes;
mod batches;
mod cleaning;
mod ctime_resolution;
mod deletion;
pub mod directory_cache;
pub mod directory_message;
mod disk_usage;
pub mod file_cache;
mod free_space_monitor;
mod inode_allocator;
mod input_root;
mod lay_out;
mod lay_out_counts;
pub mod merkle_tree;
mod plan;
mod planned_root;
mod prepare;
mod reuse_suspension;
mod root_pool;
mod root_record;
mod set_node_properties;
mod subtree_stash;
mod worker_build_directory;

pub use action_directory::LAST_PROCESS_TIMEOUT;
pub use input_root::InputRoot;
pub use planned_root::{PlannedRoot, PlannedRootError};
pub use prepare::InputRoots;
pub use worker_build_directory::WorkerBuildDirectory;
