//! What a rule is, and what can become of it.

use futures::future::BoxFuture;
use tonic::{Code, Status};

use super::server::Server;

/// RFC 2119.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    Must,
    Should,
}

/// Why a rule has not passed.
#[derive(Clone, Debug)]
pub enum Stop {
    Fail(String),
    /// The server says that it has not what the rule is about, or lets others alone do it.
    Unsupported(String),
}

pub type Outcome = Result<(), Stop>;

pub struct Rule {
    /// Where remote_execution.proto or bytestream.proto has it.
    pub section: &'static str,
    pub level: Level,
    pub text: &'static str,
    pub check: for<'a> fn(&'a Server) -> BoxFuture<'a, Outcome>,
}

/// `RULES`: lines of level, section, text, and the function that checks.
macro_rules! rules {
    ($($level:ident, $section:literal, $text:literal, $check:ident;)*) => {
        pub const RULES: &[super::rule::Rule] = &[$(super::rule::Rule {
            section: $section,
            level: super::rule::Level::$level,
            text: $text,
            check: |server| Box::pin($check(server)),
        }),*];
    };
}
pub(super) use rules;

/// Fails the rule with a text when the condition does not hold.
macro_rules! ensure {
    ($condition:expr, $($text:tt)+) => {
        if !$condition {
            return Err(super::rule::Stop::Fail(format!($($text)+)));
        }
    };
}
pub(super) use ensure;

pub fn fail<T>(text: impl Into<String>) -> Result<T, Stop> {
    Err(Stop::Fail(text.into()))
}

pub fn unsupported<T>(text: impl Into<String>) -> Result<T, Stop> {
    Err(Stop::Unsupported(text.into()))
}

/// Calls that a rule does not expect to fail.
pub trait Expect<T> {
    fn expect_ok(self, call: &str) -> Result<T, Stop>;
}

impl<T> Expect<T> for Result<T, Status> {
    fn expect_ok(self, call: &str) -> Result<T, Stop> {
        self.map_err(|status| {
            let text = format!("{call}: {:?}: {}", status.code(), status.message());
            match status.code() {
                Code::Unimplemented | Code::PermissionDenied | Code::Unauthenticated => {
                    Stop::Unsupported(text)
                }
                _ => Stop::Fail(text),
            }
        })
    }
}

/// Expects a call to be refused with one of these codes.
pub fn expect_code<T>(result: Result<T, Status>, codes: &[Code], call: &str) -> Outcome {
    match result {
        Err(status) if codes.contains(&status.code()) => Ok(()),
        Err(status) => Err(status).expect_ok(&format!("{call}, where {codes:?} was expected")),
        Ok(_) => fail(format!("{call} succeeded, where {codes:?} was expected")),
    }
}
