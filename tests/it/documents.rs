//! What is written in etc/ is what the programs do.

use std::{collections::BTreeSet, fs, path::PathBuf};

use bb_remote_execution::config::{self, Check};
use serde::de::DeserializeOwned;

fn repository() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// The shipped file with every commented-out default switched on.
fn switched_on(name: &str) -> String {
    fs::read_to_string(repository().join("etc").join(name))
        .unwrap()
        .lines()
        .map(|line| match line.strip_prefix('#') {
            Some(rest) if !rest.is_empty() && !rest.starts_with(' ') => rest,
            _ => line,
        })
        .collect::<Vec<_>>()
        .join("\n")
}

fn keys(prefix: &str, table: &toml::Table, into: &mut BTreeSet<String>) {
    for (name, value) in table {
        into.insert(format!("{prefix}{name}"));
        match value {
            toml::Value::Table(table) => keys(&format!("{prefix}{name}."), table, into),
            toml::Value::Array(items) => {
                for item in items {
                    if let toml::Value::Table(table) = item {
                        keys(&format!("{prefix}{name}."), table, into);
                    }
                }
            }
            _ => {}
        }
    }
}

fn shipped_file_states_the_defaults<C>(name: &str)
where
    C: DeserializeOwned + Default + Check + PartialEq + std::fmt::Debug,
{
    let as_shipped: C = config::load(&repository().join("etc").join(name), false).unwrap();
    assert_eq!(as_shipped, C::default(), "{name} as shipped");
    let text = switched_on(name);
    let stated: C = toml::from_str(&text).unwrap_or_else(|error| panic!("{name}: {error}"));
    assert_eq!(stated, C::default(), "{name} with its defaults switched on");

    // Every key is there: a struct tells its fields only by refusing one that it lacks.
    let mut stated = BTreeSet::new();
    keys("", &toml::from_str(&text).unwrap(), &mut stated);
    let mut sections = BTreeSet::from([String::new()]);
    sections.extend(
        stated
            .iter()
            .filter_map(|key| key.rsplit_once('.'))
            .map(|(section, _)| section.to_owned()),
    );
    for section in sections {
        let header = match section.as_str() {
            "" => String::new(),
            "runners" => "[[runners]]\n".to_owned(),
            section => format!("[{section}]\n"),
        };
        let Err(error) = toml::from_str::<C>(&format!("{header}no_such_key = 1\n")) else {
            // A map, such as a platform, takes any key.
            continue;
        };
        for field in error.message().split('`').skip(3).step_by(2) {
            let key = if section.is_empty() {
                field.to_owned()
            } else {
                format!("{section}.{field}")
            };
            assert!(stated.contains(&key), "{name} does not state {key}");
        }
    }
}

#[test]
fn shipped_configurations_state_every_key_with_its_default() {
    shipped_file_states_the_defaults::<config::scheduler::Config>("bb_scheduler.toml");
    shipped_file_states_the_defaults::<config::worker::Config>("bb_worker.toml");
    shipped_file_states_the_defaults::<config::runner::Config>("bb_runner.toml");
}
