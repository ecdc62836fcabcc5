//! What the host's units say about a daemon: systemd's files, read as systemd.unit(5) does.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use crate::config::ListenAddress;

/// Where units are, the first one winning.
const DIRECTORIES: [&str; 5] = [
    "etc/systemd/system",
    "run/systemd/system",
    "usr/local/lib/systemd/system",
    "usr/lib/systemd/system",
    "lib/systemd/system",
];

/// The units of one host.
#[derive(Clone, Debug)]
pub struct SystemdUnits {
    root: PathBuf,
}

impl SystemdUnits {
    /// `root` is `/` but for tests.
    pub fn of(root: &Path) -> Self {
        SystemdUnits {
            root: root.to_owned(),
        }
    }

    /// Whether systemd runs this host (sd_booted(3)).
    pub fn are_in_use(&self) -> bool {
        self.root.join("run/systemd/system").is_dir()
    }

    /// The assignments of a key, empty ones having reset those before them. `None` when there is no
    /// such unit, or it is masked.
    pub fn setting(&self, unit: &str, section: &str, key: &str) -> Option<Vec<String>> {
        let directories = DIRECTORIES.map(|directory| self.root.join(directory));
        let (instance, names) = names(unit);
        let file = names
            .iter()
            .flat_map(|name| {
                directories
                    .iter()
                    .map(move |directory| directory.join(name))
            })
            .find(|file| file.symlink_metadata().is_ok())?;
        let text = fs::read_to_string(&file)
            .ok()
            .filter(|text| !text.is_empty())?;
        // Drop-ins are in the order of their names, wherever they are; of two of one name, the one
        // in the first directory counts.
        let mut drop_ins: Vec<PathBuf> = Vec::new();
        for directory in names.iter().flat_map(|name| {
            let drop_ins = format!("{name}.d");
            directories
                .iter()
                .map(move |directory| directory.join(&drop_ins))
        }) {
            let entries = fs::read_dir(directory);
            for entry in entries.into_iter().flatten().flatten() {
                let path = entry.path();
                let known = |other: &PathBuf| other.file_name() == path.file_name();
                if path.extension().is_some_and(|end| end == "conf") && !drop_ins.iter().any(known)
                {
                    drop_ins.push(path);
                }
            }
        }
        drop_ins.sort_by_key(|path| path.file_name().map(ToOwned::to_owned));
        let texts = drop_ins
            .iter()
            .filter_map(|path| fs::read_to_string(path).ok());
        let mut values = Vec::new();
        for text in std::iter::once(text).chain(texts) {
            assignments(&text, section, key, &mut values);
        }
        if let Some(instance) = instance {
            for value in &mut values {
                *value = value.replace("%i", instance);
            }
        }
        Some(values)
    }

    /// How long systemd waits for a daemon that is to stop; `None` is for ever.
    pub fn stop_timeout(&self, unit: &str) -> Option<StopTimeout> {
        let values = self.setting(unit, "Service", "TimeoutStopSec")?;
        // systemd-system.conf(5), DefaultTimeoutStopSec=
        let text = values.last().map_or("90s", String::as_str);
        match text {
            "infinity" | "0" => Some(StopTimeout::Infinite),
            text => time_span(text).map(StopTimeout::After),
        }
    }

    /// Where a socket unit listens.
    pub fn listens(&self, unit: &str) -> Option<Vec<ListenAddress>> {
        let values = self.setting(unit, "Socket", "ListenStream")?;
        Some(values.iter().filter_map(|text| stream(text)).collect())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopTimeout {
    After(Duration),
    Infinite,
}

/// The instance of a unit, if it is one of a template, and the names of its files, the first one winning.
fn names(unit: &str) -> (Option<&str>, Vec<String>) {
    let parts = unit.split_once('@').and_then(|(name, rest)| {
        let (instance, kind) = rest.rsplit_once('.')?;
        (!instance.is_empty()).then(|| (instance, format!("{name}@.{kind}")))
    });
    match parts {
        Some((instance, template)) => (Some(instance), vec![unit.to_owned(), template]),
        None => (None, vec![unit.to_owned()]),
    }
}

fn assignments(text: &str, section: &str, key: &str, values: &mut Vec<String>) {
    let mut within = false;
    for line in text.lines().map(str::trim) {
        if line.starts_with('[') {
            within = line.trim_matches(['[', ']']) == section;
        } else if within
            && !line.starts_with(['#', ';'])
            && let Some((name, value)) = line.split_once('=')
            && name.trim() == key
        {
            match value.trim() {
                "" => values.clear(),
                value => values.push(value.to_owned()),
            }
        }
    }
}

/// systemd.time(7): a number alone is one of seconds.
fn time_span(text: &str) -> Option<Duration> {
    match text.parse() {
        Ok(seconds) => Some(Duration::from_secs(seconds)),
        Err(_) => humantime::parse_duration(text).ok(),
    }
}

/// systemd.socket(5), ListenStream=
fn stream(text: &str) -> Option<ListenAddress> {
    match text.parse::<u16>() {
        // Of both families.
        Ok(port) => Some(ListenAddress::Tcp(
            (std::net::Ipv6Addr::UNSPECIFIED, port).into(),
        )),
        Err(_) if text.starts_with('/') => Some(ListenAddress::Unix(text.into())),
        Err(_) => text.parse().ok().map(ListenAddress::Tcp),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write_below(root: &Path, path: &str, text: &str) {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn units_are_read_with_their_drop_ins_as_systemd_does() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| write_below(root.path(), path, text);
        let units = SystemdUnits::of(root.path());
        assert!(!units.are_in_use());
        assert_eq!(units.stop_timeout("x.service"), None);
        write("lib/systemd/system/x.service", "[Service]\nUser=x\n");
        let after = |seconds| Some(StopTimeout::After(Duration::from_secs(seconds)));
        assert_eq!(units.stop_timeout("x.service"), after(90));
        for (text, timeout) in [
            ("300", after(300)),
            ("5min 20s", after(320)),
            ("infinity", Some(StopTimeout::Infinite)),
        ] {
            let text = format!("[Unit]\nTimeoutStopSec=1\n[Service]\nTimeoutStopSec = {text}\n");
            write("etc/systemd/system/x.service.d/20.conf", &text);
            write(
                "run/systemd/system/x.service.d/10.conf",
                "[Service]\nTimeoutStopSec=7\n",
            );
            assert_eq!(units.stop_timeout("x.service"), timeout);
        }
        write(
            "lib/systemd/system/x.socket",
            "[Socket]\nListenStream=127.0.0.1:1\n",
        );
        write(
            "etc/systemd/system/x.socket.d/override.conf",
            "[Socket]\nListenStream=\nListenStream=10.0.0.1:2\nListenStream=/run/x\n",
        );
        let listens = units.listens("x.socket").unwrap();
        let expected = ["10.0.0.1:2", "unix:/run/x"].map(|text| text.parse().unwrap());
        assert_eq!(listens, expected);
        std::os::unix::fs::symlink("/dev/null", root.path().join("etc/systemd/system/x.socket"))
            .unwrap();
        assert_eq!(units.listens("x.socket"), None);
    }

    #[test]
    fn an_instance_is_read_from_its_template() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| write_below(root.path(), path, text);
        let units = SystemdUnits::of(root.path());
        assert_eq!(units.listens("x@a.socket"), None);
        write(
            "lib/systemd/system/x@.socket",
            "[Socket]\nListenStream=/run/x-%i/socket\n",
        );
        let listens = |unit| units.listens(unit).unwrap();
        assert_eq!(
            listens("x@a.socket"),
            ["unix:/run/x-a/socket".parse().unwrap()]
        );
        write(
            "etc/systemd/system/x@a.socket.d/override.conf",
            "[Socket]\nListenStream=\nListenStream=/run/y\n",
        );
        assert_eq!(listens("x@a.socket"), ["unix:/run/y".parse().unwrap()]);
        assert_eq!(
            listens("x@b.socket"),
            ["unix:/run/x-b/socket".parse().unwrap()]
        );
    }
}
