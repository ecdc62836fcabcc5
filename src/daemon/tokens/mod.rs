//! Tokens of callers: JSON Web Tokens (RFC 7519), which they show as `authorization: Bearer`. `key_set` is
//! what they are verified by.
//!
//! 1. Which algorithms count is said by the key, never by the token: a public key verifies no HMAC, and
//!    "none" is no algorithm.
//! 2. What is kept of tokens is bounded: those that were right, `CACHED_TOKENS` of them and `CACHED_BYTES`, each no
//!    longer than it is valid and its keys are in use. A wrong one is kept nowhere.
//! 3. Signatures are verified away from the runtime's threads, on half of the processors at most; of each
//!    connection one at a time, and after a wrong one it waits. So who shows thousands of tokens keeps nobody
//!    else from having one verified.
//! 4. No token is ever quoted.

use std::{
    collections::BTreeMap,
    num::NonZero,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use jsonwebtoken::{Validation, errors::ErrorKind};
use parking_lot::Mutex;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use tokio::sync::Semaphore;

use self::key_set::{KeySet, VerificationKey};
use super::{CheckReport, Failure, Lifecycle, reloadable::Reloadable};
use crate::{
    auth::Identity,
    config::{Diagnostics, tokens::Tokens as Config},
};

mod key_set;

/// Bytes of a token: all headers of a call are at most 16 KiB.
pub(super) const LONGEST_TOKEN: usize = 12 << 10;
/// Tokens that were right, and are not verified again.
const CACHED_TOKENS: usize = 1000;
/// Bytes of what they say.
const CACHED_BYTES: usize = 8 << 20;
/// Bytes of what one says.
const LARGEST_CLAIMS: usize = 32 << 10;
/// Bytes of who somebody is (OpenID Connect Core, section 2).
const LONGEST_SUBJECT: usize = 255;
/// Claims that are objects are looked into so far.
const DEPTH: usize = 4;
/// A connection whose token was wrong waits so long for the next one to be verified.
const PAUSE_AFTER_WRONG: Duration = Duration::from_millis(10);

/// Verifies tokens.
pub struct Tokens {
    config: Config,
    keys: Arc<Reloadable<KeySet>>,
    cache: Mutex<TokenCache>,
    verifications: Semaphore,
}

#[derive(Default)]
struct TokenCache {
    tokens: BTreeMap<TokenHash, CachedToken>,
    size: usize,
}

type TokenHash = [u8; 32];

struct CachedToken {
    identity: Arc<Identity>,
    expires: SystemTime,
    keys: Arc<KeySet>,
}

/// One connection's place in the line of those whose tokens are verified.
#[derive(Debug, Default)]
pub(super) struct TokenTurn(tokio::sync::Mutex<()>);

/// What is wrong with a token. The client must act; it reads as a fragment after "the token".
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum TokenError {
    #[error("has more than {LONGEST_TOKEN} bytes")]
    TooLong,
    #[error("is no JSON Web Token")]
    Malformed,
    #[error("has a header that cannot be read, or an unknown algorithm")]
    Header,
    #[error("is signed by none of the keys that count here")]
    NoKey,
    #[error("has expired")]
    Expired,
    #[error("is not valid yet")]
    NotYet,
    #[error("is for another audience")]
    Audience,
    #[error("is of another issuer")]
    Issuer,
    #[error("lacks the claim {0:?}")]
    Lacks(String),
    #[error("has claims that cannot be read")]
    Claims,
    #[error("has claims that come to more than {LARGEST_CLAIMS} bytes")]
    LargeClaims,
    #[error("has a sub of more than {LONGEST_SUBJECT} bytes")]
    LongSubject,
    /// The farm's fault.
    #[error("could not be verified")]
    Interrupted,
}

impl Tokens {
    /// As configured; `None` when they are off.
    pub fn open(config: &Config, lifecycle: &Lifecycle) -> Result<Option<Arc<Self>>, Failure> {
        if !config.are_on() {
            return Ok(None);
        }
        let tokens = Self::read(config).map_err(failure)?;
        lifecycle.keep_fresh(&tokens.keys);
        Ok(Some(Arc::new(tokens)))
    }

    /// Whether the keys can be used.
    pub fn check(config: &Config, report: &mut CheckReport) {
        if config.are_on() {
            let failure = Self::read(config).err().map(failure);
            let what = format!("tokens.key_set: {} can be used", config.key_set.display());
            report.record(what, failure);
        }
    }

    /// What is wrong with the keys, although they can be used.
    pub fn warn(config: &Config, diagnostics: &mut Diagnostics) {
        if config.are_on() {
            for fault in key_set::faults(&config.key_set) {
                diagnostics.add("tokens.key_set", fault);
            }
        }
    }

    fn read(config: &Config) -> Result<Self, String> {
        let path = config.key_set.clone();
        let load = move || KeySet::read(&path);
        let processors = std::thread::available_parallelism().map_or(1, NonZero::get);
        Ok(Tokens {
            keys: Reloadable::open("tokens.key_set", [config.key_set.clone()], load)?,
            config: config.clone(),
            cache: Mutex::default(),
            verifications: Semaphore::new((processors / 2).max(1)),
        })
    }

    /// Whose a token is that a connection shows.
    pub(super) async fn verify(
        self: &Arc<Self>,
        token: &str,
        connection: &TokenTurn,
    ) -> Result<Arc<Identity>, TokenError> {
        if token.len() > LONGEST_TOKEN {
            return Err(TokenError::TooLong);
        }
        let hash = Sha256::digest(token).into();
        if let Some(identity) = self.known(&hash) {
            return Ok(identity);
        }
        let _turn = connection.0.lock().await;
        // Calls come in bunches, and the first one of them has done it for the others.
        if let Some(identity) = self.known(&hash) {
            return Ok(identity);
        }
        let verified = {
            let _place = self.verifications.acquire().await;
            let (tokens, token) = (self.clone(), token.to_owned());
            let verified = tokio::task::spawn_blocking(move || tokens.verify_now(&token, hash));
            verified.await.unwrap_or(Err(TokenError::Interrupted))
        };
        if verified.is_err() {
            tokio::time::sleep(PAUSE_AFTER_WRONG).await;
        }
        verified
    }

    /// As what it was opened.
    pub(super) fn config(&self) -> &Config {
        &self.config
    }

    fn known(&self, hash: &TokenHash) -> Option<Arc<Identity>> {
        let keys = self.keys.value();
        let cache = self.cache.lock();
        let known = cache.tokens.get(hash)?;
        let is_valid = SystemTime::now() < known.expires && Arc::ptr_eq(&known.keys, &keys);
        is_valid.then(|| known.identity.clone())
    }

    /// It takes its time.
    fn verify_now(&self, token: &str, hash: TokenHash) -> Result<Arc<Identity>, TokenError> {
        let mut keys = self.keys.value();
        let mut claims = self.claims(token, &keys);
        // Its issuer may have a new key, of which the file says so since a moment ago.
        if claims == Err(TokenError::NoKey) && self.keys.look() {
            keys = self.keys.value();
            claims = self.claims(token, &keys);
        }
        let claims = claims?;
        let expires = claims.get("exp").and_then(Value::as_f64).unwrap_or(0.0);
        let expires = UNIX_EPOCH + Duration::from_secs(expires.clamp(0.0, 1e11) as u64);
        let identity = Arc::new(Identity::of_token(attributes(&claims)?));
        let verified = CachedToken {
            identity: identity.clone(),
            expires: expires + self.config.leeway.get(),
            keys,
        };
        self.cache.lock().insert(hash, verified);
        Ok(identity)
    }

    fn claims(&self, token: &str, keys: &KeySet) -> Result<Map<String, Value>, TokenError> {
        let header = jsonwebtoken::decode_header(token).map_err(|error| match error.kind() {
            // What it says of an algorithm that it does not know.
            ErrorKind::Json(_) => TokenError::Header,
            _ => TokenError::Malformed,
        })?;
        let mut refusal = TokenError::NoKey;
        for key in keys.fitting(&header) {
            match self.claims_by(token, key) {
                Ok(claims) => return Ok(claims),
                Err(TokenError::NoKey) => {}
                Err(other) => refusal = other,
            }
        }
        Err(refusal)
    }

    fn claims_by(
        &self,
        token: &str,
        key: &VerificationKey,
    ) -> Result<Map<String, Value>, TokenError> {
        let mut validation = Validation::default();
        validation.algorithms.clone_from(&key.algorithms);
        validation.leeway = self.config.leeway.get().as_secs();
        validation.validate_nbf = true;
        validation.set_audience(&self.config.audiences);
        let mut required = vec!["exp", "aud"];
        if !self.config.issuers.is_empty() {
            validation.set_issuer(&self.config.issuers);
            required.push("iss");
        }
        validation.set_required_spec_claims(&required);
        let decoded = jsonwebtoken::decode(token, &key.key, &validation);
        decoded
            .map(|decoded| decoded.claims)
            .map_err(|error| match error.kind() {
                ErrorKind::InvalidSignature => TokenError::NoKey,
                ErrorKind::ExpiredSignature => TokenError::Expired,
                ErrorKind::ImmatureSignature => TokenError::NotYet,
                ErrorKind::InvalidAudience => TokenError::Audience,
                ErrorKind::InvalidIssuer => TokenError::Issuer,
                ErrorKind::MissingRequiredClaim(claim) => TokenError::Lacks(claim.clone()),
                _ => TokenError::Claims,
            })
    }
}

impl TokenCache {
    fn insert(&mut self, hash: TokenHash, verified: CachedToken) {
        let is_full = |cache: &TokenCache| {
            cache.tokens.len() >= CACHED_TOKENS
                || cache.size + verified.identity.size() > CACHED_BYTES
        };
        if is_full(self) {
            let now = SystemTime::now();
            let keys = verified.keys.clone();
            self.tokens
                .retain(|_, known| now < known.expires && Arc::ptr_eq(&known.keys, &keys));
            self.size = self.tokens.values().map(|it| it.identity.size()).sum();
        }
        if is_full(self) {
            *self = TokenCache::default();
        }
        self.size += verified.identity.size();
        if let Some(before) = self.tokens.insert(hash, verified) {
            self.size -= before.identity.size();
        }
    }
}

fn failure(message: String) -> Failure {
    Failure::Configuration {
        key: "tokens.key_set",
        message,
    }
}

/// Claims as attributes of a caller: `sub` and `iss` by these names, all by `claim.NAME`.
fn attributes(claims: &Map<String, Value>) -> Result<Vec<(String, String)>, TokenError> {
    struct Attributes {
        found: Vec<(String, String)>,
        left: usize,
    }
    impl Attributes {
        fn push(&mut self, name: &str, value: String) -> Result<(), TokenError> {
            let size = name.len() + value.len();
            self.left = self.left.checked_sub(size).ok_or(TokenError::LargeClaims)?;
            self.found.push((name.to_owned(), value));
            Ok(())
        }

        fn add(&mut self, name: &str, value: &Value, depth: usize) -> Result<(), TokenError> {
            match value {
                Value::String(text) => self.push(name, text.clone())?,
                Value::Number(number) => self.push(name, number.to_string())?,
                Value::Bool(value) => self.push(name, value.to_string())?,
                Value::Array(values) => {
                    for value in values.iter().filter(|value| !value.is_array()) {
                        self.add(name, value, depth)?;
                    }
                }
                Value::Object(members) if depth > 0 => {
                    for (member, value) in members {
                        self.add(&format!("{name}.{member}"), value, depth - 1)?;
                    }
                }
                Value::Object(_) | Value::Null => {}
            }
            Ok(())
        }
    }
    let mut attributes = Attributes {
        found: Vec::new(),
        left: LARGEST_CLAIMS,
    };
    for (name, value) in claims {
        if let ("sub" | "iss", Value::String(text)) = (name.as_str(), value) {
            if name == "sub" && text.len() > LONGEST_SUBJECT {
                return Err(TokenError::LongSubject);
            }
            attributes.push(name, text.clone())?;
        }
        attributes.add(&format!("claim.{name}"), value, DEPTH)?;
    }
    Ok(attributes.found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn claims_become_attributes_within_bounds() {
        let of = |value: Value| attributes(value.as_object().unwrap());
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let found = of(serde_json::json!({
            "sub": "alice",
            "realm": {"roles": ["a", "b", ["hidden"]]},
            "admin": false,
            "none": null,
        }));
        let expected = [
            pair("claim.admin", "false"),
            pair("claim.realm.roles", "a"),
            pair("claim.realm.roles", "b"),
            pair("claim.sub", "alice"),
            pair("sub", "alice"),
        ];
        let mut found = found.unwrap();
        found.sort();
        assert_eq!(found, expected);
        // A few bytes of a token, and megabytes of attributes.
        let long = serde_json::json!({ "x".repeat(4000): vec![1; 2000] });
        assert_eq!(of(long), Err(TokenError::LargeClaims));
    }

    #[test]
    fn what_is_kept_of_tokens_is_bounded_in_number_and_size() {
        let now = SystemTime::now();
        let keys = Arc::new(KeySet::default());
        let token = |size: usize| CachedToken {
            identity: Arc::new(Identity::of_token(vec![(
                "sub".to_owned(),
                "x".repeat(size),
            )])),
            expires: now + Duration::from_secs(60),
            keys: keys.clone(),
        };
        let mut cache = TokenCache::default();
        for number in 0u32..5000 {
            let hash = Sha256::digest(number.to_le_bytes()).into();
            cache.insert(hash, token(if number < 2500 { 10 } else { 30 << 10 }));
            let size: usize = cache.tokens.values().map(|it| it.identity.size()).sum();
            assert_eq!(size, cache.size);
            assert!(cache.tokens.len() <= CACHED_TOKENS && size <= CACHED_BYTES);
        }
    }
}
