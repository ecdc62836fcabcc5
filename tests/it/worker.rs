//! What a worker promises, on real file systems, with a real store.

mod distinct;
mod farm;
mod faults;
mod inputs;
mod outputs;
mod results;
mod roots;
mod tamper;
mod verification;
