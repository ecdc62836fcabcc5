//! Configuration: TOML, parsed once into types that cannot be wrong.
//!
//! 1. An empty file is a whole configuration: every key has a default.
//! 2. After NAME.toml come the drop-ins NAME.toml.d/*.toml, in the order of their names. Tables are
//!    merged key by key; anything else replaces what came before, arrays as a whole.
//! 3. Each file is checked on its own, so that an error names the file, the line and the key.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, de::DeserializeOwned};

pub mod runner;
pub mod scheduler;
mod value;
pub mod worker;

pub use value::{Duration, Endpoint, ListenAddress, Size};

/// What no single value tells.
pub trait Check {
    /// The key that the administrator must change, and why.
    fn check(&self) -> Result<(), (&'static str, String)>;
}

/// What is logged, to the journal when systemd started the daemon, else to standard error.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Log {
    pub level: Level,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    Error,
    Warn,
    #[default]
    Info,
    Debug,
    Trace,
}

/// Why there is no configuration. The administrator must act; the text says where and how.
#[derive(Debug, thiserror::Error)]
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
    #[error("{}: {key}: {message}", .path.display())]
    Key {
        path: PathBuf,
        key: &'static str,
        message: String,
    },
}

/// Reads a configuration and its drop-ins. A missing file is an error unless `optional`.
pub fn load<T: DeserializeOwned + Check>(path: &Path, optional: bool) -> Result<T, Error> {
    read(path, optional).map(|(config, _)| config)
}

/// Likewise, together with the keys that the files give.
pub fn read<T: DeserializeOwned + Check>(
    path: &Path,
    optional: bool,
) -> Result<(T, toml::Table), Error> {
    let mut merged = toml::Table::new();
    let mut last = path.to_owned();
    for (file, required) in files(path, optional)? {
        let text = match fs::read_to_string(&file) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound && !required => continue,
            Err(error) => return Err(Error::Unreadable { path: file, error }),
        };
        toml::from_str::<T>(&text).map_err(|error| at_line(&file, &text, &error))?;
        let table: toml::Table =
            toml::from_str(&text).map_err(|error| at_line(&file, &text, &error))?;
        merge(&mut merged, table);
        last = file;
    }
    let config = T::deserialize(merged.clone()).map_err(|error| Error::Key {
        path: last.clone(),
        key: "all files together",
        message: error.to_string(),
    })?;
    match config.check() {
        Ok(()) => Ok((config, merged)),
        Err((key, message)) => Err(match locate(path, key) {
            Some((path, line)) => Error::Line {
                path,
                line,
                text: key.to_owned(),
                message,
            },
            None => Error::Key {
                path: path.to_owned(),
                key,
                message,
            },
        }),
    }
}

/// Where a dotted key was last given, for errors that are found after parsing.
pub fn locate(path: &Path, key: &str) -> Option<(PathBuf, usize)> {
    let mut found = None;
    for (file, _) in files(path, true).ok()? {
        let Ok(text) = fs::read_to_string(&file) else {
            continue;
        };
        if let Some(line) = line_of(&text, key) {
            found = Some((file, line));
        }
    }
    found
}

fn line_of(text: &str, key: &str) -> Option<usize> {
    use toml::de::{DeTable, DeValue};
    let document = DeTable::parse(text).ok()?;
    let mut table = document.get_ref();
    let mut parts = key.split('.').peekable();
    loop {
        let (name, value) = table.get_key_value(parts.next()?)?;
        if parts.peek().is_none() {
            return Some(text[..name.span().start].matches('\n').count() + 1);
        }
        table = match value.get_ref() {
            DeValue::Table(table) => table,
            DeValue::Array(array) => match array.last()?.get_ref() {
                DeValue::Table(table) => table,
                _ => return None,
            },
            _ => return None,
        };
    }
}

/// The file, then its drop-ins; with each, whether it must be there.
fn files(path: &Path, optional: bool) -> Result<Vec<(PathBuf, bool)>, Error> {
    let mut directory = path.as_os_str().to_owned();
    directory.push(".d");
    let directory = PathBuf::from(directory);
    let mut drop_ins = Vec::new();
    match fs::read_dir(&directory) {
        Ok(entries) => {
            for entry in entries {
                let entry = entry.map_err(|error| Error::Unreadable {
                    path: directory.clone(),
                    error,
                })?;
                let path = entry.path();
                if path
                    .extension()
                    .is_some_and(|extension| extension == "toml")
                {
                    drop_ins.push((path, true));
                }
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => {
            return Err(Error::Unreadable {
                path: directory,
                error,
            });
        }
    }
    drop_ins.sort();
    drop_ins.insert(0, (path.to_owned(), !optional));
    Ok(drop_ins)
}

fn merge(into: &mut toml::Table, from: toml::Table) {
    for (key, value) in from {
        match (into.get_mut(&key), value) {
            (Some(toml::Value::Table(old)), toml::Value::Table(new)) => merge(old, new),
            (_, value) => {
                into.insert(key, value);
            }
        }
    }
}

fn at_line(path: &Path, text: &str, error: &toml::de::Error) -> Error {
    let offset = error.span().map_or(0, |span| span.start.min(text.len()));
    let line = text[..offset].matches('\n').count();
    Error::Line {
        path: path.to_owned(),
        line: line + 1,
        text: text.lines().nth(line).unwrap_or_default().trim().to_owned(),
        message: error.message().replace('\n', " "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(directory: &Path, name: &str, text: &str) -> PathBuf {
        let path = directory.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        path
    }

    #[test]
    fn an_empty_file_is_a_whole_configuration() {
        let directory = tempfile::tempdir().unwrap();
        let path = write(directory.path(), "x.toml", "");
        assert_eq!(
            load::<scheduler::Config>(&path, false).unwrap(),
            scheduler::Config::default()
        );
        assert_eq!(
            load::<worker::Config>(&path, false).unwrap(),
            worker::Config::default()
        );
        assert_eq!(
            load::<runner::Config>(&path, false).unwrap(),
            runner::Config::default()
        );
    }

    #[test]
    fn drop_ins_change_single_keys_in_the_order_of_their_names() {
        let directory = tempfile::tempdir().unwrap();
        let path = write(
            directory.path(),
            "w.toml",
            "[cache]\nmaximum_size = \"1GiB\"\nmaximum_files = 7\n",
        );
        write(
            directory.path(),
            "w.toml.d/20.toml",
            "cache.maximum_size = \"3GiB\"",
        );
        write(
            directory.path(),
            "w.toml.d/10.toml",
            "cache.maximum_size = \"2GiB\"",
        );
        write(directory.path(), "w.toml.d/30.toml~", "nonsense");
        let config: worker::Config = load(&path, false).unwrap();
        assert_eq!(config.cache.maximum_size, Size::gib(3));
        assert_eq!(config.cache.maximum_files, 7);
    }

    #[test]
    fn errors_name_the_file_the_line_the_key_and_the_remedy() {
        let directory = tempfile::tempdir().unwrap();
        for (text, line, words) in [
            ("\n[cache]\nmaximum_sise = \"1GiB\"", 3, "maximum_sise"),
            ("\n[cache]\nmaximum_size = 10", 3, "10GiB"),
            ("\n\nnonsense", 3, "nonsense"),
            ("[scheduler]\nendpoint = \"host\"", 2, "grpc://"),
        ] {
            let path = write(directory.path(), "w.toml", text);
            let error = load::<worker::Config>(&path, false)
                .unwrap_err()
                .to_string();
            assert!(
                error.starts_with(&format!("{}:{line}: ", path.display())),
                "{error}"
            );
            assert!(error.contains(words), "{error}");
        }
        let path = write(directory.path(), "w.toml", "\nrunners = []");
        let error = load::<worker::Config>(&path, false)
            .unwrap_err()
            .to_string();
        assert!(error.contains("[[runners]]"), "{error}");
        assert!(error.contains(":2:"), "{error}");
    }

    #[test]
    fn only_an_optional_file_may_be_missing() {
        let path = Path::new("/nonexistent/w.toml");
        assert!(load::<worker::Config>(path, true).is_ok());
        assert!(matches!(
            load::<worker::Config>(path, false),
            Err(Error::Unreadable { .. })
        ));
    }
}
