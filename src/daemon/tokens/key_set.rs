//! Keys that tokens are verified by: a JSON Web Key Set (RFC 7517) in a file, and its verification by ring,
//! as TLS has it.

use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use jsonwebtoken::{
    Algorithm, AlgorithmFamily, DecodingKey, DecodingKeyKind, Header,
    crypto::{CryptoProvider, JwtSigner, JwtVerifier, KeyUtils},
    errors::ErrorKind,
    jwk::{AlgorithmParameters, EllipticCurve, Jwk, KeyOperations, PublicKeyUse},
    signature,
};
use ring::{hmac, signature as ring_signature};
use serde_json::Value;

use crate::daemon::reloadable::read_small;

/// A secret that is shorter than its hash can be guessed (RFC 7518, section 3.2).
const SHORTEST_SECRET: usize = 32;

/// Bytes of an RSA key's modulus; ring takes no shorter ones.
const SHORTEST_MODULUS: usize = 256;

/// A set as it is written.
#[derive(serde::Deserialize)]
struct Set {
    keys: Vec<Value>,
}

/// The keys of a set that can be used.
#[derive(Default)]
pub(super) struct KeySet {
    keys: Vec<VerificationKey>,
    /// What is wrong with the others.
    faults: Vec<String>,
}

/// One of them, and what it verifies.
pub(super) struct VerificationKey {
    name: Option<String>,
    pub key: DecodingKey,
    pub algorithms: Vec<Algorithm>,
}

impl KeySet {
    pub(super) fn read(path: &Path) -> Result<Self, String> {
        // Who has done so before has installed the same.
        let _ = PROVIDER.install_default();
        let data = read_small(path)?;
        let set: Set = serde_json::from_slice(&data)
            .map_err(|error| format!("{}: it is no JSON Web Key Set: {error}", path.display()))?;
        let mut found = KeySet::default();
        for (number, jwk) in set.keys.into_iter().enumerate() {
            let name = match jwk.get("kid").and_then(Value::as_str) {
                Some(name) => format!("the key {:?}", crate::text::shorten(name)),
                None => format!("key number {}", number + 1),
            };
            let is_private = jwk.get("kty") != Some(&Value::from("oct")) && jwk.get("d").is_some();
            if is_private {
                let text = "has its private part (d), which none but the issuer may have";
                found.faults.push(format!("{name} {text}"));
            }
            // One of a kind that is unknown here is none of ours (RFC 7517, section 5).
            let parsed = serde_json::from_value(jwk);
            let parsed = parsed.map_err(|error| format!("cannot be read: {error}"));
            match parsed.and_then(|jwk| key(&jwk)) {
                Ok(key) => found.keys.push(key),
                Err(why) => found.faults.push(format!("{name} {why}")),
            }
        }
        match found.keys.is_empty() {
            true => Err(format!(
                "{}: it has no key for EdDSA, ES256, ES384, RS256, RS384, RS512 or HS256{}{}",
                path.display(),
                if found.faults.is_empty() { "" } else { ": " },
                found.faults.join("; ")
            )),
            false => Ok(found),
        }
    }

    /// Those that a token of this header may be signed by.
    pub(super) fn fitting(&self, header: &Header) -> impl Iterator<Item = &VerificationKey> {
        self.keys.iter().filter(|key| {
            let is_named = header.kid.is_none() || key.name == header.kid;
            key.algorithms.contains(&header.alg) && is_named
        })
    }
}

/// What is wrong with a set that can be used.
pub(super) fn faults(path: &Path) -> Vec<String> {
    let Ok(set) = KeySet::read(path) else {
        // That is told as the reason why nothing starts.
        return Vec::new();
    };
    let name = path.display();
    let mut faults: Vec<String> = set
        .faults
        .iter()
        .map(|fault| format!("{name}: {fault}"))
        .collect();
    let mode = fs::metadata(path).map_or(0, |metadata| metadata.permissions().mode());
    if mode & 0o002 != 0 {
        faults.push(format!(
            "{name}: every user of this host can write it, and so be anybody; chmod o-w {name}"
        ));
    }
    let has_secret = |key: &VerificationKey| key.key.family() == AlgorithmFamily::Hmac;
    if mode & 0o004 != 0 && set.keys.iter().any(has_secret) {
        faults.push(format!(
            "{name}: every user of this host can read the secret in it, and so be anybody; chmod o-r {name}"
        ));
    }
    faults
}

/// An error is why it counts for nothing, as a fragment after its name.
fn key(jwk: &Jwk) -> Result<VerificationKey, String> {
    let fitting: &[Algorithm] = match &jwk.algorithm {
        AlgorithmParameters::RSA(_) => &[Algorithm::RS256, Algorithm::RS384, Algorithm::RS512],
        AlgorithmParameters::EllipticCurve(curve) => match curve.curve {
            EllipticCurve::P256 => &[Algorithm::ES256],
            EllipticCurve::P384 => &[Algorithm::ES384],
            _ => return Err("is on another curve than P-256 and P-384".to_owned()),
        },
        AlgorithmParameters::OctetKeyPair(_) => &[Algorithm::EdDSA],
        AlgorithmParameters::OctetKey(_) => &[Algorithm::HS256],
        _ => return Err("is of an unknown kind".to_owned()),
    };
    if jwk.common.public_key_use == Some(PublicKeyUse::Encryption) {
        return Err("is for encryption, not for signatures".to_owned());
    }
    if let Some(operations) = &jwk.common.key_operations
        && !operations.contains(&KeyOperations::Verify)
    {
        return Err("is not for verifying (key_ops)".to_owned());
    }
    let algorithms = match jwk.common.key_algorithm {
        None => fitting.to_vec(),
        Some(said) => {
            let wrong = || format!("has the alg {said}, which is none of its kind of key here");
            let parsed = said.to_string().parse().map_err(|_| wrong())?;
            match fitting.contains(&parsed) {
                true => vec![parsed],
                false => return Err(wrong()),
            }
        }
    };
    let key = DecodingKey::from_jwk(jwk).map_err(|error| format!("cannot be read: {error}"))?;
    if let DecodingKeyKind::RsaModulusExponent { n, .. } = key.kind()
        && n.len() < SHORTEST_MODULUS
    {
        return Err("is an RSA key of less than 2048 bits".to_owned());
    }
    if key.family() == AlgorithmFamily::Hmac
        && key.try_get_as_bytes().map_or(0, <[u8]>::len) < SHORTEST_SECRET
    {
        return Err(format!(
            "is a secret of less than {SHORTEST_SECRET} bytes, which can be guessed"
        ));
    }
    Ok(VerificationKey {
        name: jwk.common.key_id.clone(),
        key,
        algorithms,
    })
}

/// Signs nothing.
static PROVIDER: CryptoProvider = CryptoProvider {
    signer_factory: no_signer,
    verifier_factory: verifier,
    key_utils: KeyUtils::new_unimplemented(),
};

fn no_signer(
    _: &Algorithm,
    _: &jsonwebtoken::EncodingKey,
) -> jsonwebtoken::errors::Result<Box<dyn JwtSigner>> {
    Err(ErrorKind::UnsupportedAlgorithm.into())
}

fn verifier(
    algorithm: &Algorithm,
    key: &DecodingKey,
) -> jsonwebtoken::errors::Result<Box<dyn JwtVerifier>> {
    match algorithm.family() == key.family() {
        true => Ok(Box::new(RingVerifier {
            algorithm: *algorithm,
            key: key.clone(),
        })),
        false => Err(ErrorKind::InvalidKeyFormat.into()),
    }
}

struct RingVerifier {
    algorithm: Algorithm,
    key: DecodingKey,
}

impl JwtVerifier for RingVerifier {
    fn algorithm(&self) -> Algorithm {
        self.algorithm
    }
}

impl signature::Verifier<Vec<u8>> for RingVerifier {
    fn verify(&self, message: &[u8], signature: &Vec<u8>) -> Result<(), signature::Error> {
        use ring_signature::{
            ECDSA_P256_SHA256_FIXED, ECDSA_P384_SHA384_FIXED, ED25519, RSA_PKCS1_2048_8192_SHA256,
            RSA_PKCS1_2048_8192_SHA384, RSA_PKCS1_2048_8192_SHA512, RsaPublicKeyComponents,
            UnparsedPublicKey,
        };
        let refuse = |_| signature::Error::new();
        match self.key.kind() {
            DecodingKeyKind::RsaModulusExponent { n, e } => {
                let parameters = match self.algorithm {
                    Algorithm::RS256 => &RSA_PKCS1_2048_8192_SHA256,
                    Algorithm::RS384 => &RSA_PKCS1_2048_8192_SHA384,
                    Algorithm::RS512 => &RSA_PKCS1_2048_8192_SHA512,
                    _ => return Err(signature::Error::new()),
                };
                let key = RsaPublicKeyComponents { n, e };
                key.verify(parameters, message, signature).map_err(refuse)
            }
            DecodingKeyKind::SecretOrDer(key) => {
                let algorithm: &dyn ring_signature::VerificationAlgorithm = match self.algorithm {
                    Algorithm::ES256 => &ECDSA_P256_SHA256_FIXED,
                    Algorithm::ES384 => &ECDSA_P384_SHA384_FIXED,
                    Algorithm::EdDSA => &ED25519,
                    Algorithm::HS256 => {
                        let key = hmac::Key::new(hmac::HMAC_SHA256, key);
                        return hmac::verify(&key, message, signature).map_err(refuse);
                    }
                    _ => return Err(signature::Error::new()),
                };
                let key = UnparsedPublicKey::new(algorithm, key);
                key.verify(message, signature).map_err(refuse)
            }
        }
    }
}
