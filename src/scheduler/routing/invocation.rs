//! Invocation keys: who shares with whom.
//!
//! As with Buildbarn, a key is a google.protobuf.Any of a RequestMetadata or AuthenticationMetadata that
//! is cut down to what the level tells apart; portals filter by it. Clients choose what is in it, so
//! that it has bounds.

use prost_types::{Any, value::Kind};

use super::{
    super::queue::{InvocationKey, InvocationKeys},
    Facts,
};
use crate::{
    config::routing::InvocationKeyExtractor,
    digest::DigestFunction,
    proto::{self, auth::AuthenticationMetadata, reapi::RequestMetadata},
};

/// Of an identifier that a client chose; longer ones are known by their hash.
const LONGEST_IDENTIFIER: usize = 128;
/// Of a key that a remote action router made.
const LARGEST_KEY: usize = 1024;
const MOST_KEYS: usize = 8;

/// The remote action router must be mended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvocationKeysError {
    #[error("there are {0}, and not one to {MOST_KEYS}")]
    Count(usize),
    #[error("one has {0} bytes, and not at most {LARGEST_KEY}")]
    Size(usize),
}

/// One key for each level. Where an operation is taken up again, its keys are those that its name
/// claims, except for the user's or the address's.
pub(super) fn extract(levels: &[InvocationKeyExtractor], facts: &Facts<'_>) -> InvocationKeys {
    let metadata = facts.metadata;
    let user = || facts.user?.public.clone();
    let address = || {
        Some(prost_types::Value {
            kind: Some(Kind::StringValue(format!("address:{}", facts.address?))),
        })
    };
    let of_client = |public| {
        Some(InvocationKey::new(&proto::pack(&AuthenticationMetadata {
            public: Some(public?),
            ..Default::default()
        })))
    };
    let claimed = facts.claimed.map_or(&[][..], InvocationKeys::as_slice);
    let mut claimed = claimed.iter().filter(|key| {
        let type_url = key.any().type_url;
        key.as_bytes().len() <= LARGEST_KEY && !type_url.ends_with("AuthenticationMetadata")
    });
    let keys = levels.iter().filter_map(|level| {
        let own = match level {
            InvocationKeyExtractor::ToolInvocationId => proto::pack(&RequestMetadata {
                tool_invocation_id: bounded(&metadata.tool_invocation_id),
                ..Default::default()
            }),
            InvocationKeyExtractor::CorrelatedInvocationsId => proto::pack(&RequestMetadata {
                correlated_invocations_id: bounded(&metadata.correlated_invocations_id),
                ..Default::default()
            }),
            InvocationKeyExtractor::AuthenticatedUser => return of_client(user()),
            InvocationKeyExtractor::AuthenticatedUserOrAddress => {
                return of_client(user().or_else(address));
            }
        };
        Some(
            claimed
                .next()
                .cloned()
                .unwrap_or_else(|| InvocationKey::new(&own)),
        )
    });
    InvocationKeys::new(keys)
}

pub(super) fn answered(keys: &[Any]) -> Result<InvocationKeys, InvocationKeysError> {
    if keys.is_empty() || keys.len() > MOST_KEYS {
        return Err(InvocationKeysError::Count(keys.len()));
    }
    let keys: Vec<InvocationKey> = keys.iter().map(InvocationKey::new).collect();
    let sizes = keys.iter().map(|key| key.as_bytes().len());
    match sizes.max() {
        Some(size) if size > LARGEST_KEY => Err(InvocationKeysError::Size(size)),
        _ => Ok(InvocationKeys::new(keys)),
    }
}

fn bounded(identifier: &str) -> String {
    match identifier.len() <= LONGEST_IDENTIFIER {
        true => identifier.to_owned(),
        false => DigestFunction::Sha256
            .digest_of(identifier.as_bytes())
            .hash_hex(),
    }
}
