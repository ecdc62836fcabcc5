//! What TLS and tokens cost: the same calls of a scheduler over plain TCP, with certificates on both sides, and with a
//! token, in turns.
//!
//! usage: cargo bench --bench farm -- secure [rounds=5] [actions=2000] [blobs=50]

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Instant, SystemTime},
};

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD as BASE64};
use bb_remote_execution::{
    config::{Endpoint, call_headers::CallHeaders, tls::ClientTls},
    daemon::{self, Credentials},
    proto::{
        bytestream::{WriteRequest, byte_stream_client::ByteStreamClient},
        reapi::Digest,
    },
};

use crate::{
    harness::{
        Client, digest_of, free_address,
        pki::{Authority, Leaf},
        scheduler_process::SchedulerProcess,
    },
    noop::{Place, Shared, execute, processor_time, upload, work},
};

const WORKERS: usize = 64;
const BLOB: usize = 4 << 20;

pub fn run(arguments: &[String]) {
    let number = |key: &str, default: usize| crate::number(arguments, key, default);
    let (rounds, actions) = (number("rounds", 5), number("actions", 2000));
    let blobs = number("blobs", 50);
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let mut variants = Vec::new();
        for kind in [Kind::Plain, Kind::Certificates, Kind::Token] {
            variants.push(Variant::start(kind).await);
        }
        for round in 0..rounds {
            for variant in &mut variants {
                variant.measure(round, actions, blobs).await;
            }
        }
        println!("medians of {rounds} rounds in turns, {WORKERS} workers that do nothing");
        for variant in &mut variants {
            variant.tell();
        }
    });
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Plain,
    Certificates,
    Token,
}

struct Variant {
    kind: Kind,
    process: SchedulerProcess,
    client: Client,
    shared: Arc<Shared>,
    _workers: tokio::task::JoinSet<()>,
    /// Of each round: actions a second at 1 and 64 in flight, MB a second up and down, and microseconds of
    /// the scheduler's processor for an action at 64, and for a blob up and down.
    figures: [Vec<f64>; 6],
}

impl Variant {
    async fn start(kind: Kind) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        let free = || free_address().to_string();
        let (clients, workers) = (free(), free());
        let endpoint = |authority: &String| match kind {
            Kind::Plain => Endpoint::Tcp(authority.clone()),
            Kind::Certificates | Kind::Token => Endpoint::Tls(authority.clone()),
        };
        let (text, credentials) = secure(kind, path);
        let text = format!("workers.listen = \"{workers}\"\n{text}");
        let (clients, workers) = (endpoint(&clients), endpoint(&workers));
        let process = SchedulerProcess::start_in(directory, clients.clone(), &text);
        process.says(0, "ready").await;
        let shared = Arc::new(Shared::default());
        let mut tasks = tokio::task::JoinSet::new();
        let channel = daemon::connect_with(&workers, &credentials);
        for number in 0..WORKERS {
            tasks.spawn(work(
                number,
                Place::default(),
                channel.clone(),
                shared.clone(),
            ));
        }
        let client = Client {
            channel: daemon::connect_with(&clients, &credentials),
            instance: String::new(),
        };
        let first = upload(&client, "first", 1).await;
        execute(&client, "", 0, &first[0], &shared).await;
        Variant {
            kind,
            process,
            client,
            shared,
            _workers: tasks,
            figures: Default::default(),
        }
    }

    async fn measure(&mut self, round: usize, actions: usize, blobs: usize) {
        let pid = self.process.pid();
        for (at, in_flight, count) in [(0, 1, actions / 4), (1, 64, actions)] {
            let name = format!("{round}-{in_flight}");
            let digests = Arc::new(upload(&self.client, &name, count).await);
            let next = Arc::new(AtomicUsize::new(0));
            let (begun, before) = (Instant::now(), processor_time(pid));
            let mut tasks = tokio::task::JoinSet::new();
            for _ in 0..in_flight {
                let (next, digests) = (next.clone(), digests.clone());
                let (client, shared) = (self.client.clone(), self.shared.clone());
                tasks.spawn(async move {
                    while let Some(digest) = digests.get(next.fetch_add(1, Ordering::Relaxed)) {
                        execute(&client, "build", 0, digest, &shared).await;
                    }
                });
            }
            tasks.join_all().await;
            self.figures[at].push(count as f64 / begun.elapsed().as_secs_f64());
            if at == 1 {
                let spent = processor_time(pid) - before;
                self.figures[4].push(spent / count as f64 * 1e6);
            }
        }
        let mut data = vec![0; BLOB];
        fastrand::Rng::with_seed(round as u64).fill(&mut data);
        let (mut up, mut down) = (0.0, 0.0);
        let before = processor_time(pid);
        for number in 0..blobs {
            data[..8].copy_from_slice(&(number as u64).to_le_bytes());
            let digest = digest_of(&data);
            let begun = Instant::now();
            write(&self.client, &digest, &data).await;
            up += begun.elapsed().as_secs_f64();
            let begun = Instant::now();
            assert_eq!(self.client.read(&digest).await.len(), BLOB);
            down += begun.elapsed().as_secs_f64();
        }
        self.figures[5].push((processor_time(pid) - before) / blobs as f64 * 1e6);
        let moved = (blobs * BLOB) as f64 / 1e6;
        self.figures[2].push(moved / up);
        self.figures[3].push(moved / down);
    }

    fn tell(&mut self) {
        let [one, many, up, down, action, blob] = self.figures.each_mut().map(|figures| {
            figures.sort_by(f64::total_cmp);
            figures[figures.len() / 2]
        });
        println!(
            "{:?}: {one:.0} actions a second with 1 in flight, {many:.0} with 64; {action:.0} µs of the \
             scheduler's processor for each; blobs of 4 MiB {up:.0} MB/s up, {down:.0} MB/s down, {blob:.0} µs \
             for each",
            self.kind
        );
    }
}

/// In pieces of 1 MiB.
async fn write(client: &Client, digest: &Digest, data: &[u8]) {
    let name = format!("uploads/{0}/blobs/{0}/{1}", digest.hash, digest.size_bytes);
    let pieces: Vec<WriteRequest> = data
        .chunks(1 << 20)
        .enumerate()
        .map(|(number, piece)| WriteRequest {
            resource_name: name.clone(),
            write_offset: (number << 20) as i64,
            finish_write: (number + 1) << 20 >= data.len(),
            data: piece.to_vec().into(),
        })
        .collect();
    let mut client = ByteStreamClient::new(client.channel.clone());
    client.write(futures::stream::iter(pieces)).await.unwrap();
}

/// What is added to the scheduler's configuration, and what clients and workers show.
fn secure(kind: Kind, path: &Path) -> (String, Credentials) {
    if kind == Kind::Plain {
        return (String::new(), Credentials::default());
    }
    let authority = Authority::new(path, "ca");
    let issue = |name| {
        let leaf = Leaf {
            name,
            ..Leaf::default()
        };
        authority.issue(path, name, &leaf)
    };
    let (server, client) = (issue("server"), issue("client"));
    let ca = authority.certificate.display();
    let mut text = String::new();
    for port in ["clients", "workers"] {
        let (certificate, key) = (server.certificate.display(), server.key.display());
        text +=
            &format!("{port}.tls.certificate = \"{certificate}\"\n{port}.tls.key = \"{key}\"\n");
        if kind == Kind::Certificates {
            text += &format!("{port}.tls.client_ca = \"{ca}\"\n");
        }
    }
    let mut tls = ClientTls {
        ca: authority.certificate.clone(),
        ..Default::default()
    };
    let all = "may = [\"execute\", \"cas.read\", \"cas.write\", \"action_cache.read\", \"action_cache.write\", \"work\"]\n";
    if kind == Kind::Certificates {
        (tls.certificate, tls.key) = (client.certificate, client.key);
        text += &format!("[[grants]]\nwho = [\"cn:client\"]\n{all}");
        return (text, Credentials::of("tls", &tls));
    }
    let secret = [7; 32];
    let (keys, token) = (path.join("keys"), path.join("token"));
    let set = format!(
        r#"{{"keys":[{{"kty":"oct","k":"{}"}}]}}"#,
        BASE64.encode(secret)
    );
    fs::write(&keys, set).unwrap();
    fs::set_permissions(&keys, fs::Permissions::from_mode(0o600)).unwrap();
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap();
    let claims = format!(
        r#"{{"sub":"client","aud":"farm","exp":{}}}"#,
        now.as_secs() + 36_000
    );
    let message = format!(
        "{}.{}",
        BASE64.encode(r#"{"alg":"HS256"}"#),
        BASE64.encode(claims)
    );
    let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, &secret);
    let signature = BASE64.encode(ring::hmac::sign(&key, message.as_bytes()));
    fs::write(&token, format!("{message}.{signature}")).unwrap();
    text += &format!(
        "tokens = {{ key_set = \"{}\", audiences = [\"farm\"] }}\n",
        keys.display()
    );
    text += &format!("[[grants]]\nwho = [\"sub:client\"]\n{all}");
    let headers = CallHeaders {
        keys: ["", ""],
        add_metadata: &[],
        authorization_file: &token,
    };
    let credentials = Credentials::of("tls", &tls)
        .with_headers(headers, None)
        .unwrap();
    (text, credentials)
}
