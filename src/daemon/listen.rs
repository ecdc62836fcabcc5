//! Listening: sockets of our own or from systemd, and their connections.

#![expect(
    unsafe_code,
    reason = "it takes over the descriptors that systemd passes"
)]

use std::{
    collections::BTreeMap,
    fs, io,
    os::{
        fd::{FromRawFd, OwnedFd},
        unix::fs::{FileTypeExt, PermissionsExt},
    },
    path::Path,
    pin::Pin,
    sync::{
        Arc, LazyLock, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
};
use tokio_rustls::server::TlsStream;

use super::{
    Failure, Peer, PeerCertificate, Policy, owner,
    tls::{ServerTls, TlsAcceptor},
};
use crate::config::ListenAddress;

/// Who may reach a Unix socket.
#[derive(Clone, Debug)]
pub struct SocketPermissions {
    /// Permission bits (chmod(2)).
    pub mode: u32,
    /// Group number; `None` for the daemon's own.
    pub group: Option<u32>,
}

/// One service's sockets: one of our own, or all that a unit's ListenStream= lines made.
pub struct Listener {
    sockets: Vec<Socket>,
    tls: Option<ServerTls>,
    policy: Policy,
}

pub(super) enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// The sockets that systemd passed, by name (sd_listen_fds_with_names(3)); each is taken once. A unit
/// with several ListenStream= lines passes several under one name.
static PASSED: LazyLock<Mutex<BTreeMap<String, Vec<OwnedFd>>>> = LazyLock::new(|| {
    let mut sockets: BTreeMap<String, Vec<OwnedFd>> = BTreeMap::new();
    if let Ok(passed) = sd_notify::listen_fds_with_names() {
        for (fd, name) in passed {
            // SAFETY: systemd passed this descriptor to this process alone, and the initialiser of
            // a LazyLock runs once, so that nobody else owns it.
            let socket = unsafe { OwnedFd::from_raw_fd(fd) };
            sockets.entry(name).or_default().push(socket);
        }
    }
    Mutex::new(sockets)
});

/// Whether systemd passes sockets to this daemon (sd_listen_fds(3)).
pub(super) fn any_passed() -> bool {
    std::env::var_os("LISTEN_FDS").is_some()
}

/// The sockets that systemd passed under this name, else a socket of our own.
///
/// `key` is the configuration key that gave the address, for errors.
pub fn listen(
    name: &str,
    key: &'static str,
    address: &ListenAddress,
    permissions: Option<SocketPermissions>,
) -> Result<Listener, Failure> {
    let passed = PASSED
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
        .remove(name);
    if let Some(passed) = passed {
        let sockets = passed.into_iter().map(socket_of).collect::<io::Result<_>>();
        return sockets
            .map(Listener::of)
            .map_err(|error| Failure::Environment {
                message: format!("could not use a socket {name:?} that systemd passed: {error}"),
            });
    }
    let opened = open(address, permissions).map(|socket| Listener::of(vec![socket]));
    opened.map_err(|error| not_listening(key, address, &error))
}

/// Why an address cannot be listened on, and what to do.
pub(super) fn not_listening(
    key: &'static str,
    address: &ListenAddress,
    error: &io::Error,
) -> Failure {
    let remedy = match error.kind() {
        io::ErrorKind::AddrInUse => {
            let owner = owner::of_listener(address, |_| false);
            format!("{owner} listens there; stop it, or choose another address")
        }
        io::ErrorKind::PermissionDenied => {
            "choose an address or a directory that this user may use".to_owned()
        }
        io::ErrorKind::AddrNotAvailable => "the address must be one of this host's".to_owned(),
        io::ErrorKind::NotFound => "create the directory of the socket first".to_owned(),
        _ => "choose another address".to_owned(),
    };
    Failure::Configuration {
        key,
        message: format!("could not listen on {address}: {error}; {remedy}"),
    }
}

/// Whether an address could be listened on. Changes nothing: a port is bound for a moment, without
/// that connections are taken.
pub(super) fn try_to_bind(address: &ListenAddress) -> io::Result<()> {
    use nix::sys::socket::{
        AddressFamily, SockFlag, SockType, SockaddrStorage, bind, setsockopt, socket, sockopt,
    };
    use std::os::fd::AsRawFd;
    match address {
        ListenAddress::Tcp(address) => {
            let family = match address.is_ipv4() {
                true => AddressFamily::Inet,
                false => AddressFamily::Inet6,
            };
            let socket = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
            // As std does, so that a restart needs no wait for TIME_WAIT.
            setsockopt(&socket, sockopt::ReuseAddr, &true)?;
            Ok(bind(socket.as_raw_fd(), &SockaddrStorage::from(*address))?)
        }
        ListenAddress::Unix(path) => {
            // unix(7)
            if path.as_os_str().len() > 107 {
                return Err(io::Error::other(
                    "the path of a socket has at most 107 characters",
                ));
            }
            let is_socket = |metadata: fs::Metadata| metadata.file_type().is_socket();
            match fs::symlink_metadata(path).map(is_socket) {
                Ok(true) => match std::os::unix::net::UnixStream::connect(path) {
                    Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
                    _ => return Err(io::ErrorKind::AddrInUse.into()),
                },
                Ok(false) => return Err(io::Error::other("there is a file of that name")),
                Err(_) => {}
            }
            let directory = path.parent().unwrap_or(Path::new("/"));
            let access = rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK;
            Ok(rustix::fs::access(directory, access)?)
        }
    }
}

/// Where the sockets listen that systemd passed under this name, if it did and none was taken yet.
pub(super) fn passed(name: &str) -> Option<Vec<ListenAddress>> {
    use nix::sys::socket::{SockaddrStorage, UnixAddr, getsockname};
    use std::os::fd::AsRawFd;
    let sockets = PASSED
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner());
    let address = |socket: &OwnedFd| {
        let address: SockaddrStorage = getsockname(socket.as_raw_fd()).ok()?;
        if let Some(address) = address.as_sockaddr_in() {
            return Some(ListenAddress::Tcp((*address).into()));
        }
        if let Some(address) = address.as_sockaddr_in6() {
            return Some(ListenAddress::Tcp((*address).into()));
        }
        let path = address.as_unix_addr().and_then(UnixAddr::path)?;
        Some(ListenAddress::Unix(path.to_owned()))
    };
    Some(sockets.get(name)?.iter().filter_map(address).collect())
}

fn socket_of(socket: OwnedFd) -> io::Result<Socket> {
    use nix::sys::socket::{AddressFamily, SockaddrLike, SockaddrStorage, getsockname};
    use std::os::fd::AsRawFd;
    let address: SockaddrStorage = getsockname(socket.as_raw_fd())?;
    if address.family() == Some(AddressFamily::Unix) {
        let listener = std::os::unix::net::UnixListener::from(socket);
        listener.set_nonblocking(true)?;
        UnixListener::from_std(listener).map(Socket::Unix)
    } else {
        let listener = std::net::TcpListener::from(socket);
        listener.set_nonblocking(true)?;
        TcpListener::from_std(listener).map(Socket::Tcp)
    }
}

fn open(address: &ListenAddress, permissions: Option<SocketPermissions>) -> io::Result<Socket> {
    match address {
        ListenAddress::Tcp(address) => {
            // std sets SO_REUSEADDR, so that a restart needs no wait for TIME_WAIT.
            let listener = std::net::TcpListener::bind(address)?;
            listener.set_nonblocking(true)?;
            TcpListener::from_std(listener).map(Socket::Tcp)
        }
        ListenAddress::Unix(path) => {
            remove_stale(path)?;
            let listener = UnixListener::bind(path)?;
            if let Some(permissions) = permissions {
                if let Some(group) = permissions.group {
                    std::os::unix::fs::chown(path, None, Some(group))?;
                }
                fs::set_permissions(path, fs::Permissions::from_mode(permissions.mode))?;
            }
            Ok(Socket::Unix(listener))
        }
    }
}

/// Removes a socket that nobody listens on any more, and nothing else.
fn remove_stale(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.file_type().is_socket() => {
            match std::os::unix::net::UnixStream::connect(path) {
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    fs::remove_file(path)
                }
                _ => Err(io::ErrorKind::AddrInUse.into()),
            }
        }
        _ => Ok(()),
    }
}

impl Listener {
    /// All addresses, for people.
    pub fn address(&self) -> String {
        let addresses: Vec<String> = self.sockets.iter().map(Socket::address).collect();
        addresses.join(" and ")
    }

    /// What browsers on this network call it by; `None` when only processes of this host reach it.
    pub fn url(&self) -> Option<String> {
        let mut addresses = self.sockets.iter().filter_map(|socket| match socket {
            Socket::Tcp(listener) => listener.local_addr().ok(),
            Socket::Unix(_) => None,
        });
        let address = addresses.next()?;
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        let host = match address.ip() {
            ip if ip.is_loopback() => "localhost".to_owned(),
            ip if ip.is_unspecified() => super::hostname(),
            std::net::IpAddr::V4(ip) => ip.to_string(),
            std::net::IpAddr::V6(ip) => format!("[{ip}]"),
        };
        Some(format!("{scheme}://{host}:{}/", address.port()))
    }

    /// The same with TLS, if there is any. Unix sockets stay without: who is at their other end is
    /// told by the kernel, and what passes them no network sees.
    #[must_use]
    pub fn with_tls(self, tls: Option<ServerTls>) -> Self {
        Listener { tls, ..self }
    }

    /// The same with what callers may do.
    #[must_use]
    pub fn with_policy(self, policy: &Policy) -> Self {
        let policy = policy.clone();
        Listener { policy, ..self }
    }

    fn of(sockets: Vec<Socket>) -> Self {
        Listener {
            sockets,
            tls: None,
            policy: Policy::default(),
        }
    }

    pub(super) fn policy(&self) -> Policy {
        self.policy.clone()
    }

    pub(super) fn acceptor(&self) -> Option<TlsAcceptor> {
        self.tls.as_ref().map(ServerTls::acceptor)
    }

    pub(super) fn into_sockets(self) -> Vec<Socket> {
        self.sockets
    }
}

impl Socket {
    fn address(&self) -> String {
        match self {
            Socket::Tcp(listener) => listener
                .local_addr()
                .map_or_else(|_| "tcp".to_owned(), |address| address.to_string()),
            Socket::Unix(listener) => listener
                .local_addr()
                .ok()
                .and_then(|address| {
                    address
                        .as_pathname()
                        .map(|p| format!("unix:{}", p.display()))
                })
                .unwrap_or_else(|| "unix".to_owned()),
        }
    }

    pub(super) async fn accept(&self) -> io::Result<AcceptedStream> {
        match self {
            Socket::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                stream.set_nodelay(true)?;
                Ok(AcceptedStream::new(Transport::Tcp(stream)))
            }
            Socket::Unix(listener) => listener
                .accept()
                .await
                .map(|(stream, _)| AcceptedStream::new(Transport::Unix(stream))),
        }
    }
}

/// A connection that was accepted.
#[derive(Debug)]
pub(super) struct AcceptedStream {
    stream: Transport,
    arrived: Arc<AtomicU64>,
}

#[derive(Debug)]
enum Transport {
    Tcp(TcpStream),
    Unix(UnixStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl AcceptedStream {
    fn new(stream: Transport) -> Self {
        AcceptedStream {
            stream,
            arrived: Arc::default(),
        }
    }

    /// How many bytes have been read from it.
    pub(super) fn arrived(&self) -> Arc<AtomicU64> {
        self.arrived.clone()
    }

    pub(super) fn is_tcp(&self) -> bool {
        matches!(self.stream, Transport::Tcp(_))
    }

    /// The first bytes of what has arrived, which stay there to be read. Waits for one of them.
    pub(super) async fn peek(&self, into: &mut [u8]) -> io::Result<usize> {
        match &self.stream {
            Transport::Tcp(stream) => stream.peek(into).await,
            Transport::Unix(_) | Transport::Tls(_) => Ok(0),
        }
    }

    /// The same connection after a handshake, and what its peer showed.
    pub(super) async fn encrypt(
        self,
        acceptor: &TlsAcceptor,
    ) -> io::Result<(Self, Option<PeerCertificate>)> {
        let AcceptedStream { stream, arrived } = self;
        let Transport::Tcp(stream) = stream else {
            return Ok((AcceptedStream { stream, arrived }, None));
        };
        let (stream, certificate) = acceptor.accept(stream).await?;
        let stream = Transport::Tls(Box::new(stream));
        Ok((AcceptedStream { stream, arrived }, certificate))
    }

    /// The same, with a peer that may speak HTTP/1.1.
    pub(super) async fn encrypt_pages(
        self,
        acceptor: &TlsAcceptor,
    ) -> io::Result<(Self, Option<PeerCertificate>)> {
        self.encrypt(&acceptor.for_pages()).await
    }

    pub(super) fn peer(&self) -> Peer {
        match &self.stream {
            Transport::Tcp(stream) => Peer::Tcp(stream.peer_addr().ok()),
            Transport::Tls(stream) => Peer::Tcp(stream.get_ref().0.peer_addr().ok()),
            Transport::Unix(stream) => match stream.peer_cred() {
                Ok(credentials) => Peer::Unix {
                    uid: credentials.uid(),
                    gid: credentials.gid(),
                    pid: credentials.pid(),
                },
                // Unknown is nobody.
                Err(_) => Peer::Unix {
                    uid: u32::MAX,
                    gid: u32::MAX,
                    pid: None,
                },
            },
        }
    }
}

impl AsyncRead for AcceptedStream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buffer.filled().len();
        let read = match &mut this.stream {
            Transport::Tcp(stream) => Pin::new(stream).poll_read(context, buffer),
            Transport::Unix(stream) => Pin::new(stream).poll_read(context, buffer),
            Transport::Tls(stream) => Pin::new(stream).poll_read(context, buffer),
        };
        let arrived = buffer.filled().len() - before;
        this.arrived.fetch_add(arrived as u64, Ordering::Relaxed);
        read
    }
}

impl AsyncWrite for AcceptedStream {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().stream {
            Transport::Tcp(stream) => Pin::new(stream).poll_write(context, data),
            Transport::Unix(stream) => Pin::new(stream).poll_write(context, data),
            Transport::Tls(stream) => Pin::new(stream).poll_write(context, data),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().stream {
            Transport::Tcp(stream) => Pin::new(stream).poll_flush(context),
            Transport::Unix(stream) => Pin::new(stream).poll_flush(context),
            Transport::Tls(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().stream {
            Transport::Tcp(stream) => Pin::new(stream).poll_shutdown(context),
            Transport::Unix(stream) => Pin::new(stream).poll_shutdown(context),
            Transport::Tls(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().stream {
            Transport::Tcp(stream) => Pin::new(stream).poll_write_vectored(context, data),
            Transport::Unix(stream) => Pin::new(stream).poll_write_vectored(context, data),
            Transport::Tls(stream) => Pin::new(stream).poll_write_vectored(context, data),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }
}
