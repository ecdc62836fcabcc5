//! What is expected of a configuration.

/// What is to be said, and done. The words are those that tell an administrator what is wrong.
#[derive(Clone, Copy, Debug)]
pub enum Expect {
    /// `--check` finds nothing, and a start complains of nothing.
    Good,
    /// Neither goes on.
    Refused(&'static str),
    /// `--check` refuses it; a start says the same, and goes on.
    Warned(&'static str),
    /// `--check` refuses it; a start waits for what is missing.
    Waits(&'static str),
}

/// A drop-in, and what is expected.
pub type Row = (&'static str, Expect);
