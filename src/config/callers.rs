//! Of bb_scheduler.toml: how fast each caller may ask.

#![expect(
    missing_docs,
    reason = "keys are described in bb_scheduler.toml(5), as a test sees to"
)]

use serde::{Deserialize, Serialize};

use super::{Diagnostics, Size};

/// What one caller may do in a second, on each listener; 0 for as much as it likes.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Callers {
    pub requests_per_second: u64,
    /// Of messages, in both directions.
    pub bytes_per_second: Size,
}

impl Default for Callers {
    fn default() -> Self {
        Callers {
            requests_per_second: 0,
            bytes_per_second: Size(0),
        }
    }
}

impl Callers {
    pub(super) fn validate(&self, diagnostics: &mut Diagnostics) {
        let bytes = self.bytes_per_second;
        diagnostics.require(
            bytes == Size(0) || bytes >= Size::mib(1),
            "callers.bytes_per_second",
            "with less than 1MiB no build would go on; write \"100MiB\", or \"0\" for no limit",
        );
    }
}
