//! What `--check` tells: what was tried, and what is wrong.

use std::fmt::Display;

use super::Failure;

/// What was tried, and what is wrong.
#[derive(Debug, Default)]
pub struct CheckReport {
    pub(super) good: Vec<String>,
    pub(super) notes: Vec<String>,
    pub(super) failures: Vec<Failure>,
}

impl CheckReport {
    /// Tells of something that was tried, and works.
    pub fn good(&mut self, what: impl Display) {
        self.good.push(what.to_string());
    }

    /// Worth knowing, but right.
    pub fn note(&mut self, what: impl Display) {
        self.notes.push(what.to_string());
    }

    /// Tells of something that was tried, and does not work.
    pub fn fail(&mut self, failure: Failure) {
        self.failures.push(failure);
    }

    /// What does not work, in the order in which it was tried.
    pub fn failures(&self) -> &[Failure] {
        &self.failures
    }

    /// That there is nothing else to say, if nothing failed.
    pub fn record(&mut self, what: impl Display, failures: impl IntoIterator<Item = Failure>) {
        let known = self.failures.len();
        self.failures.extend(failures);
        if self.failures.len() == known {
            self.good(what);
        }
    }
}
