//! Of bb_scheduler.toml: tokens that callers are known by.

#![expect(
    missing_docs,
    reason = "keys are described in bb_scheduler.toml(5), as a test sees to"
)]

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{Diagnostics, Duration};

/// JSON Web Tokens (RFC 7519); off without a set of keys.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Tokens {
    /// A JSON Web Key Set (RFC 7517).
    pub key_set: PathBuf,
    /// A token is for one of these.
    pub audiences: Vec<String>,
    /// Empty for whoever signs with one of the keys.
    pub issuers: Vec<String>,
    /// By how much clocks may differ.
    pub leeway: Duration,
}

impl Default for Tokens {
    fn default() -> Self {
        Tokens {
            key_set: PathBuf::new(),
            audiences: Vec::new(),
            issuers: Vec::new(),
            leeway: Duration::seconds(60),
        }
    }
}

impl Tokens {
    /// Whether any token counts.
    pub fn are_on(&self) -> bool {
        !self.key_set.as_os_str().is_empty()
    }

    pub fn validate(&self, diagnostics: &mut Diagnostics) {
        if !self.are_on() {
            diagnostics.require(
                self.audiences.is_empty() && self.issuers.is_empty(),
                // The one that somebody wrote.
                match self.audiences.is_empty() {
                    true => "tokens.issuers",
                    false => "tokens.audiences",
                },
                "without keys no token counts; write as tokens.key_set where the JSON Web Key Set of the issuer is",
            );
            return;
        }
        diagnostics.require(
            self.key_set.is_absolute(),
            "tokens.key_set",
            "the path must begin with /, since a daemon has no directory of its own to begin at",
        );
        diagnostics.require(
            !self.audiences.is_empty(),
            "tokens.key_set",
            "tokens that were issued for other services would count here; write what the aud of yours is as tokens.audiences",
        );
        diagnostics.require(
            self.leeway.get() <= std::time::Duration::from_secs(60 * 60),
            "tokens.leeway",
            "tokens would count for more than an hour too long; see to the clocks, and \"1m\" is a good start",
        );
    }
}
