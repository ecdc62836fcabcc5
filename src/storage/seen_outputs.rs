//! What a CAS elsewhere had a moment ago: results whose outputs were all there, and outputs.

use std::time::Duration;

use parking_lot::Mutex;

use super::recently::Recently;
use crate::{digest::Digest, instance::InstanceName};

/// How long what was seen is believed.
const SEEN_LIFETIME: Duration = Duration::from_secs(2);

/// Results, and outputs, that are remembered.
const MOST_RESULTS: usize = 20_000;
const MOST_OUTPUTS: usize = 100_000;

/// What a CAS had a moment ago.
#[derive(Debug)]
pub(super) struct SeenOutputs {
    /// By the digests of their messages.
    pub results: Mutex<Recently<(InstanceName, Digest)>>,
    pub blobs: Mutex<Recently<(InstanceName, Digest)>>,
}

impl Default for SeenOutputs {
    fn default() -> Self {
        SeenOutputs {
            results: Mutex::new(Recently::new(SEEN_LIFETIME, MOST_RESULTS)),
            blobs: Mutex::new(Recently::new(SEEN_LIFETIME, MOST_OUTPUTS)),
        }
    }
}

impl SeenOutputs {
    /// Something is gone that was there.
    pub(super) fn forget(&self) {
        self.results.lock().clear();
        self.blobs.lock().clear();
    }
}
