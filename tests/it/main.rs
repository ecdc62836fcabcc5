//! One binary for all integration tests, so that there is one link.

mod simulation;
