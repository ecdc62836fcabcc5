//! Tokens of callers, right and hostile ones; and those of our own clients.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD as BASE64};
use bb_remote_execution::{
    config::{self, Endpoint, ListenAddress, call_headers::CallHeaders},
    daemon::{self, Credentials, Lifecycle, Policy, Services},
    proto::reapi::{GetCapabilitiesRequest, capabilities_client::CapabilitiesClient},
    storage::serve,
};
use ring::{
    hmac,
    rand::SystemRandom,
    signature::{
        ECDSA_P256_SHA256_FIXED_SIGNING, ECDSA_P384_SHA384_FIXED_SIGNING, EcdsaKeyPair,
        Ed25519KeyPair, KeyPair, RSA_PKCS1_SHA256, RSA_PKCS1_SHA384, RSA_PKCS1_SHA512, RsaKeyPair,
    },
};
use serde_json::{Value, json};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{Code, Request, Status};

/// What signs, and the public part of it.
struct Keys {
    p256: EcdsaKeyPair,
    p384: EcdsaKeyPair,
    ed25519: Ed25519KeyPair,
    /// As openssl(1) makes it; ring makes none.
    rsa: Option<RsaKeyPair>,
    secret: [u8; 32],
}

impl Keys {
    fn new() -> Keys {
        let random = SystemRandom::new();
        let ecdsa = |algorithm| {
            let made = EcdsaKeyPair::generate_pkcs8(algorithm, &random).unwrap();
            EcdsaKeyPair::from_pkcs8(algorithm, made.as_ref(), &random).unwrap()
        };
        let made = Ed25519KeyPair::generate_pkcs8(&random).unwrap();
        let mut openssl = std::process::Command::new("openssl");
        openssl.args(["genpkey", "-quiet", "-algorithm", "RSA", "-outform", "DER"]);
        let rsa = openssl
            .output()
            .ok()
            .filter(|output| output.status.success());
        if rsa.is_none() {
            crate::harness::skip("openssl cannot make an RSA key here");
        }
        Keys {
            p256: ecdsa(&ECDSA_P256_SHA256_FIXED_SIGNING),
            p384: ecdsa(&ECDSA_P384_SHA384_FIXED_SIGNING),
            ed25519: Ed25519KeyPair::from_pkcs8(made.as_ref()).unwrap(),
            rsa: rsa.map(|made| RsaKeyPair::from_der(&made.stdout).unwrap()),
            secret: [7; 32],
        }
    }

    /// The set that a server reads.
    fn set(&self) -> Value {
        let mut keys = vec![
            json!({"kty": "OKP", "crv": "Ed25519", "kid": "ed",
                   "x": BASE64.encode(self.ed25519.public_key())}),
            json!({"kty": "oct", "kid": "secret", "k": BASE64.encode(self.secret)}),
        ];
        for (name, kid, key) in [("P-256", "p256", &self.p256), ("P-384", "p384", &self.p384)] {
            let (x, y) =
                key.public_key().as_ref()[1..].split_at(key.public_key().as_ref().len() / 2);
            keys.push(json!({"kty": "EC", "crv": name, "kid": kid,
                             "x": BASE64.encode(x), "y": BASE64.encode(y)}));
        }
        if let Some(rsa) = &self.rsa {
            let public = ring::rsa::PublicKeyComponents::<Vec<u8>>::from(rsa.public());
            keys.push(json!({"kty": "RSA", "kid": "rsa",
                             "n": BASE64.encode(public.n),
                             "e": BASE64.encode(public.e)}));
        }
        json!({ "keys": keys })
    }

    fn sign(&self, algorithm: &str, message: &[u8]) -> Vec<u8> {
        let random = SystemRandom::new();
        let rsa = |padding| {
            let key = self.rsa.as_ref().unwrap();
            let mut signature = vec![0; key.public().modulus_len()];
            key.sign(padding, &random, message, &mut signature).unwrap();
            signature
        };
        match algorithm {
            "EdDSA" => self.ed25519.sign(message).as_ref().to_vec(),
            "ES256" => self.p256.sign(&random, message).unwrap().as_ref().to_vec(),
            "ES384" => self.p384.sign(&random, message).unwrap().as_ref().to_vec(),
            "RS256" => rsa(&RSA_PKCS1_SHA256),
            "RS384" => rsa(&RSA_PKCS1_SHA384),
            "RS512" => rsa(&RSA_PKCS1_SHA512),
            "HS256" => hmac_of(&self.secret, message),
            other => panic!("{other}"),
        }
    }

    fn token(&self, algorithm: &str, claims: &Value) -> String {
        assemble(&json!({"alg": algorithm}), claims, |message| {
            self.sign(algorithm, message)
        })
    }
}

fn hmac_of(secret: &[u8], message: &[u8]) -> Vec<u8> {
    let key = hmac::Key::new(hmac::HMAC_SHA256, secret);
    hmac::sign(&key, message).as_ref().to_vec()
}

fn assemble(header: &Value, claims: &Value, sign: impl FnOnce(&[u8]) -> Vec<u8>) -> String {
    let message = format!(
        "{}.{}",
        BASE64.encode(header.to_string()),
        BASE64.encode(claims.to_string())
    );
    let signature = BASE64.encode(sign(message.as_bytes()));
    format!("{message}.{signature}")
}

/// In so many seconds.
fn at(shift: i64) -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    now.as_secs() as i64 + shift
}

fn claims() -> Value {
    json!({"sub": "alice", "iss": "https://issuer", "aud": ["other", "farm"], "exp": at(600),
           "groups": ["staff", "builders"]})
}

fn claims_with(name: &str, value: Value) -> Value {
    let mut claims = claims();
    claims[name] = value;
    claims
}

struct Server {
    endpoint: Endpoint,
    lifecycle: Lifecycle,
    _stop: DropGuard,
}

impl Server {
    /// Lets in who is in the group `builders`.
    fn start(key_set: PathBuf) -> Server {
        let config: config::scheduler::Config = toml::from_str(&format!(
            "tokens = {{ key_set = \"{}\", audiences = [\"farm\"], issuers = [\"https://issuer\"] }}\n\
             [[grants]]\nwho = [\"claim.groups:builders\"]\nmay = [\"execute\"]\n",
            key_set.display()
        ))
        .unwrap();
        let lifecycle = Lifecycle::new();
        let policy = Policy::open(&config.grants, &config.tokens, &lifecycle).unwrap();
        let anywhere = ListenAddress::Tcp(([127, 0, 0, 1], 0).into());
        let listener = daemon::listen("", "listen", &anywhere, None).unwrap();
        let listener = listener.with_policy(&policy);
        let endpoint = Endpoint::Tcp(listener.address());
        let stop = CancellationToken::new();
        let services = Services::default().add(serve::capabilities(serve::Announcement {
            exec_enabled: true,
            ..Default::default()
        }));
        let routes = services.observable(&stop).unwrap();
        let serving = daemon::serve(listener, routes, stop.clone(), Duration::ZERO);
        tokio::spawn(async move { serving.await.unwrap() });
        Server {
            endpoint,
            lifecycle,
            _stop: stop.drop_guard(),
        }
    }

    async fn call(&self, headers: &[&str]) -> Result<(), Status> {
        let mut request = Request::new(GetCapabilitiesRequest::default());
        for header in headers {
            let value = header.parse().unwrap();
            request.metadata_mut().append("authorization", value);
        }
        let mut client = CapabilitiesClient::new(daemon::connect(&self.endpoint));
        client.get_capabilities(request).await.map(drop)
    }

    async fn show(&self, token: &str) -> Result<(), Status> {
        self.call(&[&format!("Bearer {token}")]).await
    }
}

fn write_keys(path: &Path, set: &Value) -> PathBuf {
    let file = path.join("keys.json");
    fs::write(&file, set.to_string()).unwrap();
    file
}

#[tokio::test(flavor = "multi_thread")]
async fn each_algorithm_counts_with_its_own_key() {
    let directory = tempfile::tempdir().unwrap();
    let keys = Keys::new();
    let server = Server::start(write_keys(directory.path(), &keys.set()));
    for algorithm in [
        "EdDSA", "ES256", "ES384", "RS256", "RS384", "RS512", "HS256",
    ] {
        if algorithm.starts_with("RS") && keys.rsa.is_none() {
            continue;
        }
        let token = keys.token(algorithm, &claims());
        // The second time it is known.
        for _ in 0..2 {
            let said = server.show(&token).await;
            assert!(said.is_ok(), "{algorithm}: {said:?}");
        }
        let other = Keys::new().token(algorithm, &claims());
        if algorithm != "HS256" {
            let status = server.show(&other).await.unwrap_err();
            assert_eq!(status.code(), Code::Unauthenticated, "{algorithm}");
            assert!(status.message().contains("none of the keys"), "{status}");
        }
    }
    // It is known who calls, and that is not enough.
    let stranger = keys.token("EdDSA", &claims_with("groups", json!(["staff"])));
    let status = server.show(&stranger).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied);
    assert!(
        status
            .message()
            .starts_with("Authorization: sub:alice may not "),
        "{status}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_tokens_are_refused_and_say_why() {
    let directory = tempfile::tempdir().unwrap();
    let keys = Keys::new();
    let server = Server::start(write_keys(directory.path(), &keys.set()));
    let none = json!({"alg": "none"});
    let hs256 = json!({"alg": "HS256"});
    let named = |kid: &str| json!({"alg": "HS256", "kid": kid});
    let public = keys.ed25519.public_key().as_ref().to_vec();
    let point = keys.p256.public_key().as_ref().to_vec();
    let unknown_key = json!({"alg": "EdDSA", "kid": "nobody"});
    let good = keys.token("EdDSA", &claims());
    let (head, _) = good.rsplit_once('.').unwrap();
    for (token, words) in [
        (
            assemble(&none, &claims(), |_| Vec::new()),
            "unknown algorithm",
        ),
        (
            assemble(&json!({"alg": "NONE"}), &claims(), |_| Vec::new()),
            "unknown algorithm",
        ),
        (
            assemble(&hs256, &claims(), |message| hmac_of(&public, message)),
            "none of the keys",
        ),
        (
            assemble(&hs256, &claims(), |message| hmac_of(&point, message)),
            "none of the keys",
        ),
        (
            assemble(&named("ed"), &claims(), |message| hmac_of(&public, message)),
            "none of the keys",
        ),
        (
            assemble(&unknown_key, &claims(), |m| keys.sign("EdDSA", m)),
            "none of the keys",
        ),
        (
            keys.token("EdDSA", &claims_with("aud", json!("other"))),
            "another audience",
        ),
        (keys.token("EdDSA", &claims_with("aud", json!(null))), ""),
        (
            keys.token("EdDSA", &claims_with("iss", json!("https://other"))),
            "another issuer",
        ),
        (
            keys.token("EdDSA", &claims_with("exp", json!(at(-120)))),
            "has expired",
        ),
        (keys.token("EdDSA", &claims_with("exp", json!("never"))), ""),
        (
            keys.token("EdDSA", &claims_with("nbf", json!(at(120)))),
            "not valid yet",
        ),
        (
            keys.token(
                "EdDSA",
                &json!({"sub": "alice", "aud": "farm", "iss": "https://issuer"}),
            ),
            "exp",
        ),
        (
            keys.token(
                "EdDSA",
                &claims_with(&"x".repeat(4000), json!(vec![1; 400])),
            ),
            "claims that come to more than",
        ),
        (
            keys.token("EdDSA", &claims_with("sub", json!("x".repeat(256)))),
            "a sub of more than 255 bytes",
        ),
        (format!("{head}."), "none of the keys"),
        (head.to_owned(), "no JSON Web Token"),
        ("x".to_owned(), "no JSON Web Token"),
        ("..".to_owned(), ""),
        ("x".repeat(13 << 10), "more than"),
        (
            keys.token("HS256", &claims_with("sub", json!("x".repeat(9500)))),
            "more than",
        ),
    ] {
        let status = server.show(&token).await.unwrap_err();
        assert_eq!(status.code(), Code::Unauthenticated, "{status} {token}");
        assert!(
            status.message().starts_with("Authorization: the token "),
            "{status}"
        );
        assert!(status.message().contains(words), "{words}: {status}");
    }
    // Within the leeway.
    let late = keys.token("EdDSA", &claims_with("exp", json!(at(-20))));
    server.show(&late).await.unwrap();

    let bearer = format!("Bearer {good}");
    for (headers, words) in [
        (vec![bearer.as_str(), bearer.as_str()], "several"),
        (vec!["Basic YWxpY2U6cGFzcw=="], "is not \"Bearer\""),
        (vec!["Bearer"], "is not \"Bearer\""),
        (vec![], "no certificate and no token"),
    ] {
        let status = server.call(&headers).await.unwrap_err();
        assert_eq!(status.code(), Code::Unauthenticated, "{status}");
        assert!(status.message().contains(words), "{status}");
    }
    // A header of 1 MiB does not even get as far, and costs others nothing.
    assert!(server.show(&"x".repeat(1 << 20)).await.is_err());
    server.show(&good).await.unwrap();
}

/// Ten thousand, half of them wrong; one of each hundred calls is an honest client's, with a token of its own.
#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_different_tokens_keep_nobody_from_being_served() {
    let directory = tempfile::tempdir().unwrap();
    let keys = Arc::new(Keys::new());
    let server = Server::start(write_keys(directory.path(), &keys.set()));
    let forger = Arc::new(Keys::new());
    let hostile: Vec<_> = (0..5)
        .map(|connection| {
            let client = CapabilitiesClient::new(daemon::connect(&server.endpoint));
            let (keys, forger) = (keys.clone(), forger.clone());
            tokio::spawn(async move {
                let mut calls = tokio::task::JoinSet::new();
                for number in 0..2000 {
                    let claims = claims_with("jti", json!([connection, number]));
                    let token = match number % 2 {
                        0 => keys.token("HS256", &claims),
                        _ => forger.token("ES256", &claims),
                    };
                    let mut client = client.clone();
                    calls.spawn(async move {
                        let mut request = Request::new(GetCapabilitiesRequest::default());
                        let value = format!("Bearer {token}").parse().unwrap();
                        request.metadata_mut().insert("authorization", value);
                        let said = client.get_capabilities(request).await;
                        assert_eq!(said.is_ok(), number % 2 == 0, "{said:?}");
                    });
                }
                while let Some(call) = calls.join_next().await {
                    call.unwrap();
                }
            })
        })
        .collect();
    let mut worst = Duration::ZERO;
    for number in 0..100 {
        let token = keys.token("EdDSA", &claims_with("jti", json!(number)));
        let begun = Instant::now();
        server.show(&token).await.unwrap();
        worst = worst.max(begun.elapsed());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(worst < Duration::from_secs(3), "{worst:?}");
    for hostile in hostile {
        hostile.await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_read_again_and_a_token_of_a_key_that_is_new_waits_for_nobody() {
    let directory = tempfile::tempdir().unwrap();
    let keys = Keys::new();
    let file = write_keys(directory.path(), &keys.set());
    let server = Server::start(file.clone());
    let (old, new) = (keys.token("EdDSA", &claims()), Keys::new());
    server.show(&old).await.unwrap();
    // Half written: what was there before counts.
    fs::write(&file, "{").unwrap();
    server.lifecycle.refresh(true).await;
    server.show(&old).await.unwrap();
    // Nobody has looked at the file again when the first token of the new key comes.
    let mut set = new.set();
    for key in set["keys"].as_array_mut().unwrap() {
        let name = format!("new-{}", key["kid"].as_str().unwrap());
        key["kid"] = json!(name);
    }
    write_keys(directory.path(), &set);
    let header = json!({"alg": "EdDSA", "kid": "new-ed"});
    let named = assemble(&header, &claims(), |message| new.sign("EdDSA", message));
    server.show(&named).await.unwrap();
    server.show(&new.token("ES384", &claims())).await.unwrap();
    let status = server.show(&old).await.unwrap_err();
    assert_eq!(status.code(), Code::Unauthenticated);
    // A set that is gone changes nothing.
    fs::remove_file(&file).unwrap();
    server.lifecycle.refresh(true).await;
    server.show(&named).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn our_clients_show_the_token_that_is_in_a_file_now() {
    let directory = tempfile::tempdir().unwrap();
    let keys = Keys::new();
    let server = Server::start(write_keys(directory.path(), &keys.set()));
    let file = directory.path().join("token");
    fs::write(
        &file,
        keys.token("ES256", &claims_with("exp", json!(at(-600)))),
    )
    .unwrap();
    let headers = CallHeaders {
        keys: ["storage.add_metadata", "storage.authorization_file"],
        add_metadata: &[],
        authorization_file: &file,
    };
    let credentials = Credentials::default()
        .with_headers(headers, Some(&server.lifecycle))
        .unwrap();
    let channel = daemon::connect_with(&server.endpoint, &credentials);
    let call = async || {
        let mut client = CapabilitiesClient::new(channel.clone());
        let request = GetCapabilitiesRequest::default();
        client.get_capabilities(request).await.map(drop)
    };
    assert_eq!(call().await.unwrap_err().code(), Code::Unauthenticated);
    fs::write(&file, keys.token("ES256", &claims()) + "\n").unwrap();
    server.lifecycle.refresh(true).await;
    call().await.unwrap();
    for broken in ["", "two words", "\u{1}"] {
        fs::write(&file, broken).unwrap();
        let none = Credentials::default();
        assert!(none.with_headers(headers, None).is_err(), "{broken:?}");
    }
}
