//! Configuration: TOML, parsed once into types that cannot be wrong.
//!
//! 1. An empty file is a whole configuration: every key has a default.
//! 2. After NAME.toml come the drop-ins NAME.toml.d/*.toml, in the order of their names. Tables are
//!    merged key by key; anything else replaces what came before, arrays as a whole.
//! 3. All errors are told at once, each with its file, line and key: what is wrong is taken out, and
//!    the rest is read again.
//!
//! To read in this order: this file; `runner`, `scheduler` (with `scheduling`, `routing` and `size_classes`)
//! and `worker`, the three programs' keys, with `value` (what is written in them), `storage`,
//! `object_storage`, `tls`, `call_headers`, `tokens`, `callers`, `grants`, `control`, `traces` and
//! `directory_kind`; `parse`, which keeps the facts of an error, `error_message`, which tells them, and
//! `locate`, which finds their lines; `error`; `print`.

#![warn(missing_docs)]

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

pub mod call_headers;
pub mod callers;
pub mod control;
mod directory_kind;
mod error;
mod error_message;
pub mod grants;
mod locate;
pub mod object_storage;
mod parse;
mod print;
pub mod routing;
pub mod runner;
pub mod scheduler;
pub mod scheduling;
pub mod size_classes;
pub mod storage;
pub mod tls;
pub mod tokens;
pub mod traces;
mod value;
pub mod web;
pub mod worker;

pub use directory_kind::{DirectoryKind, directory_kind, path_error};
pub use error::{Error, Errors};
use error::{at_line, no_toml, no_utf8};
pub use locate::{at_key, locate};
use locate::{drop_ins, line_of};
use parse::PathStep;
pub use print::effective;
pub use value::{Duration, Endpoint, ListenAddress, OptionalEndpoint, Size};

/// A configuration of one of the programs, whose values are checked against each other.
pub trait Validate: DeserializeOwned + Serialize + Default + PartialEq {
    /// What no single value tells.
    fn validate(&self, diagnostics: &mut Diagnostics);
}

/// Keys that the administrator must change, and why.
#[derive(Debug, Default)]
pub struct Diagnostics(Vec<(String, String)>);

impl Diagnostics {
    /// The sentence begins after the key, and says what to write instead. A number in the key is that
    /// of a section among several, from 0 on: `runners.1.platform`.
    pub fn add(&mut self, key: impl Into<String>, message: impl Into<String>) {
        self.0.push((key.into(), message.into()));
    }

    /// Each at the place where its key was given.
    pub fn into_errors(self, path: &Path) -> Vec<Error> {
        self.0
            .into_iter()
            .map(|(key, message)| at_key(path, &key, message))
            .collect()
    }

    /// Adds a diagnostic unless the key is `right`.
    pub fn require(&mut self, right: bool, key: &str, message: impl Into<String>) {
        if !right {
            self.add(key, message);
        }
    }
}

/// What is logged, to the journal when systemd started the daemon, else to standard error.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Log {
    /// The least important level that is logged.
    pub level: Level,
    /// How lines are written.
    pub format: LogFormat,
}

/// How the log is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// To the journal when that reads standard error, else as text to standard error.
    #[default]
    Auto,
    /// As JSON to standard error, a line for each entry.
    Json,
}

/// How important a line of the log is; the names are those of bb-remote-execution(7).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "their names say it")]
pub enum Level {
    Error,
    Warn,
    #[default]
    Info,
    Debug,
    Trace,
}

/// What the files say, and what is wrong with them.
#[derive(Debug)]
pub struct Loaded<C> {
    /// Without what is wrong.
    pub config: C,
    /// The keys that the files give, without those that are wrong.
    pub table: toml::Table,
    /// What was read, the last one having the last word.
    pub files: Vec<PathBuf>,
    /// What lies among the drop-ins, but is none by its name.
    pub ignored_files: Vec<PathBuf>,
    /// What is wrong with the files, or with the configuration as a whole.
    pub errors: Vec<Error>,
    /// Every file is TOML, so that nothing but single keys is missing.
    pub is_toml: bool,
    /// Lists of sections in some of which a key is missing.
    incomplete_lists: Vec<String>,
}

/// The keys that are not at their defaults because nobody thought of them.
#[derive(Clone, Copy, Debug)]
pub struct ExplicitKeys<'t>(pub &'t toml::Table);

impl ExplicitKeys<'_> {
    /// Whether a file gives a dotted key.
    pub fn contains(&self, key: &str) -> bool {
        let mut table = self.0;
        let mut steps = key.split('.').peekable();
        while let Some(step) = steps.next() {
            match table.get(step) {
                Some(_) if steps.peek().is_none() => return true,
                Some(toml::Value::Table(inner)) => table = inner,
                // Of an array of sections, the name alone is known.
                found => return found.is_some(),
            }
        }
        false
    }
}

/// Reads a configuration and its drop-ins. A missing file is an error unless `optional`.
pub fn load<C: Validate>(path: &Path, optional: bool) -> Result<C, Errors> {
    read(path, optional).map(|loaded| loaded.config)
}

/// Likewise, together with where it comes from.
pub fn read<C: Validate>(path: &Path, optional: bool) -> Result<Loaded<C>, Errors> {
    let mut loaded = examine(path, optional);
    match loaded.errors.is_empty() {
        true => Ok(loaded),
        false => Err(Errors(std::mem::take(&mut loaded.errors))),
    }
}

/// Reads what can be read, and tells everything that is wrong.
pub fn examine<C: Validate>(path: &Path, optional: bool) -> Loaded<C> {
    let mut loaded = Loaded {
        config: C::default(),
        table: toml::Table::new(),
        files: Vec::new(),
        ignored_files: Vec::new(),
        errors: Vec::new(),
        is_toml: true,
        incomplete_lists: Vec::new(),
    };
    let defaults = toml::Table::try_from(C::default()).unwrap_or_default();
    let (drop_ins, ignored_files) = drop_ins(path).unwrap_or_else(|error| {
        loaded.errors.push(error);
        Default::default()
    });
    loaded.ignored_files = ignored_files;
    let main = (path.to_owned(), !optional);
    for (file, required) in
        std::iter::once(main).chain(drop_ins.into_iter().map(|file| (file, true)))
    {
        match fs::read(&file).map(String::from_utf8) {
            Ok(Err(error)) => {
                loaded.is_toml = false;
                loaded.errors.push(no_utf8(&file, &error));
            }
            Ok(Ok(text)) => {
                let table = loaded.examine_file(&file, &text, &defaults);
                merge(&mut loaded.table, table);
                loaded.files.push(file);
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound && !required => {}
            Err(error) => {
                loaded.is_toml = false;
                let path = file;
                loaded.errors.push(Error::Unreadable { path, error });
            }
        }
    }
    match parse::parse::<C>(&loaded.table) {
        Ok(config) => loaded.config = config,
        Err(fault) => loaded.errors.push(Error::Key {
            path: path.to_owned(),
            key: error_message::dotted(&fault.path),
            message: format!(
                "all files together: {}",
                error_message::message_of(&fault, &defaults)
            ),
        }),
    }
    let mut diagnostics = Diagnostics::default();
    loaded.config.validate(&mut diagnostics);
    // Of sections that lost what is wrong in them, nothing can be said.
    diagnostics.0.retain(|(key, _)| {
        let list = key.split('.').next().unwrap_or(key);
        !loaded.incomplete_lists.iter().any(|known| known == list)
    });
    loaded.errors.extend(diagnostics.into_errors(path));
    loaded
}

impl<C: Validate> Loaded<C> {
    /// Why a file as a whole says nothing: it is not there, or no TOML.
    pub fn unreadable(&self) -> Option<String> {
        let is_unreadable = |error: &&Error| matches!(error, Error::Unreadable { .. });
        let unreadable = self.errors.iter().find(is_unreadable);
        let first = unreadable.or(self.errors.first().filter(|_| !self.is_toml))?;
        Some(first.brief())
    }

    fn examine_file(&mut self, path: &Path, text: &str, defaults: &toml::Table) -> toml::Table {
        let (_, faults) = toml::de::DeTable::parse_recoverable(text);
        if !faults.is_empty() {
            self.is_toml = false;
            let mut told = Vec::new();
            for fault in faults {
                let error = no_toml(path, text, &fault);
                if let Error::Line { line, .. } = error
                    && !told.contains(&line)
                {
                    told.push(line);
                    self.errors.push(error);
                }
            }
            return toml::Table::new();
        }
        let mut table: toml::Table = toml::from_str(text).unwrap_or_default();
        while let Err(fault) = parse::parse::<C>(&table) {
            let message = error_message::message_of(&fault, defaults);
            self.errors.push(match line_of(text, &fault.path) {
                Some(line) => at_line(path, text, line, message),
                None => Error::Key {
                    path: path.to_owned(),
                    key: error_message::dotted(&fault.path),
                    message,
                },
            });
            if let [PathStep::Key(list), PathStep::Index(_), ..] = &fault.path[..] {
                self.incomplete_lists.push(list.clone());
            }
            // Items of a list have no names, so that it goes as a whole.
            let named = fault
                .path
                .iter()
                .rposition(|step| matches!(step, PathStep::Key(_)));
            let Some(named) = named else { break };
            if !remove(&mut table, &fault.path[..=named]) {
                break;
            }
        }
        table
    }
}

fn remove(table: &mut toml::Table, path: &[PathStep]) -> bool {
    fn inside(value: &mut toml::Value, path: &[PathStep]) -> bool {
        match (value, path.split_first()) {
            (toml::Value::Table(table), Some(_)) => remove(table, path),
            (toml::Value::Array(items), Some((PathStep::Index(index), rest))) => {
                items.get_mut(*index).is_some_and(|item| inside(item, rest))
            }
            _ => false,
        }
    }
    match path.split_first() {
        Some((PathStep::Key(key), [])) => table.remove(key).is_some(),
        Some((PathStep::Key(key), rest)) => {
            table.get_mut(key).is_some_and(|value| inside(value, rest))
        }
        _ => false,
    }
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
        let path = write(directory.path(), "w.toml", "");
        fs::write(&path, b"\n# Gr\xfc\xdfe\n").unwrap();
        let error = load::<worker::Config>(&path, false)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("w.toml:2: byte 0xfc on this line is not UTF-8"),
            "{error}"
        );
        let path = write(directory.path(), "w.toml", "\nrunners = []");
        let error = load::<worker::Config>(&path, false)
            .unwrap_err()
            .to_string();
        assert!(error.contains("[[runners]]"), "{error}");
        assert!(error.contains(":2:"), "{error}");
    }

    #[test]
    fn all_errors_are_told_at_once_each_at_its_own_file_and_line() {
        let directory = tempfile::tempdir().unwrap();
        let path = write(
            directory.path(),
            "w.toml",
            "[cache]\nmaximum_size = 10\nmaximum_fils = 1\n\n[[runners]]\nconcurrency = -1\n\n\
             [[runners]]\nconcurrency = \"2\"\nsize_class = true\n",
        );
        let drop_in = write(
            directory.path(),
            "w.toml.d/10.toml",
            "\nbuild_directory = \"/home\"\nstorage.browser_url = \"x\"\nlog.level = \"loud\"\n",
        );
        let no_toml = write(directory.path(), "w.toml.d/20.toml", "a = 1\nb = c\n");
        let errors = load::<worker::Config>(&path, false).unwrap_err().0;
        let mut found: Vec<(PathBuf, usize)> = errors
            .into_iter()
            .map(|error| match error {
                Error::Line { path, line, .. } => (path, line),
                other => panic!("{other}"),
            })
            .collect();
        found.sort();
        let expected = [
            (&path, 2),
            (&path, 3),
            (&path, 6),
            (&path, 9),
            (&path, 10),
            (&drop_in, 2),
            (&drop_in, 3),
            (&drop_in, 4),
            (&no_toml, 2),
        ];
        let expected = expected.map(|(path, line)| (path.clone(), line));
        assert_eq!(found, expected);
    }

    #[test]
    fn only_an_optional_file_may_be_missing() {
        let path = Path::new("/nonexistent/w.toml");
        assert!(load::<worker::Config>(path, true).is_ok());
        assert!(matches!(
            load::<worker::Config>(path, false).unwrap_err().0[..],
            [Error::Unreadable { .. }]
        ));
    }
}
