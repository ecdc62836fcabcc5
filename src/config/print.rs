//! The effective configuration: every key with its value and where that comes from.

use std::path::Path;

use super::{Loaded, Validate, locate};

/// TOML that means the same, as `sshd -T` prints it. `path` is what `loaded` was read from.
pub fn effective<C: Validate>(path: &Path, loaded: &Loaded<C>) -> String {
    let mut lines = Vec::new();
    let mut sections = Vec::new();
    let table = toml::Table::try_from(&loaded.config).unwrap_or_default();
    let source = |key: &str| match locate(path, key) {
        Some((file, line)) => format!("{}:{line}", file.display()),
        None => "default".to_owned(),
    };
    print("", "", &table, &source, &mut lines, &mut sections);
    lines.extend(sections);
    lines.join("\n") + "\n"
}

/// Sections that there can be several of come last, since what follows them would be theirs.
fn print(
    written: &str,
    place: &str,
    table: &toml::Table,
    source: &impl Fn(&str) -> String,
    lines: &mut Vec<String>,
    sections: &mut Vec<String>,
) {
    for (name, value) in table {
        let key = format!("{written}{}", quoted(name));
        let place = format!("{place}{name}");
        match value {
            toml::Value::Table(inner) if !inner.is_empty() => {
                print(
                    &format!("{key}."),
                    &format!("{place}."),
                    inner,
                    source,
                    lines,
                    sections,
                );
            }
            toml::Value::Array(items)
                if !items.is_empty() && items.iter().all(toml::Value::is_table) =>
            {
                for (number, item) in items.iter().enumerate() {
                    let place = format!("{place}.{number}");
                    sections.push(format!("\n[[{key}]]  # {}", source(&place)));
                    let mut inner = Vec::new();
                    if let toml::Value::Table(item) = item {
                        let place = format!("{place}.");
                        print("", &place, item, source, &mut inner, &mut Vec::new());
                    }
                    sections.extend(inner);
                }
            }
            value => lines.push(format!("{key} = {value}  # {}", source(&place))),
        }
    }
}

fn quoted(name: &str) -> String {
    let bare = |c: char| c.is_ascii_alphanumeric() || "-_".contains(c);
    match !name.is_empty() && name.chars().all(bare) {
        true => name.to_owned(),
        false => toml::Value::String(name.to_owned()).to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{examine, worker};

    #[test]
    fn what_is_printed_means_the_same_and_says_where_each_key_comes_from() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("w.toml");
        let drop_in = directory.path().join("w.toml.d/10.toml");
        std::fs::create_dir(drop_in.parent().unwrap()).unwrap();
        std::fs::write(
            &path,
            "cache.maximum_files = 7\nbuild_directory = \"/b\"\n[[runners]]\nsize_class = 3\n",
        )
        .unwrap();
        let text = "cache.maximum_files = 8\n\n[[runners]]\nconcurrency = 2\n\
                    environment_variables = { \"a b\" = \"\\\"\\n\" }\n\n[[runners]]\nplatform = {}\n";
        std::fs::write(&drop_in, text).unwrap();
        let loaded = examine::<worker::Config>(&path, false);
        assert!(loaded.errors.is_empty(), "{:?}", loaded.errors);
        let printed = effective(&path, &loaded);
        for line in [
            format!("cache.maximum_files = 8  # {}:1", drop_in.display()),
            format!("build_directory = \"/b\"  # {}:2", path.display()),
            "cache.maximum_size = \"20GiB\"  # default".to_owned(),
            "size_class = 0  # default".to_owned(),
            format!("[[runners]]  # {}:7", drop_in.display()),
            format!("concurrency = 2  # {}:4", drop_in.display()),
        ] {
            assert!(
                printed.lines().any(|known| known == line),
                "{line}\n{printed}"
            );
        }
        let again: worker::Config = toml::from_str(&printed).unwrap();
        assert_eq!(again, loaded.config);
    }
}
