//! What the journal's entries are known by that people are alerted of (MESSAGE_ID of
//! systemd.journal-fields(7)): `journalctl -x` explains them, from packaging/bb-remote-execution.catalog.
//!
//! An event has one as its field `message_id`. Numbers stay what they are.

/// An operation failed for which neither its action nor its client is to blame.
pub const OPERATION_FAILED: &str = "5194ffffb88b457d9b21b513046c9ee3";
/// A worker fell silent, and is believed to be gone.
pub const WORKER_GONE: &str = "6d786b261a3e4344880852f9a7d056a6";
/// A runner is given no actions, since several failed in a row that are not to blame for it.
pub const OUT_OF_SERVICE: &str = "69f99660f1ec4f55a0c623e41db21c13";
/// A worker does not reach its scheduler.
pub const SCHEDULER_UNREACHABLE: &str = "282ea0c6f73343bb85faee90b63e0171";
/// The embedded store had a blob whose content was not what it should be.
pub const BLOB_DAMAGED: &str = "3fbcb808120e4c38bab35d5f7e6f0e1d";
/// Processes of an action could not be killed.
pub const UNKILLABLE: &str = "c857bf59ffb946e78d0c627237c105e0";
/// The scheduler found a defect of its own.
pub const BROKEN_INVARIANT: &str = "58daa28bdc434a1b8a22b3f11adbd050";

/// All of them.
pub(super) const ALL: [&str; 7] = [
    OPERATION_FAILED,
    WORKER_GONE,
    OUT_OF_SERVICE,
    SCHEDULER_UNREACHABLE,
    BLOB_DAMAGED,
    UNKILLABLE,
    BROKEN_INVARIANT,
];
