//! Of bb_scheduler.toml: where its pages are served.

#![expect(
    missing_docs,
    reason = "keys are described in bb_scheduler.toml(5), as a test sees to"
)]

use serde::{Deserialize, Serialize};

use super::{Diagnostics, ListenAddress, tls::ServerTls};

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Web {
    /// Ignored for a socket that systemd passes under the name `web`.
    pub listen: ListenAddress,
    /// As people reach the pages; empty for what follows from `listen`.
    pub url: String,
    pub tls: ServerTls,
}

impl Default for Web {
    fn default() -> Self {
        Web {
            listen: ListenAddress::Tcp(([127, 0, 0, 1], 7982).into()),
            url: String::new(),
            tls: ServerTls::default(),
        }
    }
}

impl Web {
    pub(super) fn check(&self, diagnostics: &mut Diagnostics) {
        self.tls.validate("web.tls", diagnostics);
        diagnostics.require(
            self.url.is_empty() || is_base_url(&self.url),
            "web.url",
            "it must begin with http:// or https://, such as \"https://farm.example/\", or be empty",
        );
    }
}

/// Whether others can be sent there, with a path behind it.
pub(super) fn is_base_url(text: &str) -> bool {
    let ends = |c: char| c.is_control() || c.is_whitespace() || matches!(c, '?' | '#' | '"');
    let rest = ["http://", "https://"]
        .iter()
        .find_map(|scheme| text.strip_prefix(scheme));
    rest.is_some_and(|rest| !rest.is_empty() && !rest.starts_with('/') && !text.contains(ends))
}
