//! Where a configuration gives a key: in which of its files, and in which line.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use super::{
    error::{Error, at_line},
    error_message,
    parse::PathStep,
};

/// An error at the place where a dotted key was last given.
pub fn at_key(path: &Path, key: &str, message: String) -> Error {
    let message_of = |shown: &str| format!("{shown}: {message}");
    let shown = error_message::dotted(&steps(key));
    // Of a section among several that lacks the key, the last one is known.
    let list = key.split('.').next().unwrap_or(key);
    let item = || locate(path, item_of(key)?);
    let place = locate(path, key).or_else(item).or_else(|| {
        let (file, line) = locate(path, list)?;
        is_list(&fs::read_to_string(&file).ok()?, list).then_some((file, line))
    });
    match place {
        Some((file, line)) => {
            let text = fs::read_to_string(&file).unwrap_or_default();
            at_line(&file, &text, line, message_of(&shown))
        }
        None => Error::Key {
            path: path.to_owned(),
            key: shown,
            message,
        },
    }
}

/// The section of a list that a dotted key is in.
fn item_of(key: &str) -> Option<&str> {
    let is_number = |step: &str| step.bytes().all(|byte| byte.is_ascii_digit());
    let mut starts = key.rmatch_indices('.').map(|(at, _)| at);
    let end = starts.find(|at| {
        let item = key.get(..*at).unwrap_or_default();
        item.rsplit('.').next().is_some_and(is_number)
    })?;
    key.get(..end)
}

/// Where a dotted key was last given. Lists replace those before them as a whole.
pub fn locate(path: &Path, key: &str) -> Option<(PathBuf, usize)> {
    let (drop_ins, _) = drop_ins(path).ok()?;
    let steps = steps(key);
    let list = key.split('.').next().unwrap_or(key);
    for file in drop_ins
        .into_iter()
        .rev()
        .chain(std::iter::once(path.to_owned()))
    {
        let Ok(text) = fs::read_to_string(&file) else {
            continue;
        };
        match line_of(&text, &steps) {
            Some(line) => return Some((file, line)),
            None if is_list(&text, list) => return None,
            None => {}
        }
    }
    None
}

fn is_list(text: &str, key: &str) -> bool {
    let table: toml::Table = toml::from_str(text).unwrap_or_default();
    table.get(key).is_some_and(toml::Value::is_array)
}

fn steps(key: &str) -> Vec<PathStep> {
    key.split('.')
        .map(|step| match step.parse() {
            Ok(index) => PathStep::Index(index),
            Err(_) => PathStep::Key(step.to_owned()),
        })
        .collect()
}

/// Of several sections without a number, the last one.
pub(super) fn line_of(text: &str, path: &[PathStep]) -> Option<usize> {
    use toml::de::{DeTable, DeValue};
    enum At<'t, 'v> {
        Table(&'t DeTable<'v>),
        Value(&'t DeValue<'v>),
    }
    let document = DeTable::parse(text).ok()?;
    let mut at = At::Table(document.get_ref());
    let mut offset = None;
    for step in path {
        let table = match (&at, step) {
            (At::Value(DeValue::Array(items)), PathStep::Index(index)) => {
                let item = items.get(*index)?;
                offset = Some(item.span().start);
                at = At::Value(item.get_ref());
                continue;
            }
            (At::Table(table), PathStep::Key(_)) => *table,
            (At::Value(DeValue::Table(table)), PathStep::Key(_)) => table,
            (At::Value(DeValue::Array(items)), PathStep::Key(_)) => match items.last()?.get_ref() {
                DeValue::Table(table) => table,
                _ => return None,
            },
            _ => return None,
        };
        let PathStep::Key(key) = step else {
            return None;
        };
        let (name, value) = table.get_key_value(key.as_str())?;
        offset = Some(name.span().start);
        at = At::Value(value.get_ref());
    }
    offset.map(|offset| text[..offset].matches('\n').count() + 1)
}

/// The drop-ins of a file in their order, and what else is there.
pub(super) fn drop_ins(path: &Path) -> Result<(Vec<PathBuf>, Vec<PathBuf>), Error> {
    let mut directory = path.as_os_str().to_owned();
    directory.push(".d");
    let directory = PathBuf::from(directory);
    let unreadable = |error| Error::Unreadable {
        path: directory.clone(),
        error,
    };
    let mut found = Vec::new();
    match fs::read_dir(&directory) {
        Ok(entries) => {
            for entry in entries {
                found.push(entry.map_err(unreadable)?.path());
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(unreadable(error)),
    }
    found.sort();
    Ok(found
        .into_iter()
        .partition(|path| path.extension().is_some_and(|end| end == "toml")))
}
