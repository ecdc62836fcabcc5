//! Who is at the other end of a connection.

/// Who is at the other end; in the extensions of each request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// The other end's address, if the connection still has one.
    Tcp(Option<std::net::SocketAddr>),
    /// As the kernel says (unix(7), SO_PEERCRED).
    Unix {
        /// The user who made the connection.
        uid: u32,
        /// The group of that user.
        gid: u32,
        /// The process that made it.
        pid: Option<i32>,
    },
}
