//! Pages of what is executed now, and of what printed very much.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    task::JoinSet,
};

use super::{execute, operation_page};
use crate::harness::{Daemon, Farm, Task, is_ok, is_root};

const MIB: u64 = 1 << 20;

/// One of many browsers, on a connection that it keeps.
struct Visitor(TcpStream);

impl Visitor {
    /// From one of some addresses, as no caller has more than its share.
    async fn connect(number: u8, to: SocketAddr) -> std::io::Result<Self> {
        let socket = TcpSocket::new_v4()?;
        socket.bind(([127, 0, 1, 1 + number % 8], 0).into())?;
        Ok(Visitor(socket.connect(to).await?))
    }

    /// The status and the body of an answer.
    async fn get(&mut self, path: &str) -> std::io::Result<(u16, String)> {
        let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n");
        self.0.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        loop {
            if let Some(end) = answer.windows(4).position(|part| part == b"\r\n\r\n") {
                let head = String::from_utf8_lossy(&answer[..end]).to_lowercase();
                let length = head.split("content-length: ").nth(1).unwrap();
                let length: usize = length.lines().next().unwrap().parse().unwrap();
                if answer.len() >= end + 4 + length {
                    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
                    let body = String::from_utf8_lossy(&answer[end + 4..]).into_owned();
                    return Ok((status, body));
                }
            }
            if self.0.read_buf(&mut answer).await? == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}

/// Loads a page, on the connection that there is or a new one.
async fn look(
    visitor: &mut Option<Visitor>,
    number: u8,
    address: SocketAddr,
    page: &str,
) -> std::io::Result<(u16, String)> {
    let visitor = match visitor {
        Some(visitor) => visitor,
        none => none.insert(Visitor::connect(number, address).await?),
    };
    visitor.get(page).await
}

fn path_of(address: &str, pages: &str) -> String {
    address.strip_prefix(pages).unwrap().to_owned()
}

/// What an action prints is shown in part, while it prints it and when it has ended; and of that, only what is
/// shown is in memory.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes long: tests/run --all"]
async fn a_gigabyte_of_output_is_shown_in_part_to_a_thousand_who_look_at_it() {
    const VISITORS: usize = 1000;
    const ROUNDS: usize = 2;
    if !is_root() {
        return;
    }
    let more = |_: &std::path::Path| "limits.log_size = \"2GiB\"\n".to_owned();
    let mut farm = Farm::start_with(std::path::Path::new("/var/tmp"), 2, "", more).await;
    let (pages, client) = (farm.pages(), farm.client());
    let address: SocketAddr = pages
        .rsplit("//")
        .next()
        .unwrap()
        .replace("localhost", "127.0.0.1")
        .parse()
        .unwrap();
    let script = "yes 'one of very many lines' | head -c 1073741824; sleep 25; exit 4";
    let name = execute(&client, &Task::shell(script), "//pkg:chatty").await;
    let page = path_of(&operation_page(&pages, &name), &pages);
    // On a connection of its own each time, since those that are not used give way.
    let is_printed = async || {
        for _ in 0..20 {
            if let Ok((_, body)) = look(&mut None, 9, address, &page).await {
                return body;
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        panic!("the page is not served");
    };
    let begun = Instant::now();
    loop {
        let body = is_printed().await;
        if body.contains("1.0 GiB so far") {
            assert!(body.contains("of which the end is shown") && body.len() < 300_000);
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "{body}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let before = [Daemon::Scheduler, Daemon::Worker].map(|daemon| farm.peak_memory(daemon));

    let mut visitors = JoinSet::new();
    let begun = Instant::now();
    for number in 0..VISITORS {
        let page = page.clone();
        visitors.spawn(async move {
            let (mut shown, mut cut) = (0, 0);
            let mut visitor = None;
            let mut round = 0;
            while round < ROUNDS {
                match look(&mut visitor, number as u8, address, &page).await {
                    Ok((status, body)) => {
                        assert_eq!(status, 200, "{body}");
                        // Of one worker, only so much is asked at a time.
                        shown += usize::from(body.contains("1.0 GiB so far"));
                        round += 1;
                    }
                    // As many have connections as may; the page's script tries again.
                    Err(error) => {
                        cut += 1;
                        assert!(cut < 30, "{error}");
                        visitor = None;
                    }
                }
                tokio::time::sleep(Duration::from_secs(2)).await;
            }
            (shown, cut)
        });
    }
    // Somebody builds meanwhile.
    let mut worst = Duration::ZERO;
    let (mut shown, mut cut) = (0, 0);
    while !visitors.is_empty() {
        let call = Instant::now();
        assert!(is_ok(&client.run(&Task::shell("echo meanwhile")).await));
        worst = worst.max(call.elapsed());
        while let Some(ended) = visitors.try_join_next() {
            let (saw, was_cut) = ended.unwrap();
            shown += saw;
            cut += was_cut;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let took = begun.elapsed();
    assert!(shown >= VISITORS / 20, "{shown}");
    assert!(worst < Duration::from_secs(10), "{worst:?}");

    // All of it is stored, and a part of that shown.
    let begun = Instant::now();
    loop {
        let call = Instant::now();
        let body = is_printed().await;
        if body.contains("exit code 4") {
            assert!(
                call.elapsed() < Duration::from_secs(5),
                "{:?}",
                call.elapsed()
            );
            assert!(
                body.contains("1.0 GiB") && body.contains("left out: download it"),
                "{body}"
            );
            assert!(body.len() < 500_000, "{}", body.len());
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(180), "{body}");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let after = [Daemon::Scheduler, Daemon::Worker].map(|daemon| farm.peak_memory(daemon));
    let more: Vec<u64> = after
        .iter()
        .zip(before)
        .map(|(after, before)| (after - before) / MIB)
        .collect();
    println!(
        "{VISITORS} visitors, {ROUNDS} rounds in {took:?}: {shown} saw output, {cut} connections gave way; {more:?} MiB more; actions took at most {worst:?}"
    );
    assert!(more[0] < 400 && more[1] < 100, "{more:?}");
}
