//! Why a daemon cannot start, or go on: who must act.

/// Why a daemon cannot start, or go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "its message says what each of these is")]
pub enum Failure {
    /// The administrator must change this key.
    #[error("{key}: {message}")]
    Configuration { key: &'static str, message: String },
    /// Something on the host, or another daemon; a restart may help.
    #[error("{message}")]
    Environment { message: String },
}
