//! Reading the configuration again while the daemon runs.
//!
//! 1. A configuration with an error changes nothing.
//! 2. `log.level` changes at once, and so does what a daemon has registered as `LiveKeys`; where that cannot be
//!    used, it stays as it was, and the log says so. For every other key whose value differs from what the
//!    daemon runs with, the log says that a restart is needed, after each reload until there was one.

use std::{collections::BTreeSet, path::PathBuf, sync::Arc};

use super::{Lifecycle, lifecycle::LiveKeys, logging::LevelHandle};
use crate::config::{self, Log, Validate};

const LOG_LEVEL: &str = "log.level";

/// What the daemon runs with.
pub(super) struct ReloadableConfig<C> {
    pub path: PathBuf,
    pub optional: bool,
    pub table: toml::Table,
    pub log_of: fn(&C) -> &Log,
}

impl<C: Validate> ReloadableConfig<C> {
    /// Returns one line for `systemctl status`; empty when nothing waits for a restart.
    pub(super) fn reload(
        &mut self,
        level: &LevelHandle,
        live: &[Arc<LiveKeys>],
        lifecycle: &Lifecycle,
    ) -> String {
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
        let mut applied = BTreeSet::new();
        let mut refused = BTreeSet::new();
        if changed.contains(LOG_LEVEL) {
            level.set((self.log_of)(&config).level);
            applied.insert(LOG_LEVEL.to_owned());
        }
        for live in live {
            let keys: Vec<&String> = changed.iter().filter(|key| live.has(key)).collect();
            if keys.is_empty() {
                continue;
            }
            match (live.apply)(table.clone(), lifecycle) {
                Ok(()) => applied.extend(keys.into_iter().cloned()),
                Err(failure) => {
                    tracing::error!("could not reload, and goes on as before: {failure}");
                    refused.extend(keys.into_iter().cloned());
                }
            }
        }
        let mut waiting = Vec::new();
        for key in changed.difference(&refused) {
            if applied.contains(key) {
                set(&mut self.table, key, get(&table, key).cloned());
                tracing::info!(key, "reloaded");
            } else {
                tracing::warn!(key, "changed, but takes effect only after a restart");
                waiting.push(key.as_str());
            }
        }
        let refused: Vec<&str> = refused.iter().map(String::as_str).collect();
        let told = [
            ("not reloaded, because of an error: ", refused),
            ("restart to apply: ", waiting),
        ];
        let told = told.into_iter().filter(|(_, keys)| !keys.is_empty());
        let told: Vec<String> = told
            .map(|(what, keys)| format!("{what}{}", keys.join(", ")))
            .collect();
        told.join("; ")
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
    use crate::{config::worker::Config, daemon::Failure};

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
        assert_eq!(running.reload(&level, &[], &Lifecycle::new()), "");

        write(
            "log.level = \"debug\"\nstorage.browser_url = \"http://x\"\n[[runners]]\nconcurrency = 3\n",
        );
        let wait = "restart to apply: runners, storage.browser_url";
        assert_eq!(running.reload(&level, &[], &Lifecycle::new()), wait);
        assert_eq!(running.reload(&level, &[], &Lifecycle::new()), wait);
        let changed = running.changed(&config::read::<Config>(&path, false).unwrap().table);
        assert!(!changed.contains("log.level"), "{changed:?}");

        write("no_such_key = 1\n");
        assert!(
            running
                .reload(&level, &[], &Lifecycle::new())
                .contains("error")
        );

        write("log.level = \"debug\"\n[[runners]]\nconcurrency = 2\n");
        assert_eq!(running.reload(&level, &[], &Lifecycle::new()), "");
    }
    #[test]
    fn what_a_daemon_takes_up_itself_changes_at_once_unless_it_cannot_be_used() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("w.toml");
        let write = |name: &str| {
            let text = format!("storage.browser_url = \"{name}\"\nlog.level = \"debug\"\n");
            std::fs::write(&path, text).unwrap();
        };
        write("http://a");
        let mut running = ReloadableConfig::<Config> {
            path: path.clone(),
            optional: false,
            table: config::read::<Config>(&path, false).unwrap().table,
            log_of: |config| &config.log,
        };
        let live = [Arc::new(LiveKeys {
            keys: &["storage"],
            apply: Box::new(|table, _| match get(&table, "storage.browser_url") {
                Some(url) if url.as_str() == Some("http://bad") => Err(Failure::Environment {
                    message: "bad".to_owned(),
                }),
                _ => Ok(()),
            }),
        })];
        let mut reload = || running.reload(&LevelHandle::default(), &live, &Lifecycle::new());
        write("http://bad");
        let refused = "not reloaded, because of an error: storage.browser_url";
        assert_eq!(reload(), refused);
        assert_eq!(reload(), refused);
        write("http://b");
        assert_eq!(reload(), "");
        assert_eq!(reload(), "");
    }
}
