//! The pages, as a browser asks for them.

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpStream, UnixStream},
};

use super::*;

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

/// A port of the loopback that nobody listens on.
fn free_port() -> u16 {
    let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    socket.local_addr().unwrap().port()
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
    let port = free_port();
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
        assert!(page.body.contains("may not \"see\""), "{}", page.body);
    }
}
