//! Somebody on the farm's network whom the farm does not know: `tests/package/shows/tls-hosts` runs him on a host of
//! his own.

use std::{collections::BTreeMap, fs, path::PathBuf};

use bb_remote_execution::{
    config::{Endpoint, call_headers::CallHeaders, tls::ClientTls},
    daemon::{self, Credentials},
};
use tonic::Code;

use crate::access::{call, methods};

/// Who shows the token in a file.
fn with_token(credentials: Credentials, token: &PathBuf) -> Credentials {
    let headers = CallHeaders {
        keys: ["", ""],
        add_metadata: &[],
        authorization_file: token,
    };
    credentials.with_headers(headers, None).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes a farm on the host BB_TEST_FARM, and files in BB_TEST_FILES: tests/package/run tls-hosts"]
async fn a_stranger_is_refused_everything_and_told_why() {
    let host = std::env::var("BB_TEST_FARM").unwrap();
    let files = PathBuf::from(std::env::var("BB_TEST_FILES").unwrap());
    let tls = |shown: Option<&str>| {
        let config = ClientTls {
            ca: files.join("ca.pem"),
            certificate: shown
                .map(|name| files.join(format!("{name}.pem")))
                .unwrap_or_default(),
            key: shown
                .map(|name| files.join(format!("{name}.key")))
                .unwrap_or_default(),
            server_name: String::new(),
        };
        Credentials::of("tls", &config)
    };
    let forged = files.join("forged.token");
    // Nobody has signed it ({"alg":"none"}).
    fs::write(
        &forged,
        "eyJhbGciOiJub25lIn0.eyJzdWIiOiJib2IiLCJhdWQiOiJidWlsZC1mYXJtIn0.",
    )
    .unwrap();
    for (who, encrypted, credentials) in [
        ("without TLS", false, Credentials::default()),
        ("without a certificate", true, tls(None)),
        (
            "with another authority's certificate",
            true,
            tls(Some("other")),
        ),
        (
            "with an expired token",
            true,
            with_token(tls(None), &files.join("expired.token")),
        ),
        (
            "with a token that nobody has signed",
            true,
            with_token(tls(None), &forged),
        ),
    ] {
        for (port, number) in [("clients", 8980), ("workers", 8983), ("state", 8984)] {
            let address = format!("{host}:{number}");
            let endpoint = match encrypted {
                true => Endpoint::Tls(address),
                false => Endpoint::Tcp(address),
            };
            let channel = daemon::connect_with(&endpoint, &credentials);
            let mut texts: BTreeMap<String, usize> = BTreeMap::new();
            for path in methods() {
                // Whether the farm is healthy is nobody's secret.
                if path.starts_with("/grpc.health.v1.") {
                    continue;
                }
                let status = call(&channel, &path).await.expect_err(&path);
                let refused = [
                    Code::Unauthenticated,
                    Code::PermissionDenied,
                    Code::FailedPrecondition,
                    Code::Unavailable,
                ];
                assert!(
                    refused.contains(&status.code()),
                    "{who} {port} {path}: {status}"
                );
                *texts.entry(status.message().to_owned()).or_default() += 1;
            }
            for (text, count) in texts {
                println!("   {who}, {port}: {count} methods: {text}");
            }
        }
    }
}
