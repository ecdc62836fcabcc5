//! Messages about a wrong value: which key has it, what it is, and what to write instead.

use super::parse::{ExpectedType, PathStep, ValueError, ValueErrorKind};
use crate::text::one_of;

/// As written in a file; which one of several is told by the line.
pub(super) fn dotted(path: &[PathStep]) -> String {
    let steps: Vec<&str> = path
        .iter()
        .filter_map(|step| match step {
            PathStep::Key(key) => Some(key.as_str()),
            PathStep::Index(_) => None,
        })
        .collect();
    steps.join(".")
}

/// `defaults` has every key that there is.
pub(super) fn message_of(fault: &ValueError, defaults: &toml::Table) -> String {
    let key = dotted(&fault.path);
    match &fault.kind {
        ValueErrorKind::UnknownKey(known) => unknown_key(&fault.path, known, defaults),
        ValueErrorKind::UnknownVariant { word, known } => {
            let hint = match closest(word, known.iter().copied()) {
                Some(meant) => format!("did you mean {meant:?}? "),
                None => String::new(),
            };
            let words = one_of(known);
            format!("{key} is the text {word:?}, which is not known here; {hint}Write {words}")
                .replace("; Write", "; write")
        }
        ValueErrorKind::Value(message) => format!("{key}: {message}"),
        ValueErrorKind::Type { found, wanted } => {
            let last = key.rsplit('.').next().unwrap_or(&key);
            let subject = match fault.path.last() {
                Some(PathStep::Index(_)) => format!("an item of {key}"),
                _ => key.clone(),
            };
            let remedy = match wanted {
                ExpectedType::Boolean => "write true or false, without quotes".to_owned(),
                ExpectedType::Integer(least, i64::MAX) => {
                    format!("write a whole number, at least {least}, without quotes")
                }
                ExpectedType::Integer(least, greatest) => {
                    format!("write a whole number from {least} to {greatest}, without quotes")
                }
                ExpectedType::Number => "write a number, such as 2.5, without quotes".to_owned(),
                ExpectedType::Text if subject != key => "write a text in quotes".to_owned(),
                ExpectedType::Text => format!("write a text in quotes, such as {last} = \"...\""),
                ExpectedType::List if found == "a section" => {
                    format!("there can be several; write [[{key}]], with two brackets")
                }
                ExpectedType::List => {
                    format!("write a list in brackets, such as {last} = [\"...\", \"...\"]")
                }
                ExpectedType::Section if found == "a list of sections" => {
                    format!("there is only one; write [{key}], with single brackets")
                }
                ExpectedType::Section => {
                    format!(
                        "write [{key}], with its keys below, or {last} = {{ KEY = VALUE, ... }}"
                    )
                }
                ExpectedType::Other(wanted) => format!("write {wanted}"),
            };
            format!("{subject} is {found}; {remedy}")
        }
    }
}

fn unknown_key(path: &[PathStep], known: &[&str], defaults: &toml::Table) -> String {
    let key = dotted(path);
    let (name, section) = match path.split_last() {
        Some((PathStep::Key(name), section)) => (name.as_str(), dotted(section)),
        _ => return format!("there is no key {key}"),
    };
    let start = match section.as_str() {
        "" => format!("there is no key or section {name}"),
        section => format!("there is no key {name} in [{section}]"),
    };
    let wanted = spelled(name);
    if let Some(meant) = closest(&wanted, known.iter().copied()) {
        return format!("{start}; did you mean {meant}?");
    }
    let mut all = Vec::new();
    every_key("", defaults, &mut all);
    if name.contains('.') && all.contains(&key) {
        return format!("{start}, with a dot in its name; write {name} without quotes");
    }
    let last = |key: &str| key.rsplit('.').next().unwrap_or(key).to_owned();
    let elsewhere: Vec<&String> = all.iter().filter(|key| last(key) == wanted).collect();
    match elsewhere.as_slice() {
        [key] if !key.contains('.') => {
            return format!(
                "{start}; {key} belongs to no section: write it above the first line with brackets"
            );
        }
        [key] => return format!("{start}; did you mean {key}?"),
        [] => {}
        keys => {
            let keys: Vec<&str> = keys.iter().map(|key| key.as_str()).collect();
            return format!("{start}; did you mean {}?", keys.join(" or "));
        }
    }
    if let Some(meant) = closest(&spelled(&key), all.iter().map(String::as_str)) {
        return format!("{start}; did you mean {meant}?");
    }
    format!("{start}; there are {}", known.join(", "))
}

/// As keys are spelled here; other programs of this kind write `maximumSizeBytes`.
fn spelled(name: &str) -> String {
    let mut spelled = String::new();
    for c in name.chars() {
        if c.is_ascii_uppercase() && !spelled.is_empty() && !spelled.ends_with(['_', '.']) {
            spelled.push('_');
        }
        spelled.push(match c {
            '-' | ' ' => '_',
            c => c.to_ascii_lowercase(),
        });
    }
    let end = ["_bytes", "_path"]
        .iter()
        .find_map(|end| spelled.strip_suffix(end).map(str::len));
    spelled.truncate(end.unwrap_or(spelled.len()));
    spelled
}

fn every_key(prefix: &str, table: &toml::Table, into: &mut Vec<String>) {
    for (name, value) in table {
        let key = format!("{prefix}{name}");
        match value {
            toml::Value::Table(inner) => every_key(&format!("{key}."), inner, into),
            toml::Value::Array(items) => {
                for inner in items.iter().filter_map(toml::Value::as_table) {
                    every_key(&format!("{key}."), inner, into);
                }
            }
            _ => {}
        }
        into.push(key);
    }
}

/// The one that is spelled most alike, if it is alike at all.
fn closest<'w>(word: &str, words: impl Iterator<Item = &'w str>) -> Option<&'w str> {
    words
        .map(|known| (distance(word, known), known))
        .filter(|(distance, known)| *distance <= (known.chars().count() / 3).max(1))
        .min()
        .map(|(_, known)| known)
}

/// How many characters must be put in, taken out, replaced or swapped with their neighbours.
fn distance(a: &str, b: &str) -> usize {
    // Nobody misspells a key at such length.
    let a: Vec<char> = a.chars().take(100).collect();
    let b: Vec<char> = b.chars().take(100).collect();
    let mut rows = vec![(0..=b.len()).collect::<Vec<usize>>()];
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let replaced = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut best = replaced.min(rows[i - 1][j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            row.push(best);
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{parse::parse, runner, worker};

    fn said<C: serde::de::DeserializeOwned + Default + serde::Serialize>(text: &str) -> String {
        let fault = parse::<C>(&text.parse().unwrap()).err().unwrap();
        message_of(&fault, &toml::Table::try_from(C::default()).unwrap())
    }

    #[test]
    fn a_key_that_there_is_not_is_answered_with_the_one_that_was_meant() {
        for (text, meant) in [
            ("cache.maximum_sise = 1", "did you mean maximum_size?"),
            ("cache.maxmium_size = 1", "did you mean maximum_size?"),
            ("cache.maximumSizeBytes = 1", "did you mean maximum_size?"),
            ("cache.build_directory = 1", "write it above the first line"),
            ("maximum_files = 1", "did you mean cache.maximum_files?"),
            (
                "endpoint = 1",
                "runners.endpoint or scheduler.endpoint or storage.azure.endpoint or",
            ),
            (
                "\"cache.directory\" = 1",
                "write cache.directory without quotes",
            ),
            ("cahce.maximum_size = 1", "did you mean cache?"),
            ("shutdown.xyzzy = 1", "there are drain_timeout"),
            (
                "runners = [{ conccurrency = 1 }]",
                "did you mean concurrency?",
            ),
        ] {
            let said = said::<worker::Config>(text);
            assert!(said.contains(meant), "{text}: {said}");
        }
    }

    #[test]
    fn a_value_that_is_none_is_answered_in_words_of_people() {
        for (text, words) in [
            (
                "users.first = -1",
                "users.first is the number -1; write a whole number from 0",
            ),
            ("users.first = \"58000\"", "without quotes"),
            ("users = 5", "write [users]"),
            (
                "[[users]]\nfirst = 1",
                "write [users], with single brackets",
            ),
            ("allowed_users = \"x\"", "write a list in brackets"),
            (
                "allowed_users = [1]",
                "an item of allowed_users is the number 1; write a text in quotes",
            ),
            (
                "set_tmpdir_environment_variable = \"yes\"",
                "write true or false",
            ),
            ("limits.processors = \"2\"", "write a number, such as 2.5"),
            (
                "containment.mounts = \"on\"",
                "write \"auto\", \"require\" or \"off\"",
            ),
            (
                "containment.mounts = \"requre\"",
                "did you mean \"require\"?",
            ),
            ("containment.mounts = true", "is true; write \"auto\""),
            (
                "limits.memory = 10",
                "limits.memory is the number 10; write a size with its unit",
            ),
            ("limits.memory = \"10\"", "\"10\" is no size"),
            ("log.level = 2026-01-01", "log.level is a date"),
        ] {
            let said = said::<runner::Config>(text);
            assert!(said.contains(words), "{text}: {said}");
            for rust in ["u32", "u64", "usize", "struct", "expected"] {
                assert!(!said.contains(rust), "{text}: {said}");
            }
        }
        let said = said::<worker::Config>("[runners]\nconcurrency = 1");
        assert!(said.contains("write [[runners]]"), "{said}");
    }
}
