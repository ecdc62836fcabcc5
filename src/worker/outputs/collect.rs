//! What is collected, in order: logs of the command, declared outputs, logs of servers.

use std::{
    fs::File,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::FileExt,
    },
};

use prost::Message;
use rustix::{
    fs::{AtFlags, FileType},
    io::Errno,
};

use super::collector::{Blobs, CollectedOutputs, Collector, read_link, unreadable};
use crate::{
    digest::Digest,
    proto::reapi,
    text::shorten,
    worker::{
        beneath,
        command::{Command, CommandOutput, OutputKind},
        fault::Fault,
    },
};

impl<S: FnMut(Blobs)> Collector<'_, S> {
    /// The action's directory has `stdout`, `stderr` and `server_logs`; `root` is the input root. `was_run` says that
    /// the runner answered: it makes the two logs before it starts the command.
    pub fn collect(
        mut self,
        action_directory: BorrowedFd<'_>,
        root: BorrowedFd<'_>,
        command: &Command,
        was_run: bool,
    ) -> CollectedOutputs {
        self.found.stdout = self.log(action_directory, "stdout", was_run);
        self.found.stderr = self.log(action_directory, "stderr", was_run);
        self.overlapping = command.outputs_overlap();
        self.hash_outputs_ahead(root, &command.outputs);
        for output in &command.outputs {
            if self.bounds.are_exceeded() {
                break;
            }
            if let Err(fault) = self.output(root, output) {
                self.fail(fault);
            }
        }
        self.server_logs(action_directory);
        if !self.batch.is_empty() {
            (self.send)(std::mem::take(&mut self.batch));
        }
        self.found
    }

    fn log(
        &mut self,
        action_directory: BorrowedFd<'_>,
        name: &str,
        was_run: bool,
    ) -> Option<Digest> {
        let (file, stat) = match beneath::open_file(action_directory, name) {
            Ok(opened) => opened,
            Err(Errno::NOENT) if was_run => {
                self.fail(Fault::Contended(format!(
                    "somebody on the worker's host, or the command itself, removed the file of its {name} while it ran"
                )));
                return None;
            }
            // The command was not started.
            Err(Errno::NOENT) => return None,
            Err(error) => {
                self.fail(Fault::of_disk(format!("read {name} of the command"), error));
                return None;
            }
        };
        if stat.st_size == 0 {
            return None;
        }
        match self.log_file(file, &stat, name) {
            Ok(digest) => Some(digest),
            Err(fault) => {
                self.fail(fault);
                None
            }
        }
    }

    fn output(&mut self, root: BorrowedFd<'_>, output: &CommandOutput) -> Result<(), Fault> {
        let text = shorten(&output.text);
        let unreadable = |error: Errno| unreadable(&text, error);
        let wrong = |is: &str, declared: &str| {
            Fault::Precondition(format!(
                "the command made output {text:?} a {is}, but the client declared it as a {declared}"
            ))
        };
        let Some((parent_path, name)) = output.path.split_last() else {
            if output.kind == OutputKind::File {
                return Err(wrong("directory", "file"));
            }
            let directory = beneath::open_listing(root, ".").map_err(unreadable)?;
            return self.output_directory(output, directory);
        };
        let parent = match beneath::open_directory(root, &parent_path) {
            Ok(parent) => parent,
            Err(Errno::NOENT) => return Ok(()),
            Err(Errno::NOTDIR | Errno::LOOP) => {
                return Err(Fault::Invalid(format!(
                    "output {text:?} cannot be read: the command replaced a directory on the way to it by something else"
                )));
            }
            Err(error) => return Err(unreadable(error)),
        };
        let stat = match rustix::fs::statat(&parent, name.as_str(), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            // An output that was not made is not listed (REAPI: ActionResult.output_files).
            Err(Errno::NOENT) => return Ok(()),
            Err(error) => return Err(unreadable(error)),
        };
        match (FileType::from_raw_mode(stat.st_mode), output.kind) {
            (FileType::RegularFile, OutputKind::Directory) => Err(wrong("file", "directory")),
            (FileType::Directory, OutputKind::File) => Err(wrong("directory", "file")),
            (FileType::RegularFile, _) => {
                let (digest, executable) = self.file(parent.as_fd(), name.as_str(), &text)?;
                let found = reapi::OutputFile {
                    path: output.text.clone(),
                    digest: Some(digest.to_proto()),
                    is_executable: executable,
                    node_properties: self.properties.of(&stat),
                    ..Default::default()
                };
                self.bounds.add_to_lists(found.encoded_len())?;
                self.found.files.push(found);
                Ok(())
            }
            (FileType::Directory, _) => {
                let directory =
                    beneath::open_listing(parent.as_fd(), name.as_str()).map_err(unreadable)?;
                self.output_directory(output, directory)
            }
            (FileType::Symlink, kind) => {
                let symlink = reapi::OutputSymlink {
                    path: output.text.clone(),
                    target: read_link(parent.as_fd(), name.as_str(), &text)?,
                    node_properties: self.properties.of(&stat),
                };
                self.bounds.add_to_lists(2 * symlink.encoded_len() + 6)?;
                // Clients of REAPI 2.0 read only these (REAPI: ActionResult.output_symlinks).
                let to_directory = match kind {
                    OutputKind::File => false,
                    OutputKind::Directory => true,
                    OutputKind::Any => {
                        let place = parent_path.join(name.clone());
                        beneath::leads_to_directory(root, &place)
                    }
                };
                match to_directory {
                    true => self.found.directory_symlinks.push(symlink.clone()),
                    false => self.found.file_symlinks.push(symlink.clone()),
                }
                self.found.symlinks.push(symlink);
                Ok(())
            }
            _ => Err(Fault::Invalid(format!(
                "output {text:?} is neither a file, nor a directory, nor a symbolic link"
            ))),
        }
    }

    /// Every regular file beneath `server_logs`, by its path there.
    fn server_logs(&mut self, action_directory: BorrowedFd<'_>) {
        const DIRECTORY: &str = "server_logs";
        let Ok(logs) = beneath::open_listing(action_directory, DIRECTORY) else {
            return;
        };
        let mut rest = vec![(".".to_owned(), 0)];
        while let Some((path, depth)) = rest.pop() {
            if self.bounds.are_exceeded() {
                return;
            }
            let entries = beneath::open_listing(logs.as_fd(), &path)
                .map_err(|error| unreadable(DIRECTORY, error))
                .and_then(|directory| Ok((self.list(&directory, DIRECTORY)?, directory)));
            let (entries, directory) = match entries {
                Ok(entries) => entries,
                Err(fault) => {
                    self.fail(fault);
                    continue;
                }
            };
            for (name, kind) in entries {
                let path = match path.as_str() {
                    "." => name.clone(),
                    path => format!("{path}/{name}"),
                };
                match kind {
                    // What is deeper is no log of a server.
                    FileType::Directory if depth < 15 => rest.push((path, depth + 1)),
                    FileType::RegularFile => {
                        if let Err(fault) = self.server_log(directory.as_fd(), &name, path) {
                            self.fail(fault);
                            if self.bounds.are_exceeded() {
                                return;
                            }
                        }
                    }
                    _ => {}
                }
            }
        }
    }

    fn server_log(
        &mut self,
        directory: BorrowedFd<'_>,
        name: &str,
        path: String,
    ) -> Result<(), Fault> {
        let (file, stat) =
            beneath::open_file(directory, name).map_err(|error| unreadable(&path, error))?;
        let human_readable = is_text(&file);
        let digest = self.log_file(file, &stat, &path)?;
        let log = reapi::LogFile {
            digest: Some(digest.to_proto()),
            human_readable,
        };
        self.bounds
            .add_to_lists(path.len() + log.encoded_len() + 12)?;
        self.found.server_logs.insert(path, log);
        Ok(())
    }
}

/// Whether a file begins like a text: what a client shows of a log, where it would else only name it.
fn is_text(file: &File) -> bool {
    let mut start = [0; 4096];
    let Ok(length) = file.read_at(&mut start, 0) else {
        return false;
    };
    let start = &start[..length];
    let is_utf8 = match std::str::from_utf8(start) {
        Ok(_) => true,
        // The last character is cut.
        Err(error) => error.error_len().is_none() && length == 4096,
    };
    is_utf8 && !start.contains(&0)
}
