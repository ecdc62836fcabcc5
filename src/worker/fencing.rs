//! The number of this start among all of workers that had the cache's directory, whose lock this one
//! holds: a scheduler that hears of a higher one knows that the process before it has ended, and does not
//! wait for its calls.
//!
//! ```text
//! DIRECTORY/starts   the directory's name, chosen at random, and how often a worker started with it
//! ```

use std::{io, path::Path};

use crate::metadata::FencingToken;

const NAME: &str = "starts";

/// Counts this start. The caller holds the directory's lock. Without the file's text, or with one that a
/// loss of power tore, the directory gets another name: nothing is known of who came before.
pub(super) fn count_start(directory: &Path) -> io::Result<FencingToken> {
    let path = directory.join(NAME);
    let before = match std::fs::read_to_string(&path) {
        Ok(text) => text.trim_end().parse().ok(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) if error.kind() == io::ErrorKind::InvalidData => None,
        Err(error) => return Err(error),
    };
    let token = match before {
        Some(FencingToken { directory, start }) => FencingToken {
            directory,
            start: start.saturating_add(1),
        },
        None => FencingToken {
            directory: fastrand::u64(..),
            start: 1,
        },
    };
    let fresh = directory.join("starts.new");
    std::fs::write(&fresh, format!("{token}\n"))?;
    std::fs::rename(&fresh, &path)?;
    Ok(token)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_start_has_a_higher_number_in_the_same_directory() {
        let directory = tempfile::tempdir().unwrap();
        let first = count_start(directory.path()).unwrap();
        let second = count_start(directory.path()).unwrap();
        assert!(second.is_successor_of(first) && !first.is_successor_of(second));
        for torn in [&b""[..], b"0123", b"\xff\xff-1\n", b"0123456789abcdef-\n"] {
            std::fs::write(directory.path().join(NAME), torn).unwrap();
            let other = count_start(directory.path()).unwrap();
            assert!(!other.is_successor_of(second));
            assert!(
                count_start(directory.path())
                    .unwrap()
                    .is_successor_of(other)
            );
        }
    }
}
