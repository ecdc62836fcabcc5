//! The pages, as a browser asks for them.

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpStream, UnixStream},
};

use super::*;
use crate::harness::free_address;

/// What came back: the status, the headers in lower case, and the body.
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: String,
}

async fn exchange(mut stream: impl AsyncRead + AsyncWrite + Unpin, request: String) -> Answer {
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    Answer {
        status: head.split(' ').nth(1).unwrap().parse().unwrap(),
        head: head.to_lowercase(),
        body: body.to_owned(),
    }
}

impl Scheduler {
    /// GET, with further headers, by the Unix socket.
    pub async fn page(&self, path: &str) -> Answer {
        let socket = UnixStream::connect(self.directory.path().join("web"));
        let request = format!("GET {path} HTTP/1.1\r\nHost: farm\r\nConnection: close\r\n\r\n");
        exchange(socket.await.unwrap(), request).await
    }
}

#[tokio::test]
async fn pages_are_served_with_headers_that_forbid_what_is_of_other_sites() {
    let scheduler = Scheduler::start(|_| {}).await;
    let page = scheduler.page("/").await;
    assert_eq!(page.status, 200, "{}", page.body);
    assert!(page.body.contains("The farm at a glance"), "{}", page.body);
    for header in [
        "content-security-policy: default-src 'none'; script-src 'self'",
        "x-content-type-options: nosniff",
        "cache-control: no-store",
        "httponly; samesite=strict",
    ] {
        assert!(page.head.contains(header), "{header}: {}", page.head);
    }
    assert!(!page.body.contains("style="), "{}", page.body);
    for (path, kind) in [("style.css", "text/css"), ("script.js", "text/javascript")] {
        let asset = scheduler.page(&format!("/assets/{path}")).await;
        assert_eq!(asset.status, 200);
        assert!(asset.head.contains(kind), "{}", asset.head);
    }
    let unknown = scheduler.page("/x%3Cb%3E").await;
    assert_eq!(unknown.status, 404);
    assert!(!unknown.body.contains("<b>"), "{}", unknown.body);
}

#[tokio::test]
async fn a_name_that_is_not_this_hosts_leads_to_no_page() {
    let port = free_address().port();
    let scheduler = Scheduler::start(|config| {
        config.web.listen = ListenAddress::Tcp(([127, 0, 0, 1], port).into());
        config.web.url = "http://farm.example/".to_owned();
    })
    .await;
    for (host, status) in [
        (format!("127.0.0.1:{port}"), 200),
        (format!("localhost:{port}"), 200),
        ("farm.example".to_owned(), 200),
        (format!("evil.example:{port}"), 421),
    ] {
        let stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        let request = format!("GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        assert_eq!(exchange(stream, request).await.status, status, "{host}");
    }
    drop(scheduler);
}

#[tokio::test]
async fn whoever_may_not_see_is_shown_nothing() {
    let scheduler = Scheduler::start(|config| {
        let grants = "grants = [{ who = [\"uid:4294967294\"], may = [\"see\"] },
                                { who = [\"anyone\"], may = [\"execute\"] }]";
        #[derive(serde::Deserialize)]
        struct File {
            grants: Vec<config::grants::Grant>,
        }
        config.grants = toml::from_str::<File>(grants).unwrap().grants;
    });
    let scheduler = scheduler.await;
    for path in ["/", "/nothing"] {
        let page = scheduler.page(path).await;
        assert_eq!(page.status, 403, "{path}");
        assert!(
            page.body.contains("may not &quot;see&quot;"),
            "{}",
            page.body
        );
    }
}

/// A form of a page, sent as a browser does; `headers` take the place of what it would say.
async fn post(scheduler: &Scheduler, path: &str, form: &str, headers: &str) -> Answer {
    let socket = UnixStream::connect(scheduler.directory.path().join("web"));
    let length = form.len();
    let request = format!(
        "POST {path} HTTP/1.1\r\nHost: farm\r\nConnection: close\r\n{headers}\
         Content-Type: application/x-www-form-urlencoded\r\nContent-Length: {length}\r\n\r\n{form}"
    );
    exchange(socket.await.unwrap(), request).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_is_drained_by_a_form_of_this_site_and_by_no_other() {
    let scheduler = Scheduler::start(|_| {}).await;
    scheduler.synchronize("w", IDLE).await.unwrap();
    let page = scheduler.page("/workers").await;
    assert!(page.body.contains("Drain this worker"), "{}", page.body);
    let part = |begin: &str, text: &str| {
        let rest = text
            .split(begin)
            .nth(1)
            .unwrap_or_else(|| panic!("{begin}: {text}"));
        rest.split(['"', ';']).next().unwrap().to_owned()
    };
    let token = part("name=\"token\" value=\"", &page.body);
    let cookie = part("bb_scheduler_form=", &page.head);
    let cookie = format!("Cookie: a=b; bb_scheduler_form={cookie}\r\n");
    let form = |token: &str| {
        format!(
            "token={token}&instance=&platform=%5B%5B%22OSFamily%22%2C%22linux%22%5D%5D&size=0\
             &workers=%7B%22name%22%3A%22w%22%7D"
        )
    };
    let is_drained = async || {
        scheduler
            .page("/workers")
            .await
            .body
            .contains("drained</span>")
    };
    for (form, headers) in [
        (form(""), cookie.clone()),
        (form("guessed"), cookie.clone()),
        (form(&token), String::new()),
        (
            form(&token),
            format!("{cookie}Origin: http://evil.example\r\n"),
        ),
        (
            form(&token),
            format!("{cookie}Sec-Fetch-Site: cross-site\r\n"),
        ),
    ] {
        let answer = post(&scheduler, "/workers/drain", &form, &headers).await;
        assert_eq!(answer.status, 403, "{headers}: {}", answer.body);
        assert!(!is_drained().await, "{headers}");
    }
    let headers = format!("{cookie}Origin: http://farm\r\nSec-Fetch-Site: same-origin\r\n");
    let answer = post(&scheduler, "/workers/drain", &form(&token), &headers).await;
    assert_eq!(answer.status, 303, "{}", answer.body);
    assert!(is_drained().await);
    let answer = post(&scheduler, "/workers/undrain", &form(&token), &headers).await;
    assert_eq!(answer.status, 303, "{}", answer.body);
    assert!(!is_drained().await);
    let large = format!("{}&x={}", form(&token), "y".repeat(100_000));
    let answer = post(&scheduler, "/workers/drain", &large, &headers).await;
    assert_eq!(answer.status, 413, "{}", answer.body);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_gone_or_is_none_has_a_page_that_says_so() {
    let scheduler = Scheduler::start(|_| {}).await;
    let noise = scheduler.upload(b"\xff\xff\xff\xff none".to_vec()).await;
    let text = scheduler
        .upload(b"<script>alert(1)</script>\x1b[31mred".to_vec())
        .await;
    let address = |kind: &str, digest: &Digest| {
        format!(
            "/blobs/sha256/{kind}/{}-{}/",
            digest.hash, digest.size_bytes
        )
    };
    for kind in [
        "action",
        "command",
        "directory",
        "tree",
        "historical_execute_response",
    ] {
        let page = scheduler.page(&address(kind, &noise)).await;
        assert_eq!(page.status, 422, "{kind}: {}", page.body);
        assert!(page.body.contains("Download the blob"), "{kind}");
        let gone = Digest {
            hash: "1".repeat(64),
            size_bytes: 7,
        };
        let page = scheduler.page(&address(kind, &gone)).await;
        assert_eq!(page.status, 404, "{kind}: {}", page.body);
        assert!(page.body.contains("Build again"), "{kind}: {}", page.body);
        let huge = Digest {
            hash: "1".repeat(64),
            size_bytes: 1 << 50,
        };
        assert_eq!(
            scheduler.page(&address(kind, &huge)).await.status,
            404,
            "{kind}"
        );
    }
    let action = scheduler.action("x", |_| {}).await;
    // It names no command.
    assert_eq!(
        scheduler.page(&address("action", &action)).await.status,
        422
    );
    let file = address("file", &text);
    let shown = scheduler.page(&format!("{file}x.txt?format=view")).await;
    assert!(!shown.body.contains("<script>alert"), "{}", shown.body);
    assert!(shown.body.contains("class=\"f1\">red"), "{}", shown.body);
    let loaded = scheduler.page(&format!("{file}%22%0D%0Ax%3A.html")).await;
    assert!(loaded.body.starts_with("<script>"), "{}", loaded.body);
    assert!(
        loaded.head.contains("application/octet-stream"),
        "{}",
        loaded.head
    );
    assert!(
        loaded.head.contains("filename*=utf-8''%22%0d%0ax%3a.html"),
        "{}",
        loaded.head
    );
    for wrong in [
        "/blobs/sha256/action/x-1/",
        "/blobs/md6/action/1-1/",
        "/blobs/sha256/action/1/",
    ] {
        assert_eq!(scheduler.page(wrong).await.status, 400, "{wrong}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_archive_with_a_name_that_leads_elsewhere_is_refused() {
    let scheduler = Scheduler::start(|_| {}).await;
    let directory = |name: &str| reapi::Directory {
        symlinks: vec![reapi::SymlinkNode {
            name: name.to_owned(),
            target: "/etc".to_owned(),
            ..Default::default()
        }],
        ..Default::default()
    };
    for (name, status) in [("good", 200), ("../evil", 422), ("a/b", 422)] {
        let digest = scheduler.upload(directory(name).encode_to_vec()).await;
        let path = format!(
            "/blobs/sha256/directory/{}-{}/?format=tar",
            digest.hash, digest.size_bytes
        );
        let archive = scheduler.page(&path).await;
        assert_eq!(archive.status, status, "{name}");
        // The last chunk is empty where all of it has come (RFC 9112, section 7.1).
        assert_eq!(archive.body.ends_with("0\r\n\r\n"), status == 200, "{name}");
    }
    // What it names is gone.
    let missing = reapi::Directory {
        directories: vec![reapi::DirectoryNode {
            name: "d".to_owned(),
            digest: Some(Digest {
                hash: "1".repeat(64),
                size_bytes: 7,
            }),
        }],
        ..Default::default()
    };
    let digest = scheduler.upload(missing.encode_to_vec()).await;
    let path = format!(
        "/blobs/sha256/directory/{}-{}/?format=tar",
        digest.hash, digest.size_bytes
    );
    assert_eq!(scheduler.page(&path).await.status, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn output_is_read_while_an_action_runs_and_the_rest_comes_from_its_result() {
    use bb_remote_execution::proto::{
        bytestream::{ReadRequest, byte_stream_client::ByteStreamClient},
        live_output::{
            Answer as Told, WorkerMessage, WorkerState, live_output_client::LiveOutputClient,
            worker_message,
        },
    };
    let scheduler = Scheduler::start(|_| {}).await;
    let id = "{\"name\":\"w\"}".to_owned();
    let (sender, receiver) = tokio::sync::mpsc::channel(4);
    let say = |message| WorkerMessage {
        message: Some(message),
    };
    sender
        .send(say(worker_message::Message::State(WorkerState {
            version: "7 <b>".to_owned(),
            worker_ids: vec![id.clone()],
            ..Default::default()
        })))
        .await
        .unwrap();
    let mut live = LiveOutputClient::new(scheduler.workers.clone());
    let messages = tokio_stream::wrappers::ReceiverStream::new(receiver);
    let mut questions = live.serve(messages).await.unwrap().into_inner();
    tokio::spawn(async move {
        while let Ok(Some(question)) = questions.message().await {
            assert_eq!(question.worker_id, id);
            let all = b"first\nsecond\n";
            let offset = question.offset.max(0) as usize;
            let told = Told {
                number: question.number,
                executing: true,
                offset: offset as u64,
                data: all.get(offset..).unwrap_or_default().to_vec().into(),
                size: all.len() as u64,
                ..Default::default()
            };
            let _ = sender
                .send(say(worker_message::Message::Answer(told)))
                .await;
        }
    });
    let held = scheduler.parked("w").await;
    let action = scheduler.action("x", |_| {}).await;
    let mut operations = scheduler.execute(&action).await.unwrap();
    desired(held.await.unwrap().unwrap());
    let metadata: ExecuteOperationMetadata = loop {
        let operation = next(&mut operations).await;
        if stage(&operation) == Stage::Executing {
            break proto::unpack(operation.metadata.as_ref().unwrap()).unwrap();
        }
    };
    assert!(
        metadata.stderr_stream_name.ends_with("/stderr"),
        "{metadata:?}"
    );
    let mut client = ByteStreamClient::new(scheduler.clients.clone());
    let request = ReadRequest {
        resource_name: metadata.stdout_stream_name.clone(),
        read_offset: 2,
        read_limit: 0,
    };
    let mut stream = client.read(request.clone()).await.unwrap().into_inner();
    let first = stream.message().await.unwrap().unwrap();
    assert_eq!(&*first.data, b"rst\nsecond\n");
    let operation = metadata.stdout_stream_name.rsplit("/").nth(1).unwrap();
    let page = scheduler.page(&format!("/operations/{operation}")).await;
    assert!(page.body.contains("first\nsecond\n"), "{}", page.body);
    assert!(
        scheduler
            .page("/workers")
            .await
            .body
            .contains("7 &lt;b&gt;")
    );
    let done = executing(
        &action,
        ExecutionState::Completed(ExecuteResponse {
            result: Some(reapi::ActionResult {
                stdout_raw: b"first\nsecond\nlast\n".to_vec().into(),
                ..Default::default()
            }),
            ..Default::default()
        }),
    );
    scheduler.synchronize("w", done).await.unwrap();
    let mut rest = Vec::new();
    while let Some(message) = stream.message().await.unwrap() {
        rest.extend_from_slice(&message.data);
    }
    assert_eq!(rest, b"last\n");
    let limited = ReadRequest {
        read_limit: 3,
        ..request
    };
    let mut stream = client.read(limited).await.unwrap().into_inner();
    assert_eq!(&*stream.message().await.unwrap().unwrap().data, b"rst");
    let unknown = ReadRequest {
        resource_name: format!("logstreams/{}/stdout", uuid::Uuid::nil()),
        ..Default::default()
    };
    let refused = client.read(unknown).await.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound, "{refused}");
}
