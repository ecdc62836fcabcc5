//! Cleaning up around actions, for what they share: directories that are emptied, and a command.
//!
//! Runs before the first of some actions that overlap, and after the last one of them; no action
//! starts meanwhile. Buildbarn: clean_temporary_directories, run_command_cleaner.

use std::{fs, io, path::PathBuf, process::Command};

use parking_lot::Mutex;

#[derive(Debug)]
pub struct Cleaner {
    directories: Vec<PathBuf>,
    command: Vec<String>,
    /// Actions that run.
    running: Mutex<usize>,
}

/// An action that runs.
pub struct Busy<'a>(&'a Cleaner);

impl Cleaner {
    pub fn new(directories: Vec<PathBuf>, command: Vec<String>) -> Self {
        Cleaner {
            directories,
            command,
            running: Mutex::new(0),
        }
    }

    pub fn begin(&self) -> io::Result<Busy<'_>> {
        let mut running = self.running.lock();
        if *running == 0 {
            self.clean()?;
        }
        *running += 1;
        Ok(Busy(self))
    }

    fn clean(&self) -> io::Result<()> {
        for directory in &self.directories {
            for entry in fs::read_dir(directory)? {
                let path = entry?.path();
                let removed = match fs::symlink_metadata(&path)?.is_dir() {
                    true => fs::remove_dir_all(&path),
                    false => fs::remove_file(&path),
                };
                removed.map_err(|error| about(&path.to_string_lossy(), &error))?;
            }
        }
        if let Some((program, arguments)) = self.command.split_first() {
            let status = Command::new(program)
                .args(arguments)
                .stdin(std::process::Stdio::null())
                .status()
                .map_err(|error| about(program, &error))?;
            if !status.success() {
                return Err(io::Error::other(format!("{program} failed: {status}")));
            }
        }
        Ok(())
    }
}

fn about(subject: &str, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{subject}: {error}"))
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        let mut running = self.0.running.lock();
        *running -= 1;
        if *running == 0
            && let Err(error) = self.0.clean()
        {
            // The next action is refused if it still fails then.
            tracing::warn!(%error, "could not clean up after actions");
        }
    }
}
