//! Contents that a client asks to have in an action's result, beside their digests (REAPI:
//! GetActionResultRequest and ExecuteRequest, the fields inline_*).
//!
//! 1. These are hints: what cannot be read, or does not fit into a message, is left to be read by its
//!    digest, and that is no error.
//! 2. Digests stay, so that whoever reads them finds the same.

use prost::Message;

use super::Backend;
use crate::{
    digest::{Digest, DigestFunction},
    instance::InstanceName,
    proto::reapi::{self, ActionResult, ExecuteRequest, GetActionResultRequest},
};

/// gRPC's default for the largest message that a client takes, and room for what is around a result.
const MAXIMUM_RESULT_SIZE: u64 = (4 << 20) - (64 << 10);

/// All that is inlined, together: more is better read as a stream.
const MAXIMUM_INLINED: u64 = 1 << 20;

/// What a client asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InlineHints {
    stdout: bool,
    stderr: bool,
    /// Paths of output files.
    files: Vec<String>,
}

impl From<&GetActionResultRequest> for InlineHints {
    fn from(request: &GetActionResultRequest) -> Self {
        InlineHints {
            stdout: request.inline_stdout,
            stderr: request.inline_stderr,
            files: request.inline_output_files.clone(),
        }
    }
}

impl From<&ExecuteRequest> for InlineHints {
    fn from(request: &ExecuteRequest) -> Self {
        InlineHints {
            stdout: request.inline_stdout,
            stderr: request.inline_stderr,
            files: request.inline_output_files.clone(),
        }
    }
}

/// A place of a result for a content, with the digest that says which.
type InlinePlace<'r> = (&'r mut bytes::Bytes, Digest);

impl InlineHints {
    /// Whether nothing is asked for.
    pub fn is_empty(&self) -> bool {
        *self == InlineHints::default()
    }

    /// Reads what is asked for, as far as it fits.
    pub async fn apply(
        &self,
        backend: &Backend,
        instance: &InstanceName,
        function: DigestFunction,
        result: &mut ActionResult,
    ) {
        if self.is_empty() {
            return;
        }
        let taken = result.encoded_len() as u64;
        let mut room = MAXIMUM_RESULT_SIZE
            .saturating_sub(taken)
            .min(MAXIMUM_INLINED);
        let mut places = self.places(function, result);
        places.retain(|(_, digest)| match room.checked_sub(digest.size()) {
            Some(left) => {
                room = left;
                true
            }
            None => false,
        });
        let digests: Vec<Digest> = places.iter().map(|(_, digest)| *digest).collect();
        let contents = backend.read_many(instance, &digests, MAXIMUM_INLINED);
        for ((place, _), content) in places.into_iter().zip(contents.await) {
            if let Ok(content) = content {
                *place = content;
            }
        }
    }

    /// Where a content is asked for and not there.
    fn places<'r>(
        &self,
        function: DigestFunction,
        result: &'r mut ActionResult,
    ) -> Vec<InlinePlace<'r>> {
        let parse = |digest: Option<&reapi::Digest>| {
            let digest = Digest::parse_required(Some(function), digest).ok()?;
            (digest.size() > 0).then_some(digest)
        };
        let mut places: Vec<InlinePlace<'r>> = Vec::new();
        for (is_asked, raw, digest) in [
            (self.stdout, &mut result.stdout_raw, &result.stdout_digest),
            (self.stderr, &mut result.stderr_raw, &result.stderr_digest),
        ] {
            if is_asked
                && raw.is_empty()
                && let Some(digest) = parse(digest.as_ref())
            {
                places.push((raw, digest));
            }
        }
        for file in &mut result.output_files {
            if file.contents.is_empty()
                && self.files.contains(&file.path)
                && let Some(digest) = parse(file.digest.as_ref())
            {
                places.push((&mut file.contents, digest));
            }
        }
        places
    }
}
