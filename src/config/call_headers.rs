//! Headers that a client shows in each call, in a configuration.

#![expect(
    missing_docs,
    reason = "keys are described in bb_scheduler.toml(5) and bb_worker.toml(5), as a test sees to"
)]

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::Diagnostics;

/// As Buildbarn's HeaderValues.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct MetadataHeader {
    pub header: String,
    pub values: Vec<String>,
}

/// What a section says of them.
#[derive(Clone, Copy, Debug)]
pub struct CallHeaders<'c> {
    /// The dotted keys of both.
    pub keys: [&'static str; 2],
    pub add_metadata: &'c [MetadataHeader],
    /// Of a file with a token; empty for none.
    pub authorization_file: &'c Path,
}

/// What gRPC says by itself, or HTTP/2 does not allow.
const RESERVED: [&str; 10] = [
    "connection",
    "content-length",
    "content-type",
    "host",
    "keep-alive",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];
/// All headers of a call are at most 16 KiB, of which a token may be 12.
const LARGEST: usize = 2 << 10;

impl CallHeaders<'_> {
    /// What no host is needed to find wrong.
    pub(super) fn validate(&self, diagnostics: &mut Diagnostics) {
        let [key, file_key] = self.keys;
        let has_file = !self.authorization_file.as_os_str().is_empty();
        diagnostics.require(
            !has_file || self.authorization_file.is_absolute(),
            file_key,
            "the path must begin with /, since a daemon has no directory of its own to begin at",
        );
        let mut size = 0;
        for MetadataHeader { header, values } in self.add_metadata {
            let is_word =
                |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-_.".contains(c);
            diagnostics.require(
            !header.is_empty() && header.chars().all(is_word),
            key,
            format!("{header:?} is no name of a header; it is of a-z, 0-9, -, _ and ., such as \"x-team\""),
        );
            diagnostics.require(
                !RESERVED.contains(&header.as_str()) && !header.starts_with("grpc-"),
                key,
                format!("{header:?} is said by gRPC itself; take it out"),
            );
            diagnostics.require(
                !has_file || header != "authorization",
                key,
                format!("\"authorization\" is what {file_key} is for; keep one of them"),
            );
            diagnostics.require(
                !values.is_empty(),
                key,
                format!("{header:?} has no value; write values = [\"…\"], or take it out"),
            );
            for value in values {
                size += header.len() + value.len();
                let is_binary = header.ends_with("-bin");
                let fits = |c: char| match is_binary {
                    true => c.is_ascii_alphanumeric() || "+/=".contains(c),
                    false => c.is_ascii_graphic() || c == ' ',
                };
                diagnostics.require(
                value.chars().all(fits),
                key,
                match is_binary {
                    true => format!("a value of {header:?} is not in base64, as those of names with -bin are"),
                    false => format!("a value of {header:?} has other characters than those of ASCII"),
                },
            );
            }
        }
        diagnostics.require(
            size <= LARGEST,
            key,
            "it is more than 2KiB, which servers refuse; take some of it out",
        );
    }
}
