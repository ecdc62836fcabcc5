//! Why there is no configuration, with the line that is at fault.

use std::{
    fmt, io,
    path::{Path, PathBuf},
};

/// Why there is no configuration. The administrator must act; the text says where and how.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "its message says what each of these is")]
pub enum Error {
    #[error("could not read {}: {error}", .path.display())]
    Unreadable { path: PathBuf, error: io::Error },
    #[error("{}:{line}: {message}\n    {text}", .path.display())]
    Line {
        path: PathBuf,
        line: usize,
        text: String,
        message: String,
    },
    /// Of a key that no file gives.
    #[error("{}: {key}: {message}", .path.display())]
    Key {
        path: PathBuf,
        key: String,
        message: String,
    },
}

impl Error {
    /// One line, for a log.
    pub fn brief(&self) -> String {
        match self {
            Error::Line {
                path,
                line,
                message,
                ..
            } => format!("{}:{line}: {message}", path.display()),
            error => error.to_string(),
        }
    }
}

/// All that is wrong.
#[derive(Debug)]
pub struct Errors(pub Vec<Error>);

impl fmt::Display for Errors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, error) in self.0.iter().enumerate() {
            let end = if number == 0 { "" } else { "\n" };
            write!(f, "{end}{error}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Errors {}

/// An error in this line of a file.
pub(super) fn at_line(path: &Path, text: &str, line: usize, message: String) -> Error {
    Error::Line {
        path: path.to_owned(),
        line,
        text: text
            .lines()
            .nth(line.saturating_sub(1))
            .unwrap_or_default()
            .trim()
            .chars()
            .take(200)
            .collect(),
        message,
    }
}

pub(super) fn no_utf8(path: &Path, error: &std::string::FromUtf8Error) -> Error {
    let (before, rest) = error.as_bytes().split_at(error.utf8_error().valid_up_to());
    let line = before.iter().filter(|byte| **byte == b'\n').count() + 1;
    let byte = rest.first().copied().unwrap_or_default();
    at_line(
        path,
        &String::from_utf8_lossy(error.as_bytes()),
        line,
        format!(
            "byte 0x{byte:02x} on this line is not UTF-8, which TOML is written in; save the file as UTF-8"
        ),
    )
}

pub(super) fn no_toml(path: &Path, text: &str, error: &toml::de::Error) -> Error {
    let offset = error.span().map_or(0, |span| span.start.min(text.len()));
    let line = text.as_bytes()[..offset]
        .iter()
        .filter(|byte| **byte == b'\n')
        .count()
        + 1;
    let message = error.message().replace('\n', " ");
    let message = message.split(", expected").next().unwrap_or(&message);
    at_line(
        path,
        text,
        line,
        format!("this line is not TOML: {message}"),
    )
}
