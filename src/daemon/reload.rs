//! Reading the configuration again while the daemon runs.
//!
//! 1. A configuration with an error changes nothing.
//! 2. Keys in `LIVE` change at once. For every other key whose value differs from what the daemon
//!    runs with, the log says that a restart is needed, after each reload until there was one.

use std::{collections::BTreeSet, path::PathBuf};

use super::logging::LevelHandle;
use crate::config::{self, Log, Validate};

/// What changes without a restart.
const LIVE: [&str; 1] = ["log.level"];

/// What the daemon runs with.
pub(super) struct ReloadableConfig<C> {
    pub path: PathBuf,
    pub optional: bool,
    pub table: toml::Table,
    pub log_of: fn(&C) -> &Log,
}

impl<C: Validate> ReloadableConfig<C> {
    /// Returns one line for `systemctl status`; empty when nothing waits for a restart.
    pub(super) fn reload(&mut self, level: &LevelHandle) -> String {
        let (config, table) = match config::read::<C>(&self.path, self.optional) {
            Ok(loaded) => (loaded.config, loaded.table),
            Err(error) => {
                tracing::error!("could not reload, and goes on as before: {error}");
                return "configuration not reloaded, because of an error in it".to_owned();
            }
        };
        let changed = self.changed(&table);
        if changed.is_empty() {
            tracing::info!("reloaded; nothing has changed");
            return String::new();
        }
        let mut waiting = Vec::new();
        for key in changed {
            if LIVE.contains(&key.as_str()) {
                level.set((self.log_of)(&config).level);
                set(&mut self.table, &key, get(&table, &key).cloned());
                tracing::info!(key, "reloaded");
            } else {
                tracing::warn!(key, "changed, but takes effect only after a restart");
                waiting.push(key);
            }
        }
        match waiting.as_slice() {
            [] => String::new(),
            keys => format!("restart to apply: {}", keys.join(", ")),
        }
    }

    /// Keys whose values differ, not just their spelling.
    fn changed(&self, new: &toml::Table) -> BTreeSet<String> {
        let mut keys = BTreeSet::new();
        leaves("", &self.table, &mut keys);
        leaves("", new, &mut keys);
        let running = C::deserialize(self.table.clone()).ok();
        keys.retain(|key| {
            if get(&self.table, key) == get(new, key) {
                return false;
            }
            let mut patched = self.table.clone();
            set(&mut patched, key, get(new, key).cloned());
            C::deserialize(patched).ok() != running
        });
        keys
    }
}

/// Dotted keys of everything that is no table.
fn leaves(prefix: &str, table: &toml::Table, into: &mut BTreeSet<String>) {
    for (name, value) in table {
        match value {
            toml::Value::Table(table) => leaves(&format!("{prefix}{name}."), table, into),
            _ => {
                into.insert(format!("{prefix}{name}"));
            }
        }
    }
}

fn get<'t>(table: &'t toml::Table, key: &str) -> Option<&'t toml::Value> {
    match key.split_once('.') {
        Some((name, rest)) => get(table.get(name)?.as_table()?, rest),
        None => table.get(key),
    }
}

fn set(table: &mut toml::Table, key: &str, value: Option<toml::Value>) {
    match (key.split_once('.'), value) {
        (Some((name, rest)), value) => {
            let inner = table
                .entry(name)
                .or_insert_with(|| toml::Value::Table(toml::Table::new()));
            if let toml::Value::Table(inner) = inner {
                set(inner, rest, value);
            }
        }
        (None, Some(value)) => {
            table.insert(key.to_owned(), value);
        }
        (None, None) => {
            table.remove(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::worker::Config;

    #[test]
    fn only_what_really_changed_waits_for_a_restart_until_there_was_one() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("w.toml");
        let write = |text: &str| std::fs::write(&path, text).unwrap();
        write("cache.maximum_size = \"20GiB\"\n[[runners]]\nconcurrency = 2\n");
        let table = config::read::<Config>(&path, false).unwrap().table;
        let mut running = ReloadableConfig::<Config> {
            path: path.clone(),
            optional: false,
            table,
            log_of: |config| &config.log,
        };
        let level = LevelHandle::default();

        // Another spelling of the same values.
        write("cache.maximum_size = \"20480MiB\"\n[[runners]]\nconcurrency = 2\nsize_class = 0\n");
        assert_eq!(running.reload(&level), "");

        write(
            "log.level = \"debug\"\nstorage.browser_url = \"http://x\"\n[[runners]]\nconcurrency = 3\n",
        );
        let wait = "restart to apply: runners, storage.browser_url";
        assert_eq!(running.reload(&level), wait);
        assert_eq!(running.reload(&level), wait);
        let changed = running.changed(&config::read::<Config>(&path, false).unwrap().table);
        assert!(!changed.contains("log.level"), "{changed:?}");

        write("no_such_key = 1\n");
        assert!(running.reload(&level).contains("error"));

        write("log.level = \"debug\"\n[[runners]]\nconcurrency = 2\n");
        assert_eq!(running.reload(&level), "");
    }
}
