//! Outputs: what a command left at the places that it declared.
//!
//! Runs after the last process of the action is gone, so nothing changes under it. What it finds
//! is hostile all the same: links, FIFOs, depth, names, sizes, numbers.
//!
//! 1. Nothing outside of the root is read (`beneath`).
//! 2. The first fault is kept, and the rest collected nevertheless, unless a bound is reached
//!    (`bounds`).
//! 3. Blobs leave in batches of bounded size while collecting goes on.
//! 4. Each inode is read once; small files are uploaded from memory, large ones that lie together are
//!    hashed by several threads (`files`).
//!
//! To be read in this order: `collect` is the whole; `collector` is what it works with; `directory` and
//! `files` read; `hashing` tells digests, `node_properties` modes and
//! times; `bounds` say when it is enough.

mod bounds;
mod collect;
mod collector;
mod directory;
mod files;
mod hashing;
mod node_properties;

pub use bounds::{OutputLimits, late};
pub use collector::{CollectedOutputs, Collector, ToldOfOutputs};
