//! The one integration binary.

#[path = "../harness/mod.rs"]
mod harness;

mod architecture;
mod bad_input;
mod documents;
mod farm;
mod storage;
mod wire;
//! One binary for all integration tests, so that there is one link.

mod simulation;
