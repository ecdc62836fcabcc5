//! Files that are read again when they change: certificates, keys, tokens.
//!
//! 1. A value is that of the last files that were right; a broken one changes nothing, and the log says
//!    so once.
//! 2. Two files that belong together are not replaced at one moment. So what is wrong is told only when
//!    it is still so at the next look, unless somebody asks for a reload.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use parking_lot::Mutex;

/// What is read from files, and read again.
pub(super) struct Reloadable<T> {
    /// For the log: the key that names the files.
    key: &'static str,
    files: Vec<PathBuf>,
    load: Box<dyn Fn() -> Result<T, String> + Send + Sync>,
    state: Mutex<ReloadState<T>>,
}

struct ReloadState<T> {
    value: Arc<T>,
    /// What the files were when they were read last.
    seen: Vec<Option<FileStamp>>,
    /// Why the last reading failed, and whether that was told.
    failure: Option<(String, bool)>,
}

/// What changes when a file is replaced or written to.
type FileStamp = (u64, u64, u64, i64, i64, i64, i64);

/// Files of a daemon that change while it runs.
pub(super) trait Refresh: Send + Sync {
    /// Reads files again that have changed; it blocks. `is_asked` when somebody waits for it.
    fn refresh(&self, is_asked: bool);
}

impl<T> Reloadable<T> {
    /// Reads the files for the first time.
    pub(super) fn open(
        key: &'static str,
        files: impl IntoIterator<Item = PathBuf>,
        load: impl Fn() -> Result<T, String> + Send + Sync + 'static,
    ) -> Result<Arc<Self>, String> {
        let files: Vec<PathBuf> = files
            .into_iter()
            .filter(|file| !file.as_os_str().is_empty())
            .collect();
        // Before they are read, so that no change is missed.
        let seen = stamps(&files);
        let value = Arc::new(load()?);
        Ok(Arc::new(Reloadable {
            key,
            files,
            load: Box::new(load),
            state: Mutex::new(ReloadState {
                value,
                seen,
                failure: None,
            }),
        }))
    }

    /// What the files said when they were last right.
    pub(super) fn value(&self) -> Arc<T> {
        self.state.lock().value.clone()
    }
}

impl<T: Send + Sync> Reloadable<T> {
    /// Reads files again that have changed since somebody looked; it blocks. Whether they say something
    /// else now.
    pub(super) fn look(&self) -> bool {
        let before = self.value();
        let has_changed = self.state.lock().seen != stamps(&self.files);
        if has_changed {
            self.refresh(false);
        }
        !Arc::ptr_eq(&before, &self.value())
    }
}

impl<T: Send + Sync> Refresh for Reloadable<T> {
    fn refresh(&self, is_asked: bool) {
        let now = stamps(&self.files);
        let is_known = {
            let state = self.state.lock();
            let is_told = state.failure.as_ref().is_none_or(|(_, told)| *told);
            state.seen == now && is_told
        };
        if is_known {
            return;
        }
        let loaded = (self.load)();
        let mut state = self.state.lock();
        let is_new = state.seen != now;
        state.seen = now;
        match loaded {
            Ok(value) => {
                state.value = Arc::new(value);
                state.failure = None;
                drop(state);
                tracing::info!(key = self.key, "files have changed, and were read again");
            }
            Err(error) => {
                let is_told = is_asked || !is_new;
                state.failure = Some((error.clone(), is_told));
                drop(state);
                if is_told {
                    tracing::error!(
                        key = self.key,
                        error,
                        "files have changed, but cannot be used; what was read before stays in use"
                    );
                }
            }
        }
    }
}

fn stamps(files: &[PathBuf]) -> Vec<Option<FileStamp>> {
    let stamp = |file: &PathBuf| {
        let file = fs::metadata(file).ok()?;
        Some((
            file.dev(),
            file.ino(),
            file.len(),
            file.mtime(),
            file.mtime_nsec(),
            file.ctime(),
            file.ctime_nsec(),
        ))
    };
    files.iter().map(stamp).collect()
}

/// The content of a file that is small by its nature.
pub(super) fn read_small(path: &Path) -> Result<Vec<u8>, String> {
    const LARGEST: u64 = 4 << 20;
    let refuse = |why: String| format!("{}: {why}", path.display());
    let unreadable = |error: std::io::Error| {
        let remedy = match error.kind() {
            std::io::ErrorKind::NotFound => "write where it is",
            std::io::ErrorKind::PermissionDenied => {
                "let this daemon's user read it, by chgrp and chmod g+r, or setfacl(1)"
            }
            _ => "name a file that can be read",
        };
        refuse(format!("could not be read: {error}; {remedy}"))
    };
    let metadata = fs::metadata(path).map_err(unreadable)?;
    if !metadata.is_file() {
        return Err(refuse("it is no file".to_owned()));
    }
    if metadata.len() > LARGEST {
        return Err(refuse(format!("it has more than {LARGEST} bytes")));
    }
    fs::read(path).map_err(unreadable)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broken_file_changes_nothing_and_the_next_right_one_counts() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("number");
        let write = |text: &str| fs::write(&path, text).unwrap();
        write("1");
        let load = {
            let path = path.clone();
            move || {
                let text = String::from_utf8(read_small(&path)?).map_err(|e| e.to_string())?;
                text.parse::<u32>().map_err(|error| error.to_string())
            }
        };
        let number = Reloadable::open("key", [path.clone(), PathBuf::new()], load).unwrap();
        let value = || *number.value();
        let failure = || number.state.lock().failure.clone().map(|(_, told)| told);
        assert_eq!(value(), 1);
        write("broken");
        number.refresh(false);
        assert_eq!((value(), failure()), (1, Some(false)));
        number.refresh(false);
        assert_eq!((value(), failure()), (1, Some(true)));
        write("22");
        number.refresh(false);
        assert_eq!((value(), failure()), (22, None));
        fs::remove_file(&path).unwrap();
        number.refresh(true);
        assert_eq!((value(), failure()), (22, Some(true)));
        write("333");
        number.refresh(true);
        assert_eq!((value(), failure()), (333, None));
    }
}
