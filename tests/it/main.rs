//! The one integration binary.

#[path = "../harness/mod.rs"]
mod harness;

mod architecture;
mod bad_input;
mod documents;
mod farm;
mod simulation;
mod storage;
mod wire;
mod worker;
