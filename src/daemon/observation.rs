//! What a daemon tells those who watch it, by HTTP/1.1 (RFC 9112): metrics, whether it works, and to its own
//! commands what it does.
//!
//! | path | |
//! |---|---|
//! | `/metrics` | OpenMetrics text |
//! | `/-/healthy` | 200 while the process answers |
//! | `/-/ready` | 200 while it serves; else 503, and why not |
//! | `/status` | what it does, in JSON; on Unix sockets only |
//!
//! A connection is one request. That is all that Prometheus and load balancers need, and less than a server
//! of HTTP would bring into a daemon that is root.

use std::{io, sync::Arc, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::Semaphore,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    Failure, Metrics,
    listen::{AcceptedStream, Listener, Socket},
};

/// Of one listener at a time; others wait to be accepted. So whoever fills the port for metrics does not keep
/// this host's commands from the control socket.
const CONNECTIONS: usize = 32;
const LARGEST_HEAD: usize = 8 << 10;
/// From the connection's start to the end of the head: it has nothing to wait for.
const HEAD_TIMEOUT: Duration = Duration::from_secs(2);
/// From the first byte to the last one.
const EXCHANGE_TIMEOUT: Duration = Duration::from_secs(10);

/// What is told.
pub struct Observation {
    /// What Prometheus fetches.
    pub metrics: Metrics,
    /// Whether the daemon serves; else why not.
    pub readiness: Box<dyn Fn() -> Result<(), String> + Send + Sync>,
    /// What it does, for its own commands.
    pub status: Box<dyn Fn() -> serde_json::Value + Send + Sync>,
}

struct HttpAnswer {
    status: &'static str,
    kind: &'static str,
    body: String,
}

const TEXT: &str = "text/plain; charset=utf-8";

impl Observation {
    fn answer(&self, head: &str, is_local: bool) -> HttpAnswer {
        let text = |status, body: &str| HttpAnswer {
            status,
            kind: TEXT,
            body: format!("{body}\n"),
        };
        let mut words = head.lines().next().unwrap_or_default().split(' ');
        let (method, target) = (words.next(), words.next().unwrap_or_default());
        if !words
            .next()
            .is_some_and(|version| version.starts_with("HTTP/1."))
        {
            return text("400 Bad Request", "this is no request of HTTP/1.1");
        }
        if !matches!(method, Some("GET" | "HEAD")) {
            return text("405 Method Not Allowed", "only GET and HEAD");
        }
        match target.split('?').next().unwrap_or_default() {
            "/metrics" => HttpAnswer {
                status: "200 OK",
                kind: Metrics::CONTENT_TYPE,
                body: self.metrics.render(),
            },
            "/-/healthy" => text("200 OK", "healthy"),
            "/-/ready" => match (self.readiness)() {
                Ok(()) => text("200 OK", "ready"),
                Err(reason) => text("503 Service Unavailable", &reason),
            },
            "/status" if is_local => HttpAnswer {
                status: "200 OK",
                kind: "application/json",
                body: (self.status)().to_string(),
            },
            _ => text(
                "404 Not Found",
                "there are /metrics, /-/healthy and /-/ready",
            ),
        }
    }
}

/// Serves on listeners, which may be none, until `stopping`.
pub async fn serve_observation(
    listeners: impl IntoIterator<Item = Listener>,
    observation: Observation,
    stopping: CancellationToken,
) -> Result<(), Failure> {
    let observation = Arc::new(observation);
    let tasks = TaskTracker::new();
    for listener in listeners {
        let connections = Arc::new(Semaphore::new(CONNECTIONS));
        for socket in listener.into_sockets() {
            let (observation, connections, tasks) =
                (observation.clone(), connections.clone(), tasks.clone());
            let accepting = accept_all(
                socket,
                observation,
                connections,
                tasks.clone(),
                stopping.clone(),
            );
            tasks.spawn(accepting);
        }
    }
    stopping.cancelled().await;
    tasks.close();
    let _ = tokio::time::timeout(EXCHANGE_TIMEOUT, tasks.wait()).await;
    Ok(())
}

async fn accept_all(
    socket: Socket,
    observation: Arc<Observation>,
    connections: Arc<Semaphore>,
    tasks: TaskTracker,
    stopping: CancellationToken,
) {
    loop {
        let Ok(place) = connections.clone().acquire_owned().await else {
            return;
        };
        let accepted = tokio::select! {
            () = stopping.cancelled() => return,
            accepted = socket.accept() => accepted,
        };
        let Ok(connection) = accepted else {
            // Such as out of descriptors, which must not make it spin.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let observation = observation.clone();
        tasks.spawn(async move {
            let exchange = exchange(connection, &observation);
            // Whoever is too slow, or gone, hears no more.
            let _ = tokio::time::timeout(EXCHANGE_TIMEOUT, exchange).await;
            drop(place);
        });
    }
}

async fn exchange(
    mut connection: AcceptedStream,
    observation: &Arc<Observation>,
) -> io::Result<()> {
    let read = tokio::time::timeout(HEAD_TIMEOUT, read_head(&mut connection));
    let Some(head) = read.await.unwrap_or(Ok(None))? else {
        return Ok(());
    };
    let is_local = !connection.is_tcp();
    let head = String::from_utf8_lossy(&head).into_owned();
    let has_body = !head.starts_with("HEAD ");
    let observation = observation.clone();
    // It may look at the disk.
    let answer = tokio::task::spawn_blocking(move || observation.answer(&head, is_local)).await;
    let answer = answer.map_err(io::Error::other)?;
    let mut text = format!(
        "HTTP/1.1 {}\r\nContent-Type: {}\r\nContent-Length: {}\r\nX-Content-Type-Options: nosniff\r\n\
         Cache-Control: no-store\r\nConnection: close\r\n\r\n",
        answer.status,
        answer.kind,
        answer.body.len()
    );
    if has_body {
        text += &answer.body;
    }
    connection.write_all(text.as_bytes()).await?;
    connection.shutdown().await
}

/// `None` when the connection ends before.
async fn read_head(connection: &mut AcceptedStream) -> io::Result<Option<Vec<u8>>> {
    let mut head = Vec::new();
    while !head.windows(4).any(|end| end == b"\r\n\r\n") && head.len() < LARGEST_HEAD {
        if connection.read_buf(&mut head).await? == 0 {
            return Ok(None);
        }
    }
    Ok(Some(head))
}

/// The status of the daemon that listens at this path.
pub(super) async fn fetch_status(path: &std::path::Path) -> io::Result<serde_json::Value> {
    let mut connection = tokio::net::UnixStream::connect(path).await?;
    connection
        .write_all(b"GET /status HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        .await?;
    let mut answer = Vec::new();
    let reading = connection.read_to_end(&mut answer);
    tokio::time::timeout(EXCHANGE_TIMEOUT, reading).await??;
    let text = String::from_utf8_lossy(&answer);
    let (head, body) = text
        .split_once("\r\n\r\n")
        .filter(|(head, _)| head.starts_with("HTTP/1.1 200 "))
        .ok_or_else(|| io::Error::other("it does not tell its status"))?;
    let _ = head;
    serde_json::from_str(body).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn observation(readiness: Result<(), String>) -> Observation {
        Observation {
            metrics: Metrics::new(),
            readiness: Box::new(move || readiness.clone()),
            status: Box::new(|| serde_json::json!({ "state": "idle" })),
        }
    }

    #[test]
    fn what_is_asked_for_is_answered_and_nothing_else() {
        let well = observation(Ok(()));
        let ill = observation(Err("no scheduler".to_owned()));
        let status = |observation: &Observation, head: &str, is_local| {
            let answer = observation.answer(head, is_local);
            (
                answer.status.split(' ').next().unwrap_or_default(),
                answer.body,
            )
        };
        for (head, code) in [
            ("GET /metrics HTTP/1.1\r\n\r\n", "200"),
            ("HEAD /-/ready?x=1 HTTP/1.0\r\n\r\n", "200"),
            ("GET /-/healthy HTTP/1.1\r\n\r\n", "200"),
            ("GET /status HTTP/1.1\r\n\r\n", "404"),
            ("GET / HTTP/1.1\r\n\r\n", "404"),
            ("POST /metrics HTTP/1.1\r\n\r\n", "405"),
            ("GET /metrics", "400"),
            ("PRI * HTTP/2.0", "400"),
            ("", "400"),
        ] {
            assert_eq!(status(&well, head, false).0, code, "{head}");
        }
        let ready = "GET /-/ready HTTP/1.1\r\n\r\n";
        assert_eq!(
            status(&ill, ready, false),
            ("503", "no scheduler\n".to_owned())
        );
        let asked = "GET /status HTTP/1.1\r\n\r\n";
        assert_eq!(status(&well, asked, true).1, "{\"state\":\"idle\"}");
    }
}
