//! Of bb_scheduler.toml: how much callers may ask for.

use serde::{Deserialize, Serialize};

use super::{Diagnostics, Size};

/// What callers may do on each listener.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Callers {
    /// Under way, of all of them together; 0 for what a quarter of the memory has room for.
    pub maximum_calls: u64,
    /// Of each; 0 for as much as it likes.
    pub requests_per_second: u64,
    /// Of each one's messages, in both directions; 0 for as much as it likes.
    pub bytes_per_second: Size,
}

impl Default for Callers {
    fn default() -> Self {
        Callers {
            maximum_calls: 0,
            requests_per_second: 0,
            bytes_per_second: Size(0),
        }
    }
}

impl Callers {
    pub(super) fn validate(&self, diagnostics: &mut Diagnostics) {
        diagnostics.require(
            self.maximum_calls == 0 || self.maximum_calls >= 1_000,
            "callers.maximum_calls",
            "each operation that a client waits for is a call, so that less than 1000 are not enough for a farm; 0 for what a quarter of the memory has room for",
        );
        let bytes = self.bytes_per_second;
        diagnostics.require(
            bytes == Size(0) || bytes >= Size::mib(1),
            "callers.bytes_per_second",
            "with less than 1MiB no build would go on; write \"100MiB\", or \"0\" for no limit",
        );
    }
}
