//! What clients call an operation, PURE: a name that says what is needed to take the operation up again
//! where it is not known, so that a scheduler needs no database.
//!
//! A name is `UUID.1CONTENT`: the queue's own name of the operation, the version of what follows, and an
//! encoded `NameContent` with the beginning of a hash, in URL-safe Base64 (RFC 4648, section 5). It has no
//! slash, so that a name that a frontend puts before it can be taken off again.
//!
//! 1. Every name that is written can be read, and is the same name again.
//! 2. A name that was cut or changed by accident is not read: the hash tells. It is no secret, and a name
//!    that somebody made up is a request like any other: whoever comes with one is asked what Execute
//!    asks, and gets what Execute would give.
//! 3. A plain UUID, as Buildbarn's scheduler has them, is a name that says nothing else.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use std::fmt;

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use prost::Message;
use prost_types::Any;
use uuid::Uuid;

use super::queue::{InvocationKey, InvocationKeys};
use crate::{
    digest::{Digest, DigestFunction},
    instance::InstanceName,
    proto::{auth::AuthenticationMetadata, reapi::RequestMetadata},
};

/// Of `NameContent` and the hash.
const VERSION: char = '1';
/// The longest instance name and as many keys as routing makes, with much to spare.
const LONGEST_NAME: usize = 32 << 10;
const HASH_LENGTH: usize = 4;

/// An operation, and what it was asked with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OperationName {
    pub operation: Uuid,
    /// Which scheduler gave the name; each start of one is another.
    pub scheduler: u64,
    pub instance: InstanceName,
    pub digest: Digest,
    pub priority: i32,
    pub skip_cache_lookup: bool,
    pub invocation: InvocationKeys,
}

/// What a client may call an operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ParsedName {
    Plain(Uuid),
    Full(Box<OperationName>),
}

/// No operation can be meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    #[error("it is no name that this scheduler gives")]
    Malformed,
    #[error("it is of a newer scheduler")]
    Newer,
    #[error("it was cut or changed on its way")]
    Damaged,
}

#[derive(Clone, PartialEq, Message)]
struct NameContent {
    #[prost(fixed64, tag = "1")]
    scheduler: u64,
    #[prost(string, tag = "2")]
    instance: String,
    /// Of REAPI's DigestFunction.
    #[prost(int32, tag = "3")]
    digest_function: i32,
    #[prost(bytes = "vec", tag = "4")]
    hash: Vec<u8>,
    #[prost(uint64, tag = "5")]
    size: u64,
    #[prost(sint32, tag = "6")]
    priority: i32,
    #[prost(bool, tag = "7")]
    skip_cache_lookup: bool,
    #[prost(message, repeated, tag = "8")]
    invocation: Vec<EncodedInvocationKey>,
}

/// An invocation key, without the type's name where that is one of the usual ones.
#[derive(Clone, PartialEq, Message)]
struct EncodedInvocationKey {
    #[prost(oneof = "KeyValue", tags = "1, 2, 3")]
    value: Option<KeyValue>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum KeyValue {
    #[prost(bytes, tag = "1")]
    Any(Vec<u8>),
    #[prost(bytes, tag = "2")]
    RequestMetadata(Vec<u8>),
    #[prost(bytes, tag = "3")]
    AuthenticationMetadata(Vec<u8>),
}

impl EncodedInvocationKey {
    fn of(key: &InvocationKey) -> Self {
        // What is not written just so keeps its own bytes.
        let short = [
            Self::short(key, KeyValue::RequestMetadata),
            Self::short(key, KeyValue::AuthenticationMetadata),
        ]
        .into_iter()
        .find(|short| short.key().as_ref() == Some(key));
        short.unwrap_or_else(|| EncodedInvocationKey {
            value: Some(KeyValue::Any(key.as_bytes().to_vec())),
        })
    }

    fn short(key: &InvocationKey, kind: fn(Vec<u8>) -> KeyValue) -> Self {
        EncodedInvocationKey {
            value: Some(kind(key.any().value)),
        }
    }

    fn key(&self) -> Option<InvocationKey> {
        let of = |type_url: String, value: &Vec<u8>| {
            InvocationKey::new(&Any {
                type_url,
                value: value.clone(),
            })
        };
        Some(match self.value.as_ref()? {
            KeyValue::Any(bytes) => InvocationKey::from_bytes(bytes),
            KeyValue::RequestMetadata(value) => of(type_url::<RequestMetadata>(), value),
            KeyValue::AuthenticationMetadata(value) => {
                of(type_url::<AuthenticationMetadata>(), value)
            }
        })
    }
}

fn type_url<M: prost::Name>() -> String {
    format!("type.googleapis.com/{}", M::full_name())
}

/// So that the content of one name under the UUID of another is none.
fn hash(operation: Uuid, content: &[u8]) -> [u8; HASH_LENGTH] {
    let mut hasher =
        DigestFunction::Sha256.hasher((operation.as_bytes().len() + content.len()) as u64);
    hasher.update(operation.as_bytes());
    hasher.update(content);
    let digest = hasher.finish();
    std::array::from_fn(|i| digest.hash_bytes()[i])
}

impl fmt::Display for OperationName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let content = NameContent {
            scheduler: self.scheduler,
            instance: self.instance.as_str().to_owned(),
            digest_function: self.digest.function().to_proto() as i32,
            hash: self.digest.hash_bytes().to_vec(),
            size: self.digest.size(),
            priority: self.priority,
            skip_cache_lookup: self.skip_cache_lookup,
            invocation: self
                .invocation
                .as_slice()
                .iter()
                .map(EncodedInvocationKey::of)
                .collect(),
        };
        let mut bytes = content.encode_to_vec();
        bytes.extend_from_slice(&hash(self.operation, &bytes));
        write!(
            f,
            "{}.{VERSION}{}",
            self.operation,
            URL_SAFE_NO_PAD.encode(bytes)
        )
    }
}

impl ParsedName {
    pub fn parse(name: &str) -> Result<Self, NameError> {
        if name.len() > LONGEST_NAME {
            return Err(NameError::Malformed);
        }
        let (operation, rest) = match name.split_once('.') {
            None => (name, None),
            Some((operation, rest)) => (operation, Some(rest)),
        };
        let operation = Uuid::try_parse(operation).map_err(|_| NameError::Malformed)?;
        let Some(rest) = rest else {
            return Ok(ParsedName::Plain(operation));
        };
        let content = match rest.strip_prefix(VERSION) {
            Some(content) => content,
            None if rest.starts_with(|version: char| version.is_ascii_digit()) => {
                return Err(NameError::Newer);
            }
            None => return Err(NameError::Malformed),
        };
        let bytes = URL_SAFE_NO_PAD
            .decode(content)
            .map_err(|_| NameError::Damaged)?;
        let (content, sum) = bytes
            .split_last_chunk::<HASH_LENGTH>()
            .ok_or(NameError::Damaged)?;
        if *sum != hash(operation, content) {
            return Err(NameError::Damaged);
        }
        let full = NameContent::decode(content)
            .ok()
            .and_then(|content| OperationName::of(operation, &content))
            .ok_or(NameError::Malformed)?;
        Ok(ParsedName::Full(Box::new(full)))
    }

    /// What the queue calls it.
    pub fn operation(&self) -> Uuid {
        match self {
            ParsedName::Plain(operation) => *operation,
            ParsedName::Full(name) => name.operation,
        }
    }
}

impl OperationName {
    /// `None` for what no scheduler writes.
    fn of(operation: Uuid, content: &NameContent) -> Option<Self> {
        let function = DigestFunction::from_proto(content.digest_function).ok()??;
        // Sizes are signed in REAPI.
        let size = i64::try_from(content.size).ok()?;
        if content.hash.len() != function.length() {
            return None;
        }
        let keys: Option<Vec<InvocationKey>> = content
            .invocation
            .iter()
            .map(EncodedInvocationKey::key)
            .collect();
        Some(OperationName {
            operation,
            scheduler: content.scheduler,
            instance: InstanceName::parse(&content.instance).ok()?,
            digest: Digest::new(function, &content.hash, size.unsigned_abs()),
            priority: content.priority,
            skip_cache_lookup: content.skip_cache_lookup,
            invocation: InvocationKeys::new(keys?),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::proto;

    fn function() -> impl Strategy<Value = DigestFunction> {
        prop::sample::select(DigestFunction::ALL.to_vec())
    }

    fn key() -> impl Strategy<Value = InvocationKey> {
        let id = "[ -~]{0,40}";
        prop_oneof![
            id.prop_map(
                |tool_invocation_id| InvocationKey::new(&proto::pack(&RequestMetadata {
                    tool_invocation_id,
                    ..Default::default()
                }))
            ),
            any::<Vec<u8>>().prop_map(|bytes| InvocationKey::from_bytes(&bytes)),
            (id, any::<Vec<u8>>())
                .prop_map(|(type_url, value)| InvocationKey::new(&Any { type_url, value })),
            Just(InvocationKey::new(&proto::pack(
                &AuthenticationMetadata::default()
            ))),
        ]
    }

    prop_compose! {
        fn operation_name()(
            operation in any::<u128>(),
            scheduler in any::<u64>(),
            instance in prop::collection::vec("[a-z0-9é][a-z0-9é.]{0,11}", 0..4),
            function in function(),
            content in any::<Vec<u8>>(),
            size in 0..=i64::MAX as u64,
            priority in any::<i32>(),
            skip_cache_lookup in any::<bool>(),
            keys in prop::collection::vec(key(), 0..4),
        ) -> OperationName {
            OperationName {
                operation: Uuid::from_u128(operation),
                scheduler,
                instance: InstanceName::parse(&instance.join("/")).unwrap(),
                digest: Digest::new(function, function.digest_of(&content).hash_bytes(), size),
                priority,
                skip_cache_lookup,
                invocation: InvocationKeys::new(keys),
            }
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again(name in operation_name()) {
            let text = name.to_string();
            let url_safe = |c: char| c.is_ascii_alphanumeric() || "-._~".contains(c);
            prop_assert!(text.chars().all(url_safe), "{}", text);
            prop_assert_eq!(ParsedName::parse(&text), Ok(ParsedName::Full(Box::new(name))));
        }

        #[test]
        fn what_is_cut_or_changed_is_not_read_as_something_else(
            name in operation_name(),
            at in any::<prop::sample::Index>(),
            with in prop::char::range('!', '~'),
        ) {
            let text = name.to_string();
            let at = at.index(text.len());
            let cut = ParsedName::parse(&text[..at]);
            // A cut right after the UUID leaves a plain name.
            prop_assert!(
                cut.is_err() || cut == Ok(ParsedName::Plain(name.operation)),
                "{:?}", cut
            );
            let mut changed: Vec<char> = text.chars().collect();
            if changed[at] != with {
                changed[at] = with;
                let changed: String = changed.into_iter().collect();
                let read = ParsedName::parse(&changed);
                // Hexadecimal digits may be capitals.
                prop_assert!(read.is_err() || changed.to_lowercase() == text.to_lowercase());
            }
        }

        #[test]
        fn whatever_comes_has_an_answer(text in any::<String>(), bytes in any::<Vec<u8>>()) {
            let _ = ParsedName::parse(&text);
            let operation = Uuid::from_u128(7);
            let mut bytes = bytes;
            bytes.extend_from_slice(&hash(operation, &bytes));
            let name = format!("{operation}.1{}", URL_SAFE_NO_PAD.encode(bytes));
            if let Ok(ParsedName::Full(name)) = ParsedName::parse(&name) {
                prop_assert_eq!(name.operation, operation);
            }
        }
    }

    #[test]
    fn hostile_names_name_nothing() {
        let uuid = Uuid::from_u128(7);
        let name = |content: &NameContent, operation: Uuid| {
            let mut bytes = content.encode_to_vec();
            bytes.extend_from_slice(&hash(operation, &bytes));
            format!("{uuid}.1{}", URL_SAFE_NO_PAD.encode(bytes))
        };
        let good = NameContent {
            digest_function: 1,
            hash: vec![1; 32],
            ..Default::default()
        };
        assert!(ParsedName::parse(&name(&good, uuid)).is_ok());
        let malformed = |content: NameContent| {
            assert_eq!(
                ParsedName::parse(&name(&content, uuid)),
                Err(NameError::Malformed)
            );
        };
        malformed(NameContent {
            hash: vec![1; 31],
            ..good.clone()
        });
        malformed(NameContent {
            hash: vec![1; 1 << 12],
            ..good.clone()
        });
        malformed(NameContent {
            digest_function: 99,
            ..good.clone()
        });
        malformed(NameContent {
            digest_function: 0,
            ..good.clone()
        });
        malformed(NameContent {
            size: u64::MAX,
            ..good.clone()
        });
        malformed(NameContent {
            instance: "a//b".to_owned(),
            ..good.clone()
        });
        malformed(NameContent {
            instance: "x".repeat(2000),
            ..good.clone()
        });
        malformed(NameContent {
            invocation: vec![EncodedInvocationKey::default()],
            ..good.clone()
        });
        let other = Uuid::from_u128(8);
        assert_eq!(
            ParsedName::parse(&name(&good, other)),
            Err(NameError::Damaged),
            "the content of another name"
        );
        for (text, error) in [
            ("", NameError::Malformed),
            ("x", NameError::Malformed),
            (".", NameError::Malformed),
            (
                "operations/00000000-0000-0000-0000-000000000007",
                NameError::Malformed,
            ),
            (
                "00000000-0000-0000-0000-000000000007.",
                NameError::Malformed,
            ),
            (
                "00000000-0000-0000-0000-000000000007.x",
                NameError::Malformed,
            ),
            ("00000000-0000-0000-0000-000000000007.1", NameError::Damaged),
            (
                "00000000-0000-0000-0000-000000000007.1AA",
                NameError::Damaged,
            ),
            (
                "00000000-0000-0000-0000-000000000007.1A=",
                NameError::Damaged,
            ),
            (
                "00000000-0000-0000-0000-000000000007.2AAAAAAAA",
                NameError::Newer,
            ),
        ] {
            assert_eq!(ParsedName::parse(text), Err(error), "{text:?}");
        }
        let long = format!("{uuid}.1{}", "A".repeat(1 << 20));
        assert_eq!(ParsedName::parse(&long), Err(NameError::Malformed));
        assert_eq!(
            ParsedName::parse(&uuid.to_string()),
            Ok(ParsedName::Plain(uuid))
        );
    }

    #[test]
    fn the_name_of_an_ordinary_operation_is_short() {
        let name = OperationName {
            operation: Uuid::from_u128(7),
            scheduler: u64::MAX,
            instance: InstanceName::parse("main").unwrap(),
            digest: DigestFunction::Sha256.digest_of(b"action"),
            priority: -1,
            skip_cache_lookup: true,
            invocation: InvocationKeys::new([InvocationKey::new(&proto::pack(&RequestMetadata {
                tool_invocation_id: Uuid::from_u128(9).to_string(),
                ..Default::default()
            }))]),
        };
        assert!(name.to_string().len() < 200, "{name}");
    }
}
