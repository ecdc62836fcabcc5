//! Secrets in files, which are read again when they change: keys of object stores, passwords.

use std::{path::Path, sync::Arc};

use super::{
    CheckReport, Failure, Lifecycle,
    reloadable::{Reloadable, read_small},
};

/// By the keys that name their files. Cheap to clone.
#[derive(Clone, Default)]
pub(super) struct Secrets(Arc<Vec<SecretFile>>);

/// A file, and the key that names it.
type SecretFile = (&'static str, Arc<Reloadable<Arc<String>>>);

impl Secrets {
    pub(super) fn open(
        files: Vec<(&'static str, &Path)>,
        lifecycle: Option<&Lifecycle>,
    ) -> Result<Self, Failure> {
        let open = |(key, path): (&'static str, &Path)| {
            let from = path.to_owned();
            let load = move || read(&from).map(Arc::new);
            let file = Reloadable::open(key, [path.to_owned()], load)
                .map_err(|message| Failure::Configuration { key, message })?;
            if let Some(lifecycle) = lifecycle {
                lifecycle.keep_fresh(&file);
            }
            Ok((key, file))
        };
        let opened = files.into_iter().map(open).collect::<Result<Vec<_>, _>>()?;
        Ok(Secrets(Arc::new(opened)))
    }

    /// What the file says now.
    pub(super) fn value(&self, key: &str) -> Option<Arc<String>> {
        let mut files = self.0.iter();
        let (_, file) = files.find(|(name, _)| *name == key)?;
        Some(Arc::clone(&file.value()))
    }
}

fn read(path: &Path) -> Result<String, String> {
    let refuse = |why: &str| format!("{}: {why}", path.display());
    let text = String::from_utf8(read_small(path)?)
        .map_err(|_| refuse("it is no text; name the file with the secret"))?;
    match text.trim() {
        "" => Err(refuse("it is empty; write the secret into it")),
        text => Ok(text.to_owned()),
    }
}

/// Whether the files can be read.
pub fn check_secrets(files: &[(&'static str, &Path)], report: &mut CheckReport) {
    for (key, path) in files {
        let failure = read(path).err();
        let failure = failure.map(|message| Failure::Configuration { key, message });
        report.record(format!("{key}: {} can be read", path.display()), failure);
    }
}
