//! Redis and an S3 server (moto), which tests start and stop.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use super::{free_address, skip};

/// A server of its own port on the loopback interface; killed when it is dropped.
pub struct Service {
    process: Child,
    pub address: SocketAddr,
    _directory: tempfile::TempDir,
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The bucket that there is.
pub const BUCKET: &str = "farm";

/// moto takes any, and asks for one of whoever would change an object.
const KEY: &str = "Authorization: AWS4-HMAC-SHA256 Credential=a/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0";

/// `None`, and told, where it is not installed.
pub fn redis(arguments: &[&str]) -> Option<Service> {
    if Command::new("redis-server")
        .arg("--version")
        .output()
        .is_err()
    {
        skip("redis-server is not installed; try: apt install redis-server");
        return None;
    }
    Some(start(|port, directory| {
        let mut command = Command::new("redis-server");
        let port = port.to_string();
        command.args([
            "--port",
            &port,
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--dir",
        ]);
        command.arg(directory).args(arguments);
        command
    }))
}

/// `None`, and told, where it is not installed: moto of PyPI, with its extras s3 and server, whose program
/// `BB_MOTO` names.
pub fn s3() -> Option<Service> {
    let program = std::env::var_os("BB_MOTO").map_or(PathBuf::from("moto_server"), PathBuf::from);
    let works = Command::new(&program).arg("--help").output();
    if !works.is_ok_and(|answer| answer.status.success()) {
        skip("moto_server is not installed; name it with BB_MOTO, as tests/run does");
        return None;
    }
    let service = start(|port, directory| {
        let mut command = Command::new(&program);
        let port = port.to_string();
        command
            .args(["-H", "127.0.0.1", "-p", &port])
            .current_dir(directory);
        command
    });
    let made = service.http("PUT", &format!("/{BUCKET}"), b"");
    assert!(made.starts_with("HTTP/1.1 200"), "{made}");
    Some(service)
}

fn start(command: impl Fn(u16, &Path) -> Command) -> Service {
    for _ in 0..5 {
        let directory = tempfile::tempdir().unwrap();
        let address = free_address();
        let mut process = command(address.port(), directory.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let begun = Instant::now();
        while process.try_wait().unwrap().is_none() {
            if TcpStream::connect(address).is_ok() {
                return Service {
                    process,
                    address,
                    _directory: directory,
                };
            }
            assert!(
                begun.elapsed() < Duration::from_secs(60),
                "it does not listen"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    panic!("a server ends at once");
}

impl Service {
    /// What an HTTP server answers.
    pub fn http(&self, method: &str, path: &str, body: &[u8]) -> String {
        let mut stream = TcpStream::connect(self.address).unwrap();
        let (address, length) = (self.address, body.len());
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: {address}\r\nContent-Length: {length}\r\nConnection: close\r\n{KEY}\r\n\r\n"
        );
        stream.write_all(&[head.as_bytes(), body].concat()).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        String::from_utf8_lossy(&answer).into_owned()
    }

    /// What Redis answers, at most 64 KiB of it.
    pub fn command(&self, words: &[&[u8]]) -> String {
        let mut stream = TcpStream::connect(self.address).unwrap();
        let mut text = format!("*{}\r\n", words.len()).into_bytes();
        for word in words {
            text.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
            text.extend_from_slice(word);
            text.extend_from_slice(b"\r\n");
        }
        stream.write_all(&text).unwrap();
        let mut answer = vec![0; 64 << 10];
        let length = stream.read(&mut answer).unwrap();
        String::from_utf8_lossy(&answer[..length]).into_owned()
    }
}
