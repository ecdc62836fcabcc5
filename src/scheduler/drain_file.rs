//! What is drained, for the scheduler that comes next: `drains.json` in the state directory.
//!
//! ```json
//! {"version": 1, "drains": [{"instance_name_prefix": "", "platform": [["OSFamily", "linux"]],
//!   "size_class": 0, "worker_id_pattern": {"hostname": "a"}, "created": [1700000000, 0]}]}
//! ```
//!
//! 1. The file is whole at any time: a new one is written and synchronized beside it, and takes its
//!    place.
//! 2. A file that cannot be read is told of and put aside, and the scheduler starts without drains: it
//!    would rather use workers that it should not than serve nobody.
//! 3. There is no file, nor a directory for it, before there is a drain.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    sync::Arc,
};

use prost_types::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;

use super::{
    queue::{Drain, Platform, SizeClassQueueKey, WorkerPattern},
    shared_queue::SharedQueue,
};
use crate::{
    daemon,
    instance::InstanceName,
    proto::reapi::{self, platform::Property},
};

const VERSION: u32 = 1;
const FILE: &str = "drains.json";
/// Beyond this it is none of ours.
const LARGEST_FILE: u64 = 64 << 20;

#[derive(Deserialize, Serialize)]
struct DrainFileContent {
    version: u32,
    drains: Vec<DrainEntry>,
}

#[derive(Deserialize, Serialize)]
struct DrainEntry {
    instance_name_prefix: String,
    platform: Vec<(String, String)>,
    size_class: u32,
    worker_id_pattern: BTreeMap<String, String>,
    /// Seconds and nanoseconds since the epoch.
    created: (i64, i32),
}

/// The file, and which version of the drains is in it.
pub(super) struct DrainFile {
    path: PathBuf,
    written: Mutex<u64>,
}

/// Why the drains are not in the file.
#[derive(Debug, thiserror::Error)]
#[error("could not write the drains to {}: {error}; see state.directory", .path.display())]
pub(super) struct NotWritten {
    path: PathBuf,
    error: io::Error,
}

impl DrainFile {
    pub(super) fn new(directory: &Path) -> Arc<Self> {
        Arc::new(DrainFile {
            path: directory.join(FILE),
            written: Mutex::new(0),
        })
    }

    /// How many drains there are at the start, where later ones could be kept; else why not. Nothing is
    /// changed.
    pub(super) fn check(directory: &Path) -> Result<usize, String> {
        let drains = read(&directory.join(FILE))?.len();
        let made = directory.ancestors().find(|path| path.exists());
        let made = made.unwrap_or(Path::new("/"));
        let access = rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK;
        match made.is_dir() {
            true => rustix::fs::access(made, access)
                .map(|()| drains)
                .map_err(|error| format!("{}: {error}", made.display())),
            false => Err(format!("{} is no directory", made.display())),
        }
    }

    /// What the scheduler before this one drained.
    pub(super) fn read(&self) -> Vec<Drain> {
        match read(&self.path) {
            Ok(drains) => {
                if !drains.is_empty() {
                    let (file, drains) = (self.path.display(), drains.len());
                    tracing::info!(%file, drains, "workers are drained as before");
                }
                drains
            }
            Err(error) => {
                let aside = self.path.with_extension("json.unreadable");
                let kept = match fs::rename(&self.path, &aside) {
                    Ok(()) => format!("it is kept as {}", aside.display()),
                    Err(error) => format!("it could not be put aside: {error}"),
                };
                tracing::warn!(
                    file = %self.path.display(),
                    %error,
                    "what was drained is not known, so that all workers get work; {kept}"
                );
                Vec::new()
            }
        }
    }

    /// Writes what is drained now, unless it has been written.
    pub(super) async fn write(&self, queue: &SharedQueue) -> Result<(), NotWritten> {
        let mut written = self.written.lock().await;
        let (version, drains) = queue.drains().borrow().clone();
        if version == *written {
            return Ok(());
        }
        let path = self.path.clone();
        let result = daemon::spawn_blocking(move || write(&path, &drains)).await;
        let result = result.unwrap_or_else(|error| Err(io::Error::other(error)));
        result.map_err(|error| NotWritten {
            path: self.path.clone(),
            error,
        })?;
        *written = version;
        Ok(())
    }

    /// Writes whenever something changes; never returns.
    pub(super) async fn run(&self, queue: &SharedQueue) {
        let mut changes = queue.drains();
        while changes.changed().await.is_ok() {
            if let Err(error) = self.write(queue).await {
                tracing::warn!("{error}");
            }
        }
        std::future::pending::<()>().await;
    }
}

fn read(path: &Path) -> Result<Vec<Drain>, String> {
    let size = match fs::metadata(path) {
        Ok(metadata) => metadata.len(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error.to_string()),
    };
    if size > LARGEST_FILE {
        return Err(format!("it has {size} bytes"));
    }
    let data = fs::read(path).map_err(|error| error.to_string())?;
    parse(&data)
}

fn parse(data: &[u8]) -> Result<Vec<Drain>, String> {
    /// What all versions have.
    #[derive(Deserialize)]
    struct Header {
        version: u32,
    }
    let header: Header = serde_json::from_slice(data).map_err(|error| error.to_string())?;
    if header.version > VERSION {
        return Err(format!(
            "it is of a newer scheduler, version {}",
            header.version
        ));
    }
    let content: DrainFileContent =
        serde_json::from_slice(data).map_err(|error| error.to_string())?;
    content.drains.into_iter().map(DrainEntry::drain).collect()
}

impl DrainEntry {
    fn of(drain: &Drain) -> Self {
        DrainEntry {
            instance_name_prefix: drain.key.prefix.as_str().to_owned(),
            platform: drain.key.platform.properties().to_vec(),
            size_class: drain.key.size_class,
            worker_id_pattern: drain.pattern.labels().clone(),
            created: (drain.created.seconds, drain.created.nanos),
        }
    }

    fn drain(self) -> Result<Drain, String> {
        let properties = self.platform.into_iter();
        let platform = reapi::Platform {
            properties: properties
                .map(|(name, value)| Property { name, value })
                .collect(),
        };
        let prefix = InstanceName::parse(&self.instance_name_prefix);
        Ok(Drain {
            key: SizeClassQueueKey {
                platform: Platform::parse(Some(&platform)).map_err(|error| error.to_string())?,
                prefix: prefix.map_err(|error| error.to_string())?,
                size_class: self.size_class,
            },
            pattern: WorkerPattern::new(self.worker_id_pattern),
            created: Timestamp {
                seconds: self.created.0,
                nanos: self.created.1,
            },
        })
    }
}

fn write(path: &Path, drains: &[Drain]) -> io::Result<()> {
    let content = DrainFileContent {
        version: VERSION,
        drains: drains.iter().map(DrainEntry::of).collect(),
    };
    let directory = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(directory)?;
    let new = path.with_extension("json.new");
    let mut file = File::create(&new)?;
    file.write_all(&serde_json::to_vec(&content)?)?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    // The new name, too.
    File::open(directory)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drain(size_class: u32) -> Drain {
        let labels = [("hostname".to_owned(), "a \"quoted\" host".to_owned())];
        let properties = [("OSFamily".to_owned(), "linux".to_owned())];
        Drain {
            key: SizeClassQueueKey {
                platform: Platform::from(&BTreeMap::from(properties)),
                prefix: InstanceName::parse("a/b").unwrap(),
                size_class,
            },
            pattern: WorkerPattern::new(labels.into()),
            created: Timestamp {
                seconds: 7,
                nanos: 9,
            },
        }
    }

    #[test]
    fn what_was_drained_is_drained_after_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let state = directory.path().join("state");
        let file = DrainFile::new(&state);
        assert_eq!(file.read(), []);
        assert!(!state.exists());
        for drains in [vec![drain(0), drain(4)], vec![drain(4)], vec![]] {
            write(&file.path, &drains).unwrap();
            assert_eq!(DrainFile::new(&state).read(), drains);
        }
        assert_eq!(fs::read_dir(&state).unwrap().count(), 1);
    }

    #[test]
    fn whether_drains_can_be_kept_is_known_before_there_are_any() {
        let directory = tempfile::tempdir().unwrap();
        let state = directory.path().join("state");
        assert_eq!(DrainFile::check(&state), Ok(0));
        assert!(!state.exists());
        write(&state.join(FILE), &[drain(0)]).unwrap();
        assert_eq!(DrainFile::check(&state), Ok(1));
        fs::write(state.join(FILE), "{").unwrap();
        assert!(DrainFile::check(&state).is_err());
        assert!(state.join(FILE).exists());
        let file = directory.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(DrainFile::check(&file.join("state")).is_err());
    }

    #[test]
    fn a_file_that_is_torn_newer_or_foreign_is_put_aside() {
        let directory = tempfile::tempdir().unwrap();
        let file = DrainFile::new(directory.path());
        write(&file.path, &[drain(0)]).unwrap();
        let whole = fs::read(&file.path).unwrap();
        let newer = br#"{"version": 2, "something": "else"}"#;
        let unsorted = br#"{"version":1,"drains":[{"instance_name_prefix":"","platform":[["b",""],["a",""]],"size_class":0,"worker_id_pattern":{},"created":[0,0]}]}"#;
        let mut bad: Vec<&[u8]> = (0..whole.len()).map(|end| &whole[..end]).collect();
        bad.extend([&newer[..], unsorted, b"[]", b"\xff", b"null"]);
        for content in bad {
            fs::write(&file.path, content).unwrap();
            assert_eq!(file.read(), []);
            assert!(!file.path.exists());
            let aside = file.path.with_extension("json.unreadable");
            assert_eq!(fs::read(aside).unwrap(), content);
        }
    }
}
