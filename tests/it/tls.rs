//! TLS of listeners and of clients: who is let in, who hears what, and certificates that change.

use std::{net::SocketAddr, path::Path, time::Duration};

use bb_remote_execution::{
    config::{
        Endpoint, ListenAddress,
        tls::{ClientCertificates, ClientTls, ServerTls},
    },
    daemon::{self, Channel, Credentials, Lifecycle, ServerLimits, Services},
    proto::reapi::{GetCapabilitiesRequest, capabilities_client::CapabilitiesClient},
    storage::serve,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{Code, Status};

use crate::harness::pki::{Authority, Leaf, Pair};

struct Server {
    address: SocketAddr,
    lifecycle: Lifecycle,
    _stop: DropGuard,
}

impl Server {
    fn start(config: &ServerTls) -> Server {
        Server::start_within(config, ServerLimits::default())
    }

    fn start_within(config: &ServerTls, limits: ServerLimits) -> Server {
        let anywhere = ListenAddress::Tcp(([127, 0, 0, 1], 0).into());
        let lifecycle = Lifecycle::new();
        let tls = daemon::server_tls("clients.tls", config, &lifecycle).unwrap();
        let listener = daemon::listen("", "listen", &anywhere, None).unwrap();
        let listener = listener.with_tls(tls);
        let address = listener.address().parse().unwrap();
        let stop = CancellationToken::new();
        let services = Services::default().add(serve::capabilities(serve::Announcement {
            exec_enabled: true,
            ..Default::default()
        }));
        let routes = services.observable(&stop).unwrap();
        let serving = daemon::serve_within(listener, routes, limits, stop.clone(), Duration::ZERO);
        tokio::spawn(async move { serving.await.unwrap() });
        Server {
            address,
            lifecycle,
            _stop: stop.drop_guard(),
        }
    }

    fn channel(&self, config: &ClientTls) -> Channel {
        let endpoint = Endpoint::Tls(self.address.to_string());
        let credentials = Credentials::open("storage.tls", config, &self.lifecycle).unwrap();
        daemon::connect_with(&endpoint, &credentials)
    }

    /// One call on a connection of its own.
    async fn call(&self, config: &ClientTls) -> Result<(), Status> {
        call(&self.channel(config)).await
    }
}

async fn call(channel: &Channel) -> Result<(), Status> {
    let request = GetCapabilitiesRequest::default();
    let mut client = CapabilitiesClient::new(channel.clone());
    client.get_capabilities(request).await.map(drop)
}

fn listener(pair: &Pair) -> ServerTls {
    ServerTls {
        certificate: pair.certificate.clone(),
        key: pair.key.clone(),
        ..Default::default()
    }
}

fn client(authority: &Authority, pair: Option<&Pair>) -> ClientTls {
    let none = Pair {
        certificate: Default::default(),
        key: Default::default(),
    };
    let Pair { certificate, key } = pair.unwrap_or(&none).clone();
    ClientTls {
        ca: authority.certificate.clone(),
        certificate,
        key,
        server_name: String::new(),
    }
}

#[track_caller]
fn refused(result: Result<(), Status>, words: &str) {
    let status = result.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    assert!(status.message().contains(words), "{status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_is_trusted_by_its_authority_and_its_name() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let (ca, other) = (Authority::new(path, "ca"), Authority::new(path, "other"));
    let good = ca.issue(path, "server", &Leaf::default());
    let server = Server::start(&listener(&good));
    server.call(&client(&ca, None)).await.unwrap();
    refused(server.call(&client(&other, None)).await, "tls.ca");
    // None of the host's authorities.
    refused(
        call(&daemon::connect(&Endpoint::Tls(server.address.to_string()))).await,
        "TLS",
    );
    let another_name = ClientTls {
        server_name: "storage.example".to_owned(),
        ..client(&ca, None)
    };
    refused(server.call(&another_name).await, "storage.example");

    let elsewhere = Leaf {
        alternative_names: &["storage.example"],
        ..Default::default()
    };
    let elsewhere = Server::start(&listener(&ca.issue(path, "elsewhere", &elsewhere)));
    refused(
        elsewhere.call(&client(&ca, None)).await,
        "not valid for name",
    );
    elsewhere.call(&another_name).await.unwrap();

    for (valid, words) in [((-7200, -3600), "expired"), ((3600, 7200), "not valid yet")] {
        let leaf = Leaf {
            valid,
            ..Default::default()
        };
        let server = Server::start(&listener(&ca.issue(path, "late", &leaf)));
        refused(server.call(&client(&ca, None)).await, words);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_is_let_in_by_its_certificate() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let (ca, other) = (Authority::new(path, "ca"), Authority::new(path, "other"));
    let pair = ca.issue(path, "server", &Leaf::default());
    let named = |serial| Leaf {
        name: "worker",
        alternative_names: &["spiffe://farm/worker"],
        serial,
        ..Default::default()
    };
    let (good, revoked) = (
        ca.issue(path, "good", &named(2)),
        ca.issue(path, "revoked", &named(3)),
    );
    let wrong = other.issue(path, "wrong", &named(4));
    let old = Leaf {
        valid: (-7200, -3600),
        ..named(5)
    };
    let old = ca.issue(path, "old", &old);
    let lists = path.join("lists.pem");
    ca.revoke(&lists, 3);
    let required = ServerTls {
        client_ca: ca.certificate.clone(),
        client_crl: lists,
        ..listener(&pair)
    };
    let optional = ServerTls {
        client_certificates: ClientCertificates::Optional,
        ..required.clone()
    };
    for config in [required, optional] {
        let server = Server::start(&config);
        server.call(&client(&ca, Some(&good))).await.unwrap();
        for (pair, words) in [
            (&wrong, "received fatal alert"),
            (&revoked, "received fatal alert: CertificateRevoked"),
            (&old, "received fatal alert: CertificateExpired"),
        ] {
            refused(server.call(&client(&ca, Some(pair))).await, words);
        }
        let nameless = server.call(&client(&ca, None)).await;
        match config.client_certificates {
            ClientCertificates::Required => refused(nameless, "set tls.certificate"),
            ClientCertificates::Optional => nameless.unwrap(),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_has_the_wrong_scheme_is_told_on_both_sides() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let ca = Authority::new(path, "ca");
    let pair = ca.issue(path, "server", &Leaf::default());
    let server = Server::start(&listener(&pair));
    let plain = daemon::connect(&Endpoint::Tcp(server.address.to_string()));
    let status = call(&plain).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
    assert!(status.message().contains("grpcs://"), "{status}");

    let mut browser = TcpStream::connect(server.address).await.unwrap();
    browser.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    browser.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
    assert!(answer.contains("speaks TLS"), "{answer}");

    let server = Server::start(&ServerTls::default());
    refused(server.call(&client(&ca, None)).await, "write grpc://");
}

#[tokio::test(flavor = "multi_thread")]
async fn new_certificates_are_used_without_losing_a_connection() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let (ca, other) = (Authority::new(path, "ca"), Authority::new(path, "other"));
    let pair = ca.issue(path, "server", &Leaf::default());
    let server = Server::start(&listener(&pair));
    let first = server.channel(&client(&ca, None));
    call(&first).await.unwrap();
    // A broken one changes nothing.
    std::fs::write(&pair.certificate, "nonsense").unwrap();
    server.lifecycle.refresh(true).await;
    server.call(&client(&ca, None)).await.unwrap();
    // Nor does one whose key is another's.
    let stranger = ca.issue(path, "stranger", &Leaf::default());
    std::fs::copy(&stranger.certificate, &pair.certificate).unwrap();
    server.lifecycle.refresh(true).await;
    server.call(&client(&ca, None)).await.unwrap();

    other.issue(path, "server", &Leaf::default());
    server.lifecycle.refresh(false).await;
    server.call(&client(&other, None)).await.unwrap();
    refused(server.call(&client(&ca, None)).await, "tls.ca");
    // The one that was made before has no part in it.
    call(&first).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_ends_with_its_clients_certificate_and_is_made_anew_with_the_next() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let ca = Authority::new(path, "ca");
    let config = ServerTls {
        client_ca: ca.certificate.clone(),
        ..listener(&ca.issue(path, "server", &Leaf::default()))
    };
    let limits = ServerLimits {
        handshake: Duration::from_secs(10),
        // Connections are looked at as often.
        stalled_when_short: Duration::from_millis(100),
        ..ServerLimits::default()
    };
    let server = Server::start_within(&config, limits);
    let short = Leaf {
        valid: (-60, 2),
        ..Default::default()
    };
    let pair = ca.issue(path, "client", &short);
    let channel = server.channel(&client(&ca, Some(&pair)));
    call(&channel).await.unwrap();
    tokio::time::sleep(Duration::from_millis(3500)).await;
    refused(call(&channel).await, "CertificateExpired");
    ca.issue(path, "client", &Leaf::default());
    server.lifecycle.refresh(false).await;
    call(&channel).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn handshakes_that_stall_are_cut_off_and_leave_others_served() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let ca = Authority::new(path, "ca");
    let pair = ca.issue(path, "server", &Leaf::default());
    let limits = ServerLimits {
        half_open: 20,
        handshake: Duration::from_secs(2),
        ..ServerLimits::default()
    };
    let server = Server::start_within(&listener(&pair), limits);
    let mut stalled = Vec::new();
    for number in 0..200u8 {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        // Some have said nothing, others the beginning of a handshake.
        if number % 2 == 0 {
            stream.write_all(&[22, 3, 1, 2, 0, 1]).await.unwrap();
        }
        stalled.push(stream);
    }
    server.call(&client(&ca, None)).await.unwrap();
    // Of all but 20, whether or not anybody waited for them.
    let closed = async |stream: &mut TcpStream| {
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest).await;
    };
    for stream in &mut stalled {
        let limit = Duration::from_secs(30);
        tokio::time::timeout(limit, closed(stream)).await.unwrap();
    }
    server.call(&client(&ca, None)).await.unwrap();
}

/// A whole farm whose clients and workers are known by certificates.
#[tokio::test(flavor = "multi_thread")]
async fn a_farm_works_with_certificates_on_all_sides() {
    use crate::harness::{Farm, Task, is_ok, is_root};
    if !is_root() {
        return;
    }
    let directory = tempfile::tempdir_in("/var/tmp").unwrap();
    let path = directory.path();
    let farm = Farm::start_encrypted(Path::new("/var/tmp"), 2, path, "").await;
    assert!(is_ok(&farm.client().run(&Task::shell("exit 0")).await));
    let plain = daemon::connect(&Endpoint::Tcp(format!("127.0.0.1:{}", farm.port())));
    assert_eq!(
        call(&plain).await.unwrap_err().code(),
        Code::FailedPrecondition
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_that_are_renewed_all_the_time_fail_no_call() {
    use crate::harness::{Farm, Task, is_ok, is_root};
    if !is_root() {
        return;
    }
    let directory = tempfile::tempdir_in("/var/tmp").unwrap();
    let path = directory.path();
    let farm = Farm::start_encrypted(Path::new("/var/tmp"), 4, path, "").await;
    let over = CancellationToken::new();
    let mut building = tokio::task::JoinSet::new();
    for number in 0..4 {
        let (over, client) = (over.clone(), farm.client());
        // Every other one makes a connection for each action.
        let fresh: Vec<_> = (0..400).map(|_| farm.client()).collect();
        building.spawn(async move {
            let mut done = 0;
            for fresh in fresh {
                if over.is_cancelled() {
                    break;
                }
                let client = if number % 2 == 0 { &client } else { &fresh };
                let task = Task::shell(&format!("echo {number} {done}"));
                let response = client.try_run(&task).await.unwrap();
                assert!(is_ok(&response), "{response:?}");
                done += 1;
            }
            done
        });
    }
    for _ in 0..5 {
        tokio::time::sleep(Duration::from_secs(3)).await;
        farm.renew_certificates();
    }
    tokio::time::sleep(Duration::from_secs(3)).await;
    over.cancel();
    let done: usize = building.join_all().await.into_iter().sum();
    assert!(done > 20, "{done}");
    let log = farm.log("bb_scheduler");
    let renewed = log
        .matches("files have changed, and were read again")
        .count();
    assert!(renewed >= 4, "{renewed}: {log}");
}
